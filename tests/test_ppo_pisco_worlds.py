"""Gymnasium's environments in processes of their own, and first-person 3D without a display."""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import assert_same_end, command, evaluation, heed_ctrl_c, metrics, program, train
from PIL import Image

from ppo_pisco import Args, ImageEnvs

# Each environment writes down whose child it is, and if the program's own imports came with it. A step takes a while.
OWN_WORLD = """
import json, os, sys, time
import gymnasium, numpy

class World(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 255, (36, 40, 3), numpy.uint8)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self, broken=False):
        self.broken = broken
        with open(f"process_{os.getpid()}.json", "w") as file:
            json.dump({"parent": os.getppid(), "torch": "torch" in sys.modules}, file)

    def image(self):
        return self.np_random.integers(0, 256, (36, 40, 3), numpy.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.image(), {}

    def step(self, action):
        self.t += 1
        time.sleep(0.005)
        if self.broken and self.t % 4 == 3:
            open("level_%d.txt" % self.t)
        return self.image(), float(action), self.t == 9, self.t == 7 and action == 0, {}

gymnasium.register("World-v0", entry_point=World)
gymnasium.register("BrokenWorld-v0", entry_point=World, kwargs={"broken": True})
"""
ASYNC = "--env-id own_world:World-v0 --num-envs 2 --vectorization async"


@pytest.fixture
def own_world(tmp_path, monkeypatch):
    """The folder that a program starts in, with the module."""
    (tmp_path / "own_world.py").write_text(OWN_WORLD)
    monkeypatch.setenv("PYTHONPATH", "")  # the folder itself is the only place to find it
    return tmp_path


def processes(folder):
    """What the environments wrote, by the ids of their processes."""
    return {int(path.stem.split("_")[1]): json.loads(path.read_text()) for path in folder.glob("process_*.json")}


def alive(pid):
    """A process that has ended may stay in the table until its parent asks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_gone(pids):
    deadline = time.monotonic() + 10
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_leaves_no_process_and_goes_on(own_world, number):
    """A Ctrl-C reaches every process of a terminal, SIGTERM the program alone."""
    flags = f"{ASYNC} --total-timesteps 3200 --eval-interval 0"  # 200 iterations
    process = program(*command("runs", flags), cwd=own_world, start_new_session=True, preexec_fn=heed_ctrl_c)
    while len(found := list(own_world.glob("runs/*/metrics.csv"))) == 0 or found[0].read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    workers = {pid: world for pid, world in processes(own_world).items() if pid != process.pid}
    assert len(workers) == 2 and all(map(alive, workers))
    assert all(world == {"parent": process.pid, "torch": False} for world in workers.values())
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, err = process.communicate(timeout=200)
    assert process.returncode == -number, err
    if number == signal.SIGINT:
        assert err.count("Traceback") == err.count("KeyboardInterrupt") == 1, err  # the program's own
    assert_gone(processes(own_world))
    (folder,) = own_world.glob("runs/*")
    rows = len(metrics(folder))
    assert 2 <= rows < 200
    arguments = folder / "args.json"  # an end that is near
    arguments.write_text(json.dumps(json.loads(arguments.read_text()) | {"total_timesteps": (rows + 4) * 16}))
    process = program("--resume", str(folder), cwd=own_world)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0 and "Warning" not in err, err
    assert len(metrics(folder)) == rows + 4 and len(evaluation(folder)["greedy"]["return"]) == 1
    assert_gone(processes(own_world))


def test_error_in_a_process_is_told_as_it_is(own_world):
    """The traceback has a % in it."""
    flags = ASYNC.replace("World-v0", "BrokenWorld-v0")
    process = program(*command("runs", flags), cwd=own_world)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert f'File "{own_world / "own_world.py"}", line 2' in err and 'open("level_%d.txt" % self.t)' in err, err
    assert "FileNotFoundError: [Errno 2] No such file or directory: 'level_3.txt'" in err
    assert len(processes(own_world)) == 3
    assert_gone(processes(own_world))


def test_processes_give_the_same_run(own_world, monkeypatch):
    """The default, one after the other in this process, and one process each; evaluations too."""
    monkeypatch.chdir(own_world)
    before = vars(sys.modules["__main__"]).copy()
    folders = [
        train(own_world / mode, f"{ASYNC.replace('async', mode)} --eval-interval 64 --eval-episodes 3")
        for mode in ("sync", "async")
    ]
    assert_same_end(*folders)
    assert len(processes(own_world)) == 1 + 2 + 2 * 2 * 3  # this one, copies, evaluations of both policies
    assert vars(sys.modules["__main__"]) == before


# --- MiniWorld -------------------------------------------------------------------------------------------------------
def test_miniworld_is_seen_in_first_person():
    """A turn of the agent is 15 degrees: after 24 of them the picture is the first one's again."""
    envs = ImageEnvs(Args(env_id="miniworld:MiniWorld-FourRooms-v0"), 2)
    assert (envs.obs_shape, envs.frame_stack, envs.num_actions) == ((3, 60, 80), 1, 3)
    assert envs.envs.envs[0].unwrapped.vis_fb.width == 1  # else every evaluation's copies leave 30 MiB each behind
    first = envs.reset().astype(int)
    assert first.std() > 5 and abs(first[0] - first[1]).mean() > 5  # each copy has a place of its own
    left = np.zeros(2, np.int64)
    turns = np.array([abs(envs.step(left)[0] - first).mean() for _ in range(24)])
    assert turns[:23].min() > 2 > 0.5 > turns[23]
    for _ in range(226):
        _, rewards, terminated, truncated = envs.step(left)
        assert not rewards.any() and not terminated.any()
    assert truncated.all() and [(e["return"], e["length"]) for e in envs.episodes] == [(0.0, 250)] * 2
    envs.envs.close()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_miniworld_trains_without_a_display(tmp_path, mode):
    variables = {name: text for name, text in os.environ.items() if name not in ("DISPLAY", "PYGLET_HEADLESS")}
    flags = f"--env-id miniworld:MiniWorld-FourRooms-v0 --num-envs 2 --vectorization {mode} --eval-interval 0"
    process = program(*command(tmp_path, f"{flags} --eval-max-steps 30 --capture-video"), env=variables)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    (folder,) = tmp_path.iterdir()
    assert all(math.isfinite(float(row["losses/pisco"])) for row in metrics(folder))
    assert evaluation(folder)["greedy"]["length"] == [30]
    with Image.open(folder / "evaluation_128.gif") as gif:
        assert gif.size == (160, 120) and gif.n_frames > 1
