"""What the tests share: a tiny command line, a run in this process, its numbers, and a tiny image environment."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import safetensors
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ppo_pisco  # noqa: E402

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # the programs that tests start: one thread each, as the tests run side by side
IMPORTING = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}  # the environment of those that import the tests

# Four iterations of 4 copies x 8 steps, a checkpoint after each. The first collisions are at step 16, in the second.
TINY = (
    "--encoder-weights none --feature-dim 32 --num-envs 4 --num-steps 8 --num-minibatches 2 --total-timesteps 128 "
    "--jump-tasks 20:5,22:15,30:20 --jump-eval-tasks 20:10,45:20 --learning-rate 1e-3 --anneal-lr --update-epochs 2 "
    "--checkpoint-interval 1 --eval-episodes 1 --torch-threads 1 --no-cuda"
)


class Killed(BaseException):
    """Ends a run where `kill_at` says, past every handler."""


class TinyImage(gym.Env):
    """Images full of the step's number, with a 9 in the last of three channels, or of noise. Episodes end by turns:
    terminated after 3 steps, truncated after 5, or never. Actions 5, 6, 7."""

    def __init__(self, shape=(36, 40, 3), continuous=False, endless=False, noise=False):
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,)) if continuous else gym.spaces.Discrete(3, start=5)
        self.endless, self.noise = endless, noise
        self.episode = 0

    def _image(self):
        if self.noise:
            return self.np_random.integers(0, 256, self.observation_space.shape, np.uint8)
        image = np.full(self.observation_space.shape, self.t % 256, np.uint8)
        if image.shape[-1] == 3:
            image[..., 2] = 9
        return image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._image(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        length, odd = 0 if self.endless else self.t, self.episode % 2 == 1
        return self._image(), 10.0, odd and length == 3, not odd and length == 5, {}


for name, kwargs in {
    "TinyImage-v0": {},
    "TinyImageFlat-v0": {"shape": (36, 40)},
    "TinyImageGrey-v0": {"shape": (36, 40, 1)},
    "TinyImageFirst-v0": {"shape": (3, 36, 40)},
    "TinyImageStack-v0": {"shape": (36, 40, 12)},
    "TinyImageSmall-v0": {"shape": (20, 20, 3)},
    "TinyImageLarge-v0": {"shape": (240, 320, 3)},
    "TinyImageContinuous-v0": {"continuous": True},
    "TinyImageNoise-v0": {"noise": True},
    "TinyImageEndless-v0": {"endless": True},
}.items():
    gym.register(name, entry_point=TinyImage, kwargs=kwargs)
gym.register("TinyImageLimited-v0", entry_point=TinyImage, kwargs={"endless": True}, max_episode_steps=6)


def command(runs_dir, flags=""):
    """The tiny command line as a list; a flag given twice counts the last time."""
    return [*TINY.split(), "--runs-dir", str(runs_dir), *flags.split()]


def train(runs_dir, flags=""):
    """Trains in this process and returns the new run's folder."""
    return ppo_pisco.train(ppo_pisco.parse_args(command(runs_dir, flags)))


def resume(folder):
    assert ppo_pisco.train(ppo_pisco.parse_args(["--resume", str(folder)])) == folder
    return folder


def train_until_killed(runs_dir, flags=""):
    """Trains in this process up to where `kill_at` says and returns the folder."""
    with pytest.raises(Killed):
        train(runs_dir, flags)
    (folder,) = Path(runs_dir).glob("*")
    return folder


def program(*arguments, **kwargs):
    """Starts ppo_pisco.py as a program of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, ROOT / "ppo_pisco.py", *arguments], **(pipes | kwargs))


def heed_ctrl_c():
    """For a program that is about to start: a shell's background jobs, and what they start, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_at(monkeypatch, owner, name, nth, first=lambda *args: None):
    """Makes the nth call of owner.name do `first` and then kill the run; later calls work."""
    real, calls = getattr(owner, name), []

    def deadly(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            first(*args)
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, deadly)


def tear(fd):
    """Leaves half of what is being written, as a kill in the midst of it would: of a new file, or of a row added
    to metrics.csv."""
    path, size = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size
    is_row = path.endswith("metrics.csv")
    os.ftruncate(fd, size - len(Path(path).read_bytes().splitlines()[-1]) // 2 if is_row else size // 2)


def halt(process):
    """Stop it and wait until it stands still, which the signal alone does not."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Bomb:
    """Makes the file `marker` when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def metrics(folder):
    """metrics.csv as a list of dicts of text, without the speed."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key != "charts/SPS"} for row in csv.DictReader(file)]


def encoder_file(path):
    """An encoder file's tensors and metadata."""
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def evaluation(folder):
    return json.loads((folder / "evaluation.json").read_text())


def assert_same_end(folder, other):
    """Both runs hold the same weights, bit for bit, the same numbers and the same evaluation."""
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    (weights, about), (other_weights, other_about) = (
        encoder_file(path / "encoder.safetensors") for path in (folder, other)
    )
    assert about == other_about and weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert metrics(folder) == metrics(other)
    assert evaluation(folder) == evaluation(other)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished tiny run. Tests only read it."""
    return train(tmp_path_factory.mktemp("finished"))
