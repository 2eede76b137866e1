"""Bad input ends with exit code 2 and one line on stderr that names the flag or the file, and leaves nothing behind."""

import errno
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
from conftest import (
    ROOT, Bomb, assert_same_end, command, encoder_file, kill_at, resume, snapshot, train, train_until_killed,
)  # fmt: skip
from ppo_pisco import Args, Encoder, save_encoder

import ppo_pisco

pytestmark = pytest.mark.usefixtures("small_grid")


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
    assert ppo_pisco.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ppo_pisco.py: error: ")
    return line


# --- Values ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flag, value",
    [
        *((flag, value) for flag in ("num-envs", "num-steps", "num-minibatches", "update-epochs", "feature-dim",
                                     "projector-dim", "checkpoint-interval", "eval-episodes") for value in ("0", "-1")),
        *(("learning-rate", value) for value in ("0", "-1e-3", "nan", "inf")),
        *((flag, "-1") for flag in ("seed", "torch-threads", "eval-interval", "ssl-coef", "shift-pixels", "ent-coef",
                                    "vf-coef", "max-grad-norm", "clip-coef")),
        *((flag, value) for flag in ("gamma", "gae-lambda", "curl-tau") for value in ("-0.1", "1.1", "nan")),
        *(("ssl-fraction", value) for value in ("0", "-0.5", "1.5", "nan")),
        *(("jump-prior", value) for value in ("0", "1", "nan")),
        *((flag, "nan") for flag in ("reward-scale", "jump-reward", "ssl-coef", "clip-coef")),
        *((flag, "inf") for flag in ("ssl-coef", "ent-coef", "vf-coef")),
        *(("target-kl", value) for value in ("nan", "inf", "0", "-0.1")),
        *((flag, "9" * 30) for flag in ("feature-dim", "projector-dim", "shift-pixels", "torch-threads", "num-envs",
                                        "total-timesteps")),
        ("seed", "4294967296"),  # more than 32 bits
        ("total-timesteps", "0"), ("total-timesteps", "31"), ("total-timesteps", "-32"),  # no iteration of 4 x 8 steps
        ("num-minibatches", "3"),  # does not divide 32
        ("num-minibatches", "32"),  # leaves one row to each
        ("num-envs", "2.5"), ("num-envs", "many"), ("ssl", "bogus"), ("encoder", "resnet"), ("augmentation", "cutout"),
        ("freeze-layers", "5"), ("freeze-layers", "-1"), ("freeze-layers", "most"),
        *(("jump-tasks", tasks) for tasks in ("nowhere", "20", "20:10,", "20:10;30:20", "9" * 5000 + ":10")),
        *(("jump-tasks", tasks) for tasks in ("13:10", "48:10", "20:41", "20:-1")),
    ],
)  # fmt: skip
def test_value_that_no_run_can_have(refused, flag, value):
    refused(f"--freeze-random --{flag} {value}", f"--{flag}")


def test_freeze_layers_names_the_range(refused):
    assert "0..4" in refused("--freeze-random --freeze-layers 5")
    assert "0..10" in refused("--freeze-random --freeze-layers 11 --encoder impala")


def test_unknown_flag(refused):
    refused("--freeze-layer 2", "--freeze-layer")
    refused("--bogus", "--bogus")


def test_track_without_wandb(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused("--track", "--track", "pip install wandb")


def test_seed_that_envpool_cannot_take(refused):
    refused("--env-id Pong-v5 --seed 2147483647", "--seed")


# --- Environments ----------------------------------------------------------------------------------------------------
NEAR = {
    "Jump-v1": "Jump-v0",
    "Pongg-v5": "Pong-v5",
    "ALE/Pong-v5": "Pong-v5",
    "TinyImag-v0": "TinyImage-v0",
    "Hoper-v5": "Hopper-v5",
}


@pytest.mark.parametrize("env_id, suggestion", NEAR.items())
def test_unknown_environment_gets_suggestions(refused, env_id, suggestion):
    error = refused(f"--env-id {env_id}", f"--env-id {env_id}")
    suggestions = error.partition("did you mean ")[2].rstrip("?").split(", ")
    assert suggestion in suggestions and len(suggestions) == len(set(suggestions))


@pytest.mark.parametrize("env_id", ["nonsense", "a/b:c", "conftest:Env-v0"])
def test_unknown_environment(refused, env_id):
    refused(f"--env-id {env_id}", f"--env-id {env_id}")


@pytest.mark.filterwarnings("ignore:.*Box (low|high)'s precision")
@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id CartPole-v1", ("--env-id CartPole-v1", "images")),
        ("--env-id Taxi-v3", ("--env-id Taxi-v3", "images")),  # a single number
        ("--env-id HalfCheetah-v4", ("--env-id HalfCheetah-v4", "images")),  # EnvPool's
        ("--env-id TinyImageContinuous-v0", ("--env-id TinyImageContinuous-v0", "Discrete")),
        ("--env-id HalfCheetah-v2", ("--env-id HalfCheetah-v2", "mujoco")),  # its module is gone
        ("--env-id no_such_module:Env-v0", ("--env-id no_such_module:Env-v0", "No module named 'no_such_module'")),
        ("--env-id TinyImageSmall-v0", ("--encoder nature", "20x20")),
    ],
)
def test_environment_that_does_not_fit(refused, flags, words):
    refused(flags, *words)


# --- Encoder weights -------------------------------------------------------------------------------------------------
@pytest.fixture
def weights(tmp_path):
    """Writes an encoder file for the tiny run, with changed tensors or metadata, and returns its path."""

    def weights(tensors=None, **changes):
        path = tmp_path / "weights.safetensors"
        save_encoder(path, Encoder("nature", (1, 60, 60), 32), Args(feature_dim=32), (1, 60, 60), 0)
        if tensors is not None or changes:
            old, metadata = encoder_file(path)
            safetensors.torch.save_file((tensors or dict)(old), path, metadata | changes)
        return path

    return weights


def test_weights_missing(refused, tmp_path):
    refused(f"--encoder-weights {tmp_path}/nothing.safetensors", f"{tmp_path}/nothing.safetensors", "--encoder-weights")


def test_weights_are_a_directory(refused, tmp_path):
    refused(f"--encoder-weights {tmp_path}", f"--encoder-weights {tmp_path}")


@pytest.mark.parametrize("keep", [0, 4, 100, 1000, -1])
def test_weights_cut_short(refused, weights, keep):
    path = weights()
    path.write_bytes(path.read_bytes()[:keep])
    refused(f"--encoder-weights {path}", f"--encoder-weights {path}")


@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_weights_are_a_pickle_in_disguise(refused, tmp_path, protocol):
    path, marker = tmp_path / "weights.safetensors", tmp_path / "marker"
    bomb = {"layers.0.0.weight": Bomb(marker)}
    with open(path, "wb") as file:
        pickle.dump(bomb, file, 2) if protocol == "pickle" else torch.save(bomb, file)
    refused(f"--encoder-weights {path}", f"--encoder-weights {path}")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker))).close()
    assert marker.exists()  # as unpickling would have made it


def test_weights_of_another_architecture(refused, weights):
    path = weights()
    refused(f"--encoder-weights {path} --encoder impala", str(path), "nature", "impala")
    refused(f"--encoder-weights {weights(architecture='resnet')}", str(path), "resnet", "nature")


def test_weights_without_metadata(refused, weights):
    path = weights()
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    refused(f"--encoder-weights {path}", str(path))


@pytest.mark.parametrize("flags", ["--feature-dim 16", "--env-id TinyImage-v0"])
def test_weights_of_another_shape(refused, weights, flags):
    path = weights()
    refused(f"--encoder-weights {path} {flags}", str(path), "[1, 60, 60]", "32")


def test_weights_for_other_images(refused, weights):
    # 63 x 63 pixels lead to the same tensors as 60 x 60.
    path = weights(observation_shape="[1, 63, 63]")
    refused(f"--encoder-weights {path}", str(path), "[1, 63, 63]", "[1, 60, 60]")


CHANGES = {
    "nan": lambda old: old | {"layers.0.0.bias": torch.full((32,), math.nan)},
    "infinite": lambda old: old | {"layers.0.0.bias": torch.full((32,), math.inf)},
    "half precision": lambda old: {name: value.half() for name, value in old.items()},
    "integers": lambda old: old | {"layers.0.0.bias": torch.zeros(32, dtype=torch.int32)},
    "extra": lambda old: old | {"layers.9.0.bias": torch.zeros(32)},
    "missing": lambda old: {name: value for name, value in old.items() if name != "layers.0.0.bias"},
    "renamed": lambda old: {name.replace("layers", "conv"): value for name, value in old.items()},
    "transposed": lambda old: old | {"layers.3.1.weight": old["layers.3.1.weight"].T.contiguous()},
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_with_wrong_tensors(refused, weights, change):
    path = weights(CHANGES[change])
    refused(f"--encoder-weights {path}", f"--encoder-weights {path}")


def test_freezing_random_weights(refused):
    for count in ("1", "all"):
        refused(f"--freeze-layers {count}", "--freeze-layers", "--freeze-random")


def test_nothing_shipped_for_an_environment(refused):
    refused("--env-id TinyImage-v0 --encoder-weights shipped --freeze-layers 1", "--encoder-weights", "TinyImage-v0")


# --- Run folders -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("below", ["", "/deeper/still"])
def test_runs_dir_is_a_file(tmp_path, capsys, below):
    (tmp_path / "file").write_text("mine")
    assert f"--runs-dir {tmp_path}/file{below}" in error_of(capsys, command(f"{tmp_path}/file{below}"))
    assert snapshot(tmp_path) == {"file": b"mine"}


def test_no_room_for_the_run_folder(tmp_path, capsys, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    error = error_of(capsys, command(tmp_path / "runs"))
    assert "--runs-dir" in error and "No space left" in error
    assert not list(tmp_path.glob("runs/*"))


@pytest.fixture
def stopped(tmp_path):
    """A run killed in its third iteration, with checkpoints of iterations 2 and 1."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 3)
        return train_until_killed(tmp_path / "stopped")


def test_resume_of_no_run(tmp_path, capsys):
    for path in (tmp_path / "nothing", tmp_path):
        assert f"--resume {path}" in error_of(capsys, ["--resume", str(path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag, value", [("num-envs", "8"), ("seed", "2"), ("ssl", "none"), ("freeze-layers", "1"),
                                         ("total-timesteps", "256"), ("runs-dir", "elsewhere")])  # fmt: skip
def test_resume_with_another_argument(stopped, capsys, flag, value):
    before = snapshot(stopped)
    assert f"--{flag} {value}" in error_of(capsys, ["--resume", str(stopped), f"--{flag}", value])
    assert snapshot(stopped) == before


def test_resume_with_an_unknown_argument(stopped, capsys):
    assert "--bogus" in error_of(capsys, ["--resume", str(stopped), "--bogus", "1"])


@pytest.mark.parametrize("text", ["", "{", "3", "null", "[]", "{}", '{"num_envs": 4}', "\xff\xfe"])
def test_resume_with_damaged_arguments(stopped, capsys, text):
    (stopped / "args.json").write_text(text, encoding="latin1")
    before = snapshot(stopped)
    assert str(stopped) in error_of(capsys, ["--resume", str(stopped)])
    assert snapshot(stopped) == before


@pytest.mark.filterwarnings("ignore:The field")
@pytest.mark.parametrize("name, value", [("num_envs", "four"), ("num_envs", None), ("num_envs", 0), ("ssl", "bogus"),
                                         ("num_envs", 8), ("feature_dim", 64), ("encoder", "impala"),
                                         ("encoder", "bogus"), ("norm_adv", 1), ("seed", 2),
                                         ("jump_tasks", "grid")])  # fmt: skip
def test_resume_with_edited_arguments(stopped, capsys, name, value):
    """Arguments of the wrong type, and others than those the checkpoint was made with."""
    saved = json.loads((stopped / "args.json").read_text())
    (stopped / "args.json").write_text(json.dumps(saved | {name: value}))
    message = error_of(capsys, ["--resume", str(stopped)])
    assert f"--{name.replace('_', '-')} {value!r}: must be" in message or "the checkpoint does not belong" in message


@pytest.mark.parametrize("damage", [b"", b"garbage", 1000, -1000])
def test_resume_with_both_checkpoints_damaged(stopped, capsys, damage):
    for path in stopped.glob("checkpoint*.pt"):
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(whole[:damage] if isinstance(damage, int) else damage)
    before = snapshot(stopped)
    assert f"{stopped}/checkpoint.pt" in error_of(capsys, ["--resume", str(stopped)])
    assert snapshot(stopped) == before


@pytest.mark.parametrize("content", [[], {}, {"iteration": 1}, 3])
def test_resume_with_a_checkpoint_of_something_else(stopped, capsys, content):
    for path in stopped.glob("checkpoint*.pt"):
        path.unlink()
        torch.save(content, path)
    assert str(stopped) in error_of(capsys, ["--resume", str(stopped)])


@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_resume_with_a_pickle_in_disguise(stopped, tmp_path, capsys, protocol):
    marker = tmp_path / "marker"
    for path in stopped.glob("checkpoint*.pt"):
        path.unlink()
        with open(path, "wb") as file:
            pickle.dump(Bomb(marker), file, 2) if protocol == "pickle" else torch.save({"agent": Bomb(marker)}, file)
    assert f"{stopped}/checkpoint.pt" in error_of(capsys, ["--resume", str(stopped)])
    assert not marker.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "some,thing\nelse,1\n",
        lambda text: text.replace("global_step", "global_step,further", 1),
        lambda text: text.replace(",losses/pisco", "", 1),
        lambda text: text.replace("\r\n", ",1\r\n").replace(",1", "", 1),  # a cell too many in every row
    ],
)
def test_resume_with_damaged_metrics(stopped, capsys, damage):
    text = (stopped / "metrics.csv").read_bytes().decode()
    (stopped / "metrics.csv").write_bytes(damage(text).encode())
    assert str(stopped) in error_of(capsys, ["--resume", str(stopped)])


def test_full_disk_after_a_damaged_checkpoint(stopped, finished, capsys, monkeypatch):
    """The previous checkpoint, from which the run goes on, outlives a first new one that can't be written."""
    (stopped / "checkpoint.pt").unlink()
    (stopped / "checkpoint.pt").write_bytes(b"damaged")
    real = ppo_pisco.write_atomically

    def full(path, write):
        if path.name == "checkpoint.pt":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(ppo_pisco, "write_atomically", full)
        assert "No space left" in error_of(capsys, ["--resume", str(stopped)])
    assert_same_end(resume(stopped), finished)


# --- Numbers that run away -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags", ["", "--num-minibatches 1 --update-epochs 1"])
def test_loss_that_is_not_finite(tmp_path, capsys, flags):
    error = error_of(capsys, command(tmp_path, f"--learning-rate 1e30 {flags}"))
    assert "not finite" in error and "--learning-rate" in error
    for path in tmp_path.glob("*/checkpoint*.pt"):
        assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["agent"].values())


def test_loss_that_is_not_finite_leaves_the_last_good_checkpoint(stopped, finished, capsys, monkeypatch):
    real = ppo_pisco.pisco_loss
    with monkeypatch.context() as patch:
        patch.setattr(ppo_pisco, "pisco_loss", lambda *args: real(*args) * math.inf)
        error = error_of(capsys, ["--resume", str(stopped)])
    assert "not finite" in error and "--learning-rate" in error and str(stopped) in error
    checkpoint = torch.load(stopped / "checkpoint.pt", weights_only=True)
    assert checkpoint["iteration"] == 2 and all(value.isfinite().all() for value in checkpoint["agent"].values())
    assert_same_end(resume(stopped), finished)


# --- Limits of the machine -------------------------------------------------------------------------------------------
def limited(argv, limit, size):
    """Runs ppo_pisco.py as a program under a resource limit; returns its exit code and stderr."""

    def set_limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a file too large is an error of write(), as on a full disk
        resource.setrlimit(limit, (size, size))

    done = subprocess.run(
        [sys.executable, ROOT / "ppo_pisco.py", *argv], preexec_fn=set_limit, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_full_disk_keeps_the_previous_checkpoint(stopped, finished):
    code, err = limited(["--resume", str(stopped)], resource.RLIMIT_FSIZE, 2**20)  # a checkpoint has 1.4 MiB
    assert code == 2 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("ppo_pisco.py: error: ") and "--resume" in err
    assert torch.load(stopped / "checkpoint.pt", weights_only=True)["iteration"] == 2
    assert_same_end(resume(stopped), finished)


@pytest.mark.parametrize("size", [2500, 3000, 3500])
def test_full_disk_met_by_tensorboard_first(tmp_path, size):
    """Its thread must not print a trace beside the line."""
    code, err = limited(command(tmp_path, "--checkpoint-interval 100"), resource.RLIMIT_FSIZE, size)
    assert code == 2 and "Traceback" not in err, err
    assert err.splitlines()[-1].startswith("ppo_pisco.py: error: ")
    (folder,) = tmp_path.iterdir()
    resume(folder)


def test_file_system_without_hard_links(tmp_path, monkeypatch, small_grid, finished):
    def refuse(*paths):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    folder = train(tmp_path)
    assert_same_end(folder, finished)
    before, last = (torch.load(folder / f"checkpoint{name}.pt", weights_only=True) for name in (".previous", ""))
    assert (before["iteration"], last["iteration"]) == (3, 4)


@pytest.mark.parametrize("flags", ["", "--env-id Pong-v5"])
def test_rollout_too_large_for_the_memory(tmp_path, flags):
    runs = tmp_path / "runs"
    argv = command(runs, f"{flags} --num-envs 1000000 --num-steps 128 --total-timesteps 128000000")
    code, err = limited(argv, resource.RLIMIT_AS, 6 * 2**30)  # the images alone would have 430 GiB
    assert code == 2 and "Traceback" not in err, err
    assert "--num-envs 1000000" in err.splitlines()[-1]
    assert not runs.exists()


def test_network_too_large_for_the_memory(tmp_path):
    argv = command(tmp_path / "runs", "--feature-dim 65536 --projector-dim 65536")  # the projector alone has 32 GiB
    code, err = limited(argv, resource.RLIMIT_AS, 6 * 2**30)
    assert code == 2 and "Traceback" not in err and "out of memory" in err.splitlines()[-1], err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("error, caught", [(MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory"), True),
                                           (RuntimeError("a defect of ours"), False)])  # fmt: skip
def test_out_of_memory_in_a_run_and_other_errors(tmp_path, capsys, monkeypatch, error, caught):
    def fail(*args):
        raise error

    monkeypatch.setattr(ppo_pisco, "update", fail)
    if caught:
        assert "out of memory" in error_of(capsys, command(tmp_path))
    else:
        with pytest.raises(RuntimeError, match="a defect of ours"):
            ppo_pisco.main(command(tmp_path))


@pytest.mark.parametrize("text", [None, "", "[]", '{"metrics": 3}'])
def test_resume_of_a_finished_run_without_its_evaluation(finished, tmp_path, capsys, text):
    path = shutil.copytree(finished, tmp_path / "copy") / "evaluation.json"
    path.unlink() if text is None else path.write_text(text)
    assert str(path) in error_of(capsys, ["--resume", str(path.parent)])


def test_error_of_the_program_itself(tmp_path):
    """As the user sees it: nothing on stderr but the line, and the exit code of the process."""
    done = subprocess.run(
        [sys.executable, ROOT / "ppo_pisco.py", "--num-envs", "0", "--runs-dir", tmp_path / "runs"],
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ppo_pisco.py: error: --num-envs 0: must be positive\n"
    assert not (tmp_path / "runs").exists()
