"""Whole runs of ppo_pisco.py: what training changes and leaves alone, run folders, resume, environments."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import (
    ROOT, SMALL_GRID, TINY, Killed, assert_same_end, command, encoder_file, evaluation, kill_at, metrics, resume, train,
    train_until_killed,
)  # fmt: skip
from PIL import Image
from ppo_pisco import JUMP_GRID, Args, Encoder, ImageEnvs, save_encoder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_pisco

pytestmark = pytest.mark.usefixtures("small_grid")


def tensors(folder, name="model"):
    return safetensors.torch.load_file(folder / f"{name}.safetensors")


def finite_losses(folder):
    """The metrics of a run whose losses are all finite; what has no value yet is empty."""
    rows = metrics(folder)
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values() if value != "")
    return rows


# --- What training changes -------------------------------------------------------------------------------------------
@pytest.fixture
def initial(monkeypatch):
    """The weights that a run starts from, by name, once it has started."""
    weights, make_agent = {}, ppo_pisco.make_agent

    def spy(*args):
        agent, text = make_agent(*args)
        weights.update({name: value.clone() for name, value in agent.state_dict().items()})
        return agent, text

    monkeypatch.setattr(ppo_pisco, "make_agent", spy)
    return weights


@pytest.mark.parametrize("count, flags", [(0, ""), (1, ""), (2, ""), ("all", ""), (2, "--bf16")])
def test_frozen_layers_stay_and_the_others_move(tmp_path, initial, count, flags):
    folder = train(tmp_path, f"--freeze-layers {count} --freeze-random {flags}")
    frozen = 4 if count == "all" else count
    for name, value in tensors(folder).items():
        is_frozen = name.startswith(tuple(f"encoder.layers.{i}." for i in range(frozen)))
        assert torch.equal(value, initial[name]) == is_frozen, name
    # Two tensors in each of four layers, two in the actor, two in the critic, four in the projector.
    optimizer = torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]
    assert len(optimizer["param_groups"][0]["params"]) == len(optimizer["state"]) == 16 - 2 * frozen
    assert all(float(row["losses/grad_norm_frozen"]) == 0.0 for row in metrics(folder))
    assert all(float(row["losses/grad_norm_trained"]) > 0.0 for row in metrics(folder))


def test_printed_table_says_what_is_frozen(tmp_path, capsys):
    train(tmp_path, "--freeze-layers 2 --freeze-random")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith(("frozen", "trained"))]
    # 8 * 8 * 32 + 32; 4 * 4 * 32 * 64 + 64; 3 * 3 * 64 * 64 + 64; 60 -> 14 -> 6 -> 4 pixels: 4 * 4 * 64 * 32 + 32
    assert [(row[0], row[-2], row[-1]) for row in rows] == [
        ("1", "2,080", "frozen"), ("2", "32,832", "frozen"), ("3", "36,928", "trained"), ("4", "32,800", "trained"),
    ]  # fmt: skip


@pytest.mark.parametrize("tau, weight", [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0)])
def test_curl_key_encoder_follows_the_encoder(tmp_path, initial, tau, weight):
    # One update: key = initial + tau (encoder - initial).
    folder = train(tmp_path, f"--ssl curl --curl-tau {tau} --total-timesteps 32 --num-minibatches 1 --update-epochs 1")
    final = tensors(folder)
    for name in [name for name in final if name.startswith("key_encoder.")]:
        start, end = initial[name], final[name.removeprefix("key_")]
        torch.testing.assert_close(final[name], start + weight * (end - start))
        assert not torch.equal(start, end)


@pytest.mark.parametrize("ssl", ["pisco", "simsiam", "curl", "consistency", "none"])
@pytest.mark.parametrize("encoder", ["nature", "impala"])
def test_every_loss_trains_every_encoder(tmp_path, ssl, encoder):
    rows = finite_losses(train(tmp_path, f"--ssl {ssl} --encoder {encoder} --total-timesteps 64"))
    assert len(rows) == 2
    for row in rows:
        filled = {kind for kind in ("pisco", "simsiam", "curl", "consistency") if row[f"losses/{kind}"]}
        assert filled == {ssl} - {"none"}
        assert bool(row["losses/view_agreement"]) == (ssl != "none")
        assert all(row[f"losses/{name}"] for name in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac"))


def test_augmentation_is_used(tmp_path):
    models = [tensors(train(tmp_path, f"--augmentation {kind} --total-timesteps 32")) for kind in ("shift", "noise")]
    assert not torch.equal(models[0]["projector.0.weight"], models[1]["projector.0.weight"])
    one = train(tmp_path, "--augmentation shift --shift-pixels 0 --total-timesteps 32")
    assert metrics(one)[0]["losses/view_agreement"] == "1.0"  # two equal views


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
    names += " pisco view_agreement dead_features grad_norm_trained grad_norm_frozen"
    wanted |= {f"losses/{name}" for name in names.split()}
    assert wanted <= set(events.Tags()["scalars"])
    for row in metrics(finished):
        for key, value in row.items():
            if key != "global_step" and value:
                (event,) = [event for event in events.Scalars(key) if event.step == int(row["global_step"])]
                assert event.value == pytest.approx(float(value), rel=1e-6), key


def test_run_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "args.json", "metrics.csv", "checkpoint.pt", "checkpoint.previous.pt", "model.safetensors",
        "encoder.safetensors", "evaluation.json", "heatmap.png",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(".tmp")]
    assert json.loads((finished / "args.json").read_text())["num_envs"] == 4
    assert finished.name.startswith("Jump-v0__ppo_pisco__1__")
    assert Image.open(finished / "heatmap.png").format == "PNG"
    both = [torch.load(finished / f"checkpoint{name}.pt", weights_only=True)["iteration"] for name in (".previous", "")]
    assert both == [3, 4]


def test_encoder_file_loads_into_another_run(tmp_path, finished):
    path = finished / "encoder.safetensors"
    weights, about = encoder_file(path)
    assert about["architecture"] == "nature" and about["observation_shape"] == "[1, 60, 60]"
    assert about["environment"] == "Jump-v0" and about["steps"] == "128" and about["seed"] == "1"
    assert "pisco" in about["objective"] and about["feature_dim"] == "32"
    assert json.loads(about["versions"])["torch"] == torch.__version__
    other = train(tmp_path, f"--encoder-weights {path} --freeze-layers all --total-timesteps 32 --seed 5")
    assert tensors(other, "encoder").keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(tensors(other, "encoder")[name], value)
        assert torch.equal(tensors(finished)[f"encoder.{name}"], value)


def test_rollouts_of_one_step(tmp_path):
    """Two copies in step with each other: in some iterations both only reset, and there is nothing to train on."""
    flags = "--num-envs 2 --num-steps 1 --num-minibatches 1 --total-timesteps 64 --jump-tasks 20:10 --jump-prior 1e-6"
    rows = finite_losses(train(tmp_path, flags))
    assert len(rows) == 32 and rows[-1]["charts/episodic_length"] == "16.0"


def test_weights_and_biases_is_told_of_the_run(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs)))
    train(tmp_path, "--total-timesteps 32")
    assert not calls
    folder = train(tmp_path, "--total-timesteps 32 --track --wandb-project-name mine --exp-name tracked")
    assert calls[0]["project"] == "mine" and calls[0]["name"] == folder.name and calls[0]["config"]["num_envs"] == 4


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
def test_evaluation_counts_every_task_once(tmp_path, monkeypatch, floors):
    monkeypatch.setattr(ppo_pisco, "JUMP_GRID", JUMP_GRID)
    args = Args(jump_tasks="25:5,25:15,35:15,45:25")
    found = ppo_pisco.evaluate(Scripted(floors), args, torch.device("cpu"), 7, tmp_path)
    trained, result = [(25, 5), (25, 15), (35, 15), (45, 25)], evaluation(tmp_path)
    for policy in ("greedy", "sampled"):  # the script is as good as certain of its action
        assert result[policy]["solved"] == {f"{x}:{y}": y in floors for x, y in {*trained, *JUMP_GRID}}
        assert result[policy]["trained_tasks"] == [f"{x}:{y}" for x, y in trained]
        assert found[f"eval/{policy}_success"] == pytest.approx(sum(y in floors for _, y in trained) / 4)
        assert found[f"eval/{policy}_grid_success"] == pytest.approx(sum(y in floors for _, y in JUMP_GRID) / 286)
        # Solved: 56 steps and the bonus 1. Not solved: obstacle - 5 steps of +1 and the collision's -1.
        returns = [57.0 if y in floors else x - 6.0 for x, y in trained]
        assert result[policy]["return"] == returns and found[f"eval/{policy}_return"] == pytest.approx(np.mean(returns))
        assert result[policy]["length"] == [56 if y in floors else x - 4 for x, y in trained]
    assert result["global_step"] == 7 and Image.open(tmp_path / "heatmap.png").format == "PNG"


def test_evaluation_of_a_run_covers_the_grid_and_leaves_training_alone(tmp_path, monkeypatch, finished):
    monkeypatch.setattr(ppo_pisco, "JUMP_GRID", JUMP_GRID)
    folder = train(tmp_path, "--eval-interval 64 --capture-video")
    assert len(evaluation(folder)["greedy"]["solved"]) == 286 + 1  # two of the three tasks are in the grid
    assert [bool(row["eval/greedy_success"]) for row in metrics(folder)] == [False, True, False, True]
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    for step in (64, 128):
        video = Image.open(folder / f"evaluation_{step}.gif")
        # Nine copies in three columns, each 60 pixels with a border of one, twice as large; no episode ends before
        # step 16.
        assert video.format == "GIF" and video.size == (3 * 62 * 2, 3 * 62 * 2) and video.n_frames >= 16


# --- Resume ----------------------------------------------------------------------------------------------------------
def halve(fd):
    """Leaves half of the file that is being written, as a kill in the middle of it would."""
    os.ftruncate(fd, os.fstat(fd).st_size // 2)


MOMENTS = [
    ("before the first checkpoint", ppo_pisco, "collect_rollout", 1),
    ("in the first update", ppo_pisco, "update", 1),
    ("in the third iteration", ppo_pisco, "update", 3),
    ("before the metrics of an iteration", ppo_pisco.RunFolder, "log", 2),
    ("before a checkpoint", ppo_pisco.RunFolder, "save_checkpoint", 3),
    ("in the evaluation", ppo_pisco, "evaluate", 1),
    ("before the encoder is written", ppo_pisco, "save_encoder", 1),
    *((f"renaming file {n}", os, "replace", n) for n in range(2, 11)),
    *((f"half of file {n} written", os, "fsync", n) for n in range(2, 11)),
    *((f"linking the previous checkpoint {n}", os, "link", n) for n in range(1, 4)),
]


@pytest.mark.parametrize("owner, name, nth", [moment[1:] for moment in MOMENTS], ids=[moment[0] for moment in MOMENTS])
def test_resume_after_a_kill_equals_an_uninterrupted_run(tmp_path, finished, owner, name, nth):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, owner, name, nth, first=halve if name == "fsync" else lambda *args: None)
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
    "--ssl curl",
    "--ssl simsiam --augmentation noise",
    "--ssl none --target-kl 1e-5",
    "--freeze-layers 2 --freeze-random --checkpoint-interval 2",
    "--encoder impala",
    "--bf16 --ssl curl",
]


@pytest.mark.parametrize("flags", OTHERS)
def test_resume_of_other_runs(tmp_path, flags):
    whole = train(tmp_path / "whole", flags)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 4)
        folder = train_until_killed(tmp_path / "killed", flags)
    assert_same_end(resume(folder), whole)


def killed_after_two(runs_dir):
    """A run killed in its third iteration: checkpoints of iterations 2 and 1."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 3)
        return train_until_killed(runs_dir)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_resume_with_a_damaged_checkpoint_takes_the_previous_one(tmp_path, finished, damage):
    folder = killed_after_two(tmp_path)
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    path.unlink()  # the previous one may be the same file under another name
    path.write_bytes({"cut": whole[:-2000], "empty": b"", "noise": whole[:1000] + os.urandom(5000)}[damage])
    assert_same_end(resume(folder), finished)


def test_resume_logs_no_step_twice(tmp_path):
    with pytest.MonkeyPatch.context() as patch:  # the third iteration is logged, its checkpoint is not written
        kill_at(patch, ppo_pisco.RunFolder, "save_checkpoint", 3)
        folder = train_until_killed(tmp_path)
    assert len(metrics(folder)) == 3
    events = EventAccumulator(str(resume(folder))).Reload()
    assert [event.step for event in events.Scalars("losses/pisco")] == [32, 64, 96, 128]
    assert [row["global_step"] for row in metrics(folder)] == ["32", "64", "96", "128"]


def test_resume_drops_a_row_cut_short(tmp_path, finished):
    folder = killed_after_two(tmp_path)
    path = folder / "metrics.csv"
    path.write_text(path.read_text() + "96,351.2,0.00")
    assert_same_end(resume(folder), finished)
    path.write_text(path.read_text()[:-40])  # the last row of a finished run: it can't be told again
    resume(folder)
    assert metrics(folder) == metrics(finished)[:-1]


def test_resume_takes_repeated_arguments(tmp_path, finished):
    folder = killed_after_two(tmp_path)
    assert ppo_pisco.main(command(tmp_path, f"--resume {folder}")) == 0
    assert_same_end(folder, finished)


# --- Other processes: kill -9, Ctrl-C, the command line --------------------------------------------------------------
LONG = "--total-timesteps 1600 --exp-name long"  # 50 iterations, some seconds


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_pisco, "JUMP_GRID", SMALL_GRID)
        return train(tmp_path_factory.mktemp("long"), LONG)


def program(*arguments, **kwargs):
    """Starts ppo_pisco.py as a program of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, ROOT / "ppo_pisco.py", *arguments], **(pipes | kwargs))


@pytest.mark.parametrize("number, rows", [(signal.SIGKILL, 1), (signal.SIGKILL, 12), (signal.SIGINT, 5)])
def test_resume_after_a_signal(tmp_path, long_run, number, rows):
    process = program(*command(tmp_path, LONG))
    deadline = time.monotonic() + 120
    while sum(path.read_text().count("\n") for path in tmp_path.glob("*/metrics.csv")) <= rows:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    (folder,) = tmp_path.glob("*")
    assert len(metrics(folder)) < 50  # it was still at work
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in err and f"--resume {folder}" in err.splitlines()[-1]
    else:
        assert process.returncode == -signal.SIGKILL
    assert_same_end(resume(folder), long_run)


def interrupting(monkeypatch, owner, name, nth):
    """Makes the nth call of owner.name be interrupted as by Ctrl-C; says in the end whether it was cut short."""
    real, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append("cut short")
        if len(calls) == nth:
            signal.raise_signal(signal.SIGINT)
        calls[-1] = "whole"
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    return lambda: calls[nth - 1]


@pytest.mark.parametrize(
    "owner, name, nth", [(ppo_pisco.SummaryWriter, "add_scalar", 30), (torch, "save", 2), (os, "fsync", 4)]
)
def test_ctrl_c_waits_for_the_run_folder(tmp_path, finished, capsys, owner, name, nth):
    """Cut short, TensorBoard's writer can wait for ever and PyTorch's raises an error of its own."""
    with pytest.MonkeyPatch.context() as patch:
        fate = interrupting(patch, owner, name, nth)
        assert ppo_pisco.main(command(tmp_path)) == 130
    assert fate() == "whole"
    (folder,) = tmp_path.glob("*")
    assert f"--resume {folder}" in capsys.readouterr().err.splitlines()[-1]
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
    encoder = Encoder("nature", (1, 60, 60), 32)
    save_encoder(
        tmp_path / "encoders" / "jump-v0__nature__rl.safetensors", encoder, Args(feature_dim=32), (1, 60, 60), 0
    )
    flags = [*TINY.replace("--encoder-weights none", "--freeze-layers all").split(), "--total-timesteps", "32"]
    command_line = [sys.executable, "-I", "ppo_pisco.py", *flags]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    for name, value in encoder.state_dict().items():
        assert torch.equal(tensors(folder, "encoder")[name], value)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        ppo_pisco.main(["--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    for flag in ("--freeze-layers", "--ssl", "--jump-prior", "--total-timesteps"):
        assert flag in out


# --- Gymnasium -------------------------------------------------------------------------------------------------------
LAYOUTS = {
    "TinyImage-v0": (3, 36, 40),
    "TinyImageFlat-v0": (1, 36, 40),
    "TinyImageGrey-v0": (1, 36, 40),
    "TinyImageFirst-v0": (3, 36, 40),
    "TinyImageStack-v0": (12, 36, 40),
}


@pytest.mark.parametrize("env_id, shape", LAYOUTS.items())
def test_image_layouts(env_id, shape):
    envs = ImageEnvs(Args(env_id=env_id), 2, seed=1)
    obs = envs.reset()
    assert envs.obs_shape == shape and obs.shape == (2, *shape) and obs.dtype == np.uint8
    if env_id == "TinyImage-v0":  # the last channel has become the third
        assert (obs[:, :2] == 0).all() and (obs[:, 2] == 9).all()


def test_gymnasium_episodes():
    envs = ImageEnvs(Args(env_id="TinyImage-v0"), 2, seed=1)
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
    envs = ImageEnvs(args, 2, seed=1)
    agent, _ = ppo_pisco.make_agent(args, envs, torch.device("cpu"))
    rollout = ppo_pisco.Rollout.empty(12, 2, envs.obs_shape, torch.device("cpu"))
    _, next_value, _ = ppo_pisco.collect_rollout(agent, envs, rollout, torch.from_numpy(envs.reset()), args)
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
    assert Image.open(folder / "evaluation_128.gif").size == (42 * 2, 38 * 2)  # 40 x 36 with a border, twice as large
    assert not (folder / "heatmap.png").exists()


# --- EnvPool ---------------------------------------------------------------------------------------------------------
PONG = "--env-id Pong-v5 --num-steps 16"  # 64 steps an iteration


def test_pong_pretrain_freeze_kill_resume(tmp_path, capsys, monkeypatch):
    seeds, make_envpool = [], ppo_pisco.make_envpool

    def spy(args, num_envs, seed, training):
        if training and num_envs == 4:
            seeds.append(seed)
        return make_envpool(args, num_envs, seed, training)

    source = train(tmp_path / "source", f"{PONG} --ssl none --total-timesteps 128")
    assert encoder_file(source / "encoder.safetensors")[1]["observation_shape"] == "[4, 84, 84]"
    flags = (
        f"{PONG} --encoder-weights {source}/encoder.safetensors --freeze-layers 2 --ssl pisco --total-timesteps 1024"
    )
    monkeypatch.setattr(ppo_pisco, "make_envpool", spy)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 10)
        folder = train_until_killed(tmp_path / "target", flags)
    capsys.readouterr()
    resume(folder)
    assert "fresh episodes" in capsys.readouterr().out
    assert seeds[0] != seeds[1]  # not the first episodes once more
    rows = finite_losses(folder)
    assert [int(row["global_step"]) for row in rows] == [*range(64, 1025, 64)]
    assert all(row["losses/pisco"] for row in rows)
    for name, value in tensors(folder, "encoder").items():
        moved = not torch.equal(value, tensors(source, "encoder")[name])
        assert moved == name.startswith(("layers.2.", "layers.3.")), name
    for policy in ("greedy", "sampled"):
        (score,), (length,) = evaluation(folder)[policy].values()
        assert -21.0 <= score <= 21.0 and length > 500  # a whole game


def spied(env_id, num_envs, training=True):
    """Environments that keep what EnvPool tells them, and the list of that."""
    envs, told = ImageEnvs(Args(env_id=env_id), num_envs, seed=1, training=training), []
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
    for _, _, terminated, truncated, info in told:
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
    envs, told = spied("MsPacman-v5", 4, training=False)
    rng, rewards, games = np.random.default_rng(0), [], 0
    envs.reset()
    for _ in range(700):
        rewards.append(envs.step(rng.integers(envs.num_actions, size=4))[1])
        assert all(told[-1][4]["lives"][episode["env"]] == 0 for episode in envs.episodes)
        games += len(envs.episodes)
    assert np.max(rewards) >= 10.0 and games  # a dot


def test_breakout_goes_on_after_a_lost_life_in_evaluation_too():
    """Without FIRE there is no new ball: it must not depend on the policy that a game ends."""
    envs, games = ImageEnvs(Args(env_id="Breakout-v5"), 2, seed=1, training=False), 0
    rng = np.random.default_rng(0)
    envs.reset()
    for _ in range(600):
        envs.step(rng.choice([0, 2, 3], size=2))  # all but FIRE
        games += len(envs.episodes)
    assert games >= 2


def test_environment_of_the_users_own_module(tmp_path, monkeypatch):
    module = 'import gymnasium\ngymnasium.register("Own-v0", entry_point="conftest:TinyImage")\n'
    (tmp_path / "own_module.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(gym.registry, "Own-v0", raising=False)
    folder = train(tmp_path / "runs", "--env-id own_module:Own-v0 --total-timesteps 64")
    assert folder.name.startswith("own_module-Own-v0__") and len(finite_losses(folder)) == 2


def test_gymnasium_needs_no_envpool(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    assert ppo_pisco.env_source("TinyImage-v0") == "gymnasium"
    with pytest.raises(ppo_pisco.UsageError, match="unknown environment"):
        ppo_pisco.env_source("Pong-v5")


def test_pictures_end_where_the_gif_does(monkeypatch, small_grid):
    monkeypatch.setattr(ppo_pisco, "GIF_FRAMES", 3)
    args, frames = Args(encoder_weights="none", feature_dim=16), []
    envs = ImageEnvs(args, 2, 1, training=False)
    agent = ppo_pisco.Agent(args, envs.obs_shape, envs.num_actions)
    episodes = ppo_pisco.play_episodes(agent, envs, torch.device("cpu"), True, 0, frames)
    assert len(frames) == 3 and min(episode["length"] for episode in episodes) > 3


def test_pictures_of_an_ended_episode_stand_still(small_grid):
    args, frames = Args(encoder_weights="none", feature_dim=16, jump_tasks="14:0,40:0"), []
    envs = ImageEnvs(args, 2, 1, training=False)
    agent = ppo_pisco.Agent(args, envs.obs_shape, envs.num_actions)  # never jumps, and meets both obstacles
    episodes = ppo_pisco.play_episodes(agent, envs, torch.device("cpu"), True, 0, frames)
    assert [episode["length"] for episode in episodes] == [14 - 5 + 1, 40 - 5 + 1]
    assert len(frames) == 36  # the first observation and what each of the 35 further ones but the last led to
    first, second = np.stack(frames).swapaxes(0, 1)  # (36, 1, 60, 60) each
    assert all((picture == first[10]).all() for picture in first[10:]) and not (first[9] == first[10]).all()
    assert all(not (one == other).all() for one, other in zip(second, second[1:]))


def test_tensorboard_has_every_step_once_after_a_kill_before_the_first_checkpoint(tmp_path, monkeypatch, finished):
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 3)
        folder = train_until_killed(tmp_path, "--checkpoint-interval 10")
    resume(folder)
    events = EventAccumulator(str(folder)).Reload().Scalars("losses/entropy")
    assert [event.step for event in events] == [32, 64, 96, 128]


def test_vizdoom_combines_its_buttons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # VizDoom writes its settings where it runs
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


def test_envpool_takes_the_seed():
    def images(seed):
        envs = ImageEnvs(Args(env_id="Breakout-v5"), 4, seed)
        return np.stack([envs.reset(), *(envs.step(np.full(4, action))[0] for action in (1, 2, 3, 2, 2, 0, 3))])

    np.testing.assert_array_equal(images(1), images(1))
    assert not np.array_equal(images(1), images(2))


def test_procgen_runs_or_the_missing_package_is_named(tmp_path, capsys):
    import envpool

    try:
        envpool.make_spec("CoinrunEasy-v0")
        installed = True
    except ImportError:
        installed = False
    code = ppo_pisco.main(command(tmp_path, "--env-id CoinrunEasy-v0"))
    if installed:
        assert code == 0
        (folder,) = tmp_path.iterdir()
        assert len(finite_losses(folder)) == 4
    else:
        assert code == 2
        assert "Qt" in capsys.readouterr().err
