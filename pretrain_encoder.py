"""Pretrain an encoder on a source task and write the weights file that the algorithms load with --encoder-weights.

    python pretrain_encoder.py                                              # MSR Jump's source tasks, a few minutes
    python pretrain_encoder.py --env-id Pong-v5 --reward-scale 1            # further flags go to ppo_pisco.py
    python pretrain_encoder.py --resume runs/Jump-v0__pretrain__1__1700000000   # go on with a killed run

Reinforcement learning on the source tasks, as in Arnold and Sha, arXiv 2302.06009: ppo_pisco.py is run as a program
from random weights, without a self-supervised loss and without frozen layers; its policy and value heads are discarded.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import tyro

PPO = Path(__file__).resolve().with_name("ppo_pisco.py")
ENCODERS = Path(__file__).resolve().with_name("encoders")


class UsageError(Exception):
    """What the user asked for can't be done; the message is one line that names the flag or file and the remedy."""


@dataclass
class Args:
    output: str | None = None
    """weights file to write (default: encoders/<env>__<encoder>__rl.safetensors, the file that the algorithms load)"""
    env_id: str = "Jump-v0"
    """source environment: Jump-v0, an EnvPool id or a Gymnasium id"""
    jump_tasks: str = "source"
    """Jump-v0: the source tasks, a set's name or a list of obstacle:floor"""
    encoder: str = "nature"
    """architecture: nature or impala"""
    total_timesteps: int = 300_000
    """environment steps"""
    seed: int = 1
    """seed of the run"""
    runs_dir: str = "runs"
    """folder in which the training's run folder is made"""
    resume: str | None = None
    """run folder of a killed pretraining to go on with"""
    force: bool = False
    """replace the output file if there is one"""


def write_atomically(path, write):
    """Calls write(file) on a temporary file beside `path` and moves it there once it is on the disk whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_flags(argv, **options):
    """The command line as Args. What tyro complains of in a box becomes one line: a UsageError."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(Args, args=argv, description=__doc__, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UsageError(re.sub("[\u2500-\u257f]", " ", stderr.getvalue())) from None


def train(args, further):
    """Runs ppo_pisco.py on the source tasks, `further` flags added. Returns its exit code and its run folder."""
    if args.resume:
        command, pattern = ["--resume", args.resume], None
    else:
        name = f"pretrain-{os.getpid()}"  # a name of its own, to find the run folder again
        command = ["--exp-name", name, "--encoder-weights", "none", "--freeze-layers", "0", "--ssl", "none"]
        command += ["--anneal-lr", "--ent-coef", "0.003"]  # there is time to settle on a nearly deterministic policy
        for flag in ("env_id", "jump_tasks", "encoder", "total_timesteps", "seed", "runs_dir"):
            command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
        pattern = f"*__{name}__{args.seed}__*"
    process = subprocess.Popen([sys.executable, str(PPO), *command, *further])
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # Ctrl-C reaches the training too: it ends by itself
            continue
    folders = sorted(Path(args.runs_dir).glob(pattern), key=os.path.getmtime) if pattern else [Path(args.resume)]
    return code, folders[-1] if folders else None


def default_output(metadata):
    """Where the algorithms look for the encoder of an environment and architecture."""
    slug = metadata["environment"].replace("/", "-").lower()
    return ENCODERS / f"{slug}__{metadata['architecture']}__rl.safetensors"


def export(folder, output, force):
    """Writes the run's encoder to `output`, its score on the source tasks in the metadata. Returns path and score.

    Raises UsageError where the file exists and OSError where it can't be written.
    """
    with safetensors.safe_open(folder / "encoder.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    score = json.loads((folder / "evaluation.json").read_text())["metrics"]
    metadata |= {"objective": "rl", "score": json.dumps(score)}
    path = Path(output) if output else default_output(metadata)
    check_output(path, force)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(safetensors.torch.save(tensors, metadata)))
    return path, score


def check_output(path, force):
    """Raises UsageError where writing `path` would replace a file unasked."""
    if path.exists() and not force:
        raise UsageError(f"--output {path}: exists; add --force to replace it or name another file")


def main(argv=None):
    """Runs the command line `argv`. Returns the exit code: 0, 2 for bad input or 130 after Ctrl-C."""
    try:
        args, further = parse_flags(argv, return_unknown_args=True)
        if args.output or not args.resume:  # before the training, not after it
            known = {"environment": args.env_id, "architecture": args.encoder}
            check_output(Path(args.output) if args.output else default_output(known), args.force)
        code, folder = train(args, further)
        if code:
            if code == 130 and folder:
                print(f"pretrain_encoder.py: go on with: python pretrain_encoder.py --resume {folder}", file=sys.stderr)
            return code
        path, score = export(folder, args.output, args.force)
    except (UsageError, OSError) as error:
        print(f"pretrain_encoder.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("source tasks:", ", ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in score.items()))
    print(f"wrote {path}; use it with: python ppo_pisco.py --encoder-weights {path} --freeze-layers 2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
