"""pretrain_encoder.py makes files that the algorithms load: whole runs, data, formulas, refusals."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import torch
import torch.nn as nn
from PIL import Image

import drqv2_pisco
import ppo_pisco
import pretrain_encoder

ROOT = Path(__file__).resolve().parents[1]
RL = (
    "--total-timesteps 64 --num-envs 4 --num-steps 8 --num-minibatches 2 --feature-dim 32 "
    "--jump-eval-tasks 20:10,45:20 --torch-threads 1 --no-cuda"
)
RL_DMC = (
    "--env-id cartpole-balance --total-frames 1100 --update-every 50 --image-size 24 --render-quality fast "
    "--hidden-dim 16 --feature-dim 8 --batch-size 8 --seed-frames 40 --explore-steps 10 --eval-episodes 1 "
    "--torch-threads 1 --no-cuda"
)
# state and simsiam
IMAGES = (
    "--feature-dim 32 --projector-dim 16 --batch-size 16 --total-steps 4 --eval-interval 2 --torch-threads 1 --no-cuda"
)
JUMP = "--jump-tasks 20:5,22:15,30:20,40:10 --num-frames 200"
DMC = "--env-id cartpole-balance --image-size 24 --render-quality fast --num-frames 110"
FAMILIES = {"nature": JUMP, "impala": f"{JUMP} --encoder impala", "drqv2": DMC}


def encoder_file(path):
    """An encoder file's tensors and metadata."""
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def assert_same_file(path, other):
    (tensors, metadata), (other_tensors, other_metadata) = encoder_file(path), encoder_file(other)
    assert metadata == other_metadata and tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors)


def pretrain_rl(tmp_path, flags="", output="e.safetensors"):
    words = [*RL.split(), "--runs-dir", str(tmp_path / "runs"), "--output", str(tmp_path / output), *flags.split()]
    pretrain_encoder.main(words)
    return tmp_path / output


def pretrain(tmp_path, flags, output="e.safetensors"):
    pretrain_encoder.main([*IMAGES.split(), *flags.split(), "--output", str(tmp_path / output)])
    return tmp_path / output


def image_args(flags=""):
    return pretrain_encoder.parse_args(["--objective", "simsiam", *IMAGES.split(), *flags.split()])[0]


def refusal(argv):
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        pretrain_encoder.main(argv)
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def load(path):
    """The file as its algorithm loads it: the encoder."""
    _, metadata = encoder_file(path)
    algorithm = drqv2_pisco if metadata["architecture"] == "drqv2" else ppo_pisco
    dim = int(metadata.get("feature_dim", 0))
    args = SimpleNamespace(encoder=metadata["architecture"], feature_dim=dim, bf16=False)
    encoder = algorithm.Encoder(args, json.loads(metadata["observation_shape"]))
    algorithm.load_encoder(path, encoder)
    return encoder


# --- rl --------------------------------------------------------------------------------------------------------------
def test_rl_writes_an_encoder_that_ppo_uses(tmp_path, capsys):
    output = pretrain_rl(tmp_path, "--seed 3 --ent-coef 0.02", output="new/my encoder.safetensors")
    _, metadata = encoder_file(output)
    assert (metadata["objective"], metadata["environment"], metadata["tasks"]) == ("rl", "Jump-v0", "source")
    assert (metadata["architecture"], metadata["steps"], metadata["seed"]) == ("nature", "64", "3")
    assert set(json.loads(metadata["versions"])) == {"torch", "gymnasium", "numpy"}
    assert 0.0 <= json.loads(metadata["score"])["eval/greedy_success"] <= 1.0
    (run,) = (tmp_path / "runs").iterdir()
    args = json.loads((run / "args.json").read_text())
    assert args["ent_coef"] == 0.02 and args["anneal_lr"]  # the user's flag beats pretraining's 0.003
    assert (args["encoder_weights"], args["freeze_layers"], args["ssl"]) == ("none", 0, "none")

    # The printed command can be pasted: the path with a space in it is quoted.
    (line,) = re.findall(r"use it with: (.+)", capsys.readouterr().out)
    words = shlex.split(line)
    assert words[:2] == ["python", "ppo_pisco.py"] and str(output) in words and "--feature-dim" in words
    folder = ppo_pisco.train(ppo_pisco.parse_args([*words[2:], *RL.split(), "--runs-dir", str(tmp_path / "finetuned")]))
    tensors, _ = encoder_file(folder / "encoder.safetensors")
    bottom = "layers.0.0.weight"  # it was loaded and stayed frozen
    assert torch.equal(tensors[bottom], encoder_file(output)[0][bottom])

    # It replaces nothing unasked, and says so before it trains.
    written = output.stat().st_mtime_ns
    line = refusal([*RL.split(), "--runs-dir", str(tmp_path / "runs"), "--output", str(output)])
    assert str(output) in line and "--force" in line
    assert output.stat().st_mtime_ns == written and list((tmp_path / "runs").iterdir()) == [run]

    # A finished run is exported again by --resume, which takes no other flags.
    again = tmp_path / "again.safetensors"
    assert "--resume" in refusal(["--resume", str(run), "--output", str(again), "--seed", "99"]) and not again.exists()
    pretrain_encoder.main(["--resume", str(run), "--output", str(again)])
    assert_same_file(output, again)


def test_rl_without_an_evaluation(tmp_path):
    assert json.loads(encoder_file(pretrain_rl(tmp_path, "--eval-episodes 0"))[1]["score"]) == {}


def test_killed_rl_run_goes_on_and_is_exported(tmp_path, monkeypatch):
    whole = pretrain_rl(tmp_path / "whole", "--checkpoint-interval 1")
    real, calls = ppo_pisco.update, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(ppo_pisco, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain_rl(tmp_path / "killed", "--checkpoint-interval 1")
    (run,) = (tmp_path / "killed" / "runs").iterdir()
    pretrain_encoder.main(["--resume", str(run), "--output", str(tmp_path / "e.safetensors")])
    assert_same_file(whole, tmp_path / "e.safetensors")


class Stop(Exception):
    pass


def arguments_of_training(monkeypatch, algorithm, argv):
    """The arguments with which the algorithm would train."""
    caught = []

    def train(args, script):
        caught.append(args)
        raise Stop

    monkeypatch.setattr(algorithm, "train", train)
    with pytest.raises(Stop):
        pretrain_encoder.main(argv)
    return caught[0]


def test_rl_has_defaults_by_environment(tmp_path, monkeypatch):
    own = {"exp_name": "pretrain_encoder", "encoder_weights": "none", "freeze_layers": 0, "ssl": "none"}
    jump = {"jump_tasks": "source", "total_timesteps": 300_000, "anneal_lr": True, "ent_coef": 0.003}
    output = ["--output", str(tmp_path / "e.safetensors")]
    args = arguments_of_training(monkeypatch, ppo_pisco, output)
    assert vars(args) == vars(ppo_pisco.Args()) | own | jump
    args = arguments_of_training(
        monkeypatch, ppo_pisco, [*output, "--no-anneal-lr", "--ssl=pisco", "--jump_tasks", "wide"]
    )
    changed = {"ssl": "pisco", "anneal_lr": False, "jump_tasks": "wide"}
    assert vars(args) == vars(ppo_pisco.Args()) | own | jump | changed
    for algorithm, env_id in ((ppo_pisco, "Pong-v5"), (drqv2_pisco, "walker-walk")):
        args = arguments_of_training(monkeypatch, algorithm, [*output, "--env-id", env_id, "--seed", "7"])
        defaults = vars(algorithm.parse_args(["--env-id", env_id]))
        assert vars(args) == defaults | own | {"seed": 7}


def test_another_loss_of_the_users_stays_named(tmp_path):
    output = pretrain_rl(tmp_path, "--ssl pisco")
    assert encoder_file(output)[1]["objective"] == "rl (ppo, ssl pisco)"


def test_rl_on_the_control_suite_trains_drqv2(tmp_path, capsys):
    output = tmp_path / "e.safetensors"
    pretrain_encoder.main([*RL_DMC.split(), "--runs-dir", str(tmp_path / "runs"), "--output", str(output)])
    _, metadata = encoder_file(output)
    assert (metadata["objective"], metadata["architecture"], metadata["steps"]) == ("rl", "drqv2", "1100")
    assert metadata["observation_shape"] == "[9, 24, 24]"
    assert json.loads(metadata["score"]).keys() == {"eval/greedy_return", "eval/greedy_length"}
    load(output)
    (again, line) = re.findall(r"(?:after a kill: python \S+|use it with:) (.+)", capsys.readouterr().out)
    assert line.startswith("python drqv2_pisco.py --env-id cartpole-balance") and "--image-size 24" in line
    output.rename(tmp_path / "first.safetensors")  # as if a kill had come before it
    pretrain_encoder.main(shlex.split(again))
    assert_same_file(output, tmp_path / "first.safetensors")


def test_sigterm_leaves_no_process(tmp_path):
    command = [sys.executable, str(ROOT / "pretrain_encoder.py"), *RL.split(), "--total-timesteps", "1000000"]
    command += [
        "--runs-dir",
        str(tmp_path / "runs"),
        "--output",
        str(tmp_path / "e.safetensors"),
        "--eval-interval",
        "0",
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    for line in process.stdout:
        if line.startswith("after a kill:"):
            break
    assert f"pretrain_encoder.py --output {tmp_path}/e.safetensors --resume" in line  # the remedy is this script's
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    process.stdout.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left in the session's group
    assert not (tmp_path / "e.safetensors").exists()


# --- state and simsiam: whole runs -----------------------------------------------------------------------------------
@pytest.mark.parametrize("objective", ["state", "simsiam"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_its_algorithm_loads(tmp_path, capsys, family, objective):
    output = pretrain(tmp_path, f"--objective {objective} {FAMILIES[family]}")
    tensors, metadata = encoder_file(output)
    assert (metadata["architecture"], metadata["objective"], metadata["steps"]) == (family, objective, "4")
    assert (metadata["seed"], metadata["tasks"]) == ("1", "" if family == "drqv2" else JUMP.split()[1])
    encoder = load(output)
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in tensors.items())
    score = json.loads(metadata["score"])
    assert np.isfinite(list(score.values())).all()
    names = ["agent x", "agent y", "obstacle x", "floor y"]
    if family == "drqv2":
        names = [f"position[{i}]" for i in range(3)] + [f"velocity[{i}]" for i in range(2)]
    r2 = [f"r2 {name}" for name in names]
    assert list(score) == (["loss", "r2", "r2_lowest", *r2] if objective == "state" else ["loss", "collapse_std"])
    (line,) = re.findall(r"use it with: (.+)", capsys.readouterr().out)
    words = shlex.split(line)
    algorithm = drqv2_pisco if family == "drqv2" else ppo_pisco
    args = algorithm.parse_args(words[2:])
    assert words[1] == f"{algorithm.__name__}.py" and args.encoder_weights == str(output)
    if family == "drqv2":
        assert (args.env_id, args.image_size, args.frame_stack) == ("cartpole-balance", 24, 3)
    else:
        assert (args.env_id, args.encoder, args.feature_dim) == ("Jump-v0", family, 32)


@pytest.mark.parametrize("objective, flags", [("state", JUMP), ("simsiam", JUMP), ("simsiam", DMC)])
def test_a_seed_decides_on_everything(tmp_path, objective, flags):
    files = [pretrain(tmp_path, f"--objective {objective} {flags}", name) for name in ("one", "two")]
    other = pretrain(tmp_path, f"--objective {objective} {flags} --seed 2", "three")
    assert_same_file(*files)
    assert not torch.equal(encoder_file(other)[0]["layers.0.0.weight"], encoder_file(files[0])[0]["layers.0.0.weight"])


# Of the code that made the shipped encoders: data, split, order of the random numbers, losses and updates.
STATE_NUMBERS = [
    {"step": 10, "losses/train": 0.5504454, "eval/loss": 0.2863263, "eval/r2": 0.7136737, "eval/r2_lowest": 0.5325681},
    {"step": 20, "losses/train": 0.1924261, "eval/loss": 0.1452619, "eval/r2": 0.8547381, "eval/r2_lowest": 0.7502288},
]
SIMSIAM_NUMBERS = [
    {"step": 5, "losses/train": -0.01388189, "eval/loss": -0.1079218, "eval/collapse_std": 0.03180185},
    {"step": 10, "losses/train": -0.07975067, "eval/loss": -0.1430000, "eval/collapse_std": 0.04603929},
]


@pytest.mark.parametrize(
    "flags, expected, last",
    [
        ("--objective state --num-frames 2000 --total-steps 20 --eval-interval 10", STATE_NUMBERS, 1e-3),
        # SimSiam's first updates agree on all processors, the last are 1.2% apart between Intel's and AMD's
        (
            "--objective simsiam --num-frames 500 --total-steps 10 --eval-interval 5 --batch-size 32",
            SIMSIAM_NUMBERS,
            2e-2,
        ),
    ],
)
def test_training_gives_the_kept_numbers(tmp_path, monkeypatch, flags, expected, last):
    real, histories = pretrain_encoder.fit, []
    monkeypatch.setattr(pretrain_encoder, "fit", lambda *args: histories.append(real(*args)) or histories[-1])
    pretrain_encoder.main(
        [*flags.split(), "--torch-threads", "1", "--no-cuda", "--output", str(tmp_path / "e.safetensors")]
    )
    ((*rows,),) = histories
    assert len(rows) == len(expected)
    for row, wanted, rel in zip(rows, expected, (1e-3, last)):
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=rel)


def test_state_regression_learns_the_held_out_tasks_and_stops(tmp_path, capsys):
    flags = "--objective state --jump-tasks grid --num-frames 2000 --eval-interval 20 --target-r2 0.8 --total-steps 400"
    output = pretrain(tmp_path, flags)
    _, metadata = encoder_file(output)
    r2 = [float(number) for number in re.findall(r"update \d+: .* r2 (-?[\d.]+)", capsys.readouterr().out)]
    assert r2[-1] >= 0.8 and all(value < 0.8 for value in r2[:-1])
    assert json.loads(metadata["score"])["r2"] == pytest.approx(r2[-1], abs=1e-4)
    assert int(metadata["steps"]) == 20 * len(r2) < 400


@pytest.mark.parametrize("interval", [0, -1])
def test_evaluation_at_the_end_alone(tmp_path, capsys, interval):
    pretrain(tmp_path, f"--objective state {JUMP} --eval-interval {interval}")
    out = capsys.readouterr().out
    assert re.findall(r"^update (\d+):", out, re.MULTILINE) == ["4"] and "\ndevice: cpu, 1 threads\n" in f"\n{out}"


def test_bf16_trains_the_encoder(tmp_path):
    flags = ("--bf16", "", "--bf16 --learning-rate 0")
    found = [encoder_file(pretrain(tmp_path, f"--objective state {JUMP} --force {words}"))[0] for words in flags]
    assert all(tensor.dtype == torch.float32 for tensor in found[0].values())
    rounded, exact, untrained = (tensors["layers.0.0.weight"] for tensors in found)
    assert not torch.equal(rounded, exact) and not torch.equal(rounded, untrained)


def test_evaluation_changes_nothing():
    args = image_args(JUMP)
    data, encoder = pretrain_encoder.make_data(args), ppo_pisco.Encoder(args, (1, 60, 60))
    model = pretrain_encoder.SimSiam(encoder, 32, args)
    weights, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    rows = torch.arange(50)
    scores = [pretrain_encoder.evaluate(model, data, data.states, rows, args, torch.device("cpu")) for _ in range(2)]
    assert scores[0] == scores[1] and torch.equal(torch.get_rng_state(), rng) and model.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


# --- Mathematics -----------------------------------------------------------------------------------------------------
def test_standardised_states_by_hand():
    states = torch.tensor([[1.0, 5.0], [3.0, 5.0], [7.0, 9.0]])
    wanted = (states - torch.tensor([2.0, 5.0])) / torch.tensor([2.0**0.5, 1.0])  # of the first two rows
    torch.testing.assert_close(pretrain_encoder.standardise(states, torch.tensor([0, 1])), wanted)


def test_state_score_by_hand():
    model = pretrain_encoder.StateModel(nn.Identity(), 2, ["a", "b"])
    model.head.weight.data, model.head.bias.data = torch.eye(2), torch.zeros(2)
    # Errors 0, 1 and 0.5 in a, 1, 0 and 1 in b: mean squares 1.25 / 3 and 2 / 3.
    batches = [
        (torch.tensor([[0.0, 1], [2, 0]]), torch.tensor([[0.0, 0], [1, 0]])),
        (torch.tensor([[1.0, 1]]), torch.tensor([[0.5, 2]])),
    ]
    r2_a, r2_b = 1 - 1.25 / 3, 1 - 2 / 3
    wanted = {"loss": 3.25 / 6, "r2": (r2_a + r2_b) / 2, "r2_lowest": r2_b, "r2 a": r2_a, "r2 b": r2_b}
    assert model.score(batches) == pytest.approx(wanted)
    assert model.loss(*batches[1]).item() == pytest.approx((0.25 + 1) / 2)


def test_simsiam_score_weighs_observations_alike(monkeypatch):
    model = pretrain_encoder.SimSiam(nn.Identity(), 2, SimpleNamespace(projector_dim=4))
    monkeypatch.setattr(model, "forward", lambda obs: (obs.mean(), torch.ones(2 * len(obs), 4)))
    score = model.score([(torch.full((3, 1), 1.0), None), (torch.full((1, 1), 5.0), None)])
    assert score == pytest.approx({"loss": (3 * 1 + 5) / 4, "collapse_std": 0}, abs=1e-6)


def test_simsiam_gradient_stops_at_the_projections():
    args = image_args("--feature-dim 8 --projector-dim 4 --shift-pixels 1")
    model = pretrain_encoder.SimSiam(ppo_pisco.Encoder(args, (1, 60, 60)), 8, args)
    obs = torch.randint(0, 256, (6, 1, 60, 60), dtype=torch.uint8)
    loss, z = model(obs)
    assert z.shape == (12, 4) and -1 <= loss <= 1
    loss.backward()
    assert all(p.grad.any() for p in model.encoder.parameters())
    # With a predictor that ignores its input nothing is left for the encoder: z itself gets no gradient.
    model.zero_grad()
    nn.init.zeros_(model.predictor[0].weight)
    model.loss(obs, None).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.encoder.parameters())
    assert model.predictor[3].bias.grad.any()


def test_collapse_std():
    torch.manual_seed(0)
    assert pretrain_encoder.collapse_std(torch.ones(50, 64)).item() == pytest.approx(0, abs=1e-6)
    assert pretrain_encoder.collapse_std(torch.randn(5000, 64)).item() == pytest.approx(1 / 8, rel=0.02)


# --- Data ------------------------------------------------------------------------------------------------------------
def test_jump_images_are_those_of_the_environment():
    tasks = [(20, 5), (30, 12)]
    states, task_ids = pretrain_encoder.jump_states(tasks)
    images = pretrain_encoder.jump_data(tasks, states, task_ids).observations(torch.arange(len(states))).numpy()
    found = {tuple(state): image for state, image in zip(states.tolist(), images)}
    env = ppo_pisco.JumpVectorEnv(2, tasks)
    obs, _ = env.reset(options={"task_ids": [0, 1]})
    for t in range(50):  # both jump at the right moment, land and go on
        for i, (obstacle, floor) in enumerate(tasks):
            np.testing.assert_array_equal(obs[i], found[int(env.x[i]), int(env.y[i]), obstacle, floor])
        obs, _, terminated, _, _ = env.step(np.array([t == 20 - 14, t == 30 - 14]))
        assert not terminated.any()
    x, y, obstacle, floor = states.T
    assert not ((obstacle + 9 > x) & (obstacle < x + 5) & (floor + 10 > y)).any()  # nobody in the obstacle


def test_random_walks_reach_both_sides_of_the_obstacle():
    states, task_ids = pretrain_encoder.jump_walks([(20, 5), (30, 12)], 500, seed=1)
    assert states.shape == (500, 4) and set(task_ids) == {0, 1}
    before, behind = states[:, 0] + 5 <= states[:, 2], states[:, 0] >= states[:, 2] + 9
    assert before.mean() > 0.2 and behind.mean() > 0.2
    assert (states[:, 1] > states[:, 3]).mean() > 0.1  # some in the air
    again, _ = pretrain_encoder.jump_walks([(20, 5), (30, 12)], 500, seed=1)
    np.testing.assert_array_equal(states, again)


@pytest.mark.parametrize("objective", ["state", "simsiam"])
def test_default_tasks_leave_the_target_tasks_out(objective):
    data = pretrain_encoder.make_data(pretrain_encoder.FrameArgs(objective=objective, num_frames=20_000))
    tasks = {tuple(task) for task in data.states[:, 2:].int().tolist()}
    assert len(tasks) == 286 - 7 and not tasks & set(ppo_pisco.JUMP_TASK_SETS["target"])
    assert len(data.stacks) == 20_000 and data.obs_shape == (1, 60, 60)
    # A group is a task.
    assert len({(group, *task) for group, task in zip(data.groups.tolist(), data.states[:, 2:].tolist())}) == 279


def test_whole_groups_are_held_out():
    groups = torch.arange(30).repeat_interleave(4)
    train, held_out = pretrain_encoder.split(groups, seed=1)
    assert len(train) == 108 and len(held_out) == 12 and len(set(train.tolist()) | set(held_out.tolist())) == 120
    assert not set(groups[train].tolist()) & set(groups[held_out].tolist())
    assert [len(rows) for rows in pretrain_encoder.split(torch.tensor([0, 0, 5]), seed=1)] in ([2, 1], [1, 2])
    assert not torch.equal(held_out, pretrain_encoder.split(groups, seed=2)[1])


def test_control_suite_images_show_the_state():
    args = image_args(DMC)
    data = pretrain_encoder.dmc_data(args, "cartpole-balance", 3, 24, episodes=4, length=6)
    assert data.images.shape == (24, 3, 24, 24) and data.states.shape == (16, 5)
    assert data.groups.tolist() == [i for i in range(4) for _ in range(4)]
    assert data.stacks[0].tolist() == [0, 1, 2] and data.stacks[4].tolist() == [6, 7, 8]  # no stack crosses an episode
    obs = data.observations(torch.tensor([4]))
    assert torch.equal(obs[0, 6:], data.images[8]) and torch.equal(obs[0, :3], data.images[6])
    # cos^2 + sin^2 of the pole: these are the suite's observations.
    assert data.names == ["position[0]", "position[1]", "position[2]", "velocity[0]", "velocity[1]"]
    torch.testing.assert_close(data.states[:, 1] ** 2 + data.states[:, 2] ** 2, torch.ones(16))
    # Every other episode starts anywhere, the others upright.
    cosines = data.states[:, 1].view(4, 4)[:, 0]
    assert (cosines[::2] > 0.9).all() and (cosines[1::2] < 0.9).any()
    again = pretrain_encoder.dmc_data(args, "cartpole-balance", 3, 24, episodes=4, length=6)
    assert torch.equal(again.images, data.images) and torch.equal(again.states, data.states)


# --- Own frames ------------------------------------------------------------------------------------------------------
def write_frames(folder, kind):
    """Thirty frames in the folder. Returns what they are read as: (30, C, 40, 44) uint8."""
    folder.mkdir(exist_ok=True)
    frames = np.random.default_rng(0).integers(0, 256, (30, 40, 44, 3), dtype=np.uint8)
    alpha = np.full((40, 44, 1), 77, np.uint8)
    for i, frame in enumerate(frames):
        image = {
            "png": Image.fromarray(frame),
            "rgba": Image.fromarray(np.concatenate([frame, alpha], axis=2)),
            "grey": Image.fromarray(frame[..., 0]),
            "grey with alpha": Image.fromarray(np.concatenate([frame[..., :1], alpha], axis=2)),
        }
        if kind in image:
            image[kind].save(folder / f"{i:03}.png")
    if kind == "npz":
        np.savez(folder / "a.npz", one=frames[:10].transpose(0, 3, 1, 2), two=frames[10:].transpose(0, 3, 1, 2))
    arrays = {
        "channels first": frames.transpose(0, 3, 1, 2),
        "channels last": frames,
        "grey array": frames[..., 0],
        "grey channels last": frames[..., :1],
    }
    if kind in arrays:
        np.save(folder / "a.npy", arrays[kind])
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return images[:, :1] if "grey" in kind else images


@pytest.mark.parametrize(
    "kind",
    [
        "png",
        "rgba",
        "grey",
        "grey with alpha",
        "npz",
        "channels first",
        "channels last",
        "grey array",
        "grey channels last",
    ],
)
def test_own_frames(tmp_path, kind):
    frames = write_frames(tmp_path / "frames", kind)
    data = pretrain_encoder.folder_data(tmp_path / "frames", 2)
    assert torch.equal(data.images, frames)
    assert data.obs_shape == (2 * frames.shape[1], 40, 44)
    starts = [i for i in range(29) if not (kind == "npz" and i == 9)]  # where the second array begins, no stack crosses
    assert data.stacks.tolist() == [[i, i + 1] for i in starts]
    assert len(data.groups.unique()) == (9 + 19 if kind == "npz" else 20) and data.states.shape == (len(starts), 0)


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".gif", ".tif", ".PNG", ".ppm"])
def test_frames_of_all_formats(tmp_path, capsys, suffix):
    """And an animation, which is a sequence of its own; what is left out is counted."""
    images = [Image.fromarray(np.full((40, 44), 8 * i, np.uint8)).convert("RGB") for i in range(30)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    for name in ("notes.txt", "film.mp4"):
        (tmp_path / name).write_text("")
    data = pretrain_encoder.folder_data(tmp_path, 2)
    assert data.images.shape == (30, 3, 40, 44) and data.images[:, 0, 0, 0].tolist() == list(range(0, 240, 8))
    assert "30 files are read, 2 left out" in capsys.readouterr().out
    if suffix in (".gif", ".webp", ".tif"):
        kwargs = {"lossless": True} if suffix == ".webp" else {}
        images[0].save(tmp_path / f"all{suffix}", save_all=True, append_images=images[1:], **kwargs)
        data = pretrain_encoder.folder_data(tmp_path, 2)
        assert data.images[:, 0, 0, 0].tolist() == 2 * list(range(0, 240, 8)) and len(data.stacks) == 2 * 29


@pytest.mark.parametrize(
    "env_id, shape, stack, fits",
    [
        ("Pong-v5", (1, 84, 84), 4, True), ("Pong-v5", (1, 84, 84), 1, False), ("Pong-v5", (4, 84, 84), 1, False),
        ("Pong-v5", (1, 40, 44), 4, False), ("TinyImage-v0", (3, 36, 40), 1, True),
        ("TinyImage-v0", (1, 36, 40), 3, False), ("walker-walk", (3, 40, 40), 2, True),
        ("walker-walk", (1, 40, 40), 3, False), ("walker-walk", (9, 40, 40), 3, False),
        ("Jump-v0", (1, 60, 60), 1, True), ("Jump-v0", (1, 84, 84), 1, False),
        ("not.here:Game-v0", (9, 40, 44), 5, True),
    ],
)  # fmt: skip
def test_frames_must_be_what_the_environment_shows(tmp_path, env_id, shape, stack, fits):
    np.save(tmp_path / "a.npy", np.zeros((30, *shape), np.uint8))
    args = image_args(f"--env-id {env_id} --frames {tmp_path} --frame-stack {stack}")
    if fits:
        assert pretrain_encoder.make_data(args).obs_shape == (stack * shape[0], *shape[1:])
    else:
        with pytest.raises(SystemExit, match=f"--env-id {env_id}: shows"):
            pretrain_encoder.make_data(args)


def test_own_frames_make_an_encoder(tmp_path):
    write_frames(tmp_path / "frames", "png")
    flags = f"--objective simsiam --frames {tmp_path / 'frames'} --env-id my:Game/Two-v0 --frame-stack 2"
    _, metadata = encoder_file(pretrain(tmp_path, flags))
    assert metadata["observation_shape"] == "[6, 40, 44]" and metadata["environment"] == "my:Game/Two-v0"
    assert (metadata["frame_stack"], metadata["image_channels"]) == ("2", "3")
    assert metadata["tasks"] == ""


def test_files_come_in_natural_order(tmp_path):
    numbers = [*range(1, 30), 99, 100, 101, 999, 1000, 1499, 1500]
    for number in numbers[::-1]:
        value = numbers.index(number)
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / f"frame_{number}.png")
    data = pretrain_encoder.folder_data(tmp_path, 4)
    assert data.images[:, 0, 0, 0].tolist() == list(range(len(numbers)))
    assert data.observations(torch.tensor([0]))[0, :, 0, 0].tolist() == [0, 1, 2, 3]
    names = ["b1.png", "a10.png", "a2.png", "a02.png", "A3.png", "7.png", "²5.png", "a.png"]
    wanted = ["7.png", "A3.png", "a02.png", "a2.png", "a10.png", "a.png", "b1.png", "²5.png"]
    assert sorted(names, key=pretrain_encoder.natural_key) == wanted


def spoil(folder, how):
    """A frames folder with something wrong in it."""
    write_frames(folder, "png" if how in ("corrupt image", "mixed", "16 bits", "other image") else "none")
    arrays = {
        "floats": np.zeros((30, 40, 44), np.float32),
        "objects": np.array([{}, None], dtype=object),
        "axes": np.zeros((2, 30, 40, 44, 3), np.uint8),
        "few": np.zeros((5, 40, 44), np.uint8),
        "none in it": np.zeros((0, 40, 44), np.uint8),
        "rgba": np.zeros((30, 40, 44, 4), np.uint8),
        "one image": np.zeros((40, 44, 3), np.uint8),
    }
    if how in arrays:
        np.save(folder / "a.npy", arrays[how], allow_pickle=True)
    elif how == "corrupt image":
        (folder / "010.png").write_bytes((folder / "010.png").read_bytes()[:300])
    elif how == "corrupt array":
        (folder / "a.npy").write_bytes(b"\x93NUMPY no more")
    elif how == "mixed":
        Image.new("RGB", (20, 20)).save(folder / "1.png")
    elif how == "other image":
        (folder / "1.png").write_text("<html>not found</html>")
    elif how == "16 bits":
        Image.fromarray(np.zeros((40, 44), np.uint16)).save(folder / "1.png")
    elif how == "missing":
        folder.rmdir()


@pytest.mark.parametrize(
    "how, named",
    [
        ("empty", "not a folder with"), ("missing", "not a folder with"), ("corrupt image", "010.png"),
        ("corrupt array", "a.npy"), ("mixed", "mixed"), ("other image", "1.png"), ("16 bits", "8 bits"),
        ("floats", "float32"), ("objects", "allow_pickle=False"), ("axes", "(2, 30, 40, 44, 3)"), ("few", "too few"),
        ("none in it", "(0, 40, 44)"), ("rgba", "(30, 40, 44, 4)"), ("one image", "(40, 44, 3)"),
    ],
)  # fmt: skip
def test_frames_that_are_refused(tmp_path, how, named):
    spoil(tmp_path / "frames", how)
    output = tmp_path / "e.safetensors"
    flags = f"--objective simsiam --env-id Pong-v5 --frames {tmp_path / 'frames'} --output {output}"
    line = refusal(flags.split())
    assert named in line and "--frames" in line and not output.exists()


# --- Refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags, named",
    [
        ("--objective state --frames x", "--objective simsiam"),
        ("--objective state --env-id Pong-v5", "--objective rl"),
        ("--objective simsiam --env-id Pong-v5", "--frames"),
        ("--objective state --env-id Jump-v00", "Jump-v0"),
        ("--objective state --env-id cartpole-balanse", "did you mean cartpole-balance"),
        ("--objective state --env-id walker_walk", "did you mean walker-walk"),
        ("--objective simsiam --env-id manipulation-reach_duplo", "--objective rl"),
        ("--objective state --jump-tasks 20:10", "--jump-tasks"),
        ("--objective state --jump-tasks nowhere", "--jump-tasks"),
        ("--objective state --frame-stack 2", "--frame-stack"),
        (
            "--objective state --learning-rate 1e30 --num-frames 200 --eval-interval 2 --batch-size 16",
            "--learning-rate",
        ),
        ("--env-id walker_walk", "did you mean walker-walk"),
        ("--env-id Jumpp-v0", "did you mean Jump-v0"),
        ("--jump-tasks nowhere", "--jump-tasks"),
        ("--resume runs/nowhere", "--resume runs/nowhere"),
    ],
)
def test_likely_mistakes_get_one_line(tmp_path, flags, named):
    runs = [] if "--objective" in flags or "--resume" in flags else ["--runs-dir", str(tmp_path / "runs")]
    line = refusal([*flags.split(), *runs, "--output", str(tmp_path / "e.safetensors")])
    assert named in line and not list(tmp_path.iterdir())
    assert "Pong" not in line.partition(";")[2]  # no advice that would be refused


@pytest.mark.parametrize(
    "flags",
    [
        "--objective guess", "--objective state --nonsense 1", "--objective state --resume runs/x", "--nonsense 1",
        "--total-timesteps many", "--env-id cartpole-balance --total-timesteps 100", "--num-frames 100",
    ],
)  # fmt: skip
def test_unknown_flags_are_refused(tmp_path, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain_encoder.main([*flags.split(), "--output", str(tmp_path / "e.safetensors")])
    assert stop.value.code == 2 and flags.split()[-2] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("objective", ["rl", "state"])
def test_outputs_that_are_refused_before_the_work(tmp_path, monkeypatch, objective):
    def work(*args):
        raise AssertionError("it has begun to work")

    for owner, name in ((ppo_pisco, "train"), (ppo_pisco, "set_up"), (pretrain_encoder, "make_data")):
        monkeypatch.setattr(owner, name, work)
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")  # like /dev/null: neither a file nor a folder
    for path, force in ((tmp_path / "file", False), (tmp_path / "pipe", True), (tmp_path, True), ("/dev/null", True)):
        line = refusal(["--objective", objective, "--output", str(path), *(["--force"] if force else [])])
        assert f"--output {path}" in line
    with pytest.raises(OSError, match="file"):
        pretrain_encoder.main(["--objective", objective, "--output", str(tmp_path / "file" / "e.safetensors")])
    with pytest.raises(OSError):  # nothing can be written there
        pretrain_encoder.main(["--objective", objective, "--output", "/proc/e.safetensors"])
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "pipe").is_fifo()
    assert not Path("/dev/null").is_file() and Path("/dev/null").is_char_device()


def test_force_replaces_a_file(tmp_path):
    (tmp_path / "e.safetensors").write_text("old")
    load(pretrain(tmp_path, f"--objective state {JUMP} --force"))
    assert [path.name for path in tmp_path.iterdir()] == ["e.safetensors"]


@pytest.mark.parametrize(
    "env_id, objective, name",
    [
        ("Jump-v0", "state", "jump-v0__nature__state"),
        ("ALE/Pong-v5", "rl", "ale-pong-v5__nature__rl"),
        ("my.module:Game-v0", "simsiam", "my.module-game-v0__nature__simsiam"),
        ("cartpole-swingup_sparse", "rl", "cartpole-swingup_sparse__drqv2__rl"),
    ],
)
def test_default_names(tmp_path, monkeypatch, env_id, objective, name):
    monkeypatch.setattr(ppo_pisco, "ENCODERS", tmp_path / "encoders")
    args, algorithm = pretrain_encoder.Args(objective=objective), pretrain_encoder.choose_algorithm(env_id)
    path = pretrain_encoder.output_path(args, algorithm.parse_args(["--env-id", env_id]))
    assert path == tmp_path / "encoders" / f"{name}.safetensors"


@pytest.mark.parametrize(
    "env_id, algorithm",
    [
        ("Jump-v0", ppo_pisco), ("Pong-v5", ppo_pisco), ("ALE/Pong-v5", ppo_pisco), ("my:Game-v12", ppo_pisco),
        ("module:NoVersion", ppo_pisco), ("ALE/Pong", ppo_pisco),
        ("walker-walk", drqv2_pisco), ("walker_walk", drqv2_pisco), ("reacher-visual-v", drqv2_pisco),
    ],
)  # fmt: skip
def test_an_id_with_a_version_is_not_the_control_suites(env_id, algorithm):
    assert pretrain_encoder.choose_algorithm(env_id) is algorithm


# --- Files -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", sorted((ROOT / "encoders").glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_encoders_load_into_their_algorithm(path):
    assert path.stat().st_size < 2_000_000
    load(path)
    _, metadata = encoder_file(path)
    (row,) = (line for line in (ROOT / "encoders" / "README.md").read_text().splitlines() if f"`{path.name}`" in line)
    score = json.loads(metadata["score"])
    if path.stem == "jump-v0__nature__rl":
        assert score["eval/greedy_success"] >= 0.95
        assert f"{score['eval/greedy_success']:.0%} of the 7 source tasks" in row
        unseen = (score["eval/greedy_grid_success"] * 286 - 7) / 279  # it solves its own seven, which are in the grid
        assert f"{unseen:.1%} of the grid's other 279" in row
    if path.stem == "jump-v0__nature__state":
        assert f"held-out R2 {score['r2']:.4f}" in row and f"{int(metadata['steps']):,} updates" in row
    # The command still names flags that exist.
    (command,) = re.findall(r"`(?:OMP_NUM_THREADS=1 )?python pretrain_encoder.py ([^`]+)`", row)
    args, further = pretrain_encoder.parse_args(command.split())
    assert args.force and (args.env_id, args.objective) == (metadata["environment"], metadata["objective"])
    if args.objective == "rl":
        algorithm = pretrain_encoder.choose_algorithm(args.env_id)
        algorithm_args = algorithm.parse_args(["--env-id", args.env_id, *further])
        assert str(algorithm_args.seed) == metadata["seed"]
