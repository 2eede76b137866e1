"""How robust are a run's features on MSR Jump, and how easy are they to learn from?

    python benchmark/jump_noise.py --freeze-layers 2 --ssl none --seed 1

Takes the flags of a run of `ppo_pisco.py` that benchmark/run.py has made on this machine. Then

- it trains a fresh head of one hidden layer on the encoder's final features, all of its layers frozen, without any
  self-supervised loss: the learning curve tells how easy they are to learn from. Head and learning rate are those that
  a frozen encoder does best with (jump-rates);
- it plays the run's tasks greedily while every pixel gets Gaussian noise, of growing standard deviation: with the fresh
  head, the same for all encoders, and with the run's own policy.

Leaves the head's run folder, with the noise's results in its evaluation.json under "noise".
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from suites import weights_folder  # noqa: E402

import ppo_pisco  # noqa: E402

WORK = ROOT / "benchmark" / "runs"
STDS = (0, 2, 4, 8, 16, 32, 64)  # grey levels of 255
DRAWS = 5  # of the noise, for every standard deviation
HEAD = (
    "--freeze-layers all --ssl none --head-layers 1 --learning-rate 3e-3 --total-timesteps 51200 --eval-interval 5120 "
    "--no-eval-grid"
).split()


def run_ppo(flags):
    """Runs ppo_pisco.py. Raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, str(ROOT / "ppo_pisco.py"), *flags], check=True)


def trained_folder(flags):
    """The folder with the networks of `ppo_pisco.py FLAGS`. Raises SystemExit where this machine has not made them."""
    kept = weights_folder(WORK, ["ppo_pisco.py", *flags])
    if not (kept / "args.json").exists():
        raise SystemExit(f"no networks of ppo_pisco.py {' '.join(flags)} here: run their suite with benchmark/run.py")
    return kept


def load_policy(folder):
    """The arguments of a run of ppo_pisco.py on MSR Jump, and its encoder, policy head and value head."""
    args = ppo_pisco.Args(**json.loads((folder / "args.json").read_text()) | {"ssl": "none"})
    obs_shape = (1, 60, 60)
    agent = ppo_pisco.Agent(args, ppo_pisco.Encoder(args, obs_shape), obs_shape, 2)
    agent.to(memory_format=torch.channels_last)
    tensors = ppo_pisco.safetensors.torch.load_file(folder / "model.safetensors")
    agent.load_state_dict({name: tensor for name, tensor in tensors.items() if name in agent.state_dict()})
    return args, agent


@torch.no_grad()
def noise_table(folder):
    """{standard deviation: share of the run's own tasks that the greedy policy in `folder` solves}."""
    args, agent = load_policy(folder)
    tasks = ppo_pisco.parse_jump_tasks(args.jump_tasks)
    envs = ppo_pisco.ImageEnvs(args, len(tasks), evaluation=True)
    torch.manual_seed(0)  # the same noise for every method and seed
    table = {}
    for std in STDS:
        noisy = lambda obs: agent(ppo_pisco.random_noise(obs, std))  # noqa: B023, E731
        draws = range(DRAWS if std else 1)
        played = [ppo_pisco.play_episodes(noisy, envs, args, torch.device("cpu"), greedy=True) for _ in draws]
        table[std] = float(np.mean([episode["success"] for episodes in played for episode in episodes]))
    return table


def main(argv=None):
    """Runs the command line `argv`. Returns the exit code, ppo_pisco.py's where that fails."""
    argv = list(sys.argv[1:] if argv is None else argv)
    runs_dir = Path(argv[argv.index("--runs-dir") + 1] if "--runs-dir" in argv else "runs")
    try:
        if "--resume" in argv:
            folder = Path(argv[argv.index("--resume") + 1])
            networks = Path(json.loads((folder / "args.json").read_text())["encoder_weights"]).parent
            run_ppo(argv)
        else:
            networks = trained_folder([word for word in argv if word not in ("--runs-dir", str(runs_dir))])
            args = json.loads((networks / "args.json").read_text())
            encoder = ["--encoder-weights", str(networks / "encoder.safetensors"), "--exp-name", "head"]
            same = ["--jump-tasks", args["jump_tasks"], "--seed", str(args["seed"]), "--runs-dir", str(runs_dir)]
            run_ppo([*encoder, *HEAD, *same])
            folder = max(runs_dir.glob("*__head__*/args.json"), key=lambda path: path.stat().st_mtime).parent
    except subprocess.CalledProcessError as error:
        return error.returncode
    path = folder / "evaluation.json"
    results = json.loads(path.read_text())
    results["noise"] = {"fresh head": noise_table(folder), "trained": noise_table(networks)}
    ppo_pisco.write_atomically(path, json.dumps(results, indent=1).encode())
    print(f"share of tasks solved at every standard deviation: {results['noise']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
