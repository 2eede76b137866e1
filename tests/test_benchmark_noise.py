"""Trained policies under noise: the same as without any where there is none, and one row a run."""

import shutil
import sys

import pytest
from benchmark_common import load
from conftest import evaluation, train


@pytest.fixture
def noise(monkeypatch, tmp_path):
    """benchmark/noise.py with a suite `tiny` of one kept run, whose networks are here, and one of another machine."""
    module = load("noise", monkeypatch)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    suite = {"program": "ppo_pisco.py", "methods": {"here": "--ssl none", "far": "--ssl curl"}}
    monkeypatch.setitem(sys.modules["suites"].SUITES, "tiny", suite)
    module.folder = train(tmp_path, "--jump-prior 0.5 --jump-tasks 20:10,30:20 --jump-eval-tasks 14:5,20:5,45:20")
    shutil.copytree(module.folder, module.weights_folder(module.WORK, module.Run("tiny", "here", 1).flags))
    module.append(module.RESULTS / "tiny" / "runs.csv", [{"method": x, "seed": 1} for x in ("here", "far")])
    return module


def test_without_noise_it_is_the_evaluations(noise):
    metrics = evaluation(noise.folder)["metrics"]
    wanted = [metrics["eval/greedy_success"], metrics["eval/greedy_unseen_success"]]
    assert noise.success_under_noise(noise.folder, 0.0, 2) == wanted


def test_noise_reaches_the_policy_and_its_draws_differ(noise, monkeypatch):
    seen, real = [], noise.ppo_pisco.Agent.forward
    monkeypatch.setattr(noise.ppo_pisco.Agent, "forward", lambda self, obs: seen.append(obs) or real(self, obs))
    first = noise.success_under_noise(noise.folder, 64.0, 2)
    steps = len(seen)
    assert first == noise.success_under_noise(noise.folder, 64.0, 2)  # the same every time
    assert all(a.equal(b) for a, b in zip(seen[:steps], seen[steps:], strict=True))
    starts = [obs for obs in seen[:steps] if len(obs) == 5]  # both draws begin with all five tasks
    assert len({obs[0].float().sum().item() for obs in starts}) == len(starts) > 2
    clean = noise.ppo_pisco.JumpVectorEnv(5, [(20, 10), (30, 20), (14, 5), (20, 5), (45, 20)])
    obs, _ = clean.reset(options={"task_ids": range(5)})
    difference = seen[0].float().numpy() - obs
    inside = difference[(obs > 0) & (obs < 255)]  # grey: not cut off at once
    assert 50 < inside.std() < 75 and seen[0].shape == (5, 1, 60, 60)


def test_a_row_a_run_and_none_twice(noise, capsys, monkeypatch):
    monkeypatch.setattr(noise, "success_under_noise", lambda folder, std, draws: [std / 128, draws / 10])
    noise.main(["tiny"])
    assert "2 runs, 0 played, networks of 1 others are here" in capsys.readouterr().out
    noise.main(["tiny", "--std", "32"])
    noise.main(["tiny"])
    assert "2 runs, 1 played, networks of 0 others" in capsys.readouterr().out
    rows = noise.read_table(noise.RESULTS / "tiny" / "noise.csv")
    common = {"method": "here", "seed": "1", "draws": "5", "greedy_unseen_success": "0.5"}
    assert rows == [
        common | {"std": std, "greedy_success": score} for std, score in (("64.0", "0.5"), ("32.0", "0.25"))
    ]
