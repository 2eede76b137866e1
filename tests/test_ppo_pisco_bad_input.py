"""The mistakes that people make end a run before it begins, with one line that names the flag and the remedy. What is
no mistake of the user's keeps Python's own traceback."""

import pickle
import traceback

import gymnasium as gym
import pytest
import safetensors.torch
import torch
from conftest import Bomb, command, encoder_file, kill_at, program, snapshot, train, train_until_killed

import ppo_pisco
from ppo_pisco import Args, Encoder, load_encoder, save_encoder


def error_of(argv):
    """The one line with which a command line is refused, with exit code 1, as Python prints it."""
    with pytest.raises(SystemExit) as stop:
        ppo_pisco.train(ppo_pisco.parse_args(argv))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


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


# --- Batches, environments -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flag", ["--num-minibatches 3", "--num-minibatches 32", "--total-timesteps 31"])
def test_batch_that_does_not_fit(refused, flag):
    """Of 4 x 8 steps: not divisible, one row to each, and a run shorter than that."""
    assert refused(flag, "num_envs * num_steps = 32").startswith(flag.split()[0])


@pytest.mark.parametrize("share", ["1.01", "-0.1", "nan"])
def test_share_that_is_none(refused, share):
    assert refused(f"--ssl-fraction {share}", "0 to 1").startswith(f"--ssl-fraction {share}: ")


def test_jump_tasks(refused):
    assert refused("--jump-tasks nowhere", "source", "20:10,30:20").startswith("--jump-tasks nowhere: ")
    assert refused("--jump-eval-tasks 20:60", "0..40").startswith("--jump-eval-tasks 20:60: ")


NEAR = {
    "Jump-v1": "Jump-v0",
    "Pnog-v5": "Pong-v5",
    "ALE/Pong-v5": "Pong-v5",
    "TinyImag-v0": "TinyImage-v0",
    "Hoper-v5": "Hopper-v5",
    "nonsense": "Jump-v0",
    "conftest:Env-v0": "",
    "walker_walk": "drqv2_pisco.py --env-id walker-walk",
    "PongNoFrameskip-v4": "Pong-v5",
    "BreakoutDeterministic-v4": "Breakout-v5",
    "Breakout-ramNoFrameskip-v4": "Breakout-v5",
    "ALE/Breakout-v5": "Breakout-v5",
}


@pytest.mark.parametrize("env_id, suggestion", NEAR.items())
def test_unknown_environment_gets_suggestions(refused, env_id, suggestion):
    message = refused(f"--env-id {env_id}", suggestion, "drqv2_pisco.py --env-id walker-walk")  # which there is
    assert message.startswith(f"--env-id {env_id}: unknown environment; did you mean ")
    suggestions = message.partition("did you mean ")[2].partition("?")[0].split(", ")
    assert len(suggestions) == len(set(suggestions))


@pytest.mark.filterwarnings("ignore:.*Box (low|high)'s precision")
@pytest.mark.parametrize(
    "env_id, word",
    [
        ("CartPole-v1", "images"),
        ("Taxi-v3", "images"),  # a single number
        ("HalfCheetah-v4", "images"),  # EnvPool's
        ("TinyImageContinuous-v0", "Discrete"),
    ],
)
def test_environment_that_does_not_fit(refused, env_id, word):
    assert refused(f"--env-id {env_id}", word).startswith(f"--env-id {env_id}: ")


# --- Encoder weights -------------------------------------------------------------------------------------------------
@pytest.fixture
def weights(tmp_path):
    """Writes an encoder file for the tiny run, with changed tensors or metadata, and returns its path."""

    def weights(tensors=dict, **changes):
        path = tmp_path / "weights.safetensors"
        save_encoder(path, Encoder(Args(feature_dim=32), (1, 60, 60)), environment="Jump-v0")
        old, metadata = encoder_file(path)
        safetensors.torch.save_file(tensors(old), path, metadata | changes)
        return path

    return weights


def test_freezing(refused):
    for count in ("1", "all"):
        message = refused(f"--freeze-layers {count}", "--encoder-weights", "--freeze-random")
        assert message.startswith("--freeze-layers")
    for flags, layers in (("5", 4), ("-1", 4), ("11 --encoder impala", 10)):
        message = refused(f"--freeze-random --freeze-layers {flags}", f"0 to {layers} layers")
        assert message.startswith(f"--freeze-layers {flags.split()[0]}: ")


def test_weights_missing(refused, tmp_path):
    for path in (tmp_path / "nothing.safetensors", tmp_path, "None"):
        message = refused(f"--encoder-weights {path}", "give a .safetensors file of pretrain_encoder.py, or `none`")
        assert message.startswith(f"--encoder-weights {path}: ")


@pytest.mark.parametrize("keep", [0, 4, 100, 1000, -1])
def test_weights_cut_short(refused, weights, keep):
    path = weights()
    path.write_bytes(path.read_bytes()[:keep])
    assert refused(f"--encoder-weights {path}").startswith(f"--encoder-weights {path}: ")


@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_weights_are_a_pickle_in_disguise(refused, tmp_path, protocol):
    path, marker = tmp_path / "weights.safetensors", tmp_path / "marker"
    bomb = {"layers.0.0.weight": Bomb(marker)}
    with open(path, "wb") as file:
        pickle.dump(bomb, file, 2) if protocol == "pickle" else torch.save(bomb, file)
    assert refused(f"--encoder-weights {path}").startswith(f"--encoder-weights {path}: ")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker))).close()
    assert marker.exists()  # as unpickling would have made it


def test_weights_of_another_encoder(refused, weights):
    path = weights()
    refused(
        f"--encoder-weights {path} --encoder impala", str(path), "architecture nature", "this run impala; give another"
    )
    refused(f"--encoder-weights {path} --feature-dim 16", str(path), "feature_dim 32", "this run 16")
    words = "[1, 60, 60], this run [3, 36, 40]", "feature_dim 32, this run 512; "  # all of it at once
    refused(f"--encoder-weights {path} --env-id TinyImage-v0 --feature-dim 512", str(path), *words)
    weights(architecture="resnet")
    refused(f"--encoder-weights {path}", str(path), "resnet", "nature")
    weights(observation_shape="[1, 63, 63]")  # leads to the same tensors as 60 x 60
    refused(f"--encoder-weights {path}", str(path), "[1, 63, 63]", "[1, 60, 60]")
    safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    refused(f"--encoder-weights {path}", str(path), "has no metadata, so needs --encoder timm:NAME", "save_encoder")


def test_weights_say_what_a_channel_is(refused, tmp_path):
    """Three grey images are no coloured one, though their tensors have its shapes."""
    path = tmp_path / "weights.safetensors"
    encoder = Encoder(Args(feature_dim=32), (3, 36, 40))
    save_encoder(path, encoder, frame_stack=3, image_channels=1)
    refused(f"--encoder-weights {path} --env-id TinyImage-v0", str(path), "frame_stack 3, this run 1")
    for right in ({"frame_stack": 1, "image_channels": 3}, {}):  # a file of before doesn't say it
        save_encoder(path, encoder, **right)
        folder = train(tmp_path / "runs", f"--encoder-weights {path} --env-id TinyImage-v0 --total-timesteps 32")
        about = encoder_file(folder / "encoder.safetensors")[1]
        assert (about["frame_stack"], about["image_channels"]) == ("1", "3")


CHANGES = {
    "extra": (lambda old: old | {"layers.9.0.bias": torch.zeros(32)}, "layers.9.0.bias"),
    "missing": (lambda old: {name: old[name] for name in old if name != "layers.0.0.bias"}, "layers.0.0.bias"),
    "renamed": (lambda old: {name.replace("layers", "conv"): old[name] for name in old}, "conv.0.0.bias"),
    "transposed": (lambda old: old | {"layers.3.1.weight": old["layers.3.1.weight"].T.contiguous()}, "layers.3.1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_with_wrong_tensors(refused, weights, change):
    make, name = CHANGES[change]
    path = weights(make)
    assert refused(f"--encoder-weights {path}", name).startswith(f"--encoder-weights {path}: ")


def test_refused_weights_leave_other_weights_loadable(weights):
    """What a file says of itself is compared before any tensor is copied."""
    encoder = Encoder(Args(feature_dim=32), (1, 60, 60))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(SystemExit):
        load_encoder(weights(architecture="resnet"), encoder)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    path = weights()
    assert load_encoder(path, encoder)["environment"] == "Jump-v0"
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in encoder_file(path)[0].items())


# --- Run folders -----------------------------------------------------------------------------------------------------
@pytest.fixture
def stopped(tmp_path):
    """A run killed in its second iteration, with a checkpoint of the first."""
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 2)
        return train_until_killed(tmp_path / "stopped")


def resume_error(folder):
    """The line with which --resume refuses a folder, which it leaves as it is."""
    before = snapshot(folder) if folder.exists() else None
    message = error_of(["--resume", str(folder)])
    assert message.startswith(f"--resume {folder}: ")
    assert (snapshot(folder) if folder.exists() else None) == before
    return message


def test_resume_of_no_run(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        assert "not a run folder" in resume_error(path)
    assert not list(tmp_path.iterdir())


def test_resume_of_a_run_killed_before_it_had_arguments(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, ppo_pisco.os, "replace", 1)
        folder = train_until_killed(tmp_path)
    assert "not a run folder" in resume_error(folder)


def test_resume_with_other_flags(stopped):
    before = snapshot(stopped)
    for flags in ("--num-envs 8", "--seed 2", "--ssl none", "--freeze-layers 1", "--runs-dir elsewhere", "--bf16"):
        message = error_of(["--resume", str(stopped), *flags.split()])
        assert message.startswith(f"--resume {stopped}: ") and "other flags" in message
    assert snapshot(stopped) == before


@pytest.mark.parametrize("text", ["", "{", "3", "null", "[]", '{"no_such_argument": 4}', "\xff\xfe"])
def test_resume_with_damaged_arguments(stopped, text):
    (stopped / "args.json").write_text(text, encoding="latin1")
    assert "not a run folder" in resume_error(stopped)


def test_resume_with_a_damaged_checkpoint(stopped):
    path = stopped / "checkpoint.pt"
    whole = path.read_bytes()
    damaged = [b"", b"garbage", whole[:1000], whole[: len(whole) // 2], whole[:-1000]]
    for eighths in range(1, 8):  # one bit flipped in the middle of the weights and of Adam's averages
        position = len(whole) * eighths // 8
        damaged.append(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
    for content in damaged:
        path.write_bytes(content)
        assert "checkpoint.pt is damaged" in resume_error(stopped)
    path.write_bytes(whole)
    assert ppo_pisco.load_checkpoint(stopped, "cpu")["iteration"] == 1


@pytest.mark.parametrize("protocol", ["pickle", "torch"])
def test_resume_with_a_pickle_in_disguise(stopped, tmp_path, protocol):
    marker = tmp_path / "marker"
    with open(stopped / "checkpoint.pt", "wb") as file:
        pickle.dump(Bomb(marker), file, 2) if protocol == "pickle" else torch.save({"agent": Bomb(marker)}, file)
    if protocol == "pickle":
        assert "damaged" in resume_error(stopped)
    else:
        with pytest.raises(pickle.UnpicklingError):
            ppo_pisco.train(ppo_pisco.parse_args(["--resume", str(stopped)]))
    assert not marker.exists()


# --- Numbers that run away, environments with defects ----------------------------------------------------------------
def test_loss_that_is_not_finite(tmp_path):
    message = error_of(command(tmp_path, "--learning-rate 1e30"))
    assert "not finite" in message and "--learning-rate" in message and "--ssl-coef" in message
    assert not list(tmp_path.glob("*/checkpoint.pt"))


def test_last_minibatch_that_blows_up(tmp_path):
    """No statistic of its own iteration shows it, and there may be no next one."""
    flags = "--learning-rate 1e30 --num-minibatches 1 --update-epochs 1 --total-timesteps 32"
    assert "not finite" in error_of(command(tmp_path, flags))
    assert not list(tmp_path.glob("*/checkpoint.pt")) and not list(tmp_path.glob("*/model.safetensors"))


BROKEN = """
import gymnasium
from conftest import TinyImage

class Broken(TinyImage):
    def step(self, action):
        if self.t == 2:
            open("level_3.txt")
        return super().step(action)

gymnasium.register("Broken-v0", entry_point=Broken)
"""


def test_error_in_the_users_environment_is_told_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(gym.registry, "Broken-v0", raising=False)
    with pytest.raises(FileNotFoundError, match="level_3.txt") as failure:
        train(tmp_path / "runs", "--env-id broken_module:Broken-v0")
    frames = traceback.extract_tb(failure.value.__traceback__)
    assert (frames[-1].filename, frames[-1].line) == (str(tmp_path / "broken_module.py"), 'open("level_3.txt")')


# --- As the user sees it ---------------------------------------------------------------------------------------------
def test_errors_of_the_program_itself(tmp_path):
    """Nothing on stderr but the line, and a failing exit code."""
    refused = {
        "--env-id Pnog-v5": "--env-id Pnog-v5: unknown environment; did you mean Pong-v5",
        "--encoder-weights nothing.safetensors": "--encoder-weights nothing.safetensors: ",
        "--resume nowhere": "--resume nowhere: not a run folder",
    }
    running = [program(*flags.split(), cwd=tmp_path) for flags in refused]
    for process, start in zip(running, refused.values()):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1 and "Traceback" not in out
        assert err.startswith(start) and err.count("\n") == 1 and err.endswith("\n"), err
    assert not list(tmp_path.iterdir())
