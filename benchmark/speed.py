"""Measure the speed of ppo_pisco.py and print ratios from one run: environment, losses, and a peer's program.

    python benchmark/speed.py                                   # Jump's steps/s; what freezing and PiSCO cost and save
    python benchmark/speed.py --before ../old/ppo_pisco.py      # every row of an older file beside it
    python benchmark/speed.py --peer "python ppo_atari_envpool.py"   # beside CleanRL's program, from your copy of it
    python benchmark/speed.py --repeats 5 --output benchmark/results/speed.csv
    python benchmark/speed.py --cases "*resnet18*" --output benchmark/results/timm_speed.csv

The programs take turns, so that a busy machine slows all of them alike; each number is the median of the
repeats, each ratio the median of the repeats' ratios.
The peer must take CleanRL's flags and print lines `SPS: n`; its environment may be another one than ours. MiniWorld
needs the README's system packages.
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
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from stats import take_samples, write_report  # noqa: E402

import ppo_pisco  # noqa: E402

# CleanRL's own defaults for Atari: both programs get them.
ATARI = (
    "--env-id Pong-v5 --num-envs 8 --num-steps 128 --num-minibatches 4 --update-epochs 4 --learning-rate 2.5e-4 "
    "--clip-coef 0.1 --ent-coef 0.01"
)
ATARI_OURS = f"{ATARI} --feature-dim 512 --reward-scale 1 --encoder-weights none"


@dataclass
class Args:
    repeats: int = 3
    """times that every program runs; the median counts"""
    steps: int = 4096
    """environment steps per Pong run; Jump runs take eight times as many, impala's and ResNet-18's a half"""
    before: str | None = None
    """an older ppo_pisco.py, to print what has become of its speed"""
    peer: str | None = None
    """command of a peer such as CleanRL's ppo_atari_envpool.py"""
    cases: str = "*"
    """only the programs whose names match; `*` stands for anything"""
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


def ours(flags, steps, memory, name, file=ROOT / "ppo_pisco.py"):
    """SPS of ppo_pisco.py over all iterations but the first, which warms up; without the evaluation. Leaves the peak
    memory of the process in memory[name], in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(file), *flags.split(), "--runs-dir", folder]
        command += ["--total-timesteps", str(steps), "--eval-interval", "0"]
        command += ["--eval-episodes", "0" if file == ROOT / "ppo_pisco.py" else "1"]  # older files can't do without
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, command
        memory[name] = usage.ru_maxrss / 1024
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


FROZEN = "--freeze-random --freeze-layers"
JUMP, IMPALA = "--encoder-weights none", f"{ATARI_OURS} --encoder impala"
WORLD = "--env-id miniworld:MiniWorld-FourRooms-v0"
RESNET = f"{ATARI_OURS} --encoder timm:resnet18"
CASES = {  # name: flags, share of --steps
    "jump, none, 0 frozen": (f"{JUMP} --ssl none", 8),
    "jump, none, 2 frozen": (f"{JUMP} --ssl none {FROZEN} 2", 8),
    "jump, none, all frozen": (f"{JUMP} --ssl none {FROZEN} all", 8),
    "jump, pisco, 2 frozen": (f"{JUMP} --ssl pisco --ssl-fraction 1 {FROZEN} 2", 8),
    "jump, pisco on half, 2 frozen": (f"{JUMP} --ssl pisco --ssl-fraction 0.5 {FROZEN} 2", 8),
    "pong, none, 0 frozen": (f"{ATARI_OURS} --ssl none", 1),
    "pong, none, 0 frozen, bf16": (f"{ATARI_OURS} --ssl none --bf16", 1),
    "pong, none, 2 frozen": (f"{ATARI_OURS} --ssl none {FROZEN} 2", 1),
    "pong, pisco, 2 frozen": (f"{ATARI_OURS} --ssl pisco --ssl-fraction 1 {FROZEN} 2", 1),
    "pong, pisco on half, 2 frozen": (f"{ATARI_OURS} --ssl pisco --ssl-fraction 0.5 {FROZEN} 2", 1),
    "pong, impala, none, 0 frozen": (f"{IMPALA} --ssl none", 0.5),
    "pong, impala, none, 6 frozen": (f"{IMPALA} --ssl none {FROZEN} 6", 0.5),
    "pong, impala, pisco, 6 frozen": (f"{IMPALA} --ssl pisco --ssl-fraction 1 {FROZEN} 6", 0.5),
    "pong, impala, pisco on half, 6 frozen": (f"{IMPALA} --ssl pisco --ssl-fraction 0.5 {FROZEN} 6", 0.5),
    **{  # 4: all but the last stage
        f"pong, resnet18, {loss}, {k} frozen": (f"{RESNET} --ssl {loss} {FROZEN} {k}", 0.5)
        for loss in ("none", "pisco")
        for k in (0, 4, "all")
    },
    **{f"miniworld, {way}": (f"{WORLD} --ssl none --vectorization {way}", 1) for way in ("sync", "async")},
}
RATIOS = [  # the first one's steps per second over the second one's
    ("jump, none, 0 frozen", "jump, none, 2 frozen", "cost of freezing"),
    ("pong, none, 0 frozen", "pong, none, 2 frozen", "cost of freezing"),
    ("pong, impala, none, 0 frozen", "pong, impala, none, 6 frozen", "cost of freezing"),
    *(
        (f"{game}, none, {k} frozen", f"{game}, {loss}, {frozen} frozen", f"cost of pisco{meaning}")
        for game, frozen in (("jump", 2), ("pong", 2), ("pong, impala", 6))
        for loss in ("pisco", "pisco on half")
        for k, meaning in ((frozen, ", same freezing"), (0, " and freezing"))
    ),
    *(
        ("pong, resnet18, none, 0 frozen", f"pong, resnet18, {case} frozen", "time, over all finetuned without loss")
        for case in ("none, 4", "none, all", "pisco, 0", "pisco, 4", "pisco, all")
    ),
    ("pong, none, 0 frozen, bf16", "pong, none, 0 frozen", "speed-up by bf16"),
    ("miniworld, async", "miniworld, sync", "speed-up by a process for every copy"),
]


def main():
    args = tyro.cli(Args, description=__doc__)
    measured, memory, ratios = {"jump environment": jump_steps_per_second}, {}, list(RATIOS)
    for name, (flags, share) in CASES.items():
        steps = int(share * args.steps)
        measured[name] = lambda f=flags, s=steps, n=name: ours(f, s, memory, n)
        if args.before:
            old = f"{name}, before"
            measured[old] = lambda f=flags, s=steps, n=old: ours(f, s, memory, n, args.before)
            ratios.append((name, old, "speed-up over before"))
    if args.peer:
        measured["pong, peer"] = lambda: peer(args.peer, ATARI, args.steps)
        for name in ("pong, none, 0 frozen", "pong, none, 0 frozen, bf16"):
            ratios.append((name, "pong, peer", "speed-up over the peer"))
    if not (measured := {name: function for name, function in measured.items() if fnmatch(name, args.cases)}):
        raise SystemExit(f"--cases {args.cases}: no such name; give one of {', '.join(CASES)}, or a part of it and *")
    ratios = [ratio for ratio in ratios if {*ratio[:2]} <= measured.keys()]
    samples = take_samples({name: (function, "steps/s") for name, function in measured.items()}, args.repeats)
    units = dict.fromkeys(samples, "steps/s")
    for name, size in memory.items():
        samples[f"{name}: peak memory"], units[f"{name}: peak memory"] = [size] * args.repeats, "MiB"
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    write_report(samples, units, ratios, machine, args.output)


if __name__ == "__main__":
    main()
