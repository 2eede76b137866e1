"""Whole runs of drqv2_pisco.py: defaults, environments, what training changes and leaves alone, run folders, resume."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from copy import deepcopy

import gymnasium as gym
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import IMPORTING, ROOT, Killed, encoder_file, evaluation, halt, kill_at, metrics, snapshot, tear
from drqv2_common import (
    TinyControl,
    TinyResumable,
    assert_same_end,
    command,
    resume,
    shorten_episodes,
    train,
    train_until_killed,
    use,
)  # fmt: skip
from PIL import Image

import drqv2_pisco
from drqv2_pisco import Args, DMCPixels, parse_args


@pytest.fixture(autouse=True)
def tiny_environment(monkeypatch):
    """Runs that are not about the simulation need none. The suite's own episodes are short."""
    use(monkeypatch)
    shorten_episodes(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run. Tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        use(patch)
        return train(tmp_path_factory.mktemp("finished"))


def tensors(folder, name="model"):
    return safetensors.torch.load_file(folder / f"{name}.safetensors")


# --- Defaults --------------------------------------------------------------------------------------------------------
EASY = {
    "total_frames": 1_100_000, "stddev_steps": 100_000, "nstep": 3, "batch_size": 256, "learning_rate": 1e-4,
    "feature_dim": 50, "hidden_dim": 1024, "replay_size": 1_000_000, "encoder_weights": "none", "stddev_start": 1.0,
    "stddev_end": 0.1, "action_repeat": 2, "seed_frames": 4_000, "explore_steps": 2_000, "update_every": 2,
}  # fmt: skip
MEDIUM = {"total_frames": 3_100_000, "stddev_steps": 500_000}
WALKER = {"nstep": 1, "batch_size": 512}
HUMANOID = {"total_frames": 30_100_000, "stddev_steps": 2_000_000, "learning_rate": 8e-5, "feature_dim": 100}
OFFICIAL = {  # task: what differs from an easy one's, of facebookresearch/drqv2
    **{
        task: MEDIUM
        for task in (
            "acrobot-swingup", "cartpole-swingup_sparse", "cheetah-run", "finger-turn_easy", "finger-turn_hard",
            "hopper-hop", "manipulation-reach_duplo", "quadruped-walk", "reacher-easy", "reacher-hard",
        )
    },
    "quadruped-run": MEDIUM | {"replay_size": 100_000},
    "walker-run": MEDIUM | WALKER, "walker-walk": WALKER, "walker-stand": WALKER,
    **{f"humanoid-{task}": HUMANOID for task in ("stand", "walk", "run")},
    **{
        task: {}
        for task in (
            "cartpole-balance", "cartpole-balance_sparse", "ball_in_cup-catch", "finger-spin", "hopper-stand",
            "pendulum-swingup", "humanoid_CMU-walk", "acrobot-swingup_sparse",
        )
    },
    "cartpole-swingup": {"encoder_weights": str(ROOT / "encoders" / "cartpole-balance__drqv2__rl.safetensors")},
}  # fmt: skip


@pytest.mark.parametrize("env_id", OFFICIAL)
def test_defaults_are_the_official_ones_of_the_task(env_id):
    args = vars(parse_args(["--env-id", env_id]))
    assert args["env_id"] == env_id
    assert {name: args[name] for name in EASY} == EASY | OFFICIAL[env_id]


def test_without_a_task_the_shipped_encoder_is_there():
    args = parse_args([])
    assert args == parse_args(["--env-id", "cartpole-swingup"]) and os.path.isfile(args.encoder_weights)


@pytest.mark.parametrize("order", [1, -1])
def test_any_flag_beats_the_tasks_defaults(order):
    pairs = [("--nstep", "2"), ("--batch-size", "7"), ("--env-id", "walker-run"), ("--total-frames", "5000")]
    args = parse_args([word for pair in pairs[::order] for word in pair])
    assert (args.nstep, args.batch_size, args.total_frames, args.stddev_steps) == (2, 7, 5000, 500_000)
    assert parse_args(["--env-id", "cartpole-swingup", "--encoder-weights", "none"]).encoder_weights == "none"


def test_help_shows_the_tasks_defaults(capsys):
    for argv, wanted in ((["--env-id", "walker-walk", "--help"], 512), (["-h"], 256)):
        with pytest.raises(SystemExit) as stop:
            parse_args(argv)
        assert stop.value.code == 0
        text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        assert re.search(rf"--batch-size.*?default: {wanted}\)", text, re.DOTALL).group().count("--") == 1
        assert "DrQ-v2 with PiSCO" in text


def test_run_folder_keeps_the_tasks_defaults(tmp_path, monkeypatch):
    kill_at(monkeypatch, drqv2_pisco, "update", 4)
    folder = train_until_killed(tmp_path, "--env-id walker-walk --total-frames 120")
    saved = json.loads((folder / "args.json").read_text())
    assert (saved["nstep"], saved["batch_size"], saved["stddev_steps"]) == (1, 8, 100_000) and "resume" not in saved
    assert parse_args(["--resume", str(folder)]) == Args(**saved, resume=str(folder))


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


def test_an_action_that_is_not_a_number_ends_its_episode():
    """So that a run whose losses have run away comes to the line that says so."""
    env = DMCPixels("cartpole-balance", 24, 2, "fast")
    env.reset(seed=0)
    assert env.step(np.full(1, np.nan, np.float32))[2:4] == (True, False)
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


def test_suite_end_to_end(tmp_path, monkeypatch):
    """The environment of the flags, trained on, evaluated, killed in its second evaluation and gone on with."""
    monkeypatch.undo()
    shorten_episodes(monkeypatch)
    whole = train(tmp_path / "whole", "--total-frames 160")
    assert [int(row["global_step"]) for row in metrics(whole)] == [40, 80, 120, 160]
    assert all(
        0 < float(row["charts/episodic_return"]) <= 40 for row in metrics(whole)
    )  # balancing pays from the start
    with monkeypatch.context() as patch:
        kill_at(patch, drqv2_pisco, "evaluate", 2)
        folder = train_until_killed(tmp_path / "killed", "--total-frames 160")
    assert_same_end(resume(folder), whole)


def test_manipulation():
    """Images of the task's own camera; ten seconds in steps of 0.04, two to an action."""
    env = DMCPixels("manipulation-reach_duplo", 24, 2)
    assert env.observation_space.shape == (3, 84, 84) and env.action_space.shape == (9,)
    lives = []
    for _ in range(2):
        frame, _ = env.reset(seed=3)
        assert env.observation_space.contains(frame) and len(np.unique(frame)) > 10
        rng, life = np.random.default_rng(0), [frame]
        for _ in range(3):
            frame, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 9).astype(np.float32))
            assert env.observation_space.contains(frame) and 0 <= reward <= 2 and not terminated and not truncated
            life.append(frame)
        assert np.array_equal(
            frame, env.env._observation_updater.get_observation()["front_close"][0].transpose(2, 0, 1)
        )
        lives.append(np.stack(life))
    assert np.array_equal(*lives) and not np.array_equal(lives[0][0], lives[0][-1])
    assert not np.array_equal(env.reset(seed=4)[0], lives[0][0])
    assert env.env._time_limit / env.env.control_timestep() == pytest.approx(250)
    env.env._time_limit = 0.2  # five steps: the last action is repeated once
    env.reset()
    ends = [env.step(np.zeros(9))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    env.close()


@pytest.mark.parametrize(
    "platform, display, before, after",
    [("linux", None, None, "egl"), ("linux", None, "osmesa", "osmesa"), ("linux", ":0", None, "egl"),
     ("darwin", None, None, None)],
)  # fmt: skip
def test_renderer(monkeypatch, platform, display, before, after):
    """EGL where the user has not chosen, with a display too, which may be dead. An unknown task ends it before anything
    is loaded."""
    monkeypatch.setattr(sys, "platform", platform)
    for name, value in (("DISPLAY", display), ("MUJOCO_GL", before)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    with pytest.raises(SystemExit):
        DMCPixels("nonsense")
    assert os.environ.get("MUJOCO_GL") == after


def test_renderer_that_fails_speaks_for_itself(tmp_path):
    environment = os.environ | {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "999"}
    argv = [sys.executable, ROOT / "drqv2_pisco.py", *command(tmp_path / "runs")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "Traceback" in done.stderr and "MUJOCO_EGL_DEVICE_ID" in done.stderr
    assert not (tmp_path / "runs").exists()


# --- What training changes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count, flags", [(0, ""), (2, ""), ("all", ""), (2, "--bf16"), (2, "--ssl curl")])
def test_frozen_layers_stay_and_the_others_move(tmp_path, monkeypatch, count, flags):
    initial, agent_class = {}, drqv2_pisco.Agent

    def spy(*args):
        agent = agent_class(*args)
        initial.update({name: value.clone() for name, value in agent.state_dict().items()})
        return agent

    monkeypatch.setattr(drqv2_pisco, "Agent", spy)
    folder = train(tmp_path, f"--freeze-layers {count} --freeze-random --total-frames 160 {flags}")
    frozen = 4 if count == "all" else count
    stay = tuple(f"{encoder}.layers.{i}." for encoder in ("encoder", "key_encoder.0") for i in range(frozen))
    for name, value in tensors(folder).items():
        assert torch.equal(value, initial[name]) == (name.startswith(stay) if stay else False), name
    rows = [row for row in metrics(folder) if row["losses/critic_loss"]]
    assert rows and all((float(row["losses/grad_norm_encoder"]) > 0.0) == (frozen < 4) for row in rows)


@pytest.mark.parametrize("own", ["state --projector residual", "state --projector none", "view --projector mlp"])
@pytest.mark.parametrize("ssl", ["pisco", "simsiam", "curl", "none"])
def test_every_loss_trains(tmp_path, ssl, own):
    flags = f"--ssl {ssl} --ssl-teacher {own} --total-frames 120 --augmentation noise --pisco-std schedule"
    folder = train(tmp_path, f"{flags} --update-every 1")
    rows = metrics(folder)
    assert [int(row["global_step"]) for row in rows] == [40, 78, 118, 120]  # the second is terminated a step early
    for row in rows[1:3]:
        assert all(math.isfinite(float(value)) for value in row.values() if value != "")
        kinds = {kind for kind in ("pisco", "simsiam", "curl") if f"losses/{kind}" in row}
        assert kinds == {ssl} - {"none"}


# The last updates with two views as teachers, recorded before there was another teacher
TWO_VIEWS = {  # loss, frozen layers: critic_loss, actor_loss, the loss, grad_norm_encoder
    ("pisco", 0): (1.6871553659439087, -0.6065050959587097, 0.007898973301053047, 0.2298462688922882),
    ("pisco", 2): (1.718560814857483, -0.6034936308860779, 0.011831527575850487, 0.19691228866577148),
    ("curl", 0): (1.1741973161697388, -0.5854741334915161, 0.6941527128219604, 0.22647146880626678),
    ("curl", 2): (1.1564451456069946, -0.5787264108657837, 0.6932275295257568, 0.2056034505367279),
}


@pytest.mark.parametrize("ssl, count", TWO_VIEWS)
def test_two_views_give_the_numbers_that_they_always_gave(tmp_path, monkeypatch, ssl, count):
    """Other CPUs round otherwise. CURL's key encoder drew random weights then before it became a copy."""

    def draw_and_copy(module):
        drqv2_pisco.make_trunk(drqv2_pisco.Encoder(Args(), (9, 24, 24)).map_shape, 8)
        return deepcopy(module)

    monkeypatch.setattr(drqv2_pisco, "copy", types.SimpleNamespace(deepcopy=draw_and_copy))
    flags = f"--ssl {ssl} --freeze-layers {count} --ssl-coef 0.1 --ssl-teacher view --projector mlp --freeze-random"
    row = [row for row in metrics(train(tmp_path, flags)) if row["losses/critic_loss"]][-1]
    found = [float(row[f"losses/{name}"]) for name in ("critic_loss", "actor_loss", ssl, "grad_norm_encoder")]
    assert found == pytest.approx(TWO_VIEWS[ssl, count], rel=1e-3)


def test_numbers_once_in_a_while(tmp_path):
    """120 steps, every second with an update from step 20 on: step 0 is in the seed phase, the hundredth update no more
    than at step 200."""
    rows = metrics(train(tmp_path, "--total-frames 480 --update-every 2 --eval-interval 0"))
    filled = [int(row["global_step"]) for row in rows if row.get("losses/ssl_grad_share")]
    assert filled == [int(row["global_step"]) for row in rows if row.get("losses/view_distance")]
    assert len(filled) == 1 and 400 <= filled[0] <= 440


def test_updates_are_counted_in_steps(tmp_path, monkeypatch):
    """120 steps, every fourth from step 20 on: 25 updates, with the schedule's standard deviation of their step."""
    calls, real = [], drqv2_pisco.update

    def spy(agent, critic_optimizer, actor_optimizer, batch, std, *further):
        calls.append(std)
        assert batch[0].shape == (8, 9, 24, 24)
        return real(agent, critic_optimizer, actor_optimizer, batch, std, *further)

    monkeypatch.setattr(drqv2_pisco, "update", spy)
    train(tmp_path, "--stddev-steps 50")
    assert calls == pytest.approx([max(1.0 - 0.9 * step / 50, 0.1) for step in range(20, 120, 4)])


def stack_of(rows, i, first):
    """The observation whose newest frame is in row i of an episode that begins in row `first`."""
    return np.concatenate([rows[max(i - k, first)][0] for k in (2, 1, 0)])


def test_what_is_played_is_what_is_stored(tmp_path, monkeypatch):
    """Actions come from the stacks that the replay will have, with the schedule's noise; only a true end is stored as
    one; an episode's first image is a reset's."""
    rows, acts, steps, resets = [], [], [], []
    add, act, step, reset = drqv2_pisco.Replay.add, drqv2_pisco.act, TinyControl.step, TinyControl.reset

    def spy_add(self, frame, action=0.0, reward=0.0, terminated=False):
        rows.append((frame.copy(), action, reward, terminated))
        add(self, frame, action, reward, terminated)

    def spy_act(agent, obs, device, std=0.0):
        if std:  # an evaluation gives none
            acts.append((obs, std))
        return act(agent, obs, device, std)

    def spy_step(self, action):
        frame, reward, *ends = step(self, action)
        steps.append((frame, action, reward))
        return frame, reward, *ends

    def spy_reset(self, **kwargs):
        frame, info = reset(self, **kwargs)
        resets.append(frame)
        return frame, info

    monkeypatch.setattr(drqv2_pisco.Replay, "add", spy_add)
    monkeypatch.setattr(drqv2_pisco, "act", spy_act)
    monkeypatch.setattr(TinyControl, "step", spy_step)
    monkeypatch.setattr(TinyControl, "reset", spy_reset)
    use(monkeypatch, lambda args: TinyResumable(length=8))
    train(tmp_path, "--total-frames 110 --seed-frames 20 --stddev-steps 50 --eval-interval 0")
    # The first reset seeds, the second begins: episodes of 8, 7 and 8 steps, then 8, 7, 8 and 8, and one of a single
    # step; each has a row more than steps.
    firsts = [0, 9, 17, 26, 35, 43, 52, 61]
    ends = [*firsts[1:], 63]
    assert len(rows) == 55 + 8 and [i for i, row in enumerate(rows) if row[3]] == [16, 42]
    played = [(i, first) for first, end in zip(firsts, ends) for i in range(first, end - 1)]
    assert len(played) == 55 and len(acts) == 45  # ten steps explore
    for t, ((i, first), (obs, std)) in enumerate(zip(played[10:], acts), start=10):
        np.testing.assert_array_equal(obs, stack_of(rows, i, first))
        assert std == pytest.approx(drqv2_pisco.stddev_schedule(t, 1.0, 0.1, 50))
    for (i, _), (frame, action, reward) in zip(played, steps):
        np.testing.assert_array_equal(rows[i + 1][0], frame)
        np.testing.assert_array_equal(rows[i + 1][1], action)
        assert rows[i + 1][2] == reward
    for first, frame in zip(firsts, resets[1:]):
        np.testing.assert_array_equal(rows[first][0], frame)


# --- The run folder --------------------------------------------------------------------------------------------------
def test_same_seed_same_run(tmp_path, finished):
    assert_same_end(train(tmp_path), finished)


def test_other_seed_other_run(tmp_path, finished):
    other = train(tmp_path, "--seed 2 --total-frames 120")
    assert metrics(other)[0]["charts/episodic_return"] != metrics(finished)[0]["charts/episodic_return"]


def test_run_folder(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith("events.")}
    assert names == {
        "args.json", "metrics.csv", "checkpoint.pt", "model.safetensors", "encoder.safetensors", "evaluation.json",
    }  # fmt: skip
    assert finished.name.startswith("cartpole-balance__drqv2_pisco__1__")
    rows = metrics(finished)
    assert list(rows[0])[0] == "global_step"
    # A row for every episode, the second and the fifth of which are a step shorter, and one for the run's last steps
    assert [int(row["global_step"]) for row in rows] == [40, 78, 118, 158, 196, 236, 240]
    assert [row["charts/episodic_length"] for row in rows] == ["20", "19", "20", "20", "19", "20", ""]
    assert [row["charts/replay_steps"] for row in rows] == ["20", "39", "59", "79", "98", "118", ""]
    # An evaluation at the end of the episode that passes 100, and 200; and one at the run's end
    assert [int(row["global_step"]) for row in rows if row["eval/greedy_return"]] == [118, 236, 240]
    last = evaluation(finished)
    assert last["global_step"] == 240 and last["length"] == [20] and last["env_id"] == "cartpole-balance"
    assert float(rows[-1]["eval/greedy_return"]) == last["return"][0] == last["metrics"]["eval/greedy_return"]
    assert float(rows[-1]["eval/greedy_length"]) == 20 == last["metrics"]["eval/greedy_length"]


def test_checkpoints_come_at_an_episodes_end_after_the_mark(tmp_path, monkeypatch):
    marks, real = [], drqv2_pisco.write_atomically

    def spy(path, data):
        real(path, data)
        if path.name == "checkpoint.pt":
            marks.append(drqv2_pisco.load_checkpoint(path.parent, "cpu")["step"] * 2)

    monkeypatch.setattr(drqv2_pisco, "write_atomically", spy)
    train(tmp_path, "--eval-interval 0 --checkpoint-interval 78")
    assert marks == [78, 158, 236, 240]


def test_replay_file_is_whole_from_the_start(tmp_path, monkeypatch):
    sizes, real = [], drqv2_pisco.Replay.add

    def spy(self, *args):
        (path,) = tmp_path.glob("*/replay.bin")
        sizes.append((path.stat().st_size, path.stat().st_blocks * 512 >= path.stat().st_size, self.rows))
        real(self, *args)

    monkeypatch.setattr(drqv2_pisco.Replay, "add", spy)
    folder = train(tmp_path, "--total-frames 120 --replay-size 50")
    assert len(set(sizes)) == 1 and sizes[0][1] and sizes[0][2] == 50 and sizes[0][0] > 50 * 3 * 24 * 24
    assert not (folder / "replay.bin").exists()


@pytest.mark.parametrize("image_size", [24, 26])
def test_encoder_file_loads_into_another_run(tmp_path, monkeypatch, finished, image_size):
    """Also into one with images of another size: convolutions take any."""
    weights, about = encoder_file(finished / "encoder.safetensors")
    assert about["architecture"] == "drqv2" and about["observation_shape"] == "[9, 24, 24]"
    assert (about["frame_stack"], about["image_channels"]) == ("3", "3")
    assert about["environment"] == "cartpole-balance" and about["steps"] == "240" and about["seed"] == "1"
    assert "pisco" in about["objective"]
    use(monkeypatch, lambda args: TinyResumable(shape=(3, args.image_size, args.image_size)))
    flags = f"--encoder-weights {finished}/encoder.safetensors --freeze-layers all --total-frames 80 --seed 5"
    other = tensors(train(tmp_path, f"{flags} --image-size {image_size}"), "encoder")
    assert other.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(other[name], value) and torch.equal(tensors(finished)[f"encoder.{name}"], value)


def test_what_is_printed(tmp_path, capsys):
    folder = train(tmp_path, "--total-frames 80 --freeze-layers 1 --freeze-random")
    text = capsys.readouterr().out
    assert "layer  1      2,624 parameters  frozen" in text and "layer  2      9,248 parameters  trained" in text
    assert f"run folder: {folder}" in text and f" --resume {folder}\n" in text
    assert "evaluation: greedy_return " in text and "\ndevice: cpu, 1 threads\n" in text


# --- Evaluation ------------------------------------------------------------------------------------------------------
def test_evaluation_leaves_training_alone(tmp_path, finished):
    folder = train(tmp_path, "--eval-interval 40 --checkpoint-interval 0 --eval-episodes 2 --capture-video")
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert len(set(evaluation(folder)["return"])) == 2  # two different episodes
    # The first episode's end after each mark; that at 78 is before the second one
    names = {f"evaluation_{frames}.gif" for frames in (40, 118, 158, 196, 236, 240)}
    assert {path.name for path in folder.glob("*.gif")} == names
    video = Image.open(folder / "evaluation_118.gif")
    assert video.format == "GIF" and video.size == (48, 48) and video.n_frames == 20  # one episode, twice as large


@pytest.mark.parametrize(
    "shape, size", [((3, 160, 48), (96, 320)), ((1, 24, 300), (300, 24)), ((3, 400, 84), (56, 268))]
)
def test_video_is_thinned_out(tmp_path, monkeypatch, shape, size):
    """To at most 160 pixels, each shown as 2 x 2, and to the first 1000 frames."""
    saved, real = [], drqv2_pisco.write_gif
    monkeypatch.setattr(
        drqv2_pisco, "write_gif", lambda path, frames: saved.append(len(frames)) or real(path, frames[:3])
    )
    use(monkeypatch, lambda args: TinyResumable(length=1100 if shape[0] == 1 else 5, shape=shape))
    agent = type("Agent", (), {"act": None})
    monkeypatch.setattr(drqv2_pisco, "act", lambda agent, obs, device: np.zeros(2, np.float32))
    args = parse_args(command(tmp_path, "--capture-video --eval-episodes 2"))
    drqv2_pisco.evaluate(agent, args, "cpu", 7, tmp_path)
    assert saved == [1000 if shape[0] == 1 else 5]
    assert Image.open(tmp_path / "evaluation_7.gif").size == size


def test_episode_that_never_ends_is_cut_off(tmp_path, monkeypatch, capsys):
    """In an evaluation; training goes on as it is."""
    environments = []

    def make(args):
        environments.append(TinyResumable(length=20 if not environments else -1))  # the first one is trained on
        return environments[-1]

    use(monkeypatch, make)
    folder = train(tmp_path, "--total-frames 120 --eval-interval 0 --eval-max-steps 33 --eval-episodes 2")
    assert capsys.readouterr().out.count("an episode was cut off after 33 steps") == 2
    assert evaluation(folder)["length"] == [33, 33]


def test_row_and_checkpoint_are_there_before_an_evaluation(tmp_path, monkeypatch, finished):
    """An evaluation can take long: the run that is killed in it comes back to it at once."""
    with monkeypatch.context() as patch:
        kill_at(patch, drqv2_pisco, "evaluate", 2)
        folder = train_until_killed(tmp_path)
    rows, checkpoint = metrics(folder), drqv2_pisco.load_checkpoint(folder, "cpu")
    assert [row["global_step"] for row in rows] == ["40", "78", "118", "158", "196"] and rows[2]["eval/greedy_return"]
    assert checkpoint["step"] == 236 // 2 and checkpoint["row"]["global_step"] == 236
    calls, real = [], drqv2_pisco.evaluate
    monkeypatch.setattr(drqv2_pisco, "evaluate", lambda *args: calls.append(args[3]) or real(*args))
    assert_same_end(resume(folder), finished)
    assert calls == [236, 240]


def test_last_evaluation_has_the_simulator_to_itself(tmp_path, monkeypatch):
    opened = []

    class Single(TinyResumable):
        def __init__(self):
            super().__init__()
            assert not opened
            opened.append(self)

        def close(self):
            opened.remove(self)

    use(monkeypatch, lambda args: Single())
    assert evaluation(train(tmp_path, "--eval-interval 0"))["length"] == [20] and not opened


# --- Resume ----------------------------------------------------------------------------------------------------------
# What a tiny run writes anew: its arguments; checkpoints at 118, 196, 236 and 240 frames; evaluations at 118, 236, 240;
# metrics with the columns of the first row, the first losses and the first evaluation; the weights of the agent and of
# the encoder. Besides, seven rows are added to the metrics.
WRITES, ROWS = 1 + 4 + 3 + 3 + 2, 7

MOMENTS = [
    ("before the first checkpoint", drqv2_pisco, "update", 2),
    ("after the first checkpoint", drqv2_pisco, "update", 7),
    ("after the second checkpoint", drqv2_pisco, "update", 24),
    ("in a step", TinyControl, "step", 100),
    ("while a row is added", drqv2_pisco.Replay, "add", 90),
    ("before metrics are written", drqv2_pisco, "append_metrics", 3),
    ("in an evaluation", drqv2_pisco, "play_episode", 2),
    ("in the last evaluation", drqv2_pisco, "evaluate", 3),
    ("before the encoder is written", drqv2_pisco, "save_encoder", 1),
    *((f"before file {n} is renamed", os, "replace", n) for n in range(2, WRITES + 1)),
    *((f"half of file or row {n} written", os, "fsync", n) for n in (*range(2, 11), *range(14, WRITES + ROWS + 1))),
]


@pytest.mark.parametrize("moment, owner, name, nth", MOMENTS, ids=[moment[0] for moment in MOMENTS])
def test_killed_run_ends_like_an_uninterrupted_one(tmp_path, monkeypatch, finished, moment, owner, name, nth):
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, nth, first=tear if name == "fsync" else lambda *args: None)
        folder = train_until_killed(tmp_path)
    assert_same_end(resume(folder), finished)


def test_every_write_is_one_of_these_moments(tmp_path, monkeypatch):
    calls, synced, real, sync = [], [], os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append(paths) or real(*paths))
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(fd) or sync(fd))
    train(tmp_path)
    assert len(calls) == WRITES and len(synced) == WRITES + ROWS


def test_run_killed_again_and_again(tmp_path, monkeypatch, finished):
    """At the same number of steps after every start."""
    folder, starts = None, 0
    while folder is None or not (folder / "model.safetensors").exists():
        with monkeypatch.context() as patch:
            kill_at(patch, drqv2_pisco.Replay, "add", 64)
            try:
                resume(folder) if folder else train(tmp_path)
            except Killed:
                (folder,) = tmp_path.glob("*")
        starts += 1
        assert starts < 10
    assert starts == 3  # in steps 62 and 119, after the checkpoints of steps 59 and 118
    assert_same_end(folder, finished)


def check_samples(patch):
    """Fails where a sample is not what was played last at its rows. Returns the number of samples drawn, in a list."""
    images, drawn, add, sample = {}, [], drqv2_pisco.Replay.add, drqv2_pisco.Replay.sample

    def spy_add(self, frame, action=0.0, reward=0.0, terminated=False):
        images[self.head] = frame.copy(), np.float32(reward), self.start
        add(self, frame, action, reward, terminated)

    def spy_sample(self, args, device):
        before = self.generator.bit_generator.state
        rows, first = self.sample_rows(args.batch_size, args.nstep)
        self.generator.bit_generator.state = before
        batch = sample(self, args, device)
        for i, (row, start) in enumerate(zip(rows, first)):
            assert {images[row + k][2] for k in range(args.nstep + 1)} == {start} and start < self.start
            for obs, newest in ((batch[0], row), (batch[4], row + args.nstep)):
                np.testing.assert_array_equal(obs[i], stack_of(images, newest, start))
            drawn.append(row)
        return batch

    patch.setattr(drqv2_pisco.Replay, "add", spy_add)
    patch.setattr(drqv2_pisco.Replay, "sample", spy_sample)
    return drawn


@pytest.mark.parametrize("nth", [31, 44, 58])
def test_killed_run_whose_ring_has_gone_round(tmp_path, monkeypatch, nth):
    """260 steps in a ring of 70 rows: every batch before the kill and after it is what was played, up to the end."""
    flags = "--total-frames 520 --replay-size 70 --eval-interval 0 --ssl none --checkpoint-interval 120"
    drawn = check_samples(monkeypatch)
    with monkeypatch.context() as patch:
        kill_at(patch, drqv2_pisco, "update", nth)
        folder = train_until_killed(tmp_path, flags)
    before = len(drawn)
    rows = metrics(resume(folder))
    assert rows[-1]["global_step"] == "520" and (folder / "model.safetensors").exists()
    assert before and max(drawn[before:]) > 200  # it has sampled up to the end
    # Whole episodes only: three of 20 steps and their first images fit into 70 rows, less what is being played
    assert max(float(row["charts/replay_steps"] or 0) for row in rows) <= 60


def test_finished_run_is_left_as_it_is(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "copy")
    asked, real = [], drqv2_pisco.Replay
    monkeypatch.setattr(drqv2_pisco, "Replay", lambda path, rows, *rest: asked.append(rows) or real(path, rows, *rest))
    assert_same_end(resume(tmp_path / "copy"), finished)
    assert asked == [1]  # no room for a buffer that nothing is put in
    assert not (tmp_path / "copy" / "replay.bin").exists()


def test_kill_9_and_resume_in_processes_of_their_own(tmp_path, finished):
    code = "import sys, pytest; from drqv2_common import *; use(pytest.MonkeyPatch()); "
    code += "drqv2_pisco.train(drqv2_pisco.parse_args())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command(tmp_path)], env=IMPORTING, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("*/checkpoint.pt")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    halt(process)
    (folder,) = tmp_path.glob("*")
    before = snapshot(folder)
    with pytest.raises(SystemExit, match=f"--resume {folder}: another process is at work in it"):
        resume(folder)
    assert snapshot(folder) == before
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it had not finished yet
    assert not (folder / "model.safetensors").exists()
    again = [sys.executable, "-c", code, "--resume", str(folder)]
    subprocess.run(again, env=IMPORTING, stdout=subprocess.DEVNULL, check=True)
    assert_same_end(folder, finished)


# --- One's own environment -------------------------------------------------------------------------------------------
class Silent(TinyControl):
    """One that Gymnasium users have: no state to be asked for, grey images that are wider than high, actions to 3, and
    rewards that are NumPy's numbers."""

    seen, seeds = [], []

    def __init__(self):
        super().__init__(shape=(1, 30, 44), high=3.0)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.seen.append(np.abs(action).max())
        image, reward, *rest = super().step(action)
        return image, np.float32(reward), *rest


def test_own_environment_trains_evaluates_and_resumes(tmp_path, monkeypatch):
    use(monkeypatch, lambda args: gym.wrappers.RescaleAction(Silent(), -1.0, 1.0))
    Silent.seen.clear(), Silent.seeds.clear()
    with monkeypatch.context() as patch:
        kill_at(patch, drqv2_pisco, "update", 20)
        folder = train_until_killed(tmp_path, "--capture-video")
    assert drqv2_pisco.load_checkpoint(folder, "cpu")["env"] is None
    killed, first = len(Silent.seeds), Silent.seeds[0]
    rows = metrics(resume(folder))
    assert None not in (first, Silent.seeds[killed]) and Silent.seeds[killed] != first  # no episode comes twice
    assert rows[-1]["global_step"] == "240" and [row["eval/greedy_return"] != "" for row in rows].count(True) == 3
    assert 1.5 < max(Silent.seen) <= 3.0  # scaled from -1..1
    assert encoder_file(folder / "encoder.safetensors")[1]["observation_shape"] == "[3, 30, 44]"
    assert Image.open(folder / "evaluation_240.gif").size == (88, 60)


def test_own_environment_with_a_state_resumes_to_the_same_end(tmp_path, monkeypatch):
    """As make_env asks for it: inside of a RescaleAction."""
    use(monkeypatch, lambda args: gym.wrappers.RescaleAction(TinyResumable(high=3.0), -1.0, 1.0))
    whole = train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, drqv2_pisco, "update", 20)
        folder = train_until_killed(tmp_path / "killed")
    assert_same_end(resume(folder), whole)


# --- Compiled --------------------------------------------------------------------------------------------------------
def test_compile_compiles_both_losses(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function.__name__) or function)
    train(tmp_path, "--total-frames 80")
    assert not compiled
    train(tmp_path, "--compile --total-frames 80")
    assert set(compiled) == {"critic_ssl_loss", "actor_loss"}
