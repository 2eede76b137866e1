"""The benchmark's statistics: intervals and verdicts for plot.py and compare.py, medians for the speed programs."""

import csv
import statistics
import warnings

import numpy as np
from scipy import stats

REPS = 2_000  # bootstrap samples of rliable
SAMPLES = 20_000  # bootstrap samples over cells
warnings.filterwarnings("ignore", "random_state is deprecated")  # rliable hands it on to arch


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


def resample(scores, seed=0):
    """Bootstrap samples (SAMPLES, ...) of the mean of scores (cells, n, ...): cells are drawn, then seeds in each."""
    random, (cells, seeds) = np.random.default_rng(seed), scores.shape[:2]
    drawn = random.integers(cells, size=(SAMPLES, cells, 1))
    return scores[drawn, random.integers(seeds, size=(SAMPLES, cells, seeds))].mean((1, 2))


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


def compare(ours, others, margin=0.0, seed=0):
    """p-value of a gain of -margin between two methods' scores, and a function from a level to (gain, interval).

    Scores (n,) and (m,) of one cell have Welch's test and interval. Scores (cells, n) are compared inside a cell with
    the same seeds: by the percentiles of resample, and as those are too narrow for eight cells where cells differ, also
    by Student's t of the cells' means. The larger p-value counts, and on each side the wider interval.
    """
    if ours.ndim == 1:
        return pvalue_of(*welch([ours + margin], [others])), lambda level=0.95: difference([ours], [others], level)
    gains = ours - others
    samples, means = resample(gains, seed), gains.mean(1)
    pvalue = max(
        2 * min(np.mean(samples <= -margin), np.mean(samples >= -margin)), pvalue_of(*welch([means + margin], []))
    )

    def interval(level=0.95):
        gain, student = difference([means], [], level)
        low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
        return gain, (float(np.minimum(low, student[0])), float(np.maximum(high, student[1])))

    return min(1.0, pvalue), interval


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


def verdict(low, high, margin, equal):
    """What an interval of a gain says of the prediction that the gain is above -margin; within +-equal of zero there is
    no difference, but a gain is one."""
    if low > 0:
        return "supported"
    if high < -margin:
        return "contradicted"
    if -equal < low and high < equal:
        return "no difference"
    return "supported" if low > -margin else "inconclusive"


def mean_until(minutes, scores, limit):
    """Mean over the time from 0 to limit of runs' scores, which are 0 before the first evaluation and from each on what
    it says; minutes and scores (..., E), limit (...), all in the same unit."""
    limit = np.asarray(limit, dtype=float)
    ends = np.concatenate([minutes[..., 1:], np.full_like(minutes[..., :1], np.inf)], -1)
    ends = np.minimum(ends, limit[..., None])
    return (scores * np.clip(ends - minutes, 0, None)).sum(-1) / limit


def score_at(minutes, scores, limit):
    """The last scores that runs had at that time, or 0; minutes and scores (..., E), limit (...)."""
    index = (minutes <= np.asarray(limit)[..., None] + 1e-9).sum(-1, keepdims=True)
    return np.take_along_axis(np.concatenate([np.zeros_like(scores[..., :1]), scores], -1), index, -1)[..., 0]


def runs_needed(gain, *samples, level=0.05):
    """Runs an arm for a power of 80% at a two-sided level, if the gain and the samples' spread are true."""
    variance, quantiles = np.mean([np.var(scores, ddof=1) for scores in samples]), stats.norm.isf([level / 2, 0.2])
    return max(2, int(np.ceil(2 * variance * quantiles.sum() ** 2 / gain**2))) if gain else None


# --- Speed -----------------------------------------------------------------------------------------------------------
def take_samples(measured, repeats):
    """Calls every function of measured {name: (function, unit)} once a repeat, in turn, so that a busy moment of the
    machine hits all of them alike. Returns {name: [numbers]}."""
    samples = {name: [] for name in measured}
    for repeat in range(repeats):
        for name, (function, unit) in measured.items():
            samples[name].append(function())
            print(f"repeat {repeat + 1}: {name}: {samples[name][-1]:.4g} {unit}", flush=True)
    return samples


def write_report(samples, units, ratios, machine, output=None):
    """Prints the medians of samples {name: [numbers]} and of each repeat's ratios [(name over, name, meaning)].

    Writes them to the file `output` too, where one is given.
    """
    median = {name: statistics.median(values) for name, values in samples.items()}
    rows = [(name, f"{value:.4g}" if value < 1000 else f"{value:.0f}", units[name]) for name, value in median.items()]
    for a, b, meaning in ratios:
        ratio = statistics.median(x / y for x, y in zip(samples[a], samples[b]))
        rows.append((f"{a} / {b}", f"{ratio:.2f}", meaning))
    rows.append(("machine", machine, f"{min(map(len, samples.values()))} repeats"))
    for row in rows:
        print(f"{row[0]:<56} {row[1]:>12}  {row[2]}")
    if output:
        with open(output, "w", newline="") as file:
            csv.writer(file).writerows([("what", "value", "unit or meaning"), *rows])
