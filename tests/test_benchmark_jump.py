"""The benchmark's programs for MSR Jump: the linear policy on the true state, noise on observations, first jumps."""

import csv
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT
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
    encoder, rng = linear.StateEncoder(ppo_pisco.Args(), (1, 60, 60)), np.random.default_rng(0)
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
    encoder = linear.StateEncoder(ppo_pisco.Args(), (1, 60, 60))
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
    folder = linear.main([*flags.split(), str(tmp_path)])
    assert folder.parent == tmp_path
    weights = ppo_pisco.safetensors.torch.load_file(folder / "model.safetensors")
    assert weights["actor.0.weight"].shape == (2, 4) and not [name for name in weights if name.startswith("encoder")]
    assert "evaluation: greedy_return" in capsys.readouterr().out


FLAGS = "--ssl pisco --freeze-layers 2 --seed 2 --total-timesteps 256 --num-envs 4 --num-steps 32".split()


def test_noise_plays_kept_networks_and_a_fresh_head(noise, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(noise, "HEAD", "--freeze-layers all --ssl none --total-timesteps 2048".split())
    monkeypatch.setattr(noise, "DRAWS", 1)
    monkeypatch.setattr(noise, "STDS", (0, 32))
    with pytest.raises(SystemExit, match="no networks of ppo_pisco.py --ssl pisco"):
        noise.main([*FLAGS, "--runs-dir", str(tmp_path / "runs")])
    noise.run_ppo([*FLAGS, "--runs-dir", str(tmp_path / "training")])
    (trained,) = (tmp_path / "training").iterdir()
    kept = noise.weights_folder(noise.WORK, ["ppo_pisco.py", *FLAGS])
    kept.parent.mkdir(parents=True)
    trained.rename(kept)
    assert noise.main([*FLAGS, "--runs-dir", str(tmp_path / "runs")]) == 0
    (folder,) = (tmp_path / "runs").glob("*__head__2__*")
    args = json.loads((folder / "args.json").read_text())
    assert args["encoder_weights"] == str(kept / "encoder.safetensors") and args["freeze_layers"] == "all"
    results = json.loads((folder / "evaluation.json").read_text())["noise"]
    for policy, run in (("fresh head", folder), ("trained", kept)):
        assert list(results[policy]) == [str(std) for std in noise.STDS]
        clean = json.loads((run / "evaluation.json").read_text())["metrics"]["eval/greedy_success"]
        assert results[policy]["0"] == pytest.approx(clean)
    before = (folder / "metrics.csv").read_text()
    assert noise.main(["--resume", str(folder)]) == 0 and (folder / "metrics.csv").read_text() == before
    assert json.loads((folder / "evaluation.json").read_text())["noise"] == results
    capsys.readouterr()


def test_noise_is_seen_by_the_policy(noise, tmp_path, monkeypatch):
    """A policy that jumps wherever a pixel is neither black, grey nor white fails under noise and not without."""
    args = ppo_pisco.Args(jump_tasks="20:10,30:20")
    encoder = load("linear_state", monkeypatch).StateEncoder(args, (1, 60, 60))

    def policy(obs):
        clean = torch.isin(obs, torch.tensor([0.0, 128.0, 255.0])).flatten(1).all(1)
        right = encoder(obs) @ torch.tensor([2.0, 0.0, -2.0, 0.0]) + 14.5  # positive from 14 pixels on
        logit = torch.where(clean, right, 1.0)
        return torch.stack([torch.zeros_like(logit), logit], 1), None

    monkeypatch.setattr(noise, "load_policy", lambda folder: (args, policy))
    table = noise.noise_table(tmp_path)
    assert list(table) == list(noise.STDS) and table[0] == 1.0 and table[64] == 0.0


def test_a_failing_head_ends_with_the_programs_exit_code(noise, tmp_path, capfd):
    kept = noise.weights_folder(noise.WORK, ["ppo_pisco.py", *FLAGS])
    kept.mkdir(parents=True)
    (kept / "args.json").write_text(json.dumps({"jump_tasks": "bogus", "seed": 1}))
    assert noise.main([*FLAGS, "--runs-dir", str(tmp_path)]) == 1
    assert "--jump-tasks bogus" in capfd.readouterr().err


@pytest.fixture
def jumps(monkeypatch, tmp_path):
    module = load("jump_moments", monkeypatch)
    monkeypatch.setattr(module, "WORK", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_moments_by_hand(jumps):
    greedy, reach = jumps.moments(np.array([0.1, 0.2, 0.9, 0.6]), right=2)
    assert greedy == 2 and reach == pytest.approx(0.9 * 0.8)
    greedy, reach = jumps.moments(np.array([0.1, 0.2, 0.3, 0.4]), right=4)
    assert greedy is None and reach == pytest.approx(0.9 * 0.8 * 0.7 * 0.6)


def test_first_jump_of_the_right_policy_is_right_in_every_task(jumps, linear):
    encoder = linear.StateEncoder(ppo_pisco.Args(), (1, 60, 60))
    asked = []

    def policy(obs):  # logit of jumping: 14.5 - (obstacle - agent) in pixels
        asked.append(len(obs))
        logit = encoder(obs) @ torch.tensor([2.0, 0.0, -2.0, 0.0]) + 14.5
        return torch.stack([torch.zeros_like(logit), logit], 1), None

    for (obstacle, _), probabilities in zip(
        ppo_pisco.JUMP_GRID, jumps.jump_probabilities(policy, ppo_pisco.JUMP_GRID), strict=True
    ):
        assert len(probabilities) == obstacle - 4  # from x = 0 to the last step before the collision
        assert probabilities[0] == pytest.approx(1 / (1 + np.exp(obstacle - 14.5)))
        assert jumps.moments(probabilities, obstacle - 14)[0] == obstacle - 14
    assert set(asked) == {286}


def test_first_jumps_need_the_networks(jumps, capsys):
    assert jumps.main() == 2
    assert "from scratch, seed 1" in capsys.readouterr().err and not (jumps.RESULTS / "jump_moments.csv").exists()


def test_first_jumps_of_kept_networks(jumps, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(jumps.SUITES, "jump-baselines", {"methods": {"one": "ppo_pisco.py --head-layers 1"}})
    torch.manual_seed(0)
    args, obs_shape = ppo_pisco.Args(ssl="pisco", head_layers=1), (1, 60, 60)
    agent = ppo_pisco.Agent(args, ppo_pisco.Encoder(args, obs_shape), obs_shape, 2)
    for seed in range(1, 11):
        folder = jumps.weights_folder(tmp_path, f"ppo_pisco.py --head-layers 1 --seed {seed}".split())
        folder.mkdir(parents=True)
        with torch.no_grad():
            agent.actor[-1].weight.zero_()
            agent.actor[-1].bias[:] = torch.tensor([0.0, 1.0 if seed == 1 else -1.0])
        ppo_pisco.safetensors.torch.save_model(agent, folder / "model.safetensors")
        (folder / "args.json").write_text(json.dumps(asdict(args)))
    assert jumps.main() == 0
    assert "70 tasks played, 70 not solved" in capsys.readouterr().out
    with open(tmp_path / "jump_moments.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["greedy"] for row in rows] == ["0"] * 7 + [""] * 63
    first = {"method": "one", "seed": "1", "obstacle": "20", "floor": "18", "right": "6", "greedy": "0"}
    assert rows[0] == first | {"reach": f"{(1 / (1 + np.e)) ** 6:.6f}"}


def test_kept_first_jumps_agree_with_the_runs_evaluations(monkeypatch):
    plot = load("plot", monkeypatch)
    with open(plot.RESULTS / "jump_moments.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        run = plot.folder_of(plot.RESULTS, "jump-baselines", row["method"]) / row["seed"]
        solved = json.loads((run / "evaluation.json").read_text())["greedy"]["solved"]
        assert solved[f"{row['obstacle']}:{row['floor']}"] == (row["greedy"] == row["right"])
    assert len(rows) == 7 * 10 * len(plot.SUITES["jump-baselines"]["methods"])


def test_first_jumps_are_counted_in_the_text():
    with open(ROOT / "benchmark" / "results" / "jump_moments.csv") as file:
        rows = list(csv.DictReader(file))
    kept = [(int(row["right"]), int(row["greedy"])) for row in rows if row["greedy"]]
    rights, early = {right for right, _ in kept}, [greedy for right, greedy in kept if greedy < right]
    late, never = sum(greedy > right for right, greedy in kept), [row["method"] for row in rows if not row["greedy"]]
    page = " ".join((ROOT / "benchmark" / "README.md").read_text().split())
    unsolved = len(early) + late + len(never)
    assert f"Of the {len(rows)} target tasks of all runs {unsolved} are not solved: in {len(early)} of them" in page
    assert f"in {sum(greedy in rights for greedy in early)} of these at the very moment" in page
    linear = never.count("frozen, linear head")
    assert f"in {late} too late, and in {len(never)} it never jumps, {linear} of them with the linear head" in page
