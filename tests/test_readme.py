"""Every command of the README runs, made small by further flags; its code runs outside the repository; its size."""

import json
import re
import subprocess
import sys
import tomllib

import pytest
import safetensors.torch
import torch
import torch.nn as nn
from conftest import ROOT, train

import drqv2_pisco
import ppo_pisco

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.+?)\n```", README, flags=re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]
SMALL = (
    "--num-envs 4 --num-steps 8 --num-minibatches 2 --total-timesteps 32 --torch-threads 1 --eval-episodes 1 "
    "--eval-max-steps 50"
)
# A run too short to learn; its evaluation plays a piece of an episode, on small images.
SMALL_DMC = (
    "--total-frames 1100 --image-size 24 --render-quality fast --hidden-dim 16 --batch-size 8 --seed-frames 1000 "
    "--explore-steps 500 --eval-interval 0 --eval-episodes 1 --eval-max-steps 10 --torch-threads 1"
)
SMALL_STATE = "--num-frames 400 --total-steps 20 --eval-interval 10 --torch-threads 1"
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "


def run(words, **kwargs):
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, **kwargs)
    assert result.returncode == 0, result.stderr


def commands(start):
    return [line for line in COMMANDS if line.startswith(start)]


def test_it_is_for_five_minutes():
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 13_000
    limits = {"ppo_pisco.py": 1000, "drqv2_pisco.py": 960, "pretrain_encoder.py": 540, "benchmark/probe.py": 350}
    for name, limit in limits.items():
        assert len((ROOT / name).read_text().splitlines()) <= limit, name


def test_set_up_commands_install_the_same():
    main, tests = (re.search(rf"<!-- {name} -->\n```bash\n(.+)\n```", README).group(1) for name in ("main", "tests"))
    assert main == INSTALL + ".venv/bin/python ppo_pisco.py --freeze-layers 2"
    assert tests == INSTALL + ".venv/bin/python -m pytest -q -n auto tests"


@pytest.mark.parametrize("line", commands("python ppo_pisco.py"))
def test_ppo_commands(line, tmp_path):
    words = line.split()[1:]
    if "timm:resnet18" in words:  # random weights that timm has written stand for those of its hub
        with pytest.raises(SystemExit, match="unknown"):
            ppo_pisco.timm_layers("timm:nothing", 3, 0.0)
        import timm

        safetensors.torch.save_file(timm.create_model("resnet18").state_dict(), tmp_path / "timm.safetensors")
        words[words.index("timm")] = str(tmp_path / "timm.safetensors")
    if "encoders/pong-v5__nature__rl.safetensors" in words:  # what another command of the README makes
        args, path = ppo_pisco.parse_args(["--env-id", "Pong-v5"]), tmp_path / "pong.safetensors"
        ppo_pisco.save_encoder(path, ppo_pisco.Encoder(args, (4, 84, 84)))
        words[words.index("encoders/pong-v5__nature__rl.safetensors")] = str(path)
    run([*words, *SMALL.split(), "--runs-dir", str(tmp_path / "runs")])


@pytest.mark.parametrize("line", commands("python drqv2_pisco.py"))
def test_drqv2_commands(line, tmp_path):
    run([*line.split()[1:], *SMALL_DMC.split(), "--runs-dir", str(tmp_path / "runs")])


@pytest.mark.parametrize("line", commands("python pretrain_encoder.py"))
def test_pretraining_commands(line, tmp_path):
    words = line.split()[1:]
    small = SMALL_STATE if "--objective" in words else f"{SMALL} --runs-dir {tmp_path / 'runs'}"
    run([*words, *small.split(), "--output", str(tmp_path / "encoder.safetensors")])
    assert (tmp_path / "encoder.safetensors").exists()


@pytest.mark.parametrize("line", commands("python benchmark/"))
def test_benchmark_commands_start(line):
    run([*line.split()[1:], "--help"])


def test_every_command_is_run_here_or_by_the_gate():
    kinds = tuple(f"python {name}" for name in ("ppo_pisco.py", "drqv2_pisco.py", "pretrain_encoder.py", "benchmark/"))
    assert all(line.startswith((*kinds, INSTALL, "tensorboard --logdir")) for line in COMMANDS)
    assert len(COMMANDS) > 10


def test_pisco_in_fifteen_lines_is_the_files_loss(tmp_path):
    """Outside of the repository, with nothing but torch."""
    snippet = re.search(r"<!-- pisco -->\n```python\n(.+?)\n```", README, flags=re.S).group(1)
    assert len(snippet.splitlines()) <= 15
    check = """
import torch
torch.manual_seed(0)
views = torch.rand(2, 6, 1, 60, 60)
loss = pisco_loss(*views)
loss.backward()
z1, z2 = encoder(views[0]), encoder(views[1])
torch.save([x.detach() for x in (actor(z1), actor(projector(z2)), loss)], "logits.pt")
assert encoder[0].weight.grad is None and encoder[3].weight.grad.any()
"""
    (tmp_path / "snippet.py").write_text(snippet + "\n" + check)
    subprocess.run([sys.executable, "-I", "snippet.py"], cwd=tmp_path, check=True, timeout=100)
    *logits, loss = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(ppo_pisco.pisco_loss(*logits), loss)
    defaults = ppo_pisco.Args()
    assert (defaults.ssl, defaults.ssl_teacher, defaults.projector) == ("pisco", "state", "none")


# Found by `uv pip compile --only-binary :all: --python-version V` with each file's dependencies: labmaze, which
# dm-control needs, has no wheels from 3.13 on, torch none from 3.15 on.
PYTHONS = {"ppo_pisco.py": "<3.15", "drqv2_pisco.py": "<3.13", "pretrain_encoder.py": "<3.13"}


@pytest.mark.parametrize("name", PYTHONS)
def test_inline_metadata_has_the_versions_of_the_requirements(name):
    """PEP 723: `uv run` installs what stands there, so that a copied file runs alone."""
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", (ROOT / name).read_text()).group(1)
    metadata = tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))
    wanted = re.findall(r"^([\w-]+==[\d.]+)", (ROOT / "requirements.txt").read_text(), flags=re.M)
    assert metadata["requires-python"] == f">=3.11,{PYTHONS[name]}" and set(metadata["dependencies"]) <= set(wanted)
    modules = {"pillow": "PIL", "dm-control": "dm_control", "mujoco": "dm_control"}  # mujoco comes with dm_control
    for dependency in wanted:
        package = dependency.split("==")[0]
        module = modules.get(package, package)
        pattern = rf"^\s*(import|from) {module}\b|import_module\(\"{module}\"\)"
        imported = re.search(pattern, (ROOT / name).read_text(), re.M)
        # pretrain_encoder.py imports the other two, torch's writer tensorboard, and timm is for those who ask for it.
        if name != "pretrain_encoder.py" and package not in ("tensorboard", "timm"):
            assert (dependency in metadata["dependencies"]) == bool(imported), dependency


def test_layer_table_has_the_codes_parameters():
    written = {"nature": [], "impala": []}
    for row in README.split("| layer | nature")[1].split("\n\n")[0].splitlines()[2:]:
        labels, _, *cells = row.strip("|").split("|")
        for _ in labels.split(","):  # "5, 6" are two
            for found, cell in zip(written.values(), (cells[0], cells[2])):
                found += [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", cell)]
    assert [len(found) for found in written.values()] == [4, 10]
    for architecture, expected in written.items():
        layers = ppo_pisco.Encoder(ppo_pisco.Args(encoder=architecture), (1, 60, 60)).layers
        assert [sum(p.numel() for p in layer.parameters()) for layer in layers] == expected
    assert len(drqv2_pisco.Encoder(drqv2_pisco.Args(), (9, 84, 84)).layers) == 4


def test_shipped_encoder_is_what_its_readme_says():
    path = ROOT / "encoders" / "jump-v0__nature__rl.safetensors"
    assert path.stat().st_size < 2_000_000
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["objective"], metadata["tasks"], metadata["seed"]) == ("rl", "source", "1")
    assert f"{int(metadata['steps']):,} environment steps" in (ROOT / "encoders" / "README.md").read_text()


def code_of_encoders_page(name):
    text = (ROOT / "encoders" / "README.md").read_text()
    return re.search(rf"<!-- {name} -->\n```python\n(.+?)\n```", text, flags=re.S).group(1)


def test_weights_of_cleanrl_are_loaded_as_the_page_says(tmp_path, monkeypatch):
    """Its Atari network gives the same features, here of images of 84x84 pixels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU())
    theirs = nn.ModuleDict({"network": network, "actor": nn.Linear(512, 4), "critic": nn.Linear(512, 1)})
    monkeypatch.chdir(tmp_path)
    torch.save(theirs.state_dict(), "cleanrl.pt")
    exec(code_of_encoders_page("own"), {})
    encoder = ppo_pisco.Encoder(ppo_pisco.Args(feature_dim=512), (4, 84, 84))
    assert ppo_pisco.load_encoder("mine.safetensors", encoder)["environment"] == "Pong-v5"
    images = torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    torch.testing.assert_close(encoder(images), network(images / 255))


def test_a_trained_agent_plays_as_the_page_says(tmp_path):
    folder = train(tmp_path, "--jump-tasks target --eval-episodes 1 --jump-prior 0.5 --learning-rate 0.01")
    code = re.sub(r'Path\("runs/.+?"\)', "folder", code_of_encoders_page("play"))
    exec(code, found := {"folder": folder})
    trained = safetensors.torch.load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in found["agent"].state_dict().items())
    greedy = json.loads((folder / "evaluation.json").read_text())["greedy"]
    assert [episode["return"] for episode in found["episodes"]] == greedy["return"] and len(greedy["return"]) == 7
    assert found["logits"].shape == (7, 2) and found["values"].shape == (7,)


def test_pictures_are_those_of_the_pages():
    page = (ROOT / "benchmark" / "README.md").read_text()
    shown = {*re.findall(r"\]\(benchmark/figures/([^)]+)\)", README), *re.findall(r"\]\(figures/([^)]+)\)", page)}
    assert shown == {path.name for path in (ROOT / "benchmark" / "figures").iterdir()}
    for name in shown:
        assert (ROOT / "benchmark" / "figures" / name).read_bytes().startswith((b"\x89PNG", b"GIF8"))
