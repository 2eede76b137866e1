"""benchmark/probe.py: ridge and scores by hand, labels, layers, the recommendation, the whole command, refusals."""

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

import drqv2_pisco
import ppo_pisco

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
import probe  # noqa: E402

from pretrain_encoder import Data, jump_states  # noqa: E402

SHIPPED = ROOT / "encoders" / "jump-v0__nature__rl.safetensors"
KEPT = ROOT / "benchmark" / "results" / "probe" / "jump-v0__nature__rl.csv"
TASKS = "--jump-source 20:5,22:9,30:20 --jump-target 20:9,24:20,30:5"


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def ones(n):
    return torch.ones(n, dtype=torch.float64)


# --- Ridge -----------------------------------------------------------------------------------------------------------
def test_ridge_by_hand():
    # x and y centred: (-1, 0, 1) and (-2, 0, 2): w = 4 / (2 + penalty), c = mean y - w * mean x = 3 - 2 w.
    x, y = column(1, 2, 3), column(1, 3, 5)
    for penalty, slope in ((0.0, 2.0), (2.0, 1.0), (6.0, 0.5)):
        w, c = probe.ridge(x, y, penalty, ones(3))
        torch.testing.assert_close(w, column(slope))
        torch.testing.assert_close(c, torch.tensor([3 - 2 * slope], dtype=torch.float64))
    # Weights 1, 0, 3: means 2.5 and 4, centred (-1.5, 0.5) and (-3, 1): w = (4.5 + 1.5) / (2.25 + 0.75 + 3) = 1.
    w, c = probe.ridge(x, y, 3.0, torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(w, column(1))
    torch.testing.assert_close(c, torch.tensor([1.5], dtype=torch.float64))


def test_dual_form_by_hand():
    # Two rows, three features: centred +-(1, 1, 1), y = +-1. Along (1, 1, 1) the weight is 2 / (6 + penalty) each.
    x, y = torch.tensor([[2.0, 1, 0], [0, -1, -2]], dtype=torch.float64), column(1, -1)
    w, c = probe.ridge(x, y, 2.0, ones(2))
    torch.testing.assert_close(w, column(0.25, 0.25, 0.25))
    torch.testing.assert_close(c, torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("n, d", [(12, 5), (5, 12), (8, 8)])
def test_primal_and_dual_agree_with_the_normal_equations(n, d):
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in (d, 2))
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    w, c = probe.ridge(x, y, 0.7, weights)
    a = torch.cat([x, torch.ones(n, 1, dtype=torch.float64)], 1)  # the intercept is not penalised
    penalty = 0.7 * torch.diag(torch.tensor([1.0] * d + [0.0], dtype=torch.float64))
    expected = torch.linalg.solve(a.T @ (weights[:, None] * a) + penalty, a.T @ (weights[:, None] * y))
    torch.testing.assert_close(torch.cat([w, c[None]]), expected)
    # Compressed features have the same inner products, so the same predictions.
    small = probe.compress(x)
    w2, c2 = probe.ridge(small, y, 0.7, weights)
    assert small.shape == (n, min(n, d))
    torch.testing.assert_close(small @ w2 + c2, x @ w + c)


def test_penalty_has_the_smallest_leave_one_group_out_error():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    y = x[:, :2] + 0.5 * torch.randn(40, 2, generator=generator, dtype=torch.float64)
    groups, weights = torch.arange(40) // 10, torch.rand(40, generator=generator, dtype=torch.float64) + 0.5
    centred = weights.sqrt()[:, None] * (x - probe.weighted_mean(x, weights))
    unit = centred.square().sum() / 40
    errors = []
    for penalty in probe.PENALTIES:  # by refitting, the slow way
        error = 0.0
        for group in range(4):
            g = groups == group
            w, c = probe.ridge(x[~g], y[~g], penalty * unit, weights[~g])
            error += (weights[g][:, None] * (x[g] @ w + c - y[g]).square()).sum().item()
        errors.append(error)
    best = int(np.argmin(errors))
    assert 0 < best < len(errors) - 1
    expected = probe.ridge(x, y, probe.PENALTIES[best] * unit, weights)
    for found, wanted in zip(probe.fit_ridge(x, y, groups, weights), expected):
        torch.testing.assert_close(found, wanted)


# --- Scores and labels -----------------------------------------------------------------------------------------------
def test_r2_by_hand():
    target = torch.tensor([[0.0, 0], [2, 4]])
    prediction = torch.tensor([[0.0, 2], [1, 2]])  # errors 0 + 1 of 1 + 1; 4 + 4 of 4 + 4
    assert probe.state_score(prediction, target) == pytest.approx((0.5 + 0.0) / 2)
    assert probe.state_score(target, target) == 1
    assert probe.state_score(torch.tensor([[0.0, 90], [1, 2]]), target) == pytest.approx((0.5 - 1) / 2)  # clipped


def test_balanced_accuracy_by_hand():
    label = column(1, -1, -1, -1, -1)
    assert probe.balanced_accuracy(column(0.2, 3, -1, -0.1, -2), label) == pytest.approx((1 + 3 / 4) / 2)
    assert probe.balanced_accuracy(column(-1, -1, -1, -1, -1), label) == pytest.approx(0.5)
    expected = torch.tensor([2.5, 0.625, 0.625, 0.625, 0.625], dtype=torch.float64)
    torch.testing.assert_close(probe.class_weights(label), expected)
    torch.testing.assert_close(probe.equal_weights(label), ones(5))


def test_optimal_action_is_the_one_that_succeeds():
    """From every place on the ground before the obstacle: the label says whether to jump there clears the obstacle."""
    tasks = [(20, 5), (33, 12)]
    states, task_ids = jump_states(tasks)
    jump, asked = probe.optimal_action(torch.from_numpy(states))
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


def test_probe_states_hold_every_question_and_forty_others():
    tasks = [(20, 5), (33, 12), (44, 18)]
    states, task_ids = probe.probe_states(tasks, seed=1)
    asked = probe.optimal_action(states)[1]
    for task, (obstacle, _) in enumerate(tasks):
        assert asked[task_ids == task].sum() == obstacle - 5 + 1 and (~asked)[task_ids == task].sum() == 40
    assert len({tuple(state) for state in states.tolist()}) == len(states)


def test_predictions_come_from_the_other_groups():
    # Group means are all that y holds: whoever saw the group itself would do better than the others' mean.
    x, groups = torch.eye(6, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2])
    y = groups[:, None].double()
    prediction = probe.out_of_group(x, y, groups, ones(6))
    torch.testing.assert_close(prediction, column(1.5, 1.5, 1, 1, 0.5, 0.5))


def test_transfer_is_fitted_on_the_source_and_scored_on_the_target():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    is_source, groups = torch.arange(60) < 30, torch.arange(60) // 10
    y = torch.where(is_source, x[:, 0], -x[:, 0])[:, None]  # the target turns the relation round
    scores = probe.score_features(x, y, groups, is_source, probe.state_score, probe.equal_weights)
    assert scores["source"] > 0.99 and scores["target"] > 0.99 and scores["transfer"] == -1


# --- Layers ----------------------------------------------------------------------------------------------------------
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
    encoder = make_encoder(architecture, shape, 48)
    images = torch.randint(0, 256, (70, *shape), dtype=torch.uint8)
    data = Data(images, torch.arange(70)[:, None], torch.zeros(70), torch.zeros(70, 1), ["one"])
    expected = encoder(images).flatten(1)
    layers = list(probe.layer_features(encoder, data))
    assert [layer["flat"].shape for layer in layers] == [(70, d) for d in flat]
    assert [layer["pooled"].shape for layer in layers] == [(70, d) for d in pooled]
    pixels = images.float().div(255).sub(0.5 if architecture == "drqv2" else 0)
    torch.testing.assert_close(layers[0]["flat"], pixels.flatten(1))
    torch.testing.assert_close(layers[-1]["flat"], expected, rtol=1e-4, atol=1e-5)
    one = encoder.layers[0](pixels)
    torch.testing.assert_close(layers[1]["pooled"], one.mean((2, 3)), rtol=1e-4, atol=1e-5)


# --- Recommendation --------------------------------------------------------------------------------------------------
def rows(*targets):
    return [{"layer": i, "variant": "flat", "metric": "state R2", "target": t} for i, t in enumerate(targets)]


@pytest.mark.parametrize(
    "pretrained, control, count",
    [
        ((0.2, 0.80, 0.84, 0.81, 0.3), (0.2, 0.5, 0.5, 0.5, 0.5), 3),  # the deepest within 0.05 of the best
        ((0.2, 0.80, 0.84, 0.70, 0.3), (0.2, 0.5, 0.5, 0.5, 0.5), 2),
        ((0.2, 0.80, 0.84, 0.81, 0.3), (0.2, 0.5, 0.5, 0.9, 0.5), 2),  # layer 3 is worse than random
        ((0.2, 0.80, 0.84, 0.81, 0.83), (0.2, 0.5, 0.5, 0.9, 0.5), 4),  # the deepest counts, not the run of good ones
        ((0.9, 0.80, 0.84, 0.70, 0.3), (0.9, 0.5, 0.5, 0.5, 0.5), 0),  # the pixels tell more than every layer
    ],
)
def test_recommendation(pretrained, control, count):
    found, reason = probe.recommend(rows(*pretrained), rows(*control), 0.05)
    assert found == count and reason


def test_reason_says_what_is_wrong_with_the_next_layer():
    chance = rows(0.2, 0.5, 0.5, 0.9, 0.5)
    _, reason = probe.recommend(rows(0.2, 0.80, 0.84, 0.81, 0.3), chance, 0.05)
    assert "layer 3 has 0.810, less than random weights, 0.900" in reason
    assert "layer 3 has 0.700, too little" in probe.recommend(rows(0.2, 0.80, 0.84, 0.7, 0.3), chance, 0.05)[1]


def test_layer_score_takes_the_better_variant_and_averages_the_metrics():
    targets = (("flat", "a", 0.1), ("pooled", "a", 0.5), ("flat", "b", 0.3), ("pooled", "b", 0))
    results = [{"layer": 0, "variant": v, "metric": m, "target": t} for v, m, t in targets]
    results += [{"layer": 1, "variant": "flat", "metric": m, "target": 1.0} for m in "ab"]
    assert probe.layer_scores(results) == pytest.approx([0.4, 1.0])


def test_average_of_the_random_encoders():
    scores = [[{"layer": 1, "source": x, "target": 2 * x, "transfer": 0.0}] for x in (0.2, 0.4)]
    (row,) = probe.average(scores)
    assert row == {"layer": 1, "source": pytest.approx(0.3), "target": pytest.approx(0.6), "transfer": 0.0}


def kept_rows():
    """The kept result: {encoder: rows}."""
    encoders = {}
    with open(KEPT, newline="") as file:
        for row in csv.DictReader(file):
            numbers = {name: float(row[name]) for name in probe.SCORES}
            encoders.setdefault(row.pop("encoder"), []).append(row | numbers | {"layer": int(row["layer"])})
    return encoders


def test_kept_result_recommends_three_layers():
    results, *random = kept_rows().values()
    control = probe.average(random)
    count, reason = probe.recommend(results, control, probe.Args().tolerance)
    assert count == 3 and len(random) == 3 and "layer 4 has 0.473, too little" in reason
    lines = probe.table(results, control).splitlines()
    assert len(lines) == 2 + 5 * 2 * 2
    (line,) = (line for line in lines if line.split()[:4] == ["action", "accuracy", "pooled", "2"])
    assert [float(number) for number in line.split()[4:]] == [0.989, 0.997, 0.976, 0.875, 0.88, 0.675]


# --- The whole command -----------------------------------------------------------------------------------------------
def make_encoder(architecture="nature", shape=(1, 60, 60), feature_dim=16):
    args = SimpleNamespace(encoder=architecture, feature_dim=feature_dim, bf16=False)
    return (drqv2_pisco if architecture == "drqv2" else ppo_pisco).Encoder(args, shape)


def weights(path, architecture="nature", shape=(1, 60, 60), environment="Jump-v0"):
    """A weights file of a random encoder."""
    encoder = make_encoder(architecture, shape)
    algorithm = drqv2_pisco if architecture == "drqv2" else ppo_pisco
    algorithm.save_encoder(path, encoder, observation_shape=json.dumps(shape), environment=environment)
    return path


def test_shipped_encoder_gives_the_kept_numbers():
    """Pretrained layer 2, with the numbers of the probe that is kept."""
    encoder, metadata, make_random = probe.read_encoder(SHIPPED)
    data, is_source = probe.probe_data(probe.Args(), metadata)
    encoder.layers = encoder.layers[:2]  # the layers that follow take ten times as long
    results = probe.probe_encoder(encoder, data, is_source, "pretrained")
    kept = kept_rows()["pretrained"][: len(results)]
    for row, wanted in zip(results, kept, strict=True):
        assert row == wanted | {name: pytest.approx(wanted[name], abs=1e-3) for name in probe.SCORES}


def test_probe_on_jump(tmp_path, capsys):
    path = weights(tmp_path / "e.safetensors")
    for name in ("one", "two"):
        command = f"--encoder-weights {path} {TASKS} --num-random 2 --torch-threads 1 --output {tmp_path / name}"
        probe.main(command.split())
    text = capsys.readouterr().out
    assert "recommended: --freeze-layers" in text and "action accuracy pooled   pixels" in text
    assert (tmp_path / "one" / "probe.csv").read_bytes() == (tmp_path / "two" / "probe.csv").read_bytes()
    assert (tmp_path / "one" / "probe.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "one" / "probe.csv", newline="") as file:
        table = list(csv.DictReader(file))
    # (pretrained, 2 random) x (pixels, 4 layers) x (pooled, flat) x (state, action)
    assert len(table) == 3 * 5 * 2 * 2
    assert list(table[0]) == ["encoder", "layer", "variant", "metric", "source", "target", "transfer"]
    assert {row["encoder"] for row in table} == {"pretrained", "random 2", "random 3"}
    for row in table:
        low = -1 if row["metric"] == "state R2" else 0
        assert all(low <= float(row[name]) <= 1 for name in probe.SCORES)


@pytest.mark.parametrize("target", ["20:10,30:10,40:10", "22:10,33:14,44:18"])
def test_probe_leaves_out_what_never_changes(target):
    """One floor says nothing of how well the floor is read."""
    encoder = make_encoder()
    encoder.layers = encoder.layers[:1]
    metadata = {"environment": "Jump-v0", "observation_shape": "[1, 60, 60]", "architecture": "nature"}
    args = probe.Args(jump_source="20:10,30:10,40:10", jump_target=target)
    results = probe.probe_encoder(encoder, *probe.probe_data(args, metadata), "random")
    numbers = [row[name] for row in results for name in probe.SCORES]
    assert len(numbers) == 2 * 2 * 2 * 3 and np.isfinite(numbers).all()


def test_probe_on_the_control_suite(tmp_path, capsys):
    path = weights(tmp_path / "e.safetensors", "drqv2", (9, 24, 24), "cartpole-balance")
    command = f"--encoder-weights {path} --target-env-id cartpole-swingup --render-quality fast --episodes 8 "
    command += f"--num-random 1 --torch-threads 1 --output {tmp_path / 'out'}"
    probe.main(command.split())
    text = capsys.readouterr().out
    assert "40 source and 40 target observations" in text and "action" not in text
    with open(tmp_path / "out" / "probe.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * 5 * 2


def test_shipped_encoder_reads_as_it_was_saved():
    encoder, metadata, make_random = probe.read_encoder(SHIPPED)
    assert metadata["environment"] == "Jump-v0"
    tensors = safetensors.torch.load_file(SHIPPED)
    assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in tensors.items())
    random = make_random().state_dict()
    assert all(random[name].shape == tensor.shape for name, tensor in tensors.items())
    assert not torch.equal(random["layers.0.0.weight"], tensors["layers.0.0.weight"])


def spoil(path, how):
    """A weights file with something wrong in it."""
    if how == "damaged":
        path.write_bytes(SHIPPED.read_bytes()[:5000])
    elif how == "other tensors":
        with safetensors.safe_open(SHIPPED, "pt") as file:
            metadata = file.metadata()
        safetensors.torch.save_file(make_encoder("impala").state_dict(), path, metadata)
    elif how == "no metadata":
        safetensors.torch.save_file(make_encoder().state_dict(), path)
    elif how == "shape":
        weights(path, shape=(4, 84, 84))
    return path


@pytest.mark.parametrize(
    "how, named",
    [
        ("missing", "No such file"), ("damaged", "make the file"), ("other tensors", "layers"),
        ("no metadata", "observation_shape"), ("shape", "[4, 84, 84]"),
    ],
)  # fmt: skip
def test_weights_that_are_refused(tmp_path, how, named):
    path = spoil(tmp_path / "e.safetensors", how)
    with pytest.raises(SystemExit) as stop:
        probe.main(["--encoder-weights", str(path), "--output", str(tmp_path / "out")])
    line = stop.value.code
    assert named in line and "--encoder-weights" in line and str(path) in line and "\n" not in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--env-id Pong-v5", "--env-id Pong-v5"),
        ("--jump-source 20:10,30:10", "--jump-source"),
        ("--jump-target nowhere", "nowhere"),
        ("--encoder-weights {dmc}", "--target-env-id"),
        (
            "--encoder-weights {dmc} --target-env-id cartpole-swingupp --episodes 2 --render-quality fast",
            "cartpole-swingup",
        ),
        ("--encoder-weights {dmc} --target-env-id walker-walk --episodes 2", "its state is not"),
    ],
)
def test_likely_mistakes_get_one_line(tmp_path, flags, named):
    path = weights(tmp_path / "e.safetensors", "drqv2", (9, 24, 24), "cartpole-balance")
    with pytest.raises(SystemExit) as stop:
        probe.main(["--output", str(tmp_path / "out"), *flags.format(dmc=path).split()])
    assert named in stop.value.code and "\n" not in stop.value.code and not (tmp_path / "out").exists()
