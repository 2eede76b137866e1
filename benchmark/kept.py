"""The kept runs of a suite as arrays, and what they say of the predictions of suites.py, for plot.py."""

import functools
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from run import read_evaluations, read_runs, read_table  # noqa: E402
from stats import compare, holm_levels, mean_until, score_at, verdict  # noqa: E402
from suites import (  # noqa: E402
    AGAIN,
    AT_THE_END,
    BOTTOM,
    CELLS,
    FAMILIES,
    FINETUNED,
    MEASURED_ONCE,
    SCORES,
    STDS,
    SUITES,
    UNDER_NOISE,
    seeds_of,
)

RESULTS = ROOT / "benchmark" / "results"
BOOTSTRAPS = 10  # a verdict that differs between so many sets of samples is inconclusive
FEW = 5  # with fewer seeds an interval is no more than a range: points and means alone are shown


# --- Kept results ----------------------------------------------------------------------------------------------------
class Runs(NamedTuple):
    """A method's n kept runs, evaluated E times; over cells minutes and scores have these as one more axis in front."""

    seeds: list  # over cells those of the first one
    steps: np.ndarray  # (E,) float64
    minutes: np.ndarray  # (n, E) float64, of training, evaluations left out
    scores: np.ndarray  # (n, E) float64

    @property
    def both(self):
        """Every run's last score and its mean score, which tells how fast it learned, (n, 2) float64."""
        return np.stack([self.scores[..., -1], self.scores.mean(-1)], -1)


class Scale(NamedTuple):
    column: str  # of evaluations.csv.gz
    digits: int  # of a score in tables
    highest: float  # predictions are judged by shares of it
    equal: float  # a gain whose interval lies within it is no difference
    name: str


SUCCESS = Scale("greedy_success", 2, 1, 0.1, "tasks solved (greedy)")
UNSEEN_SUCCESS = "greedy_unseen_success"
RETURN = Scale("greedy_return", 0, 1000, 0.05, "return (mean of the episodes)")  # the control suite's
RETURN_IN_ROOMS = RETURN._replace(digits=2, highest=1)  # MiniWorld's


@functools.lru_cache(maxsize=4)
def read_kept(suite):
    """{method: {seed: (row of runs.csv, evaluations)}} of the suite's kept runs, seeds by number."""
    runs, evaluations, found = read_runs(RESULTS / suite), read_evaluations(RESULTS / suite), {}
    for row in read_table(RESULTS / suite / "noise.csv"):  # measured at the end
        if (float(row["std"]), row["draws"]) == (STDS[-1], "5"):
            scores = {f"noisy {key}": row[key] for key in (SUCCESS.column, UNSEEN_SUCCESS)}
            evaluations[row["method"], int(row["seed"])][-1].update(scores)
    known = SUITES.get(Path(suite).name, {"methods": ()})["methods"]  # their order, and then the table's
    for method in dict.fromkeys([*known, *(method for method, _ in runs)]):
        if seeds := sorted(seed for name, seed in runs if name == method):
            found[method] = {seed: (runs[method, seed], evaluations[method, seed]) for seed in seeds}
    return found


def scale_of(suite):
    """The scale of a suite's scores: success where there is one, else MiniWorld's return, or another one, with decimals
    where it is small."""
    _, rows = next(iter(next(iter(read_kept(suite).values())).values()))
    if Path(suite).name.startswith("miniworld"):
        return RETURN_IN_ROOMS
    small = all(abs(float(row["greedy_return"])) < 100 for row in rows)
    return SUCCESS if rows[-1].get(SUCCESS.column) else RETURN._replace(digits=2 if small else 0)


def read_suite(suite, column=None):
    """{method: Runs} of the kept runs of a suite, or of a folder that run.py fills; `column` is the score, where it was
    measured. Raises ValueError where a method's runs have not as many evaluations."""
    results, column = {}, column or SCORES.get(suite, scale_of(suite).column)
    for method, kept in read_kept(suite).items():
        names = ("global_step", "seconds", column)
        runs = [[[float(row[name]) for name in names] for row in rows if row.get(column)] for _, rows in kept.values()]
        if not any(runs):
            continue
        if len({len(run) for run in runs}) > 1:
            raise ValueError(f"{suite}, {method}: the seeds have not as many evaluations")
        steps, seconds, scores = np.moveaxis(np.array(runs), -1, 0)  # (n, E) each
        results[method] = Runs(list(kept), steps.mean(0), seconds / 60, scores)  # DrQ-v2 evaluates between episodes
    return results


def is_complete(suite):
    """Whether all methods of a suite of suites.py have just the seeds that its protocol names, and noise.csv, where
    there is one, has all of them: else nothing is judged. One that is not there any more is as it is."""
    kept, about = read_kept(suite), SUITES.get(suite, {"methods": ()})
    n, ends = about.get("n", 3), [rows[-1] for runs in kept.values() for _, rows in runs.values()]
    if len({f"noisy {SUCCESS.column}" in row for row in ends}) > 1:
        return False
    return all(list(kept.get(name, ())) == seeds_of(suite, name, n) for name in about["methods"])


def over_cells(results):
    """{method: Runs over cells} of results whose methods' names are "CELL, METHOD"."""
    methods = {}
    for name, runs in results.items():
        methods.setdefault(name.split(", ", 1)[1], []).append(runs)
    return {
        name: Runs(found[0].seeds, found[0].steps, *(np.stack(arrays) for arrays in list(zip(*found))[2:]))
        for name, found in methods.items()
    }


def split_of(cell):
    """The split of a cell "SPLIT encoder SEED"."""
    return cell.rsplit(" encoder ", 1)[0]


def splits_of(suite):
    """The split of each of the suite's cells, in the order of over_cells."""
    return [split_of(cell) for cell in dict.fromkeys(name.split(", ", 1)[0] for name in read_kept(suite))]


def changes_under_noise():
    """{method and UNDER_NOISE: scores} of the fresh heads' policies under the strongest noise: success less that
    without noise, and minus the share of it that is lost, or 0 where none is lost or there is none to lose."""
    clean, strong = (over_cells(read_suite("jump-noise", f"fresh head, noise {std}")) for std in (STDS[0], STDS[-1]))
    changes = {}
    for method, runs in clean.items():
        change = strong[method].both - runs.both
        share = np.divide(np.minimum(change, 0), runs.both, out=np.zeros_like(change), where=runs.both > 0)
        changes |= {f"{method}{score}": x for score, x in zip(UNDER_NOISE, (change, share))}
    return changes


def at_equal_minutes(faster, slower):
    """Scores (..., n, 2) of two methods' Runs at the moment at which half of a cell's runs of the faster one are done,
    and the mean until then."""
    limit = np.median(faster.minutes[..., -1], axis=-1)[..., None]  # (cells, 1) or (1,)
    arms = [(runs.minutes, runs.scores, limit) for runs in (faster, slower)]
    return [np.stack([score_at(*arm), mean_until(*arm)], -1) for arm in arms]


def freezing_again(suite="jump-unseen"):
    """{method and AGAIN: scores} of a frozen bottom and finetuning on the tasks that they train: at equal minutes, and
    twice the one score under noise. Minutes are the median ones of all of a method's runs, as other work shared the
    cores."""
    arms = (BOTTOM, FINETUNED)
    runs = [over_cells(read_suite(suite, SUCCESS.column))[arm] for arm in arms]
    steady = [np.median(x.minutes[..., -1]) * x.steps / x.steps[-1] for x in runs]  # (E,) each
    timed = [x._replace(minutes=np.broadcast_to(minutes, x.scores.shape)) for x, minutes in zip(runs, steady)]
    noisy = over_cells(read_suite(suite, f"noisy {SUCCESS.column}"))
    pairs = zip(AGAIN, (at_equal_minutes(*timed), [noisy[arm].both for arm in arms if noisy]))
    return {arm + name: scores for name, pair in pairs for arm, scores in zip(arms, pair)}


def read_scores(suite):
    """{method: scores of Runs.both, as shares of the highest} of the kept runs; none of an incomplete suite."""
    if not read_kept(suite) or not is_complete(suite):
        return {}
    results = over_cells(read_suite(suite)) if suite in CELLS else read_suite(suite)
    scores = {method: runs.both / scale_of(suite).highest for method, runs in results.items()}
    if suite == "jump-noise":
        return {f"{method}, fresh head": both for method, both in scores.items()} | changes_under_noise()
    return scores | (freezing_again() if suite == "jump-unseen" else {})


# --- Verdicts --------------------------------------------------------------------------------------------------------
def judge(predictions, scores, seed=0):
    """Gains of a claim's predictions [(suite, method, other, margin)] that have runs enough, under Holm's correction:
    [(prediction, (mean over the run, interval), (at the end, interval) or None, (runs, the other's runs, cells))].

    scores {suite: {method: (n, 2) or (cells, n, 2)}} are those of read_scores; what is MEASURED_ONCE has no end.
    """
    pairs = [(p, *(scores[p[0]].get(method, np.empty((0, 2))) for method in p[1:3])) for p in predictions]
    pairs = [(p, a, b) for p, a, b in pairs if min(a.size, b.size) >= 2 * FEW]
    gains = []
    for column in (1, 0):
        asked = [(p, a, b) for p, a, b in pairs if column or not p[1].endswith(MEASURED_ONCE)]
        tests = {p: compare(a[..., column], b[..., column], p[3], seed) for p, a, b in asked}
        levels = holm_levels([pvalue for pvalue, _ in tests.values()])
        gains.append({p: interval(1 - level) for (p, (_, interval)), level in zip(tests.items(), levels)})
    counts = [(a.size // 2, b.size // 2, len(a) if a.ndim == 3 else 1) for _, a, b in pairs]
    return [(p, gains[0][p], gains[1].get(p), count) for (p, _, _), count in zip(pairs, counts)]


@functools.cache
def judge_family(name):
    """{claim: judge's answers} of a family of FAMILIES, and {prediction: verdict on the mean over the run, or on the
    end in a family of AT_THE_END}."""
    claims, judged, words = FAMILIES[name], {}, {}
    scores = {suite: read_scores(suite) for suite in {p[0] for found in claims.values() for p in found}}
    for claim, predictions in claims.items():
        for seed in range(BOOTSTRAPS if any(p[0] in CELLS for p in predictions) else 1):
            found = judge(predictions, scores, seed)
            judged.setdefault(claim, found)
            for p, mean, end, _ in found:
                _, interval = end if name in AT_THE_END else mean
                word = verdict(*interval, p[3], scale_of(p[0]).equal)
                words[p] = word if words.get(p, word) == word else "inconclusive"
    return {claim: found for claim, found in judged.items() if found}, words


def hinges_on(gains, splits, margin):
    """The splits without which the uncorrected interval of gains (cells, n), whose cells are of these `splits`, changes
    between above, around and below -margin."""

    def side(keep):
        _, (low, high) = compare(gains[keep], np.zeros_like(gains[keep]))[1]()
        return int(low > -margin) - int(high < -margin)

    of_cell = np.array(splits)
    return [split for split in dict.fromkeys(splits) if side(of_cell != split) != side(of_cell == of_cell)]
