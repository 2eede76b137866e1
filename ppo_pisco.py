"""PPO with PiSCO: finetune a pretrained encoder on a new visual task, bottom layers frozen (discrete actions).

    python ppo_pisco.py --freeze-layers 2                                   # MSR Jump, shipped encoder, a few minutes
    python ppo_pisco.py --encoder-weights none --ssl none                   # the same task from scratch
    python ppo_pisco.py --resume runs/Jump-v0__ppo_pisco__1__1700000000     # go on with a killed run
    tensorboard --logdir runs

PiSCO is the self-supervised loss of S. M. R. Arnold and F. Sha, "Policy-Induced Self-Supervision Improves
Representation Finetuning in Visual RL", arXiv 2302.06009: two augmented views of a state must induce the same policy.
The file reads top to bottom: arguments, environments, networks, losses, rollout and update, checkpoints, evaluation,
main. It needs no other file of this repository but the encoder weights, a `.safetensors` file.
"""

import contextlib
import csv
import ctypes
import difflib
import importlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin

import gymnasium as gym
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector import AutoresetMode, VectorEnv
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class UsageError(Exception):
    """What the user asked for can't be done; the message is one line that names the flag or file and the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    # Experiment
    exp_name: str = Path(__file__).stem
    """the name of this experiment, part of the run folder's name"""
    seed: int = 1
    """seed of the environments, the initial weights, the minibatches and the augmentation"""
    runs_dir: str = "runs"
    """folder in which the run folder is made"""
    resume: str | None = None
    """run folder of a killed run to go on with; every other argument comes from that run"""
    cuda: bool = True
    """use a CUDA device where there is one"""
    torch_deterministic: bool = True
    """ask cuDNN for deterministic algorithms"""
    torch_threads: int = 0
    """CPU threads of PyTorch (0: PyTorch's own choice, one per physical core)"""
    compile: bool = False
    """compile the update with torch.compile; worth its start-up time on a GPU"""
    bf16: bool = False
    """compute the encoder in bfloat16; worth it on a GPU and on a CPU with AMX, other CPUs become slower"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "pisco"
    """the Weights & Biases project"""
    wandb_entity: str | None = None
    """the Weights & Biases team"""
    capture_video: bool = False
    """write a GIF of greedy episodes at every evaluation"""
    checkpoint_interval: int = 10
    """iterations between two checkpoints"""
    eval_interval: int = 10_240
    """environment steps between two evaluations; there is always one at the end (0: only that one)"""
    eval_episodes: int = 10
    """episodes per evaluation and policy (greedy, sampled); Jump-v0 plays every task once instead"""

    # Environment
    env_id: str = "Jump-v0"
    """Jump-v0, an EnvPool id (Pong-v5) or a Gymnasium id; observations must be images and actions discrete"""
    jump_tasks: str = "target"
    """Jump-v0: source, target, wide, narrow, random, grid, or a list of obstacle:floor such as 20:10,30:20"""
    jump_reward: float = 1.0
    """Jump-v0: bonus for reaching the right edge (the reference task pays 100)"""
    jump_prior: float = 0.1
    """Jump-v0: the untrained policy's probability of jumping (0.5: the usual uniform start)"""
    reward_scale: float = 0.1
    """factor on the training reward; logged returns are unscaled"""

    # Encoder
    encoder: Literal["nature", "impala"] = "nature"
    """architecture of the encoder"""
    feature_dim: int = 256
    """size of the encoder's output z"""
    encoder_weights: str = "shipped"
    """a .safetensors file, `shipped` (the file of encoders/ for this environment, if any) or `none` (random weights)"""
    freeze_layers: int | Literal["all"] = 0
    """how many of the encoder's layers stay frozen, from the bottom (0: finetune everything)"""
    freeze_random: bool = False
    """allow freezing layers of an encoder with random weights"""

    # PiSCO and its alternatives
    ssl: Literal["pisco", "simsiam", "curl", "consistency", "none"] = "pisco"
    """self-supervised loss on two augmented views"""
    ssl_coef: float = 0.1
    """weight lambda of the self-supervised loss"""
    ssl_fraction: float = 0.5
    """share of every minibatch on which the self-supervised loss is computed"""
    augmentation: Literal["shift", "noise"] = "shift"
    """random augmentation A that makes the views"""
    shift_pixels: int = 4
    """largest shift in pixels, in each direction"""
    projector_dim: int = 256
    """hidden width of the projector h (pisco, simsiam)"""
    curl_tau: float = 0.05
    """curl: step of the key encoder's moving average, once per update"""

    # PPO
    total_timesteps: int = 102_400
    """environment steps of the whole run"""
    learning_rate: float = 1e-3
    """learning rate of Adam"""
    num_envs: int = 32
    """parallel copies of the environment"""
    num_steps: int = 64
    """steps per copy in each rollout"""
    anneal_lr: bool = False
    """anneal the learning rate linearly to zero"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimation"""
    num_minibatches: int = 8
    """minibatches per epoch"""
    update_epochs: int = 3
    """epochs per rollout"""
    norm_adv: bool = True
    """normalise advantages in each minibatch"""
    clip_coef: float = 0.2
    """clipping of the policy ratio and, with --clip-vloss, of the value"""
    clip_vloss: bool = True
    """clip the value loss"""
    ent_coef: float = 0.01
    """coefficient of the entropy bonus"""
    vf_coef: float = 0.5
    """coefficient of the value loss"""
    max_grad_norm: float = 0.5
    """largest gradient norm of the trained parameters"""
    target_kl: float | None = None
    """end an iteration's epochs once the approximate KL exceeds this"""


# ---------------------------------------------------------------------------------------------------------------------
# Environments: MSR Jump here, everything else from EnvPool or Gymnasium
# ---------------------------------------------------------------------------------------------------------------------
JUMP_GRID = [(x, y) for x in range(20, 46) for y in range(10, 21)]  # 286 tasks (obstacle, floor) of Agarwal et al. 2021
# Source and target swap the floors. Both lie on a lattice of 8 pixels in x and y, the stride of nature's two bottom
# layers together: what these layers see of a target task is what they saw of a source task, at another place.
JUMP_TASK_SETS = {
    "source": [(x, 10) for x in (20, 28, 36, 44)] + [(x, 18) for x in (24, 32, 40)],
    "target": [(x, 18) for x in (20, 28, 36, 44)] + [(x, 10) for x in (24, 32, 40)],
    "wide": [(x, y) for x in range(20, 46, 5) for y in (10, 15, 20)],
    "narrow": [(x, y) for x in range(28, 39, 2) for y in (13, 15, 17)],
    "random": [JUMP_GRID[i] for i in np.random.RandomState(0).choice(286, 18, replace=False)],  # always the same 18
    "grid": JUMP_GRID,
}
JUMP_OBSTACLES, JUMP_FLOORS = range(14, 48), range(41)  # valid positions


def parse_jump_tasks(text):
    """Task list [(obstacle x, floor height), ...] in pixels from a set's name or `20:10,30:20`. Raises UsageError."""
    if text in JUMP_TASK_SETS:
        return JUMP_TASK_SETS[text]
    if not re.fullmatch(r"\d{1,9}:\d{1,9}(,\d{1,9}:\d{1,9})*", text):
        raise UsageError(f"--jump-tasks {text!r}: give {', '.join(JUMP_TASK_SETS)} or a list such as 20:10,30:20")
    tasks = [tuple(int(number) for number in pair.split(":")) for pair in text.split(",")]
    for obstacle, floor in tasks:
        if obstacle not in JUMP_OBSTACLES or floor not in JUMP_FLOORS:
            raise UsageError(f"--jump-tasks {obstacle}:{floor}: the obstacle must lie in 14..47 and the floor in 0..40")
    return list(dict.fromkeys(tasks))


def evaluation_tasks(args):
    """Jump's evaluation: the run's own tasks and the whole grid, each task once."""
    return list(dict.fromkeys(parse_jump_tasks(args.jump_tasks) + JUMP_GRID))


class JumpVectorEnv(VectorEnv):
    """N copies of MSR Jump (Tachet des Combes et al. 2018), vectorised in NumPy.

    Observations (N, 1, 60, 60) uint8, row index = height above the screen's bottom; actions 0 right, 1 jump; reward +1
    per pixel moved, -1 on a collision instead, `exit_bonus` on top at the right edge. Each copy draws its task from
    `tasks` at every reset, or plays the one named by `reset(options={"task_ids": (N,) ints})`. A done copy is reset by
    the next step, which ignores its action (AutoresetMode.NEXT_STEP). The reference's limit of 600 steps can't be
    reached: every step moves the agent one pixel, so an episode ends within 56.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}
    SIZE, AGENT_W, AGENT_H, OBSTACLE_W, OBSTACLE_H, JUMP_HEIGHT = 60, 5, 10, 9, 10, 15  # pixels
    WHITE, GREY = 255, 128  # 1.0 and 0.5 of the reference

    def __init__(self, num_envs, tasks=JUMP_GRID, exit_bonus=100.0):
        self.num_envs, self.tasks, self.exit_bonus = num_envs, list(tasks), exit_bonus
        self.single_observation_space = gym.spaces.Box(0, 255, (1, self.SIZE, self.SIZE), np.uint8)
        self.single_action_space = gym.spaces.Discrete(2)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.task_obstacle, self.task_floor = np.array(self.tasks, dtype=np.int64).T.copy()  # (tasks,) int64 each
        self.backgrounds = np.stack([self._background(*task) for task in self.tasks])  # (tasks, 60, 60) uint8
        rows, cols = np.divmod(np.arange(self.AGENT_H * self.AGENT_W), self.AGENT_W)
        self.agent_rows, self.agent_cols = rows[None], cols[None]  # (1, 50) int64
        self.task_ids, self.x, self.y = (np.zeros(num_envs, dtype=np.int64) for _ in range(3))
        self.jumping, self.rising, self.done = (np.zeros(num_envs, dtype=bool) for _ in range(3))

    def _background(self, obstacle, floor):
        """Frame (60, 60) uint8 of a task without its agent: obstacle, then outline and floor over it."""
        frame = np.zeros((self.SIZE, self.SIZE), np.uint8)
        frame[floor : floor + self.OBSTACLE_H, obstacle : obstacle + self.OBSTACLE_W] = self.GREY
        frame[[0, -1, floor], :] = self.WHITE
        frame[:, [0, -1]] = self.WHITE
        return frame

    def _observe(self):
        frames = self.backgrounds[self.task_ids]  # (N, 60, 60) uint8, a fresh copy
        # The agent lies under everything else: it shows where the background is black. Pixels beyond the screen
        # fall on the outline, which is white already.
        last = self.SIZE - 1
        pixels = (
            np.arange(self.num_envs)[:, None],
            np.minimum(self.y[:, None] + self.agent_rows, last),
            np.minimum(self.x[:, None] + self.agent_cols, last),
        )
        under = frames[pixels]  # (N, 50) uint8
        frames[pixels] = np.where(under == 0, self.WHITE, under)
        return frames[:, None]

    def _restart(self, mask, task_ids):
        self.task_ids[mask] = task_ids
        self.x[mask] = 0
        self.y[mask] = self.task_floor[task_ids]
        self.jumping[mask] = self.rising[mask] = self.done[mask] = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        task_ids = (options or {}).get("task_ids")
        if task_ids is None:
            task_ids = self.np_random.integers(len(self.tasks), size=self.num_envs)
        self._restart(np.ones(self.num_envs, dtype=bool), np.asarray(task_ids, dtype=np.int64))
        return self._observe(), {}

    def step(self, actions):
        moving = ~self.done
        floor, obstacle = self.task_floor[self.task_ids], self.task_obstacle[self.task_ids]
        takes_off = moving & ~self.jumping & (np.asarray(actions) == 1)
        self.jumping |= takes_off
        self.rising |= takes_off
        self.rising &= self.y <= floor + self.JUMP_HEIGHT
        self.y += np.where(self.jumping & moving, np.where(self.rising, 1, -1), 0)
        self.jumping &= self.y > floor
        self.x += moving

        overlap_x = (obstacle + self.OBSTACLE_W > self.x) & (obstacle < self.x + self.AGENT_W)
        collided = moving & overlap_x & (floor + self.OBSTACLE_H > self.y)  # y >= floor: the other side always overlaps
        exited = moving & (self.x + self.AGENT_W > self.SIZE)
        rewards = np.where(collided, -1.0, moving + self.exit_bonus * exited).astype(np.float32)
        success = exited & ~collided
        if self.done.any():
            self._restart(self.done.copy(), self.np_random.integers(len(self.tasks), size=int(self.done.sum())))
        self.done = collided | exited
        return self._observe(), rewards, self.done.copy(), np.zeros(self.num_envs, dtype=bool), {"success": success}

    def get_state(self):
        """Everything that the next steps depend on, as plain lists and a JSON string."""
        names = ("task_ids", "x", "y", "jumping", "rising", "done")
        state = {name: getattr(self, name).tolist() for name in names}
        return state | {"rng": json.dumps(self.np_random.bit_generator.state)}

    def set_state(self, state):
        """Restores get_state's result and returns the observation (N, 1, 60, 60) uint8 that belongs to it."""
        self.np_random.bit_generator.state = json.loads(state["rng"])
        for name in ("task_ids", "x", "y", "jumping", "rising", "done"):
            getattr(self, name)[:] = state[name]
        return self._observe()


class ImageEnvs:
    """One face for the three sources of vector environments: images (N, C, H, W) uint8 and true episode statistics.

    All of them reset a finished copy on the step after its end (AutoresetMode.NEXT_STEP). So the observation that
    comes with `terminated` or `truncated` is the episode's real last one, and the step after it is no transition.
    """

    def __init__(self, args, num_envs, seed, training=True):
        self.num_envs, self.episodes = num_envs, []
        self.source = env_source(args.env_id)
        self.envs = {"jump": make_jump, "envpool": make_envpool, "gymnasium": make_gymnasium}[self.source](
            args, num_envs, seed, training
        )
        self.seed = None if self.source == "envpool" else seed  # EnvPool takes its seed when it is made
        if self.source == "envpool":  # whose spaces are those of one copy
            space, actions = self.envs.observation_space, self.envs.action_space
        else:
            space, actions = self.envs.single_observation_space, self.envs.single_action_space
        shape = getattr(space, "shape", None) or ()
        if space.dtype != np.uint8 or len(shape) not in (2, 3):
            raise UsageError(f"--env-id {args.env_id}: observations must be uint8 images, these are {space}")
        if not isinstance(actions, gym.spaces.Discrete):
            raise UsageError(f"--env-id {args.env_id}: actions must be Discrete, these are {actions}")
        self.channels_last = len(shape) == 3 and shape[-1] < shape[0]  # an image has more rows than channels
        self.num_actions, self.first_action = int(actions.n), int(getattr(actions, "start", 0))
        self.obs_shape = self._images(np.zeros((1, *shape), np.uint8)).shape[1:]  # (C, H, W)

    def _images(self, obs):
        obs = obs[:, None] if obs.ndim == 3 else obs
        return obs.transpose(0, 3, 1, 2) if self.channels_last else obs

    def reset(self, **kwargs):
        """First observations (N, C, H, W) uint8 of fresh episodes."""
        obs, _ = self.envs.reset(**({"seed": self.seed} if self.seed is not None else {}), **kwargs)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)
        self.was_done = np.zeros(self.num_envs, dtype=bool)
        return self._images(obs)

    def step(self, actions):
        """Steps every copy with actions (N,) int64.

        Returns observations (N, C, H, W) uint8, rewards (N,) float32, terminated and truncated (N,) bool. Episodes
        that ended by this step are left in `self.episodes` as dicts of env, return (unscaled), length and success.
        """
        obs, rewards, terminated, truncated, info = self.envs.step((actions + self.first_action).astype(np.int32))
        alive = ~self.was_done  # the other rows only reset
        game = info if self.source == "envpool" else {}  # EnvPool's Atari: what clipping and lost lives hide
        self.returns += np.where(alive, game.get("reward", rewards), 0.0)
        self.lengths += alive
        over = truncated | (game["terminated"].astype(bool) if "terminated" in game else terminated)
        self.episodes = []
        for i in np.flatnonzero(over):
            length = int(game["elapsed_step"][i]) if "elapsed_step" in game else int(self.lengths[i])
            success = float(info["success"][i]) if self.source == "jump" else math.nan
            self.episodes.append(
                {"env": int(i), "return": float(self.returns[i]), "length": length, "success": success}
            )
            self.returns[i], self.lengths[i] = 0.0, 0
        self.was_done = terminated | truncated
        return self._images(obs), np.asarray(rewards, dtype=np.float32), terminated, truncated

    def get_state(self):
        """State of Jump's copies and their unfinished episodes; the other sources have none that can be saved."""
        statistics = {name: getattr(self, name).tolist() for name in ("returns", "lengths", "was_done")}
        return {"envs": self.envs.get_state(), "statistics": statistics}

    def set_state(self, state):
        """Restores get_state's result and returns the observation (N, C, H, W) uint8 that belongs to it."""
        self.reset()
        for name, values in state["statistics"].items():
            getattr(self, name)[:] = values
        return self._images(self.envs.set_state(state["envs"]))

    def close(self):
        self.envs.close()


def env_source(env_id):
    """`jump`, `envpool` or `gymnasium`: who makes this environment. Raises UsageError for an unknown id."""
    if env_id == "Jump-v0":
        return "jump"
    try:
        import envpool

        envpool_ids = envpool.list_all_envs()
    except ImportError:  # Gymnasium's environments do without it
        envpool_ids = []
    if env_id in envpool_ids:
        return "envpool"
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)  # which registers the environment
        gym.spec(name)
        return "gymnasium"
    except (ImportError, TypeError) as error:  # TypeError: a relative name
        raise UsageError(f"--env-id {env_id}: {module} can't be imported ({error}); install or correct it") from None
    except (gym.error.Error, ValueError):
        known = dict.fromkeys(["Jump-v0", *envpool_ids, *gym.registry])
        close = difflib.get_close_matches(env_id, known, n=3) or ["Jump-v0", "Pong-v5", "HealthGathering-v1"]
        raise UsageError(f"--env-id {env_id}: unknown environment; did you mean {', '.join(close)}?") from None


def make_jump(args, num_envs, seed, training):
    tasks = parse_jump_tasks(args.jump_tasks) if training else evaluation_tasks(args)
    return JumpVectorEnv(num_envs, tasks, args.jump_reward)


def make_envpool(args, num_envs, seed, training):
    import envpool

    # EnvPool presses FIRE after a lost life only if lives are episodes; ImageEnvs tells of whole games all the same.
    wanted = {"episodic_life": True, "reward_clip": training, "use_combined_action": True}
    try:
        known = envpool.make_spec(args.env_id).config._fields
        options = {key: value for key, value in wanted.items() if key in known}
        return envpool.make(args.env_id, env_type="gymnasium", num_envs=num_envs, seed=seed, **options)
    except ImportError as error:  # a missing system library: EnvPool says which
        raise UsageError(f"--env-id {args.env_id}: {' '.join(str(error).split())}") from None


def make_gymnasium(args, num_envs, seed, training):
    try:
        return gym.make_vec(
            args.env_id,
            num_envs=num_envs,
            vectorization_mode="sync",
            vector_kwargs={"autoreset_mode": AutoresetMode.NEXT_STEP},
        )
    except (gym.error.Error, ImportError) as error:  # what it needs is not installed, or too new for it
        raise UsageError(f"--env-id {args.env_id}: {' '.join(str(error).split())}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------
def layer_init(layer, std=2**0.5, bias_const=0.0):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv0 = layer_init(nn.Conv2d(channels, channels, 3, padding=1))
        self.conv1 = layer_init(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x):
        return x + self.conv1(F.relu(self.conv0(F.relu(x))))


def nature_layers(channels):
    """The three convolutional layers of Mnih et al. 2015."""
    return [
        nn.Sequential(layer_init(nn.Conv2d(channels, 32, 8, stride=4)), nn.ReLU(inplace=True)),
        nn.Sequential(layer_init(nn.Conv2d(32, 64, 4, stride=2)), nn.ReLU(inplace=True)),
        nn.Sequential(layer_init(nn.Conv2d(64, 64, 3)), nn.ReLU(inplace=True)),
    ]


def impala_layers(channels):
    """The nine layers of Espeholt et al. 2018: three times a convolution with pooling and two residual blocks."""
    layers = []
    for width in (16, 32, 32):
        layers += [
            nn.Sequential(layer_init(nn.Conv2d(channels, width, 3, padding=1)), nn.MaxPool2d(3, stride=2, padding=1)),
            ResidualBlock(width),
            ResidualBlock(width),
        ]
        channels = width
    return layers


class Encoder(nn.Module):
    """f: images (B, C, H, W) uint8 -> features z (B, feature_dim) float32; the layers are numbered from the bottom.

    The first `frozen` layers take no gradient, build no graph and stay in eval mode.
    """

    def __init__(self, architecture, obs_shape, feature_dim, bf16=False):
        super().__init__()
        layers = {"nature": nature_layers, "impala": impala_layers}[architecture](obs_shape[0])
        try:
            with torch.no_grad():
                flat = nn.Sequential(*layers)(torch.zeros(1, *obs_shape)).numel()
        except RuntimeError:
            raise UsageError(
                f"--encoder {architecture}: images of {obs_shape[1]}x{obs_shape[2]} are too small"
            ) from None
        rectify = [nn.ReLU()] if architecture == "impala" else []  # its residual blocks end without one
        layers.append(
            nn.Sequential(*rectify, nn.Flatten(), layer_init(nn.Linear(flat, feature_dim)), nn.ReLU(inplace=True))
        )
        self.layers = nn.ModuleList(layers)
        self.frozen, self.bf16 = 0, bf16

    def freeze(self, count):
        self.frozen = count
        self.layers[:count].requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        self.layers[: self.frozen].eval()  # no statistics of a frozen layer move
        return self

    @torch.no_grad()
    def frozen_prefix(self, obs):
        """Pixels as float32 in 0..1, through the frozen layers."""
        # Channels-last convolutions are more than twice as fast on a CPU.
        x = obs.to(torch.float32, memory_format=torch.channels_last).mul_(1 / 255)  # (B, C, H, W)
        for layer in self.layers[: self.frozen]:
            x = layer(x)
        return x

    def forward(self, obs):
        # Without a graph nothing keeps the activations: in chunks they stay in a CPU's cache, which halves the time.
        chunked = self.frozen and obs.device.type == "cpu" and len(obs) > 256
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            x = torch.cat([self.frozen_prefix(o) for o in obs.split(256)]) if chunked else self.frozen_prefix(obs)
            for layer in self.layers[self.frozen :]:
                x = layer(x)
        return x.float()

    def table(self):
        """The layers as text: index, type, parameters, frozen or trained."""
        lines = ["layer  type                       parameters  state"]
        for i, layer in enumerate(self.layers):
            parts = layer if isinstance(layer, nn.Sequential) else [layer]
            kind = "+".join(type(part).__name__ for part in parts)
            size = sum(p.numel() for p in layer.parameters())
            lines.append(f"{i + 1:>5}  {kind:<25}  {size:>10,}  {'frozen' if i < self.frozen else 'trained'}")
        return "\n".join(lines)


class Agent(nn.Module):
    """Encoder f, policy head pi(.|z), value head, and the projector h of the self-supervised loss."""

    def __init__(self, args, obs_shape, num_actions):
        super().__init__()
        dim = args.feature_dim
        self.encoder = Encoder(args.encoder, obs_shape, dim, args.bf16)
        self.actor = layer_init(nn.Linear(dim, num_actions), std=0.01)
        self.critic = layer_init(nn.Linear(dim, 1), std=1)
        self.projector = nn.Identity()  # consistency: PiSCO with h = identity
        if args.ssl in ("pisco", "simsiam"):
            self.projector = nn.Sequential(
                layer_init(nn.Linear(dim, args.projector_dim)),
                nn.ReLU(),
                layer_init(nn.Linear(args.projector_dim, dim), 1),
            )
        elif args.ssl == "curl":
            self.projector = nn.Linear(dim, dim, bias=False)  # CURL's bilinear similarity W
            self.key_encoder = Encoder(args.encoder, obs_shape, dim, args.bf16)  # follows f, see update
            self.key_encoder.requires_grad_(False)
        if args.env_id == "Jump-v0":
            # There is one right moment to jump, so a fair coin hardly ever clears an obstacle far away.
            with torch.no_grad():
                self.actor.bias[1] = math.log(args.jump_prior / (1 - args.jump_prior))

    def forward(self, obs):
        """Images (B, C, H, W) uint8 -> policy logits (B, A) and values (B,), float32."""
        z = self.encoder(obs)
        return self.actor(z), self.critic(z).squeeze(-1)


def weights_path(args):
    """The encoder file that --encoder-weights stands for, or None for random weights. Raises UsageError."""
    if args.encoder_weights == "none":
        return None
    if args.encoder_weights != "shipped":
        return Path(args.encoder_weights)
    slug = args.env_id.replace("/", "-").lower()
    path = Path(__file__).resolve().parent / "encoders" / f"{slug}__{args.encoder}__rl.safetensors"
    if path.exists():
        return path
    if args.freeze_layers:
        raise UsageError(
            f"--encoder-weights shipped: no {args.encoder} encoder for {args.env_id} is shipped ({path.name}); "
            "give a .safetensors file, or none with --freeze-layers 0 or --freeze-random"
        )
    return None


def load_encoder(path, encoder, architecture, obs_shape):
    """Fills `encoder` from a .safetensors file and returns the file's metadata.

    Nothing in the file is executed. Raises UsageError where the file is missing, damaged, not an encoder's, of another
    architecture or shape, or holds values that are not finite.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("architecture", "an unknown architecture")
            if found != architecture:
                raise UsageError(f"--encoder-weights {path}: holds {found}, not {architecture}; see --encoder")
            expected = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            if shapes != expected:
                wrong = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))[0]
                raise UsageError(
                    f"--encoder-weights {path}: tensor {wrong} is {shapes.get(wrong, 'missing')} in the file, "
                    f"{expected.get(wrong, 'unknown')} here; the file was made for images "
                    f"{metadata.get('observation_shape')} and --feature-dim {metadata.get('feature_dim')}"
                )
            tensors = {name: file.get_tensor(name) for name in shapes}
    except FileNotFoundError:
        raise UsageError(f"--encoder-weights {path}: no such file; make one with pretrain_encoder.py") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"--encoder-weights {path}: not a readable .safetensors file ({error})") from None
    if metadata.get("observation_shape") != json.dumps(list(obs_shape)):
        raise UsageError(
            f"--encoder-weights {path}: made for images {metadata.get('observation_shape')}, not {list(obs_shape)}"
        )
    if not all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values()):
        raise UsageError(f"--encoder-weights {path}: holds values that are not finite float32; make the file anew")
    encoder.load_state_dict(tensors)
    return metadata


def save_encoder(path, encoder, args, obs_shape, global_step):
    """Writes the encoder with the metadata that load_encoder checks and a reader wants to know."""
    metadata = {
        "architecture": args.encoder,
        "feature_dim": str(args.feature_dim),
        "observation_shape": json.dumps(list(obs_shape)),
        "environment": args.env_id,
        "tasks": args.jump_tasks if args.env_id == "Jump-v0" else "",
        "objective": f"rl (ppo, ssl {args.ssl})",
        "steps": str(global_step),
        "seed": str(args.seed),
        "versions": json.dumps({"torch": torch.__version__, "gymnasium": gym.__version__, "numpy": np.__version__}),
    }
    tensors = {name: tensor.contiguous().cpu() for name, tensor in encoder.state_dict().items()}
    write_atomically(path, lambda file: file.write(safetensors.torch.save(tensors, metadata)))


# ---------------------------------------------------------------------------------------------------------------------
# Augmentations and losses: pure functions
# ---------------------------------------------------------------------------------------------------------------------
def random_shift(images, pixels):
    """Shifts each image by its own random whole number of pixels, -pixels..pixels in both axes, replicating the border.

    images (B, C, H, W), any dtype -> the same, channels last in memory. The shift of DrQ (Kostrikov et al. 2021).
    """
    b, c, h, w = images.shape
    dy, dx = torch.randint(-pixels, pixels + 1, (2, b, 1), device=images.device)  # (B, 1) int64 each
    rows = (torch.arange(h, device=images.device) + dy).clamp_(0, h - 1)  # (B, H): clamping the index replicates
    left, middle, right = (x.permute(0, 2, 3, 1) for x in (images[..., :1], images, images[..., -1:]))
    wide = torch.cat([left.expand(-1, -1, pixels, -1), middle, right.expand(-1, -1, pixels, -1)], 2)  # (B, H, W+2P, C)
    windows = wide.flatten(2).unfold(2, w * c, c)  # (B, H, 2P+1, W*C): a view, so that whole rows are copied at once
    shifted = windows[torch.arange(b, device=images.device)[:, None], rows, dx + pixels]  # (B, H, W*C)
    return shifted.view(b, h, w, c).permute(0, 3, 1, 2)


def random_noise(images, std=12.75):
    """Adds Gaussian noise to every pixel, 5% of the range by default; uint8 in and out."""
    return (images + std * torch.randn(images.shape, device=images.device)).round_().clamp_(0, 255).to(torch.uint8)


def augment(images, kind, pixels):
    """One draw of the augmentation A: (B, C, H, W) uint8 -> (B, C, H, W) uint8."""
    return random_noise(images) if kind == "noise" else random_shift(images, pixels)


def categorical_kl(p_logits, q_logits):
    """KL(p || q) of categorical distributions, exact: logits (B, A) -> (B,)."""
    p, q = F.log_softmax(p_logits, dim=-1), F.log_softmax(q_logits, dim=-1)
    return (p.exp() * (p - q)).sum(-1)


def pisco_loss(z1_logits, z2_logits, p1_logits, p2_logits):
    """PiSCO (Arnold and Sha 2023): 1/2 mean KL(sg pi(.|z1) || pi(.|p2)) + 1/2 mean KL(sg pi(.|z2) || pi(.|p1)).

    Takes the policy's logits (B, A) at the features z and at the projections p = h(z) of both views. The gradient flows
    through the p side alone.
    """
    one_two = categorical_kl(z1_logits.detach(), p2_logits).mean()
    two_one = categorical_kl(z2_logits.detach(), p1_logits).mean()
    return 0.5 * (one_two + two_one)


def simsiam_loss(z1, z2, p1, p2):
    """Symmetrised negative cosine similarity of sg z and p (Chen and He 2021, eq. 2); features (B, D)."""
    one_two = F.cosine_similarity(z1.detach(), p2, dim=-1).mean()
    two_one = F.cosine_similarity(z2.detach(), p1, dim=-1).mean()
    return -0.5 * (one_two + two_one)


def info_nce_loss(queries, keys):
    """InfoNCE (van den Oord et al. 2018): query i (B, D) has to pick key i out of all keys (B, D), by dot product."""
    return F.cross_entropy(queries @ keys.T, torch.arange(len(keys), device=keys.device))


def compute_gae(rewards, values, next_value, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    rewards, values, terminated, truncated (T, N) belong to step t; next_value (N,) is V of the observation after the
    last step. values[t + 1] is V of the observation that step t led to, an episode's last one included: so a truncated
    episode bootstraps from it and a terminated one does not. Returns advantages and returns, (T, N) float32.
    """
    next_values = torch.cat([values[1:], next_value[None]])
    deltas = rewards + gamma * next_values * (~terminated) - values
    discounts = gamma * gae_lambda * (~(terminated | truncated))
    advantages = torch.zeros_like(values)
    lastgaelam = torch.zeros_like(next_value)
    for t in reversed(range(len(rewards))):
        advantages[t] = lastgaelam = deltas[t] + discounts[t] * lastgaelam
    return advantages, advantages + values


def ppo_loss(logits, newvalue, actions, logprobs, advantages, returns, values, args):
    """Clipped PPO loss (Schulman et al. 2017, eq. 9) as in CleanRL: logits (B, A), the rest (B,) -> loss, stats."""
    log_probs = F.log_softmax(logits, dim=-1)
    newlogprob = log_probs.gather(1, actions[:, None]).squeeze(1)
    logratio = newlogprob - logprobs
    ratio = logratio.exp()
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(pg_loss1, pg_loss2).mean()
    v_loss = (newvalue - returns) ** 2
    if args.clip_vloss:
        v_clipped = values + (newvalue - values).clamp(-args.clip_coef, args.clip_coef)
        v_loss = torch.max(v_loss, (v_clipped - returns) ** 2)
    v_loss = 0.5 * v_loss.mean()
    entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
    with torch.no_grad():  # http://joschu.net/blog/kl-approx.html
        approx_kl, clipfrac = ((ratio - 1) - logratio).mean(), ((ratio - 1).abs() > args.clip_coef).float().mean()
    stats = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
    return loss, stats | {"old_approx_kl": (-logratio).mean(), "approx_kl": approx_kl, "clipfrac": clipfrac}


def ssl_loss(agent, views, z1, z2, kind):
    """The self-supervised loss `kind` on two views (2B, C, H, W) uint8 with features z1, z2 (B, D), and the share of
    states whose views get the same greedy action."""
    p1, p2 = agent.projector(torch.cat([z1, z2])).chunk(2)
    z1_logits, z2_logits = agent.actor(torch.cat([z1, z2]).detach()).chunk(2)
    if kind in ("pisco", "consistency"):
        p1_logits, p2_logits = agent.actor(torch.cat([p1, p2])).chunk(2)
        loss = pisco_loss(z1_logits, z2_logits, p1_logits, p2_logits)
    elif kind == "simsiam":
        loss = simsiam_loss(z1, z2, p1, p2)
    else:  # curl, symmetrised like the others
        with torch.no_grad():
            k1, k2 = agent.key_encoder(views).chunk(2)
        loss = 0.5 * (info_nce_loss(p1, k2) + info_nce_loss(p2, k1))
    return loss, (z1_logits.argmax(-1) == z2_logits.argmax(-1)).float().mean()


# ---------------------------------------------------------------------------------------------------------------------
# Rollout and update
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Rollout:
    """T steps of N copies. `valid` is False where a step only reset its copy; those rows are not trained on."""

    obs: torch.Tensor  # (T, N, C, H, W) uint8, channels last in memory
    actions: torch.Tensor  # (T, N) int64
    logprobs: torch.Tensor  # (T, N) float32
    values: torch.Tensor  # (T, N) float32
    rewards: torch.Tensor  # (T, N) float32, on the CPU like the next three
    terminated: torch.Tensor  # (T, N) bool
    truncated: torch.Tensor  # (T, N) bool
    valid: torch.Tensor  # (T, N) bool

    @classmethod
    def empty(cls, num_steps, num_envs, obs_shape, device):
        c, h, w = obs_shape
        images = torch.zeros((num_steps, num_envs, h, w, c), dtype=torch.uint8, device=device)
        dtypes = [torch.int64, torch.float32, torch.float32, torch.float32, torch.bool, torch.bool, torch.bool]
        devices = [device] * 3 + ["cpu"] * 4
        columns = (torch.zeros((num_steps, num_envs), dtype=t, device=d) for t, d in zip(dtypes, devices))
        return cls(images.permute(0, 1, 4, 2, 3), *columns)


def to_device(obs, device):
    """Observations (N, C, H, W) uint8 as a tensor on the device, without waiting for the copy."""
    obs = torch.from_numpy(np.ascontiguousarray(obs))
    return obs.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else obs


@torch.no_grad()
def collect_rollout(agent, envs, rollout, next_obs, args):
    """Fills `rollout` in place from observation next_obs (N, C, H, W) uint8.

    Returns the observation after the last step, its value (N,) and the episodes that ended on the way.
    """
    episodes = []
    for step in range(args.num_steps):
        rollout.obs[step] = next_obs
        rollout.valid[step] = torch.from_numpy(~envs.was_done)
        logits, rollout.values[step] = agent(rollout.obs[step])  # channels last already
        log_probs = F.log_softmax(logits, dim=-1)
        action = torch.multinomial(log_probs.exp(), 1)  # (N, 1) int64
        rollout.actions[step] = action.squeeze(1)
        rollout.logprobs[step] = log_probs.gather(1, action).squeeze(1)
        obs, rewards, terminated, truncated = envs.step(action.squeeze(1).cpu().numpy())
        rollout.rewards[step] = torch.from_numpy(rewards) * args.reward_scale
        rollout.terminated[step] = torch.from_numpy(terminated)
        rollout.truncated[step] = torch.from_numpy(truncated)
        next_obs = to_device(obs, rollout.obs.device)
        episodes += envs.episodes
    return next_obs, agent(next_obs)[1], episodes


def minibatch_loss(agent, obs, actions, logprobs, advantages, returns, values, args):
    """L = L_RL + lambda L_ssl on one minibatch: obs (B, C, H, W) uint8, all else (B,) -> loss and statistics."""
    b = math.ceil(args.ssl_fraction * len(obs)) if args.ssl != "none" else 0  # rows of the self-supervised loss
    views = [augment(obs[:b], args.augmentation, args.shift_pixels) for _ in range(2)] if b else []
    inputs = torch.cat([obs, *views])  # (B + 2b, C, H, W) uint8
    z, z1, z2 = agent.encoder(inputs).split([len(obs), b, b])
    loss, stats = ppo_loss(
        agent.actor(z), agent.critic(z).squeeze(-1), actions, logprobs, advantages, returns, values, args
    )
    stats["dead_features"] = (z == 0).all(dim=0).float().mean()
    if args.ssl != "none":
        stats[args.ssl], stats["view_agreement"] = ssl_loss(agent, inputs[len(obs) :], z1, z2, args.ssl)
        loss = loss + args.ssl_coef * stats[args.ssl]
    return loss, {name: value.detach() for name, value in stats.items()}


def grad_norm(parameters):
    """Euclidean norm of all gradients together; 0 where there is none."""
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    return torch.stack(norms).norm() if norms else torch.zeros(())


def update(agent, optimizer, rollout, next_value, args, loss_function=minibatch_loss):
    """One iteration's epochs over the rollout. Returns the statistics' means over all minibatches, as floats."""
    device = rollout.obs.device
    advantages, returns = compute_gae(
        rollout.rewards, rollout.values.cpu(), next_value.cpu(), rollout.terminated, rollout.truncated,
        args.gamma, args.gae_lambda,
    )  # fmt: skip
    b_obs = rollout.obs.permute(0, 1, 3, 4, 2).flatten(0, 1)  # (T * N, H, W, C) uint8, a view
    columns = (rollout.actions, rollout.logprobs, advantages, returns, rollout.values)
    b_columns = [column.to(device).flatten() for column in columns]  # (T * N,) each
    b_valid = rollout.valid.flatten()
    valid_inds = b_valid.nonzero().squeeze(1)
    if not len(valid_inds):
        return {}  # every copy was only reset
    trained = [p for p in agent.parameters() if p.requires_grad]
    frozen = list(agent.encoder.layers[: agent.encoder.frozen].parameters())
    history, zero = [], torch.zeros((), device=device)  # zero keeps a sum of nothing on the device
    for _ in range(args.update_epochs):
        # Every minibatch has the same size: a few rows, drawn at random, come twice in place of the rows left out.
        order = valid_inds[torch.randperm(len(valid_inds))]
        order = order.repeat(math.ceil(len(b_valid) / len(order)))[: len(b_valid)].to(device)
        for mb_inds in order.chunk(args.num_minibatches):
            mb_obs = b_obs.index_select(0, mb_inds).permute(0, 3, 1, 2)  # (B, C, H, W), whole images copied at once
            loss, stats = loss_function(agent, mb_obs, *(column[mb_inds] for column in b_columns), args)
            optimizer.zero_grad()
            loss.backward()
            stats["grad_norm_trained"] = nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
            stats["grad_norm_frozen"] = zero + grad_norm(frozen)
            optimizer.step()
            if args.ssl == "curl":
                with torch.no_grad():
                    for key, query in zip(agent.key_encoder.parameters(), agent.encoder.parameters()):
                        key.lerp_(query, args.curl_tau)
            history.append(stats)
        if args.target_kl is not None and stats["approx_kl"] > args.target_kl:
            break
    # The only wait for the device: one transfer of all statistics.
    table = torch.stack([torch.stack(list(stats.values())) for stats in history]).mean(dim=0).tolist()
    means = dict(zip(history[0], table))
    b_returns, b_values = returns.flatten()[b_valid], rollout.values.cpu().flatten()[b_valid]
    var_y = b_returns.var(correction=0)
    means["explained_variance"] = float(1 - (b_returns - b_values).var(correction=0) / var_y) if var_y > 0 else math.nan
    return means


# ---------------------------------------------------------------------------------------------------------------------
# Run folder: checkpoints, metrics
# ---------------------------------------------------------------------------------------------------------------------
METRICS = [
    "global_step", "charts/SPS", "charts/learning_rate", "charts/episodic_return", "charts/episodic_length",
    "charts/success", "eval/greedy_return", "eval/sampled_return", "eval/greedy_success", "eval/sampled_success",
    "eval/greedy_grid_success", "eval/sampled_grid_success", "losses/policy_loss", "losses/value_loss",
    "losses/entropy", "losses/old_approx_kl", "losses/approx_kl", "losses/clipfrac", "losses/explained_variance",
    "losses/pisco", "losses/simsiam", "losses/curl", "losses/consistency", "losses/view_agreement",
    "losses/dead_features", "losses/grad_norm_trained", "losses/grad_norm_frozen",
]  # fmt: skip


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


# What every checkpoint holds
STATE = {"args", "agent", "optimizer", "iteration", "recent", "seconds", "torch_rng"}


@contextlib.contextmanager
def interrupt_later():
    """Puts Ctrl-C off to the end of the block: cut short, TensorBoard's writer can hang and torch.save fails."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def run_args(args):
    """What args.json and every checkpoint keep of the arguments: all but the folder to resume."""
    return {key: value for key, value in asdict(args).items() if key != "resume"}


class RunFolder:
    """runs/<env>__<exp>__<seed>__<time>/: args.json, metrics.csv, TensorBoard events, checkpoint.pt and the one before
    it, model.safetensors, encoder.safetensors and the evaluation's files."""

    def __init__(self, path):
        self.path = Path(path)

    @classmethod
    def create(cls, args):
        name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
        path = Path(args.runs_dir) / name
        try:
            while path.exists():  # another run of this second
                path = path.with_name(path.name + "_")
            path.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"--runs-dir {args.runs_dir}: can't make the run folder ({error})") from None
        try:
            saved = json.dumps(run_args(args), indent=2).encode()
            write_atomically(path / "args.json", lambda file: file.write(saved))
        except OSError as error:
            shutil.rmtree(path, ignore_errors=True)
            raise UsageError(f"--runs-dir {args.runs_dir}: can't write to the run folder ({error})") from None
        return cls(path)

    def save_checkpoint(self, state):
        """Writes checkpoint.pt and keeps the one before it as checkpoint.previous.pt: after a kill one is whole."""
        path = self.path / "checkpoint.pt"
        if path.exists():
            previous = self.path / "checkpoint.previous.pt"
            previous.unlink(missing_ok=True)
            try:
                os.link(path, previous)
            except OSError:  # a file system without hard links
                shutil.copy2(path, previous)
        buffer = io.BytesIO()  # torch.save hides a full disk's OSError behind a RuntimeError
        torch.save(state, buffer)
        write_atomically(path, lambda file: file.write(buffer.getbuffer()))

    def load_checkpoint(self, device):
        """The newest whole checkpoint, or None before the first one. Never unpickles code (weights_only)."""
        broken = None
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            try:
                state = torch.load(self.path / name, map_location=device, weights_only=True)
                if not isinstance(state, dict) or not STATE <= state.keys():
                    raise ValueError("not a checkpoint of this script")
            except FileNotFoundError:
                continue
            except Exception as error:  # torch.load raises whatever a damaged file makes it stumble over
                reason = str(error).partition(". ")[0] or type(error).__name__
                broken = broken or f"{self.path / name} is damaged ({reason})"
                continue
            if broken:  # out of the way, lest the next checkpoint keep it in place of the whole one
                os.replace(self.path / "checkpoint.pt", self.path / "checkpoint.damaged.pt")
                print(f"{broken}; going on from {name}")
            return state
        if broken:
            raise UsageError(f"--resume: {broken} and there is no other checkpoint; start the run anew")
        return None

    def open_logs(self, args, global_step):
        """Opens metrics.csv and TensorBoard to go on after global_step; later rows of a killed run are dropped."""
        path, kept = self.path / "metrics.csv", []
        if path.exists():
            with open(path, newline="") as file:
                # A row cut short by a kill has no last column.
                try:
                    reader = csv.DictReader(file)
                    rows = [row for row in reader if None not in row.values()]
                    if reader.fieldnames != METRICS or any(None in row for row in rows):
                        raise ValueError("other columns")
                    kept = [row for row in rows if int(row["global_step"]) <= global_step]
                except (ValueError, TypeError, csv.Error):
                    raise UsageError(f"--resume {self.path}: metrics.csv is damaged; move it away") from None
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS)
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))
        self.csv_file = open(path, "a", newline="")
        self.csv_writer = csv.DictWriter(self.csv_file, METRICS)
        if args.track:
            import wandb

            wandb.init(
                project=args.wandb_project_name, entity=args.wandb_entity, name=self.path.name, id=self.path.name,
                resume="allow", config=asdict(args), sync_tensorboard=True,
            )  # fmt: skip
        # Its thread's trace is no help to anyone: what it can't write is an OSError of the next call here as well.
        threading.excepthook = lambda args: issubclass(args.exc_type, OSError) or threading.__excepthook__(args)
        self.tensorboard = SummaryWriter(self.path, purge_step=global_step + 1 if args.resume else None)
        if not global_step:
            rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
            self.tensorboard.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")

    def log(self, row):
        """Appends one iteration's numbers, keyed by METRICS, to metrics.csv and TensorBoard. NaN means: none yet."""
        row = {key: value for key, value in row.items() if not (isinstance(value, float) and math.isnan(value))}
        self.csv_writer.writerow(row)
        self.csv_file.flush()
        for key, value in row.items():
            if key != "global_step":
                self.tensorboard.add_scalar(key, value, row["global_step"])

    def export(self, agent, args, obs_shape, global_step):
        """Writes model.safetensors, all networks, and encoder.safetensors, the weights for another run."""
        tensors = {name: tensor.contiguous() for name, tensor in agent.state_dict().items()}
        write_atomically(self.path / "model.safetensors", lambda file: file.write(safetensors.torch.save(tensors)))
        save_encoder(self.path / "encoder.safetensors", agent.encoder, args, obs_shape, global_step)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.csv_file.close()
        self.tensorboard.close()
        if kind is KeyboardInterrupt:
            print(f"ppo_pisco.py: interrupted; go on with: python ppo_pisco.py --resume {self.path}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def play_episodes(agent, envs, device, greedy, seed, frames=None):
    """The first episode of every copy: a list of dicts as in ImageEnvs.step, in the copies' order.

    Sampling has a generator of its own, so evaluating changes nothing in the training. The observations of the first
    nine copies are appended to `frames`, where given; a copy whose episode is over keeps its last picture.
    """
    generator = torch.Generator(device).manual_seed(seed)
    obs = envs.reset(**({"options": {"task_ids": np.arange(envs.num_envs)}} if envs.source == "jump" else {}))
    episodes, over = [None] * envs.num_envs, []
    while None in episodes:
        if frames is not None and len(frames) < GIF_FRAMES and None in episodes[:9]:
            picture = obs[:9].copy()
            if over:
                picture[over] = frames[-1][over]
            frames.append(picture)
            over = [i for i, episode in enumerate(episodes[:9]) if episode is not None]
        playing = [i for i, episode in enumerate(episodes) if episode is None]  # the policy need not see the others
        logits, _ = agent(to_device(obs[playing], device))
        action = (
            logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
        )
        actions = np.zeros(envs.num_envs, dtype=np.int64)
        actions[playing] = action.cpu().numpy()
        obs, *_ = envs.step(actions)
        for episode in envs.episodes:
            episodes[episode["env"]] = episodes[episode["env"]] or episode
    return episodes


def evaluate(agent, args, device, global_step, folder):
    """Plays greedy and sampled episodes, writes evaluation.json (Jump: heatmap.png; on request: a GIF) and returns the
    averages under their metric names."""
    is_jump = args.env_id == "Jump-v0"
    trained = parse_jump_tasks(args.jump_tasks)
    names = [f"{x}:{y}" for x, y in evaluation_tasks(args)] if is_jump else None  # the trained tasks come first
    results, metrics, frames = {"global_step": global_step, "env_id": args.env_id}, {}, []
    for policy in ("greedy", "sampled"):
        seed = args.seed + 1_000_003  # apart from the training's seeds
        envs = ImageEnvs(args, len(names) if is_jump else args.eval_episodes, seed, training=False)
        keep = frames if args.capture_video and policy == "greedy" else None
        episodes = play_episodes(agent, envs, device, policy == "greedy", seed, keep)
        envs.close()
        own = episodes[: len(trained)] if is_jump else episodes
        results[policy] = {key: [episode[key] for episode in own] for key in ("return", "length")}
        metrics[f"eval/{policy}_return"] = float(np.mean(results[policy]["return"]))
        if is_jump:
            solved = {name: bool(episode["success"]) for name, episode in zip(names, episodes)}
            results[policy] |= {"trained_tasks": names[: len(trained)], "solved": solved}
            metrics[f"eval/{policy}_success"] = float(np.mean(list(solved.values())[: len(trained)]))
            metrics[f"eval/{policy}_grid_success"] = float(np.mean([solved[f"{x}:{y}"] for x, y in JUMP_GRID]))
    results["metrics"] = metrics
    write_atomically(folder / "evaluation.json", lambda file: file.write(json.dumps(results, indent=1).encode()))
    if is_jump:
        title = f"solved: {metrics['eval/greedy_success']:.0%} of the trained tasks, "
        title += f"{metrics['eval/greedy_grid_success']:.0%} of the grid (greedy, seed {args.seed})"
        draw_heatmap(folder / "heatmap.png", results["greedy"]["solved"], trained, title)
    if frames:
        write_gif(folder / f"evaluation_{global_step}.gif", frames, upside_down=is_jump)
    return metrics


def draw_heatmap(path, solved, trained, title):
    """PNG of solved tasks over obstacle x floor: `solved` maps "obstacle:floor" to bool, `trained` are outlined."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    blue, vermilion = "#0072b2", "#d55e00"  # colour-blind safe
    places = {tuple(int(number) for number in name.split(":")): value for name, value in solved.items()}
    (x0, y0), (x1, y1) = np.min(list(places), axis=0), np.max(list(places), axis=0)
    figure = Figure(figsize=(8, 0.25 * (y1 - y0 + 1) + 1.6), layout="constrained")
    axes = figure.subplots()
    for (x, y), value in places.items():
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=blue if value else vermilion, edgecolor="white"))
    for x, y in trained:
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2.5))
    axes.set(
        xlim=(x0 - 1, x1 + 1), ylim=(y0 - 1, y1 + 1), xlabel="obstacle (pixels)", ylabel="floor (pixels)", title=title
    )
    handles = [Patch(color=blue, label="solved"), Patch(color=vermilion, label="not solved")]
    handles.append(Patch(fill=False, edgecolor="black", linewidth=2.5, label="trained on"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


GIF_FRAMES = 1000  # at most


def write_gif(path, frames, upside_down, scale=2):
    """GIF of frames [(n, C, H, W) uint8, ...], the n copies in rows of three; `upside_down`: row 0 is the bottom."""
    from PIL import Image

    images = []
    for obs in frames[:GIF_FRAMES]:
        # The newest frame of a stack: its last RGB triple where the channels come in threes, else the last channel.
        tiles = obs[:, -3:] if obs.shape[1] % 3 == 0 else obs[:, -1:].repeat(3, axis=1)  # (n, 3, H, W)
        tiles = tiles[:, :, ::-1] if upside_down else tiles
        columns = min(3, len(tiles))
        tiles = np.pad(tiles, ((0, -len(tiles) % columns), (0, 0), (1, 1), (1, 1)))  # whole rows, a black rim
        n, c, h, w = tiles.shape
        sheet = tiles.reshape(n // columns, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(-1, columns * w, c)
        images.append(Image.fromarray(sheet.repeat(scale, axis=0).repeat(scale, axis=1)))
    frame_time = {"duration": 50, "loop": 0}  # milliseconds
    write_atomically(
        path, lambda file: images[0].save(file, "GIF", save_all=True, append_images=images[1:], **frame_time)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Main
# ---------------------------------------------------------------------------------------------------------------------
def has_type(value, kind):
    """Whether `value` has the annotated type `kind`: a class, a Literal or a union of these."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(has_type(value, one) for one in get_args(kind))
    return type(value) in ((int, float) if kind is float else (kind,))


LIMITS = [
    ("be positive", lambda x: x > 0, "num_envs num_steps num_minibatches update_epochs feature_dim projector_dim "
     "checkpoint_interval eval_episodes learning_rate ssl_fraction"),
    ("not be negative", lambda x: x >= 0, "seed torch_threads eval_interval ssl_coef shift_pixels ent_coef vf_coef "
     "max_grad_norm clip_coef"),
    ("lie in 0..1", lambda x: 0 <= x <= 1, "gamma gae_lambda curl_tau ssl_fraction"),
    ("lie between 0 and 1", lambda x: 0 < x < 1, "jump_prior"),
    ("be finite", math.isfinite, "learning_rate reward_scale jump_reward clip_coef ssl_coef ent_coef vf_coef"),
    ("be positive and finite", lambda x: x is None or 0 < x < math.inf, "target_kl"),
    ("be at most 2**30", lambda x: x <= 2**30, "seed num_envs num_steps update_epochs eval_episodes"),
    ("be at most 2**60", lambda x: x <= 2**60, "total_timesteps"),
    ("be at most 65,536", lambda x: x <= 2**16, "feature_dim projector_dim"),
    ("be at most 1,024", lambda x: x <= 2**10, "shift_pixels torch_threads"),
]  # fmt: skip


def check_args(args):
    """Raises UsageError for values that no run can have, before anything is made or written."""
    rules = [(f"be {field.type}", partial(has_type, kind=field.type), field.name) for field in fields(Args)]
    for rule, possible, names in rules + LIMITS:  # tyro checks types on the command line, nobody those of args.json
        for name in names.split():
            if not possible(getattr(args, name)):
                raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)!r}: must {rule}")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches or batch_size < 2 * args.num_minibatches:
        raise UsageError(
            f"--num-minibatches {args.num_minibatches}: must divide num_envs * num_steps = {batch_size} and leave at "
            "least two rows to each minibatch"
        )
    if args.total_timesteps < batch_size:
        raise UsageError(
            f"--total-timesteps {args.total_timesteps}: less than one iteration of num_envs * num_steps = {batch_size}"
        )
    parse_jump_tasks(args.jump_tasks)
    if args.track:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UsageError("--track: Weights & Biases is not installed; pip install wandb") from None


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


def parse_args(argv=None):
    """The arguments of the command line; with --resume those of the run, which other flags may repeat but not change.

    Raises UsageError.
    """
    args = parse_flags(argv)
    if args.resume is None:
        return args
    try:
        saved = json.loads((Path(args.resume) / "args.json").read_text())
    except FileNotFoundError:
        raise UsageError(f"--resume {args.resume}: not a run folder, it has no args.json") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--resume {args.resume}: args.json can't be read ({error})") from None
    if not isinstance(saved, dict) or saved.keys() != run_args(args).keys():
        raise UsageError(f"--resume {args.resume}: args.json was written by another version of this script")
    saved = Args(**saved, resume=args.resume)
    for key, value in asdict(parse_flags(argv, default=saved)).items():
        if value != getattr(saved, key):
            flag = f"--{key.replace('_', '-')}"
            raise UsageError(f"{flag} {value}: the run was made with {getattr(saved, key)}; drop {flag} or start anew")
    return saved


def make_agent(args, envs, device, resuming=False):
    """The agent, its encoder loaded and frozen as asked for, and a text that says so. Raises UsageError.

    When `resuming`, the weights are left to the checkpoint."""
    agent = Agent(args, envs.obs_shape, envs.num_actions)
    encoder, path = agent.encoder, None if resuming else weights_path(args)
    count = len(encoder.layers) if args.freeze_layers == "all" else args.freeze_layers
    if not 0 <= count <= len(encoder.layers):
        raise UsageError(f"--freeze-layers {count}: the {args.encoder} encoder has layers 0..{len(encoder.layers)}")
    if path is None and count and not args.freeze_random and not resuming:
        raise UsageError(
            f"--freeze-layers {count}: the encoder's weights are random; give --encoder-weights, or --freeze-random"
        )
    origin = "weights of the checkpoint" if resuming else "random weights"
    if path is not None:
        metadata = load_encoder(path, encoder, args.encoder, envs.obs_shape)
        origin = f"{path}, {metadata.get('objective')} on {metadata.get('environment')} {metadata.get('tasks', '')}"
    encoder.freeze(count)
    if args.ssl == "curl":
        agent.key_encoder.load_state_dict(encoder.state_dict())
    text = f"encoder: {args.encoder} for {envs.obs_shape} images, {origin}\n{encoder.table()}"
    return agent.to(device, memory_format=torch.channels_last), text


def training_state(args, agent, optimizer, envs, iteration, recent, seconds):
    """All that the next iteration depends on, as tensors and plain values."""
    state = {
        "args": run_args(args), "agent": agent.state_dict(), "optimizer": optimizer.state_dict(),
        "iteration": iteration, "recent": list(recent), "seconds": seconds, "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }  # fmt: skip
    return state | ({"envs": envs.get_state()} if envs.source == "jump" else {})


def allocate(args, device):
    """The rollout's storage. Raises UsageError where it can't fit into memory."""
    one = ImageEnvs(args, 1, args.seed)  # its image's shape tells whether there is memory for all
    one.close()
    size = args.num_steps * args.num_envs * math.prod(one.obs_shape)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory = torch.cuda.mem_get_info()[1] if device.type == "cuda" else memory
    if size > 0.8 * memory:
        raise UsageError(
            f"--num-steps {args.num_steps} --num-envs {args.num_envs}: the rollout takes {size / 2**30:.1f} GiB "
            f"of {memory / 2**30:.1f} GiB; choose smaller numbers"
        )
    return Rollout.empty(args.num_steps, args.num_envs, one.obs_shape, device)


def restore(state, agent, optimizer, envs, args):
    """Puts a checkpoint's state back. Returns the observation to go on from. Raises UsageError if it doesn't fit."""
    try:
        if state["args"] != run_args(args):
            raise ValueError("of another run")
        agent.load_state_dict(state["agent"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"].cpu())
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"][: torch.cuda.device_count()]])
        if "envs" in state:
            return envs.set_state(state["envs"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"--resume {args.resume}: the checkpoint does not belong to args.json") from None
    print("this environment can't save its state: fresh episodes from here, unlike in an uninterrupted run")
    return envs.reset()


@torch.no_grad()
def check_finite(losses, agent, next_obs, folder):
    """Raises UsageError for losses, gradients or a new policy that are not finite, before they reach a checkpoint."""
    bad = [name for name, value in losses.items() if not math.isfinite(value) and name != "explained_variance"]
    bad += [] if agent(next_obs)[0].isfinite().all() else ["the policy"]
    if bad:
        raise UsageError(
            f"{bad[0]} is not finite; the last good checkpoint, if any, is kept in {folder.path}; "
            "try a smaller --learning-rate, --ssl-coef or --max-grad-norm"
        )


def episode_means(episodes):
    """Averages over the latest finished episodes; NaN before the first one."""
    columns = {"charts/episodic_return": "return", "charts/episodic_length": "length", "charts/success": "success"}
    return {name: float(np.mean([e[key] for e in episodes])) if episodes else math.nan for name, key in columns.items()}


def keep_memory():
    """Makes glibc keep freed memory: else it maps every large activation anew, which costs an update a third more."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back
    mallopt(-2, 2**28)  # M_TOP_PAD: grow by 256 MiB at a time


def set_up(args):
    """Seeds and threads. Returns the device."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    # Dead units leave Adam's averages with denormal numbers, on which a CPU is slow. Worker threads inherit the mode.
    torch.set_flush_denormal(True)
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def progress_bar(initial, total):
    """A bar over steps with speed and ETA; a line every half minute where the output is no terminal."""
    interval = 0.5 if sys.stdout.isatty() else 30  # seconds
    return tqdm(
        initial=initial, total=total, unit="step", unit_scale=True, file=sys.stdout, mininterval=interval,
        dynamic_ncols=True,
    )  # fmt: skip


def train(args):
    """One whole run. Returns its folder. Raises UsageError for bad arguments, OSError where a file can't be written."""
    check_args(args)
    device = set_up(args)
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    state = RunFolder(args.resume).load_checkpoint(device) if args.resume else None
    start, recent, seconds = (state["iteration"], state["recent"], state["seconds"]) if state else (0, [], 0.0)
    recent = deque(recent, maxlen=100)  # the latest finished episodes
    rollout = allocate(args, device)
    # EnvPool and Gymnasium begin fresh episodes when resumed: not the first ones once more.
    envs = ImageEnvs(args, args.num_envs, args.seed + 7919 * start)
    agent, description = make_agent(args, envs, device, state is not None)
    trained = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.learning_rate, eps=1e-5, fused=True)
    loss_function = torch.compile(minibatch_loss) if args.compile else minibatch_loss

    folder = RunFolder(args.resume) if args.resume else RunFolder.create(args)
    print(description, f"run folder: {folder.path}", sep="\n", flush=True)
    next_obs = to_device(restore(state, agent, optimizer, envs, args) if state else envs.reset(), device)
    folder.open_logs(args, start * batch_size)
    with progress_bar(start * batch_size, num_iterations * batch_size) as bar, folder:
        for iteration in range(start + 1, num_iterations + 1):
            began = time.perf_counter()
            global_step, last = iteration * batch_size, iteration == num_iterations
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1.0 - (iteration - 1.0) / num_iterations) * args.learning_rate
            next_obs, next_value, episodes = collect_rollout(agent, envs, rollout, next_obs, args)
            losses = update(agent, optimizer, rollout, next_value, args, loss_function)
            check_finite(losses, agent, next_obs, folder)
            recent.extend(episodes)
            seconds += time.perf_counter() - began

            row = {"global_step": global_step, "charts/SPS": global_step / seconds, **episode_means(recent)}
            row["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            row |= {f"losses/{name}": value for name, value in losses.items()}
            if last or args.eval_interval and global_step % args.eval_interval < batch_size:
                row |= evaluate(agent, args, device, global_step, folder.path)
            with interrupt_later():
                folder.log(row)
                if last or iteration % args.checkpoint_interval == 0:
                    folder.save_checkpoint(training_state(args, agent, optimizer, envs, iteration, recent, seconds))
            shown = {"return": row["charts/episodic_return"], "success": row["charts/success"]}
            bar.set_postfix({name: f"{x:.2f}" for name, x in shown.items() if not math.isnan(x)}, refresh=False)
            bar.update(batch_size)
    envs.close()
    folder.export(agent, args, envs.obs_shape, num_iterations * batch_size)
    return folder.path


def last_metrics(path):
    """The averages of the evaluation at `path`. Raises UsageError."""
    try:
        return {name: float(value) for name, value in json.loads(path.read_text())["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path} is missing or damaged; the run is finished, its scores are in metrics.csv") from None


def is_out_of_memory(error):
    """Whether an exception says that the CPU's or the GPU's memory is too small."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def main(argv=None):
    """Runs the command line `argv`. Returns the exit code: 0, 2 for bad input or 130 after Ctrl-C."""
    keep_memory()
    try:
        folder = train(parse_args(argv))
        metrics = last_metrics(folder / "evaluation.json")
    except UsageError as error:
        print(f"ppo_pisco.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"ppo_pisco.py: error: {error}; make room or change --runs-dir, then go on with --resume", file=sys.stderr
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("ppo_pisco.py: error: out of memory; choose smaller batches, images or networks", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print("evaluation:", ", ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in metrics.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
