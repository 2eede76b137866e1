"""Run the README's main command and the same budget from scratch, three seeds each, and draw the README's first figure.

    python benchmark/quickstart.py                     # ten minutes on two cores; finished runs are skipped
    python benchmark/quickstart.py --seeds 1 2 3 4 5
    python benchmark/quickstart.py --draw-only         # figures and table from the kept results

Every run leaves metrics.csv and manifest.json under benchmark/results/quickstart/METHOD/SEED/.
"""

import csv
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import ppo_pisco  # noqa: E402

RESULTS = ROOT / "benchmark" / "results" / "quickstart"
METHODS = {
    "freeze 2 + PiSCO": ["--freeze-layers", "2"],
    "from scratch": ["--encoder-weights", "none", "--freeze-layers", "0", "--ssl", "none"],
}
COLOURS = {"freeze 2 + PiSCO": "#0072b2", "from scratch": "#d55e00"}


@dataclass
class Args:
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    """seeds of every method"""
    draw_only: bool = False
    """run nothing, draw what is there"""


def kept(method):
    """The folder of a method's kept runs, one folder a seed in it."""
    return RESULTS / method.replace(" ", "_")


def run(method, seed):
    """One run as a program; its metrics and manifest go to the results folder. Skips a finished run."""
    folder = kept(method) / str(seed)
    if (folder / "manifest.json").exists():
        return
    command = ["python", "ppo_pisco.py", *METHODS[method], "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as runs:
        began = time.time()
        subprocess.run([sys.executable, *command[1:], "--runs-dir", runs], cwd=ROOT, check=True)
        seconds = time.time() - began
        folder.mkdir(parents=True, exist_ok=True)
        run_folder = next(Path(runs).iterdir())
        shutil.copy(run_folder / "metrics.csv", folder)
        shutil.copy(run_folder / "evaluation.json", folder)
        if method == "freeze 2 + PiSCO" and seed == 1:
            shutil.copy(run_folder / "heatmap.png", RESULTS.parent.parent / "figures" / "heatmap.png")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    manifest = {
        "command": " ".join(command),
        "commit": commit,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, CPU",
        "wall_seconds": round(seconds, 1),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def curve(method, seed):
    """Steps and greedy target success of one kept run, (evaluations,) each."""
    with open(kept(method) / str(seed) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["eval/greedy_success"]]
    return np.array([[int(r["global_step"]), float(r["eval/greedy_success"])] for r in rows]).T


def draw(figures):
    """Learning curves, every seed faint and the mean strong, as figures/quickstart.png; prints the final scores."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    print("| method | n | final target success: mean | each seed | minutes |\n|---|---|---|---|---|")
    for method in METHODS:
        seeds = sorted(int(path.name) for path in kept(method).glob("*"))
        curves = [curve(method, seed) for seed in seeds]
        for steps, success in curves:
            axes.plot(steps, success, color=COLOURS[method], alpha=0.25, linewidth=1)
        mean = np.mean([success for _, success in curves], axis=0)
        axes.plot(curves[0][0], mean, color=COLOURS[method], linewidth=2.5, label=f"{method} (n = {len(seeds)})")
        final = [success[-1] for _, success in curves]
        manifests = [kept(method) / str(seed) / "manifest.json" for seed in seeds]
        minutes = np.mean([json.loads(path.read_text())["wall_seconds"] for path in manifests]) / 60
        each = ", ".join(f"{value:.2f}" for value in final)
        print(f"| {method} | {len(seeds)} | {np.mean(final):.2f} | {each} | {minutes:.1f} |")
    axes.set(xlabel="environment steps", ylabel="target tasks solved (greedy)", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(figures / "quickstart.png", dpi=120)


def draw_tasks(figures):
    """The task sets over obstacle x floor and a source and a target task's frames, as figures/jump_tasks.png."""
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
    figure.savefig(figures / "jump_tasks.png", dpi=120)


def main():
    args = tyro.cli(Args, description=__doc__)
    figures = ROOT / "benchmark" / "figures"
    figures.mkdir(exist_ok=True)
    if not args.draw_only:
        for seed in args.seeds:
            for method in METHODS:
                run(method, seed)
    draw_tasks(figures)
    draw(figures)


if __name__ == "__main__":
    main()
