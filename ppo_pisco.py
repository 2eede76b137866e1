# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "envpool==1.2.5", "numpy==2.4.6", "tyro==1.0.17",
#     "tensorboard==2.21.0", "safetensors==0.8.0", "tqdm==4.70.1", "pillow==13.0.0"]
# ///
"""PPO with PiSCO: finetune a pretrained encoder on a new visual task, bottom layers frozen (discrete actions).

    python ppo_pisco.py --freeze-layers 2                                   # MSR Jump, shipped encoder, 1 or 2 minutes
    python ppo_pisco.py --encoder-weights none --ssl none                   # the same task from scratch
    python ppo_pisco.py --env-id Breakout-v5 --help                         # any environment has defaults of its own
    python ppo_pisco.py --resume runs/Jump-v0__ppo_pisco__1__1700000000000000     # go on with a killed run

PiSCO is the loss of Arnold and Sha, "Policy-Induced Self-Supervision Improves Representation Finetuning in Visual RL",
arXiv 2302.06009: two augmented views of a state must induce the same policy, `--ssl-teacher view --projector mlp`. By
default the policy that acts teaches an augmented view what it does in the state, the policy term of DrAC (2006.12862).
"""

import copy
import ctypes
import difflib
import fcntl
import importlib.util
import io
import json
import math
import os
import re
import shlex
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# --- Arguments -------------------------------------------------------------------------------------------------------
ENCODERS = Path(__file__).resolve().parent / "encoders"


@dataclass
class Args:
    # Experiment
    exp_name: str = Path(__file__).stem  # the name of this experiment, part of the run folder's name
    seed: int = 1  # seed of the environments, the initial weights, the minibatches and the augmentation
    runs_dir: str = "runs"  # folder in which the run folder is made
    resume: str | None = None  # run folder of a killed run to go on with; every other argument comes from that run
    cuda: bool = True  # use a CUDA device where there is one
    torch_deterministic: bool = True  # ask cuDNN for deterministic algorithms
    torch_threads: int = 0  # CPU threads of PyTorch (0: PyTorch's own choice, one per physical core)
    compile: bool = False  # compile the loss with torch.compile; worth its start-up time on a GPU
    bf16: bool = False  # compute the encoder in bfloat16; faster on GPUs and on CPUs with AMX, slower on others
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project_name: str = "pisco"  # the Weights & Biases project
    capture_video: bool = False  # write a GIF of one greedy episode at every evaluation
    checkpoint_interval: int = 10  # iterations between two checkpoints, beside those before evaluations (0: only those)
    eval_interval: int = 10_240  # environment steps between two evaluations; the last is at the end (0: only that one)
    eval_episodes: int = 10  # episodes per evaluation and policy (greedy, sampled); Jump-v0 plays every task once
    eval_max_steps: int = 27_000  # most steps of an evaluation's episode, where the environment has no limit

    # Environment
    env_id: str = "Jump-v0"  # Jump-v0, an EnvPool or a Gymnasium id; observations must be images, actions discrete
    vectorization: Literal["sync", "async"] = "sync"  # Gymnasium's copies: one after the other, or a process each
    jump_tasks: str = "target"  # Jump-v0: source, target, wide, narrow, random, grid, or a list such as 20:10,30:20
    jump_eval_tasks: str = "grid"  # Jump-v0: what evaluations play beside the run's own tasks: as above, or none
    jump_reward: float = 1.0  # Jump-v0: bonus for reaching the right edge (the reference task pays 100)
    jump_prior: float = 0.1  # Jump-v0: the untrained policy's probability of jumping (0.5: the usual uniform start)
    reward_scale: float = 0.1  # factor on the training reward; logged returns are unscaled

    # Encoder
    encoder: str = "nature"  # nature (images from 36x36 pixels), impala, or one of timm such as timm:resnet18
    feature_dim: int = 256  # size of the encoder's output z
    encoder_weights: str = str(ENCODERS / "jump-v0__nature__rl.safetensors")  # a file, `none`: random, `timm`: timm's
    freeze_layers: int | Literal["all"] = 0  # how many of the encoder's layers stay frozen, from the bottom
    freeze_random: bool = False  # allow freezing layers of an encoder with random weights
    head_layers: int = 0  # hidden layers of the policy and the value head, 256 units each (0: linear in z)

    # PiSCO and its alternatives
    ssl: Literal["pisco", "simsiam", "curl", "none"] = "pisco"  # self-supervised loss: on policies, features, or none
    ssl_teacher: Literal["state", "view"] = "state"  # a view learns from the state that RL sees, or two from each other
    ssl_coef: float = 3.0  # weight lambda of the self-supervised loss; losses/ssl_grad_share tells what it comes to
    ssl_fraction: float = 1.0  # share of every minibatch on which the self-supervised loss is computed
    augmentation: Literal["shift", "noise"] = "shift"  # random augmentation A that makes the views
    shift_pixels: int = 4  # largest shift in pixels, in each direction
    projector: Literal["mlp", "residual", "none"] = "none"  # h: an MLP, z plus an MLP that begins at zero, the identity
    projector_dim: int = 256  # hidden width of the projector, which simsiam has in any case; curl has a matrix instead
    curl_tau: float = 0.05  # curl: step of the key encoder's moving average, once per minibatch

    # PPO
    total_timesteps: int = 102_400  # environment steps of the whole run
    learning_rate: float = 1e-3  # learning rate of Adam
    num_envs: int = 32  # parallel copies of the environment
    num_steps: int = 64  # steps per copy in each rollout
    anneal_lr: bool = False  # anneal the learning rate linearly to zero
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of the generalised advantage estimation
    num_minibatches: int = 8  # minibatches per epoch
    update_epochs: int = 3  # epochs per rollout
    norm_adv: bool = True  # normalise advantages in each minibatch
    clip_coef: float = 0.2  # clipping of the policy ratio and, with --clip-vloss, of the value
    clip_vloss: bool = True  # clip the value loss
    ent_coef: float = 0.01  # coefficient of the entropy bonus
    vf_coef: float = 0.5  # coefficient of the value loss
    max_grad_norm: float = 0.5  # largest gradient norm of the trained parameters
    target_kl: float | None = None  # end an iteration's epochs once the approximate KL exceeds this


# The defaults above are Jump's. What --env-id matches has CleanRL's on top (ppo_atari_envpool.py, ppo_procgen.py).
ATARI = {
    "encoder_weights": "none", "feature_dim": 512, "reward_scale": 1.0, "total_timesteps": 10_000_000,
    "eval_interval": 1_000_000, "learning_rate": 2.5e-4, "anneal_lr": True, "num_envs": 8, "num_steps": 128,
    "num_minibatches": 4, "update_epochs": 4, "clip_coef": 0.1,
}  # fmt: skip
PROCGEN = {
    "encoder": "impala", "feature_dim": 256, "total_timesteps": 25_000_000, "learning_rate": 5e-4, "anneal_lr": False,
    "gamma": 0.999, "num_envs": 64, "num_steps": 256, "num_minibatches": 8, "update_epochs": 3, "clip_coef": 0.2,
}  # fmt: skip
ROOM = {"total_timesteps": 500_000, "eval_interval": 50_000, "learning_rate": 1e-3}  # our choice
DEFAULTS = [("(?!Jump-v0).*", ATARI), (r"\w+(Easy|Hard|Extreme|Memory|Exploration)-v0", PROCGEN), ("miniworld.*", ROOM)]


def parse_args(argv=None):
    """The arguments of a command line; with --resume those of the run. Raises SystemExit where there is no such run."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # A first look, as the environment or the run decides on the defaults of everything else.
    first, _ = tyro.cli(Args, args=[w for w in argv if w not in ("-h", "--help")], return_unknown_args=True)
    if first.resume is None:
        more = {k: v for pattern, found in DEFAULTS if re.fullmatch(pattern, first.env_id) for k, v in found.items()}
        return tyro.cli(Args, args=argv, default=Args(env_id=first.env_id, **more), description=__doc__)
    try:
        saved = Args(**json.loads((Path(first.resume).expanduser() / "args.json").read_text()), resume=first.resume)
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"--resume {first.resume}: not a run folder of this script ({error})") from None
    if tyro.cli(Args, args=argv, default=saved, description=__doc__) != saved:
        raise SystemExit(f"--resume {first.resume}: the run was made with other flags; give --resume alone")
    return saved


# --- Environments: MSR Jump here, everything else from EnvPool or Gymnasium ------------------------------------------
NEXT_STEP = gym.vector.AutoresetMode.NEXT_STEP
JUMP_GRID = [(x, y) for x in range(20, 46) for y in range(10, 21)]  # 286 tasks (obstacle, floor) of Agarwal et al. 2021
# Target: source tasks moved by 8 pixels, the stride of nature's two bottom layers, which see what they saw elsewhere.
JUMP_TASK_SETS = {
    "source": [(x, 10) for x in (20, 28, 36, 44)] + [(x, 18) for x in (24, 32, 40)],
    "target": [(x, 18) for x in (20, 28, 36, 44)] + [(x, 10) for x in (24, 32, 40)],
    "wide": [(x, y) for x in range(20, 46, 5) for y in (10, 15, 20)],
    "narrow": [(x, y) for x in range(28, 39, 2) for y in (13, 15, 17)],
    "random": [JUMP_GRID[i] for i in np.random.RandomState(0).choice(286, 18, replace=False)],  # always the same 18
    "grid": JUMP_GRID,
}


def parse_jump_tasks(text, flag="--jump-tasks"):
    """Task list [(obstacle x, floor height), ...] in pixels from a set's name or `20:10,30:20`. Raises SystemExit."""
    if text in JUMP_TASK_SETS:
        return JUMP_TASK_SETS[text]
    if not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text):
        raise SystemExit(f"{flag} {text}: give {', '.join(JUMP_TASK_SETS)} or a list such as 20:10,30:20")
    tasks = [tuple(map(int, pair.split(":"))) for pair in text.split(",")]
    if not all(14 <= obstacle <= 47 and floor <= 40 for obstacle, floor in tasks):
        raise SystemExit(f"{flag} {text}: obstacles must lie in 14..47 and floors in 0..40")
    return list(dict.fromkeys(tasks))


def jump_tasks(args):
    """Jump's tasks that are trained, and all that an evaluation plays, each once and the trained ones first."""
    trained, others = parse_jump_tasks(args.jump_tasks), args.jump_eval_tasks
    played = [] if others == "none" else parse_jump_tasks(others, "--jump-eval-tasks")
    return trained, list(dict.fromkeys(trained + played))


class JumpVectorEnv(gym.vector.VectorEnv):
    """N copies of MSR Jump (Tachet des Combes et al. 2018), vectorised in NumPy.

    Observations (N, 1, 60, 60) uint8, row index = height above the screen's bottom; actions 0 right, 1 jump; reward +1
    per pixel moved, -1 on a collision instead, `exit_bonus` on top at the right edge. Each copy draws its task from
    `tasks` at every reset, or plays the one named by `reset(options={"task_ids": (N,) ints})`, for 56 steps at most."""

    metadata = {"autoreset_mode": NEXT_STEP, "render_modes": []}
    SIZE, AGENT_W, AGENT_H, OBSTACLE_W, OBSTACLE_H, JUMP_HEIGHT = 60, 5, 10, 9, 10, 15  # pixels
    WHITE, GREY = 255, 128  # 1.0 and 0.5 of the reference

    def __init__(self, num_envs, tasks=JUMP_GRID, exit_bonus=100.0):
        self.num_envs, self.tasks, self.exit_bonus = num_envs, list(tasks), exit_bonus
        self.single_observation_space = gym.spaces.Box(0, 255, (1, self.SIZE, self.SIZE), np.uint8)
        self.single_action_space = gym.spaces.Discrete(2)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.task_obstacle, self.task_floor = np.array(self.tasks, dtype=np.int64).T.copy()  # (tasks,) int64 each
        # Each task's frame without its agent: obstacle, then outline and floor over it
        self.backgrounds = np.zeros((len(self.tasks), self.SIZE, self.SIZE), np.uint8)
        for frame, (x, y) in zip(self.backgrounds, self.tasks):
            frame[y : y + self.OBSTACLE_H, x : x + self.OBSTACLE_W] = self.GREY
            frame[[0, -1, y], :] = frame[:, [0, -1]] = self.WHITE
        self.agent_rows, self.agent_cols = np.divmod(np.arange(self.AGENT_H * self.AGENT_W), self.AGENT_W)  # (50,)
        self.task_ids, self.x, self.y = (np.zeros(num_envs, dtype=np.int64) for _ in range(3))
        self.jumping, self.rising, self.done = (np.zeros(num_envs, dtype=bool) for _ in range(3))

    def observe(self):
        frames = self.backgrounds[self.task_ids]  # (N, 60, 60) uint8, a fresh copy
        # The agent shows where the background is black; pixels beyond the screen fall on the outline, white already.
        rows = np.minimum(self.y[:, None] + self.agent_rows, self.SIZE - 1)  # (N, 50) int64
        cols = np.minimum(self.x[:, None] + self.agent_cols, self.SIZE - 1)
        pixels = (np.arange(self.num_envs)[:, None], rows, cols)
        frames[pixels] = np.where(frames[pixels] == 0, self.WHITE, frames[pixels])
        return frames[:, None]

    def _restart(self, mask, task_ids):
        self.task_ids[mask], self.x[mask], self.y[mask] = task_ids, 0, self.task_floor[task_ids]
        self.jumping[mask] = self.rising[mask] = self.done[mask] = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        drawn = self.np_random.integers(len(self.tasks), size=self.num_envs)
        self._restart(slice(None), (options or {}).get("task_ids", drawn))
        return self.observe(), {}

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
        self._restart(self.done.copy(), self.np_random.integers(len(self.tasks), size=self.done.sum()))
        self.done = collided | exited
        return self.observe(), rewards, self.done.copy(), np.zeros(self.num_envs, dtype=bool), {"success": success}


def make_envs(args, num_envs, seeds, evaluation):
    """A vector environment that resets a finished copy on its next step. Raises SystemExit for an unknown id."""
    # Yours, with its own --env-id: return gym.vector.SyncVectorEnv([Mine] * num_envs, autoreset_mode=NEXT_STEP)
    if args.env_id == "Jump-v0":
        return JumpVectorEnv(num_envs, jump_tasks(args)[evaluation], args.jump_reward)
    envpool = importlib.import_module("envpool") if importlib.util.find_spec("envpool") else None  # or Gymnasium alone
    envpool_ids = envpool.list_all_envs() if envpool else []
    if args.env_id in envpool_ids:
        # EnvPool presses FIRE after a lost life only if lives are episodes; ImageEnvs tells of whole games still.
        wanted = {"episodic_life": True, "reward_clip": not evaluation, "use_combined_action": True}
        options = {key: wanted[key] for key in wanted.keys() & envpool.make_spec(args.env_id).config._fields}
        return envpool.make(args.env_id, env_type="gymnasium", num_envs=num_envs, seed=seeds, **options)
    sys.path += {os.getcwd()}.difference(sys.path)  # where the user's own module is, wherever this file lies
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("PYGLET_HEADLESS", "1")  # MiniWorld draws with pyglet, which would look for a screen
    kwargs = {"window_width": 1, "window_height": 1} if args.env_id.startswith("miniworld:") else {}  # it leaks them
    options, main, file = {"autoreset_mode": NEXT_STEP}, vars(sys.modules["__main__"]), None
    if args.vectorization == "async":
        options["context"] = "spawn"  # a fork hangs where something has been drawn
        gym.logger.error = lambda text: print(text, file=sys.stderr)  # Gymnasium's fails at a % in a worker's traceback
        gym.vector.AsyncVectorEnv.__del__ = lambda envs: None  # after Ctrl-C it may wait for ever; daemons end without
        file = main.pop("__file__", None)  # else every process would run this file, torch's import and all
    try:
        return gym.make_vec(args.env_id, num_envs, args.vectorization, vector_kwargs=options, **kwargs)
    except gym.error.UnregisteredEnv:
        plain = re.sub("^ALE/|-ram|NoFrameskip|Deterministic", "", args.env_id)  # EnvPool has one name for a game
        close = difflib.get_close_matches(plain, {"Jump-v0", *envpool_ids, *gym.registry}) or ["Jump-v0"]
        hint = f"did you mean {', '.join(close)}? For control: drqv2_pisco.py --env-id walker-walk"
        raise SystemExit(f"--env-id {args.env_id}: unknown environment; {hint}") from None
    finally:
        main |= {"__file__": file} if file else {}


class ImageEnvs:
    """One face for all vector environments: images (N, C, H, W) uint8 and true episode statistics. A finished copy is
    reset by the next step, which is no transition: `terminated` and `truncated` come with the real last observation."""

    def __init__(self, args, num_envs, start=0, evaluation=False):
        # Jump has args.seed alone; elsewhere every copy has its own, another one in the evaluation and after a resume
        sequence = np.random.SeedSequence([args.seed, 0 if evaluation else 1 + start])
        seeds = (sequence.generate_state(num_envs) >> 1).tolist()  # below 2**31
        self.num_envs, self.envs = num_envs, make_envs(args, num_envs, seeds, evaluation)
        self.is_jump, spec = isinstance(self.envs, JumpVectorEnv), getattr(self.envs, "spec", None)
        self.is_envpool = hasattr(spec, "config")
        self.seeds = None if self.is_envpool else args.seed if self.is_jump else seeds  # EnvPool has its seeds already
        self.max_steps = getattr(spec.config if self.is_envpool else spec, "max_episode_steps", None)
        space, actions = self.envs.single_observation_space, self.envs.single_action_space
        shape = getattr(space, "shape", None) or ()
        if space.dtype != np.uint8 or len(shape) not in (2, 3, 4) or not isinstance(actions, gym.spaces.Discrete):
            raise SystemExit(f"--env-id {args.env_id}: needs uint8 images and Discrete actions, has {space}, {actions}")
        self.channels_last = len(shape) > 2 and shape[-1] < shape[-3]  # an image has more rows than channels
        self.num_actions, self.first_action = int(actions.n), int(getattr(actions, "start", 0))
        self.obs_shape = self._images(np.zeros((1, *shape), np.uint8)).shape[1:]  # (C, H, W)
        self.frame_stack = shape[0] if len(shape) == 4 else self.obs_shape[0] // (1 if self.obs_shape[0] % 3 else 3)

    def _images(self, obs):
        """Observations (N, [stack,] H, W[, C]) or (N, [stack,] [C,] H, W) -> (N, C, H, W), a stack folded into C."""
        obs = np.moveaxis(obs, -1, -3) if self.channels_last else obs
        return obs.reshape(len(obs), -1, *obs.shape[-2:])

    def reset(self, options=None):
        """First observations (N, C, H, W) uint8 of fresh episodes."""
        obs, _ = self.envs.reset(seed=self.seeds, options=options)
        self.returns, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)
        self.was_done, self.episodes = np.zeros(self.num_envs, dtype=bool), []
        return self._images(obs)

    def step(self, actions):
        """Takes actions (N,) int64. Returns observations (N, C, H, W) uint8, rewards (N,) float32, terminated and
        truncated (N,) bool. `self.episodes` has the episodes that ended: env, return (unscaled), length, success."""
        obs, rewards, terminated, truncated, info = self.envs.step((actions + self.first_action).astype(np.int32))
        alive = ~self.was_done  # the other rows only reset
        game = info if self.is_envpool else {}  # EnvPool's Atari: what clipping and lost lives hide
        self.returns += np.where(alive, game.get("reward", rewards), 0.0)
        self.lengths += alive
        ended = truncated | (game["terminated"].astype(bool) if "terminated" in game else terminated)
        self.episodes = []
        for i in np.flatnonzero(ended):
            length, success = int(self.lengths[i]), float(info["success"][i]) if self.is_jump else math.nan
            self.episodes += [{"env": int(i), "return": float(self.returns[i]), "length": length, "success": success}]
            self.returns[i], self.lengths[i] = 0.0, 0
        self.was_done = terminated | truncated
        return self._images(obs), np.asarray(rewards, dtype=np.float32), terminated, truncated

    def _arrays(self):
        jump = {name: getattr(self.envs, name) for name in ("task_ids", "x", "y", "jumping", "rising", "done")}
        return jump | {"returns": self.returns, "lengths": self.lengths, "was_done": self.was_done}

    def get_state(self):
        """What the next steps of Jump's copies depend on; None elsewhere, where it can't be saved."""
        if self.is_jump:
            arrays = {name: values.tolist() for name, values in self._arrays().items()}
            return {"arrays": arrays, "rng": self.envs.np_random.bit_generator.state}

    def set_state(self, state):
        """Restores get_state's result and returns the observations (N, C, H, W) uint8 that belong to it."""
        obs = self.reset()
        if state is None:
            print("this environment can't save its state: fresh episodes from here, unlike in an uninterrupted run")
            return obs
        self.envs.np_random.bit_generator.state = state["rng"]
        for name, values in self._arrays().items():
            values[:] = state["arrays"][name]
        return self.envs.observe()


# --- Networks --------------------------------------------------------------------------------------------------------
def layer_init(layer, std=2**0.5):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, 3, padding=1)  # orthogonal weights would make z too large
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv1(F.relu(self.conv0(F.relu(x))))


def nature_layers(channels):
    """The three convolutional layers of Mnih et al. 2015."""
    sizes = (channels, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)  # channels in and out, kernel, stride
    return [nn.Sequential(layer_init(nn.Conv2d(*size)), nn.ReLU(inplace=True)) for size in sizes]


def impala_layers(channels):
    """The nine layers of Espeholt et al. 2018: three times a convolution with pooling and two residual blocks."""
    layers = []
    for width in (16, 32, 32):
        conv, pool = nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1)
        layers += [nn.Sequential(conv, pool), ResidualBlock(width), ResidualBlock(width)]
        channels = width
    layers[-1] = nn.Sequential(layers[-1], nn.ReLU())  # a residual block ends without one
    return layers


def timm_layers(name, channels, black, tensors=None):
    """The stem, then each stage or block of timm's ResNet, ConvNeXt, EfficientNet, RegNet or plain ViT timm:NAME, for
    images of any size with pixels from `black` to black + 1. Random weights, or those of `tensors`, which a file of
    timm's has, or its hub's where these are empty. Raises SystemExit where there is no timm or no such model."""
    if not importlib.util.find_spec("timm"):
        raise SystemExit(f"--encoder {name}: not of this file; pip install timm==1.0.31 torchvision==0.28.0 for timm's")
    try:
        import timm
    except RuntimeError:  # PyPI's torchvision beside a CPU build of torch: declare what it couldn't load
        for operator in ("nms", "qnms"):
            torch.library.define(f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float iou) -> Tensor")
        import timm
    if not (name.startswith("timm:") and timm.is_model(name[5:])):
        raise SystemExit(f"--encoder {name}: unknown; give one that --help names, or timm: and a model of timm's")
    sizes = {"dynamic_img_size": True, "dynamic_img_pad": True} if re.match("timm:(test_)?(vit|deit)", name) else {}
    model = timm.create_model(name[5:], tensors is not None, None, {"state_dict": tensors}, in_chans=channels, **sizes)
    model.reset_classifier(0, "")  # no pooling either, which would lose where things are
    # The colours' means and deviations, in turns as timm repeats its filters (grey has red's), are never trained
    mean, std = (torch.tensor(model.pretrained_cfg[key]).repeat(channels)[:channels] for key in ("mean", "std"))
    layers = [nn.Sequential(nn.BatchNorm2d(channels, eps=0, affine=False), model)]
    layers[0][0].running_mean, layers[0][0].running_var = mean + black, std**2
    for child, module in list(model.named_children()):
        stages = module if child in ("stages", "blocks") else [module] if re.fullmatch("(layer|s)[1-9]", child) else []
        layers += [nn.Sequential(stage) for stage in stages]
        if len(layers) > 1:  # the last stage takes what follows it; what is left of the model is the stem
            layers[-1].extend([] if stages else [module])
            setattr(model, child, nn.Identity())
    return layers


class Encoder(nn.Module):
    """f: images (B, C, H, W) uint8 -> features z (B, feature_dim) float32. The layers are numbered from the bottom; the
    first `frozen` ones take no gradient and build no graph."""

    def __init__(self, args, obs_shape):
        super().__init__()
        make_layers = {"nature": nature_layers, "impala": impala_layers}.get(args.encoder)
        self.timm = None if make_layers else partial(timm_layers, args.encoder, obs_shape[0], 0.0)
        layers = make_layers(obs_shape[0]) if make_layers else self.timm()
        with torch.no_grad():
            flat = nn.Sequential(*layers).eval()(torch.zeros(1, *obs_shape)).numel()
        linear = layer_init(nn.Linear(flat, args.feature_dim))
        self.layers = nn.Sequential(*layers, nn.Sequential(nn.Flatten(), linear, nn.ReLU(inplace=True)))
        self.frozen, self.bf16 = 0, args.bf16
        shape = json.dumps(list(obs_shape))  # `about` is what a weights file must agree with
        self.about = {"architecture": args.encoder, "feature_dim": str(args.feature_dim), "observation_shape": shape}

    def freeze(self, count):
        """Freezes the `count` bottom layers, or "all"."""
        self.frozen = len(self.layers) if count == "all" else count
        if not 0 <= self.frozen <= len(self.layers):
            raise SystemExit(f"--freeze-layers {count}: this encoder has 0 to {len(self.layers)} layers to freeze")
        self.layers[: self.frozen].requires_grad_(False)

    @torch.no_grad()
    def frozen_prefix(self, obs):
        """Images (B, C, H, W) uint8 -> pixels in 0..1 through the frozen layers (B, ...), float32 or bfloat16."""
        outputs = []
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            # On a CPU, chunks that stay in its cache halve the time, and channels-last convolutions do so again.
            for chunk in obs.split(256 if self.frozen and obs.device.type == "cpu" else len(obs)):
                x = self.layers[: self.frozen](chunk.to(torch.float32, memory_format=torch.channels_last).mul_(1 / 255))
                outputs.append(x.bfloat16() if self.bf16 and self.frozen else x)  # a ViT's sums are float32
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def trained_suffix(self, hidden):
        """What frozen_prefix returns -> features z (B, feature_dim) float32."""
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.bf16):
            return self.layers[self.frozen :](hidden).float()

    def forward(self, obs):
        return self.trained_suffix(self.frozen_prefix(obs))


def make_mlp(sizes, std):
    hidden = [module for sides in zip(sizes, sizes[1:-1]) for module in (layer_init(nn.Linear(*sides)), nn.ReLU())]
    return nn.Sequential(*hidden, layer_init(nn.Linear(*sizes[-2:]), std))


class Agent(nn.Module):
    """Encoder f, policy head pi(.|z), value head, and the projector h of the self-supervised loss."""

    def __init__(self, args, encoder, num_actions):
        super().__init__()
        self.encoder, dim = encoder, args.feature_dim
        head = [dim] + [256] * args.head_layers  # sizes from z on
        self.actor, self.critic = make_mlp([*head, num_actions], std=0.01), make_mlp([*head, 1], std=1)
        self.projector = nn.Identity()
        if args.ssl == "curl":
            self.projector = nn.Linear(dim, dim, bias=False)  # CURL's bilinear similarity W
            self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)  # follows f, see update
        elif args.ssl == "simsiam" or args.ssl != "none" and args.projector != "none":
            self.projector = make_mlp([dim, args.projector_dim, dim], std=1)
            if args.projector == "residual":
                nn.init.zeros_(self.projector[-1].weight)  # with ssl_loss's sum it begins as the identity
        if args.env_id == "Jump-v0":
            # There is one right moment to jump, so a fair coin hardly ever clears an obstacle far away.
            self.actor[-1].bias.data[1] = math.log(args.jump_prior / (1 - args.jump_prior))
        self.eval()  # one policy acts, learns and is kept: no statistics move, nothing drops out

    def forward(self, obs):
        """Images (B, C, H, W) uint8 -> policy logits (B, A) and values (B,), float32."""
        z = self.encoder(obs)
        return self.actor(z), self.critic(z).squeeze(-1)


# --- Encoder weights -------------------------------------------------------------------------------------------------
def load_encoder(path, encoder):
    """Fills `encoder` from a .safetensors file, ours or timm's with its own head, or from timm's hub, and returns the
    file's metadata {str: str}. Runs no code in it. Raises SystemExit where it is missing, damaged or another one's."""
    metadata, tensors = {}, {}
    try:
        if path != "timm":
            with safetensors.safe_open(os.path.expanduser(path), "pt") as file:
                metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
        if of_timm := encoder.timm and "architecture" not in metadata:  # its own, or a file's that it has written
            tensors = nn.ModuleList(encoder.timm(tensors)).state_dict(prefix="layers.")
            metadata = encoder.about | {"objective": "pretraining", "environment": "timm's data"}
        theirs = encoder.about | metadata  # an older file may say less
        wrong = [f"{key} {theirs[key]}, this run {here}" for key, here in encoder.about.items() if theirs[key] != here]
        if wrong := "; ".join(wrong) if metadata else "no metadata, so needs --encoder timm:NAME (own: save_encoder)":
            raise SystemExit(f"--encoder-weights {path}: has {wrong}; give another file, or `none`")
        # timm has none for PPO's layer to z, which may be random as long as it is trained
        encoder.load_state_dict(tensors, strict=not of_timm or encoder.frozen == len(encoder.layers))
    except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:  # names wrong or missing tensors
        error = " ".join(f"{error}; give a .safetensors file of pretrain_encoder.py, or `none`".split())
        raise SystemExit(f"--encoder-weights {path}: {error}") from None
    return metadata


def save_encoder(path, encoder, **metadata):
    """Writes the encoder with the metadata that load_encoder checks and `metadata` that a reader wants to know."""
    versions = {"torch": torch.__version__, "gymnasium": gym.__version__, "numpy": np.__version__}
    metadata = encoder.about | {key: str(value) for key, value in metadata.items()} | {"versions": json.dumps(versions)}
    tensors = {name: tensor.contiguous().cpu() for name, tensor in encoder.state_dict().items()}
    write_atomically(Path(path), safetensors.torch.save(tensors, metadata))


def make_encoder(args, obs_shape, frame_stack, resuming):
    """The encoder, loaded and frozen as the arguments ask for; when `resuming`, the checkpoint has its weights."""
    encoder = Encoder(args, obs_shape)
    encoder.about |= {"frame_stack": str(frame_stack), "image_channels": str(obs_shape[0] // frame_stack)}
    encoder.freeze(args.freeze_layers)
    if args.encoder_weights == "none" and encoder.frozen and not args.freeze_random:
        raise SystemExit("--freeze-layers: the weights are random; give --encoder-weights, or --freeze-random")
    if args.encoder_weights != "none" and not resuming:
        about = load_encoder(args.encoder_weights, encoder)
        print(f"encoder: {args.encoder_weights}, {about.get('objective')} on {about.get('environment')}")
    for i, layer in enumerate(encoder.layers):
        size = sum(p.numel() for p in layer.parameters())
        print(f"layer {i + 1:>2}  {size:>9,} parameters  {'frozen' if i < encoder.frozen else 'trained'}")
    return encoder


# --- Augmentations and losses: pure functions ------------------------------------------------------------------------
def random_shift(images, pixels):
    """Shifts each image by its own random whole number of pixels, -pixels..pixels in both axes, replicating the border.
    images (B, C, H, W), any dtype -> the same, a view with channels last. The shift of DrQ (Kostrikov et al. 2021)."""
    b, c, h, w = images.shape
    rows, cols = h + 2 * pixels + 1, w + 2 * pixels  # with replicated borders; below a row more, for windows to end in
    dy, dx = torch.randint(2 * pixels + 1, (2, b), device=images.device)  # (B,) int64 each: 0 is the largest shift back
    x = images.permute(0, 2, 3, 1).index_select(1, (torch.arange(rows, device=images.device) - pixels).clamp_(0, h - 1))
    x = torch.cat([x[:, :, :1].expand(-1, -1, pixels, -1), x, x[:, :, -1:].expand(-1, -1, pixels, -1)], 2)
    windows = x.flatten().unfold(0, h * cols * c, c)  # a view: from every pixel on, as much as H rows have
    start = (torch.arange(b, device=images.device) * rows + dy) * cols + dx  # one window an image, copied at once
    return windows.index_select(0, start).view(b, h, cols, c)[:, :, :w].permute(0, 3, 1, 2)


def random_noise(images, std=12.75):
    """Adds Gaussian noise to every pixel, 5% of the range by default; uint8 in and out."""
    return (images + std * torch.randn(images.shape, device=images.device)).round_().clamp_(0, 255).to(torch.uint8)


def augment(images, args):
    """One draw of the augmentation A: (B, C, H, W) uint8 -> (B, C, H, W) uint8."""
    return random_noise(images) if args.augmentation == "noise" else random_shift(images, args.shift_pixels)


def categorical_kl(p_logits, q_logits):
    """KL(p || q) of categorical distributions, exact: logits (B, A) -> (B,)."""
    p, q = F.log_softmax(p_logits, dim=-1), F.log_softmax(q_logits, dim=-1)
    return (p.exp() * (p - q)).sum(-1)


def pisco_loss(teacher_logits, student_logits):
    """PiSCO in one direction (Arnold and Sha 2023): mean KL(sg pi(.|z1) || pi(.|p2)), logits (B, A) at the teacher's
    features z1 and the student's projected ones p2 = h(z2). The gradient flows through the latter alone."""
    return categorical_kl(teacher_logits.detach(), student_logits).mean()


def simsiam_loss(z, p):
    """Negative cosine similarity of the teacher's features sg z and the student's p, (B, D) each (Chen and He 2021)."""
    return -F.cosine_similarity(z.detach(), p, dim=-1).mean()


def info_nce_loss(keys, queries):
    """InfoNCE (van den Oord et al. 2018): query i (B, D) has to pick key i out of all keys (B, D), by dot product."""
    return F.cross_entropy(queries @ keys.T, torch.arange(len(keys), device=keys.device))


def compute_gae(rewards, values, next_value, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): advantages and returns, (T, N) float32. rewards,
    values, terminated, truncated are (T, N), next_value (N,). values[t + 1] is V of the observation that step t led to,
    an episode's last one included: so a truncated episode bootstraps from it and a terminated one does not."""
    next_values = torch.cat([values[1:], next_value[None]])
    deltas = rewards + gamma * next_values * (~terminated) - values
    discounts = gamma * gae_lambda * (~(terminated | truncated))
    advantages, lastgaelam = torch.zeros_like(values), torch.zeros_like(next_value)
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


def ssl_loss(agent, z_teacher, z_student, hidden_teacher, args):
    """The loss of students with features z_student (n, D) that learn from teachers with z_teacher and frozen_prefix
    hidden_teacher. With two views both are both views, the first one's rows first, and each learns from the other."""
    p, z_teacher = agent.projector(z_student), z_teacher.detach()
    if args.projector == "residual" and args.ssl != "curl":
        p = z_student + p
    if args.ssl == "pisco":
        loss, teacher, student = pisco_loss, agent.actor(z_teacher), agent.actor(p)
    elif args.ssl == "simsiam":
        loss, teacher, student = simsiam_loss, z_teacher, p
    elif args.ssl == "curl":
        loss, teacher, student = info_nce_loss, agent.key_encoder.trained_suffix(hidden_teacher), p
    directions = 2 if args.ssl_teacher == "view" else 1
    pairs = zip(teacher.chunk(directions), student.chunk(directions)[::-1])
    return sum(loss(*pair) for pair in pairs) / directions


# --- Rollout and update ----------------------------------------------------------------------------------------------
def sample(probs, generator=None):
    """Actions (B,) int64 drawn from probabilities (B, A), as torch.multinomial draws them, which halts a GPU twice."""
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)


@torch.no_grad()
def collect_rollout(agent, envs, next_obs, args):
    """T steps of N copies from next_obs (N, C, H, W) uint8 -> rollout, next_obs after it, its values, ended episodes"""
    steps, episodes = [], []
    for _ in range(args.num_steps):
        hidden = agent.encoder.frozen_prefix(next_obs)
        z = agent.encoder.trained_suffix(hidden)
        logits, value = agent.actor(z), agent.critic(z).squeeze(-1)
        log_probs = F.log_softmax(logits, dim=-1)
        action = sample(log_probs.exp())
        was_done = envs.was_done
        obs, rewards, terminated, truncated = envs.step(action.cpu().numpy())
        step = {
            "obs": next_obs.movedim(1, -1),  # (N, H, W, C) uint8
            "actions": action,  # (N,) int64
            "logprobs": log_probs.gather(1, action[:, None]).squeeze(1),  # (N,) float32
            "values": value,  # (N,) float32
            "rewards": torch.from_numpy(rewards) * args.reward_scale,  # (N,) float32, on the CPU like the next three
            "terminated": torch.tensor(terminated),  # (N,) bool, a copy: the environment may use its array again
            "truncated": torch.tensor(truncated),  # (N,) bool
            "valid": torch.from_numpy(~was_done),  # (N,) bool: False where a step only reset its copy
        }
        if agent.encoder.frozen:  # computed once: all epochs start from it
            step["hidden"] = hidden.movedim(1, -1)  # (N, H', W', C'), (N, D) or (N, D, tokens), float32 or bfloat16
        steps.append(step)
        next_obs = torch.from_numpy(obs).to(next_obs.device, memory_format=torch.channels_last, copy=True)
        episodes += envs.episodes
    rollout = SimpleNamespace(**{name: torch.stack([step[name] for step in steps]) for name in steps[0]})  # (T, N, ...)
    return rollout, next_obs, agent(next_obs)[1], episodes


def minibatch_loss(agent, obs, hidden, actions, logprobs, advantages, returns, values, args):
    """L = L_RL + lambda L_ssl on one minibatch -> loss, statistics, and the encoder's frozen_prefix and z of all rows.
    obs (B, C, H, W) uint8, None where no one needs them; hidden (B, ...) their frozen_prefix, or None; the rest (B,)"""
    b = math.ceil(args.ssl_fraction * len(actions)) if args.ssl != "none" else 0  # rows of the self-supervised loss
    views = [augment(obs[:b], args) for _ in range(1 if args.ssl_teacher == "state" else 2)] if b else []
    if hidden is None:
        hidden = agent.encoder.frozen_prefix(torch.cat([obs, *views]) if b else obs)
    elif b:
        hidden = torch.cat([hidden, agent.encoder.frozen_prefix(torch.cat(views))])
    features = agent.encoder.trained_suffix(hidden)  # the states' B rows, then b for every view
    z, z_views = features[: len(actions)], features[len(actions) :]
    logits, newvalue = agent.actor(z), agent.critic(z).squeeze(-1)
    loss, stats = ppo_loss(logits, newvalue, actions, logprobs, advantages, returns, values, args)
    stats["dead_features"] = (z == 0).all(dim=0).float().mean()
    if b:
        teachers = slice(b) if args.ssl_teacher == "state" else slice(len(actions), None)
        stats[args.ssl] = ssl_loss(agent, features[teachers], z_views, hidden[teachers], args)
        loss = loss + args.ssl_coef * stats[args.ssl]
    return loss, {name: value.detach() for name, value in stats.items()}, (hidden, features)


def ssl_grad_share(encoder, hidden, features, count):
    """Norm of lambda L_ssl's gradient over the norm of L_RL's, on the encoder's trained parameters, after the backward
    pass of both: the last `count` rows are the views', which take the gradient of L_ssl alone."""
    trained = [p for p in encoder.parameters() if p.requires_grad]
    ssl_grads = torch.autograd.grad(encoder.trained_suffix(hidden[-count:]), trained, features.grad[-count:])
    rl_grads = [p.grad - grad for p, grad in zip(trained, ssl_grads)]
    return nn.utils.get_total_norm(ssl_grads) / (nn.utils.get_total_norm(rl_grads) + 1e-12)


def update(agent, optimizer, rollout, next_value, args, measure=True):
    """One iteration's epochs over the rollout -> means of the minibatches' statistics; `measure`: ssl_grad_share too"""
    loss_function = torch.compile(minibatch_loss) if args.compile else minibatch_loss
    device = rollout.obs.device
    advantages, returns = compute_gae(rollout.rewards, rollout.values.cpu(), next_value.cpu(), rollout.terminated,
        rollout.truncated, args.gamma, args.gae_lambda)  # fmt: skip
    # (T * N, H, W, C) uint8 and (T * N, ...) as in the rollout; None where no minibatch needs it
    b_obs = None if agent.encoder.frozen and args.ssl == "none" else rollout.obs.flatten(0, 1)
    b_hidden = rollout.hidden.flatten(0, 1) if agent.encoder.frozen else None
    b_actions, b_logprobs, b_values = rollout.actions.flatten(), rollout.logprobs.flatten(), rollout.values.flatten()
    b_advantages, b_returns = advantages.flatten().to(device), returns.flatten().to(device)  # (T * N,) each
    valid_inds = rollout.valid.flatten().nonzero().squeeze(1)
    measure &= args.ssl != "none" and args.ssl_fraction > 0 and agent.encoder.frozen < len(agent.encoder.layers)
    history, once = [], {}  # statistics of every minibatch, and those that one minibatch of an iteration is enough for
    for _ in range(args.update_epochs):
        # Every minibatch has the same size: a few rows, drawn at random, come twice in place of the rows left out.
        order = valid_inds[torch.randperm(len(valid_inds))]
        order = order.repeat(math.ceil(len(b_actions) / len(order)))[: len(b_actions)].to(device)
        for mb_inds in order.chunk(args.num_minibatches):
            # (B, C, H, W) and frozen_prefix's (B, ...), whole images copied at once
            mb_obs = None if b_obs is None else b_obs.index_select(0, mb_inds).movedim(-1, 1)
            mb_hidden = None if b_hidden is None else b_hidden.index_select(0, mb_inds).movedim(-1, 1)
            measured = measure and not history
            loss, stats, (hidden, features) = (minibatch_loss if measured else loss_function)(agent, mb_obs, mb_hidden,
                b_actions[mb_inds], b_logprobs[mb_inds], b_advantages[mb_inds], b_returns[mb_inds], b_values[mb_inds],
                args)  # fmt: skip
            optimizer.zero_grad()
            if measured:
                features.retain_grad()
            loss.backward()
            if measured:
                once["ssl_grad_share"] = ssl_grad_share(agent.encoder, hidden, features, len(features) - len(mb_inds))
            stats["grad_norm_trained"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            if args.ssl == "curl":
                for key, query in zip(agent.key_encoder.parameters(), agent.encoder.parameters()):
                    key.lerp_(query.detach(), args.curl_tau)
            history.append(stats)
        if args.target_kl is not None and stats["approx_kl"] > args.target_kl:
            break
    with torch.no_grad(), torch.random.fork_rng([]):  # on a CPU the training's random numbers are the same without it
        states = rollout.obs.flatten(0, 1)[mb_inds[:64]].movedim(-1, 1)
        logits, view_logits = (agent(obs)[0] for obs in (states, augment(states, args)))
        once["view_agreement"] = (logits.argmax(-1) == view_logits.argmax(-1)).float().mean()
    # One transfer of all statistics, and a look at the last step's logits: the only waits for the device.
    means = torch.stack([torch.stack(list(stats.values())) for stats in history]).mean(dim=0)
    means = dict(zip([*history[0], *once], torch.cat([means, torch.stack(list(once.values()))]).tolist()))
    if not all(math.isfinite(mean) for mean in means.values()) or not logits.isfinite().all():
        raise SystemExit("the loss is not finite; try a smaller --learning-rate or --ssl-coef")
    y_pred, y_true = rollout.values.cpu().flatten()[valid_inds], returns.flatten()[valid_inds]
    if (var_y := y_true.var(correction=0)) > 0:
        means["explained_variance"] = float(1 - (y_true - y_pred).var(correction=0) / var_y)
    return means


# --- Evaluation ------------------------------------------------------------------------------------------------------
@torch.no_grad()
def play_episodes(agent, envs, args, device, greedy, images=None):
    """The first episode of every copy: a list of dicts as in ImageEnvs.step, in the copies' order. The first copy's
    observations (C, H, W) uint8 are appended to `images`, where given, thinned out to 160 pixels at most."""
    generator = torch.Generator(device).manual_seed(args.seed + 1_000_003)  # leaves the training's alone
    obs = envs.reset({"task_ids": np.arange(envs.num_envs)} if envs.is_jump else None)
    episodes, limit = [None] * envs.num_envs, 2 * (envs.max_steps or 0) or args.eval_max_steps  # lost lives add steps
    thin = math.ceil(max(envs.obs_shape[1:]) / 160)
    for _ in range(limit):
        if images is not None and episodes[0] is None and len(images) < 1000:
            images.append(obs[0, :, ::thin, ::thin].copy())
        playing = [i for i, episode in enumerate(episodes) if episode is None]  # the policy need not see the others
        logits, _ = agent(torch.as_tensor(obs[playing], device=device))
        action = logits.argmax(-1) if greedy else sample(logits.softmax(-1), generator)
        actions = np.zeros(envs.num_envs, dtype=np.int64)
        actions[playing] = action.cpu().numpy()
        obs, *_ = envs.step(actions)
        for episode in envs.episodes:
            episodes[episode["env"]] = episodes[episode["env"]] or episode
        if None not in episodes:
            return episodes
    print(f"evaluation: {episodes.count(None)} of {len(episodes)} episodes were cut off after {limit} steps")
    cut_off = [{"return": float(r), "length": int(n), "success": 0.0} for r, n in zip(envs.returns, envs.lengths)]
    return [episode or cut for episode, cut in zip(episodes, cut_off)]


def evaluate(agent, args, device, global_step, folder):
    """Plays greedy and sampled episodes, writes evaluation.json and pictures, and returns the averages by name."""
    is_jump = args.env_id == "Jump-v0"
    trained, tasks = jump_tasks(args) if is_jump else ([], [])
    results, metrics, images = {"global_step": global_step, "env_id": args.env_id}, {}, []
    for policy in ("greedy", "sampled"):
        envs, greedy = ImageEnvs(args, len(tasks) or args.eval_episodes, evaluation=True), policy == "greedy"
        episodes = play_episodes(agent, envs, args, device, greedy, images if args.capture_video and greedy else None)
        envs.envs.close()
        results[policy] = {key: [e[key] for e in episodes[: len(trained) or None]] for key in ("return", "length")}
        metrics[f"eval/{policy}_return"] = float(np.mean(results[policy]["return"]))
        if is_jump:
            solved = [episode["success"] == 1.0 for episode in episodes]
            metrics[f"eval/{policy}_success"] = float(np.mean(solved[: len(trained)]))
            if len(tasks) > len(trained):
                metrics[f"eval/{policy}_unseen_success"] = float(np.mean(solved[len(trained) :]))
            results[policy]["trained_tasks"] = [f"{x}:{y}" for x, y in trained]
            results[policy]["solved"] = {f"{x}:{y}": task_solved for (x, y), task_solved in zip(tasks, solved)}
    write_atomically(folder / "evaluation.json", json.dumps(results | {"metrics": metrics}, indent=1).encode())
    if is_jump:  # greedy: obstacle to the right, floor up; white: solved, grey: not; yellow and olive where trained
        solved, columns, rows = results["greedy"]["solved"], *(sorted(set(axis)) for axis in zip(*tasks))
        shades = [[{True: 255, False: 90, None: 0}[solved.get(f"{x}:{y}")] for x in columns] for y in reversed(rows)]
        image = np.array(shades, np.uint8)[..., None].repeat(3, -1)  # (floors, obstacles, 3)
        for x, y in trained:
            image[-1 - rows.index(y), columns.index(x), 2] = 0
        Image.fromarray(image.repeat(16, 0).repeat(16, 1)).save(folder / "solved.png")
    if images:
        write_gif(folder / f"evaluation_{global_step}.gif", [image[:, ::-1] if is_jump else image for image in images])
    return metrics


def write_gif(path, images):
    """GIF, twice as large, of the newest images of observations [(C, H, W) uint8, ...]."""
    newest = [image[-3:] if len(image) % 3 == 0 else image[-1:].repeat(3, 0) for image in images]  # threes are colours
    first, *rest = (Image.fromarray(image.transpose(1, 2, 0).repeat(2, 0).repeat(2, 1)) for image in newest)
    first.save(path, save_all=True, append_images=rest, duration=50, loop=0)


# --- Run folder ------------------------------------------------------------------------------------------------------
def make_run_folder(args):
    """runs/<env>__<exp>__<seed>__<time> with args.json in it; time is in microseconds, as runs may start together."""
    name = re.sub(r"[^\w.-]+", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 1000}")
    folder = Path(args.runs_dir).expanduser() / name
    folder.mkdir(parents=True)
    arguments = {key: value for key, value in asdict(args).items() if key != "resume"}
    write_atomically(folder / "args.json", json.dumps(arguments, indent=2).encode())
    return folder


def write_atomically(path, data):
    """Writes bytes to a file beside `path` and moves it there once it is on the disk, so that a kill does no harm."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def append_metrics(path, row):
    """Appends a row {column: number} to a CSV file. A column that is new, a rare thing, has the file written anew."""
    with open(path, "a+") as file:
        file.seek(0)
        columns = re.findall(r"[^,\n]+", file.readline())
        if new := [column for column in row if column not in columns]:
            rows = file.read().replace("\n", "," * len(new) + "\n")
            write_atomically(path, (",".join(columns + new) + "\n" + rows).encode())
            return append_metrics(path, row)
        print(*(row.get(column, "") for column in columns), sep=",", file=file, flush=True)
        os.fsync(file.fileno())


def load_checkpoint(folder, device):
    """The checkpoint of a run folder, None before the first one. Never unpickles code. Raises SystemExit if damaged."""
    path = Path(folder).expanduser() / "checkpoint.pt"
    if not path.exists():
        return None
    if not zipfile.is_zipfile(path) or zipfile.ZipFile(path).testzip():  # its checksums: torch.load looks at none
        raise SystemExit(f"--resume {folder}: checkpoint.pt is damaged; start the run anew")
    return torch.load(path, map_location=device, weights_only=True)


# --- Training --------------------------------------------------------------------------------------------------------
def set_up(args):
    """Seeds, threads and memory. Returns the device."""
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    # Dead units leave Adam's averages with denormal numbers, on which a CPU is slow. Worker threads inherit the mode.
    torch.set_flush_denormal(True)
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    # Keep freed memory: else glibc maps every large activation anew, which costs an update a third more.
    libc = ctypes.CDLL(None)  # the options are M_MMAP_MAX, M_TRIM_THRESHOLD and M_TOP_PAD; without glibc there is none
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)) if hasattr(libc, "mallopt") else ():
        libc.mallopt(option, value)
    return torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")


def train(args, program=(__file__,)):
    """One whole run. Returns its folder. Raises SystemExit, naming the flag and the remedy, where none is possible."""
    batch_size = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // batch_size
    if batch_size % args.num_minibatches or batch_size < 2 * args.num_minibatches:
        raise SystemExit(f"--num-minibatches: cut num_envs * num_steps = {batch_size} into equal parts of 2 or more")
    if not num_iterations:
        raise SystemExit(f"--total-timesteps {args.total_timesteps}: less than num_envs * num_steps = {batch_size}")
    if not 0 <= args.ssl_fraction <= 1:
        raise SystemExit(f"--ssl-fraction {args.ssl_fraction}: a share of the minibatch; give 0 to 1")
    device = set_up(args)
    state = load_checkpoint(args.resume, device) if args.resume else None
    start = state["iteration"] if state else 0
    envs = ImageEnvs(args, args.num_envs, start)
    encoder = make_encoder(args, envs.obs_shape, envs.frame_stack, resuming=state is not None)
    agent = Agent(args, encoder, envs.num_actions).to(device, memory_format=torch.channels_last)
    trained = [p for p in agent.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=args.learning_rate, eps=1e-5, fused=True)
    row, episodes, seconds = [state[name] for name in ("row", "episodes", "seconds")] if state else ({}, [], 0.0)
    if state:
        agent.load_state_dict(state["agent"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"].cpu())
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
    next_obs = envs.set_state(state["envs"]) if state else envs.reset()  # (N, C, H, W) uint8
    next_obs = torch.from_numpy(next_obs).to(device, memory_format=torch.channels_last, copy=True)
    folder = Path(args.resume).expanduser() if args.resume else make_run_folder(args)
    try:  # The file stays open: the system unlocks it when this process ends, be it by a kill.
        fcntl.lockf(os.open(folder / "args.json", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):  # Another error comes from a mount that has no locks.
            raise SystemExit(f"--resume {folder}: another process is at work in it; wait for its end") from None
    cmd = shlex.join(["python", *program, "--resume", str(folder)])
    print(f"device: {device}, {torch.get_num_threads()} threads\nrun folder: {folder}\nafter a kill: {cmd}", flush=True)
    if args.track:
        import wandb

        about = {"project": args.wandb_project_name, "name": folder.name, "id": folder.name, "config": asdict(args)}
        wandb.init(**about, resume="allow", sync_tensorboard=True)
    # What a killed run logged from its checkpoint on is dropped. In metrics.csv the columns' names are the first line.
    for path in folder.glob("metrics.csv"):
        write_atomically(path, b"".join(path.read_bytes().splitlines(keepends=True)[: max(start, 1)]))
    writer = SummaryWriter(folder, purge_step=start * batch_size if args.resume else None)
    bar = tqdm(initial=start * batch_size, total=num_iterations * batch_size, unit="step", unit_scale=True,
        file=sys.stdout, mininterval=0.5 if sys.stdout.isatty() else 30, dynamic_ncols=True)  # fmt: skip
    eval_every, checkpoint_every = (k if k > 0 else math.inf for k in (args.eval_interval, args.checkpoint_interval))
    for iteration in range(start or 1, num_iterations + 1):  # the checkpoint's again, whose evaluation may be missing
        global_step, last = iteration * batch_size, iteration == num_iterations
        evaluation_due = args.eval_episodes > 0 and (last or global_step % eval_every < batch_size)
        if iteration > start:
            began = time.perf_counter()
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = (1.0 - (iteration - 1.0) / num_iterations) * args.learning_rate
            rollout, next_obs, next_value, ended = collect_rollout(agent, envs, next_obs, args)
            # The share is measured on one of 24 minibatches at most, which takes less than 2% of the time.
            measure = (iteration - 1) % math.ceil(24 / (args.update_epochs * args.num_minibatches)) == 0
            losses = update(agent, optimizer, rollout, next_value, args, measure) if rollout.valid.any() else {}
            episodes = (episodes + ended)[-100:]  # charts/* are their means
            seconds += time.perf_counter() - began
            row = {"global_step": global_step, "charts/SPS": global_step / seconds}
            row["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            if episodes:
                mean = {name: float(np.mean([episode[name] for episode in episodes])) for name in episodes[0]}
                row |= {"charts/episodic_return": mean["return"], "charts/episodic_length": mean["length"]}
                row |= {"charts/success": mean["success"]} if envs.is_jump else {}
                bar.set_postfix({"return": f"{mean['return']:.2f}"}, refresh=False)
            row |= {f"losses/{name}": value for name, value in losses.items()}
            bar.update(batch_size)
            if last or evaluation_due or iteration % checkpoint_every == 0:
                state = {
                    "iteration": iteration, "agent": agent.state_dict(), "optimizer": optimizer.state_dict(),
                    "envs": envs.get_state(), "row": row, "episodes": episodes, "seconds": seconds,
                    "torch_rng": torch.get_rng_state(),
                    "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
                }  # fmt: skip
                torch.save(state, buffer := io.BytesIO())
                write_atomically(folder / "checkpoint.pt", buffer.getvalue())
        if last:
            envs.envs.close()  # a simulator may be there once only
            tensors = {name: tensor.contiguous() for name, tensor in agent.state_dict().items()}
            write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors))
            save_encoder(folder / "encoder.safetensors", encoder, environment=args.env_id, steps=global_step,
                objective=f"rl (ppo, ssl {args.ssl})", tasks=args.jump_tasks if envs.is_jump else "",
                seed=args.seed)  # fmt: skip
        # After checkpoint and weights, as it can take long, and fail: a run that ends in it comes back to it at once.
        if evaluation_due:
            row |= evaluate(agent, args, device, global_step, folder)
        append_metrics(folder / "metrics.csv", row)
        for name, number in row.items():
            writer.add_scalar(name, number, global_step)
    bar.close()
    writer.close()
    print("evaluation:", ", ".join(f"{key[5:]} {score:.3f}" for key, score in row.items() if "eval/" in key) or "none")
    return folder


if __name__ == "__main__":
    train(parse_args())
