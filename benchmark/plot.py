"""Redraw the figures and tables of README.md and benchmark/README.md from the kept results.

    pip install -r benchmark/requirements.txt
    python benchmark/plot.py                # everything
    python benchmark/plot.py jump-cells     # the tables and figures whose names begin so, such as a suite's

What is asked of which suite stands in suites.py. Tables and curves show interquartile means over seeds with 95%
stratified bootstrap intervals (Agarwal et al. 2021, by rliable), over cells means with intervals that resample cells,
then seeds, and in tables are no narrower than Student's t over cells; gains are differences of plain means. With fewer
than five seeds there are points alone.
"""

import csv
import fnmatch
import functools
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from kept import (  # noqa: E402
    FEW,
    RESULTS,
    SUCCESS,
    UNSEEN_SUCCESS,
    Runs,
    at_equal_minutes,
    hinges_on,
    is_complete,
    judge_family,
    over_cells,
    read_kept,
    read_scores,
    read_suite,
    scale_of,
    split_of,
    splits_of,
)
from stats import aggregate, compare, improvement, resample  # noqa: E402
from suites import AT_THE_END, BESIDE_UNSEEN, CELLS, FAMILIES, GRIDS, PANELS, SPLITS, STDS, UNSEEN  # noqa: E402

import ppo_pisco  # noqa: E402

FIGURES_FOLDER = ROOT / "benchmark" / "figures"
PAGES = [ROOT / "README.md", ROOT / "benchmark" / "README.md"]
# Okabe and Ito's colours, which the colour-blind can tell apart; with dashes there are enough for twenty methods.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933", "#882255", "#44aa99"]
VERDICTS = {"supported": "#009e73", "contradicted": "#d55e00", "no difference": "#0072b2", "inconclusive": "0.3"}


# --- Tables ----------------------------------------------------------------------------------------------------------
def with_interval(point, interval, digits, sign=""):
    point, low, high = (f"{number:{sign}.{digits}f}" for number in (point, *interval))
    return f"{point} [{low}, {high}]" if np.isfinite(interval).all() else f"{point} [?, ?]"


def markdown(names, rows):
    """A table as Markdown: the columns' names and rows of text."""
    head = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return "\n".join(head + [f"| {' | '.join(row)} |" for row in rows])


def scores_text(scores, digits):
    """The interquartile mean of each column of scores (n, E) as text [E], with an interval if there are runs enough."""
    points, intervals = aggregate(scores)
    if len(scores) < FEW:
        return [f"{point:.{digits}f}" for point in points]
    return [with_interval(point, interval, digits) for point, interval in zip(points, intervals.T)]


def better_than(runs, first):
    """The probability that a run of `runs` has a higher mean than one of `first`, as text; `-` with too few runs."""
    if runs is first or min(len(runs.seeds), len(first.seeds)) < FEW:
        return "-"
    return with_interval(*improvement(runs.both[:, 1], first.both[:, 1]), 2)


def minutes_of(suite, method):
    """The median wall time of the method's runs as text; a resumed run has timed its last part alone."""
    rows = [row for row, _ in read_kept(suite)[method].values()]
    whole = [float(row["seconds"]) for row in rows if row["resumed"] == "False"]
    return f"{np.median(whole) / 60:.1f}" if whole else "-"


def write_table(suite):
    """A suite's methods as Markdown."""
    results, digits, rows = read_suite(suite), scale_of(suite).digits, []
    for method, runs in results.items():
        each = " ".join(f"{score:.{digits}f}" for score in runs.scores[:, -1])
        both = scores_text(runs.both, digits)
        rows.append([method, str(len(runs.seeds)), *both, each, minutes_of(suite, method)])
    return markdown(["method", "n", "at the end", "mean over the run", "each seed, at the end", "minutes"], rows)


def write_cells_table(suite):
    """A suite over cells as Markdown: both scores' means, with intervals if there are cells enough, and the one that is
    judged in every split; of UNSEEN tasks, which are judged at the end, beside the trained ones."""
    splits, rows, unseen = splits_of(suite), [], suite in UNSEEN
    names = list(dict.fromkeys(splits))
    trained = over_cells(read_suite(suite, SUCCESS.column)) if unseen else {}
    for method, runs in over_cells(read_suite(suite)).items():
        if len(runs.both) < FEW:  # cells
            both = [f"{point:.2f}" for point in runs.both.mean((0, 1))]
        else:
            both = [with_interval(*compare(x, np.zeros_like(x))[1](), 2) for x in np.moveaxis(runs.both, -1, 0)]
        means = runs.both[..., 0 if unseen else 1].mean(1)  # (cells,)
        each = [f"{np.mean([m for m, s in zip(means, splits) if s == split]):.2f}" for split in names]
        each += [f"{trained[method].scores[..., -1].mean():.2f}"] if unseen else []
        rows.append([method, str(runs.both[..., 0].size), *both, *each])
    columns = [f"{name}, at the end" for name in names] + ["trained tasks, at the end"] if unseen else names
    return markdown(["method", "n", "at the end", "mean over the run", *columns], rows)


def write_cells_tables(suites):
    """The tables of suites over the same cells as one."""
    first, *others = (write_cells_table(suite) for suite in suites)
    return "\n".join([first, *(row for table in others for row in table.splitlines()[2:])])


def best_rate(found):
    """Of {rate: Runs}, by rising rate, the one with the highest mean over the run; the smaller one of two equals."""
    means = {rate: round(runs.both[:, 1].mean(), 9) for rate, runs in found.items()}
    return max(means, key=means.get)


def by_rate(results):
    """{method: {learning rate: Runs}} of results whose methods' names are "METHOD, RATE"."""
    methods = {}
    for name, runs in results.items():
        method, rate = name.rsplit(", ", 1)
        methods.setdefault(method, {})[rate] = runs
    return methods


def write_rates_table(suite):
    """Of a suite *-rates the mean over the run (at the end) as Markdown; every method's best rate in bold."""
    methods, rows = by_rate(read_suite(suite)), []
    rates = list(dict.fromkeys(rate for found in methods.values() for rate in found))
    for method, found in methods.items():
        counts = sorted({len(runs.seeds) for runs in found.values()})
        best = best_rate(found) if len(counts) == 1 and len(found) == len(rates) else None
        cells = {r: f"{x.both[:, 1].mean():.2f} ({x.both[:, 0].mean():.2f})" for r, x in found.items()}
        each = [f"**{cells[rate]}**" if rate == best else cells.get(rate, "") for rate in rates]
        rows.append([method, *each, " or ".join(map(str, counts))])
    return markdown(["method", *rates, "n"], rows)


def write_noise_table():
    """Success of jump-noise's fresh heads under noise as Markdown, means over cells."""
    runs = [over_cells(read_suite("jump-noise", f"fresh head, noise {std}")) for std in STDS]
    rows = [[m, str(runs[0][m].scores.size), *(f"{found[m].scores.mean():.2f}" for found in runs)] for m in runs[0]]
    rows = [[*row, str(int((runs[0][row[0]].scores == 0).sum()))] for row in rows]
    return markdown(["method", "n", *(f"noise {std}" for std in STDS), "solve nothing without noise"], rows)


def write_freezing():
    """How much more does freezing gain for the large encoder, as Markdown: points, with fewer than FEW runs an arm."""
    results, rows = over_cells(read_suite("jump-impala")), {"per step": [], "per minute": []}
    for pair in (("impala, 7 frozen", "impala, 0 frozen"), ("nature, frozen bottom", "nature, finetuned")):
        arms = [results[name] for name in pair]
        rows["per step"].append([runs.both[..., 1].ravel() for runs in arms])
        rows["per minute"].append([both[..., 1].ravel() for both in at_equal_minutes(*arms)])
    table = []
    for name, pairs in rows.items():
        large, small = (np.mean(frozen) - np.mean(finetuned) for frozen, finetuned in pairs)
        runs = ", ".join(str(len(arm)) for pair in pairs for arm in pair)
        table.append([name, *(f"{gain:+.2f}" for gain in (large - small, large, small)), runs])
    return markdown(["score", "gain of freezing, impala less nature", "impala", "nature", "runs"], table)


def write_exploratory():
    """Gains of jump-cells that its protocol does not ask for, uncorrected, as Markdown."""
    results, pairs = over_cells(read_suite("jump-cells")), []
    for faster, slower in (("frozen bottom", "finetuned"), ("frozen bottom", "frozen bottom + PiSCO")):
        pairs.append((faster, slower, "equal minutes", *at_equal_minutes(results[faster], results[slower])))
    for until in (2, 6, 10):  # of ten evaluations
        names = ("finetuned", "from scratch")
        both = [results[name]._replace(scores=results[name].scores[..., :until]).both for name in names]
        pairs.append((*names, f"{results[names[0]].steps[until - 1]:,.0f} steps", *both))
    rows = []
    for name, other, until, a, b in pairs:
        gains = [with_interval(*compare(a[..., i], b[..., i])[1](), 2, "+") for i in (1, 0)]
        rows.append([f"{name} - {other}", until, *gains])
    return markdown(["gain", "until", "mean until then", "at that moment"], rows)


def without_sources(suite):
    """{method: mean share solved at the end, over all runs, of the tasks that neither it nor its encoder trained}."""
    shares = {}
    for name, kept in read_kept(suite).items():
        cell, method = name.split(", ", 1)
        split = SPLITS[split_of(cell)]  # tasks of the source, tasks of the target
        known = {f"{x}:{y}" for tasks in split for x, y in ppo_pisco.parse_jump_tasks(tasks)}
        for _, rows in kept.values():
            played = zip(rows[-1]["tasks"].split(), rows[-1]["greedy"])
            shares.setdefault(method, []).append(np.mean([word == "1" for task, word in played if task not in known]))
    return {method: np.mean(found) for method, found in shares.items()}


def write_settings(suite="jump-settings"):
    """jump-settings as Markdown, a row a setting: at every depth the mean share of unseen tasks solved at the end, of
    trained ones over the run, and the number of runs."""
    unseen, trained = read_suite(suite), read_suite(suite, SUCCESS.column)
    depths, settings = (list(dict.fromkeys(name.split(", ", 1)[i] for name in unseen)) for i in (0, 1))
    rows = []
    for setting in settings:
        row = [f"projector {setting}" if setting.startswith(("none", "residual", "mlp")) else setting]
        for depth in depths:
            found = [results.get(f"{depth}, {setting}") for results in (unseen, trained)]
            both = [runs.both[:, i].mean() for i, runs in enumerate(found) if runs]
            row.append(f"{both[0]:.2f}, {both[1]:.2f} ({len(found[0].seeds)})" if both else "-")
        rows.append(row)
    return markdown(["setting", *(f"{depth}: unseen, trained (n)" for depth in depths)], rows)


def write_unseen(suite="jump-unseen"):
    """What jump-unseen's policies do at the end on tasks trained and unseen, clean and under noise, as Markdown."""
    columns = {
        "unseen": UNSEEN_SUCCESS, "unseen, sampled": "sampled_unseen_success",
        "unseen, noise": f"noisy {UNSEEN_SUCCESS}", "trained": SUCCESS.column,
        "trained, noise": f"noisy {SUCCESS.column}", "loss's gradient over RL's": "ssl_grad_share",
    }  # fmt: skip
    found = {title: over_cells(read_suite(suite, column)) for title, column in columns.items()}
    means = {title: {m: x.scores[..., -1].mean() for m, x in methods.items()} for title, methods in found.items()}
    means["unseen, without the encoder's"] = without_sources(suite)
    means["trained, mean over the run"] = {m: x.scores.mean() for m, x in found["trained"].items()}
    rows = [[m, *(f"{of[m]:.2f}" if m in of else "-" for of in means.values())] for m in found["unseen"]]
    return markdown(["method", *means], rows)


def prediction_text(prediction):
    _, better, worse, margin = prediction
    return f"{better} > {worse}" + (f" - {margin:.2f}" if margin else "")


def write_verdicts(family):
    """A family's predictions and what the kept runs say of them, as Markdown; over splits with each one's gain in the
    judged score."""
    judged, words = judge_family(family)
    suites, score = {p[0] for found in judged.values() for p, *_ in found}, 0 if family in AT_THE_END else 1
    scores = {suite: read_scores(suite) for suite in suites}
    splits, rows = list(dict.fromkeys(split for suite in suites & {*CELLS} for split in splits_of(suite))), []
    for claim, found in judged.items():
        for p, mean, end, counts in found:
            both = [with_interval(*gain, 2, "+") if gain else "-" for gain in (mean, end)]
            each = []
            if splits:
                gains, of_cell = np.subtract(*(scores[p[0]][name][..., score] for name in p[1:3])), splits_of(p[0])
                each = [f"{gains[np.array(of_cell) == split].mean():+.2f}" for split in splits]
                each = [", ".join(hinges_on(gains, of_cell, p[3])) or "-", *each]
            runs = [f"{counts[0]}, {counts[1]}", str(counts[2])]
            rows.append([claim, prediction_text(p), words[p], *both, *runs, *each])
            claim = ""
    names = ["claim", "prediction", "verdict", "gain, mean over the run", "gain, at the end", "runs", "cells"]
    return markdown([*names, *(["hinges on", *splits] if splits else [])], rows)


def write_speeds():
    """The ratios that speed.py and drqv2_speed.py have measured, as Markdown."""
    rows = []
    for name in ("speed", "timm_speed", "drqv2_speed"):
        with open(RESULTS / f"{name}.csv", newline="") as file:
            rows += [[row["what"], row["value"], row["unit or meaning"]] for row in csv.DictReader(file)]
    return markdown(["over", "ratio", "what it tells"], [row for row in rows if " / " in row[0]])


# --- Figures ---------------------------------------------------------------------------------------------------------
def style_of(i):
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": "-" if i < len(COLOURS) else "--"}


def save(figure, path):
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_bands(axes, x, scores, label, style):
    """Interquartile mean of scores (n, X) over x (X,), or mean of scores (cells, n, X), with an interval if there are
    runs enough; else, in one cell, with every run as a thin line."""
    count = scores[..., 0].size
    if scores.ndim == 3:
        point, (low, high) = scores.mean((0, 1)), np.quantile(resample(scores), [0.025, 0.975], axis=0)
    else:
        point, (low, high) = aggregate(scores)
    if count >= FEW:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.12, linewidth=0)
    elif scores.ndim == 2:
        axes.plot(x, scores.T, alpha=0.25, linewidth=0.8, **style)
    axes.plot(x, point, linewidth=2.2, label=f"{label} (n = {count})", **style)


def draw_official(axes, task, frames):
    """The official DrQ-v2 agent's returns, mean and range over its seeds, at the marks up to `frames`."""
    with open(RESULTS / "drqv2_official.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == task and float(row["frames"]) <= frames]
    x, mean, low, high = np.array([[float(row[key]) for key in ("frames", "mean", "min", "max")] for row in rows]).T
    label = "official agent, other settings (mean, range)"
    axes.errorbar(x, mean, [mean - low, high - mean], fmt="s", color="0.5", capsize=4, clip_on=False, label=label)
    axes.set_ylim(0, 1000)


def draw_curves(path, panels, name, minutes=False, official=None):
    """Scores, called `name`, over steps in panels {title: {label: Runs}}, and beside them over the median minutes; with
    those of the official DrQ-v2 agent on the task `official`."""
    rows, columns = (len(panels), 2) if minutes else (1, len(panels))
    size = {"figsize": (5 * columns + 2.5 * (columns == 1), 4.4 * rows), "sharey": True}
    figure, grid = plt.subplots(rows, columns, layout="constrained", squeeze=False, **size)
    styles = {x: style_of(i) for i, x in enumerate(dict.fromkeys(x for results in panels.values() for x in results))}
    for i, (title, results) in enumerate(panels.items()):
        row = grid[i] if minutes else [grid[0][i]]
        for axes, words in zip(row, ("environment steps (control suite: frames)", "minutes of training")):
            for label, runs in results.items():
                x = runs.steps if axes is row[0] else np.median(runs.minutes.reshape(-1, len(runs.steps)), 0)
                draw_bands(axes, x, runs.scores, label, styles[label])
            axes.set(xlabel=words, title=title)
            axes.grid(alpha=0.3)
        if official:
            draw_official(row[0], official, runs.steps[-1])
        row[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=8)
    for row in grid:
        row[0].set_ylabel(name)
    save(figure, path)


def draw_suite(path, suite):
    """A suite's learning curves in its panels; those of impala over minutes too, its two cells together."""
    results = over_cells(read_suite(suite)) if suite in CELLS else read_suite(suite)
    if suite == "jump-impala":
        results = {name: Runs(x.seeds, x.steps, *map(np.concatenate, x[2:])) for name, x in results.items()}
    panels = {title: {label: results[x] for label, x in found.items()} for title, found in PANELS[suite].items()}
    official = "cartpole_balance_sparse" if suite == "dmc-sparse" else None
    draw_curves(path, panels or {"": results}, scale_of(suite).name, suite == "jump-impala", official)


def draw_forest(path, family):
    """A row per prediction of a family: the gain in the mean over the run, its corrected interval, coloured by verdict,
    and a mark that it must lie above; thin the gain at the end."""
    judged, words = judge_family(family)
    labels = [row for claim, found in judged.items() for row in (claim, *found)]
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(labels) + 1.3), layout="constrained")
    for y, row in enumerate(labels):
        prediction, mean, end, _ = (None,) * 4 if isinstance(row, str) else row
        if end:
            axes.plot(end[1], [y + 0.28] * 2, color="0.75", linewidth=1)
        if mean:
            style = {"color": VERDICTS[words[prediction]], "linewidth": 2.5}
            axes.plot(mean[1], [y] * 2, **style)
            axes.plot(mean[0], y, "o", **style)
            axes.plot(-prediction[3], y, "|", color="black", markersize=14)
    axes.set_yticks(range(len(labels)), [row if isinstance(row, str) else prediction_text(row[0]) for row in labels])
    for label, row in zip(axes.get_yticklabels(), labels):
        label.set(fontsize=9, fontweight="bold" if isinstance(row, str) else "normal")
    axes.set_ylim(len(labels) - 0.3, -0.6)
    axes.axvline(0, color="0.3", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("gain (thin: at the end), as a share of the highest score", fontsize=9)
    handles = [plt.Line2D([], [], color=colour, marker="o", linewidth=2.5) for colour in VERDICTS.values()]
    figure.legend(handles, VERDICTS, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def draw_grid(path, panels):
    """A frame of Jump, and the share of runs whose greedy policy solves each task of its grid at the end, in panels
    {title: (suite, methods by a pattern, tasks that they were trained on)}; these tasks are circled."""
    size = {"figsize": (11, 2.7), "width_ratios": (1, *[2] * len(panels))}
    figure, (first, *others) = plt.subplots(1, 1 + len(panels), layout="constrained", **size)
    envs = ppo_pisco.JumpVectorEnv(1, [(45, 15)])
    envs.reset(seed=0)
    for _ in range(45 - 14 + 12):  # jump when the obstacle is 14 pixels ahead, and show it in the air
        obs = envs.step(envs.task_obstacle[:1] - envs.x == 14)[0]
    first.imshow(obs[0, 0], cmap="gray", origin="lower")
    first.set_title("obstacle 45, floor 15", fontsize=10)
    first.axis("off")
    for axes, (title, (suite, pattern, tasks)) in zip(others, panels.items()):
        kept = [runs for method, runs in read_kept(suite).items() if fnmatch.fnmatch(method, pattern)]
        rows = [rows[-1] for runs in kept for _, rows in runs.values()]
        tables = [dict(zip(row["tasks"].split(), row["greedy"])) for row in rows]
        trained = ppo_pisco.parse_jump_tasks(tasks)
        played = sorted(tuple(map(int, task.split(":"))) for task in tables[0])
        (x0, y0), (x1, y1) = played[0], played[-1]
        solved = [[int(table[f"{x}:{y}"]) for x, y in played] for table in tables]
        share = np.mean(solved, axis=0).reshape(x1 - x0 + 1, y1 - y0 + 1).T  # (floors, obstacles)
        extent = (x0 - 0.5, x1 + 0.5, y0 - 0.5, y1 + 0.5)
        image = axes.imshow(share, origin="lower", extent=extent, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axes.scatter(*zip(*trained), s=14, facecolor="none", edgecolor="#d55e00")
        axes.set_title(f"{title}: {share.mean() * share.size:.0f} of {share.size} tasks (n = {len(rows)})", fontsize=10)
        axes.set(xlabel="obstacle (pixels)", ylabel="floor (pixels)")
    figure.colorbar(image, ax=others, label="share of runs")
    save(figure, path)


# --- Which tables and figures there are ------------------------------------------------------------------------------
def table_of(suite):
    """The function that writes a suite's table."""
    return write_cells_table if suite in CELLS else write_rates_table if suite.endswith("-rates") else write_table


KEPT = sorted(path.parent.name for path in RESULTS.glob("*/runs.csv"))
TABLES = {  # the mark on a page: what writes the table; one without a mark is printed alone
    **{suite: functools.partial(table_of(suite), suite) for suite in KEPT},
    **{family: functools.partial(write_verdicts, family) for family in FAMILIES},
    "exploratory": write_exploratory, "noise": write_noise_table, "freezing": write_freezing, "speed": write_speeds,
    "jump-unseen scores": write_unseen, "jump-settings": write_settings,
    "jump-others": functools.partial(write_cells_tables, BESIDE_UNSEEN),
}  # fmt: skip
FIGURES = {  # the file: what draws it
    **{name: functools.partial(draw_grid, panels=panels) for name, panels in GRIDS.items()},
    **{suite: functools.partial(draw_suite, suite=suite) for suite in PANELS},
    "verdicts": functools.partial(draw_forest, family="verdicts"),
}  # fmt: skip


def insert_table(mark, table):
    """Puts the table between the marks `<!-- MARK -->` and `<!-- /MARK -->` of the pages that have them."""
    for page in PAGES:
        text = page.read_text()
        new = re.sub(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)
        if new != text:
            page.write_text(new)


def main(argv=None):
    """Draws what the names begin with. Returns the exit code."""
    wanted = tuple(sys.argv[1:] if argv is None else argv) or ("",)
    if wanted[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    tables, figures = ([name for name in found if name.startswith(wanted)] for found in (TABLES, FIGURES))
    if not tables + figures:
        print(f"plot.py: error: {wanted[0]!r}: choose among {', '.join(TABLES | FIGURES)}", file=sys.stderr)
        return 2
    for name in tables:
        suite = name.split(" ")[0]
        parts = BESIDE_UNSEEN if name == "jump-others" else (suite,)
        if not judge_family(name)[0] if name in FAMILIES else suite in CELLS and not all(map(is_complete, parts)):
            print(f"{name}: not all runs yet\n")
            continue
        table = TABLES[name]()
        insert_table(name, table)
        print(f"{name}\n{table}\n")
    for name in figures:
        FIGURES[name](FIGURES_FOLDER / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
