"""The edits that people make to the two files take few places and work: each is made to a copy, which then trains."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import drqv2_pisco
import ppo_pisco

OWN_ENVIRONMENT = '''
import gymnasium as gym
import numpy as np


class Mine(gym.Env):
    """Grey images of 40x44 pixels; five discrete actions from 1 on, or two continuous ones in 0..10."""

    def __init__(self, continuous=False):
        shape = (1, 40, 44) if continuous else (40, 44, 1)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gym.spaces.Box(0.0, 10.0, (2,)) if continuous else gym.spaces.Discrete(5, start=1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        return self.observation_space.sample(), 1.0, False, self.t == 10, {}
'''
PPO = "--num-envs 4 --num-steps 8 --num-minibatches 2 --total-timesteps 32 --jump-tasks 20:10 --jump-eval-tasks 45:20"
DRQV2 = (
    "--env-id cartpole-balance --image-size 24 --render-quality fast --hidden-dim 16 --batch-size 8 --total-frames 60 "
    "--seed-frames 20 --explore-steps 5 --eval-episodes 1 --eval-max-steps 20"
)


def train_edited(file, edits, flags, tmp_path, monkeypatch):
    """Replaces each old text, which must stand in the file once, trains and returns the edited module, its run's folder
    and the rows of metrics.csv."""
    text = (ROOT / file).read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / f"edited_{file}"
    path.write_text(text)
    (tmp_path / "own_environment.py").write_text(OWN_ENVIRONMENT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_environment", raising=False)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    if hasattr(module, "DMCPixels"):  # short episodes, so that there is something to sample
        real = module.DMCPixels.__init__

        def short(self, *args, **kwargs):
            real(self, *args, **kwargs)
            self.env._step_limit = 20

        monkeypatch.setattr(module.DMCPixels, "__init__", short)
    common = f"--torch-threads 1 --no-cuda --runs-dir {tmp_path / 'runs'}"
    folder = module.train(module.parse_args(f"{PPO if 'ppo' in file else DRQV2} {flags} {common}".split()))
    with open(folder / "metrics.csv", newline="") as metrics:
        return module, folder, list(csv.DictReader(metrics))


def test_new_encoder_takes_two_places(tmp_path, monkeypatch):
    layers = (
        "def small_layers(channels):\n    return [nn.Sequential(nn.Conv2d(channels, 8, 9, stride=6), nn.GELU())]\n\n\n"
    )
    edits = [
        ("def impala_layers(channels):", f"{layers}def impala_layers(channels):"),
        ('"impala": impala_layers}', '"impala": impala_layers, "small": small_layers}'),
    ]
    flags = "--encoder small --freeze-layers 1 --freeze-random --encoder-weights none"
    _, folder, rows = train_edited("ppo_pisco.py", edits, flags, tmp_path, monkeypatch)
    weights = ppo_pisco.safetensors.torch.load_file(folder / "encoder.safetensors")
    assert weights["layers.0.0.weight"].shape == (8, 1, 9, 9) and rows[0]["losses/pisco"]


LOSS = """def l2_loss(z, p):
    assert p.requires_grad and not z.requires_grad  # a teacher is never trained
    return (z - p).square().mean()


"""
BRANCH = """    elif args.ssl == "l2":
        loss, teacher, student = l2_loss, z_teacher, p
"""


@pytest.mark.parametrize("file", ["ppo_pisco.py", "drqv2_pisco.py"])
def test_new_loss_takes_three_places(tmp_path, monkeypatch, file):
    """And has both teachers and all projectors."""
    edits = [
        ('ssl: Literal["pisco", "simsiam",', 'ssl: Literal["pisco", "l2", "simsiam",'),
        ("def info_nce_loss(", f"{LOSS}def info_nce_loss("),
        ('    elif args.ssl == "simsiam":', f'{BRANCH}    elif args.ssl == "simsiam":'),
    ]
    for own in ("--projector mlp", "--ssl-teacher view --projector residual"):
        _, _, rows = train_edited(file, edits, f"--ssl l2 --encoder-weights none {own}", tmp_path, monkeypatch)
        assert float(rows[-1]["losses/l2"]) > 0


def test_own_environment_with_ppo_takes_one_place(tmp_path, monkeypatch):
    start = '    if args.env_id == "Jump-v0":\n        return'
    own = (
        '    if args.env_id == "Mine":\n        from own_environment import Mine\n\n'
        "        return gym.vector.SyncVectorEnv([Mine] * num_envs, autoreset_mode=NEXT_STEP)\n"
    )
    flags = "--env-id Mine --eval-episodes 1 --eval-interval 0"
    module, folder, rows = train_edited("ppo_pisco.py", [(start, own + start)], flags, tmp_path, monkeypatch)
    weights = ppo_pisco.safetensors.torch.load_file(folder / "model.safetensors")
    assert weights["actor.0.weight"].shape[0] == 5 and rows[0]["eval/greedy_return"] == "10.0"
    assert module.ImageEnvs(module.Args(env_id="Mine"), 2).obs_shape == (1, 40, 44)


def test_own_environment_with_drqv2_takes_one_place(tmp_path, monkeypatch):
    line = "    return DMCPixels(args.env_id, args.image_size, args.action_repeat, args.render_quality)\n"
    own = (
        "    from own_environment import Mine\n\n"
        "    return gym.wrappers.RescaleAction(Mine(continuous=True), -1.0, 1.0)\n"
    )
    _, folder, rows = train_edited(
        "drqv2_pisco.py", [(line, own)], "--env-id Mine --action-repeat 1", tmp_path, monkeypatch
    )
    weights = ppo_pisco.safetensors.torch.load_file(folder / "encoder.safetensors")
    assert weights["layers.0.0.weight"].shape == (32, 3, 3, 3)  # three grey images
    assert rows[-1]["eval/greedy_return"] == "10.0" and rows[-1]["losses/pisco"]


def test_own_environment_of_float_images_is_refused_by_drqv2(tmp_path, monkeypatch):
    """Images in 0..1 would be stored as black ones."""
    line = "    return DMCPixels(args.env_id, args.image_size, args.action_repeat, args.render_quality)\n"
    own = (
        "    from own_environment import Mine\n\n"
        "    env = gym.wrappers.RescaleAction(Mine(continuous=True), -1.0, 1.0)\n"
        "    return gym.wrappers.TransformObservation(env, lambda obs: obs / np.float32(255), env.observation_space)\n"
    )
    with pytest.raises(TypeError, match="float32.*uint8"):
        train_edited("drqv2_pisco.py", [(line, own)], "--env-id Mine --action-repeat 1", tmp_path, monkeypatch)


def test_direction_of_the_kl_takes_one_place(tmp_path, monkeypatch):
    edits = [("return (p.exp() * (p - q)).sum(-1)", "return (q.exp() * (q - p)).sum(-1)")]
    module, _, _ = train_edited("ppo_pisco.py", edits, "--encoder-weights none", tmp_path, monkeypatch)
    a, b = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    torch.testing.assert_close(module.pisco_loss(a, b), ppo_pisco.categorical_kl(b, a).mean())
    assert not torch.allclose(module.pisco_loss(a, b), ppo_pisco.pisco_loss(a, b))


@pytest.mark.parametrize(
    "file, line",
    [("ppo_pisco.py", '            row = {"global_step"'), ("drqv2_pisco.py", '        row = {"global_step"')],
)
def test_one_more_number_takes_one_place(tmp_path, monkeypatch, file, line):
    _, folder, rows = train_edited(
        file,
        [(line, f'{line}: 0, "charts/answer": 42, "global_step"')],
        "--encoder-weights none",
        tmp_path,
        monkeypatch,
    )
    assert rows[-1]["charts/answer"] == "42" and rows[-1]["global_step"] != "0"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert EventAccumulator(str(folder)).Reload().Scalars("charts/answer")[-1].value == 42


@pytest.mark.parametrize("module, shape", [(ppo_pisco, (1, 60, 60)), (drqv2_pisco, (9, 24, 24))])
def test_freezing_the_top_takes_one_place(tmp_path, monkeypatch, module, shape):
    old = "        self.layers[: self.frozen].requires_grad_(False)"
    new = "        self.layers[len(self.layers) - self.frozen :].requires_grad_(False)\n        self.frozen = 0"
    encoder = module.Encoder(module.Args(), shape)
    module.save_encoder(tmp_path / "start.safetensors", encoder)
    flags = f"--encoder-weights {tmp_path}/start.safetensors --freeze-layers 1"
    _, folder, _ = train_edited(Path(module.__file__).name, [(old, new)], flags, tmp_path, monkeypatch)
    trained = ppo_pisco.safetensors.torch.load_file(folder / "encoder.safetensors")
    for name, value in encoder.state_dict().items():
        assert torch.equal(trained[name], value) == name.startswith("layers.3."), name


LAYERS = {  # with batch normalisation and dropout
    "ppo_pisco.py": ("layer_init(nn.Conv2d(*size)), nn.ReLU(inplace=True)", "size[1]", (1, 60, 60), 2),
    "drqv2_pisco.py": ("layer_init(conv), nn.ReLU(inplace=True)", "32", (9, 24, 24), 1),
}


@pytest.mark.parametrize("file", LAYERS)
def test_statistics_and_dropout_leave_one_policy(tmp_path, monkeypatch, file):
    """The policy that acts is the one that learns, is evaluated and is kept: a function of a single state."""
    old, width, shape, num_actions = LAYERS[file]
    own = "--update-epochs 1 --num-minibatches 1 --total-timesteps 64" if file == "ppo_pisco.py" else ""
    flags = f"--encoder-weights none --ssl curl --curl-tau 1 --learning-rate 1e-2 {own}"
    edits = [(old, f"{old}, nn.BatchNorm2d({width}), nn.Dropout(0.5)")]
    module, folder, rows = train_edited(file, edits, flags, tmp_path, monkeypatch)
    args = module.parse_args(["--resume", str(folder)])
    agent = module.Agent(args, module.Encoder(args, shape), num_actions)
    weights = ppo_pisco.safetensors.torch.load_file(folder / "model.safetensors")
    agent.load_state_dict(weights)
    counts = [name for name in weights if name.endswith("num_batches_tracked")]
    assert len(counts) == (6 if file == "ppo_pisco.py" else 8) and not any(weights[name] for name in counts)
    for name, value in weights.items():
        assert "running_" not in name or torch.equal(value, torch.full_like(value, float("running_var" in name))), name
    policy = (lambda obs: agent(obs)[0]) if file == "ppo_pisco.py" else (lambda obs: agent.actor(agent.encoder(obs)))
    obs = torch.randint(0, 256, (6, *shape), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(policy(obs), torch.cat([policy(state[None]) for state in obs]), rtol=1e-4, atol=1e-5)
        key_encoder = agent.key_encoder if file == "ppo_pisco.py" else agent.key_encoder[0]
        torch.testing.assert_close(key_encoder(obs), agent.encoder(obs), rtol=0, atol=0)  # of the last update
    found = module.evaluate(agent, args, torch.device("cpu"), int(rows[-1]["global_step"]), tmp_path)
    assert found == {name: float(value) for name, value in rows[-1].items() if name.startswith("eval/")}
    for row in rows if file == "ppo_pisco.py" else ():  # the update's policy is still the one that acted
        assert abs(float(row["losses/old_approx_kl"])) < 1e-6 and float(row["losses/clipfrac"]) == 0


# --- Several processes -----------------------------------------------------------------------------------------------
# Writes down the first minibatch, the weights before it and its gradients after the exchange. One augmentation for all.
RANK = """
import os, sys
import torch
import edited_ppo_pisco as ppo

record, minibatch_loss, clip_grad_norm_ = {}, ppo.minibatch_loss, ppo.nn.utils.clip_grad_norm_

def first_minibatch(agent, *minibatch):
    if not record:
        record["weights"] = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
        record["minibatch"] = minibatch[:-1]
    return minibatch_loss(agent, *minibatch)

def first_gradients(parameters, norm):
    parameters = list(parameters)
    record.setdefault("gradients", [p.grad.clone() for p in parameters if p.grad is not None])
    return clip_grad_norm_(parameters, norm)

ppo.minibatch_loss, ppo.nn.utils.clip_grad_norm_ = first_minibatch, first_gradients
ppo.augment = lambda images, args: images.roll(3, -1)
folder = ppo.train(ppo.parse_args(sys.argv[1:]))
record["trained"] = ppo.safetensors.torch.load_file(folder / "model.safetensors")
torch.save(record, f"rank_{os.environ['RANK']}.pt")
"""


def two_processes(folder, flags):
    """Runs the edited file and returns what the two ranks wrote."""
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 rank.py".split()
    environment = os.environ | {"TMPDIR": str(folder / "others")}
    done = subprocess.run(
        [sys.executable, *torchrun, *flags.split()],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder:") == done.stdout.count("evaluation: greedy") == 1
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_take_the_lines_of_the_benchmarks_page(tmp_path, monkeypatch):
    page, text = ((ROOT / name).read_text() for name in ("benchmark/README.md", "ppo_pisco.py"))
    diff = re.search(r"```diff\n(.+?)\n```", page, flags=re.S).group(1)
    for hunk in re.split(r"^@@.*\n", diff + "\n", flags=re.M):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "edited_ppo_pisco.py").write_text(text)
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "others").mkdir()
    flags = f"{PPO} --encoder-weights none --feature-dim 32 --freeze-layers 1 --freeze-random --no-norm-adv --no-cuda"
    ranks = two_processes(tmp_path, f"{flags} --total-timesteps 64")
    for name, tensor in ranks[0]["trained"].items():
        assert torch.equal(tensor, ranks[1]["trained"][name]), name
        assert torch.equal(tensor, ranks[0]["weights"][name]) == name.startswith("encoder.layers.0."), name
    # The gradients are those of one process on the joined minibatch, and not those of a rank's own.
    args = ppo_pisco.parse_args(flags.split())
    agent = ppo_pisco.Agent(args, ppo_pisco.Encoder(args, (1, 60, 60)), 2)
    agent.encoder.freeze(1)
    monkeypatch.setattr(ppo_pisco, "augment", lambda images, args: images.roll(3, -1))
    minibatches = [rank["minibatch"] for rank in ranks]
    assert [len(actions) for _, _, actions, *_ in minibatches] == [8, 8]

    def gradients(*minibatch):
        agent.load_state_dict(ranks[0]["weights"])
        agent.zero_grad()
        ppo_pisco.minibatch_loss(agent, *minibatch, args)[0].backward()
        return [p.grad for p in agent.parameters() if p.grad is not None]

    joined = gradients(*map(torch.cat, zip(*minibatches)))
    own = gradients(*minibatches[0])
    for rank in ranks:
        torch.testing.assert_close(rank["gradients"], joined, rtol=1e-3, atol=1e-6)
    assert max((a - b).abs().max() for a, b in zip(joined, own)) > 1e-3
    # The first rank alone writes to the run folder, counts the steps of both and is enough for a resume.
    (folder,) = (tmp_path / "runs").iterdir()
    about = json.loads((folder / "args.json").read_text())
    assert (about["num_envs"], about["seed"]) == (4, 1)
    (folder / "args.json").write_text(json.dumps(about | {"total_timesteps": 128}))
    ranks = two_processes(tmp_path, f"--resume {folder}")
    assert all(torch.equal(tensor, ranks[1]["trained"][name]) for name, tensor in ranks[0]["trained"].items())
    assert len(list((tmp_path / "others").glob("*/*/metrics.csv"))) == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]
    with open(folder / "metrics.csv", newline="") as metrics:
        assert [row["global_step"] for row in csv.DictReader(metrics)] == ["32", "64", "96", "128"]
