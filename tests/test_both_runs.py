"""What both programs' runs do alike: evaluations that fail or are switched off, homes, notebooks, odd file systems."""

import shutil
import sys
from types import SimpleNamespace

import conftest
import drqv2_common
import pytest
from conftest import evaluation, kill_at, metrics

import drqv2_pisco
import ppo_pisco


@pytest.fixture(scope="module", params=["ppo_pisco", "drqv2_pisco"])
def tiny(request, tmp_path_factory):
    """A program, its tiny runs, and one of them that is finished, which tests only read."""
    ppo = request.param == "ppo_pisco"
    module, common = (ppo_pisco, conftest) if ppo else (drqv2_pisco, drqv2_common)
    with pytest.MonkeyPatch.context() as patch:
        drqv2_common.use(patch)
        yield SimpleNamespace(
            module=module, train=common.train, resume=common.resume, train_until_killed=common.train_until_killed,
            short="--total-timesteps 32" if ppo else "--total-frames 80",
            finished=common.train(tmp_path_factory.mktemp("finished")),
        )  # fmt: skip


def test_weights_are_there_before_the_last_evaluation(tmp_path, monkeypatch, tiny):
    """Which may fail: the run's work is not lost, and the evaluation is tried again."""

    def fail(*args):
        raise OSError("the port is in use")

    with monkeypatch.context() as patch:
        patch.setattr(tiny.module, "evaluate", fail)
        with pytest.raises(OSError, match="port"):
            tiny.train(tmp_path, "--eval-interval 0")
        (folder,) = tmp_path.glob("*")
        for _ in range(2):
            assert (folder / "model.safetensors").read_bytes() == (tiny.finished / "model.safetensors").read_bytes()
            assert (folder / "encoder.safetensors").exists() and not (folder / "evaluation.json").exists()
            with pytest.raises(OSError, match="port"):
                tiny.resume(folder)
    assert (
        evaluation(tiny.resume(folder)) == evaluation(tiny.finished)
        and metrics(folder)[-1] == metrics(tiny.finished)[-1]
    )


OFF = {"--eval-episodes 0": 0, "--eval-episodes -1": 0, "--eval-interval -1": 1}


@pytest.mark.parametrize("flags, count", OFF.items())
def test_evaluations_can_be_switched_off(tmp_path, monkeypatch, tiny, capsys, flags, count):
    calls, real = [], tiny.module.evaluate
    monkeypatch.setattr(tiny.module, "evaluate", lambda *args: calls.append(args) or real(*args))
    folder = tiny.train(tmp_path, f"{flags} --checkpoint-interval -1")
    assert len(calls) == count and (folder / "evaluation.json").exists() == bool(count)
    assert ("\nevaluation: none\n" in capsys.readouterr().out) == (not count)
    assert (folder / "model.safetensors").read_bytes() == (tiny.finished / "model.safetensors").read_bytes()
    assert len(metrics(folder)) == len(metrics(tiny.finished))


def test_home_folder(tmp_path, monkeypatch, tiny):
    """A shell leaves the ~ of `--runs-dir=~/runs` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(tiny.finished / "encoder.safetensors", tmp_path)
    with monkeypatch.context() as patch:
        kill_at(patch, tiny.module, "update", 3)
        folder = tiny.train_until_killed(tmp_path / "runs", "--encoder-weights=~/encoder.safetensors --runs-dir=~/runs")
    again = f"~/runs/{folder.name}"
    tiny.module.train(tiny.module.parse_args([f"--resume={again}"]))
    assert (folder / "model.safetensors").exists() and not (tmp_path / "~").exists()


def test_resume_line_of_a_notebook(tmp_path, monkeypatch, tiny, capsys):
    """Where sys.argv is that of the notebook's kernel."""
    monkeypatch.setattr(sys, "argv", ["/usr/lib/ipykernel_launcher.py", "-f", "kernel.json"])
    folder = tiny.train(tmp_path, tiny.short)
    assert f"\nafter a kill: python {tiny.module.__file__} --resume {folder}\n" in capsys.readouterr().out


def test_file_system_without_locks(tmp_path, monkeypatch, tiny):
    def lockf(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    assert (tiny.train(tmp_path, tiny.short) / "model.safetensors").exists()
