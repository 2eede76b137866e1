"""What the tests of drqv2_pisco.py share: a tiny command line with short episodes, and a run in this process."""

from pathlib import Path

import pytest
import torch
from conftest import Killed, encoder_file, evaluation, metrics

import drqv2_pisco

drqv2_pisco.choose_renderer()  # before anything imports dm_control

# Six episodes of 20 steps (40 frames) each, with two checkpoints on the way and one at the end, two evaluations on the
# way and one at the end; the updates begin in the second episode.
TINY = (
    "--env-id cartpole-balance --encoder-weights none --image-size 24 --render-quality fast --hidden-dim 16 "
    "--feature-dim 8 --projector-dim 8 --batch-size 8 --total-frames 240 --seed-frames 40 --explore-steps 10 "
    "--update-every 4 --learning-rate 1e-3 --checkpoint-interval 80 --eval-interval 100 --eval-episodes 1 "
    "--torch-threads 1 --no-cuda"
)


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
    before = set(Path(runs_dir).glob("*"))
    assert drqv2_pisco.main(command(runs_dir, flags)) == 0
    (folder,) = set(Path(runs_dir).glob("*")) - before
    return folder


def resume(folder):
    assert drqv2_pisco.main(["--resume", str(folder)]) == 0
    return folder


def train_until_killed(runs_dir, flags=""):
    """Trains in this process up to where `kill_at` says and returns the folder."""
    with pytest.raises(Killed):
        drqv2_pisco.main(command(runs_dir, flags))
    (folder,) = Path(runs_dir).glob("*")
    return folder


def numbers(folder):
    """metrics.csv without the speed."""
    return [{key: value for key, value in row.items() if key != "charts/FPS"} for row in metrics(folder)]


def assert_same_end(folder, other):
    """Both runs hold the same weights, bit for bit, the same numbers and the same evaluation."""
    assert (folder / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    (weights, about), (other_weights, other_about) = (encoder_file(f / "encoder.safetensors") for f in (folder, other))
    assert about == other_about and weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)
    assert numbers(folder) == numbers(other)
    assert evaluation(folder) == evaluation(other)
