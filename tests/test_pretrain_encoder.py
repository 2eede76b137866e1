"""pretrain_encoder.py makes files that the algorithms load; the pieces that two files have are the same."""

import ast
import csv
import json
import signal
import subprocess
import sys
import types

import drqv2_pisco
import numpy as np
import ppo_pisco
import pretrain_encoder
import pytest
import safetensors.torch
import torch
import torch.nn as nn
from conftest import ROOT, encoder_file
from PIL import Image

TINY = (
    "--total-timesteps 64 --num-envs 4 --num-steps 8 --num-minibatches 2 --feature-dim 32 --torch-threads 1 --no-cuda"
)


def pretrain(tmp_path, *flags):
    """The exit code of a tiny run of rl; the algorithm is a process of its own."""
    return pretrain_encoder.main([*TINY.split(), "--runs-dir", str(tmp_path / "runs"), *flags])


def test_writes_an_encoder_that_ppo_loads(tmp_path, capfd):
    output = tmp_path / "new" / "encoder.safetensors"
    assert pretrain(tmp_path, "--output", str(output), "--seed", "3", "--ent-coef", "0.02") == 0
    assert f"python ppo_pisco.py --encoder-weights {output}" in capfd.readouterr().out
    _, metadata = encoder_file(output)
    assert metadata["objective"] == "rl"
    assert metadata["environment"] == "Jump-v0"
    assert metadata["tasks"] == "source"
    assert metadata["architecture"] == "nature"
    assert metadata["steps"] == "64"
    assert metadata["seed"] == "3"
    assert 0.0 <= json.loads(metadata["score"])["eval/greedy_success"] <= 1.0
    flags = [*TINY.split(), "--encoder-weights", str(output), "--freeze-layers", "2", "--runs-dir", str(tmp_path / "b")]
    assert ppo_pisco.main(flags) == 0

    # It replaces nothing unasked, and says so before it trains.
    written, before = output.stat().st_mtime_ns, safetensors.torch.load_file(output)
    capfd.readouterr()
    assert pretrain(tmp_path, "--output", str(output)) == 2
    error = capfd.readouterr().err
    assert str(output) in error and "--force" in error and error.count("\n") == 1
    assert output.stat().st_mtime_ns == written

    # A finished run is exported again by --resume.
    (run,) = (tmp_path / "runs").iterdir()
    args = json.loads((run / "args.json").read_text())
    assert args["ent_coef"] == 0.02  # the user's flag beats pretraining's 0.003
    again = tmp_path / "again.safetensors"
    for flag, value in {"seed": 99, "total-timesteps": 5, "env-id": "Pong-v5", "objective": "state"}.items():
        capfd.readouterr()
        assert pretrain_encoder.main(["--resume", str(run), "--output", str(again), f"--{flag}", str(value)]) == 2
        assert f"--{flag} {value}: the run was made with" in capfd.readouterr().err and not again.exists()
    assert pretrain_encoder.main(["--resume", str(run), "--output", str(again), "--seed", "3"]) == 0
    for name, tensor in safetensors.torch.load_file(again).items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    "flags, named",
    [
        (("--env-id", "Jumpp-v0"), "--env-id"),
        (("--jump-tasks", "nowhere"), "--jump-tasks"),
        (("--nonsense", "1"), "--nonsense"),
        (("--total-timesteps", "many"), "--total-timesteps"),
        (("--resume", "runs/nowhere"), "--resume"),
        (("--exp-name", "mine"), "--exp-name"),
        (("--exp_name=mine",), "--exp-name"),
    ],
)
def test_bad_input(tmp_path, capfd, flags, named):
    assert pretrain(tmp_path, "--output", str(tmp_path / "e.safetensors"), *flags) == 2
    error = capfd.readouterr().err
    assert named in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "e.safetensors").exists()


@pytest.mark.parametrize("objective", ["rl", "state"])
def test_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, capfd, objective):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file" / "e.safetensors", tmp_path):
        flags = ["--objective", objective, "--output", str(path), "--runs-dir", str(tmp_path / "runs"), "--force"]
        assert pretrain_encoder.main(flags) == 2
        error = capfd.readouterr().err
        assert "--output" in error and error.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_interrupted_rl_tells_the_whole_command_that_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain_encoder, "run_algorithm", lambda args, further: (130, tmp_path / "run"))
    output = tmp_path / "my encoder.safetensors"
    assert pretrain(tmp_path, "--output", str(output), "--force") == 130
    line = capsys.readouterr().err.strip()
    assert line.endswith(f"python pretrain_encoder.py --resume {tmp_path / 'run'} --output '{output}' --force")


def test_another_loss_of_the_users_stays_named(tmp_path):
    output = tmp_path / "e.safetensors"
    assert pretrain(tmp_path, "--output", str(output), "--ssl", "pisco") == 0
    assert encoder_file(output)[1]["objective"] == "rl (ppo, ssl pisco)"


def test_state_targets_of_what_never_changes_keep_their_unit():
    states = torch.tensor([[1.0, 5.0], [3.0, 5.0], [7.0, 9.0]])
    data = types.SimpleNamespace(names=["a", "b"], states=states)
    wanted = (states - torch.tensor([2.0, 5.0])) / torch.tensor([2.0**0.5, 1.0])  # of the first two rows
    torch.testing.assert_close(pretrain_encoder.state_targets(data, torch.tensor([0, 1])), wanted)


def test_rl_on_the_control_suite_runs_drqv2(tmp_path, capfd):
    output = tmp_path / "e.safetensors"
    flags = "--env-id cartpole-balance --total-timesteps 1100 --update-every 50 --image-size 24 --render-quality fast "
    flags += "--hidden-dim 16 --feature-dim 8 --batch-size 8 --seed-frames 40 --explore-steps 10 --eval-episodes 1 "
    flags += f"--torch-threads 1 --no-cuda --runs-dir {tmp_path / 'runs'} --output {output}"
    assert pretrain_encoder.main(flags.split()) == 0
    _, metadata = encoder_file(output)
    assert (metadata["objective"], metadata["architecture"], metadata["steps"]) == ("rl", "drqv2", "1100")
    text = capfd.readouterr().out
    assert "python drqv2_pisco.py --env-id cartpole-balance" in text and "--image-size 24" in text
    drqv2_pisco.load_encoder(output, drqv2_pisco.Encoder((9, 24, 24)))
    (run,) = (tmp_path / "runs").iterdir()
    args = json.loads((run / "args.json").read_text())
    assert (args["encoder_weights"], args["freeze_layers"], args["ssl"]) == ("none", 0, "none")


# ---------------------------------------------------------------------------------------------------------------------
# state and simsiam: whole runs
# ---------------------------------------------------------------------------------------------------------------------
JUMP = "--jump-tasks 20:5,22:15,30:20,40:10 --num-frames 200"
DMC = "--env-id cartpole-balance --image-size 24 --render-quality fast --num-frames 110"
FAMILIES = {"nature": JUMP, "impala": f"{JUMP} --encoder impala", "drqv2": DMC}


def flags_of(tmp_path, flags, steps=4):
    common = f"--feature-dim 32 --projector-dim 16 --batch-size 16 --total-steps {steps} --eval-interval 2 --no-cuda "
    common += f"--torch-threads 1 --runs-dir {tmp_path / 'runs'} --output {tmp_path / 'e.safetensors'}"
    return [*common.split(), *flags.split()]


def run(tmp_path, flags, steps=4, code=0):
    assert pretrain_encoder.main(flags_of(tmp_path, flags, steps)) == code
    return tmp_path / "e.safetensors"


def numbers(tmp_path):
    """The only run's metrics.csv without the speed."""
    (folder,) = (tmp_path / "runs").iterdir()
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: x for key, x in row.items() if key != "charts/SPS"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("objective", ["state", "simsiam"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_writes_what_its_algorithm_loads(tmp_path, capsys, family, objective):
    output = run(tmp_path, f"--objective {objective} {FAMILIES[family]}")
    rows = numbers(tmp_path)
    assert [int(row["step"]) for row in rows] == [2, 4]
    assert all(np.isfinite(float(row["eval/loss"])) for row in rows)
    tensors, metadata = encoder_file(output)
    assert (metadata["architecture"], metadata["objective"], metadata["steps"]) == (family, objective, "4")
    score = json.loads(metadata["score"])
    text = capsys.readouterr().out
    if family == "drqv2":
        encoder = drqv2_pisco.Encoder((9, 24, 24))
        drqv2_pisco.load_encoder(output, encoder)
        assert f"python drqv2_pisco.py --env-id cartpole-balance --encoder-weights {output}" in text
        names = [f"r2 position[{i}]" for i in range(3)] + [f"r2 velocity[{i}]" for i in range(2)]
    else:
        encoder = ppo_pisco.Encoder(family, (1, 60, 60), 32)
        ppo_pisco.load_encoder(output, encoder, family, (1, 60, 60))
        assert f"python ppo_pisco.py --encoder-weights {output}" in text and "--feature-dim 32" in text
        names = ["r2 agent x", "r2 agent y", "r2 obstacle x", "r2 floor y"]
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in tensors.items())
    expected = ["loss", "r2", "r2_lowest", *names] if objective == "state" else ["loss", "collapse_std"]
    assert list(score) == expected
    assert any(path.name.startswith("events") for path in next((tmp_path / "runs").iterdir()).iterdir())


def test_state_regression_learns_the_held_out_tasks_and_stops(tmp_path, capsys):
    flags = "--objective state --jump-tasks grid --num-frames 2000 --eval-interval 20 --target-r2 0.8"
    output = run(tmp_path, flags, steps=400)
    r2 = [float(row["eval/r2"]) for row in numbers(tmp_path)]
    assert r2[-1] >= 0.8 and all(value < 0.8 for value in r2[:-1])
    _, metadata = encoder_file(output)
    assert json.loads(metadata["score"])["r2"] == r2[-1]
    assert int(metadata["steps"]) == 20 * len(r2) < 400
    assert "--target-r2 0.8 reached" in capsys.readouterr().out


KILLED_AFTER_TWO_CHECKPOINTS = """
import os, signal, sys, pretrain_encoder
save, calls = pretrain_encoder.RunFolder.save_checkpoint, []
def deadly(*args):
    save(*args)
    calls.append(args)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
pretrain_encoder.RunFolder.save_checkpoint = deadly
sys.exit(pretrain_encoder.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("objective", ["state", "simsiam"])
def test_resume_after_kill_9_is_bitwise_equal(tmp_path, objective):
    flags = f"--objective {objective} {JUMP} --augmentation noise"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = encoder_file(run(whole, flags, steps=80))
    command = [sys.executable, "-c", KILLED_AFTER_TWO_CHECKPOINTS, *flags_of(killed, flags, steps=80)]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert process.returncode == -signal.SIGKILL and not (killed / "e.safetensors").exists()
    (folder,) = (killed / "runs").iterdir()
    assert pretrain_encoder.main(["--resume", str(folder)]) == 0
    tensors, metadata = encoder_file(killed / "e.safetensors")
    assert metadata == expected[1]
    assert all(torch.equal(tensors[name], expected[0][name]) for name in expected[0])
    assert numbers(killed) == numbers(whole)

    # A finished run is written again, elsewhere; nothing else may change.
    again = tmp_path / "again.safetensors"
    assert pretrain_encoder.main(["--resume", str(folder), "--output", str(again)]) == 0
    assert encoder_file(again)[1] == metadata
    assert pretrain_encoder.main(["--resume", str(folder), "--output", str(again), "--seed", "7"]) == 2


def test_interrupted_run_on_the_control_suite_goes_on(tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = f"--objective simsiam {DMC}"
    expected = encoder_file(run(whole, flags))
    real, calls = pretrain_encoder.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:  # Ctrl-C after the fourth update, the first checkpoint has the second
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(pretrain_encoder, "evaluate", interrupted)
    run(cut, flags, code=130)
    (folder,) = (cut / "runs").iterdir()
    assert f"--resume {folder}" in capsys.readouterr().err and not (cut / "e.safetensors").exists()
    assert pretrain_encoder.main(["--resume", str(folder)]) == 0
    tensors, metadata = encoder_file(cut / "e.safetensors")
    assert metadata == expected[1] and all(torch.equal(tensors[name], expected[0][name]) for name in tensors)
    assert numbers(cut) == numbers(whole)


def test_resume_with_other_frames_is_refused(tmp_path, capsys):
    write_frames(tmp_path / "frames", "npy")
    run(tmp_path, f"--objective simsiam --frames {tmp_path / 'frames'} --env-id Pong-v5")
    (folder,) = (tmp_path / "runs").iterdir()
    np.save(tmp_path / "frames" / "b.npy", np.zeros((3, 3, 40, 44), np.uint8))
    assert pretrain_encoder.main(["--resume", str(folder), "--force"]) == 2
    assert "frames" in capsys.readouterr().err


def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    output = run(tmp_path, f"--objective state {JUMP}")
    (folder,) = (tmp_path / "runs").iterdir()
    expected = encoder_file(output)
    output.unlink()
    (folder / "checkpoint.pt").write_bytes(b"cut short")
    assert pretrain_encoder.main(["--resume", str(folder)]) == 0
    tensors, metadata = encoder_file(output)
    assert metadata == expected[1] and all(torch.equal(tensors[name], expected[0][name]) for name in tensors)


def test_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    output = run(tmp_path, f"--objective state {JUMP} --learning-rate 1e30", code=2)
    error = capsys.readouterr().err
    assert "not finite" in error and "--learning-rate" in error and "Traceback" not in error
    assert not output.exists() and not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.tmp"))


def test_evaluation_changes_nothing(tmp_path):
    args = pretrain_encoder.parse_args(flags_of(tmp_path, f"--objective simsiam {JUMP}"))
    data = pretrain_encoder.make_data(args)
    model = pretrain_encoder.SimSiam(pretrain_encoder.Encoder("nature", (1, 60, 60), 32), 16)
    weights, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    rows = torch.arange(50)
    scores = [pretrain_encoder.evaluate(model, data, data.states, rows, args, torch.device("cpu")) for _ in range(2)]
    assert scores[0] == scores[1] and torch.equal(torch.get_rng_state(), rng) and model.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def test_jump_frames_are_those_of_the_environment():
    tasks = [(20, 5), (30, 12)]
    states, task_ids = pretrain_encoder.jump_states(tasks)
    images = pretrain_encoder.jump_data(tasks, states, task_ids).observations(torch.arange(len(states))).numpy()
    found = {tuple(state): image for state, image in zip(states.tolist(), images)}
    env = ppo_pisco.JumpVectorEnv(2, tasks)
    obs, _ = env.reset(options={"task_ids": [0, 1]})
    for t in range(50):  # both jump at the right moment, land and go on
        for i, (obstacle, floor) in enumerate(tasks):
            np.testing.assert_array_equal(obs[i], found[int(env.x[i]), int(env.y[i]), obstacle, floor])
        obs, _, terminated, _, _ = env.step(np.array([t == 20 - 14, t == 30 - 14]))
        assert not terminated.any()
    obstacle, floor, x, y = states[:, 2], states[:, 3], states[:, 0], states[:, 1]
    assert not ((obstacle + 9 > x) & (obstacle < x + 5) & (floor + 10 > y)).any()  # nobody in the obstacle


def test_random_walks_reach_both_sides_of_the_obstacle():
    states, task_ids = pretrain_encoder.jump_walks([(20, 5), (30, 12)], 500, seed=1)
    assert states.shape == (500, 4) and set(task_ids) == {0, 1}
    before, behind = states[:, 0] + 5 <= states[:, 2], states[:, 0] >= states[:, 2] + 9
    assert before.mean() > 0.2 and behind.mean() > 0.2
    assert (states[:, 1] > states[:, 3]).mean() > 0.1  # some in the air
    again, _ = pretrain_encoder.jump_walks([(20, 5), (30, 12)], 500, seed=1)
    np.testing.assert_array_equal(states, again)


def test_default_tasks_leave_the_target_tasks_out():
    tasks = pretrain_encoder.jump_task_list(pretrain_encoder.Args())
    assert len(tasks) == 286 - 7 and not set(tasks) & set(ppo_pisco.JUMP_TASK_SETS["target"])


def test_whole_groups_are_held_out():
    groups = torch.arange(30).repeat_interleave(4)
    train, held_out = pretrain_encoder.split(groups, seed=1)
    assert len(train) == 108 and len(held_out) == 12
    assert not set(groups[train].tolist()) & set(groups[held_out].tolist())


def test_control_suite_frames_show_the_state(tmp_path):
    args = pretrain_encoder.parse_args(flags_of(tmp_path, f"--objective state {DMC}"))
    data = pretrain_encoder.dmc_data(args, "cartpole-balance", 3, 24, episodes=4, length=6)
    assert data.frames.shape == (24, 3, 24, 24) and data.states.shape == (16, 5)
    assert data.groups.tolist() == [i for i in range(4) for _ in range(4)]
    assert data.stacks[0].tolist() == [0, 1, 2] and data.stacks[4].tolist() == [6, 7, 8]  # no stack crosses an episode
    obs = data.observations(torch.tensor([4]))
    assert torch.equal(obs[0, 6:], data.frames[8]) and torch.equal(obs[0, :3], data.frames[6])
    # cos^2 + sin^2 of the pole: these are the suite's observations.
    torch.testing.assert_close(data.states[:, 1] ** 2 + data.states[:, 2] ** 2, torch.ones(16))
    again = pretrain_encoder.dmc_data(args, "cartpole-balance", 3, 24, episodes=4, length=6)
    assert again.digest == data.digest


def write_frames(folder, kind):
    folder.mkdir(exist_ok=True)
    frames = np.random.default_rng(0).integers(0, 256, (30, 40, 44, 3), dtype=np.uint8)
    if kind == "png":
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / f"{i:03}.png")
    elif kind == "grey":
        for i, frame in enumerate(frames):
            Image.fromarray(frame[..., 0]).save(folder / f"{i:03}.png")
    elif kind == "npy":
        np.save(folder / "a.npy", frames.transpose(0, 3, 1, 2))
    elif kind == "npz":
        np.savez(folder / "a.npz", one=frames[:10], two=frames[10:])
    return torch.from_numpy(frames).permute(0, 3, 1, 2)  # (30, 3, 40, 44)


@pytest.mark.parametrize("kind", ["png", "grey", "npy", "npz"])
def test_frames_of_the_user(tmp_path, kind):
    frames = write_frames(tmp_path / "frames", kind)
    frames = frames[:, :1] if kind == "grey" else frames
    data = pretrain_encoder.folder_data(str(tmp_path / "frames"), 2)
    assert torch.equal(data.frames, frames)
    assert data.obs_shape == (2 * frames.shape[1], 40, 44)
    starts = [i for i in range(29) if not (kind == "npz" and i == 9)]  # where the second array begins, no stack crosses
    assert data.stacks.tolist() == [[i, i + 1] for i in starts]
    flags = f"--objective simsiam --frames {tmp_path / 'frames'} --env-id Pong-v5 --frame-stack 2"
    _, metadata = encoder_file(run(tmp_path, flags))
    assert metadata["observation_shape"] == json.dumps(list(data.obs_shape)) and metadata["environment"] == "Pong-v5"


def spoil(folder, how):
    """A frames folder with something wrong in it."""
    write_frames(folder, "png" if how in ("corrupt image", "mixed", "16 bits") else "none")
    if how == "corrupt image":
        (folder / "010.png").write_bytes((folder / "010.png").read_bytes()[:300])
    elif how == "corrupt array":
        (folder / "a.npy").write_bytes(b"\x93NUMPY no more")
    elif how == "mixed":
        Image.new("RGB", (20, 20)).save(folder / "1.png")
    elif how == "16 bits":
        Image.fromarray(np.zeros((40, 44), np.uint16)).save(folder / "1.png")
    elif how == "floats":
        np.save(folder / "a.npy", np.zeros((30, 40, 44), np.float32))
    elif how == "objects":
        np.save(folder / "a.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    elif how == "axes":
        np.save(folder / "a.npy", np.zeros((2, 30, 40, 44, 3), np.uint8))
    elif how == "few":
        np.save(folder / "a.npy", np.zeros((5, 40, 44), np.uint8))
    elif how == "missing":
        folder.rmdir()


@pytest.mark.parametrize(
    "how, named",
    [
        ("empty", "no frames"), ("missing", "not a folder"), ("corrupt image", "010.png"), ("corrupt array", "a.npy"),
        ("mixed", "mixed"), ("16 bits", "8 bits"), ("floats", "float32"), ("objects", "a.npy"), ("axes", "a.npy"),
        ("few", "too few"),
    ],
)  # fmt: skip
def test_bad_frames(tmp_path, capsys, how, named):
    spoil(tmp_path / "frames", how)
    output = run(tmp_path, f"--objective simsiam --env-id Pong-v5 --frames {tmp_path / 'frames'}", code=2)
    error = capsys.readouterr().err
    assert named in error and "--frames" in error and error.count("\n") == 1
    assert not output.exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--objective state --frames x", "--frames"),
        ("--objective state --env-id Pong-v5", "--env-id"),
        ("--objective simsiam --env-id Pong-v5", "--frames"),
        ("--objective state --env-id cartpole-balanse", "cartpole-balance"),
        ("--objective state --encoder drqv2", "--encoder"),
        ("--objective state --env-id cartpole-balance --encoder nature", "--encoder"),
        ("--objective rl --env-id cartpole-balance --encoder nature", "--encoder"),
        ("--objective state --jump-tasks 20:10", "--jump-tasks"),
        ("--objective state --jump-tasks nowhere", "--jump-tasks"),
        ("--objective state --num-frames 100000000", "--num-frames"),
        ("--objective state --batch-size 1", "--batch-size"),
        ("--objective state --learning-rate nan", "--learning-rate"),
        ("--objective state --nonsense 1", "--nonsense"),
        ("--objective guess", "--objective"),
        ("--objective state --frame-stack 2", "--frame-stack"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, named):
    arguments = ["--output", str(tmp_path / "e.safetensors"), "--runs-dir", str(tmp_path / "runs"), *flags.split()]
    assert pretrain_encoder.main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_existing_output_and_foreign_run_folders_are_refused(tmp_path, capsys):
    (tmp_path / "e.safetensors").write_text("mine")
    run(tmp_path, "--objective state", code=2)
    assert "--force" in capsys.readouterr().err and (tmp_path / "e.safetensors").read_text() == "mine"
    (tmp_path / "args.json").write_text('{"objective": "state"}')
    assert pretrain_encoder.main(["--resume", str(tmp_path)]) == 2
    assert "another version" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics
# ---------------------------------------------------------------------------------------------------------------------
def test_simsiam_gradient_stops_at_the_projections():
    args = pretrain_encoder.Args(shift_pixels=1)
    model = pretrain_encoder.SimSiam(pretrain_encoder.Encoder("nature", (1, 60, 60), 8), 4)
    loss, z = pretrain_encoder.simsiam_forward(model, torch.randint(0, 256, (6, 1, 60, 60), dtype=torch.uint8), args)
    assert z.shape == (12, 4) and -1 <= loss <= 1
    loss.backward()
    assert all(p.grad.any() for p in model.encoder.parameters())
    # With a predictor that ignores its input nothing is left for the encoder: z itself gets no gradient.
    model.zero_grad()
    nn.init.zeros_(model.predictor[0].weight)
    loss, _ = pretrain_encoder.simsiam_forward(model, torch.randint(0, 256, (6, 1, 60, 60), dtype=torch.uint8), args)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.encoder.parameters())
    assert model.predictor[3].bias.grad.any()


def test_collapse_std():
    torch.manual_seed(0)
    assert pretrain_encoder.collapse_std(torch.ones(50, 64)).item() == pytest.approx(0, abs=1e-6)
    assert pretrain_encoder.collapse_std(torch.randn(5000, 64)).item() == pytest.approx(1 / 8, rel=0.02)


@pytest.mark.parametrize("architecture", ["nature", "impala"])
def test_encoder_is_that_of_ppo(architecture):
    check_same_encoder(architecture, (1, 60, 60), lambda: ppo_pisco.Encoder(architecture, (1, 60, 60), 32))


def test_encoder_is_that_of_drqv2():
    check_same_encoder("drqv2", (9, 24, 24), lambda: drqv2_pisco.Encoder((9, 24, 24)))


def check_same_encoder(architecture, obs_shape, make_other):
    torch.manual_seed(3)
    own = pretrain_encoder.Encoder(architecture, obs_shape, 32)
    torch.manual_seed(3)
    other = make_other()
    assert list(own.state_dict()) == list(other.state_dict())
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in own.state_dict().items())
    obs = torch.randint(0, 256, (5, *obs_shape), dtype=torch.uint8)
    assert torch.equal(own(obs), other(obs))
    assert own.out_features == other(obs).flatten(1).shape[1]


def pieces(path):
    """Top-level functions, classes, classes' methods and constants of a file, {name: syntax tree as text}."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.dump(node)
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": ast.dump(method) for method in methods}
        if isinstance(node, ast.Assign):
            names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            found |= {name: ast.dump(node) for name in names}
    return found


def test_shared_pieces_are_equal():
    """What has one name in two files has one text, from ppo_pisco.py or, where that lacks it, from drqv2_pisco.py."""
    # Each file has its own. The Encoder here is both of theirs in one: the tests above compare what it does.
    own = {"Args", "Encoder", "RunFolder", "METRICS", "STATE", "LIMITS", "COLUMNS"}
    own |= {"main", "parse_args", "parse_flags", "check_args", "check_memory", "evaluate", "restore"}
    method = {"RunFolder.save_checkpoint", "RunFolder.load_checkpoint"}
    here = pieces(ROOT / "pretrain_encoder.py")
    there = pieces(ROOT / "drqv2_pisco.py") | pieces(ROOT / "ppo_pisco.py")
    shared = {name for name in here.keys() & there.keys() if name.split(".")[0] not in own} | method
    assert {"UsageError", "write_atomically", "JumpVectorEnv", "JUMP_TASK_SETS", "random_shift"} <= shared
    assert {"DMCPixels", "choose_renderer", "RENDER_PROBE", "nature_layers", "simsiam_loss", "set_up"} <= shared
    for name in shared:
        assert here[name] == there[name], name


def test_files_do_not_import_each_other():
    files = ("ppo_pisco", "drqv2_pisco", "pretrain_encoder")
    for path in (ROOT / f"{name}.py" for name in files):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not set(files) & set(names)
    assert pretrain_encoder.PPO.exists() and pretrain_encoder.DRQV2.exists()


@pytest.mark.parametrize("path", sorted((ROOT / "encoders").glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_encoders_load_into_their_algorithm(path):
    assert path.stat().st_size < 2_000_000
    _, metadata = encoder_file(path)
    shape = tuple(json.loads(metadata["observation_shape"]))
    if metadata["architecture"] == "drqv2":
        drqv2_pisco.load_encoder(path, drqv2_pisco.Encoder(shape))
    else:
        encoder = ppo_pisco.Encoder(metadata["architecture"], shape, int(metadata["feature_dim"]))
        ppo_pisco.load_encoder(path, encoder, metadata["architecture"], shape)
    (row,) = (line for line in (ROOT / "encoders" / "README.md").read_text().splitlines() if f"`{path.name}`" in line)
    score = json.loads(metadata["score"])
    if path.stem == "jump-v0__nature__rl":
        assert score["eval/greedy_success"] >= 0.95
        assert f"{score['eval/greedy_success']:.0%} of the 7 source tasks" in row
        assert f"{score['eval/greedy_grid_success']:.1%} of the 286 tasks" in row
    assert score
