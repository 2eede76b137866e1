"""Bad input ends with exit code 2 and one line on stderr that names the flag or the file, and leaves nothing behind."""

import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import ROOT, Bomb, encoder_file, kill_at, snapshot
from drqv2_common import assert_same_end, command, resume, shorten_episodes, train, train_until_killed
from drqv2_pisco import Args, DMCPixels, Encoder, save_encoder

import drqv2_pisco


@pytest.fixture(autouse=True)
def short(monkeypatch):
    shorten_episodes(monkeypatch)


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(flags, *words): the run is refused with one line that has all the words, and nothing is written."""

    def refused(flags, *words):
        runs = tmp_path / "runs"
        error = error_of(capsys, command(runs, flags))
        for word in words:
            assert word in error
        assert not runs.exists()
        return error

    return refused


def error_of(capsys, argv):
    """The one line on stderr of a command line that must fail with exit code 2."""
    capsys.readouterr()
    assert drqv2_pisco.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("drqv2_pisco.py: error: ")
    return line


# --- Values ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flag, value",
    [
        *((flag, value) for flag in (
            "image-size", "frame-stack", "action-repeat", "total-frames", "batch-size", "nstep", "feature-dim",
            "hidden-dim", "update-every", "stddev-steps", "replay-size", "projector-dim", "checkpoint-interval",
            "eval-episodes",
        ) for value in ("0", "-1")),
        *((flag, value) for flag in ("learning-rate", "stddev-clip", "pisco-std")
          for value in ("0", "-1", "nan", "inf")),
        *((flag, "-1") for flag in ("seed", "torch-threads", "eval-interval", "ssl-coef", "shift-pixels", "seed-frames",
                                    "explore-steps", "stddev-start", "stddev-end")),
        *((flag, value) for flag in ("gamma", "tau", "curl-tau") for value in ("-0.1", "1.1", "nan")),
        *(("ssl-fraction", value) for value in ("0", "-0.5", "1.5", "nan")),
        *((flag, "nan") for flag in ("ssl-coef", "stddev-start", "stddev-end")),
        *((flag, "9" * 30) for flag in ("hidden-dim", "feature-dim", "projector-dim", "shift-pixels", "torch-threads",
                                        "image-size", "batch-size", "frame-stack", "total-frames", "action-repeat",
                                        "nstep")),
        *((flag, "1e300") for flag in ("stddev-start", "stddev-end", "stddev-clip", "pisco-std")),
        ("pisco-std", "1e-300"), ("eval-interval", "1"),
        ("seed", "4294967296"), ("total-frames", "1"), ("image-size", "14"), ("nstep", "20"), ("nstep", "500"),
        ("batch-size", "2.5"), ("batch-size", "many"), ("ssl", "bogus"), ("augmentation", "cutout"),
        ("render-quality", "low"), ("pisco-std", "constant"), ("freeze-layers", "5"), ("freeze-layers", "-1"),
        ("freeze-layers", "most"),
    ],
)  # fmt: skip
def test_value_that_no_run_can_have(refused, flag, value):
    refused(f"--freeze-random --{flag} {value}", f"--{flag}")


def test_freeze_layers_names_the_range(refused):
    assert "0..4" in refused("--freeze-random --freeze-layers 5")


def test_schedule_that_ends_at_zero(refused):
    refused("--pisco-std schedule --stddev-end 0", "--stddev-end", "--pisco-std")


def test_unknown_flag(refused):
    refused("--freeze-layer 2", "--freeze-layer")


def test_track_without_wandb(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused("--track", "--track", "pip install wandb")


# --- Environments ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "env_id, suggestion",
    [("cartpole_swingup", "cartpole-swingup"), ("walker-wlak", "walker-walk"), ("cup-catch", "ball_in_cup-catch"),
     ("nonsense", "walker-walk"), ("Pong-v5", "")],
)  # fmt: skip
def test_unknown_environment_gets_suggestions(refused, env_id, suggestion):
    assert suggestion in refused(f"--env-id {env_id}", f"--env-id {env_id}").partition("did you mean ")[2]


def test_environment_whose_episodes_have_no_end(refused):
    refused("--env-id lqr-lqr_2_1", "--env-id lqr-lqr_2_1")


def test_no_renderer_works(tmp_path):
    """Without EGL and OSMesa, or with a renderer that does not exist: the package to install is named."""
    for value in ("osmesa", "nonsense"):
        if (
            value == "osmesa"
            and subprocess.run(
                [sys.executable, "-c", drqv2_pisco.RENDER_PROBE],
                env=os.environ | {"MUJOCO_GL": "osmesa"},
                capture_output=True,
            ).returncode
            == 0
        ):
            continue  # it is installed here
        done = subprocess.run(
            [sys.executable, ROOT / "drqv2_pisco.py", *command(tmp_path / "runs")], capture_output=True, text=True,
            env=os.environ | {"MUJOCO_GL": value}, timeout=100,
        )  # fmt: skip
        assert done.returncode == 2 and not (tmp_path / "runs").exists()
        (line,) = done.stderr.splitlines()
        assert "MUJOCO_GL" in line and "apt-get install libegl1" in line and "libosmesa6" in line


@pytest.mark.parametrize("renderer", ["", "egl"])
def test_missing_dm_control_is_not_called_a_missing_renderer(refused, monkeypatch, renderer):
    monkeypatch.setenv("MUJOCO_GL", renderer)
    monkeypatch.setattr(drqv2_pisco.importlib.util, "find_spec", lambda name: None)
    assert "apt-get" not in refused("", "dm_control is not installed", "pip install dm-control")


def test_why_no_renderer_works(monkeypatch):
    failed = subprocess.CompletedProcess([], returncode=1, stderr="a trace\nImportError: the reason\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    for name in [name for name in sys.modules if name == "dm_control._render"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("MUJOCO_GL", "")
    with pytest.raises(drqv2_pisco.UsageError, match=r"\(ImportError: the reason\); install EGL"):
        drqv2_pisco.choose_renderer()


def test_the_users_renderer_is_kept_and_egl_comes_first(monkeypatch):
    tried = []

    def probe(argv, env, **_):
        tried.append(env["MUJOCO_GL"])
        return subprocess.CompletedProcess(argv, returncode=len(tried) < 2)  # the first one fails

    monkeypatch.setattr(subprocess, "run", probe)
    for name in [name for name in sys.modules if name == "dm_control._render"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    drqv2_pisco.choose_renderer()
    assert not tried and os.environ["MUJOCO_GL"] == "glfw"
    monkeypatch.setenv("MUJOCO_GL", "")
    drqv2_pisco.choose_renderer()
    assert tried == ["egl", "osmesa"] and os.environ["MUJOCO_GL"] == "osmesa"


def test_rendering_that_fails(refused, monkeypatch):
    def failing(self):
        raise RuntimeError("no display")

    monkeypatch.setattr(DMCPixels, "_observe", failing)
    refused("", "no display", "apt-get install libegl1")


# --- Encoder weights -------------------------------------------------------------------------------------------------
@pytest.fixture
def weights(tmp_path):
    """Writes an encoder file for the tiny run, with changed tensors or metadata, and returns its path."""

    def weights(tensors=None, **changes):
        path = tmp_path / "weights.safetensors"
        save_encoder(path, Encoder((9, 24, 24)), Args(), (9, 24, 24), 0)
        if tensors is not None or changes:
            old, metadata = encoder_file(path)
            safetensors.torch.save_file((tensors or dict)(old), path, metadata | changes)
        return path

    return weights


def test_weights_missing(refused, tmp_path):
    refused(f"--encoder-weights {tmp_path}/nothing.safetensors", f"{tmp_path}/nothing.safetensors", "--encoder-weights")
    refused(f"--encoder-weights {tmp_path}", f"--encoder-weights {tmp_path}")  # a directory


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_weights_cut_short(refused, weights, keep):
    path = weights()
    path.write_bytes(path.read_bytes()[:keep])
    refused(f"--encoder-weights {path}", f"--encoder-weights {path}")


def test_weights_are_a_pickle_in_disguise(refused, tmp_path):
    path, marker = tmp_path / "weights.safetensors", tmp_path / "marker"
    for write in (pickle.dump, torch.save):
        with open(path, "wb") as file:
            write({"layers.0.0.weight": Bomb(marker)}, file)
        refused(f"--encoder-weights {path}", f"--encoder-weights {path}")
        assert not marker.exists()


def test_weights_for_other_images(refused, weights):
    path = weights()
    refused(f"--encoder-weights {path} --frame-stack 2", str(path), "[9, 24, 24]", "--frame-stack")


CHANGES = {
    "nan": lambda old: old | {"layers.0.0.bias": torch.full((32,), math.nan)},
    "half precision": lambda old: {name: value.half() for name, value in old.items()},
    "extra": lambda old: old | {"layers.9.0.bias": torch.zeros(32)},
    "missing": lambda old: {name: value for name, value in old.items() if name != "layers.0.0.bias"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_with_wrong_tensors(refused, weights, change):
    path = weights(CHANGES[change])
    refused(f"--encoder-weights {path}", f"--encoder-weights {path}")


def test_weights_of_another_architecture(refused, weights):
    path = weights(architecture="nature")
    refused(f"--encoder-weights {path}", str(path), "nature", "drqv2")
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)  # no metadata
    refused(f"--encoder-weights {path}", str(path))


def test_freezing_random_weights(refused):
    for count in ("1", "all"):
        refused(f"--freeze-layers {count}", "--freeze-layers", "--freeze-random")


def test_nothing_shipped_for_an_environment(refused):
    refused("--env-id walker-run --encoder-weights shipped --freeze-layers 1", "--encoder-weights", "walker-run")


# --- Room ------------------------------------------------------------------------------------------------------------
def test_replay_too_large(refused, monkeypatch):
    flags = "--replay-size 2000000000 --total-frames 8000000000 --image-size 84"  # 39 TiB
    refused(flags, "--replay-size 2000000000", "--total-frames 8000000000", "GiB memory")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 0))
    refused("", "--replay-size", "free disk", "--runs-dir")


def test_replay_too_small(refused):
    refused("--replay-size 100", "--replay-size 100", "--checkpoint-interval 80")


@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_runs_dir_is_a_file(tmp_path, capsys, below):
    (tmp_path / "file").write_text("mine")
    assert f"--runs-dir {tmp_path}/file{below}" in error_of(capsys, command(f"{tmp_path}/file{below}"))
    assert snapshot(tmp_path) == {"file": b"mine"}


# --- Resume ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        shorten_episodes(patch)
        return train(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """A run killed after its second checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        shorten_episodes(patch)
        kill_at(patch, drqv2_pisco, "update", 22)
        return train_until_killed(tmp_path_factory.mktemp("stopped"))


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return shutil.copytree(stopped_once, tmp_path / stopped_once.name)


def test_resume_of_no_run(tmp_path, capsys):
    for path in (tmp_path / "nothing", tmp_path):
        assert f"--resume {path}" in error_of(capsys, ["--resume", str(path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag, value", [("batch-size", "4"), ("ssl", "none"), ("total-frames", "480")])
def test_resume_with_another_argument(stopped, capsys, flag, value):
    before = snapshot(stopped)
    assert f"--{flag} {value}" in error_of(capsys, ["--resume", str(stopped), f"--{flag}", value])
    assert snapshot(stopped) == before


@pytest.mark.parametrize("text", ["", "{", "3", "null", "{}", '{"batch_size": 4}', "\xff\xfe"])
def test_resume_with_damaged_arguments(stopped, capsys, text):
    (stopped / "args.json").write_text(text, encoding="latin1")
    assert str(stopped) in error_of(capsys, ["--resume", str(stopped)])


@pytest.mark.filterwarnings("ignore:The field")
@pytest.mark.parametrize("name, value", [("batch_size", "four"), ("batch_size", 0), ("hidden_dim", 32),
                                         ("image_size", 26), ("ssl", "curl"), ("total_frames", 480),
                                         ("seed", 2)])  # fmt: skip
def test_resume_with_edited_arguments(stopped, capsys, name, value):
    saved = json.loads((stopped / "args.json").read_text())
    (stopped / "args.json").write_text(json.dumps(saved | {name: value}))
    error_of(capsys, ["--resume", str(stopped)])


@pytest.mark.parametrize("damage", [b"", b"garbage", 1000])
def test_resume_with_both_checkpoints_damaged(stopped, capsys, damage):
    for path in stopped.glob("checkpoint*.pt"):
        path.write_bytes(path.read_bytes()[:damage] if isinstance(damage, int) else damage)
    assert f"{stopped}/checkpoint.pt" in error_of(capsys, ["--resume", str(stopped)])


@pytest.mark.parametrize("how", ["missing", "cut short"])
def test_resume_with_a_damaged_replay(stopped, capsys, how):
    path = stopped / "replay.bin"
    path.unlink() if how == "missing" else os.truncate(path, path.stat().st_size // 2)
    before = snapshot(stopped)
    assert str(path) in error_of(capsys, ["--resume", str(stopped)])
    assert snapshot(stopped) == before


def test_resume_with_damaged_metrics(stopped, capsys):
    (stopped / "metrics.csv").write_text("some,thing\nelse,1\n")
    assert str(stopped) in error_of(capsys, ["--resume", str(stopped)])


def test_resume_of_the_untouched_copy(stopped, finished):
    assert_same_end(resume(stopped), finished)


# --- Numbers that run away -------------------------------------------------------------------------------------------
def test_loss_that_is_not_finite(stopped, finished, capsys, monkeypatch):
    checkpoint = (stopped / "checkpoint.pt").read_bytes()
    real = drqv2_pisco.pisco_loss
    with monkeypatch.context() as patch:
        patch.setattr(drqv2_pisco, "pisco_loss", lambda *args: real(*args) * math.inf)
        error = error_of(capsys, ["--resume", str(stopped)])
    assert "not finite" in error and "--learning-rate" in error
    assert (stopped / "checkpoint.pt").read_bytes() == checkpoint
    assert_same_end(resume(stopped), finished)


@pytest.mark.parametrize("text", [None, "", "[]", '{"metrics": 3}', '{"metrics": {"eval": "high"}}'])
def test_resume_of_a_finished_run_without_its_evaluation(finished, tmp_path, capsys, text):
    folder = shutil.copytree(finished, tmp_path / "copy")
    path = folder / "evaluation.json"
    path.unlink() if text is None else path.write_text(text)
    assert str(path) in error_of(capsys, ["--resume", str(folder)])


# --- Limits of the machine -------------------------------------------------------------------------------------------
def test_full_disk(stopped, finished):
    """Files can't grow beyond a size: the run ends with one line and goes on once there is room."""

    def set_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file too large is an error of write(), as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # a checkpoint has more

    code = "import sys, pytest; from drqv2_common import *; shorten_episodes(pytest.MonkeyPatch()); "
    code += "sys.exit(drqv2_pisco.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "--resume", str(stopped)], preexec_fn=set_limit, capture_output=True, text=True,
        timeout=100, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("drqv2_pisco.py: error: ") and "--resume" in done.stderr
    assert_same_end(resume(stopped), finished)


def test_error_of_the_program_itself(tmp_path):
    """As the user sees it: nothing on stderr but the line, and the exit code of the process."""
    done = subprocess.run(
        [sys.executable, ROOT / "drqv2_pisco.py", "--nstep", "0", "--runs-dir", tmp_path / "runs"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "drqv2_pisco.py: error: --nstep 0: must be positive\n"
    assert not (tmp_path / "runs").exists()
