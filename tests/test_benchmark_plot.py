"""The benchmark's statistics, tables and figures, by hand. What needs rliable is drawn by the gate."""

import re
import sys

import numpy as np
import pytest
from benchmark_common import load, put_run
from conftest import ROOT
from scipy.stats import ttest_ind


@pytest.fixture
def stats(monkeypatch):
    return load("stats", monkeypatch)


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """benchmark/kept.py with a folder of results of its own."""
    module = load("kept", monkeypatch)
    monkeypatch.setitem(sys.modules, "kept", module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


@pytest.fixture
def plot(kept, monkeypatch, tmp_path):
    """benchmark/plot.py with the same folder, and a suite `tiny` in it."""
    module = load("plot", monkeypatch)
    monkeypatch.setattr(module, "PAGES", [])
    monkeypatch.setattr(module, "aggregate", lambda x: (x.mean(0), np.stack([x.min(0), x.max(0)])))
    put_run(tmp_path / "tiny", "one method", 10, (0.75, 1.0), seconds=6, resumed=True)
    put_run(tmp_path / "tiny", "one method", 2, (0.25, 0.5))
    return module


# --- Statistics ------------------------------------------------------------------------------------------------------
def test_interquartile_mean_leaves_out_a_quarter_at_each_end(stats):
    three = np.array([[1.0], [6.0], [2.0]])
    five = np.array([[9.0, 0.0], [2.0, 1.0], [3.0, 2.0], [4.0, 3.0], [-7.0, 9.0]])
    assert stats.interquartile_mean(three).tolist() == [3.0]
    assert stats.interquartile_mean(five).tolist() == [3.0, 2.0]


@pytest.mark.parametrize(
    "low, high, margin, expected",
    [
        (0.01, 0.2, 0.0, "supported"),
        (0.01, 0.05, 0.0, "supported"),
        (-0.01, 0.2, 0.0, "inconclusive"),
        (-0.2, -0.01, 0.0, "contradicted"),
        (-0.04, 0.2, 0.05, "supported"),
        (-0.06, 0.1, 0.05, "inconclusive"),
        (-0.2, -0.04, 0.05, "inconclusive"),
        (-0.2, -0.06, 0.05, "contradicted"),
        (-0.09, 0.09, 0.0, "no difference"),
        (-0.11, 0.09, 0.0, "inconclusive"),
        (-0.09, 0.09, 0.1, "no difference"),  # and not "supported": it is what the interval says
        (np.nan, np.nan, 0.0, "inconclusive"),
    ],
)
def test_verdict(stats, low, high, margin, expected):
    assert stats.verdict(low, high, margin, 0.1) == expected


def test_difference_has_welchs_interval(stats, plot):
    gain, (low, high) = stats.difference([np.array([1.0, 3.0])], [np.array([0.0, 2.0])])
    # Both samples' variance is 2, so the standard error is sqrt(2/2 + 2/2), with 2 degrees of freedom: t = 4.302653
    half = 4.302653 * 2**0.5
    assert gain == 1.0 and (low, high) == pytest.approx((1 - half, 1 + half), abs=1e-5)
    gain, interval = stats.difference([np.array([1.0, 1.0])], [np.array([0.5, 0.5])])
    assert gain == 0.5 and np.isnan(interval).all()
    assert (
        plot.with_interval(gain, interval, 2, "+") == "+0.50 [?, ?]"
        and stats.verdict(*interval, 0.0, 0.1) == "inconclusive"
    )
    random = np.random.default_rng(0)
    unequal = random.normal(1, 0.1, 8), random.normal(0, 0.3, 5)
    welch = ttest_ind(*unequal, equal_var=False)
    assert stats.difference(unequal[:1], unequal[1:], 0.9)[1] == pytest.approx(tuple(welch.confidence_interval(0.9)))
    assert stats.compare(*unequal, 0.0)[0] == pytest.approx(welch.pvalue)
    shifted = ttest_ind(unequal[0] - 0.9, unequal[1], equal_var=False)
    assert stats.compare(*unequal, -0.9)[0] == pytest.approx(shifted.pvalue)


def test_difference_of_differences_by_hand(stats):
    """Four samples of variance 2 and two runs each: a standard error of sqrt(4), four degrees of freedom. Then one of
    variance 8: squares 1, 1, 1 and 4, so 49 / (1 + 1 + 1 + 16) = 2.578947 degrees of freedom, t = 3.497566."""
    up, down, wide = np.array([3.0, 5.0]), np.array([0.0, 2.0]), np.array([-1.0, 3.0])
    _, (low, high) = stats.difference([up, down], [down, wide])
    assert (high - low) / 2 == pytest.approx(3.497566 * 7**0.5, abs=1e-4)
    gain, (low, high) = stats.difference([up, down], [down, down])
    assert gain == 3.0 and (low, high) == pytest.approx((3 - 2 * 2.776445, 3 + 2 * 2.776445), abs=1e-5)


@pytest.mark.parametrize(
    "pvalues, levels",
    [
        ([0.001, 0.04, 0.01], [0.05 / 3, 0.05, 0.05 / 2]),
        ([0.001, 0.04, 0.03], [0.05 / 3, 0.05 / 2, 0.05 / 2]),  # 0.03 fails at 0.025, so 0.04 has no chance at 0.05
        ([0.02, 0.01], [0.05, 0.05 / 2]),
        ([0.03, 0.9, 0.9, 0.9], [0.05 / 4] * 4),
        ([0.0, 0.0, 0.04], [0.05 / 3, 0.05 / 3, 0.05]),  # equal ones don't depend on their order
    ],
)
def test_holms_levels(stats, pvalues, levels):
    assert stats.holm_levels(pvalues) == pytest.approx(levels)


def test_cells_are_drawn_and_then_seeds_in_them(stats):
    """Gains of 0 and 1 in two cells without spread: a mean of 0, 0.5 and 1 with chances 1/4, 1/2 and 1/4, as with two
    seeds of one cell. With both, four draws of 0 or 1 which are all in the upper cell with a chance of 1/4."""
    for gains in (np.array([[0.0], [1.0]]), np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 1.0]])):
        samples = stats.resample(gains)
        assert [np.mean(samples == x) for x in (0.0, 0.5, 1.0)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    samples = stats.resample(np.array([[0.0, 1.0], [2.0, 3.0]]))
    # 0: both draws of a cell are the lower one and both seeds of both draws too, 1/4 * (1/4 * 1/4)
    assert np.mean(samples == 0.0) == pytest.approx(1 / 64, abs=0.005)


def test_gain_over_cells_has_the_wider_of_two_intervals(stats, monkeypatch):
    """Gains by cell and seed 1, 2 and 2, 5, so cells' means of 1.5 and 3.5: Student's t with a standard error of 1 and
    one degree of freedom is tan(pi / 4) = 1 at a level of 0.5 and 3.077684 at 0.8."""
    ours, others = np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([[0.0, 0.0], [1.0, 1.0]])
    by_hand = {((1.0, 2.0), (2.0, 5.0)): np.arange(-1.0, 9.0)}  # samples -1, 0, ..., 8
    monkeypatch.setattr(stats, "resample", lambda gains, seed: by_hand[tuple(map(tuple, gains))])
    pvalue, interval = stats.compare(ours, others, 0.0)
    assert pvalue == pytest.approx(2 * 2 / 10)  # two of ten samples are no gain; Student's p is smaller, 0.242
    assert interval(0.5) == (2.5, pytest.approx((1.25, 5.75)))  # the quartiles of the samples are wider than 1.5, 3.5
    by_hand[(1.0, 2.0), (2.0, 5.0)] = np.arange(1.0, 11.0)
    pvalue, interval = stats.compare(ours, others, 0.0)
    assert pvalue == pytest.approx(2 * np.arctan(1 / 2.5) / np.pi)  # Cauchy's tail beyond 2.5
    assert interval(0.8) == (2.5, pytest.approx((2.5 - 3.077684, 9.1)))  # one side from each


def test_score_per_minute_by_hand(stats):
    """Evaluations after 1, 3 and 4 minutes with 0.5, 1.0 and 0.25: by minute 5 (0.5 * 2 + 1 * 1 + 0.25 * 1) / 5."""
    minutes, scores = np.array([1.0, 3.0, 4.0]), np.array([0.5, 1.0, 0.25])
    assert stats.mean_until(minutes, scores, 5.0) == pytest.approx(2.25 / 5)
    assert stats.mean_until(minutes, scores, 3.5) == pytest.approx((0.5 * 2 + 1 * 0.5) / 3.5)
    assert stats.mean_until(minutes, scores, 0.5) == 0.0
    assert [stats.score_at(minutes, scores, limit) for limit in (0.5, 1.0, 3.5, 9.0)] == [0.0, 0.5, 1.0, 0.25]
    both = stats.mean_until(np.stack([minutes, 2 * minutes]), np.stack([scores, scores]), np.array([5.0, 5.0]))
    assert both == pytest.approx([2.25 / 5, 0.5 * 3 / 5])


def test_runs_needed_by_the_textbook(stats):
    """A gain of a standard deviation takes 16 runs an arm, 2 (1.96 + 0.84)^2 = 15.7, half of it four times as many."""
    one = np.array([0.0, 2.0]) / 2**0.5  # a variance of 1
    assert stats.runs_needed(1.0, one, one) == 16 and stats.runs_needed(-0.5, one, one) == 63
    assert stats.runs_needed(1.0, one, one, level=0.05 / 3) == 21  # 2 (2.394 + 0.842)^2 = 20.9
    assert stats.runs_needed(100.0, one, one) == 2 and stats.runs_needed(0.0, one, one) is None


# --- Kept results ----------------------------------------------------------------------------------------------------
def test_suite_is_read_seed_by_seed(plot):
    results = plot.read_suite("tiny")
    assert list(results) == ["one method"]
    seeds, steps, minutes, scores = results["one method"]
    assert seeds == [2, 10] and steps.tolist() == [10, 20] and minutes.tolist() == [[1, 2], [1, 2]]
    assert scores.tolist() == [[0.25, 0.5], [0.75, 1.0]]
    assert results["one method"].both.tolist() == [[0.5, 0.375], [1.0, 0.875]]
    assert plot.read_suite("tiny", "greedy_return")["one method"].scores.tolist() == [[1.0, 1.0]] * 2


def test_suite_may_name_its_score(plot, kept, monkeypatch):
    monkeypatch.setitem(kept.SCORES, "tiny", "greedy_return")
    assert plot.read_suite("tiny")["one method"].scores.tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_seeds_with_different_evaluations_are_refused(plot, tmp_path):
    put_run(tmp_path / "tiny", "one method", 3, (0.0, 0.0, 0.0))
    plot.read_kept.cache_clear()
    with pytest.raises(ValueError, match="not as many evaluations"):
        plot.read_suite("tiny")


def test_suite_is_judged_when_it_has_all_its_seeds(plot, kept, tmp_path, monkeypatch):
    methods = {f"cell {cell}, {method}": "" for cell in (1, 2) for method in ("a, b", "c")}
    first = {name: 1 if name.startswith("cell 1") else 3 for name in methods}  # the second cell has seeds of its own
    monkeypatch.setitem(kept.SUITES, "cells", {"n": 2, "first_seed": first, "methods": methods})
    monkeypatch.setattr(kept, "CELLS", ("cells",))
    for seed in (1, 2):
        for i, name in enumerate(methods):
            plot.read_kept.cache_clear()
            assert plot.read_scores("cells") == {}
            put_run(tmp_path / "cells", name, seed + 2 * (i >= 2), (i, seed))
    plot.read_kept.cache_clear()
    scores = plot.read_scores("cells")
    assert list(scores) == ["a, b", "c"] and scores["a, b"].shape == (2, 2, 2)
    assert scores["c"].tolist() == [[[1, 1.0], [2, 1.5]], [[1, 2.0], [2, 2.5]]]  # cell, seed: end, mean
    put_run(tmp_path / "cells", "cell 1, c", 5, (0, 0))  # no arm is topped up
    plot.read_kept.cache_clear()
    assert plot.read_scores("cells") == {}


def test_returns_have_the_scale_of_their_suite(kept, monkeypatch):
    runs = {"a": {1: ({}, [{"greedy_return": "0.5"}])}}
    monkeypatch.setattr(kept, "read_kept", lambda suite: runs)
    assert [(x.digits, x.highest) for x in map(kept.scale_of, ("dmc-sparse", "miniworld"))] == [(2, 1000), (2, 1)]
    runs["a"][1][1][0]["greedy_return"] = "500"
    assert kept.scale_of("dmc-sparse").digits == 0


def test_scores_at_equal_minutes_by_hand(plot):
    """The faster method's runs in the two cells are done by minute 2 and 4, by when the slower one's have their first
    score or none."""
    fast = np.array([[[1.0, 2.0]], [[2.0, 4.0]]])  # (cells, 1 seed, 2 evaluations)
    scores = np.array([[[0.5, 1.0]], [[0.5, 1.0]]])
    faster = plot.Runs([1], np.array([10.0, 20.0]), fast, scores)
    slower = faster._replace(minutes=np.array([[[1.5, 3.0]], [[5.0, 9.0]]]))
    ours, others = plot.at_equal_minutes(faster, slower)
    assert ours.tolist() == [[[1.0, 0.25]], [[1.0, 0.25]]]  # at that moment, mean until then
    assert others.tolist() == [[[0.5, 0.125]], [[0.0, 0.0]]]


# --- Verdicts --------------------------------------------------------------------------------------------------------
def test_claims_and_curves_name_methods_of_the_kept_results(monkeypatch):
    plot = load("plot", monkeypatch)
    claims = plot.FAMILIES.values()
    for suite, *pair, _ in (p for found in claims for predictions in found.values() for p in predictions):
        assert {*pair} <= plot.read_scores(suite).keys() and pair[0] != pair[1]
        assert (plot.RESULTS / suite / "PROTOCOL.md").exists()
    assert set(plot.AT_THE_END) <= plot.FAMILIES.keys()
    for suite, panels in plot.PANELS.items():
        results = plot.read_suite(suite)
        results = plot.over_cells(results) if suite in plot.CELLS else results
        assert {method for found in panels.values() for method in found.values()} <= results.keys()


def test_a_claims_predictions_share_its_error(stats, kept):
    """Two predictions, the clear one tested at 0.05 / 2 and the other then at 0.05; a third has too few runs."""
    random = np.random.default_rng(0)
    low, high = random.normal(0, 0.1, (2, 6, 2)) + np.array([[[0.0]], [[1.0]]])
    scores = {"tiny": {"low": low, "high": high, "same": low + 0.01, "few": high[:4]}}
    predictions = [("tiny", "high", "low", 0.0), ("tiny", "same", "low", 0.0), ("tiny", "few", "low", 0.0)]
    (first, mean, end, counts), (second, other_mean, _, _) = kept.judge(predictions, scores)
    assert (first, second, counts) == (*predictions[:2], (6, 6, 1))
    assert mean == stats.difference([high[:, 1]], [low[:, 1]], 1 - 0.05 / 2)
    assert end == stats.difference([high[:, 0]], [low[:, 0]], 1 - 0.05 / 2)
    assert other_mean == stats.difference([low[:, 1] + 0.01], [low[:, 1]], 0.95)


def test_a_measurement_has_no_end_and_no_part_in_its_error(stats, kept):
    random = np.random.default_rng(0)
    low, high = random.normal(0, 0.1, (2, 6, 2)) + np.array([[[0.0]], [[1.0]]])
    noise = kept.UNDER_NOISE[0]
    scores = {"tiny": {"low": low, "high": high, f"low{noise}": low, f"high{noise}": high}}
    predictions = [("tiny", "high", "low", 0.0), ("tiny", f"high{noise}", f"low{noise}", 0.0)]
    (_, mean, end, _), (_, _, no_end, _) = kept.judge(predictions, scores)
    assert mean == stats.difference([high[:, 1]], [low[:, 1]], 1 - 0.05 / 2) and no_end is None
    assert end == stats.difference([high[:, 0]], [low[:, 0]], 0.95)


def test_margin_enters_the_test(stats, kept):
    """A gain of about zero comes last without a margin and, with one that large, first."""
    random = np.random.default_rng(1)
    base, better = random.normal(0, 0.1, (8, 2)), random.normal(0.3, 0.1, (8, 2))
    scores = {"tiny": {"base": base, "better": better, "same": base[::-1]}}
    predictions = [("tiny", "same", "base", 1.0), ("tiny", "better", "base", 0.0)]
    found = kept.judge(predictions, scores)
    assert found[0][1] == stats.difference([base[::-1, 1]], [base[:, 1]], 1 - 0.05 / 2)


def test_predictions_over_cells_are_judged(stats, kept):
    """By cell and seed. All gains over "low" are positive: tested first, at 0.05 / 2; those over "same" at 0.05."""
    random = np.random.default_rng(0)
    ours, low, same = random.uniform(0, 1, (3, 4, 3, 2)) + np.array([2.0, 0.0, 2.0])[:, None, None, None]
    scores = {"tiny": {"ours": ours, "low": low, "same": same}}
    predictions = [("tiny", "ours", "same", 0.0), ("tiny", "ours", "low", 0.0)]
    for (_, mean, end, counts), others, level in zip(kept.judge(predictions, scores), (same, low), (0.05, 0.025)):
        assert counts == (12, 12, 4)
        for (gain, interval), column in ((mean, 1), (end, 0)):
            gains = (ours - others)[..., column]
            _, student = stats.difference([gains.mean(1)], [], 1 - level)
            samples = np.quantile(stats.resample(gains), [level / 2, 1 - level / 2])
            assert gain == pytest.approx(gains.mean())
            assert interval == pytest.approx((min(samples[0], student[0]), max(samples[1], student[1])))


def test_pair_without_spread_passes_no_test(stats, kept):
    """It must not take the strictest level from a pair that has a test."""
    clear = np.array([[0.0, 0.1], [0.1, 0.0]] * 3)
    scores = {"tiny": {"one": np.ones((5, 2)), "half": np.full((5, 2), 0.5), "low": clear, "high": clear + 1}}
    flat, found = kept.judge([("tiny", "one", "half", 0.0), ("tiny", "high", "low", 0.0)], scores)
    assert flat[1][0] == 0.5 and np.isnan(flat[1][1]).all()
    assert found[1] == stats.difference([clear[:, 1] + 1], [clear[:, 1]], 1 - 0.05 / 2)


def test_a_verdict_that_another_bootstrap_turns_is_inconclusive(kept, monkeypatch):
    """Of ten sets of samples one has its lower end below zero; the table shows the first one's interval."""
    monkeypatch.setattr(kept, "CELLS", ("cells",))
    monkeypatch.setattr(kept, "FAMILIES", {"family": {"a claim": [("cells", "a", "b", 0.0)]}})
    monkeypatch.setattr(kept, "read_scores", lambda suite: {})
    monkeypatch.setattr(kept, "scale_of", lambda suite: kept.SUCCESS)
    lows = {seed: -0.5 if seed == 7 else 0.1 for seed in range(kept.BOOTSTRAPS)}
    counts = (6, 6, 2)
    monkeypatch.setattr(kept, "judge", lambda p, scores, seed: [(p[0], (0.3, (lows[seed], 0.9)), None, counts)])
    judged, words = kept.judge_family("family")
    assert judged["a claim"][0][1] == (0.3, (0.1, 0.9)) and list(words.values()) == ["inconclusive"]
    kept.judge_family.cache_clear()
    lows[7] = 0.2
    assert list(kept.judge_family("family")[1].values()) == ["supported"]


def test_a_family_may_be_judged_by_the_end(kept, monkeypatch):
    monkeypatch.setattr(kept, "FAMILIES", {name: {"a claim": [("tiny", "a", "b", 0.0)]} for name in ("mean", "end")})
    monkeypatch.setattr(kept, "AT_THE_END", ("end",))
    monkeypatch.setattr(kept, "read_scores", lambda suite: {})
    monkeypatch.setattr(kept, "scale_of", lambda suite: kept.SUCCESS)
    gains = (0.3, (0.2, 0.4)), (-0.3, (-0.4, -0.2))
    monkeypatch.setattr(kept, "judge", lambda predictions, *_: [(predictions[0], *gains, (6, 6, 1))])
    assert list(kept.judge_family("mean")[1].values()) == ["supported"]
    assert list(kept.judge_family("end")[1].values()) == ["contradicted"]


def test_verdicts_table_has_every_splits_gain(plot, monkeypatch):
    monkeypatch.setattr(plot, "CELLS", ("cells",))
    monkeypatch.setattr(plot, "splits_of", lambda suite: ["x", "x", "y"])
    monkeypatch.setattr(plot, "hinges_on", lambda gains, splits, margin: ["x", "y"] if margin else [])
    gains = np.array([0.5, 0.25, -0.25])[:, None, None] * np.ones((3, 2, 2))
    monkeypatch.setattr(plot, "read_scores", lambda suite: {"one": gains, "two": 0 * gains})
    first, second = ("cells", "one", "two", 0.0), ("cells", "one", "two", 0.1)
    judged = {"a claim": [(first, (0.25, (0.125, 0.375)), (0.5, (np.nan, np.nan)), (6, 6, 3)),
                          (second, (-0.25, (-0.5, 0.0)), None, (6, 6, 3))]}  # fmt: skip
    words = {first: "supported", second: "inconclusive"}
    monkeypatch.setattr(plot, "judge_family", lambda family: (judged, words))
    head, _, *rows = plot.write_verdicts("family").splitlines()
    assert head.endswith("| runs | cells | hinges on | x | y |")
    assert rows == [
        "| a claim | one > two | supported | +0.25 [+0.12, +0.38] | +0.50 [?, ?] | 6, 6 | 3 | - | +0.38 | -0.25 |",
        "|  | one > two - 0.10 | inconclusive | -0.25 [-0.50, +0.00] | - | 6, 6 | 3 | x, y | +0.38 | -0.25 |",
    ]
    monkeypatch.setattr(plot, "AT_THE_END", ("family",))
    gains[:, :, 0] *= 2
    assert [row[-18:] for row in plot.write_verdicts("family").splitlines()[2:]] == [" | +0.75 | -0.50 |"] * 2
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    plot.draw_forest("path", "family")
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a claim", "one > two", "one > two - 0.10"]
    thick = [line for line in axes.lines if line.get_linewidth() == 2.5 and len(line.get_xdata()) == 2]
    assert [list(line.get_xdata()) for line in thick] == [[0.125, 0.375], [-0.5, 0.0]]
    assert [line.get_color() for line in thick] == [plot.VERDICTS["supported"], plot.VERDICTS["inconclusive"]]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"] == [0.0, -0.1]


# --- Tables ----------------------------------------------------------------------------------------------------------
def test_few_runs_have_no_interval(plot):
    row = "| one method | 2 | 0.75 | 0.62 | 0.50 1.00 | 1.0 |"  # the resumed run's six seconds do not count
    assert plot.write_table("tiny").endswith(row)
    assert plot.scores_text(np.array([[0.5], [1.0]] * 3), 2) == ["0.75 [0.50, 1.00]"]


def test_cells_have_both_scores_and_every_splits_own(plot, tmp_path, monkeypatch):
    """Two splits with two encoders each: b gains 0.5 over a in the first split and 0.25 in the second, in one of its
    cells nothing at the end."""
    gains = {("one", 1): (0.5, 0.5), ("one", 2): (0.5, 0.5), ("two", 1): (0.25, 0.25), ("two", 2): (0.5, 0.0)}
    for (split, encoder), gain in gains.items():
        for seed in (1, 2):
            put_run(tmp_path / "cells", f"{split} encoder {encoder}, a", seed, (0.25, 0.25))
            put_run(tmp_path / "cells", f"{split} encoder {encoder}, b", seed, [0.25 + x for x in gain])
    means = {0.25: (0.0, 0.5), 0.5625: (0.5, 0.75), 0.625: (0.25, 1.0)}
    monkeypatch.setattr(plot, "FEW", 4)  # cells
    monkeypatch.setattr(plot, "compare", lambda x, zero: (None, lambda: (x.mean() - zero.sum(), means[x.mean()])))
    assert plot.write_cells_table("cells").splitlines() == [
        "| method | n | at the end | mean over the run | one | two |",
        "|---|---|---|---|---|---|",
        "| a | 8 | 0.25 [0.00, 0.50] | 0.25 [0.00, 0.50] | 0.25 | 0.25 |",
        "| b | 8 | 0.56 [0.50, 0.75] | 0.62 [0.25, 1.00] | 0.75 | 0.50 |",
    ]
    monkeypatch.setattr(plot, "UNSEEN", ("cells",))  # judged at the end
    head, _, _, row = plot.write_cells_table("cells").splitlines()
    assert head.endswith("| mean over the run | one, at the end | two, at the end | trained tasks, at the end |")
    assert row.endswith(" | 0.75 | 0.38 | 0.56 |")
    monkeypatch.setattr(plot, "FEW", 5)
    assert plot.write_cells_table("cells").splitlines()[-1].startswith("| b | 8 | 0.56 | 0.62 |")


def test_tables_of_the_same_cells_are_joined(plot, monkeypatch):
    tables = {name: f"| method |\n|---|\n| {name} 1 |\n| {name} 2 |" for name in ("a", "b")}
    monkeypatch.setattr(plot, "write_cells_table", tables.get)
    assert plot.write_cells_tables(("a", "b")) == tables["a"] + "\n| b 1 |\n| b 2 |"


def test_settings_table_has_a_column_per_depth(plot, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules["kept"].SCORES, "s", "greedy_unseen_success")
    for method, seed, unseen, trained in (
        ("finetuned, none, weight 3", 1, (0.0, 0.5), (0.5, 1.0)), ("finetuned, none, weight 3", 2, (0.0, 1.0), (0, 0)),
        ("frozen bottom, none, weight 3", 1, (0.0, 0.25), (0.0, 1.0)), ("frozen bottom, simsiam", 1, (0, 0), (1, 1)),
    ):  # fmt: skip
        put_unseen(tmp_path / "s", *method.split(", ", 1), seed, trained, unseen, (0, 0), "00000")
    assert plot.write_settings("s").splitlines() == [
        "| setting | finetuned: unseen, trained (n) | frozen bottom: unseen, trained (n) |",
        "|---|---|---|",
        "| projector none, weight 3 | 0.75, 0.38 (2) | 0.25, 0.50 (1) |",
        "| simsiam | - | 0.00, 1.00 (1) |",
    ]


def test_rates_table_has_a_row_per_method(plot, tmp_path):
    runs = [("a, b", "1e-3", (0.25, 0.75)), ("a, b", "1e-2", (0.5, 0.5))]
    runs += [("c", "1e-3", (0.5,)), ("c", "1e-2", (1.0, 1.0)), ("d", "1e-2", (1.0, 1.0))]
    for method, rate, scores in runs:
        for seed, score in enumerate(scores, 1):
            put_run(tmp_path / "a-rates", f"{method}, {rate}", seed, (score, 0.75))
    assert plot.write_rates_table("a-rates").splitlines() == [
        "| method | 1e-3 | 1e-2 | n |",
        "|---|---|---|---|",
        "| a, b | **0.62 (0.75)** | 0.62 (0.75) | 2 |",  # the smaller one of two equals
        "| c | 0.62 (0.75) | 0.88 (0.75) | 1 or 2 |",  # not as many runs with each
        "| d |  | 0.88 (0.75) | 2 |",  # not every rate
    ]


def test_freezings_gain_for_the_large_encoder_by_hand(plot, tmp_path):
    """Frozen runs are evaluated after 1 and 2 minutes, finetuned ones after twice as long: by minute 2, when the frozen
    ones are done, they have only just their first score. With the second encoder all of this goes twice as fast, as on
    another machine, and changes no score."""
    scores = {  # method: both scores of four runs, two with each encoder
        "impala, 7 frozen": [(0.5, 1.4), (0.5, 1.2), (0.7, 1.2), (0.3, 1.4)],
        "impala, 0 frozen": [(0.2, 0.4), (0.2, 0.2), (0.4, 0.2), (0.0, 0.4)],
        "nature, frozen bottom": [(0.2, 0.6), (0.2, 0.4), (0.4, 0.4), (0.4, 1.0)],
        "nature, finetuned": [(0.2, 0.2), (0.2, 0.4), (0.4, 0.4), (0.0, 0.2)],
    }
    for name, runs in scores.items():
        for run, pair in enumerate(runs):
            pace = (2 if name.endswith(("0 frozen", "finetuned")) else 1) / (1 + run // 2)
            put_run(tmp_path / "jump-impala", f"encoder {run // 2}, {name}", run, pair, (pace, 2 * pace))
    step, minute = (row.split(" | ") for row in plot.write_freezing().splitlines()[2:])
    # Means over the run: 0.9, 0.25, 0.45 and 0.25. Within 2 minutes half of the first score for frozen runs, 0.25 and
    # 0.15, and nothing for the others, whose first score comes at that moment.
    assert step == ["| per step", "+0.45", "+0.65", "+0.20", "4, 4, 4, 4 |"]
    assert minute == ["| per minute", "+0.10", "+0.25", "+0.15", "4, 4, 4, 4 |"]


def test_verdicts_hinge_on_splits_by_hand(kept):
    """Two cells a split; with all three the gain is clear, and without the one of the steady cells it is not."""
    gains = np.array([[0.5, 0.5], [0.5, 0.5], [0.5, 0.4], [0.4, 0.5], [0.0, 1.2], [1.2, 0.0]])
    splits = ["a", "a", "b", "b", "c", "c"]
    low = kept.compare(gains, 0 * gains)[1]()[1][0]
    assert low > 0 and kept.hinges_on(gains, splits, 0.0) == []
    gains[4:] -= 0.5  # c's mean is 0.1
    assert kept.compare(gains, 0 * gains)[1]()[1][0] > 0 > kept.compare(gains[2:], 0 * gains[2:])[1]()[1][0]
    assert "a" in kept.hinges_on(gains, splits, 0.0)
    assert kept.hinges_on(gains, splits, 5.0) == []  # far above
    gains = np.array([[0.02, 0.0], [0.0, -0.02]] * 2 + [[-0.1, -0.14], [-0.14, -0.1]])  # above -0.1 without c alone
    assert kept.hinges_on(gains, splits, 0.1) == ["c"]


def test_changes_under_noise_by_hand(plot, tmp_path, monkeypatch):
    """Success without noise and under 64: one run loses half of 0.5, one gains 0.25, one has none to lose."""
    from run import RUN_COLUMNS, append

    shares = {("one", 1): (0.5, 0.25), ("one", 2): (0.5, 0.75), ("two", 3): (0.0, 0.0), ("two", 4): (1.0, 0.0)}
    for (cell, seed), pair in shares.items():
        row = {"method": f"{cell}, a", "seed": seed, "global_step": 10, "seconds": 1, "greedy_return": 1,
               "greedy_success": 0.5}  # fmt: skip
        row |= {f"fresh head, noise {std}": share for std, share in zip((0, 64), pair)}
        append(tmp_path / "jump-noise" / "evaluations.csv.gz", [row])
        append(tmp_path / "jump-noise" / "runs.csv", [{name: row.get(name, "") for name in RUN_COLUMNS}])
    scores = plot.read_scores("jump-noise")
    assert list(scores) == ["a, fresh head", "a, change under noise", "a, relative change"]
    assert scores["a, change under noise"][..., 0].tolist() == [[-0.25, 0.25], [0.0, -1.0]]
    assert scores["a, relative change"][..., 1].tolist() == [[-0.5, 0.0], [0.0, -1.0]]
    monkeypatch.setattr(plot, "STDS", (0, 64))
    assert plot.write_noise_table().splitlines()[2] == "| a | 4 | 0.50 | 0.25 | 1 |"


CELLS_OF_UNSEEN = ("lattice 8 floors encoder 2", "lattice 5 grid encoder 3")


def put_unseen(folder, cell, method, seed, trained, unseen, noisy, solved, minutes=(1, 2), share=()):
    """Puts a run of jump-unseen with these scores of both evaluations, played under noise and on a few tasks."""
    from run import RUN_COLUMNS, append

    tasks = "20:18 24:10 20:10 21:10 20:20"  # trained by the first cell, and by its encoder; by the other one's
    for i, step in enumerate((10, 20)):
        row = {"method": f"{cell}, {method}", "seed": seed, "global_step": step, "seconds": 60 * minutes[i]}
        row |= {"greedy_return": 1, "greedy_success": trained[i], "greedy_unseen_success": unseen[i]}
        row |= {"sampled_unseen_success": 0.125} | ({"ssl_grad_share": share[i]} if share else {})
        append(folder / "evaluations.csv.gz", [row | ({"tasks": tasks, "greedy": solved} if i else {})])
    append(folder / "runs.csv", [{name: row.get(name, "") for name in RUN_COLUMNS}])
    noise = {"method": row["method"], "seed": seed, "std": 0.0, "draws": 5}
    for std, scores in ((64.0, noisy), (16.0, (1.0, 1.0))):  # another noise is no part of the tables
        found = dict(zip(("greedy_success", "greedy_unseen_success"), scores))
        append(folder / "noise.csv", [noise | {"std": std, **found}])


def test_unseen_tasks_by_hand(plot, tmp_path):
    """Two cells, in each of which other tasks were trained or known to the encoder."""
    for cell, solved in zip(CELLS_OF_UNSEEN, ("01010", "01010")):
        put_unseen(tmp_path / "u", cell, "a", 1, (0.0, 0.5), (0.0, 0.25), (0.25, 0.0), solved)
        put_unseen(tmp_path / "u", cell, "b", 1, (0.5, 1.0), (0.5, 0.75), (1.0, 0.5), "11111", share=(0.5, 1.5))
    # 24:10, 20:18 and 20:10 are known in the first cell, 20:10 and 20:20 in the other: 1 of 2 and 2 of 3 are solved
    assert plot.is_complete("u")
    head, _, *rows = plot.write_unseen("u").splitlines()
    assert head == (
        "| method | unseen | unseen, sampled | unseen, noise | trained | trained, noise | "
        "loss's gradient over RL's | "
        "unseen, without the encoder's | trained, mean over the run |"
    )
    assert rows == [
        "| a | 0.25 | 0.12 | 0.00 | 0.50 | 0.25 | - | 0.58 | 0.25 |",
        "| b | 0.75 | 0.12 | 0.50 | 1.00 | 1.00 | 1.50 | 1.00 | 0.75 |",
    ]
    path = tmp_path / "u" / "noise.csv"
    path.write_text("".join(line for line in path.open() if "encoder 3, b" not in line))
    plot.read_kept.cache_clear()
    assert not plot.is_complete("u")  # without the noise of one run


def test_freezing_at_equal_minutes_and_under_noise_by_hand(kept, plot, tmp_path):
    """The frozen bottom takes two minutes, 0.5 in the second one; the other method's median run takes three, with 0.5
    from a minute and a half on. Under noise the frozen bottom solves 0.5 and, in the second cell, 0.25."""
    for i, cell in enumerate(CELLS_OF_UNSEEN):
        for seed in (1, 2):
            noisy, slow = (0.5 - 0.25 * i, 0), (4.5, 9) if i and seed == 2 else (1.5, 3)  # a slow one, to be ignored
            put_unseen(tmp_path / "u", cell, "frozen bottom", seed, (0.5, 1.0), (0, 0), noisy, "00000", (1, 2))
            put_unseen(tmp_path / "u", cell, "finetuned", seed, (0.5, 1.0), (0, 0), (0.0, 0), "00000", slow)
    scores = kept.freezing_again("u")
    ours, others = (scores[f"{arm}, equal minutes"] for arm in ("frozen bottom", "finetuned"))  # (2 cells, 2 seeds, 2)
    assert ours.tolist() == [[[1.0, 0.25]] * 2] * 2 and others.tolist() == [[[0.5, 0.125]] * 2] * 2
    assert scores["frozen bottom, noise"].tolist() == [[[0.5, 0.5]] * 2, [[0.25, 0.25]] * 2]
    assert scores["finetuned, noise"].tolist() == [[[0.0, 0.0]] * 2] * 2


def test_own_rates_of_the_kept_comparisons_are_those_that_their_protocol_chooses(monkeypatch):
    """Every run of jump-cells has the rate with the highest mean on the validation tasks."""
    plot = load("plot", monkeypatch)
    best = {}
    for suite in ("jump-rates", "jump-loss-rates"):
        best |= {method: plot.best_rate(found) for method, found in plot.by_rate(plot.read_suite(suite)).items()}
    for name, runs in plot.read_kept("jump-cells").items():
        for row, _ in runs.values():
            assert f"--learning-rate {best[name.split(', ', 1)[1]]} " in row["command"]


def test_rates_of_unseen_tasks_are_those_of_their_own_floors(monkeypatch):
    """Every run of jump-unseen has the rate that its loss, or none, prefers at its depth in jump-settings."""
    plot, best = load("plot", monkeypatch), {}
    rates, chosen = ("3e-4", "1e-3", "3e-3"), "none, weight 3, whole minibatch"
    results = plot.read_suite("jump-settings", "greedy_success")
    for depth in ("frozen bottom", "finetuned", "from scratch"):
        for loss, name in (("", "no loss, rate {}"), (" + loss", chosen + ", rate {}")):
            names = {rate: f"{depth}, {name.format(rate)}" for rate in rates}
            found = {rate: results.get(x, results[f"{depth}, {chosen}"]) for rate, x in names.items()}  # its 1e-3
            best[depth + loss] = plot.best_rate(found)
    for name, runs in plot.read_kept("jump-unseen").items():
        for row, _ in runs.values():
            assert f"--learning-rate {best[name.split(', ', 1)[1]]} " in row["command"]


# --- Figures ---------------------------------------------------------------------------------------------------------
def test_curves_are_over_steps_and_minutes(plot, monkeypatch):
    scores, figures = np.array([[0.0, 1.0], [0.5, 0.5]]), []
    runs = plot.Runs([1, 2], np.array([60.0, 120.0]), np.array([[1.0, 2.0], [3.0, 4.0]]), scores)
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    plot.draw_curves("path", {"a title": {"a": runs, "b": runs}}, "solved", minutes=True)
    steps, minutes = figures[0].axes
    assert [text.get_text() for text in steps.get_legend().get_texts()] == ["a (n = 2)", "b (n = 2)"]
    assert len(steps.lines) == len(minutes.lines) == 2 * (2 + 1)  # every run, as two are few, and the mean
    assert steps.lines[2].get_xydata().tolist() == [[60, 0.25], [120, 0.75]]
    assert minutes.lines[2].get_xydata().tolist() == [[2, 0.25], [3, 0.75]]  # over the median of the minutes
    assert steps.get_title() == "a title" and steps.get_ylabel() == "solved"
    assert [line.get_color() for line in steps.lines] == [line.get_color() for line in minutes.lines]


def test_official_marks_are_those_of_the_task_within_the_run(plot, tmp_path):
    rows = ["task,frames,mean,min,max", "a_b,50,400,300,600", "a_b,100,900,800,950", "a_bc,50,1,1,1"]
    (tmp_path / "drqv2_official.csv").write_text("\n".join(rows))
    axes = plot.plt.figure().subplots()
    plot.draw_official(axes, "a_b", 99.0)
    ((marks, caps, _),) = axes.containers
    assert marks.get_xydata().tolist() == [[50.0, 400.0]] and axes.get_ylim() == (0, 1000)
    assert [cap.get_ydata().tolist() for cap in caps] == [[300.0], [600.0]]


def test_grid_shows_the_share_of_seeds_that_solve_a_task(plot, monkeypatch):
    grid, figures = plot.ppo_pisco.JUMP_GRID, []
    tasks = " ".join(f"{x}:{y}" for x, y in reversed(grid))
    rows = [[{"tasks": tasks, "greedy": "1" + "0" * 285}], [{"tasks": tasks, "greedy": "1" * 286}]]
    kept = {f"cell {seed}, m": {seed: ({}, found)} for seed, found in enumerate(rows)} | {"cell 1, other": {}}
    monkeypatch.setattr(plot, "read_kept", lambda suite: kept)
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    plot.draw_grid("path", {"one": ("suite", "cell*, m", "20:10"), "two": ("suite", "cell*, m", "wide")})
    frame, one, two, _ = figures[0].axes
    share = one.images[0].get_array()  # (floors, obstacles)
    assert share.shape == (11, 26) and share[-1, -1] == 1.0 and share[0, 0] == share[5, 5] == 0.5
    assert one.get_title() == "one: 144 of 286 tasks (n = 2)"  # 143.5
    assert [len(axes.collections[0].get_offsets()) for axes in (one, two)] == [1, 18]


# --- Pages -----------------------------------------------------------------------------------------------------------
def test_gains_in_sentences_stand_in_tables():
    """In those that plot.py writes from the kept runs; or a commit is named that has the runs."""
    gain = r"[+-]\d\.\d\d \[[+-]\d\.\d\d, [+-]\d\.\d\d\]"
    page, readme = ((ROOT / name).read_text() for name in ("benchmark/README.md", "README.md"))
    page = re.sub(r"```.*?```", "", page, flags=re.S)  # the output of a comparison
    tables = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    prose = " ".join(line for line in page.splitlines() if not line.startswith("|")) + readme
    gains = re.findall(rf"({gain})( \(commit \w{{7}})?", " ".join(prose.split()))
    assert len(gains) > 3 and not [gain for gain, commit in gains if not commit and gain not in tables]


def test_the_page_is_for_two_minutes(monkeypatch):
    """Its length, and a place for every table of verdicts; the README's sentences hold two numbers at most."""
    plot = load("plot", monkeypatch)
    page = (ROOT / "benchmark" / "README.md").read_text()
    text = re.sub(r"```.*?```", "", page, flags=re.S)
    words = [word for line in text.splitlines() if not line.startswith("|") for word in line.split()]
    assert len(words) <= 1300
    judged = [name for name in plot.FAMILIES if plot.judge_family(name)[0]]
    others = ("jump-unseen scores", "exploratory", "freezing", "noise", "speed", "jump-cells", "jump-others")
    for name in (*judged, *others):
        assert f"<!-- {name} -->" in page and f"<!-- /{name} -->" in page, name
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"## What was found\n(.+?)\n## ", readme, flags=re.S).group(1)
    assert len([line for line in found.splitlines() if line.startswith("| ")]) - 1 <= 8
    lines = re.sub(r"```.*?```", "", readme, flags=re.S).splitlines()
    prose = " ".join(line for line in lines if not line.startswith(("|", "!", "#", "$$")))
    prose = re.sub(r"`[^`]*`|\]\(\S+\)", "", prose)  # code and links
    for sentence in re.split(r"(?<=[.:;]) ", prose):
        assert len(re.findall(r"(?<![\w.])\d[\d,.]*", sentence)) <= 2, sentence
    lengths = {"plot.py": 550, "compare.py": 260}
    for name, limit in lengths.items():
        assert len((ROOT / "benchmark" / name).read_text().splitlines()) <= limit, name


def test_table_goes_between_its_marks_alone(plot, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- tiny -->\nold\nlines\n<!-- /tiny -->\nb <!-- other -->\nc\n<!-- /other -->\n")
    monkeypatch.setattr(plot, "PAGES", [page])
    plot.insert_table("tiny", r"| new \1 |")
    assert page.read_text() == "a\n<!-- tiny -->\n| new \\1 |\n<!-- /tiny -->\nb <!-- other -->\nc\n<!-- /other -->\n"


def test_only_what_is_named_is_drawn(plot, capsys, monkeypatch):
    monkeypatch.setattr(plot, "TABLES", {"jump-cells": lambda: "a table", "jump-long": lambda: 1 / 0})
    monkeypatch.setattr(plot, "FIGURES", {"jump-long": lambda path: 1 / 0, "jump-cells": lambda path: print(path.name)})
    assert plot.main(["jump-cells"]) == 0
    assert capsys.readouterr().out == "jump-cells\na table\n\njump-cells.png\n"
    monkeypatch.setattr(plot, "CELLS", ("jump-cells",))
    monkeypatch.setattr(plot, "is_complete", lambda suite: False)
    assert plot.main(["jump-cells"]) == 0 and "not all runs yet" in capsys.readouterr().out
    monkeypatch.setattr(plot, "TABLES", {"jump-others": lambda: 1 / 0})  # of three suites
    monkeypatch.setattr(plot, "CELLS", plot.BESIDE_UNSEEN)
    monkeypatch.setattr(plot, "is_complete", lambda suite: suite != "jump-augmented")
    assert plot.main(["jump-others"]) == 0 and "not all runs yet" in capsys.readouterr().out
    monkeypatch.setattr(plot, "TABLES", {"jump-cells": lambda: 1 / 0})
    assert plot.main(["--help"]) == 0 and "jump-cells" in capsys.readouterr().out
    assert plot.main(["bogus"]) == 2
    assert capsys.readouterr().err.startswith("plot.py: error: 'bogus'")


def test_report_has_medians_and_their_ratios(monkeypatch, tmp_path, capsys):
    report = load("stats", monkeypatch)
    numbers = {"ours": iter([1.0, 3.0, 2.0]), "peer": iter([4000.4, 6000.0, 9000.0])}
    calls = []
    measured = {
        name: (lambda name=name: calls.append(name) or next(numbers[name]), unit)
        for name, unit in (("ours", "s"), ("peer", "steps/s"))
    }
    samples = report.take_samples(measured, 3)
    assert samples == {"ours": [1.0, 3.0, 2.0], "peer": [4000.4, 6000.0, 9000.0]} and calls == ["ours", "peer"] * 3
    path = tmp_path / "report.csv"
    report.write_report(samples, {"ours": "s", "peer": "steps/s"}, [("peer", "ours", "x")], "a machine", path)
    assert path.read_text().split() == [
        "what,value,unit", "or", "meaning", "ours,2,s", "peer,6000,steps/s", "peer", "/", "ours,4000.40,x",
        "machine,a", "machine,3", "repeats",
    ]  # fmt: skip
    assert "peer / ours" in capsys.readouterr().out
