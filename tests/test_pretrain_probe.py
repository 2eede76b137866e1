"""The probe of pretrain_encoder.py: ridge and scores by hand, labels, layers, the whole command, bad input."""

import csv
import json

import numpy as np
import ppo_pisco
import pretrain_encoder as pretrain
import pytest
import safetensors.torch
import torch
from conftest import ROOT, encoder_file

SHIPPED = ROOT / "encoders" / "jump-v0__nature__rl.safetensors"
TASKS = "--jump-source 20:5,22:9,30:20 --jump-target 20:9,24:20,30:5"


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Ridge
# ---------------------------------------------------------------------------------------------------------------------
def test_ridge_by_hand():
    # x and y centred: (-1, 0, 1) and (-2, 0, 2): w = 4 / (2 + penalty), c = mean y - w * mean x = 3 - 2 w.
    x, y = column(1, 2, 3), column(1, 3, 5)
    for penalty, slope in ((0.0, 2.0), (2.0, 1.0), (6.0, 0.5)):
        w, c = pretrain.ridge(x, y, penalty)
        torch.testing.assert_close(w, column(slope))
        torch.testing.assert_close(c, torch.tensor([3 - 2 * slope], dtype=torch.float64))
    # Weights 1, 0, 3: means 2.5 and 4, centred (-1.5, 0.5) and (-3, 1): w = (4.5 + 1.5) / (2.25 + 0.75 + 3) = 1.
    w, c = pretrain.ridge(x, y, 3.0, torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(w, column(1))
    torch.testing.assert_close(c, torch.tensor([1.5], dtype=torch.float64))


def test_dual_form_by_hand():
    # Two rows, three features: centred +-(1, 1, 1), y = +-1. Along (1, 1, 1) the weight is 2 / (6 + penalty) each.
    x, y = torch.tensor([[2.0, 1, 0], [0, -1, -2]], dtype=torch.float64), column(1, -1)
    w, c = pretrain.ridge(x, y, 2.0)
    torch.testing.assert_close(w, column(0.25, 0.25, 0.25))
    torch.testing.assert_close(c, torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("n, d", [(12, 5), (5, 12), (8, 8)])
def test_primal_and_dual_agree_with_the_normal_equations(n, d):
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (d, 2))
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    w, c = pretrain.ridge(x, y, 0.7, weights)
    a = torch.cat([x, torch.ones(n, 1, dtype=torch.float64)], 1)  # the intercept is not penalised
    penalty = 0.7 * torch.diag(torch.tensor([1.0] * d + [0.0], dtype=torch.float64))
    expected = torch.linalg.solve(a.T @ (weights[:, None] * a) + penalty, a.T @ (weights[:, None] * y))
    torch.testing.assert_close(torch.cat([w, c[None]]), expected)
    # Compressed features have the same inner products, so the same predictions.
    small = pretrain.compress(x)
    w2, c2 = pretrain.ridge(small, y, 0.7, weights)
    assert small.shape == (n, min(n, d))
    torch.testing.assert_close(small @ w2 + c2, x @ w + c)


def test_penalty_has_the_smallest_leave_one_group_out_error():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    y = x[:, :2] + 0.5 * torch.randn(40, 2, generator=generator, dtype=torch.float64)
    groups, weights = torch.arange(40) // 10, torch.rand(40, generator=generator, dtype=torch.float64) + 0.5
    centred = weights.sqrt()[:, None] * (x - pretrain.weighted_mean(x, weights))
    unit = centred.square().sum() / 40
    errors = []
    for penalty in pretrain.PENALTIES:  # by refitting, the slow way
        error = 0.0
        for group in range(4):
            g = groups == group
            w, c = pretrain.ridge(x[~g], y[~g], penalty * unit, weights[~g])
            error += (weights[g][:, None] * (x[g] @ w + c - y[g]).square()).sum().item()
        errors.append(error)
    best = int(np.argmin(errors))
    assert 0 < best < len(errors) - 1
    expected = pretrain.ridge(x, y, pretrain.PENALTIES[best] * unit, weights)
    for found, wanted in zip(pretrain.fit_ridge(x, y, groups, weights), expected):
        torch.testing.assert_close(found, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Scores and labels
# ---------------------------------------------------------------------------------------------------------------------
def test_r2_by_hand():
    target = torch.tensor([[0.0, 0], [2, 4]])
    prediction = torch.tensor([[0.0, 2], [1, 2]])  # errors 0 + 1 of 1 + 1; 4 + 4 of 4 + 4
    torch.testing.assert_close(pretrain.r2_score(prediction, target), torch.tensor([0.5, 0.0]))
    assert pretrain.state_score(torch.tensor([[0.0, 90], [1, 2]]), target) == pytest.approx((0.5 - 1) / 2)  # clipped


def test_balanced_accuracy_by_hand():
    label = torch.tensor([True, False, False, False, False])
    prediction = torch.tensor([True, True, False, False, False])
    assert pretrain.balanced_accuracy(prediction, label) == pytest.approx((1 + 3 / 4) / 2)
    assert pretrain.balanced_accuracy(torch.zeros(5, dtype=torch.bool), label) == pytest.approx(0.5)
    weights = pretrain.class_weights(label)
    torch.testing.assert_close(weights, torch.tensor([2.5, 0.625, 0.625, 0.625, 0.625], dtype=torch.float64))


def test_optimal_action_is_the_one_that_succeeds():
    """From every place on the ground before the obstacle: the label says whether to jump there clears the obstacle."""
    tasks = [(20, 5), (33, 12)]
    states, task_ids = pretrain.jump_states(tasks)
    jump, asked = pretrain.optimal_action(torch.from_numpy(states))
    assert asked.sum() == (20 - 5 + 1) + (33 - 5 + 1) and (jump & asked).sum() == 2
    for (x, y, _, _), task, label in zip(states[asked], task_ids[asked], jump[asked].tolist()):
        env = ppo_pisco.JumpVectorEnv(1, tasks)
        env.reset(options={"task_ids": [task]})
        env.x[:], env.y[:] = x, y
        _, _, terminated, _, info = env.step(np.array([1]))
        while not terminated[0]:
            _, _, terminated, _, info = env.step(np.array([0]))
        assert bool(info["success"][0]) == label
    in_the_air = states[:, 1] > states[:, 3]
    assert not (asked.numpy() & in_the_air).any()


def test_predictions_come_from_the_other_groups():
    # Group means are all that y holds: whoever saw the group itself would do better than the others' mean.
    x, groups = torch.eye(6, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2])
    y = groups[:, None].double()
    prediction = pretrain.out_of_group(x, y, groups, torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(prediction, column(1.5, 1.5, 1, 1, 0.5, 0.5))


def test_transfer_is_fitted_on_the_source_and_scored_on_the_target():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    is_source, groups = torch.arange(60) < 30, torch.arange(60) // 10
    y = torch.where(is_source, x[:, 0], -x[:, 0])[:, None]  # the target turns the relation round
    scores = pretrain.score_features(x, y, groups, is_source, pretrain.state_score, lambda y: torch.ones_like(y[:, 0]))
    assert scores["source"] > 0.99 and scores["target"] > 0.99 and scores["transfer"] == -1


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "architecture, shape, flat, pooled",
    [
        ("nature", (1, 60, 60), [3600, 32 * 14 * 14, 64 * 6 * 6, 64 * 4 * 4, 48], [1, 32, 64, 64, 48]),
        ("impala", (1, 60, 60), [3600, *[16 * 900] * 3, *[32 * 225] * 3, *[32 * 64] * 3, 48],
         [1, 16, 16, 16, 32, 32, 32, 32, 32, 32, 48]),
        ("drqv2", (9, 24, 24), [9 * 576, 32 * 121, 32 * 81, 32 * 49, 32 * 25], [9, 32, 32, 32, 32]),
    ],
)  # fmt: skip
def test_layers_come_in_order_with_their_shapes(architecture, shape, flat, pooled):
    encoder = pretrain.Encoder(architecture, shape, 48)
    frames = torch.randint(0, 256, (70, shape[0], *shape[1:]), dtype=torch.uint8)
    data = pretrain.Data(frames, torch.arange(70)[:, None], torch.zeros(70), torch.zeros(70, 1), ["one"])
    layers = list(pretrain.layer_features(encoder, data))
    assert [layer["flat"].shape for layer in layers] == [(70, d) for d in flat]
    assert [layer["pooled"].shape for layer in layers] == [(70, d) for d in pooled]
    pixels = frames.float().div(255).sub(0.5 if architecture == "drqv2" else 0)
    torch.testing.assert_close(layers[0]["flat"], pixels.flatten(1))
    torch.testing.assert_close(layers[-1]["flat"], encoder(frames).flatten(1), rtol=1e-4, atol=1e-5)
    one = encoder.layers[0](pixels)
    torch.testing.assert_close(layers[1]["pooled"], one.mean((2, 3)), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Recommendation
# ---------------------------------------------------------------------------------------------------------------------
def rows(*targets):
    return [{"layer": i, "variant": "flat", "metric": "state R2", "target": t} for i, t in enumerate(targets)]


@pytest.mark.parametrize(
    "pretrained, control, count",
    [
        ((0.2, 0.80, 0.84, 0.81, 0.3), (0.2, 0.5, 0.5, 0.5, 0.5), 3),  # the deepest within 0.05 of the best
        ((0.2, 0.80, 0.84, 0.70, 0.3), (0.2, 0.5, 0.5, 0.5, 0.5), 2),
        ((0.2, 0.80, 0.84, 0.81, 0.3), (0.2, 0.5, 0.5, 0.9, 0.5), 2),  # layer 3 is worse than random
        ((0.9, 0.80, 0.84, 0.70, 0.3), (0.9, 0.5, 0.5, 0.5, 0.5), 0),  # the pixels tell more than every layer
    ],
)
def test_recommendation(pretrained, control, count):
    found, reason = pretrain.recommend(rows(*pretrained), rows(*control), 0.05)
    assert found == count and reason


def test_reason_says_what_is_wrong_with_the_next_layer():
    chance = rows(0.2, 0.5, 0.5, 0.9, 0.5)
    assert (
        "layer 3 has 0.810, less than random weights, 0.900"
        in pretrain.recommend(rows(0.2, 0.80, 0.84, 0.81, 0.3), chance, 0.05)[1]
    )
    assert "layer 3 has 0.700, too little" in pretrain.recommend(rows(0.2, 0.80, 0.84, 0.7, 0.3), chance, 0.05)[1]


def test_layer_score_takes_the_better_variant_and_averages_the_metrics():
    results = [
        {"layer": 0, "variant": variant, "metric": metric, "target": target}
        for variant, metric, target in (
            ("flat", "a", 0.1),
            ("pooled", "a", 0.5),
            ("flat", "b", 0.3),
            ("pooled", "b", 0),
        )
    ]
    assert pretrain.layer_scores(results) == [pytest.approx(0.4)]


# ---------------------------------------------------------------------------------------------------------------------
# The whole command
# ---------------------------------------------------------------------------------------------------------------------
def weights(path, architecture="nature", shape=(1, 60, 60), **changes):
    """A weights file of a random encoder."""
    encoder = pretrain.Encoder(architecture, shape, 16)
    metadata = {"architecture": architecture, "feature_dim": "16", "observation_shape": json.dumps(shape)}
    pretrain.write_weights(path, encoder.state_dict(), metadata | {"environment": "Jump-v0"} | changes)
    return path


def test_probe_on_jump(tmp_path, capsys):
    command = f"probe --encoder-weights {weights(tmp_path / 'e.safetensors')} {TASKS} --num-random 2".split()
    for name in ("one", "two"):
        assert pretrain.main([*command, "--output", str(tmp_path / name)]) == 0
    text = capsys.readouterr().out
    assert "recommended: --freeze-layers" in text and "action accuracy pooled   pixels" in text
    assert (tmp_path / "one" / "probe.csv").read_bytes() == (tmp_path / "two" / "probe.csv").read_bytes()
    assert (tmp_path / "one" / "probe.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "one" / "probe.csv", newline="") as file:
        table = list(csv.DictReader(file))
    # (pretrained, 2 random) x (pixels, 4 layers) x (pooled, flat) x (state, action)
    assert len(table) == 3 * 5 * 2 * 2
    assert {row["encoder"] for row in table} == {"pretrained", "random 2", "random 3"}
    for row in table:
        low = -1 if row["metric"] == "state R2" else 0
        assert all(low <= float(row[name]) <= 1 for name in ("source", "target", "transfer"))


@pytest.mark.parametrize("target", ["20:10,30:10,40:10", "22:10,33:14,44:18"])
def test_probe_leaves_out_what_never_changes(tmp_path, target):
    """One floor says nothing of how well the floor is read."""
    flags = f"--jump-source 20:10,30:10,40:10 --jump-target {target} --num-random 1 --output {tmp_path / 'out'}"
    assert pretrain.main(["probe", "--encoder-weights", str(weights(tmp_path / "e.safetensors")), *flags.split()]) == 0
    with open(tmp_path / "out" / "probe.csv", newline="") as file:
        numbers = [float(row[name]) for row in csv.DictReader(file) for name in ("source", "target", "transfer")]
    assert len(numbers) == 2 * 5 * 2 * 2 * 3 and np.isfinite(numbers).all()


def test_probe_on_the_control_suite(tmp_path, capsys):
    path = weights(tmp_path / "e.safetensors", "drqv2", (9, 24, 24), environment="cartpole-balance")
    command = f"probe --encoder-weights {path} --target-env-id cartpole-swingup --render-quality fast --episodes 8 "
    command += f"--num-random 1 --output {tmp_path / 'out'}"
    assert pretrain.main(command.split()) == 0
    text = capsys.readouterr().out
    assert "40 source and 40 target observations" in text and "action" not in text
    with open(tmp_path / "out" / "probe.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 5 * 2


def test_shipped_encoder_reads_as_it_was_saved():
    encoder, metadata = pretrain.read_weights(SHIPPED)
    tensors, _ = encoder_file(SHIPPED)
    assert metadata["environment"] == "Jump-v0"
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in tensors.items())


def spoil(path, how):
    """A weights file with something wrong in it."""
    if how == "damaged":
        path.write_bytes(SHIPPED.read_bytes()[:5000])
    elif how == "unknown":
        weights(path, architecture="nature")
        tensors, metadata = encoder_file(path)
        safetensors.torch.save_file(tensors, path, metadata | {"architecture": "resnet"})
    elif how == "other tensors":
        tensors = pretrain.Encoder("impala", (1, 60, 60), 16).state_dict()
        safetensors.torch.save_file(tensors, path, encoder_file(SHIPPED)[1])
    elif how == "no metadata":
        safetensors.torch.save_file(pretrain.Encoder("nature", (1, 60, 60), 16).state_dict(), path)
    elif how == "shape":
        weights(path, shape=(4, 84, 84))
    elif how == "nan":
        encoder = pretrain.Encoder("nature", (1, 60, 60), 256)
        encoder.layers[0][0].weight.data.fill_(float("nan"))
        safetensors.torch.save_file(encoder.state_dict(), path, encoder_file(SHIPPED)[1])
    return path


@pytest.mark.parametrize(
    "how, named",
    [
        ("missing", "no such file"), ("damaged", "not a readable"), ("unknown", "resnet"), ("other tensors", "fit"),
        ("no metadata", "unknown architecture"), ("shape", "(4, 84, 84)"), ("nan", "finite"),
    ],
)  # fmt: skip
def test_bad_weights(tmp_path, capsys, how, named):
    path = spoil(tmp_path / "e.safetensors", how)
    assert pretrain.main(["probe", "--encoder-weights", str(path), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert named in error and "--encoder-weights" in error and str(path) in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--env-id Pong-v5", "--env-id"),
        ("--env-id cartpole-balance", "--target-env-id"),
        ("--env-id cartpole-balance --target-env-id cartpole-swingup", "--encoder-weights"),
        ("--target-env-id cartpole-swingup", "--target-env-id"),
        ("--jump-source 20:10,30:10", "--jump-source"),
        ("--jump-source nowhere", "--jump-source 'nowhere'"),
        ("--jump-target 20:99", "--jump-target"),
        ("--tolerance -1", "--tolerance"),
        ("--num-random 0", "--num-random"),
        ("--nonsense 1", "--nonsense"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, named):
    assert pretrain.main(["probe", "--output", str(tmp_path / "out"), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_output_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert pretrain.main(["probe", "--output", str(tmp_path / "file" / "out")]) == 2
    assert "--output" in capsys.readouterr().err
