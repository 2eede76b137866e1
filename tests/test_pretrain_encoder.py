"""pretrain_encoder.py makes a file that ppo_pisco.py loads; the pieces that both files have are the same."""

import ast
import json
import subprocess
import sys

import ppo_pisco
import pretrain_encoder
import pytest
import safetensors.torch
import torch
from conftest import ROOT

TINY = "--total-timesteps 64 --num-envs 4 --num-steps 8 --num-minibatches 2 --feature-dim 32 --torch-threads 1 --no-cuda"


def pretrain(tmp_path, *flags):
    command = [sys.executable, str(ROOT / "pretrain_encoder.py"), *TINY.split(), "--runs-dir", str(tmp_path / "runs")]
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=200)


def test_writes_an_encoder_that_ppo_loads(tmp_path):
    output = tmp_path / "new" / "encoder.safetensors"
    result = pretrain(tmp_path, "--output", str(output), "--seed", "3")
    assert result.returncode == 0, result.stderr
    assert f"--encoder-weights {output}" in result.stdout
    with safetensors.safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert metadata["objective"] == "rl"
    assert metadata["environment"] == "Jump-v0"
    assert metadata["tasks"] == "source"
    assert metadata["architecture"] == "nature"
    assert metadata["steps"] == "64"
    assert metadata["seed"] == "3"
    assert 0.0 <= json.loads(metadata["score"])["eval/greedy_success"] <= 1.0
    flags = [*TINY.split(), "--encoder-weights", str(output), "--freeze-layers", "2", "--runs-dir", str(tmp_path / "b")]
    assert ppo_pisco.main(flags) == 0

    written = output.stat().st_mtime_ns
    # It replaces nothing unasked, and says so before it trains.
    before = safetensors.torch.load_file(output)
    result = pretrain(tmp_path, "--output", str(output))
    assert result.returncode == 2
    assert str(output) in result.stderr and "--force" in result.stderr
    assert result.stderr.count("\n") == 1
    assert output.stat().st_mtime_ns == written

    # A finished run is exported again by --resume.
    (run,) = (tmp_path / "runs").iterdir()
    again = tmp_path / "again.safetensors"
    command = [sys.executable, str(ROOT / "pretrain_encoder.py"), "--resume", str(run), "--output", str(again)]
    assert subprocess.run(command, capture_output=True, timeout=200).returncode == 0
    for name, tensor in safetensors.torch.load_file(again).items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--env-id", "Jumpp-v0"), "--env-id"),
        (("--jump-tasks", "nowhere"), "--jump-tasks"),
        (("--nonsense", "1"), "--nonsense"),
        (("--total-timesteps", "many"), "--total-timesteps"),
        (("--resume", "runs/nowhere"), "--resume"),
    ],
)
def test_bad_input(tmp_path, flags, named):
    result = pretrain(tmp_path, "--output", str(tmp_path / "e.safetensors"), *flags)
    assert result.returncode == 2
    assert named in result.stderr and result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "e.safetensors").exists()


def test_full_disk_or_bad_path_leaves_no_output(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = pretrain(tmp_path, "--output", str(tmp_path / "file" / "e.safetensors"))
    assert result.returncode == 2
    assert "file" in result.stderr and "Traceback" not in result.stderr


def test_shared_pieces_are_equal():
    """Functions and classes of one name in two files have one text."""

    def pieces(path):
        tree = ast.parse(path.read_text())
        return {node.name: ast.dump(node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}

    own = {"Args", "main", "train"}  # each file has its own
    one, two = pieces(ROOT / "ppo_pisco.py"), pieces(ROOT / "pretrain_encoder.py")
    shared = (one.keys() & two.keys()) - own
    assert {"UsageError", "write_atomically"} <= shared
    for name in shared:
        assert one[name] == two[name], name


def test_files_do_not_import_each_other():
    for path in (ROOT / "ppo_pisco.py", ROOT / "pretrain_encoder.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {"ppo_pisco", "pretrain_encoder"} & set(names)
    assert pretrain_encoder.PPO.exists()
