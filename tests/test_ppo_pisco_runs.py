"""Whole runs of ppo_pisco.py: what training changes and leaves alone, run folders, resume, environments."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import (
    IMPORTING,
    ROOT,
    TINY,
    Killed,
    TinyImage,
    assert_same_end,
    command,
    encoder_file,
    evaluation,
    halt,
    heed_ctrl_c,
    kill_at,
    metrics,
    program,
    resume,
    snapshot,
    tear,
    train,
    train_until_killed,
)  # fmt: skip
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_pisco
from ppo_pisco import JUMP_GRID, Agent, Args, Encoder, ImageEnvs, make_run_folder, parse_args, save_encoder


def tensors(folder, name="model"):
    return safetensors.torch.load_file(folder / f"{name}.safetensors")


def make_agent(args, envs):
    return Agent(args, Encoder(args, envs.obs_shape), envs.num_actions)


def finite_losses(folder):
    """The metrics of a run whose losses are all finite; what has no value yet is empty."""
    rows = metrics(folder)
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values() if value != "")
    return rows


# --- Defaults --------------------------------------------------------------------------------------------------------
ATARI = {
    "num_envs": 8, "num_steps": 128, "num_minibatches": 4, "update_epochs": 4, "learning_rate": 2.5e-4,
    "anneal_lr": True, "clip_coef": 0.1, "ent_coef": 0.01, "vf_coef": 0.5, "gamma": 0.99, "gae_lambda": 0.95,
    "feature_dim": 512, "encoder": "nature", "encoder_weights": "none", "reward_scale": 1.0,
    "total_timesteps": 10_000_000,
}  # fmt: skip
PROCGEN = ATARI | {
    "num_envs": 64, "num_steps": 256, "num_minibatches": 8, "update_epochs": 3, "learning_rate": 5e-4,
    "anneal_lr": False, "clip_coef": 0.2, "gamma": 0.999, "feature_dim": 256, "encoder": "impala",
    "total_timesteps": 25_000_000,
}  # fmt: skip
ROOM = {"total_timesteps": 500_000, "eval_interval": 50_000, "learning_rate": 1e-3}
JUMP = {
    "num_envs": 32, "num_steps": 64, "num_minibatches": 8, "update_epochs": 3, "learning_rate": 1e-3,
    "anneal_lr": False, "clip_coef": 0.2, "ent_coef": 0.01, "gamma": 0.99, "feature_dim": 256, "encoder": "nature",
    "reward_scale": 0.1, "total_timesteps": 102_400, "eval_interval": 10_240, "ssl": "pisco", "ssl_coef": 3.0,
    "ssl_teacher": "state", "projector": "none", "ssl_fraction": 1.0, "jump_tasks": "target",
    "jump_prior": 0.1, "jump_reward": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "env_id, defaults",
    [
        ("Jump-v0", JUMP),
        ("Pong-v5", ATARI),
        ("TinyImage-v0", ATARI),
        ("my_game:MazeHard-v0", ATARI),
        ("miniworld:MiniWorld-FourRooms-v0", ATARI | ROOM),
        *((f"{name}-v0", PROCGEN) for name in ("CoinrunEasy", "BigfishHard", "MazeExploration")),
        *((f"{name}-v0", PROCGEN) for name in ("ChaserExtreme", "CaveflyerMemory")),
    ],
)
def test_defaults_are_those_of_the_environment(env_id, defaults):
    found = vars(parse_args(["--env-id", env_id]))
    assert {name: found[name] for name in defaults} == defaults and found["env_id"] == env_id
    # A flag beats them, wherever it stands, also with the value that is Jump's default.
    changed = vars(parse_args(["--num-steps", "64", "--env-id", env_id, "--learning-rate", "1e-3"]))
    assert changed == found | {"num_steps": 64, "learning_rate": 1e-3}


def test_defaults_of_jump_name_the_shipped_encoder():
    assert ppo_pisco.load_encoder(parse_args([]).encoder_weights, Encoder(Args(), (1, 60, 60)))["objective"]


@pytest.mark.parametrize(
    "env_id, steps", [("Jump-v0", "102400"), ("Pong-v5", "10000000"), ("CoinrunEasy-v0", "25000000")]
)
def test_help_shows_the_defaults_of_the_environment(capsys, env_id, steps):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--env-id", env_id, "--help"])
    assert not stop.value.code
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert re.search(rf"--total-timesteps INT .{{0,60}}\(default: {steps}\)", text)
    for flag in ("--freeze-layers", "--ssl", "--jump-prior", "PiSCO"):
        assert flag in text


def test_resume_keeps_the_arguments_of_the_run(tmp_path, monkeypatch):
    made = parse_args(["--env-id", "Pong-v5", "--runs-dir", str(tmp_path), "--num-steps", "64"])
    folder = make_run_folder(made)
    saved = json.loads((folder / "args.json").read_text())
    assert saved == {name: value for name, value in vars(made).items() if name != "resume"}
    assert (saved["num_envs"], saved["num_steps"]) == (8, 64)
    monkeypatch.setattr(ppo_pisco, "ATARI", {"num_envs": 1})  # as in a later version of the file
    made.resume = str(folder)
    assert parse_args(["--resume", str(folder)]) == made
    assert parse_args(["--resume", str(folder), "--num-envs", "8", "--env-id", "Pong-v5"]) == made


# --- What training changes -------------------------------------------------------------------------------------------
@pytest.fixture
def initial(monkeypatch):
    """The weights that a run starts from, by name, once it has started."""
    weights, collect_rollout = {}, ppo_pisco.collect_rollout

    def spy(agent, *args):
        for name, value in agent.state_dict().items():
            weights.setdefault(name, value.clone())
        return collect_rollout(agent, *args)

    monkeypatch.setattr(ppo_pisco, "collect_rollout", spy)
    return weights


@pytest.mark.parametrize("count, flags", [(0, ""), (1, ""), (2, ""), ("all", ""), (2, "--bf16")])
def test_frozen_layers_stay_and_the_others_move(tmp_path, initial, count, flags):
    folder = train(tmp_path, f"--freeze-layers {count} --freeze-random --projector mlp {flags}")
    frozen = 4 if count == "all" else count
    for name, value in tensors(folder).items():
        is_frozen = name.startswith(tuple(f"encoder.layers.{i}." for i in range(frozen)))
        assert torch.equal(value, initial[name]) == is_frozen, name
    # Two tensors in each of four layers, two in the actor, two in the critic, four in the projector.
    optimizer = torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]
    assert len(optimizer["param_groups"][0]["params"]) == len(optimizer["state"]) == 16 - 2 * frozen
    assert all(float(row["losses/grad_norm_trained"]) > 0.0 for row in metrics(folder))


def test_printed_table_says_what_is_frozen(tmp_path, capsys):
    train(tmp_path, "--freeze-layers 2 --freeze-random")
    rows = re.findall(r"^layer +(\d+) +([\d,]+) parameters +(\w+)$", capsys.readouterr().out, re.MULTILINE)
    # 8 * 8 * 32 + 32; 4 * 4 * 32 * 64 + 64; 3 * 3 * 64 * 64 + 64; 60 -> 14 -> 6 -> 4 pixels: 4 * 4 * 64 * 32 + 32
    sizes = "2,080", "32,832", "36,928", "32,800"
    assert rows == list(zip("1234", sizes, ("frozen", "frozen", "trained", "trained")))


@pytest.mark.parametrize("tau, weight", [(0.0, 0.0), (0.25, 0.25)])
def test_curl_key_encoder_follows_the_encoder(tmp_path, initial, tau, weight):
    # One update: key = initial + tau (encoder - initial).
    folder = train(tmp_path, f"--ssl curl --curl-tau {tau} --total-timesteps 32 --num-minibatches 1 --update-epochs 1")
    final = tensors(folder)
    for name in [name for name in final if name.startswith("key_encoder.")]:
        start, end = initial[name], final[name.removeprefix("key_")]
        torch.testing.assert_close(final[name], start + weight * (end - start))
        assert not torch.equal(start, end)


@pytest.mark.parametrize("own", ["state --projector residual", "state --projector none", "view --projector mlp"])
@pytest.mark.parametrize("ssl", ["pisco", "simsiam", "curl", "none"])
@pytest.mark.parametrize("encoder", ["nature", "impala"])
def test_every_loss_trains_every_encoder(tmp_path, ssl, encoder, own):
    flags = f"--ssl {ssl} --ssl-teacher {own} --encoder {encoder} --total-timesteps 64 --update-epochs 1"
    rows = finite_losses(train(tmp_path, flags))
    assert len(rows) == 2
    for i, row in enumerate(rows):
        filled = {kind for kind in ("pisco", "simsiam", "curl", "ssl_grad_share") if row.get(f"losses/{kind}")}
        assert filled == (set() if ssl == "none" else {ssl} if i else {ssl, "ssl_grad_share"})
        assert 0 <= float(row["losses/view_agreement"]) <= 1
        assert all(row[f"losses/{name}"] for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"))


def test_gradient_share_is_measured_once_in_24_minibatches(tmp_path):
    """Three iterations of eight in 2 x 4 minibatches, all of them in 3 x 8."""
    flags = "--num-envs 8 --total-timesteps 512 --eval-interval 0"
    for own, wanted in (
        ("--update-epochs 2 --num-minibatches 4", [1, 4, 7]),
        ("--update-epochs 3 --num-minibatches 8", range(1, 9)),
    ):
        rows = metrics(train(tmp_path, f"{flags} {own}"))
        assert [i for i, row in enumerate(rows, 1) if row["losses/ssl_grad_share"]] == list(wanted)


def test_augmentation_is_used(tmp_path):
    models = [tensors(train(tmp_path, f"--augmentation {kind} --total-timesteps 32")) for kind in ("shift", "noise")]
    assert not torch.equal(models[0]["actor.0.weight"], models[1]["actor.0.weight"])
    one = train(tmp_path, "--augmentation shift --shift-pixels 0 --total-timesteps 32")
    assert metrics(one)[0]["losses/view_agreement"] == "1.0"  # the view is the state


# The last of four iterations with two views as teachers, recorded before there was another teacher
TWO_VIEWS = {  # loss, frozen layers: policy_loss, value_loss, entropy, the loss, grad_norm_trained
    ("pisco", 0): (-1.267995685338974e-05, 0.1660926640033722, 0.33322349190711975, 3.10735049424693e-05, 0.775698721),
    ("pisco", 2): (-3.11853364109993e-05, 0.250343382358551, 0.3357101082801819, 5.25644063600339e-05, 1.07100141),
    ("curl", 0): (-0.0005318000912666321, 0.10623136907815933, 0.3409315347671509, 2.0653669834136963, 0.591370880),
    ("curl", 2): (-0.0005055256187915802, 0.13313829898834229, 0.3433942496776581, 2.057058811187744, 0.643839478),
    ("simsiam", 0): (2.4493783712387085e-07, 0.1150214672088623, 0.33452227711, -0.6350077986717224, 0.6764863133),
    ("simsiam", 2): (-4.094373434782028e-05, 0.19282105565071106, 0.33608263731, -0.6333805322647095, 0.9342850446),
}


@pytest.mark.parametrize("ssl, count", TWO_VIEWS)
def test_two_views_give_the_numbers_that_they_always_gave(tmp_path, monkeypatch, ssl, count):
    """Other CPUs round otherwise. CURL's key encoder drew random weights then before it became a copy."""

    def draw_and_copy(module):
        if isinstance(module, Encoder):
            Encoder(Args(feature_dim=32), (1, 60, 60))
        return deepcopy(module)

    monkeypatch.setattr(ppo_pisco, "copy", types.SimpleNamespace(deepcopy=draw_and_copy))
    flags = f"--ssl {ssl} --freeze-layers {count} --ssl-coef 0.1 --ssl-teacher view --projector mlp --freeze-random"
    row = metrics(train(tmp_path, f"{flags} --ssl-fraction 0.5 --eval-interval 0"))[-1]
    names = ("policy_loss", "value_loss", "entropy", ssl, "grad_norm_trained")
    found = [float(row[f"losses/{name}"]) for name in names]
    assert found == pytest.approx(TWO_VIEWS[ssl, count], rel=1e-3, abs=1e-6)


# --- Reproducibility and the run folder ------------------------------------------------------------------------------
def test_same_seed_same_run(tmp_path, finished):
    assert_same_end(train(tmp_path), finished)


def test_other_seed_other_run(tmp_path, finished):
    other = train(tmp_path, "--seed 2")
    assert (other / "model.safetensors").read_bytes() != (finished / "model.safetensors").read_bytes()
    assert metrics(other) != metrics(finished)


def test_metrics(finished):
    rows = finite_losses(finished)
    assert [int(row["global_step"]) for row in rows] == [32, 64, 96, 128]
    # 1e-3 annealed over four iterations
    assert [float(row["charts/learning_rate"]) for row in rows] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert rows[0]["charts/episodic_return"] == ""  # 8 steps: the obstacles are at 20 and beyond
    assert float(rows[-1]["charts/episodic_length"]) >= 16  # an obstacle at 20: collision at x = 16
    assert rows[0]["eval/greedy_success"] == "" and rows[-1]["eval/greedy_success"] != ""


def test_tensorboard_has_cleanrls_keys_and_the_same_numbers(finished):
    events = EventAccumulator(str(finished)).Reload()
    wanted = {"charts/SPS", "charts/learning_rate", "charts/episodic_return", "charts/episodic_length"}
    names = "policy_loss value_loss entropy old_approx_kl approx_kl clipfrac explained_variance"
    names += " pisco ssl_grad_share view_agreement dead_features grad_norm_trained"
    wanted |= {f"losses/{name}" for name in names.split()}
    assert wanted <= set(events.Tags()["scalars"])
    for row in metrics(finished):
        for key, value in row.items():
            if key != "global_step" and value:
                (event,) = [event for event in events.Scalars(key) if event.step == int(row["global_step"])]
                assert event.value == pytest.approx(float(value), rel=1e-6), key


def test_run_folder(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith("events.out.tfevents.")}
    assert names == {
        "args.json", "metrics.csv", "checkpoint.pt", "model.safetensors", "encoder.safetensors", "evaluation.json",
        "solved.png",
    }  # fmt: skip
    assert json.loads((finished / "args.json").read_text())["num_envs"] == 4
    assert finished.name.startswith("Jump-v0__ppo_pisco__1__")
    checkpoint = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 4 and checkpoint["row"]["global_step"] == 128  # one row, however long the run is


def test_metrics_are_appended(tmp_path):
    """Each row costs the same; a column that is new is filled up in the rows before."""
    path, rows = tmp_path / "metrics.csv", [{"a": i, "b": -0.5 * i} for i in range(5)]
    for row in [*rows, {"a": 5, "b": math.nan, "c": 1e-9}, {"c": 2, "a": 6}]:
        inode = path.exists() and path.stat().st_ino
        ppo_pisco.append_metrics(path, row)
        assert (path.stat().st_ino == inode) == (row["a"] not in (0, 5))
    assert path.read_text() == "a,b,c\n0,-0.0,\n1,-0.5,\n2,-1.0,\n3,-1.5,\n4,-2.0,\n5,nan,1e-09\n6,,2\n"


def test_runs_of_one_second_get_folders_of_their_own(tmp_path):
    folders, barrier = [], threading.Barrier(8)

    def make(seconds):
        barrier.wait()
        folders.append((make_run_folder(Args(runs_dir=str(tmp_path / "runs"), eval_episodes=seconds)), seconds))

    threads = [threading.Thread(target=make, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({folder for folder, _ in folders}) == len(list((tmp_path / "runs").iterdir())) == 8
    for folder, i in folders:
        assert json.loads((folder / "args.json").read_text())["eval_episodes"] == i


@pytest.mark.parametrize("env_id", ["Jump-v0", "my.module:Mine-v0", "ALE/Pong-v5", "../up"])
def test_run_folder_lies_in_runs_dir(tmp_path, env_id):
    folder = make_run_folder(Args(env_id=env_id, exp_name="../../x y", runs_dir=str(tmp_path / "runs")))
    assert folder.resolve().parent == tmp_path / "runs"
    assert re.fullmatch(r"[\w.-]+__[\w.-]+__1__\d+", folder.name)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_writing_atomically_waits_for_the_disk(tmp_path, monkeypatch):
    path, order = tmp_path / "file", []
    path.write_bytes(b"before")
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(fd):
        order.append(("fsync", os.fstat(fd).st_size, path.read_bytes()))
        real_fsync(fd)

    def replace(source, target):
        order.append(("replace", source, target))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    ppo_pisco.write_atomically(path, b"afterwards")
    # All of it is on the disk before it takes the old one's place.
    assert order == [("fsync", 10, b"before"), ("replace", tmp_path / "file.tmp", path)]
    assert path.read_bytes() == b"afterwards" and list(tmp_path.iterdir()) == [path]


def test_encoder_file_loads_into_another_run(tmp_path, finished):
    path = finished / "encoder.safetensors"
    weights, about = encoder_file(path)
    assert about["architecture"] == "nature" and about["observation_shape"] == "[1, 60, 60]"
    assert (about["frame_stack"], about["image_channels"]) == ("1", "1")
    assert about["environment"] == "Jump-v0" and about["steps"] == "128" and about["seed"] == "1"
    assert "pisco" in about["objective"] and about["feature_dim"] == "32"
    assert json.loads(about["versions"])["torch"] == torch.__version__
    other = train(tmp_path, f"--encoder-weights {path} --freeze-layers all --total-timesteps 32 --seed 5")
    assert tensors(other, "encoder").keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(tensors(other, "encoder")[name], value)
        assert torch.equal(tensors(finished)[f"encoder.{name}"], value)


def test_weights_and_biases_is_told_of_the_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs)))
    train(tmp_path, "--total-timesteps 32")
    assert not calls
    folder = train(tmp_path, "--total-timesteps 32 --track --wandb-project-name mine --exp-name tracked")
    resume(folder)
    for call in calls:  # the resumed run goes on in the same place
        assert call["project"] == "mine" and call["name"] == call["id"] == folder.name and call["resume"] == "allow"
        assert call["config"]["num_envs"] == 4 and call["sync_tensorboard"]
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
def test_compiled_loss_is_the_same_and_is_compiled_once(tmp_path, monkeypatch):
    import torch._inductor.config
    from torch._dynamo.utils import counters

    flags = "--total-timesteps 96 --update-epochs 1 --feature-dim 8 --projector-dim 8 --freeze-layers 3 --freeze-random"
    expected = finite_losses(train(tmp_path / "plain", flags))
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)  # the same shifts as uncompiled
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    found = finite_losses(train(tmp_path / "compiled", f"{flags} --compile"))
    assert counters["stats"]["unique_graphs"] == 1  # the whole loss, and for all of the six minibatches
    assert len(found) == len(expected) == 3
    for row, other in zip(found, expected):
        assert all(bool(row[name]) == bool(value) for name, value in other.items())
        for name, value in other.items():
            if name.startswith("losses/") and value:
                assert float(row[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-4), name


# --- Evaluation ------------------------------------------------------------------------------------------------------
class Scripted(torch.nn.Module):
    """Jumps at the one right moment on the floors named, never elsewhere, as seen from the image alone."""

    def __init__(self, floors):
        super().__init__()
        self.floors = floors

    def forward(self, obs):
        jump = []
        for image in obs[:, 0]:
            floor = int((image[1:59] == 255).all(dim=1).nonzero()[0]) + 1
            row = image[floor + 5, 1:59]
            agent, obstacle = (row == 255).nonzero().flatten(), (row == 128).nonzero().flatten()
            jump.append(floor in self.floors and len(agent) > 0 and int(obstacle[0]) - int(agent[0]) == 14)
        right = torch.tensor([[50.0, 0.0]])
        return torch.where(torch.tensor(jump)[:, None], right.flip(1), right.repeat(len(jump), 1)), torch.zeros(
            len(jump)
        )


@pytest.mark.parametrize("floors", [{15}, set(range(41)), set()])
def test_evaluation_counts_every_task_once(tmp_path, floors):
    args = Args(jump_tasks="25:5,25:15,35:15,45:25")
    found = ppo_pisco.evaluate(Scripted(floors), args, torch.device("cpu"), 7, tmp_path)
    trained, result = [(25, 5), (25, 15), (35, 15), (45, 25)], evaluation(tmp_path)
    unseen = [task for task in JUMP_GRID if task not in trained]
    assert len(unseen) == 284
    for policy in ("greedy", "sampled"):  # the script is as good as certain of its action
        assert result[policy]["solved"] == {f"{x}:{y}": y in floors for x, y in trained + unseen}
        assert result[policy]["trained_tasks"] == [f"{x}:{y}" for x, y in trained]
        assert found[f"eval/{policy}_success"] == pytest.approx(sum(y in floors for _, y in trained) / 4)
        assert found[f"eval/{policy}_unseen_success"] == pytest.approx(sum(y in floors for _, y in unseen) / 284)
        # Solved: 56 steps and the bonus 1. Not solved: obstacle - 5 steps of +1 and the collision's -1.
        returns = [57.0 if y in floors else x - 6.0 for x, y in trained]
        assert result[policy]["return"] == returns and found[f"eval/{policy}_return"] == pytest.approx(np.mean(returns))
        assert result[policy]["length"] == [56 if y in floors else x - 4 for x, y in trained]
    assert result["global_step"] == 7
    picture = np.array(Image.open(tmp_path / "solved.png"))[8::16, 8::16][::-1]  # rows: floors from the lowest on
    rows = [5, *range(10, 21), 25]
    assert picture.shape == (13, 26, 3)
    for row, y in zip(picture, rows):
        for colour, x in zip(row, range(20, 46)):
            shade = 255 if y in floors else 90
            blue = 0 if (x, y) in trained else shade  # yellow and olive
            assert tuple(colour) == ((shade, shade, blue) if (x, y) in trained + unseen else (0, 0, 0))


@pytest.mark.parametrize("tasks, count", [("none", 0), ("45:20,25:15,45:15", 2), ("wide", 16)])
def test_evaluation_of_other_tasks_has_the_same_scores(tmp_path, tasks, count):
    """Of `wide`, 25:15 and 35:15 are trained; a trained task is played once and never unseen."""
    found, solved = {}, {}
    for others in (tasks, "grid"):
        args = Args(jump_tasks="25:5,25:15,35:15,45:25", jump_eval_tasks=others)
        found[others] = ppo_pisco.evaluate(Scripted({15}), args, torch.device("cpu"), 7, tmp_path)
        solved[others] = evaluation(tmp_path)["greedy"]["solved"]
    assert len(solved[tasks]) == 4 + count and list(solved[tasks])[:4] == ["25:5", "25:15", "35:15", "45:25"]
    for name in ("return", "success"):
        assert found[tasks][f"eval/greedy_{name}"] == found["grid"][f"eval/greedy_{name}"]
    unseen = {"none": None, "wide": 4 / 16}.get(tasks, 1 / 2)
    assert found[tasks].get("eval/greedy_unseen_success") == unseen


def test_evaluation_of_a_run_covers_the_grid_and_leaves_training_alone(tmp_path, finished):
    folder = train(tmp_path, "--eval-interval 64 --capture-video --jump-eval-tasks grid")
    assert len(evaluation(folder)["greedy"]["solved"]) == 286 + 1  # two of the three tasks are in the grid
    assert [bool(row["eval/greedy_success"]) for row in metrics(folder)] == [False, True, False, True]
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    for step in (64, 128):
        video = Image.open(folder / f"evaluation_{step}.gif")
        # 60 pixels, twice as large; the first task is 20:5, whose episode ends at step 16 or later
        assert video.format == "GIF" and video.size == (120, 120) and video.n_frames >= 16


@pytest.fixture
def gifs(monkeypatch):
    """The frames that the GIFs of a run were written from."""
    written, write_gif = [], ppo_pisco.write_gif

    def spy(path, frames):
        written.append(frames)
        write_gif(path, frames)

    monkeypatch.setattr(ppo_pisco, "write_gif", spy)
    return written


def test_video_is_of_the_first_episode(tmp_path, gifs):
    folder = train(tmp_path, "--total-timesteps 32 --capture-video --jump-tasks 15:0,40:0 --jump-prior 1e-6")
    (frames,) = gifs
    assert len(frames) == 15 - 5 + 1 == evaluation(folder)["greedy"]["length"][0]  # and not 36, as in the second one
    env = ppo_pisco.JumpVectorEnv(1, [(15, 0)])
    expected, _ = env.reset(seed=0)
    for frame in frames:  # what the agent saw, upside down: an image's first row is its highest
        np.testing.assert_array_equal(frame, expected[0, :, ::-1])
        expected, *_ = env.step(np.array([0]))


def test_video_of_large_images_is_thinned(tmp_path, gifs):
    folder = train(
        tmp_path, "--env-id TinyImageLarge-v0 --capture-video --num-envs 2 --num-steps 2 --total-timesteps 4"
    )
    (frames,) = gifs
    assert [frame.shape for frame in frames] == [(3, 120, 160)] * 3
    assert [frame[0, 0, 0] for frame in frames] == [0, 1, 2] and all((frame[2] == 9).all() for frame in frames)
    assert Image.open(folder / "evaluation_4.gif").size == (320, 240)


def test_video_of_an_endless_episode_has_an_end():
    args, frames = Args(env_id="TinyImageEndless-v0", feature_dim=8, ssl="none", eval_max_steps=1200), []
    envs = ImageEnvs(args, 1, evaluation=True)
    ppo_pisco.play_episodes(make_agent(args, envs), envs, args, torch.device("cpu"), True, frames)
    assert len(frames) == 1000 and all(frame.shape == (3, 36, 40) for frame in frames)
    assert not np.shares_memory(frames[0], frames[1])


def test_gif_shows_the_newest_frame_of_a_stack(tmp_path):
    stack = np.stack([np.full((10, 8), shade, np.uint8) for shade in (0, 60, 120, 180)])
    colours = np.stack([np.full((10, 8), shade, np.uint8) for shade in (1, 2, 3, 0, 128, 255)])
    for name, frame, expected in (("grey", stack, [180] * 3), ("colours", colours, [0, 128, 255])):
        ppo_pisco.write_gif(tmp_path / f"{name}.gif", [frame, frame[::-1].copy()])
        image = Image.open(tmp_path / f"{name}.gif")
        assert image.size == (16, 20) and image.n_frames == 2
        np.testing.assert_allclose(np.array(image.convert("RGB"))[3, 3], expected, atol=6)


def test_evaluation_of_an_endless_environment_is_cut_off(tmp_path, capsys):
    """The iteration's numbers are on the disk, in its checkpoint, before the evaluation begins."""
    flags = (
        "--env-id TinyImageEndless-v0 --eval-max-steps 7 --eval-episodes 2 --eval-interval 64 --checkpoint-interval 0"
    )
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "evaluate", 2)
        folder = train_until_killed(tmp_path, flags)
    assert [row["global_step"] for row in metrics(folder)] == ["32", "64", "96"]
    assert metrics(folder)[1]["eval/greedy_return"] == "70.0" and metrics(folder)[2]["eval/greedy_return"] == ""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 4 and checkpoint["row"]["global_step"] == 128
    capsys.readouterr()
    resume(folder)
    out = capsys.readouterr().out
    assert out.count("evaluation: 2 of 2 episodes were cut off after 7 steps\n") == 2  # greedy and sampled
    rows = finite_losses(folder)
    assert len(rows) == 4 and rows[3]["eval/greedy_return"] == rows[3]["eval/sampled_return"] == "70.0"
    assert "charts/episodic_return" not in rows[3]
    assert evaluation(folder)["sampled"] == {"return": [70.0] * 2, "length": [7] * 2}


def test_evaluation_runs_up_to_the_environments_own_limit(tmp_path, capsys):
    flags = "--env-id TinyImageLimited-v0 --total-timesteps 32 --eval-max-steps 3"
    folder = train(tmp_path, flags)
    assert evaluation(folder)["greedy"] == {"return": [60.0], "length": [6]}
    assert "cut off" not in capsys.readouterr().out


def test_jump_cut_off_is_not_solved(tmp_path):
    args = Args(feature_dim=8, ssl="none", eval_max_steps=10)
    found = ppo_pisco.evaluate(make_agent(args, ImageEnvs(args, 1)), args, torch.device("cpu"), 0, tmp_path)
    assert found["eval/greedy_success"] == found["eval/sampled_unseen_success"] == 0.0


# --- Resume ----------------------------------------------------------------------------------------------------------
# The files that are written anew: args.json; a checkpoint in each of four iterations; metrics.csv in the first, in the
# third, when episodes have ended, and with the evaluation's columns; before that the weights. Besides, four rows are
# added.
WRITTEN = ["args.json", "checkpoint.pt", "metrics.csv", *["checkpoint.pt"] * 2, "metrics.csv", "checkpoint.pt"]
WRITTEN += ["model.safetensors", "encoder.safetensors", "evaluation.json", "metrics.csv"]
MOMENTS = [
    ("before the first rollout", ppo_pisco, "collect_rollout", 1),
    ("in the first update", ppo_pisco, "update", 1),
    ("in the third iteration", ppo_pisco, "collect_rollout", 3),
    ("in the last update", ppo_pisco, "update", 4),
    ("before the metrics of an iteration", ppo_pisco, "append_metrics", 3),
    ("in the evaluation", ppo_pisco, "evaluate", 1),
    ("before the metrics of the evaluation", ppo_pisco, "append_metrics", 6),
    ("before the encoder is written", ppo_pisco, "save_encoder", 1),
    *((f"renaming file {n}", os, "replace", n) for n in range(2, len(WRITTEN) + 1)),
    *((f"half of file or row {n} written", os, "fsync", n) for n in range(2, len(WRITTEN) + 4 + 1)),
]


def test_number_of_files_written(tmp_path, monkeypatch, finished):
    """MOMENTS has them all."""
    calls, synced, real, sync = [], [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append(paths[1].name) or real(*paths))
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(fd) or sync(fd))
    assert_same_end(train(tmp_path), finished)
    assert calls == WRITTEN and len(synced) == len(WRITTEN) + 4


@pytest.mark.parametrize("owner, name, nth", [moment[1:] for moment in MOMENTS], ids=[moment[0] for moment in MOMENTS])
def test_resume_after_a_kill_equals_an_uninterrupted_run(tmp_path, finished, owner, name, nth):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner, name, nth, first=tear if name == "fsync" else lambda *args: None)
        folder = train_until_killed(tmp_path)
    assert_same_end(resume(folder), finished)
    assert not list(folder.glob("*.tmp"))


def test_resume_twice_and_of_a_finished_run(tmp_path, finished):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 2)
        folder = train_until_killed(tmp_path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, ppo_pisco, "update", 2)
        resume(folder)
    assert_same_end(resume(folder), finished)
    assert_same_end(resume(folder), finished)


OTHERS = [
    "--ssl curl --freeze-layers 1 --freeze-random",
    "--ssl simsiam --augmentation noise --freeze-layers all --freeze-random",
    "--ssl none --target-kl 1e-5",
    "--freeze-layers 2 --freeze-random --checkpoint-interval 2 --eval-interval 32",
    "--encoder impala",
    "--bf16 --ssl curl",
]


@pytest.mark.parametrize("flags", OTHERS)
def test_resume_of_other_runs(tmp_path, flags):
    flags += " --total-timesteps 96"
    whole = train(tmp_path / "whole", flags)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 3)
        folder = train_until_killed(tmp_path / "killed", flags)
    assert_same_end(resume(folder), whole)


def test_resume_needs_the_pretrained_encoder_no_more(tmp_path, finished):
    path = shutil.copy(finished / "encoder.safetensors", tmp_path)
    flags = f"--encoder-weights {path} --freeze-layers 2"
    whole = train(tmp_path / "whole", flags)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 3)
        folder = train_until_killed(tmp_path / "killed", flags)
    os.remove(path)
    assert_same_end(resume(folder), whole)


@pytest.mark.parametrize("interval", [2, 100])
def test_resume_logs_no_step_twice(tmp_path, interval):
    """Killed in its fourth iteration with three logged, of which its checkpoint has two or none."""
    writers, real = [], ppo_pisco.SummaryWriter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_pisco, "SummaryWriter", lambda *args, **kw: writers.append(real(*args, **kw)) or writers[-1])
        kill_at(patch, ppo_pisco, "update", 4, first=lambda *args: writers[-1].flush())
        folder = train_until_killed(tmp_path, f"--checkpoint-interval {interval}")
    before = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in before.Scalars("losses/pisco")] == [32, 64, 96]
    time.sleep(1.1)  # TensorBoard reads a folder's files in the order of the seconds in their names
    events = EventAccumulator(str(resume(folder))).Reload()
    assert [event.step for event in events.Scalars("losses/pisco")] == [32, 64, 96, 128]
    rows = metrics(folder)
    assert [row["global_step"] for row in rows] == ["32", "64", "96", "128"]
    for event, row in zip(events.Scalars("losses/pisco"), rows):
        assert event.value == pytest.approx(float(row["losses/pisco"]), rel=1e-6)


# --- Other processes: kill -9, Ctrl-C, the command line --------------------------------------------------------------
LONG = "--total-timesteps 640 --update-epochs 1 --exp-name long"  # 20 iterations, some seconds


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("long"), LONG)


def wait_for_rows(process, runs_dir, rows):
    deadline = time.monotonic() + 120
    while sum(path.read_text().count("\n") for path in runs_dir.glob("*/metrics.csv")) <= rows:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("number, rows", [(signal.SIGKILL, 1), (signal.SIGTERM, 3), (signal.SIGINT, 6)])
def test_resume_after_a_signal(tmp_path, long_run, number, rows):
    process = program(*command(tmp_path, LONG), preexec_fn=heed_ctrl_c)
    wait_for_rows(process, tmp_path, rows)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    (folder,) = tmp_path.glob("*")
    assert len(metrics(folder)) < 20 and process.returncode == -number  # it was still at work
    assert f"ppo_pisco.py --resume {folder}\n" in out and "\ndevice: cpu, 1 threads\n" in out
    assert_same_end(resume(folder), long_run)


def test_run_folder_of_another_process_is_left_alone(tmp_path, long_run):
    process = program(*command(tmp_path, LONG))
    wait_for_rows(process, tmp_path, 1)
    halt(process)
    (folder,) = tmp_path.glob("*")
    before = snapshot(folder)
    with pytest.raises(SystemExit, match=f"--resume {folder}: another process is at work in it"):
        resume(folder)
    assert snapshot(folder) == before
    process.kill()  # which frees it
    process.communicate(timeout=60)
    assert_same_end(resume(folder), long_run)


def test_ctrl_c_that_the_parent_ignores_stays_ignored(tmp_path, long_run):
    """A run that `nohup` or a script's `&` has started outlives the Ctrl-C for something else."""
    process = program(*command(tmp_path, LONG), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    wait_for_rows(process, tmp_path, 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    (folder,) = tmp_path.glob("*")
    assert (folder / "model.safetensors").read_bytes() == (long_run / "model.safetensors").read_bytes()


INTERRUPTED = """
import signal, sys, ppo_pisco
from torch.utils.tensorboard import SummaryWriter
from tensorboard.summary.writer.event_file_writer import EventFileWriter
real, calls = EventFileWriter.add_event, []

def add_event(self, event):
    calls.append(event)
    if len(calls) == 40:
        with self._async_writer._lock:  # where TensorBoard's own thread can't go on without this one
            signal.raise_signal(signal.SIGINT)
    real(self, event)

EventFileWriter.add_event = add_event
ppo_pisco.train(ppo_pisco.parse_args(sys.argv[1:]))
"""


def test_ctrl_c_in_the_midst_of_logging_does_not_hang(tmp_path, finished):
    line = [sys.executable, "-c", INTERRUPTED, *command(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=100, preexec_fn=heed_ctrl_c)
    assert done.returncode == -signal.SIGINT and "KeyboardInterrupt" in done.stderr
    (folder,) = tmp_path.glob("*")
    assert 0 < len(metrics(folder)) < 4
    assert_same_end(resume(folder), finished)


def test_main_command(tmp_path):
    """`python ppo_pisco.py --freeze-layers 2` with the encoder shipped for Jump, at a smaller scale, from anywhere."""
    small = "--total-timesteps 256 --num-envs 8 --num-steps 16 --torch-threads 1"
    process = program("--freeze-layers", "2", *small.split(), cwd=tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "Traceback" not in err and "evaluation:" in out
    (folder,) = (tmp_path / "runs").glob("Jump-v0__ppo_pisco__1__*")
    shipped = safetensors.torch.load_file(ROOT / "encoders" / "jump-v0__nature__rl.safetensors")
    for name, value in tensors(folder, "encoder").items():
        assert torch.equal(value, shipped[name]) == name.startswith(("layers.0.", "layers.1.")), name


DENORMALS = """
import numpy as np, torch, ppo_pisco
tiny = torch.from_numpy(np.full(4_000_000, 1e-39, np.float32))  # enough of them for both threads
assert tiny.numpy().all()
ppo_pisco.set_up(ppo_pisco.Args(torch_threads=2))
print(int((tiny * 1.0).numpy().view(np.uint32).any()))
"""


def test_every_thread_flushes_denormal_numbers():
    """In a process of its own: threads that PyTorch has started before keep their mode."""
    done = subprocess.run([sys.executable, "-c", DENORMALS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done.stderr


def test_the_file_alone_is_enough(tmp_path):
    """A copy of the file, with encoders/ beside it, works without the rest of the repository."""
    shutil.copy(ROOT / "ppo_pisco.py", tmp_path)
    (tmp_path / "encoders").mkdir()
    encoder = Encoder(Args(feature_dim=32), (1, 60, 60))
    save_encoder(tmp_path / "encoders" / "jump-v0__nature__rl.safetensors", encoder)
    flags = [*TINY.replace("--encoder-weights none", "--freeze-layers all").split(), "--total-timesteps", "32"]
    command_line = [sys.executable, "-I", "ppo_pisco.py", *flags]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    for name, value in encoder.state_dict().items():
        assert torch.equal(tensors(folder, "encoder")[name], value)


# --- Seeds -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def seeds_given(monkeypatch):
    """The lists of seeds that make_envs was given."""
    given, make_envs = [], ppo_pisco.make_envs

    def spy(args, num_envs, seeds, evaluation):
        assert len(seeds) == num_envs and all(0 <= seed < 2**31 for seed in seeds)  # EnvPool's are 32 bits, signed
        given.append(seeds)
        return make_envs(args, num_envs, seeds, evaluation)

    monkeypatch.setattr(ppo_pisco, "make_envs", spy)
    return given


def test_no_two_copies_share_a_seed(seeds_given):
    """Seeds 1 to 5, training and evaluation, a run and its resumed parts: each copy plays worlds of its own."""
    for seed in range(1, 6):
        args = Args(env_id="TinyImage-v0", seed=seed)
        for kwargs in ({}, {"start": 1}, {"start": 2}, {"start": 10}, {"evaluation": True}):
            ImageEnvs(args, 64, **kwargs)
    seeds = [seed for copies in seeds_given for seed in copies]
    assert len(set(seeds)) == len(seeds) == 5 * 5 * 64


def test_resumed_run_and_evaluations_get_seeds_of_their_own(tmp_path, seeds_given):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 3)
        folder = train_until_killed(tmp_path, "--env-id TinyImage-v0 --eval-episodes 2")
    resume(folder)
    first, resumed, greedy, sampled = seeds_given
    assert len({*first, *resumed, *greedy}) == 4 + 4 + 2
    assert greedy == sampled  # the two policies play the same episodes


def test_jump_keeps_the_seed_of_the_run():
    envs, plain = ImageEnvs(Args(seed=3, jump_tasks="grid"), 16), ppo_pisco.JumpVectorEnv(16, JUMP_GRID)
    np.testing.assert_array_equal(envs.reset(), plain.reset(seed=3)[0])
    assert not np.array_equal(envs.reset(), plain.reset(seed=4)[0])


def test_gymnasium_copies_of_different_runs_see_different_worlds():
    def worlds(seed, **kwargs):
        envs = ImageEnvs(Args(env_id="TinyImageNoise-v0", seed=seed), 4, **kwargs)
        return [*envs.reset(), *envs.step(np.zeros(4, np.int64))[0]]

    seen = [worlds(1), worlds(2), worlds(3), worlds(1, start=5), worlds(1, evaluation=True)]
    assert len({world.tobytes() for run in seen for world in run}) == 5 * 8
    for world, again in zip(seen[0], worlds(1)):
        np.testing.assert_array_equal(world, again)


def test_same_seed_same_gymnasium_run(tmp_path):
    runs = [
        train(tmp_path / name, f"--env-id TinyImageNoise-v0 --seed {seed}")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert_same_end(runs[0], runs[1])
    assert evaluation(runs[0]) == evaluation(runs[1])
    assert metrics(runs[0]) != metrics(runs[2])


# --- Gymnasium -------------------------------------------------------------------------------------------------------
LAYOUTS = {  # shape of an observation, images in it
    "TinyImage-v0": ((3, 36, 40), 1),
    "TinyImageFlat-v0": ((1, 36, 40), 1),
    "TinyImageGrey-v0": ((1, 36, 40), 1),
    "TinyImageFirst-v0": ((3, 36, 40), 1),
    "TinyImageStack-v0": ((12, 36, 40), 4),
    "Pong-v5": ((4, 84, 84), 4),
}


class Numbered(TinyImage):
    """A stack of four colour images; each channel is full of its number in the order of time."""

    def _image(self):
        numbers = np.arange(12, dtype=np.uint8).reshape(4, 3)
        last = self.observation_space.shape[-1] == 3
        numbers = numbers[:, None, None, :] if last else numbers[:, :, None, None]
        return np.broadcast_to(numbers, self.observation_space.shape).copy()


@pytest.mark.parametrize("shape", [(4, 36, 40, 3), (4, 3, 36, 40)])
def test_stack_of_images_is_folded_into_the_channels(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(gym.envs.registration, "registry", gym.registry.copy())
    gym.register("Numbered-v0", entry_point=lambda: Numbered(shape))
    envs = ImageEnvs(Args(env_id="Numbered-v0"), 2)
    assert envs.obs_shape == (12, 36, 40) and envs.frame_stack == 4
    for obs in (envs.reset(), envs.step(np.zeros(2, np.int64))[0]):
        assert obs.shape == (2, 12, 36, 40)
        assert (obs == np.arange(12)[None, :, None, None]).all()


@pytest.mark.parametrize("env_id", LAYOUTS)
def test_image_layouts(env_id):
    envs, (shape, stack) = ImageEnvs(Args(env_id=env_id), 2), LAYOUTS[env_id]
    assert envs.frame_stack == stack
    obs = envs.reset()
    assert envs.obs_shape == shape and obs.shape == (2, *shape) and obs.dtype == np.uint8
    if env_id == "TinyImage-v0":  # the last channel has become the third
        assert (obs[:, :2] == 0).all() and (obs[:, 2] == 9).all()


def test_gymnasium_episodes():
    envs = ImageEnvs(Args(env_id="TinyImage-v0"), 2)
    assert envs.num_actions == 3  # 5, 6, 7 to the environment, which refuses others
    seen, ends, episodes, rewards = [int(envs.reset()[0, 0, 0, 0])], [], [], []
    for step in range(12):
        obs, reward, terminated, truncated = envs.step(np.array([step % 3, 2]))
        seen.append(int(obs[0, 0, 0, 0]))
        ends.append("T" if terminated[0] else "t" if truncated[0] else ".")
        rewards.append(float(reward[0]))
        episodes += envs.episodes
    # The last observation of an episode comes with its end (3, then 5), the first of the next one a step later.
    assert seen == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert "".join(ends) == "..T.....t..."
    assert rewards == [10.0] * 3 + [0.0] + [10.0] * 5 + [0.0] + [10.0] * 2
    expected = [(0, 30.0, 3), (1, 30.0, 3), (0, 50.0, 5), (1, 50.0, 5)]
    assert [(e["env"], e["return"], e["length"]) for e in episodes] == expected


def test_gymnasium_rollout_bootstraps_truncated_episodes():
    args = Args(env_id="TinyImage-v0", num_envs=2, num_steps=12, feature_dim=8, ssl="none", reward_scale=0.1)
    envs = ImageEnvs(args, 2)
    first = torch.from_numpy(envs.reset())
    rollout, _, next_value, _ = ppo_pisco.collect_rollout(make_agent(args, envs), envs, first, args)
    assert (~rollout.valid[:, 0]).nonzero().flatten().tolist() == [3, 9]  # the steps that only reset
    assert rollout.terminated[:, 0].nonzero().flatten().tolist() == [2]
    assert rollout.truncated[:, 0].nonzero().flatten().tolist() == [8]
    assert int(rollout.obs[9, 0, 0, 0, 0]) == 5  # the truncated episode's last image, whose value is bootstrapped
    advantages, _ = ppo_pisco.compute_gae(
        rollout.rewards, rollout.values, next_value, rollout.terminated, rollout.truncated, 0.5, 0.5
    )
    values = rollout.values[:, 0]
    torch.testing.assert_close(advantages[2, 0], 1.0 - values[2])  # reward 10 * 0.1
    torch.testing.assert_close(advantages[8, 0], 1.0 + 0.5 * values[9] - values[8])


def test_gymnasium_run(tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 3)
        folder = train_until_killed(tmp_path, "--env-id TinyImage-v0 --capture-video")
    capsys.readouterr()
    resume(folder)
    assert "fresh episodes" in capsys.readouterr().out
    rows = finite_losses(folder)
    assert [int(row["global_step"]) for row in rows] == [32, 64, 96, 128]
    assert 30.0 <= float(rows[-1]["charts/episodic_return"]) <= 50.0
    # The evaluation's one episode is the first of its environment, which ends after three steps.
    assert evaluation(folder)["greedy"] == {"return": [30.0], "length": [3]}
    assert evaluation(folder)["metrics"] == {"eval/greedy_return": 30.0, "eval/sampled_return": 30.0}
    video = Image.open(folder / "evaluation_128.gif")
    assert video.size == (40 * 2, 36 * 2) and video.n_frames == 3
    assert not (folder / "solved.png").exists()


class OneStep(TinyImage):
    """Every episode is one step. Of its copies there is room for four."""

    open = set()

    def __init__(self):
        super().__init__(shape=(60, 60))
        self.open.add(self)
        assert len(self.open) <= 4

    def step(self, action):
        image, reward, *_ = super().step(action)
        return image, reward, True, False, {}

    def close(self):
        self.open.discard(self)


@pytest.fixture
def one_step(monkeypatch):
    monkeypatch.setattr(gym.envs.registration, "registry", gym.registry.copy())
    gym.register("OneStep-v0", entry_point=OneStep)
    OneStep.open.clear()


def test_rollout_of_resets_alone(tmp_path, one_step):
    """Every second one: there is nothing to learn from."""
    flags = "--num-steps 1 --num-minibatches 2 --total-timesteps 16 --eval-interval 0"
    folder = train(tmp_path, f"--env-id OneStep-v0 {flags}")
    rows = metrics(folder)
    assert [bool(row["losses/value_loss"]) for row in rows] == [True, False, True, False]
    assert [row["charts/episodic_length"] for row in rows] == ["1.0"] * 4


def test_last_evaluation_has_the_simulator_to_itself(tmp_path, one_step):
    folder = train(tmp_path, "--env-id OneStep-v0 --eval-interval 0 --eval-episodes 4")
    assert evaluation(folder)["greedy"]["length"] == [1] * 4 and not OneStep.open


MY_GAME = """
import gymnasium, numpy

class MyGame(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 255, (40, 40), numpy.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample() * 0, {}

    def step(self, action):
        return self.observation_space.sample() * 0, 1.0, True, False, {}

gymnasium.register("MyGame-v0", entry_point=MyGame)
"""


def test_module_in_the_current_folder_is_found(tmp_path):
    """Not only beside the script, where Python looks."""
    (tmp_path / "my_game.py").write_text(MY_GAME)
    process = program(*command("runs", "--env-id my_game:MyGame-v0 --total-timesteps 64"), cwd=tmp_path)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("my_game-MyGame-v0__") and len(finite_losses(folder)) == 2
    assert evaluation(folder)["greedy"] == {"return": [1.0], "length": [1]}


def test_gymnasium_needs_no_envpool(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    assert ImageEnvs(Args(env_id="TinyImage-v0"), 2).obs_shape == (3, 36, 40)
    with pytest.raises(SystemExit, match="--env-id Pong-v5: unknown environment"):
        ImageEnvs(Args(env_id="Pong-v5"), 2)


# --- EnvPool ---------------------------------------------------------------------------------------------------------
PONG = "--env-id Pong-v5 --num-steps 16"  # 64 steps an iteration


def test_pong_pretrain_freeze_kill_resume(tmp_path, capsys, seeds_given):
    source = train(tmp_path / "source", f"{PONG} --ssl none --total-timesteps 128")
    assert encoder_file(source / "encoder.safetensors")[1]["observation_shape"] == "[4, 84, 84]"
    flags = f"{PONG} --encoder-weights {source}/encoder.safetensors --freeze-layers 2 --ssl pisco --total-timesteps 512"
    seeds_given.clear()
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 5)
        folder = train_until_killed(tmp_path / "target", flags)
    capsys.readouterr()
    resume(folder)
    assert "fresh episodes" in capsys.readouterr().out
    assert not set(seeds_given[0]) & set(seeds_given[1])  # not the first episodes once more
    rows = finite_losses(folder)
    assert [int(row["global_step"]) for row in rows] == [*range(64, 513, 64)]
    assert all(row["losses/pisco"] for row in rows)
    for name, value in tensors(folder, "encoder").items():
        moved = not torch.equal(value, tensors(source, "encoder")[name])
        assert moved == name.startswith(("layers.2.", "layers.3.")), name
    for policy in ("greedy", "sampled"):
        (score,), (length,) = evaluation(folder)[policy].values()
        assert -21.0 <= score <= 21.0 and length > 500  # a whole game


def spied(env_id, num_envs, evaluation=False):
    """Environments that keep what EnvPool tells them, and the list of that."""
    envs, told = ImageEnvs(Args(env_id=env_id), num_envs, evaluation=evaluation), []
    real = envs.envs.step

    def step(actions):
        told.append(real(actions))
        return told[-1]

    envs.envs.step = step
    return envs, told


@pytest.mark.parametrize("env_id", ["Breakout-v5", "MsPacman-v5"])
def test_atari_statistics_are_those_of_whole_games(env_id):
    envs, told = spied(env_id, 4)
    rng, episodes, trained_on = np.random.default_rng(0), [], []
    envs.reset()
    for _ in range(700):
        _, rewards, _, _ = envs.step(rng.integers(envs.num_actions, size=4))
        episodes += envs.episodes
        trained_on.append(rewards)
    expected, score, length, lost_life = [], np.zeros(4), np.zeros(4, int), np.zeros(4, bool)
    for _, _, terminated, _, info in told:
        score += info["reward"]
        length += ~lost_life  # the step after a lost life only goes on with the game
        for i in np.flatnonzero(info["lives"] + ~terminated == 0):
            expected.append((int(i), score[i], length[i]))
            score[i] = length[i] = 0
        lost_life = terminated
    assert [(e["env"], e["return"], e["length"]) for e in episodes] == expected
    assert (
        len(expected) >= 3
        and max(score for _, score, _ in expected) >= {"Breakout-v5": 1.0, "MsPacman-v5": 100.0}[env_id]
    )
    assert np.abs(trained_on).max() == 1.0  # clipped for the learner
    lives = sum(int(step[2].sum()) for step in told)
    assert lives > 2 * len(expected)  # it is told of every lost life


def test_atari_evaluation_plays_whole_games_unclipped():
    envs, told = spied("MsPacman-v5", 4, evaluation=True)
    rng, rewards, games = np.random.default_rng(0), [], 0
    envs.reset()
    for _ in range(700):
        rewards.append(envs.step(rng.integers(envs.num_actions, size=4))[1])
        assert all(told[-1][4]["lives"][episode["env"]] == 0 for episode in envs.episodes)
        games += len(envs.episodes)
    assert np.max(rewards) >= 10.0 and games  # a dot


def test_breakout_goes_on_after_a_lost_life_in_evaluation_too():
    """Without FIRE there is no new ball: it must not depend on the policy that a game ends."""
    envs, games = ImageEnvs(Args(env_id="Breakout-v5"), 2, evaluation=True), 0
    rng = np.random.default_rng(0)
    envs.reset()
    for _ in range(600):
        envs.step(rng.choice([0, 2, 3], size=2))  # all but FIRE
        games += len(envs.episodes)
    assert games >= 2


def test_evaluation_plays_games_with_lost_lives_to_their_own_end(monkeypatch, capsys):
    """Each lost life takes a step that is none of the game's, so the loop is longer than the game."""
    import envpool

    make = envpool.make
    monkeypatch.setattr(envpool, "make", lambda env_id, **options: make(env_id, max_episode_steps=60, **options))
    args = Args(env_id="Breakout-v5")
    envs = ImageEnvs(args, 2, evaluation=True)
    stay = lambda obs: (torch.eye(envs.num_actions)[:1].expand(len(obs), -1), None)  # noqa: E731
    episodes = ppo_pisco.play_episodes(stay, envs, args, torch.device("cpu"), greedy=True)
    assert [episode["length"] for episode in episodes] == [60, 60] and "cut off" not in capsys.readouterr().out


def play_vizdoom():
    envs, told = spied("HealthGathering-v1", 2)
    rng, episodes = np.random.default_rng(0), []
    assert envs.reset().shape == (2, *envs.obs_shape) and envs.num_actions == 6
    for _ in range(200):
        obs, *_ = envs.step(rng.integers(6, size=2))
        episodes += envs.episodes
    assert obs.dtype == np.uint8
    first = next(e for e in episodes if e["env"] == 0)
    end = next(t for t, step in enumerate(told) if step[2][0] or step[3][0])
    assert first["length"] == end + 1
    assert first["return"] == pytest.approx(sum(float(step[1][0]) for step in told[: end + 1]))
    print("played")


def test_vizdoom_combines_its_buttons(tmp_path):
    """In a process of its own: VizDoom writes its settings where it runs, and an engine that dies ends its process,
    whose last words are then in the report."""
    line = [sys.executable, "-c", "import test_ppo_pisco_runs; test_ppo_pisco_runs.play_vizdoom()"]
    done = subprocess.run(line, cwd=tmp_path, env=IMPORTING, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "played" in done.stdout, done.stderr


def test_envpool_takes_the_seed():
    def images(seed):
        envs = ImageEnvs(Args(env_id="Breakout-v5", seed=seed), 2)
        return np.stack([envs.reset(), *(envs.step(np.full(2, action))[0] for action in (1, 2, 3, 2, 2, 0, 3))])

    np.testing.assert_array_equal(images(1), images(1))
    assert not np.array_equal(images(1), images(2))


def test_procgen_runs_where_its_package_is(tmp_path):
    import envpool

    try:
        envpool.make_spec("CoinrunEasy-v0")
    except ImportError:
        pytest.skip("Procgen needs Qt")
    folder = train(tmp_path, "--env-id CoinrunEasy-v0 --encoder nature --total-timesteps 64")
    assert len(finite_losses(folder)) == 2
