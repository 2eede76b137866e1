"""Whole runs of drqv2_pisco.py: environment, what training changes and leaves alone, run folders, resume."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, encoder_file, evaluation, kill_at
from drqv2_common import assert_same_end, command, numbers, resume, shorten_episodes, train, train_until_killed
from drqv2_pisco import DMCPixels
from PIL import Image

import drqv2_pisco


@pytest.fixture(autouse=True)
def short(monkeypatch):
    shorten_episodes(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run. Tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_episodes(patch)
        return train(tmp_path_factory.mktemp("finished"))


def tensors(folder, name="model"):
    return safetensors.torch.load_file(folder / f"{name}.safetensors")


# --- Environment -----------------------------------------------------------------------------------------------------
def test_environment_is_the_suites(monkeypatch):
    """The rewards are those of the suite's own environment, summed over the repeats; its time limit truncates."""
    from dm_control import suite

    env = DMCPixels("cartpole-swingup", 32, 3, "fast")
    frame, _ = env.reset(seed=5)
    assert frame.shape == (3, 32, 32) and frame.dtype == np.uint8 and env.action_space.shape == (1,)
    reference = suite.load("cartpole", "swingup", task_kwargs={"random": 5})
    reference.reset()
    rng = np.random.default_rng(0)
    for step in range(14):  # 40 frames: thirteen steps of three and one of a single frame
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        frame, reward, terminated, truncated, _ = env.step(action)
        wanted = sum(reference.step(action).reward for _ in range(3 if step < 13 else 1))
        assert reward == pytest.approx(wanted, abs=1e-12) and not terminated
        assert truncated == (step == 13)
    assert env.max_steps == 14
    env.close()


def test_actions_are_scaled_to_the_tasks_bounds(monkeypatch):
    env = DMCPixels("cartpole-balance", 24, 1, "fast")
    env.low, env.high, taken = np.array([-2.0]), np.array([6.0]), []
    monkeypatch.setattr(env.env, "step", lambda action: taken.append(action.item()) or type("Step", (), {
        "reward": None, "discount": 1.0, "last": lambda self: False})())  # fmt: skip
    for action in (-1.0, 0.0, 1.0):
        env.step(np.array([action], np.float32))
    assert taken == [-2.0, 2.0, 6.0]
    env.close()


@pytest.mark.parametrize("discount, terminated", [(0.0, True), (1.0, False)])
def test_a_true_end_is_told_from_the_time_limit(monkeypatch, discount, terminated):
    env = DMCPixels("cartpole-balance", 24, 2, "fast")
    last = type("Step", (), {"reward": 1.5, "discount": discount, "last": lambda self: True})()
    monkeypatch.setattr(env.env, "step", lambda action: last)
    _, reward, *ends, _ = env.step(np.zeros(1, np.float32))
    assert reward == 1.5 and ends == [terminated, not terminated]  # the second repeat is not played
    env.close()


def test_a_simulation_that_diverges_ends_its_episode():
    env = DMCPixels("cartpole-balance", 24, 2, "fast")
    env.reset(seed=0)
    env.env.physics.data.qvel[:] = 1e30
    obs, reward, *ends, _ = env.step(np.zeros(1, np.float32))
    assert reward == 0.0 and ends == [True, False]
    assert env.observation_space.contains(obs) and not obs.any()
    fresh, _ = env.reset(seed=1)  # and the next one is a good one
    assert fresh.any() and not env.step(np.zeros(1, np.float32))[2]
    env.close()


@pytest.mark.parametrize("env_id", ["cartpole-swingup", "walker-walk"])
def test_render_quality_changes_the_picture_alone(env_id):
    both = []
    for quality in ("standard", "fast"):
        env = DMCPixels(env_id, 48, 2, quality)
        frames, rewards, states, rng = [env.reset(seed=3)[0]], [], [], np.random.default_rng(1)
        for _ in range(6):
            frame, reward, *_ = env.step(rng.uniform(-1, 1, env.action_space.shape))
            frames, rewards = [*frames, frame], [*rewards, reward]
            states.append(env.env.physics.get_state())
        both.append((np.stack(frames), rewards, np.stack(states), env.get_state()))
        env.close()
    (frames, rewards, states, rng_state), (fast_frames, *fast) = both
    assert fast[0] == rewards and np.array_equal(fast[1], states) and fast[2] == rng_state
    difference = np.abs(frames.astype(int) - fast_frames)
    assert 0 < difference.mean() < 12  # the same scene: no shadows, harder edges
    assert len({frame.tobytes() for frame in fast_frames}) == 7  # it moves


def test_standard_frames_are_the_suites_own_pictures():
    from dm_control import suite

    env = DMCPixels("cartpole-swingup", 40, 2)
    reference = suite.load("cartpole", "swingup", task_kwargs={"random": 2})
    reference.reset()
    frame, _ = env.reset(seed=2)
    wanted = reference.physics.render(40, 40, camera_id=0).transpose(2, 0, 1)
    assert np.abs(frame.astype(int) - wanted).max() <= 1
    env.close()


def test_environment_state_gives_the_same_next_episode():
    env = DMCPixels("cartpole-balance", 24, 2, "fast")
    env.reset(seed=1)
    state = json.loads(json.dumps(env.get_state()))
    frames = [env.reset()[0] for _ in range(2)]
    env.reset(seed=7)
    env.set_state(state)
    assert all(np.array_equal(env.reset()[0], frame) for frame in frames)
    assert not np.array_equal(*frames)
    env.close()


# --- What training changes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count, flags", [(0, ""), (2, ""), ("all", ""), (2, "--bf16")])
def test_frozen_layers_stay_and_the_others_move(tmp_path, monkeypatch, count, flags):
    initial, make_agent = {}, drqv2_pisco.make_agent

    def spy(*args):
        agent, text = make_agent(*args)
        initial.update({name: value.clone() for name, value in agent.state_dict().items()})
        return agent, text

    monkeypatch.setattr(drqv2_pisco, "make_agent", spy)
    folder = train(tmp_path, f"--freeze-layers {count} --freeze-random --total-frames 160 {flags}")
    frozen = 4 if count == "all" else count
    for name, value in tensors(folder).items():
        is_frozen = name.startswith(tuple(f"encoder.layers.{i}." for i in range(frozen)))
        assert torch.equal(value, initial[name]) == is_frozen, name
    rows = [row for row in numbers(folder) if row["losses/critic_loss"]]
    assert rows and all(float(row["losses/grad_norm_frozen"]) == 0.0 for row in rows)
    assert all((float(row["losses/grad_norm_encoder"]) > 0.0) == (frozen < 4) for row in rows)


@pytest.mark.parametrize("ssl", ["simsiam", "curl", "consistency", "none"])
def test_every_loss_trains(tmp_path, ssl):
    rows = numbers(train(tmp_path, f"--ssl {ssl} --total-frames 120 --augmentation noise --pisco-std schedule"))
    assert [int(row["frame"]) for row in rows] == [40, 80, 100, 120]
    # Steps 20 to 39 and 40 to 59, the second and the third episode: updates at every fourth.
    for row in (rows[1], rows[3]):
        assert all(math.isfinite(float(value)) for value in row.values() if value != "")
        assert {kind for kind in ("pisco", "simsiam", "curl", "consistency") if row[f"losses/{kind}"]} == {ssl} - {
            "none"
        }
        assert bool(row["losses/view_distance"]) == (ssl != "none")


def test_updates_are_counted_in_steps(tmp_path, monkeypatch):
    """120 steps, every fourth from step 20 on: 25 updates, with the schedule's standard deviation of their step."""
    calls, real = [], drqv2_pisco.update

    def spy(agent, optimizers, batch, std, *args):
        calls.append(std)
        assert batch[0].shape == (8, 9, 24, 24)
        return real(agent, optimizers, batch, std, *args)

    monkeypatch.setattr(drqv2_pisco, "update", spy)
    train(tmp_path, "--stddev-steps 50")
    assert calls == pytest.approx([max(1.0 - 0.9 * step / 50, 0.1) for step in range(20, 120, 4)])


# --- The run folder --------------------------------------------------------------------------------------------------
def test_same_seed_same_run(tmp_path, finished):
    assert_same_end(train(tmp_path), finished)


def test_other_seed_other_run(tmp_path, finished):
    other = train(tmp_path, "--seed 2 --total-frames 120")
    assert numbers(other)[0]["charts/episodic_return"] != numbers(finished)[0]["charts/episodic_return"]


def test_run_folder(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "args.json", "metrics.csv", "checkpoint.pt", "checkpoint.previous.pt", "model.safetensors",
        "encoder.safetensors", "evaluation.json",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(".tmp")] and "replay.bin" not in names
    assert finished.name.startswith("cartpole-balance__drqv2_pisco__1__")
    rows = numbers(finished)
    assert list(rows[0])[:2] == ["frame", "episode_return"]
    assert [int(row["frame"]) for row in rows if row["charts/episodic_return"]] == [40, 80, 120, 160, 200, 240]
    assert [int(row["frame"]) for row in rows if row["episode_return"]] == [100, 200, 240]
    assert all(0 <= float(row["charts/episodic_return"]) <= 40 for row in rows if row["charts/episodic_return"])
    last = evaluation(finished)
    assert last["frame"] == 240 and last["length"] == [20]
    assert float(rows[-1]["episode_return"]) == last["return"][0] == last["metrics"]["episode_return"]


@pytest.mark.parametrize("image_size", [24, 26])
def test_encoder_file_loads_into_another_run(tmp_path, finished, image_size):
    """Also into one with images of another size: convolutions take any."""
    weights, about = encoder_file(finished / "encoder.safetensors")
    assert about["architecture"] == "drqv2" and about["observation_shape"] == "[9, 24, 24]"
    assert about["environment"] == "cartpole-balance" and about["steps"] == "240" and about["seed"] == "1"
    assert "pisco" in about["objective"]
    flags = f"--encoder-weights {finished}/encoder.safetensors --freeze-layers all --total-frames 80 --seed 5"
    other = tensors(train(tmp_path, f"{flags} --image-size {image_size}"), "encoder")
    assert other.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(other[name], value) and torch.equal(tensors(finished)[f"encoder.{name}"], value)


def test_evaluation_leaves_training_alone(tmp_path, finished):
    folder = train(tmp_path, "--eval-interval 40 --eval-episodes 2 --capture-video")
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert len(set(evaluation(folder)["return"])) == 2  # two different episodes
    video = Image.open(folder / "evaluation_80.gif")
    assert video.format == "GIF" and video.size == (52, 52) and 1 < video.n_frames <= 20  # a rim of 1, twice as large


def stack_of(rows, i, first):
    """The observation whose newest frame is in row i of an episode that begins in row `first`."""
    return np.concatenate([rows[max(i - k, first)][0] for k in (2, 1, 0)])


def test_what_is_played_is_what_is_stored(tmp_path, monkeypatch):
    """Actions come from the stacks that the replay will have, with the schedule's noise; only a true end is stored as
    one."""
    rows, acts, steps = [], [], []
    add, act, step = drqv2_pisco.Replay.add, drqv2_pisco.act, DMCPixels.step

    def spy_add(self, frame, action=0.0, reward=0.0, terminated=False):
        rows.append((frame.copy(), action, reward, terminated))
        add(self, frame, action, reward, terminated)

    def spy_act(agent, obs, device, std=None):
        acts.append((obs, std)) if std is not None else None  # an evaluation gives none
        return act(agent, obs, device, std or 0.0)

    def end_the_second_episode_early(self, action):
        steps.append(action)
        frame, reward, _, truncated, info = step(self, action)
        return frame, reward, len(steps) == 27, truncated, info

    monkeypatch.setattr(drqv2_pisco.Replay, "add", spy_add)
    monkeypatch.setattr(drqv2_pisco, "act", spy_act)
    monkeypatch.setattr(DMCPixels, "step", end_the_second_episode_early)
    train(tmp_path, "--total-frames 160 --stddev-steps 50 --eval-interval 0")
    # Episodes of 20 and 7 steps, then 20 and 20 and 13: each has a row more than steps.
    firsts = [0, 21, 29, 50, 71]
    assert len(rows) == 80 + 5 and [i for i, row in enumerate(rows) if row[3]] == [28]
    played = [(i, first) for first, end in zip(firsts, [*firsts[1:], 85]) for i in range(first, end - 1)]
    assert len(played) == 80 and len(acts) == 70  # ten steps explore
    for t, ((i, first), (obs, std)) in enumerate(zip(played[10:], acts), start=10):
        np.testing.assert_array_equal(obs, stack_of(rows, i, first))
        assert std == pytest.approx(drqv2_pisco.stddev_schedule(t, 1.0, 0.1, 50))
    for (i, _), action in zip(played, steps):
        np.testing.assert_array_equal(rows[i + 1][1], action)


def test_printed_memory_and_table(tmp_path, capsys):
    train(tmp_path, "--total-frames 80")
    text = capsys.readouterr().out
    assert "replay buffer: " in text and "9,248  trained" in text


# --- Resume ----------------------------------------------------------------------------------------------------------
MOMENTS = [
    ("before the first checkpoint", drqv2_pisco, "update", 2),
    ("after the first checkpoint", drqv2_pisco, "update", 10),
    ("after the second checkpoint", drqv2_pisco, "update", 24),
    ("before the metrics are written", drqv2_pisco.RunFolder, "log", 5),
    ("before the second checkpoint", drqv2_pisco.RunFolder, "save_checkpoint", 2),
    ("in the evaluation", drqv2_pisco, "evaluate", 2),
    ("before the encoder is written", drqv2_pisco, "save_encoder", 1),
    ("while the checkpoint is renamed", os, "replace", 3),
]


@pytest.mark.parametrize("moment, owner, name, nth", MOMENTS)
def test_killed_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch, finished, moment, owner, name, nth):
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, nth)
        folder = train_until_killed(tmp_path)
    assert_same_end(resume(folder), finished)


@pytest.fixture(scope="module")
def gone_round(tmp_path_factory):
    """A finished run of 500 steps whose replay buffer has 378 rows, with a checkpoint after every third episode."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_episodes(patch)
        return train(tmp_path_factory.mktemp("whole"), GONE_ROUND)


GONE_ROUND = "--total-frames 1000 --replay-size 360 --checkpoint-interval 120 --eval-interval 0 --ssl none"


@pytest.mark.parametrize("newest", [True, False])
def test_killed_run_whose_replay_has_gone_round(tmp_path, monkeypatch, gone_round, newest):
    """What a killed run has overwritten is never sampled by the one that goes on, from either checkpoint."""
    with monkeypatch.context() as patch:
        kill_at(patch, drqv2_pisco, "update", 114)  # in step 472; the checkpoints are of steps 420 and 360
        folder = train_until_killed(tmp_path, GONE_ROUND)
    if not newest:
        (folder / "checkpoint.pt").write_bytes(b"damaged")
    assert_same_end(resume(folder), gone_round)


def test_finished_run_is_left_as_it_is(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    assert_same_end(resume(tmp_path / "copy"), finished)


def test_kill_9_and_resume_in_processes_of_their_own(tmp_path, finished):
    code = "import sys, pytest; from drqv2_common import *; shorten_episodes(pytest.MonkeyPatch()); "
    code += "sys.exit(drqv2_pisco.main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    argv = [sys.executable, "-c", code, *command(tmp_path)]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/checkpoint.pt")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it had not finished yet
    (folder,) = tmp_path.glob("*")
    assert not (folder / "model.safetensors").exists()
    again = [sys.executable, "-c", code, "--resume", str(folder)]
    subprocess.run(again, env=environment, stdout=subprocess.DEVNULL, check=True)
    assert_same_end(folder, finished)


def test_ctrl_c_names_the_command_to_go_on_with(tmp_path, monkeypatch, capsys, finished):
    real, calls = drqv2_pisco.update, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(drqv2_pisco, "update", interrupted)
        assert drqv2_pisco.main(command(tmp_path)) == 130
    (folder,) = tmp_path.glob("*")
    assert f"python drqv2_pisco.py --resume {folder}" in capsys.readouterr().err
    assert_same_end(resume(folder), finished)


# --- Compiled --------------------------------------------------------------------------------------------------------
def test_compile_compiles_both_losses(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function.__name__) or function)
    train(tmp_path, "--compile --total-frames 80")
    assert compiled == ["critic_ssl_loss", "actor_loss"]
