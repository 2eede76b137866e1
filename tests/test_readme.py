"""Every command of the README runs, made small by further flags; the numbers in its tables are the code's."""

import csv
import re
import subprocess
import sys

import drqv2_pisco
import ppo_pisco
import pytest
import safetensors
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.+?)\n```", README, flags=re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
SMALL = "--num-envs 4 --num-steps 8 --num-minibatches 2 --total-timesteps 32 --torch-threads 1 --eval-episodes 1"
# A run too short to learn; its evaluation plays a whole episode, on small images.
SMALL_DMC = (
    "--total-frames 40 --image-size 24 --render-quality fast --hidden-dim 16 --batch-size 8 --seed-frames 20 "
    "--explore-steps 10 --eval-interval 0 --eval-episodes 1 --torch-threads 1"
)
SMALL_STATE = "--num-frames 400 --total-steps 20 --eval-interval 10 --torch-threads 1"
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "


def test_set_up_commands_install_the_same():
    main, tests = (re.search(rf"<!-- {name} -->\n```bash\n(.+)\n```", README).group(1) for name in ("main", "tests"))
    assert main == INSTALL + ".venv/bin/python ppo_pisco.py --freeze-layers 2"
    assert tests == INSTALL + ".venv/bin/python -m pytest -q -n auto tests"


@pytest.mark.parametrize("line", [line for line in COMMANDS if "ppo_pisco.py" in line and "pip install" not in line])
def test_training_commands(line, tmp_path):
    words = line.split()
    assert words[:2] == ["python", "ppo_pisco.py"]
    for i, word in enumerate(words):  # weights that another command of the README makes
        if word == "--encoder-weights" and words[i + 1].startswith("encoders/"):
            words[i + 1] = str(make_encoder(words, tmp_path))
    small = [] if "--help" in words else [*SMALL.split(), "--runs-dir", str(tmp_path / "runs")]
    result = subprocess.run([sys.executable, *words[1:], *small], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def make_encoder(words, tmp_path):
    """An encoder file of the shape that the command wants: the architecture's random weights."""
    atari = "Breakout-v5" in words
    args = ppo_pisco.Args(env_id="Pong-v5" if atari else "Jump-v0", feature_dim=512 if atari else 256)
    shape = (4, 84, 84) if atari else (1, 60, 60)
    path = tmp_path / "encoder.safetensors"
    ppo_pisco.save_encoder(path, ppo_pisco.Encoder("nature", shape, args.feature_dim), args, shape, 0)
    return path


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python drqv2_pisco.py")])
def test_drqv2_commands(line, tmp_path):
    words = line.split()
    for i, word in enumerate(words):
        if word == "--encoder-weights" and words[i + 1].startswith("encoders/") and not (ROOT / words[i + 1]).exists():
            path = tmp_path / "encoder.safetensors"
            words[i + 1] = str(path)
            drqv2_pisco.save_encoder(path, drqv2_pisco.Encoder((9, 24, 24)), drqv2_pisco.Args(), (9, 24, 24), 0)
    command = [sys.executable, *words[1:], *SMALL_DMC.split(), "--runs-dir", str(tmp_path / "runs")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python pretrain_encoder.py")])
def test_pretraining_commands(line, tmp_path):
    words = line.split()
    if "probe" in words:
        words += ["--output", str(tmp_path), "--num-random", "1"]
    else:
        small = SMALL_STATE if "--objective" in words else SMALL_DMC if "cartpole-balance" in words else SMALL
        words += [*small.split(), "--runs-dir", str(tmp_path / "runs"), "--output", str(tmp_path / "e.safetensors")]
    result = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / ("probe.png" if "probe" in words else "e.safetensors")).exists()


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("python benchmark/")])
def test_benchmark_commands_start(line):
    result = subprocess.run([sys.executable, *line.split()[1:], "--help"], cwd=ROOT, capture_output=True, timeout=100)
    assert result.returncode == 0


def test_every_command_is_run_here_or_by_the_gate():
    kinds = tuple(f"python {name}" for name in ("ppo_pisco.py", "drqv2_pisco.py", "pretrain_encoder.py", "benchmark/"))
    assert all(line.startswith((*kinds, INSTALL)) for line in COMMANDS)
    assert len(COMMANDS) > 10


def test_layer_table_has_the_codes_parameters():
    for architecture, expected in {
        "nature": [2_080, 32_832, 36_928, 262_400],
        "impala": [160, 4_640, 4_640, 4_640, 18_496, 18_496, 9_248, 18_496, 18_496, 524_544],
    }.items():
        layers = ppo_pisco.Encoder(architecture, (1, 60, 60), 256).layers
        assert [sum(p.numel() for p in layer.parameters()) for layer in layers] == expected
        assert all(f"{size:,}" in README for size in expected)


def test_shipped_encoder_is_what_the_readme_says():
    path = ROOT / "encoders" / "jump-v0__nature__rl.safetensors"
    assert path.stat().st_size < 2_000_000
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["objective"], metadata["tasks"], metadata["seed"]) == ("rl", "source", "1")
    assert f"{int(metadata['steps']):,} steps" in README


def test_probe_table_is_the_kept_one():
    with open(ROOT / "benchmark" / "results" / "probe" / "jump-v0__nature__rl.csv", newline="") as file:
        kept = [row for row in csv.DictReader(file) if row["variant"] == "pooled"]
    lines = re.findall(r"^\| (state R2|action accuracy) \| (pixels|\d) \| (.+) \|$", README, flags=re.M)
    assert len(lines) == 10
    for metric, layer, numbers in lines:
        rows = [row for row in kept if (row["metric"], row["layer"]) == (metric, layer.replace("pixels", "0"))]
        encoders = {True: [], False: []}  # pretrained, random
        for row in rows:
            encoders[row["encoder"] == "pretrained"].append([float(row[c]) for c in ("source", "target", "transfer")])
        means = [sum(column) / len(column) for part in (True, False) for column in zip(*encoders[part])]
        assert numbers == " | ".join(f"{mean:.2f}" for mean in means)


def scores_at(suite, method, column, step_column, step):
    """The scores at a step of a suite's kept runs, by seed."""
    folders = sorted((ROOT / "benchmark" / "results" / suite / method).iterdir(), key=lambda path: int(path.name))
    scores = []
    for folder in folders:
        with open(folder / "metrics.csv", newline="") as file:
            (score,) = [row[column] for row in csv.DictReader(file) if int(row[step_column]) == step]
        scores.append(float(score))
    return scores


def test_numbers_in_sentences_are_the_kept_runs():
    text = " ".join(README.split())
    for frames in (50_000, 70_000, 100_000):
        a, b, c = scores_at("dmc-small", "from_scratch", "episode_return", "frame", frames)
        assert f"{a:.0f}, {b:.0f} and {c:.0f} after {frames:,}" in text
    suite, *rest = "quickstart-two-cores", "eval/greedy_success", "global_step", 102_400
    a, b, c = scores_at(suite, "freeze_2_+_PiSCO", *rest)
    assert f"seeds 1, 2 and 3 solve {a:.2f}, {b:.2f} and {c:.2f} of the target tasks" in text
    a, b, c = scores_at(suite, "from_scratch", *rest)
    assert f"from scratch {a:.2f}, {b:.2f} and {c:.2f}, in 40 seconds each" in text
    ours, scratch = (
        sum(scores_at("dmc-transfer-repeat-8", method, "episode_return", "frame", 50_000)) / 3
        for method in ("frozen_bottom_+_PiSCO", "from_scratch")
    )
    assert f"ends at {ours:.0f}, the mean of three seeds, from scratch at {scratch:.0f}" in text


def test_pictures_exist():
    for name in re.findall(r"\]\((benchmark/figures/[^)]+)\)", README):
        assert (ROOT / name).read_bytes().startswith(b"\x89PNG")
