"""The baseline that trains RL on augmented images: its loss sees them, and nothing else of the run is another's."""

import subprocess
import sys

import torch
from benchmark_common import load
from conftest import ROOT, command, metrics, ppo_pisco, train


def test_the_loss_sees_augmented_images_and_all_else_as_it_is(monkeypatch):
    augmented, args = load("augmented", monkeypatch), ppo_pisco.Args(augmentation="noise")
    obs, seen = torch.full((2, 1, 60, 60), 100, dtype=torch.uint8), []
    torch.manual_seed(0)
    augmented.augmented_loss("agent", obs, None, "actions", args, of=lambda *given: seen.extend(given))
    agent, images, hidden, actions, last = seen
    assert (agent, hidden, actions, last) == ("agent", None, "actions", args)
    torch.manual_seed(0)
    assert torch.equal(images, ppo_pisco.random_noise(obs)) and not torch.equal(images, obs)


def test_as_a_program_it_trains_otherwise_from_the_same_first_rollout(tmp_path):
    flags = "--ssl none --total-timesteps 256 --checkpoint-interval 1"
    clean = train(tmp_path / "clean", flags)
    subprocess.run(
        [sys.executable, ROOT / "benchmark" / "augmented.py", *command(tmp_path / "augmented", flags)], check=True
    )
    (folder,) = (tmp_path / "augmented").iterdir()
    first, other = metrics(folder)[0], metrics(clean)[0]
    assert first["global_step"] == other["global_step"]
    assert first["losses/policy_loss"] != other["losses/policy_loss"]
