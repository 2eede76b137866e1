"""Redraw the figures and tables of README.md and benchmark/README.md from the kept results.

    pip install -r benchmark/requirements.txt
    python benchmark/plot.py                # everything
    python benchmark/plot.py quickstart     # one suite

Curves over steps and rates show the interquartile mean over seeds with a 95% stratified bootstrap interval (Agarwal et
al. 2021, by rliable), or every seed, faint, where these are few; over cells they show means and percentiles of
resampled cells. The forest plot has differences between plain means, with intervals under Holm's correction. A suite's
table has two scores, the last evaluation's and the mean over all evaluations of a run, which tells how fast it
learned, and the probability that a run of the method has a higher mean than one of the suite's first method. A method
without results is left out. One suite's name redraws that suite alone, not the verdicts and the forest plot.
"""

import csv
import functools
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from run import read_evaluations, read_runs  # noqa: E402
from suites import FIVE, SUITES, seeds_of  # noqa: E402

import ppo_pisco  # noqa: E402

RESULTS = ROOT / "benchmark" / "results"
FIGURES = ROOT / "benchmark" / "figures"
PAGES = [ROOT / "README.md", ROOT / "benchmark" / "README.md"]
DIGITS = {"ppo_pisco.py": 2, "drqv2_pisco.py": 0}  # decimals of a score: shares of tasks, returns of up to 1,000
# Okabe and Ito's colours, which the colour-blind can tell apart; with dashes there are enough for twenty methods.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933", "#882255", "#44aa99"]
SCORES = {  # program: columns of metrics.csv for step and score, what they are called
    "ppo_pisco.py": ("global_step", "eval/greedy_success", "environment steps", "tasks solved (greedy)"),
    "drqv2_pisco.py": ("global_step", "eval/greedy_return", "frames", "return (mean of 10 episodes)"),
}
PANELS = {  # suites of more than five methods: which of them are compared in one panel of the learning curves
    "jump-baselines": [
        ["from scratch", "frozen, linear head", "frozen, MLP head", "finetuned"],
        ["from scratch", "finetuned", "frozen bottom", "frozen bottom + PiSCO"],
    ],
    "jump-cells": [
        ["from scratch", "frozen, MLP head", "finetuned", "finetuned + PiSCO", "frozen bottom + PiSCO"],
        ["frozen bottom"] + [f"frozen bottom + {loss}" for loss in ("SimSiam", "CURL", "consistency", "PiSCO")],
    ],
    "jump-long": [[f"{split} encoder 2, {name}" for name in FIVE] for split in ("lattice 8 floors", "lattice 5 grid")],
}
# jump-noise's scores beside the fresh head's, higher where less is lost: of one measurement, not of a curve
UNDER_NOISE = (", change under noise", ", relative change")
# What the protocols beside the results predict by the paper's claims, in families that share an error of 0.05: the
# first method's score is above the second's, or, with a margin, not further below it than that.
CLAIMS = (
    "1. finetuning is needed",
    "2. finetuned features: easier to learn from, more robust",
    "3. bottom layers transfer, top layers must adapt",
    "4. frozen bottom + PiSCO beats the alternatives",
)
PREDICTIONS = {  # by the tables of benchmark/README.md
    "verdicts": {
        CLAIMS[0]: [("jump-cells", "finetuned", "frozen, MLP head", 0.0)],
        CLAIMS[1]: [
            ("jump-noise", f"finetuned{score}", f"frozen, MLP head{score}", 0.0)
            for score in (", fresh head", *UNDER_NOISE)
        ],
        CLAIMS[2]: [
            ("jump-cells", "frozen bottom", "finetuned", 0.1),
            ("jump-cells", "frozen bottom", "frozen, MLP head", 0.0),
        ],
        CLAIMS[3]: [
            ("jump-cells", "frozen bottom + PiSCO", other, 0.0)
            for other in ("from scratch", "frozen, MLP head", "finetuned", "finetuned + PiSCO", "frozen bottom")
            + tuple(f"frozen bottom + {loss}" for loss in ("SimSiam", "CURL", "consistency"))
        ],
    },
    "one cell": {  # one encoder, one split
        CLAIMS[0]: [
            ("jump-baselines", "finetuned", "frozen, MLP head", 0.0),
            ("jump-state-baselines", "state encoder, finetuned", "state encoder, frozen, MLP head", 0.0),
        ],
        CLAIMS[2]: [
            ("jump-baselines", "frozen bottom", "finetuned", 0.1),
            ("jump-baselines", "frozen bottom", "frozen, MLP head", 0.0),
        ],
        CLAIMS[3]: [
            ("jump-baselines", "frozen bottom + PiSCO", other, 0.0)
            for other in ("from scratch", "frozen, MLP head", "finetuned", "frozen bottom")
        ],
    },
    "control": {  # one encoder again
        "positive control": [("dmc-sparse", better, "from scratch", 0.0) for better in ("finetuned", "frozen")],
    },
}
MAXIMUM = {"ppo_pisco.py": 1, "drqv2_pisco.py": 1000}  # predictions are judged by shares of the highest score
EQUAL = {"ppo_pisco.py": 0.1, "drqv2_pisco.py": 0.05}  # a gain whose interval lies within it is no difference
VERDICTS = {"supported": "#009e73", "contradicted": "#d55e00", "no difference": "#0072b2", "inconclusive": "0.3"}
# Families of gains that are asked for without a direction, and differences of two gains beside them.
PRIOR_GAINS = {
    (prior, base, rate): (f"prior {prior}, {base} + PiSCO at {rate}", f"prior {prior}, {base} at {rate}")
    for prior in ("0.05", "0.1")
    for base, rate in (("frozen bottom", "1e-3"), ("frozen bottom", "its own rate"), ("finetuned", "its own rate"))
}
TWO_SIDED = {"jump-prior": list(PRIOR_GAINS.values())}
CONTRASTS = {
    "jump-prior": {
        "frozen bottom at 1e-3, PiSCO's gain: prior 0.1 less 0.05": (
            PRIOR_GAINS["0.1", "frozen bottom", "1e-3"],
            PRIOR_GAINS["0.05", "frozen bottom", "1e-3"],
        ),
        "frozen bottom, prior 0.1, PiSCO's gain: 1e-3 less its own rate": (
            PRIOR_GAINS["0.1", "frozen bottom", "1e-3"],
            PRIOR_GAINS["0.1", "frozen bottom", "its own rate"],
        ),
    }
}
# Methods whose difference is freezing's gain, for the large and for the small encoder
FREEZING = [("impala, 7 frozen", "impala, 0 frozen"), ("nature, frozen bottom", "nature, finetuned")]
REPS = 2_000  # bootstrap samples of rliable
SAMPLES = 20_000  # bootstrap samples over cells
FEW = 5  # with fewer seeds an interval is no more than a range: points and means alone are shown
warnings.filterwarnings("ignore", "random_state is deprecated")  # rliable hands it on to arch


@dataclass
class Args:
    suite: tyro.conf.Positional[str] = "all"
    """a suite of benchmark/suites.py, or `all`"""


class Runs(NamedTuple):
    """A method's kept runs: n seeds, evaluated after each of E steps."""

    seeds: list  # over cells those of the first one
    steps: np.ndarray  # (E,) float64
    scores: np.ndarray  # (n, E) or, over cells, (cells, n, E) float64

    @property
    def both(self):
        """Every run's last score and its mean score, (n, 2) or (cells, n, 2) float64."""
        return np.stack([self.scores[..., -1], self.scores.mean(-1)], -1)


def program_of(suite):
    """The algorithm that the suite's runs are of."""
    return "drqv2_pisco.py" if SUITES[suite]["program"].startswith("drqv2_pisco.py") else "ppo_pisco.py"


def columns_of(suite):
    """Columns of metrics.csv for step and score, and their names."""
    step, score, *names = SCORES[program_of(suite)]
    return step, SUITES[suite].get("score", score), *names


def read_rows(path):
    """The rows of a CSV file, [{column: text}]."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@functools.lru_cache(maxsize=2)
def read_kept(suite):
    """{method: {seed: (row of runs.csv, evaluations)}} of the suite's kept runs, seeds by number."""
    runs, evaluations, found = read_runs(RESULTS / suite), read_evaluations(RESULTS / suite), {}
    for method, seed in sorted(runs, key=lambda key: key[1]):
        found.setdefault(method, {})[seed] = runs[method, seed], evaluations[method, seed]
    return found


def read_columns(suite, method, columns):
    """The columns of all evaluations of the method's n kept runs, (n, E) float64 each."""
    runs = [rows for _, rows in read_kept(suite)[method].values()]
    return [np.array([[float(row[column]) for row in rows] for rows in runs]) for column in columns]


def read_suite(suite):
    """{method: Runs} of the kept runs, by the suite's order. Raises ValueError where a method's runs were evaluated at
    different steps."""
    results, kept = {}, read_kept(suite)
    for method in SUITES[suite]["methods"]:
        if method in kept:
            step, score = columns_of(suite)[:2]
            if len({tuple(row[step] for row in rows) for _, rows in kept[method].values()}) > 1:
                raise ValueError(f"{suite}, {method}: the seeds' evaluations are not at the same steps")
            steps, scores = read_columns(suite, method, (step, score.removeprefix("eval/")))
            results[method] = Runs(list(kept[method]), steps[0], scores)
    return results


def read_minutes(suite, method):
    """Minutes of training, evaluations left out, until each of E evaluations of the method's n kept runs, (n, E)."""
    return read_columns(suite, method, ["seconds"])[0] / 60


def mean_until(minutes, scores, limit):
    """Mean over the time from 0 to limit of a run's score, which is 0 before the first evaluation and from each on what
    it says; minutes and scores (E,), all in the same unit."""
    ends = np.clip(np.append(minutes[1:], np.inf), None, limit)
    return float((scores * np.clip(ends - minutes, 0, None)).sum() / limit)


def is_complete(suite, results):
    """Whether all methods have just the seeds that the suite's protocol names: else nothing is judged."""
    methods, n = SUITES[suite]["methods"], SUITES[suite]["n"]
    return all(method in results and results[method].seeds == seeds_of(suite, method, n) for method in methods)


def over_cells(results):
    """{method: Runs over cells} of a complete suite whose methods' names are "CELL, METHOD"."""
    methods = {}
    for name, runs in results.items():
        methods.setdefault(name.split(", ", 1)[1], []).append(runs)
    return {
        name: Runs(found[0].seeds, found[0].steps, np.stack([runs.scores for runs in found]))
        for name, found in methods.items()
    }


def read_noise(policy):
    """{"CELL, METHOD": Runs} of jump-noise's policies, the `fresh head`'s or the `trained` ones: as steps the standard
    deviations of the noise, none first, as scores the shares of the run's tasks solved."""
    results = {}
    for name in SUITES["jump-noise"]["methods"]:
        last = [rows[-1] for _, rows in read_kept("jump-noise")[name].values()]
        stds = [column for column in last[0] if column.startswith(f"{policy}, noise ")]
        shares = np.array([[float(row[column]) for column in stds] for row in last])
        x = np.array([float(column.split()[-1]) for column in stds])
        results[name] = Runs(list(read_kept("jump-noise")[name]), x, shares)
    return results


def changes_under_noise():
    """{method and UNDER_NOISE: scores} of the fresh heads' policies under the strongest noise: success less that
    without noise, and minus the share of it that is lost, or 0 where none is lost or there is none to lose."""
    changes = {}
    for method, runs in over_cells(read_noise("fresh head")).items():
        clean, noisy = runs.scores[..., 0], runs.scores[..., -1]
        change = noisy - clean
        share = np.divide(np.minimum(change, 0), clean, out=np.zeros_like(change), where=clean > 0)
        changes |= {f"{method}{score}": np.stack([x, x], -1) for score, x in zip(UNDER_NOISE, (change, share))}
    return changes


def read_scores(suite):
    """{method: scores of Runs.both, as shares of the highest} of the kept runs; none of an incomplete suite."""
    results = read_suite(suite)
    if not is_complete(suite, results):
        return {}
    results = over_cells(results) if SUITES[suite].get("cells") else results
    scores = {method: runs.both / MAXIMUM[program_of(suite)] for method, runs in results.items()}
    if suite != "jump-noise":
        return scores
    return {f"{method}, fresh head": both for method, both in scores.items()} | changes_under_noise()


def estimate(sample, statistic):
    """The statistic of a sample of runs, or of a pair of samples, (n, 1 task, ...) each, and its 95% interval; the same
    every time."""
    from rliable import library

    random = np.random.RandomState(0)
    np.random.seed(0)  # rliable draws the second sample of a pair from NumPy's global generator
    points, intervals = library.get_interval_estimates({"": sample}, statistic, reps=REPS, random_state=random)
    return points[""], intervals[""]


def interquartile_mean(scores):
    """Mean (E,) of scores (n, E) without the lowest and the highest quarter of the runs, whole runs, as rliable's
    aggregate_iqm has it, which takes one step at a time and much longer."""
    cut = len(scores) // 4
    return np.sort(scores, axis=0)[cut : len(scores) - cut].mean(axis=0)


def aggregate(scores):
    """Interquartile mean (E,) of scores (n, E) over the runs, and its 95% bootstrap interval (2, E)."""
    return estimate(scores[:, None], lambda x: interquartile_mean(x[:, 0]))


def improvement(scores, others):
    """Probability that a run with one of `scores` (n,) beats one with one of `others` (m,), and its 95% bootstrap
    interval (2,)."""
    from rliable import metrics

    point, interval = estimate((scores[:, None], others[:, None]), metrics.probability_of_improvement)
    return float(np.squeeze(point)), np.ravel(interval)


def welch(plus, minus):
    """Sum of the means of the samples `plus` [(n,), ...] less that of `minus`, its standard error and the degrees of
    freedom of its t distribution: Welch's for one sample on each side, Satterthwaite's (1946) for more."""
    total = float(sum(map(np.mean, plus)) - sum(map(np.mean, minus)))
    if not any(np.ptp(scores) for scores in (*plus, *minus)):  # no spread
        return total, 0.0, 1.0
    squares, counts = np.array([(np.var(x, ddof=1) / len(x), len(x)) for x in (*plus, *minus)]).T
    return total, float(squares.sum() ** 0.5), float(squares.sum() ** 2 / (squares**2 / (counts - 1)).sum())


def pvalue_of(total, error, freedom):
    """Two-sided p-value of welch's sum; 1 where no sample has any spread, as there is no test."""
    return float(2 * stats.t.sf(abs(total) / error, freedom)) if error else 1.0


def difference(plus, minus, level=0.95):
    """welch's sum and its interval of that level, as a bootstrap's is too narrow for a handful of seeds. Where no
    sample has any spread the interval is unknown (nan, nan)."""
    total, error, freedom = welch(plus, minus)
    half = float(stats.t.ppf((1 + level) / 2, freedom)) * error if error else np.nan
    return total, (total - half, total + half)


def style_of(i):
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": "-" if i < len(COLOURS) else "--"}


def save(figure, name):
    """Writes the figure as benchmark/figures/NAME.png."""
    figure.savefig(FIGURES / f"{name}.png", dpi=120)
    plt.close(figure)


def resample(scores):
    """Bootstrap samples (SAMPLES, ...) of the mean of scores (cells, n, ...): cells are drawn, then seeds in each."""
    random, (cells, seeds) = np.random.default_rng(0), scores.shape[:2]
    drawn = random.integers(cells, size=(SAMPLES, cells, 1))
    return scores[drawn, random.integers(seeds, size=(SAMPLES, cells, seeds))].mean((1, 2))


def draw_bands(axes, x, scores, label, style):
    """Interquartile mean of scores (n, X) over x, or mean of scores (cells, n, X), with an interval if there are runs
    enough."""
    if scores.ndim == 3:
        point, (low, high) = scores.mean((0, 1)), np.quantile(resample(scores), [0.025, 0.975], axis=0)
    else:
        point, (low, high) = aggregate(scores)
    count = scores[..., 0].size
    if count >= FEW:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    axes.plot(x, point, linewidth=2.2, label=f"{label} (n = {count})", **style)


def draw_official(axes, suite, frames):
    """The official DrQ-v2 agent's returns, mean and range over its seeds, at the marks up to `frames` where a control
    suite has one task; on the scale of all returns."""
    axes.set_ylim(0, 1000)
    task = re.search(r"--env-id (\S+)", SUITES[suite]["program"])
    rows = [
        row for row in read_rows(RESULTS / "drqv2_official.csv") if task and row["task"] == task[1].replace("-", "_")
    ]
    marks = np.array([[float(row[key]) for key in ("frames", "mean", "min", "max")] for row in rows]).reshape(-1, 4)
    x, mean, low, high = marks[marks[:, 0] <= frames].T
    label = "official agent, other settings (mean, range)"
    axes.errorbar(x, mean, [mean - low, high - mean], fmt="s", color="0.5", capsize=4, clip_on=False, label=label)


def draw_curves(suite, results):
    """Learning curves as benchmark/figures/SUITE.png, in the panels of PANELS or in one. Single runs are shown, faint,
    where they are too few for an interval."""
    *_, step_name, score_name = columns_of(suite)
    results = over_cells(results) if SUITES[suite].get("cells") else results
    panels, styles = PANELS.get(suite, [list(results)]), {method: style_of(i) for i, method in enumerate(results)}
    size = {"figsize": (5.2 * len(panels) + 2.3 * (len(panels) == 1), 4.4), "sharey": True}
    figure, row = plt.subplots(1, len(panels), layout="constrained", squeeze=False, **size)
    for axes, methods in zip(row[0], panels):
        cells = {method.split(", ", 1)[0] for method in methods}
        one_cell = len(cells) == 1 < len(methods)  # has its name as title, and the same colours as in other panels
        if one_cell:
            axes.set_title(*cells)
        for i, method in enumerate(method for method in methods if method in results):
            runs = results[method]
            style, label = (style_of(i), method.split(", ", 1)[1]) if one_cell else (styles[method], method)
            if runs.scores.ndim == 2 and len(runs.seeds) < FEW:
                axes.plot(runs.steps, runs.scores.T, alpha=0.25, linewidth=0.8, **style)
            draw_bands(axes, runs.steps, runs.scores, label, style)
        if program_of(suite) == "drqv2_pisco.py":
            draw_official(axes, suite, runs.steps[-1])
        axes.set_xlabel(step_name)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=8)
    row[0][0].set_ylabel(score_name)
    save(figure, suite)


def draw_steps_and_minutes(suite, results):
    """The large encoder's scores over steps and over minutes of training, every run, faint, and the mean over the
    median of the minutes, without and with PiSCO, as benchmark/figures/SUITE.png."""
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained", sharey=True, sharex="col")
    for row, (plus, title) in zip(panels, (("", "without a loss"), (" + PiSCO", "with PiSCO"))):
        for i, method in enumerate(["impala, from scratch"] + [f"impala, {k} frozen{plus}" for k in (0, 4, 7, 10)]):
            if not any(name.split(", ", 1)[1] == method for name in results):
                continue
            minutes, scores = map(np.concatenate, zip(*in_all_cells(suite, results, method)))
            steps = np.broadcast_to(next(iter(results.values())).steps, scores.shape)
            for axes, x in zip(row, (steps, minutes)):
                axes.plot(x.T, scores.T, alpha=0.25, linewidth=0.8, **style_of(i))
                label = f"{method} (n = {len(scores)})"
                axes.plot(np.median(x, axis=0), scores.mean(0), linewidth=2.2, label=label, **style_of(i))
                axes.grid(alpha=0.3)
        row[0].set(title=title, ylabel=columns_of(suite)[-1])
        row[1].legend(loc="lower right", frameon=False, fontsize=8)
    panels[1, 0].set_xlabel("environment steps")
    panels[1, 1].set_xlabel("minutes of training on one core")
    save(figure, suite)


def draw_forest(judged, splits):
    """A row per prediction of judge_all's answers: the gain, hollow where its verdict hinges on a split, and its
    corrected interval, coloured by verdict, as benchmark/figures/readme.png."""
    fragile = {prediction for prediction, (_, hinges) in splits.items() if hinges}
    labels = [row for claim, found in judged.items() for row in (claim, *found)]
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(labels) + 1.3), layout="constrained")
    for y, row in enumerate(labels):
        if isinstance(row, str):
            continue
        prediction, (mean, interval), end, counts = row
        suite, *_, margin = prediction
        colour = VERDICTS[verdict(*interval, margin, EQUAL[program_of(suite)])]
        axes.plot(interval, [y, y], color=colour, linewidth=2.5)
        fill = "white" if prediction in fragile else colour
        axes.plot(mean, y, "o", color=colour, markerfacecolor=fill, markersize=7)
        axes.plot(-margin, y, "|", color="black", markersize=14)  # what the interval must lie above
        if end:
            axes.plot(end[1], [y + 0.28] * 2, color="0.75", linewidth=1)
            axes.plot(end[0], y + 0.28, "o", color="0.75", markersize=4)
        text = f"{counts[0]}, {counts[1]}; {counts[2]}"
        axes.text(1.01, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    texts = [row if isinstance(row, str) else prediction_text(row[0]) for row in labels]
    axes.set_yticks(range(len(labels)), texts, fontsize=9)
    for label, row in zip(axes.get_yticklabels(), labels):
        label.set_fontweight("bold" if isinstance(row, str) else "normal")
    axes.set_ylim(len(labels) - 0.3, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.axvline(0, color="0.3", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    axes.text(1.01, -0.25, "runs; cells", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    hollow = "; hollow: fragile" if fragile else ""
    label = f"gain in the mean over the run (thin: at the end) or\nunder noise, shares of the highest score{hollow}"
    axes.set_xlabel(label, fontsize=9)
    handles = [plt.Line2D([], [], color=colour, marker="o", linewidth=2.5) for colour in VERDICTS.values()]
    figure.legend(handles, VERDICTS, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, "readme")


def by_rate(results, number=str):
    """{method: {number(learning rate): Runs}} of a suite *-rates, whose methods' names are "METHOD, RATE"."""
    methods = {}
    for name, runs in results.items():
        method, rate = name.rsplit(", ", 1)
        methods.setdefault(method, {})[number(rate)] = runs
    return methods


def draw_rates(suite, results):
    """Both scores over the learning rate, as benchmark/figures/SUITE.png."""
    methods = by_rate(results, float)
    rates = sorted({rate for runs in methods.values() for rate in runs})
    figure, both = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True)
    for column, (axes, title) in enumerate(zip(both, ("at the end", "mean over the run"))):
        for i, (method, runs) in enumerate(methods.items()):
            points, intervals = zip(*(aggregate(one.both[:, column : column + 1]) for one in runs.values()))
            n, style = min(len(one.seeds) for one in runs.values()), style_of(i)
            if n >= FEW:
                low, high = np.array(intervals)[:, :, 0].T
                axes.fill_between(list(runs), low, high, color=style["color"], alpha=0.12, linewidth=0)
            else:
                for rate, one in runs.items():
                    axes.scatter([rate] * len(one.seeds), one.both[:, column], color=style["color"], s=8, alpha=0.5)
            axes.plot(list(runs), np.ravel(points), marker="o", label=f"{method} (n = {n})", **style)
        axes.set(xlabel="learning rate (--learning-rate)", xscale="log", title=title)
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    both[0].set_ylabel(columns_of(suite)[-1])
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    save(figure, suite)


def draw_grid(suite, results):
    """The share of seeds that solve each task of the grid, as benchmark/figures/jump-grid.png."""
    methods = list(results)
    rows = -(-len(methods) // 2)
    figure, panels = plt.subplots(rows, 2, figsize=(9.5, 1.9 * rows), layout="constrained", squeeze=False)
    (x0, y0), (x1, y1) = ppo_pisco.JUMP_GRID[0], ppo_pisco.JUMP_GRID[-1]
    for axes, method in zip(panels.flat, methods):
        evaluations = [rows[-1] for _, rows in read_kept(suite)[method].values()]
        tables = [dict(zip(row["tasks"].split(), row["greedy"])) for row in evaluations]
        solved = [[int(table[f"{x}:{y}"]) for x, y in ppo_pisco.JUMP_GRID] for table in tables]
        share = np.mean(solved, axis=0).reshape(x1 - x0 + 1, y1 - y0 + 1).T  # (floors, obstacles)
        extent = (x0 - 0.5, x1 + 0.5, y0 - 0.5, y1 + 0.5)
        image = axes.imshow(share, origin="lower", extent=extent, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        trained = ppo_pisco.parse_jump_tasks(method.split(",")[0])
        axes.scatter(*np.array(trained).T, s=14, facecolor="none", edgecolor="#d55e00")
        axes.set_title(f"{method}: {share.mean():.0%} of the grid (n = {len(evaluations)})", fontsize=10)
    figure.supxlabel("obstacle (pixels)", fontsize=10)
    figure.supylabel("floor (pixels)", fontsize=10)
    figure.colorbar(image, ax=panels, label="share of seeds that solve it", shrink=0.7)
    save(figure, suite)


DRAW = dict.fromkeys([suite for suite in SUITES if suite.endswith("-rates")], draw_rates) | {
    "jump-grid": draw_grid,
    "jump-impala": draw_steps_and_minutes,
}


def with_interval(point, interval, digits, sign=""):
    point, low, high = (f"{number:{sign}.{digits}f}" for number in (point, *interval))
    return f"{point} [{low}, {high}]" if np.isfinite(interval).all() else f"{point} [?, ?]"


def markdown(names, rows):
    """A table as Markdown: the columns' names and rows of text."""
    head = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join(head + [f"| {' | '.join(row)} |" for row in rows])


def write_table(suite, results):
    """The suite's table as Markdown."""
    first, *_ = results
    names = ["method", "n", "at the end", "mean over the run", f"P(better than {first})", "each seed", "minutes"]
    rows, digits = [], DIGITS[program_of(suite)]
    for method, runs in results.items():
        points, intervals = aggregate(runs.both)
        values = [f"{point:.{digits}f}" for point in points]
        if len(runs.seeds) >= FEW:
            values = [with_interval(point, interval, digits) for point, interval in zip(points, intervals.T)]
        better = "-"
        if method != first and min(len(runs.seeds), len(results[first].seeds)) >= FEW:
            better = with_interval(*improvement(runs.both[:, 1], results[first].both[:, 1]), 2)
        kept = [row for row, _ in read_kept(suite)[method].values()]
        whole = [float(row["seconds"]) for row in kept if row["resumed"] == "False"]
        minutes = f"{np.median(whole) / 60:.1f}" if whole else "-"  # a resumed run has timed its last part alone
        each = " ".join(f"{score:.{digits}f}" for score in runs.scores[:, -1])
        rows.append([method, str(len(runs.seeds)), *values, better, each, minutes])
    return markdown(names, rows)


def split_of(cell):
    """The split of a cell "SPLIT encoder SEED"."""
    return cell.rsplit(" encoder ", 1)[0]


def cells_of(suite):
    """A suite's cells, in the order of over_cells."""
    return list(dict.fromkeys(name.split(", ", 1)[0] for name in SUITES[suite]["methods"]))


def write_cells_table(suite, results):
    """A suite over cells as Markdown: both scores' means with intervals, and the mean over the run in every split."""
    splits = [split_of(cell) for cell in cells_of(suite)]
    names = list(dict.fromkeys(splits))
    rows = []
    for method, runs in over_cells(results).items():
        tails = np.quantile(resample(runs.both), [0.025, 0.975], axis=0).T  # (2 scores, 2)
        both = [with_interval(point, tail, 2) for point, tail in zip(runs.both.mean((0, 1)), tails)]
        means = runs.both[..., 1].mean(1)  # (cells,)
        each = [f"{np.mean([m for m, s in zip(means, splits) if s == split]):.2f}" for split in names]
        rows.append([method, str(runs.both[..., 0].size), *both, *each])
    return markdown(["method", "n", "at the end", "mean over the run", *names], rows)


def gains_in_splits(prediction, scores):
    """{split: gain, mean over the run} of a prediction over cells, and the splits that it hinges on: those without each
    of which the uncorrected 95% interval, above, below or around its threshold, changes to another of these three."""
    suite, better, worse, margin = prediction
    splits = np.array([split_of(cell) for cell in cells_of(suite)])
    ours, others, clear = scores[better][..., 1], scores[worse][..., 1], {}  # (cells, n) each
    gains = {split: float((ours - others)[splits == split].mean()) for split in dict.fromkeys(splits)}
    for left_out in (None, *gains):
        rest = splits != left_out
        _, (low, high) = compare(ours[rest], others[rest], margin)[1](0.95)
        clear[left_out] = int(low > -margin) - int(high < -margin)
    return gains, [split for split in gains if clear[split] != clear[None]]


def in_all_cells(suite, results, method):
    """Minutes and scores (n, E) each of a method's runs, for every cell, in names "CELL, METHOD"."""
    names = [name for name in results if name.split(", ", 1)[1] == method]
    return [(read_minutes(suite, name), results[name].scores) for name in names]


def score_per_minute(minutes, scores, limit):
    """mean_until of every run, minutes and scores (n, E) -> (n,)."""
    return np.array([mean_until(*run, limit) for run in zip(minutes, scores)])


def write_freezing(suite, results):
    """Is freezing's gain larger for the large encoder? The difference of two gains as Markdown, per step and per minute
    until the moment at which a cell's frozen runs are done, by the median; under Holm's correction."""
    rows = {"per step": [], "per minute": []}
    for frozen, finetuned in FREEZING:
        cells = list(zip(*(in_all_cells(suite, results, method) for method in (frozen, finetuned))))
        limits = [np.median(minutes[:, -1]) for (minutes, _), _ in cells]
        per_step = [[scores.mean(1) for _, scores in runs] for runs in cells]
        per_minute = [[score_per_minute(*run, limit) for run in runs] for runs, limit in zip(cells, limits)]
        rows["per step"].append([np.concatenate(arm) for arm in zip(*per_step)])
        rows["per minute"].append([np.concatenate(arm) for arm in zip(*per_minute)])
    tests = [welch([large[0], small[1]], [large[1], small[0]]) for large, small in rows.values()]
    levels = holm_levels([pvalue_of(*test) for test in tests])
    names = ["score", "", "gain of freezing, impala less nature", "impala", "nature", "runs"]
    table = []
    for (name, gains), level in zip(rows.items(), levels):
        (a, b), (c, d) = gains
        both = difference([a, d], [b, c], 1 - level)
        each = [f"{np.mean(x) - np.mean(y):+.2f}" for x, y in gains]
        word = verdict(*both[1], 0.0, EQUAL[program_of(suite)])
        table.append([name, word, with_interval(*both, 2, "+"), *each, ", ".join(str(len(x)) for x in (a, b, c, d))])
    return markdown(names, table)


def write_noise_table(policy):
    """Success under noise of read_noise's policies as Markdown: a method in each row, a standard deviation in each
    column, means over cells."""
    rows = []
    for method, runs in over_cells(read_noise(policy)).items():
        none = int((runs.scores[..., 0] == 0).sum())
        points = [f"{point:.2f}" for point in runs.scores.mean((0, 1))]
        rows.append([method, str(runs.scores[..., 0].size), *points, str(none)])
    stds = [f"noise {std:g}" for std in runs.steps]
    return markdown(["method", "n", *stds, "solve nothing without noise"], rows)


def write_rates_table(results, n):
    """Every method's mean over the run (at the end) at every learning rate and the seeds, as Markdown; in bold the best
    mean of a method with n seeds at every rate."""
    methods = by_rate(results)  # {method: {rate: Runs}}
    rates, rows = list(dict.fromkeys(rate for found in methods.values() for rate in found)), []
    for method, found in methods.items():
        means = {rate: round(runs.both[:, 1].mean(), 9) for rate, runs in found.items()}
        counts = sorted({len(runs.seeds) for runs in found.values()})
        # The smaller one of two equals, as the rates rise
        best = max(means, key=means.get) if counts == [n] and len(means) == len(rates) else None
        cells = [f"{means[r]:.2f} ({found[r].both[:, 0].mean():.2f})" if r in means else "" for r in rates]
        cells = [f"**{cell}**" if rate == best else cell for rate, cell in zip(rates, cells)]
        rows.append([method, *cells, " or ".join(map(str, counts))])
    return markdown(["method", *rates, "n"], rows)


def verdict(low, high, margin, equal):
    """What an interval of a gain says of the prediction that the gain is above -margin; within +-equal of zero there is
    no difference."""
    if low > -margin:
        return "supported"
    if high < -margin:
        return "contradicted"
    return "no difference" if -equal < low and high < equal else "inconclusive"


def holm_levels(pvalues):
    """Holm's (1979) levels (m,) for p-values (m,): by rising p, the k-th is tested at 0.05 / (m - k + 1).

    After the first that fails the level stays, so that none after it passes. Equal ones have their smallest level.
    """
    levels, level, last = np.empty(len(pvalues)), 0.0, -1.0
    for k, i in enumerate(np.argsort(pvalues)):
        if last <= level and pvalues[i] != last:  # none has failed yet
            level = 0.05 / (len(pvalues) - k)
        levels[i], last = level, pvalues[i]
    return levels


def compare(ours, others, margin):
    """p-value of a gain of -margin between two methods' scores, and a function from a level to (gain, interval).

    Scores (n,) and (m,) of one cell have Welch's test and interval. Scores (cells, n) are compared inside a cell with
    the same seeds: by the percentiles of resample, and as those are too narrow for eight cells where cells differ, also
    by Student's t of the cells' means. The larger p-value counts, and on each side the wider interval.
    """
    if ours.ndim == 1:
        return pvalue_of(*welch([ours + margin], [others])), lambda level: difference([ours], [others], level)
    gains = ours - others
    samples, means = resample(gains), gains.mean(1)
    pvalue = max(
        2 * min(np.mean(samples <= -margin), np.mean(samples >= -margin)), pvalue_of(*welch([means + margin], []))
    )

    def interval(level):
        gain, student = difference([means], [], level)
        low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
        return gain, (float(np.minimum(low, student[0])), float(np.maximum(high, student[1])))

    return min(1.0, pvalue), interval


def has_end(prediction):
    """Whether the prediction is on a curve, and not on one measurement."""
    return not prediction[1].endswith(UNDER_NOISE)


def judge(predictions, scores):
    """Gains of a claim's predictions [(suite, method, other, margin)] that have runs enough, under Holm's correction:
    [(prediction, (mean over the run, interval), (at the end, interval) or None, (runs, the other's runs, cells))].

    scores {suite: {method: (n, 2) or (cells, n, 2)}} are those of read_scores.
    """
    pairs = [(p, *(scores[p[0]].get(method, np.empty((0, 2))) for method in p[1:3])) for p in predictions]
    pairs = [(p, a, b) for p, a, b in pairs if min(a.size, b.size) >= 2 * FEW]
    gains = []
    for column in (1, 0):
        tests = {p: compare(a[..., column], b[..., column], p[3]) for p, a, b in pairs if column or has_end(p)}
        levels = holm_levels([pvalue for pvalue, _ in tests.values()])
        gains.append({p: interval(1 - level) for (p, (_, interval)), level in zip(tests.items(), levels)})
    counts = [(a.size // 2, b.size // 2, len(a) if a.ndim == 3 else 1) for _, a, b in pairs]
    return [(p, gains[0][p], gains[1].get(p), count) for (p, _, _), count in zip(pairs, counts)]


def write_two_sided(suite):
    """A suite's family of gains as Markdown, under Holm's correction, and the differences of two of them, uncorrected;
    no rows before the suite is complete."""
    names = ["gain", "", "mean over the run", "at the end", "means", "runs"]
    scores, rows = read_scores(suite), []
    words = {"supported": "a gain", "contradicted": "a loss"}
    predictions = [(suite, *pair, 0.0) for pair in TWO_SIDED[suite]]
    for (_, ours, others, _), mean, end, counts in judge(predictions, {suite: scores}):
        word = verdict(*mean[1], 0.0, EQUAL[program_of(suite)])
        both = [with_interval(*gain, 2, "+") for gain in (mean, end)]
        means = " for ".join(f"{scores[method][:, 1].mean():.2f}" for method in (ours, others))
        rows.append(
            [f"{ours} - {others.split(', ', 1)[-1]}", words.get(word, word), *both, means, f"{counts[0]}, {counts[1]}"]
        )
    for name, pairs in CONTRASTS[suite].items() if scores else ():
        (a, b), (c, d) = ([scores[method] for method in pair] for pair in pairs)
        both = [difference([a[:, i], d[:, i]], [b[:, i], c[:, i]]) for i in (1, 0)]
        rows.append([name, "", *(with_interval(*found, 2, "+") for found in both), "", ""])
    return markdown(names, rows)


def prediction_text(prediction):
    _, better, worse, margin = prediction
    return f"{better} > {worse}" + (f" - {margin:.2f}" if margin else "")


def judge_all(claims):
    """judge's answers {claim: [...]} for those of the claims {claim: predictions} that have runs, and gains_in_splits
    of their predictions over cells {prediction: (gains, splits it hinges on)}."""
    scores = {suite: read_scores(suite) for suite in {p[0] for found in claims.values() for p in found}}
    judged = {claim: judge(predictions, scores) for claim, predictions in claims.items()}
    over = [p for found in judged.values() for p, *_ in found if SUITES[p[0]].get("cells")]
    splits = {prediction: gains_in_splits(prediction, scores[prediction[0]]) for prediction in over}
    return {claim: found for claim, found in judged.items() if found}, splits


def write_verdicts(judged, splits):
    """Claims, predictions and what the kept runs say of them, as Markdown; in columns of their own the mean over the
    run's gains in every split. A verdict that hinges on a split is called fragile."""
    names = ["claim", "prediction", "verdict", "gain, mean over the run", "gain, at the end", "runs", "cells"]
    columns = list(dict.fromkeys(split for gains, _ in splits.values() for split in gains))
    rows = []
    for claim, found in judged.items():
        for prediction, mean, end, counts in found:
            both = [with_interval(*gain, 2, "+") if gain else "-" for gain in (mean, end)]
            word = verdict(*mean[1], prediction[3], EQUAL[program_of(prediction[0])])
            gains, hinges = splits.get(prediction, ({}, []))
            word += f", fragile ({', '.join(hinges)})" if hinges else ""
            each = [f"{gains[split]:+.2f}" if split in gains else "-" for split in columns]
            runs = [f"{counts[0]}, {counts[1]}", str(counts[2])]
            rows.append([claim, prediction_text(prediction), word, *both, *runs, *each])
            claim = ""
    return markdown([*names, *columns], rows)


SPEEDS = [  # file of the results, row in it, what it is called
    ("speed", "jump environment", "Jump's environment, 64 copies, one core: steps/s"),
    ("speed", "pong, none, 0 frozen / pong, peer", "PPO on Pong with CleanRL's settings, `--ssl none`: steps/s over "
     "CleanRL's `ppo_atari_envpool.py` (EnvPool 0.8.4)"),
    ("speed", "pong, none, 0 frozen, bf16 / pong, peer", "the same with `--bf16`"),
    ("speed", "jump, none, 2 frozen / jump, pisco, 2 frozen", "PPO, two frozen layers: time of a step with PiSCO over "
     "one without, Jump"),
    ("speed", "jump, none, 0 frozen / jump, pisco, 2 frozen", "PPO, time of a step with two frozen layers and PiSCO "
     "over one of finetuning everything without it, Jump"),
    ("speed", "pong, impala, none, 0 frozen / pong, impala, pisco, 6 frozen", "the same on Pong, impala with six of "
     "ten layers frozen"),
    ("speed", "pong, none, 0 frozen / pong, none, 2 frozen", "PPO without PiSCO, time of a step with two frozen layers "
     "over one with none, Pong"),
    ("speed", "pong, impala, none, 0 frozen / pong, impala, none, 6 frozen", "the same, impala with six of ten layers "
     "frozen"),
    ("drqv2_speed", "update, none, 0 frozen / update, official agent", "DrQ-v2, batch 256, 84x84: seconds per update "
     "over the official agent's"),
    ("drqv2_speed", "update, pisco, 2 frozen / update, none, 2 frozen", "DrQ-v2, two frozen layers: an update with "
     "PiSCO over one without"),
    ("drqv2_speed", "cartpole-swingup, fast / cartpole-swingup, standard", "rendering cartpole-swingup: `fast` over "
     "`standard`"),
]  # fmt: skip


def write_speeds():
    """What speed.py and drqv2_speed.py have measured, as Markdown."""
    kept = {file: {row["what"]: row["value"] for row in read_rows(RESULTS / f"{file}.csv")} for file, *_ in SPEEDS}
    values = [(name, kept[file][row]) for file, row, name in SPEEDS]
    return markdown(
        ["", "ratio"],
        [[name, value if float(value) < 1000 else f"{round(float(value), -3):,.0f}"] for name, value in values],
    )


def insert_table(suite, table):
    """Puts the table between the marks `<!-- SUITE -->` and `<!-- /SUITE -->` of the pages that have them."""
    for page in PAGES:
        text = page.read_text()
        new = re.sub(
            rf"(<!-- {suite} -->\n).*?(<!-- /{suite} -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S
        )
        if new != text:
            page.write_text(new)


def draw_tasks():
    """Jump's task sets over obstacle x floor and a source and a target task's frames, as figures/jump_tasks.png."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.2), width_ratios=(2, 1, 1), layout="constrained")
    left.add_patch(plt.Rectangle((19.5, 9.5), 26, 11, fill=False, color="0.6", label="the grid's 286 tasks"))
    for name, marker, colour in (("source", "s", "#e69f00"), ("target", "o", "#0072b2")):
        left.scatter(*zip(*ppo_pisco.JUMP_TASK_SETS[name]), marker=marker, color=colour, label=name, s=40)
    left.set(xlabel="obstacle (pixels)", ylabel="floor (pixels)", xlim=(18, 47), ylim=(8, 22))
    left.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3, frameon=False)
    for axes, name in ((middle, "source"), (right, "target")):
        task = ppo_pisco.JUMP_TASK_SETS[name][-1]
        envs = ppo_pisco.JumpVectorEnv(1, [task])
        envs.reset(seed=0)
        for _ in range(task[0] - 14 + 12):  # jump when the obstacle is 14 pixels ahead, and show it in the air
            obs = envs.step(envs.task_obstacle[:1] - envs.x == 14)[0]
        axes.imshow(obs[0, 0], cmap="gray", origin="lower")
        axes.set_title(f"{name}: obstacle {task[0]}, floor {task[1]}", fontsize=10)
        axes.axis("off")
    save(figure, "jump_tasks")


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.suite not in ("all", *SUITES):
        print(f"plot.py: error: suite {args.suite!r}: choose one of {', '.join(SUITES)}", file=sys.stderr)
        return 2
    for suite in SUITES if args.suite == "all" else [args.suite]:
        results, cells = read_suite(suite), SUITES[suite].get("cells")
        if not results or cells and not is_complete(suite, results):
            print(f"{suite}: no results, or not in all cells\n")
            continue
        if any(f"figures/{suite}.png" in page.read_text() for page in PAGES):
            DRAW.get(suite, draw_curves)(suite, results)
        if suite.endswith("-rates"):
            tables = {suite: write_rates_table(results, SUITES[suite]["n"])}
        elif cells:
            tables = {suite: write_cells_table(suite, results)}
        else:
            tables = {suite: write_table(suite, results)}
        if suite == "jump-noise":
            tables["noise"] = write_noise_table("fresh head")
            tables["noise, trained policies"] = write_noise_table("trained")
        if suite == "jump-impala" and is_complete(suite, results):
            tables["freezing"] = write_freezing(suite, results)
        if suite in TWO_SIDED:
            tables[f"{suite} gains"] = write_two_sided(suite)
        for name, table in tables.items():
            insert_table(name, table)
            print(f"{name}\n{table}\n")
    if args.suite == "all":
        draw_tasks()
        judged = {name: judge_all(claims) for name, claims in PREDICTIONS.items()}
        draw_forest(*judged["verdicts"])
        for name, found in judged.items():
            insert_table(name, write_verdicts(*found))
        insert_table("speed", write_speeds())
    return 0


if __name__ == "__main__":
    sys.exit(main())
