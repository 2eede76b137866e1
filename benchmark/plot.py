"""Redraw the figures and tables of README.md and benchmark/README.md from the kept results.

    pip install -r benchmark/requirements.txt
    python benchmark/plot.py                # everything
    python benchmark/plot.py quickstart     # one suite

A suite's figure shows every seed faint and the interquartile mean over seeds strong, with a 95% stratified bootstrap
interval (Agarwal et al. 2021, by rliable). Its table has the scores of the last evaluation, and the probability that
a run of the method beats one of the suite's first method. A method without results is left out.
"""

import csv
import json
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from suites import SUITES, folder_of  # noqa: E402

import ppo_pisco  # noqa: E402

RESULTS = ROOT / "benchmark" / "results"
FIGURES = ROOT / "benchmark" / "figures"
PAGES = [ROOT / "README.md", ROOT / "benchmark" / "README.md"]
# Okabe and Ito's colours, which the colour-blind can tell apart; with dashes there are enough for twenty methods.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933", "#882255", "#44aa99"]
SCORES = {  # program: columns of metrics.csv for step and score, what they are called
    "ppo_pisco.py": ("global_step", "eval/greedy_success", "environment steps", "target tasks solved (greedy)"),
    "drqv2_pisco.py": ("frame", "episode_return", "frames", "return (mean of 10 episodes)"),
}
REPS = 2_000  # bootstrap samples
warnings.filterwarnings("ignore", "random_state is deprecated")  # rliable hands it on to arch


@dataclass
class Args:
    suite: tyro.conf.Positional[str] = "all"
    """a suite of benchmark/suites.py, or `all`"""


def program_of(suite):
    return SUITES[suite]["program"].split()[0]


def read_curve(folder, columns):
    """Steps and scores of one kept run's evaluations, (E,) float64 each."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = [[float(row[column]) for column in columns] for row in csv.DictReader(file) if row[columns[1]]]
    return np.array(rows).T


def read_suite(suite):
    """{method: (seeds, steps (E,), scores (n, E))} of the kept runs, by the suite's order. Raises ValueError where the
    runs of a method were evaluated at different steps."""
    results = {}
    for method in SUITES[suite]["methods"]:
        folder = folder_of(RESULTS, suite, method)
        seeds = sorted(int(path.name) for path in folder.glob("*") if (path / "manifest.json").exists())
        if not seeds:
            continue
        curves = [read_curve(folder / str(seed), SCORES[program_of(suite)][:2]) for seed in seeds]
        if len({tuple(steps) for steps, _ in curves}) > 1:
            raise ValueError(f"{folder}: the seeds' evaluations are not at the same steps")
        results[method] = (seeds, curves[0][0], np.stack([scores for _, scores in curves]))
    return results


def aggregate(scores):
    """Interquartile mean (E,) of scores (n, E) over the runs, and its 95% bootstrap interval (2, E)."""
    from rliable import library, metrics

    def iqm(x):  # (n, 1 task, E)
        return np.array([metrics.aggregate_iqm(x[..., i]) for i in range(x.shape[-1])])

    random = np.random.RandomState(0)
    points, intervals = library.get_interval_estimates({"": scores[:, None]}, iqm, reps=REPS, random_state=random)
    return points[""], intervals[""]


def improvement(scores, others):
    """Probability that a run with one of `scores` (n,) beats one with one of `others` (m,), and its 95% interval."""
    from rliable import library, metrics

    pair = {"": (scores[:, None], others[:, None])}
    random = np.random.RandomState(0)
    points, intervals = library.get_interval_estimates(
        pair, metrics.probability_of_improvement, reps=REPS, random_state=random
    )
    return float(np.squeeze(points[""])), np.ravel(intervals[""])


def draw_curves(suite, results):
    """Learning curves as benchmark/figures/SUITE.png."""
    *_, step_name, score_name = SCORES[program_of(suite)]
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for i, (method, (seeds, steps, scores)) in enumerate(results.items()):
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": "-" if i < len(COLOURS) else "--"}
        point, (low, high) = aggregate(scores)
        axes.plot(steps, scores.T, alpha=0.25, linewidth=0.8, **style)
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.plot(steps, point, linewidth=2.2, label=f"{method} (n = {len(seeds)})", **style)
    axes.set(xlabel=step_name, ylabel=score_name)
    axes.grid(alpha=0.3)
    if len(results) > 4:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    else:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(FIGURES / f"{suite}.png", dpi=120)
    plt.close(figure)


def write_table(suite, results):
    """The suite's table as Markdown."""
    first, *_ = results
    lines = [f"| method | n | interquartile mean [95%] | each seed | P(better than {first}) [95%] | minutes a run |"]
    lines.append("|---|---|---|---|---|---|")
    digits = 2 if program_of(suite) == "ppo_pisco.py" else 0
    for method, (seeds, _, scores) in results.items():
        point, (low, high) = (np.ravel(x) if i == 0 else x for i, x in enumerate(aggregate(scores[:, -1:])))
        better = "-"
        if method != first and min(len(seeds), len(results[first][0])) > 1:
            p, (p_low, p_high) = improvement(scores[:, -1], results[first][2][:, -1])
            better = f"{p:.2f} [{p_low:.2f}, {p_high:.2f}]"
        folder = folder_of(RESULTS, suite, method)
        manifests = [json.loads((folder / str(seed) / "manifest.json").read_text()) for seed in seeds]
        minutes = np.mean([manifest["wall_seconds"] for manifest in manifests]) / 60
        each = ", ".join(f"{score:.{digits}f}" for score in scores[:, -1])
        interval = f" [{low[0]:.{digits}f}, {high[0]:.{digits}f}]" if len(seeds) > 1 else ""  # one run tells of none
        value = f"{point[0]:.{digits}f}{interval}"
        lines.append(f"| {method} | {len(seeds)} | {value} | {each} | {better} | {minutes:.1f} |")
    return "\n".join(lines)


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
    figure.savefig(FIGURES / "jump_tasks.png", dpi=120)
    plt.close(figure)


def draw_heatmap():
    """The greedy policy of the quickstart's first run over all tasks, as figures/heatmap.png."""
    folder = folder_of(RESULTS, "quickstart", "freeze 2 + PiSCO") / "1"
    greedy = json.loads((folder / "evaluation.json").read_text())["greedy"]
    trained = ppo_pisco.parse_jump_tasks(",".join(greedy["trained_tasks"]))
    own = np.mean([greedy["solved"][f"{x}:{y}"] for x, y in trained])
    grid = np.mean([greedy["solved"][f"{x}:{y}"] for x, y in ppo_pisco.JUMP_GRID])
    title = f"solved: {own:.0%} of the trained tasks, {grid:.0%} of the grid (greedy, seed 1)"
    ppo_pisco.draw_heatmap(FIGURES / "heatmap.png", greedy["solved"], trained, title)


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.suite not in ("all", *SUITES):
        print(f"plot.py: error: suite {args.suite!r}: choose one of {', '.join(SUITES)}", file=sys.stderr)
        return 2
    for suite in SUITES if args.suite == "all" else [args.suite]:
        results = read_suite(suite)
        if not results:
            print(f"{suite}: no results\n")
            continue
        draw_curves(suite, results)
        table = write_table(suite, results)
        insert_table(suite, table)
        print(f"{suite}\n{table}\n")
    if args.suite in ("all", "quickstart"):
        draw_tasks()
        draw_heatmap()
    return 0


if __name__ == "__main__":
    sys.exit(main())
