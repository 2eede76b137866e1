"""How often do the intervals of jump-cells miss the truth? The simulations behind the limits in its protocol.

    python benchmark/coverage.py

Draws gains whose true mean is 0 for eight cells, two in each of four splits, and three seeds in each cell, and counts
how often 0 lies outside an interval: of Student's t of the cells' means, of the percentiles of a bootstrap that draws
cells, then seeds, and of plot.py's, on each side the wider of the two. Runs have a standard deviation of 1, so means of
three runs one of 0.58; splits and cells differ by multiples of that.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))
import plot  # noqa: E402

SPLITS, ENCODERS, SEEDS = 4, 2, 3  # jump-cells has two encoders for every split
CASES = {
    "only runs differ": (0, 0),
    "cells differ as much as means of three runs": (1, 0),
    "cells differ ten times as much": (10, 0),
    "splits differ as much as means of three runs": (0, 1),
    "splits differ three times as much": (0, 3),
    "splits differ ten times as much": (0, 10),
}  # standard deviations of cells and of splits, over that of means of three runs


@dataclass
class Args:
    draws: int = 2_000
    """simulated experiments for every case"""
    level: float = 0.05
    """of the intervals: 0.05 for 95%; Holm's correction of jump-cells goes down to 0.00625"""


def draw_gains(random, cells, splits):
    """Gains (8 cells, 3 seeds) float64 with a true mean of 0."""
    unit = SEEDS**-0.5
    split = splits * unit * random.standard_normal((SPLITS, 1, 1))
    cell = cells * unit * random.standard_normal((SPLITS, ENCODERS, 1))
    return (split + cell + random.standard_normal((SPLITS, ENCODERS, SEEDS))).reshape(SPLITS * ENCODERS, SEEDS)


def misses(gains, level):
    """Whether 0 lies outside each of the three intervals of gains (cells, seeds): t, percentiles, the wider ones."""
    _, student = plot.difference([gains.mean(1)], [], 1 - level)
    percentiles = np.quantile(plot.resample(gains), [level / 2, 1 - level / 2])
    _, wider = plot.compare(gains, np.zeros_like(gains), 0.0)[1](1 - level)
    return [not low <= 0 <= high for low, high in (student, percentiles, wider)]


def main():
    args = tyro.cli(Args, description=__doc__)
    rows = []
    for case, sizes in CASES.items():
        random = np.random.default_rng(1)
        shares = np.mean([misses(draw_gains(random, *sizes), args.level) for _ in range(args.draws)], axis=0)
        rows.append([case, *(f"{share:.1%}" for share in shares)])
    print(plot.markdown([f"outside, level {args.level:g}", "t", "percentiles", "wider of both"], rows))


if __name__ == "__main__":
    main()
