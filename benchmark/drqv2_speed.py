"""Measure the speed of drqv2_pisco.py and print ratios from one run: updates, a peer's update, rendering.

    python benchmark/drqv2_speed.py                   # seconds per update, frames rendered per second
    python benchmark/drqv2_speed.py --peer ../drqv2   # beside the official agent, from your copy of it
    python benchmark/drqv2_speed.py --repeats 5 --output benchmark/results/drqv2_speed.csv

What is compared takes turns, so that a busy machine slows all alike; each number is the median of the
repeats, each ratio the median of the repeats' ratios.
Updates are measured on random images, rendering on random actions. The peer's own modules hydra and omegaconf, which
its update does not use, need not be installed.
"""

import multiprocessing
import os
import platform
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
from stats import take_samples, write_report  # noqa: E402

import drqv2_pisco  # noqa: E402

NUM_ACTIONS = 6  # as in walker


@dataclass
class Args:
    repeats: int = 3
    """times that everything is measured; the median counts"""
    updates: int = 1
    """updates per measurement"""
    batch_size: int = 256
    """transitions per update"""
    threads: int = 0
    """CPU threads of PyTorch (0: its own choice)"""
    frames: int = 200
    """frames rendered per measurement"""
    cuda: bool = True
    """use a CUDA device where there is one"""
    compile: bool = False
    """compile our losses with torch.compile"""
    peer: str | None = None
    """folder with the official repository, facebookresearch/drqv2"""
    output: str | None = None
    """CSV file for the table"""


def random_batch(batch_size, device):
    """obs, actions, rewards, discounts and next obs as Replay.sample gives them."""
    obs, next_obs = torch.randint(0, 256, (2, batch_size, 9, 84, 84), dtype=torch.uint8, device=device)
    actions = torch.rand(batch_size, NUM_ACTIONS, device=device) * 2 - 1
    rewards = torch.rand(batch_size, 1, device=device)
    return obs, actions, rewards, torch.full_like(rewards, 0.97), next_obs


def timed(function, times, device):
    """Seconds per call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def our_update(args, device, ssl, frozen, bf16=False):
    """A function that does one update with the defaults of drqv2_pisco.py."""
    settings = drqv2_pisco.Args(ssl=ssl, batch_size=args.batch_size, bf16=bf16, compile=args.compile)
    encoder = drqv2_pisco.Encoder(settings, (9, 84, 84))
    encoder.freeze(frozen)
    agent = drqv2_pisco.Agent(settings, encoder, NUM_ACTIONS)
    agent.to(device, memory_format=torch.channels_last)
    optimizers = drqv2_pisco.make_optimizers(agent, settings.learning_rate)
    batch = random_batch(args.batch_size, device)
    return lambda: drqv2_pisco.update(agent, *optimizers, batch, 0.5, settings)


def peer_process(connection, args, device):
    """Measures the official agent's update whenever it is asked to. A process of its own: our settings of the memory
    allocator would speed up the peer too."""
    if args.threads:
        torch.set_num_threads(args.threads)
    update = peer_update(args, device)
    while connection.recv():
        connection.send(timed(update, args.updates, device))


def peer_update(args, device):
    """A function that does one update of the official agent with its defaults."""
    for name in ("hydra", "omegaconf"):
        sys.modules.setdefault(name, types.SimpleNamespace(OmegaConf=None))
    sys.path.insert(0, args.peer)
    import drqv2

    agent = drqv2.DrQV2Agent(
        obs_shape=(9, 84, 84), action_shape=(NUM_ACTIONS,), device=device, lr=1e-4, feature_dim=50, hidden_dim=1024,
        critic_target_tau=0.01, num_expl_steps=2000, update_every_steps=2, stddev_schedule="linear(1.0,0.1,100000)",
        stddev_clip=0.3, use_tb=True,
    )  # fmt: skip
    batch = random_batch(args.batch_size, device)
    return lambda: agent.update(iter([batch]), 50_000)


def rendered_per_second(env_id, quality, frames):
    """Frames of 84x84 pixels per second, physics included."""
    env = drqv2_pisco.DMCPixels(env_id, 84, 1, quality)
    env.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (frames, *env.action_space.shape))
    began = time.perf_counter()
    for action in actions:
        env.step(action)
    seconds = time.perf_counter() - began
    env.close()
    return frames / seconds


def main():
    args = tyro.cli(Args, description=__doc__)
    device = drqv2_pisco.set_up(drqv2_pisco.Args(torch_threads=args.threads, cuda=args.cuda))
    cases = [("none", 0), ("pisco", 0), ("none", 2), ("pisco", 2)]
    updates = {f"update, {ssl}, {frozen} frozen": our_update(args, device, ssl, frozen) for ssl, frozen in cases}
    updates["update, none, 0 frozen, bf16"] = our_update(args, device, "none", 0, bf16=True)
    ratios = [
        ("update, pisco, 0 frozen", "update, none, 0 frozen", "cost of pisco"),
        ("update, pisco, 2 frozen", "update, none, 2 frozen", "cost of pisco, same freezing"),
        ("update, pisco, 2 frozen", "update, none, 0 frozen", "cost of pisco and freezing"),
        ("update, none, 0 frozen", "update, none, 0 frozen, bf16", "speed-up by bf16"),
    ]
    if args.peer:
        connection, other_end = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        context.Process(target=peer_process, args=(other_end, args, device), daemon=True).start()
        ratios.append(("update, none, 0 frozen", "update, official agent", "time beside the official agent's"))
    measured = {name: (lambda f=f: timed(f, args.updates, device), "s") for name, f in updates.items()}
    if args.peer:
        measured["update, official agent"] = (lambda: (connection.send(True), connection.recv())[1], "s")
    for env_id in ("cartpole-swingup", "walker-walk"):
        for quality in ("standard", "fast"):
            name = f"{env_id}, {quality}"
            measured[name] = (lambda e=env_id, q=quality: rendered_per_second(e, q, args.frames), "frames/s")
        ratios.append((f"{env_id}, fast", f"{env_id}, standard", "speed-up of rendering"))
    for function, unit in list(measured.values()):  # warms up
        if unit == "s":
            function()
    samples = take_samples(measured, args.repeats)
    if args.peer:
        connection.send(False)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    machine += f", {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    write_report(samples, {name: unit for name, (_, unit) in measured.items()}, ratios, machine, args.output)


if __name__ == "__main__":
    main()
