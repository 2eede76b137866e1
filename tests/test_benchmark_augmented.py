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


def test_as_a_program_it_acts_on_clean_images_and_trains_on_others(tmp_path):
    """Its first rollout is that of the clean run, its losses are those of other images."""
    flags = "--freeze-layers 0 --num-steps 64 --total-timesteps 256"
    clean = train(tmp_path / "clean", f"{flags} --ssl none")
    program = [sys.executable, ROOT / "benchmark" / "augmented.py"]
    subprocess.run([*program, *command(tmp_path / "augmented", flags)], check=True)
    (folder,) = (tmp_path / "augmented").iterdir()
    (row,), (other,) = metrics(folder), metrics(clean)
    assert row["charts/episodic_return"] == other["charts/episodic_return"] and float(row["charts/episodic_return"]) > 0
    assert row["losses/entropy"] != other["losses/entropy"]
    subprocess.run([*program, "--resume", folder], check=True)
    frozen = command(tmp_path / "frozen", "--freeze-layers 2 --freeze-random")
    refused = subprocess.run([*program, *frozen], capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.startswith("--freeze-layers: ")
