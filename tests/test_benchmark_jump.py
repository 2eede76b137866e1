"""The benchmark's two programs for MSR Jump: the linear policy on the true state, and noise on the observations."""

import json

import numpy as np
import pytest
import torch
from test_benchmark import load

import ppo_pisco


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setattr(ppo_pisco, "Encoder", ppo_pisco.Encoder)  # main replaces both
    monkeypatch.setattr(ppo_pisco, "Agent", ppo_pisco.Agent)
    return load("linear_state", monkeypatch)


@pytest.fixture
def noise(monkeypatch, tmp_path):
    module = load("jump_noise", monkeypatch)
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    return module


def all_tasks():
    """Every copy plays another task of the grid."""
    envs = ppo_pisco.JumpVectorEnv(286, ppo_pisco.JUMP_GRID)
    obs, _ = envs.reset(seed=0, options={"task_ids": np.arange(286)})
    return envs, obs


def test_state_is_read_off_the_pixels(linear):
    envs, obs = all_tasks()
    encoder, rng = linear.StateEncoder("nature", (1, 60, 60), 4), np.random.default_rng(0)
    compared = 0
    for _ in range(57):
        true = np.stack([envs.x, envs.y, envs.task_obstacle[envs.task_ids], envs.task_floor[envs.task_ids]], 1)
        true[:, 0] = np.minimum(true[:, 0], 54)
        found = encoder(torch.from_numpy(obs)).numpy() * 2 + 30
        np.testing.assert_array_equal(found[~envs.done], true[~envs.done])
        compared += int((~envs.done).sum())
        obs = envs.step(rng.random(286) < 0.1)[0]
    assert compared > 10_000


def test_a_policy_linear_in_the_state_solves_every_task(linear):
    envs, obs = all_tasks()
    encoder = linear.StateEncoder("nature", (1, 60, 60), 4)
    solved = np.zeros(286, dtype=bool)
    for _ in range(57):
        state = encoder(torch.from_numpy(obs))
        # logit = 14.5 - (obstacle - agent) in pixels: positive from 14 pixels on
        logit = state @ torch.tensor([2.0, 0.0, -2.0, 0.0]) + 14.5
        obs, *_, info = envs.step((logit > 0).numpy())
        solved |= info["success"]
    assert solved.all()


def test_linear_policy_trains(linear, tmp_path, capsys):
    flags = "--total-timesteps 256 --num-envs 4 --num-steps 32 --num-minibatches 2 --seed 3 --runs-dir"
    assert linear.main([*flags.split(), str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    weights = ppo_pisco.safetensors.torch.load_file(folder / "model.safetensors")
    assert weights["actor.weight"].shape == (2, 4) and not [name for name in weights if name.startswith("encoder")]
    assert "evaluation: greedy_return" in capsys.readouterr().out


FLAGS = "--ssl pisco --freeze-layers 2 --seed 2 --total-timesteps 256 --num-envs 4 --num-steps 32".split()


def test_noise_uses_kept_networks_or_trains(noise, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise, "HEAD", "--freeze-layers all --ssl none --total-timesteps 2048".split())
    monkeypatch.setattr(noise, "DRAWS", 1)
    monkeypatch.setattr(noise, "STDS", (0, 32))
    runs = tmp_path / "runs"
    assert noise.main([*FLAGS, "--runs-dir", str(runs)]) == 0
    trained = next((runs / "training").iterdir())
    folder = next(runs.glob("*__head__2__*"))
    args = json.loads((folder / "args.json").read_text())
    assert args["encoder_weights"] == str(trained / "encoder.safetensors") and args["freeze_layers"] == "all"
    results = json.loads((folder / "evaluation.json").read_text())
    assert list(results["noise"]) == [str(std) for std in noise.STDS]
    clean = json.loads((trained / "evaluation.json").read_text())["metrics"]
    assert results["noise"]["0"] == {"target": clean["eval/greedy_success"], "grid": clean["eval/greedy_grid_success"]}

    kept = noise.weights_folder(noise.WORK, ["ppo_pisco.py", *FLAGS])
    kept.parent.mkdir(parents=True)
    trained.rename(kept)
    again = tmp_path / "again"
    assert noise.main([*FLAGS, "--runs-dir", str(again)]) == 0
    assert not (again / "training").exists()
    (second,) = again.glob("*__head__2__*")
    assert json.loads((second / "evaluation.json").read_text())["noise"] == results["noise"]
    before = (second / "metrics.csv").read_text()
    assert noise.main(["--resume", str(second)]) == 0 and (second / "metrics.csv").read_text() == before
    capsys.readouterr()


def test_wrong_flags_end_with_the_programs_exit_code(noise, tmp_path, capfd):
    assert noise.main(["--ssl", "bogus", "--runs-dir", str(tmp_path)]) == 2
    assert "--ssl" in capfd.readouterr().err
