"""When do the trained policies of jump-baselines jump?

    python benchmark/run.py jump-baselines --seeds 10 --results again     # leaves the networks on this machine
    python benchmark/jump_moments.py

Lets every run's policy walk through every target task and asks it at each step, before it has jumped once. An agent in
the air can't jump again, and one that lands from a jump too early stands in front of the obstacle or has hit it: so the
first jump decides the task. Writes benchmark/results/jump_moments.csv, a row per method, seed and task, in steps from
the episode's start (the agent's x): `right`, the one moment that clears the obstacle; `greedy`, the greedy policy's
first jump, empty if there is none; `reach`, the probability that the sampled policy has not jumped before `right`.
"""

import csv
import io
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from jump_noise import WORK, load_policy  # noqa: E402
from suites import SUITES, weights_folder  # noqa: E402

import ppo_pisco  # noqa: E402

RESULTS = ROOT / "benchmark" / "results"
AHEAD = 14  # pixels from the agent's left edge to the obstacle's at the right moment


@torch.no_grad()
def jump_probabilities(policy, tasks):
    """For each task [(obstacle, floor)] the probabilities (obstacle - AGENT_W + 1,) of jumping at every step that a
    walk without a jump has before its collision."""
    envs = ppo_pisco.JumpVectorEnv(len(tasks), tasks)
    obs, _ = envs.reset(seed=0, options={"task_ids": np.arange(len(tasks))})
    table = []
    for _ in range(max(obstacle for obstacle, _ in tasks)):
        table.append(policy(torch.from_numpy(obs))[0].softmax(-1)[:, 1].numpy())  # (tasks,)
        obs = envs.step(np.zeros(len(tasks), dtype=np.int64))[0]
    table = np.stack(table, axis=1)  # (tasks, steps)
    return [row[: obstacle - envs.AGENT_W + 1] for row, (obstacle, _) in zip(table, tasks)]


def moments(probabilities, right):
    """The greedy policy's first jump (None: never) and the probability of no jump before `right`."""
    (jumps,) = np.nonzero(probabilities > 0.5)
    return (int(jumps[0]) if len(jumps) else None), float(np.prod(1 - probabilities[:right]))


def measure(method, seed, folder, tasks):
    """The CSV's rows of one run, whose networks are in `folder`."""
    (_, policy), rows = load_policy(folder), []
    for (obstacle, floor), probabilities in zip(tasks, jump_probabilities(policy, tasks)):
        greedy, reach = moments(probabilities, obstacle - AHEAD)
        row = {"method": method, "seed": seed, "obstacle": obstacle, "floor": floor, "right": obstacle - AHEAD}
        rows.append(row | {"greedy": greedy, "reach": f"{reach:.6f}"})
    return rows


def main():
    tasks, rows = ppo_pisco.JUMP_TASK_SETS["target"], []
    for method, flags in SUITES["jump-baselines"]["methods"].items():
        for seed in range(1, 11):
            folder = weights_folder(WORK, f"{flags} --seed {seed}".split())
            if not (folder / "args.json").exists():
                command = "python benchmark/run.py jump-baselines --seeds 10 --results again"
                print(
                    f"jump_moments.py: error: the networks of {method}, seed {seed} are not on this machine; "
                    f"make them with {command}", file=sys.stderr,
                )  # fmt: skip
                return 2
            rows += measure(method, seed, folder, tasks)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    ppo_pisco.write_atomically(RESULTS / "jump_moments.csv", text.getvalue().encode())
    unsolved = sum(row["greedy"] != row["right"] for row in rows)
    print(f"{len(rows)} tasks played, {unsolved} not solved: {RESULTS / 'jump_moments.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
