"""Play the trained policies of a suite of Jump under noise, and keep the shares of tasks that they solve.

    python benchmark/noise.py jump-unseen               # the runs whose networks are on this machine
    python benchmark/noise.py jump-unseen --std 16

Every pixel gets Gaussian noise before the greedy policy sees it. It plays all tasks of its run's evaluations, `--draws`
times. A row a run is kept in benchmark/results/SUITE/noise.csv, and one that is there is not played again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from run import RESULTS, WORK, Run, append, read_runs, read_table  # noqa: E402
from suites import weights_folder  # noqa: E402

import ppo_pisco  # noqa: E402


@dataclass
class Args:
    suite: tyro.conf.Positional[str]
    """a suite of benchmark/suites.py whose runs run.py has finished here"""
    std: float = 64.0
    """standard deviation of the noise, in grey levels of 255"""
    draws: int = 5
    """how often every task is played"""


def success_under_noise(folder, std, draws):
    """Shares of the trained and of the unseen tasks that the policy of a run's networks solves, means over the draws;
    the same every time. None of the unseen ones where no other task is played."""
    args = ppo_pisco.Args(**json.loads((folder / "args.json").read_text()))
    trained, tasks = ppo_pisco.jump_tasks(args)
    envs = ppo_pisco.ImageEnvs(args, len(tasks), evaluation=True)
    agent = ppo_pisco.Agent(args, ppo_pisco.Encoder(args, envs.obs_shape), envs.num_actions)
    agent.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    torch.manual_seed(args.seed)

    def noisy(obs):
        return agent(ppo_pisco.random_noise(obs, std))

    played = [ppo_pisco.play_episodes(noisy, envs, args, torch.device("cpu"), greedy=True) for _ in range(draws)]
    solved = np.array([[episode["success"] == 1.0 for episode in episodes] for episodes in played])  # (draws, tasks)
    parts = solved[:, : len(trained)], solved[:, len(trained) :]
    return [float(part.mean()) if part.size else None for part in parts]


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    path = RESULTS / args.suite / "noise.csv"
    known = {(row["method"], int(row["seed"]), float(row["std"]), int(row["draws"])) for row in read_table(path)}
    runs = [Run(args.suite, *key) for key in read_runs(RESULTS / args.suite)]
    left = [run for run in runs if (run.method, run.seed, args.std, args.draws) not in known]
    folders = {run: weights_folder(WORK, run.flags) for run in left}
    here = {run: folder for run, folder in folders.items() if (folder / "model.safetensors").exists()}
    print(f"{args.suite}: {len(runs)} runs, {len(runs) - len(folders)} played, networks of {len(here)} others are here")
    for run, folder in tqdm(here.items(), unit="run"):
        trained, unseen = success_under_noise(folder, args.std, args.draws)
        row = {"method": run.method, "seed": run.seed, "std": args.std, "draws": args.draws}
        append(path, [row | {"greedy_success": trained, "greedy_unseen_success": unseen}])


if __name__ == "__main__":
    main()
