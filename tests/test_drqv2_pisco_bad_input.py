"""The mistakes that people make end a run with one line that names the flag and the remedy, before it begins where that
is possible. What is no mistake of the user's keeps Python's own traceback."""

import math
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT, Bomb, encoder_file, kill_at, metrics, snapshot
from drqv2_common import TinyResumable, assert_same_end, command, error_of, resume, train, train_until_killed, use

import drqv2_pisco
from drqv2_pisco import Args, DMCPixels, Encoder, load_encoder, save_encoder


@pytest.fixture(autouse=True)
def tiny_environment(monkeypatch):
    use(monkeypatch)


@pytest.fixture
def refused(tmp_path):
    """refused(flags, *words): the run is refused with one line that has all the words, and nothing is written."""

    def refused(flags, *words):
        message = error_of(command(tmp_path / "runs", flags))
        for word in words:
            assert word in message
        assert not (tmp_path / "runs").exists()
        return message

    return refused


# --- Runs that train nothing -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags", ["--seed-frames 240", "--seed-frames 1000", "--update-every 120", "--update-every 999"]
)
def test_no_update_before_the_end(refused, flags):
    """Of 120 steps: the first is step 0, when there is no episode yet."""
    refused(flags, "--total-frames 240", "--seed-frames", "--update-every")


@pytest.mark.parametrize("flags", ["--seed-frames 0 --update-every 119", "--seed-frames 232", "--seed-frames 0"])
def test_a_single_update_is_enough(tmp_path, flags):
    assert (train(tmp_path, flags) / "model.safetensors").exists()


def test_run_in_which_no_episode_ends(tmp_path, monkeypatch):
    use(monkeypatch, lambda args: TinyResumable(length=-1))
    message = error_of(command(tmp_path, "--total-frames 120 --eval-max-steps 5"))
    assert message.startswith("--total-frames, --nstep, --replay-size: no episode")
    assert not [path for name in ("replay.bin", "*.safetensors") for path in tmp_path.glob(f"*/{name}")]


@pytest.mark.parametrize(
    "flags, length, steps",
    [
        ("--replay-size 15", 20, 15),
        ("--replay-size 20", 20, 20),
        ("--replay-size 15", -1, 15),
        ("--nstep 25", 20, 20),
        ("--nstep 7", 5, 5),
    ],
)
def test_nothing_can_be_sampled(tmp_path, monkeypatch, flags, length, steps):
    """Every episode is longer than the ring or shorter than a sample: said at once, and the ring is removed."""
    played = []

    class Counted(TinyResumable):
        def step(self, action):
            played.append(action)
            return super().step(action)

    use(monkeypatch, lambda args: Counted(length=length))
    message = error_of(command(tmp_path, flags))
    assert message.startswith("--total-frames, --nstep, --replay-size: no episode") and len(played) <= steps
    assert not list(tmp_path.glob("*/model.safetensors")) and not list(tmp_path.glob("*/replay.bin"))


def test_short_episode_after_others_ends_no_run(tmp_path, monkeypatch):
    """Before the first update, while there is something to sample."""

    class Uneven(TinyResumable):
        def step(self, action):
            self.length = 20 if self.episode % 4 else 2
            return super().step(action)

    use(monkeypatch, lambda args: Uneven())
    folder = train(tmp_path, "--seed-frames 120")
    assert any(row["losses/critic_loss"] for row in metrics(folder))


@pytest.mark.parametrize("share", ["1.01", "-0.1", "nan"])
def test_share_that_is_none(refused, share):
    assert refused(f"--ssl-fraction {share}", "0 to 1").startswith(f"--ssl-fraction {share}: ")


def test_tracking_without_its_package_leaves_no_ring(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError):
        train(tmp_path, "--track")
    assert not list(tmp_path.glob("*/replay.bin"))


# --- Environments ----------------------------------------------------------------------------------------------------
NEAR = {
    "walker_walk": "walker-walk",
    "cartpole_swingup": "cartpole-swingup",
    "walker-wlak": "walker-walk",
    "cup-catch": "ball_in_cup-catch",
    "quadruped_run": "quadruped-run",
    "manipulation-reach_duplo_vision": "manipulation-reach_duplo",
    "Walker-Walk": "walker-walk",
    "nonsense": "walker-walk",
    "Pong-v5": "cartpole-swingup",
    "": "cartpole-swingup",
}


@pytest.mark.parametrize("env_id", NEAR)
def test_unknown_task_gets_suggestions_that_exist(tmp_path, monkeypatch, env_id):
    monkeypatch.undo()
    argv = [*command(tmp_path / "runs"), "--env-id", env_id]
    message = error_of(argv)
    assert message.startswith(f"--env-id {env_id}: ") and not (tmp_path / "runs").exists()
    suggestions = re.findall(r"[\w-]+-[\w-]+", message.partition("did you mean ")[2])
    assert NEAR[env_id] in suggestions

    from dm_control import manipulation, suite

    class Loaded(Exception):
        pass

    def load(*names):
        assert names in suite.ALL_TASKS if len(names) == 2 else names[0] in manipulation.ALL
        raise Loaded

    monkeypatch.setattr(suite, "load", load)
    monkeypatch.setattr(manipulation, "load", load)
    for suggestion in suggestions:
        with pytest.raises(Loaded):
            DMCPixels(suggestion)


@pytest.mark.parametrize("env_id", ["lqr-lqr_2_1", "lqr-lqr_6_2", "lqr_2_1"])
def test_tasks_whose_episodes_never_end_are_not_offered(monkeypatch, env_id):
    monkeypatch.undo()
    with pytest.raises(SystemExit) as stop:
        DMCPixels(env_id)
    assert "lqr" not in stop.value.code.partition("did you mean")[2]


@pytest.mark.parametrize("limit", [1e10, math.inf])
def test_actions_without_limits(monkeypatch, limit):
    """Scaled to them, every action would make the simulation diverge."""
    from dm_control.rl import control
    from dm_env import specs

    monkeypatch.setattr(control.Environment, "action_spec", lambda _: specs.BoundedArray((1,), float, -limit, limit))
    with pytest.raises(SystemExit, match="--env-id cartpole-balance: its actions have no limits"):
        DMCPixels("cartpole-balance", 24, 2, "fast")


# --- Encoder weights -------------------------------------------------------------------------------------------------
@pytest.fixture
def weights(tmp_path):
    """Writes an encoder file for the tiny run, with changed tensors or metadata, and returns its path."""

    def weights(tensors=None, **changes):
        path = tmp_path / "weights.safetensors"
        save_encoder(path, Encoder(Args(), (9, 24, 24)), environment="nowhere", objective="nothing")
        if tensors is not None or changes:
            old, metadata = encoder_file(path)
            safetensors.torch.save_file((tensors or dict)(old), path, metadata | changes)
        return path

    return weights


def test_weights_that_fit(weights, tmp_path, capsys):
    """The fixture's own file is a good one."""
    folder = train(tmp_path / "runs", f"--encoder-weights {weights()} --freeze-layers all --total-frames 80")
    assert "nothing on nowhere" in capsys.readouterr().out
    assert encoder_file(weights())[0].keys() == encoder_file(folder / "encoder.safetensors")[0].keys()


def test_weights_missing(refused, tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path, "None"):
        words = f"--encoder-weights {path}: ", "give a .safetensors file of pretrain_encoder.py, or `none`"
        refused(f"--encoder-weights {path}", *words)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_weights_cut_short(refused, weights, keep):
    path = weights()
    path.write_bytes(path.read_bytes()[:keep])
    refused(f"--encoder-weights {path}", f"--encoder-weights {path}: ")


def test_weights_are_a_pickle_in_disguise(refused, tmp_path):
    path, marker = tmp_path / "weights.safetensors", tmp_path / "marker"
    for write in (pickle.dump, torch.save):
        with open(path, "wb") as file:
            write({"layers.0.0.weight": Bomb(marker)}, file)
        refused(f"--encoder-weights {path}", f"--encoder-weights {path}: ")
        assert not marker.exists()


def test_weights_for_other_images(refused, weights):
    path = weights()  # which doesn't say what a channel is
    refused(
        f"--encoder-weights {path} --frame-stack 2", str(path), "layers.0.0.weight", "[32, 9, 3, 3]", "[32, 6, 3, 3]"
    )
    path = weights(frame_stack="9", image_channels="1")  # nine grey images
    refused(f"--encoder-weights {path}", str(path), "frame_stack 9, this run 3")
    path = weights(frame_stack="3", image_channels="3")
    assert load_encoder(path, Encoder(Args(), (9, 24, 24)))["image_channels"] == "3"


CHANGES = {
    "another shape": lambda old: old | {"layers.3.0.bias": torch.zeros(31)},
    "extra": lambda old: old | {"layers.9.0.bias": torch.zeros(32)},
    "missing": lambda old: {name: value for name, value in old.items() if name != "layers.3.0.bias"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_with_wrong_tensors_are_named(refused, weights, change):
    path = weights(CHANGES[change])
    refused(f"--encoder-weights {path}", f"--encoder-weights {path}: ", "layers.9" if change == "extra" else "layers.3")


def test_weights_of_another_architecture(refused, weights):
    path = weights(architecture="nature")
    refused(f"--encoder-weights {path}", str(path), "nature", "drqv2")
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    refused(f"--encoder-weights {path}", str(path), "has no metadata, so needs --encoder timm:NAME", "save_encoder")


def test_refused_weights_leave_the_encoder_alone(weights):
    encoder = Encoder(Args(), (9, 24, 24))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(SystemExit):
        load_encoder(weights(architecture="nature"), encoder)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("count", ["1", "4", "all"])
def test_freezing_random_weights(refused, count):
    refused(f"--freeze-layers {count}", "--freeze-layers", "--encoder-weights", "--freeze-random")


@pytest.mark.parametrize("count", ["5", "-1"])
def test_layers_that_are_not_there(refused, count):
    refused(f"--freeze-random --freeze-layers {count}", f"--freeze-layers {count}: ", "0 to 4")


@pytest.mark.parametrize("flag, value", [("freeze-layers", "most"), ("batch-size", "2.5"), ("ssl", "bogus")])
def test_types_are_checked_by_the_argument_parser(tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        drqv2_pisco.parse_args(command(tmp_path, f"--{flag} {value}"))
    assert stop.value.code == 2 and flag in capsys.readouterr().err


# --- Resume ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use(patch)
        return train(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """A run killed after its second checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        use(patch)
        kill_at(patch, drqv2_pisco, "update", 22)
        return train_until_killed(tmp_path_factory.mktemp("stopped"))


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return shutil.copytree(stopped_once, tmp_path / stopped_once.name)


def test_resume_of_the_untouched_copy(stopped, finished):
    assert_same_end(resume(stopped), finished)


def test_resume_of_no_run(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        assert error_of(["--resume", str(path)]).startswith(f"--resume {path}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag, value", [("batch-size", "4"), ("ssl", "none"), ("total-frames", "480")])
def test_resume_with_another_argument(stopped, flag, value):
    before = snapshot(stopped)
    assert f"--resume {stopped}: " in error_of(["--resume", str(stopped), f"--{flag}", value])
    assert snapshot(stopped) == before


@pytest.mark.parametrize("text", ["", "{", "3", "null", "[]", '{"batches": 4}', "\xff\xfe"])
def test_resume_with_damaged_arguments(stopped, text):
    (stopped / "args.json").write_text(text, encoding="latin1")
    assert error_of(["--resume", str(stopped)]).startswith(f"--resume {stopped}: ")


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut short", "a byte short"])
def test_resume_with_a_damaged_checkpoint(stopped, damage):
    path = stopped / "checkpoint.pt"
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "garbage": b"garbage", "cut short": data[:1000], "a byte short": data[:-1]}[damage])
    before = snapshot(stopped)
    message = error_of(["--resume", str(stopped)])
    assert message.startswith(f"--resume {stopped}: ") and "checkpoint.pt is damaged" in message
    assert snapshot(stopped) == before


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or a != a and b != b


def test_resume_with_a_flipped_bit_in_a_weight(stopped):
    """No loader of tensors would notice."""
    path = stopped / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["agent"]["actor.policy.0.weight"]
    data[data.index(weight.numpy().tobytes()[:64]) + 7] ^= 1
    path.write_bytes(data)
    assert "checkpoint.pt is damaged" in error_of(["--resume", str(stopped)])


def contents(path):
    """Where in a zip file the contents of its members lie: a set of places."""
    data, places = path.read_bytes(), set()
    for member in zipfile.ZipFile(path).infolist():
        names = sum(struct.unpack("<HH", data[member.header_offset + 26 : member.header_offset + 30]))
        start = member.header_offset + 30 + names
        places |= set(range(start, start + member.file_size))
    return places


def test_resume_with_a_flipped_bit_anywhere(stopped):
    """In the contents it is refused with one line. Between them lie headers and padding: there it may be the zip reader
    that refuses it in its own words, or it says nothing. Never is anything else loaded than what was saved."""
    path = stopped / "checkpoint.pt"
    data, inside, whole = path.read_bytes(), contents(path), drqv2_pisco.load_checkpoint(stopped, "cpu")
    rng, refused = np.random.default_rng(0), 0
    for place in [*range(0, 150, 3), *rng.integers(0, len(data), 100), *rng.integers(len(data) - 9000, len(data), 50)]:
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            assert equal(drqv2_pisco.load_checkpoint(stopped, "cpu"), whole) and place not in inside, place
        except SystemExit as stop:
            assert "\n" not in stop.code and "checkpoint.pt is damaged" in stop.code
            refused += 1
        except (RuntimeError, ValueError, OSError, zipfile.BadZipFile, zlib.error):
            assert place not in inside
    assert refused > 70


def test_resume_never_unpickles_code(stopped, tmp_path):
    torch.save({"step": Bomb(tmp_path / "marker")}, stopped / "checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError):
        resume(stopped)
    assert not (tmp_path / "marker").exists()


def test_resume_without_its_replay(stopped, finished):
    (stopped / "replay.bin").unlink()
    before = snapshot(stopped)
    message = error_of(["--resume", str(stopped)])
    assert message.startswith(f"--resume {stopped}: ") and "replay.bin is missing" in message
    assert snapshot(stopped) == before


# --- Numbers that run away -------------------------------------------------------------------------------------------
def test_loss_that_is_not_finite(stopped, finished, monkeypatch):
    checkpoint = (stopped / "checkpoint.pt").read_bytes()
    real = drqv2_pisco.pisco_loss
    with monkeypatch.context() as patch:
        patch.setattr(drqv2_pisco, "pisco_loss", lambda *args, **std: real(*args, **std) * math.inf)
        message = error_of(["--resume", str(stopped)])
    assert "not finite" in message and "--learning-rate" in message
    assert (stopped / "checkpoint.pt").read_bytes() == checkpoint
    assert_same_end(resume(stopped), finished)


# --- As the user sees it ---------------------------------------------------------------------------------------------
def test_full_disk_and_other_mistakes_keep_their_traceback(stopped, finished, monkeypatch):
    """A library's own message is not hidden; the run goes on once there is room."""

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            resume(stopped)
    assert_same_end(resume(stopped), finished)


def test_error_of_the_program_itself(tmp_path):
    """Nothing on stderr but the line, and the exit code of the process."""
    argv = [sys.executable, ROOT / "drqv2_pisco.py", "--seed-frames", "2000000", "--runs-dir", tmp_path / "runs"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("--total-frames 1100000: ") and not (tmp_path / "runs").exists()
