"""What the tests of drqv2_pisco.py share: a tiny command line, an environment that needs no simulation, and a run in
this process."""

import os
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Killed, encoder_file, evaluation, metrics

import drqv2_pisco

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # as DMCPixels does: some tests import dm_control before it

# Six episodes of 20 steps (40 frames), with checkpoints on the way and at the end, two evaluations on the way and one
# at the end; the updates begin in the second episode.
TINY = (
    "--env-id cartpole-balance --encoder-weights none --image-size 24 --render-quality fast --hidden-dim 16 "
    "--feature-dim 8 --projector-dim 8 --batch-size 8 --total-frames 240 --seed-frames 40 --explore-steps 10 "
    "--update-every 4 --learning-rate 1e-3 --checkpoint-interval 80 --eval-interval 100 --eval-episodes 1 "
    "--torch-threads 1 --no-cuda"
)


class TinyControl(gym.Env):
    """Noise, with where the actions have led to in its first pixels. Episodes are truncated after `length` steps; every
    third, first the second after the reset that seeds, is terminated a step before."""

    def __init__(self, length=20, shape=(3, 24, 24), high=1.0):
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gym.spaces.Box(-high, high, (2,), np.float32)
        self.length, self.episode = length, 0

    def _image(self):
        image = self.np_random.integers(0, 256, self.observation_space.shape, np.uint8)
        image[..., 0, :2] = np.nan_to_num(self.place % 256)
        return image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t, self.place = self.episode + 1, 0, np.full(2, 128.0)
        return self._image(), {}

    def step(self, action):
        assert action.dtype == np.float32 and action.shape == (2,) and not (abs(action) > self.action_space.high).any()
        self.t, self.place = self.t + 1, self.place + 20 * action
        reward = 1.0 - float(np.abs(action).mean() / self.action_space.high[0])
        terminated = self.episode % 3 == 0 and self.t == self.length - 1
        return self._image(), reward, terminated, self.t == self.length, {}


class TinyResumable(TinyControl):
    """The same with the state of its random numbers."""

    def get_state(self):
        return [self.episode, self.np_random.bit_generator.state]

    def set_state(self, state):
        self.episode, self.np_random.bit_generator.state = state


def use(patch, make=lambda args: TinyResumable()):
    """Makes `make` the environment of every run."""
    patch.setattr(drqv2_pisco, "make_env", make)


def shorten_episodes(patch, frames=40):
    """Makes every episode of the suite end after `frames` frames."""
    real = drqv2_pisco.DMCPixels.__init__

    def short(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.env._step_limit = frames

    patch.setattr(drqv2_pisco.DMCPixels, "__init__", short)


def command(runs_dir, flags=""):
    """The tiny command line as a list; a flag given twice counts the last time."""
    return [*TINY.split(), "--runs-dir", str(runs_dir), *flags.split()]


def train(runs_dir, flags=""):
    """Trains in this process and returns the new run's folder."""
    return drqv2_pisco.train(drqv2_pisco.parse_args(command(runs_dir, flags)))


def resume(folder):
    assert drqv2_pisco.train(drqv2_pisco.parse_args(["--resume", str(folder)])) == folder
    return folder


def train_until_killed(runs_dir, flags=""):
    """Trains in this process up to where `kill_at` says and returns the folder."""
    with pytest.raises(Killed):
        train(runs_dir, flags)
    (folder,) = Path(runs_dir).glob("*")
    return folder


def error_of(argv):
    """The one line with which a command line is refused; a program that ends with it has exit code 1."""
    with pytest.raises(SystemExit) as stop:
        drqv2_pisco.train(drqv2_pisco.parse_args(argv))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def assert_same_end(folder, other):
    """Both runs hold the same weights, bit for bit, the same numbers and the same evaluation."""
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    (weights, about), (other_weights, other_about) = (encoder_file(f / "encoder.safetensors") for f in (folder, other))
    assert about == other_about and weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert metrics(folder) == metrics(other)
    assert evaluation(folder) == evaluation(other)
