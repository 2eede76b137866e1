"""Measure the speed of ppo_pisco.py and print ratios from one run: environment, losses, and a peer's program.

    python benchmark/speed.py                                   # Jump's steps/s; the cost of PiSCO on Jump and on Pong
    python benchmark/speed.py --peer "python ppo_atari_envpool.py"   # beside CleanRL's program, from your copy of it
    python benchmark/speed.py --repeats 5 --output benchmark/results/speed.csv

The programs take turns, so that a busy machine slows all of them alike; each number is the median of the repeats.
The peer must take CleanRL's flags and print lines `SPS: n`; its environment may be another one than ours.
"""

import csv
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from report import take_samples, write_report  # noqa: E402

import ppo_pisco  # noqa: E402

# CleanRL's own defaults for Atari: both programs get them.
ATARI = (
    "--env-id Pong-v5 --num-envs 8 --num-steps 128 --num-minibatches 4 --update-epochs 4 --learning-rate 2.5e-4 "
    "--clip-coef 0.1 --ent-coef 0.01"
)
ATARI_OURS = f"{ATARI} --feature-dim 512 --reward-scale 1 --encoder-weights none --freeze-random --eval-episodes 1"


@dataclass
class Args:
    repeats: int = 3
    """times that every program runs; the median counts"""
    steps: int = 4096
    """environment steps per Pong run; Jump runs take eight times as many"""
    peer: str | None = None
    """command of a peer such as CleanRL's ppo_atari_envpool.py"""
    output: str | None = None
    """CSV file for the table"""


def jump_steps_per_second(copies=64, steps=3000):
    """Environment steps per second of Jump on one core, rendering included, with random actions."""
    envs = ppo_pisco.JumpVectorEnv(copies, ppo_pisco.JUMP_TASK_SETS["target"])
    envs.reset(seed=0)
    actions = (np.random.default_rng(0).random((steps, copies)) < 0.1).astype(np.int64)
    began = time.perf_counter()
    for action in actions:
        envs.step(action)
    return steps * copies / (time.perf_counter() - began)


def ours(flags, steps):
    """SPS of ppo_pisco.py over all iterations but the first, which warms up; without the evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "ppo_pisco.py"), *flags.split(), "--runs-dir", folder]
        command += ["--total-timesteps", str(steps), "--eval-interval", "0"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(next(Path(folder).glob("*/metrics.csv")), newline="") as file:
            rows = [(int(row["global_step"]), float(row["charts/SPS"])) for row in csv.DictReader(file)]
    (first, first_sps), (last, last_sps) = rows[0], rows[-1]
    return (last - first) / (last / last_sps - first / first_sps)


def peer(command, flags, steps):
    """The same of a peer, from the lines `SPS: n` (steps so far per second so far) that it prints."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*shlex.split(command), *flags.split(), "--total-timesteps", str(steps)]
        output = subprocess.run(arguments, check=True, cwd=folder, capture_output=True, text=True).stdout
    sps = [int(n) for n in re.findall(r"^SPS: (\d+)", output, flags=re.M)]
    batch = steps // len(sps)
    return (steps - batch) / (steps / sps[-1] - batch / sps[0])


def main():
    args = tyro.cli(Args, description=__doc__)
    measured = {
        "jump environment": jump_steps_per_second,
        "jump, none, 0 frozen": lambda: ours("--ssl none", 8 * args.steps),
        "jump, none, 2 frozen": lambda: ours("--ssl none --freeze-layers 2 --freeze-random", 8 * args.steps),
        "jump, pisco, 2 frozen": lambda: ours("--ssl pisco --freeze-layers 2 --freeze-random", 8 * args.steps),
        "pong, none, 0 frozen": lambda: ours(f"{ATARI_OURS} --ssl none", args.steps),
        "pong, none, 0 frozen, bf16": lambda: ours(f"{ATARI_OURS} --ssl none --bf16", args.steps),
        "pong, none, 2 frozen": lambda: ours(f"{ATARI_OURS} --ssl none --freeze-layers 2", args.steps),
        "pong, pisco, 2 frozen": lambda: ours(f"{ATARI_OURS} --ssl pisco --freeze-layers 2", args.steps),
    }
    ratios = [
        ("jump, none, 2 frozen", "jump, pisco, 2 frozen", "cost of pisco, same freezing"),
        ("jump, none, 0 frozen", "jump, pisco, 2 frozen", "cost of pisco and freezing"),
        ("pong, none, 2 frozen", "pong, pisco, 2 frozen", "cost of pisco, same freezing"),
        ("pong, none, 0 frozen", "pong, pisco, 2 frozen", "cost of pisco and freezing"),
        ("pong, none, 0 frozen, bf16", "pong, none, 0 frozen", "speed-up by bf16"),
    ]
    if args.peer:
        measured["pong, peer"] = lambda: peer(args.peer, ATARI, args.steps)
        for name in ("pong, none, 0 frozen", "pong, none, 0 frozen, bf16"):
            ratios.append((name, "pong, peer", "speed-up over the peer"))
    samples = take_samples({name: (function, "steps/s") for name, function in measured.items()}, args.repeats)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    write_report(samples, dict.fromkeys(samples, "steps/s"), ratios, machine, args.output)


if __name__ == "__main__":
    main()
