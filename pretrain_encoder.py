"""Make encoder weights for --encoder-weights of the algorithms, and probe how many of an encoder's layers to freeze.

    python pretrain_encoder.py                                        # rl: PPO on MSR Jump's source tasks
    python pretrain_encoder.py --env-id cartpole-balance              # rl: DrQ-v2; further flags go to the algorithm
    python pretrain_encoder.py --objective state                      # regress the environment's true state
    python pretrain_encoder.py --objective simsiam --frames my_frames --env-id Pong-v5 --frame-stack 4   # no reward
    python pretrain_encoder.py --resume runs/Jump-v0__state__1__1700000000      # go on with a killed run
    python pretrain_encoder.py probe --encoder-weights encoders/jump-v0__nature__rl.safetensors

`--objective rl` is the way of Arnold and Sha, arXiv 2302.06009: ppo_pisco.py or drqv2_pisco.py is run as a program from
random weights, without a self-supervised loss and without frozen layers, and its heads are discarded. `state` is
supervised regression from frames to the true state, `simsiam` (Chen and He 2021) needs frames alone. `--help` shows the
flags of rl, `--objective state --help` those of the other two and `probe --help` those of the probe. The file reads top
to bottom: arguments, environments, data, networks, losses, run folder, weights file, pretraining, RL, probe, main.
"""

import contextlib
import csv
import ctypes
import difflib
import importlib.util
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import asdict, dataclass, fields
from functools import cached_property, partial
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

PPO = Path(__file__).resolve().with_name("ppo_pisco.py")
DRQV2 = Path(__file__).resolve().with_name("drqv2_pisco.py")
ENCODERS = Path(__file__).resolve().with_name("encoders")


class UsageError(Exception):
    """What the user asked for can't be done; the message is one line that names the flag or file and the remedy."""


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class RLArgs:
    """--objective rl. All other flags go to ppo_pisco.py or, on the DeepMind Control suite, to drqv2_pisco.py."""

    objective: Literal["rl", "state", "simsiam"] = "rl"
    """what the encoder is trained for"""
    output: str | None = None
    """weights file to write (default: encoders/<env>__<encoder>__rl.safetensors, the file that the algorithms load)"""
    env_id: str = "Jump-v0"
    """source environment: Jump-v0, an EnvPool id, a Gymnasium id or a domain-task of the DeepMind Control suite"""
    jump_tasks: str = "source"
    """Jump-v0: the source tasks, a set's name or a list of obstacle:floor"""
    encoder: Literal["nature", "impala", "drqv2"] | None = None
    """architecture: nature or impala (default: nature; the DeepMind Control suite has drqv2)"""
    total_timesteps: int | None = None
    """environment steps (default: 300,000), on the DeepMind Control suite frames (default: that of drqv2_pisco.py)"""
    seed: int = 1
    """seed of the run"""
    runs_dir: str = "runs"
    """folder in which the training's run folder is made"""
    resume: str | None = None
    """run folder of a killed pretraining to go on with"""
    force: bool = False
    """replace the output file if there is one"""


@dataclass
class Args:
    """--objective state and --objective simsiam."""

    # Experiment
    objective: Literal["state", "simsiam"] = "state"
    """what the encoder is trained for"""
    output: str | None = None
    """weights file to write (default: encoders/<env>__<encoder>__<objective>.safetensors)"""
    force: bool = False
    """replace the output file if there is one"""
    seed: int = 1
    """seed of the data, the initial weights, the batches and the augmentation"""
    runs_dir: str = "runs"
    """folder in which the run folder is made"""
    resume: str | None = None
    """run folder of a killed run to go on with; every other argument but --output and --force comes from that run"""
    cuda: bool = True
    """use a CUDA device where there is one"""
    torch_deterministic: bool = True
    """ask cuDNN for deterministic algorithms"""
    torch_threads: int = 0
    """CPU threads of PyTorch (0: PyTorch's own choice, one per physical core)"""
    eval_interval: int = 250
    """updates between two evaluations on the held-out data, with a row in metrics.csv and a checkpoint each"""

    # Data
    env_id: str = "Jump-v0"
    """Jump-v0 or a domain-task of the DeepMind Control suite; with --frames the environment that they are from"""
    jump_tasks: str = ""
    """Jump-v0: a set's name or a list of obstacle:floor (default: the grid without the target tasks)"""
    frames: str | None = None
    """simsiam: folder of the user's own frames: .png or .jpg images, .npy or .npz arrays of uint8 (N, C, H, W),
    (N, H, W, C) or (N, H, W), each array one sequence, all images together one more in their names' order"""
    num_frames: int = 20_000
    """frames that are rendered; --frames takes all there are"""
    frame_stack: int | None = None
    """frames that make an observation (default: 3 with drqv2, else 1)"""
    image_size: int = 84
    """DeepMind Control: height and width of a frame in pixels"""
    action_repeat: int = 2
    """DeepMind Control: frames for which every action is repeated"""
    render_quality: Literal["standard", "fast"] = "standard"
    """DeepMind Control: as in drqv2_pisco.py; choose what the encoder is going to see there"""

    # Encoder
    encoder: Literal["nature", "impala", "drqv2"] | None = None
    """architecture (default: drqv2 on the DeepMind Control suite, else nature)"""
    feature_dim: int = 256
    """nature, impala: size of the encoder's output z"""

    # Training
    total_steps: int = 5_000
    """most updates"""
    target_r2: float = 0.999
    """state: stop once the held-out R2, averaged over the state's dimensions, reaches this"""
    batch_size: int = 128
    """observations per update"""
    learning_rate: float | None = None
    """learning rate of Adam (default: 1e-3, with drqv2 3e-4)"""
    augmentation: Literal["shift", "noise"] = "shift"
    """simsiam: random augmentation that makes the views"""
    shift_pixels: int = 4
    """simsiam: largest shift in pixels, in each direction"""
    projector_dim: int = 256
    """simsiam: width of the projector; the predictor's hidden layer has a quarter of it"""


@dataclass
class ProbeArgs:
    """probe: what does a linear model read from every layer?"""

    encoder_weights: str = str(ENCODERS / "jump-v0__nature__rl.safetensors")
    """the .safetensors file to probe"""
    env_id: str | None = None
    """source environment: Jump-v0 or a domain-task of the DeepMind Control suite (default: that of the weights file)"""
    target_env_id: str | None = None
    """DeepMind Control: the environment to transfer to"""
    jump_source: str = "source"
    """Jump-v0: source tasks, a set's name or a list of obstacle:floor"""
    jump_target: str = "target"
    """Jump-v0: target tasks, likewise"""
    output: str | None = None
    """folder for probe.csv and probe.png (default: runs/probe__<name of the weights file>)"""
    seed: int = 1
    """seed of the frames; the random encoders have the seeds that follow"""
    num_random: int = 3
    """randomly initialised encoders of the same architecture, the control"""
    episodes: int = 100
    """DeepMind Control: episodes of each environment, of five observations each; an eighth is held out at a time"""
    action_repeat: int = 2
    """DeepMind Control: frames for which every action is repeated"""
    render_quality: Literal["standard", "fast"] = "standard"
    """DeepMind Control: as in drqv2_pisco.py"""
    tolerance: float = 0.05
    """score that a frozen layer may lose against the best layer on the target tasks"""
    torch_threads: int = 0
    """CPU threads of PyTorch (0: PyTorch's own choice, one per physical core)"""


# ---------------------------------------------------------------------------------------------------------------------
# Environments: MSR Jump and the DeepMind Control suite, as the algorithms have them
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


RENDER_PROBE = "from dm_control import _render; _render.Renderer(8, 8).make_current().__enter__()"
RENDER_REMEDY = (
    "install EGL (Debian, Ubuntu: apt-get install libegl1 libgl1 libgl1-mesa-dri) or, for MUJOCO_GL=osmesa, OSMesa "
    "(apt-get install libosmesa6 libgl1)"
)


def choose_renderer():
    """Sets MUJOCO_GL, where the user has not, to the first of EGL and OSMesa that works. Raises UsageError.

    dm_control fixes its renderer when it is imported, so another process has to try.
    """
    if importlib.util.find_spec("dm_control") is None:
        raise UsageError("dm_control is not installed; pip install dm-control")
    if os.environ.get("MUJOCO_GL") or "dm_control._render" in sys.modules:
        return
    for name in ("egl", "osmesa"):
        probe = [sys.executable, "-c", RENDER_PROBE]
        done = subprocess.run(probe, env=os.environ | {"MUJOCO_GL": name}, capture_output=True, text=True)
        if done.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return
    reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    raise UsageError(f"rendering: neither EGL nor OSMesa works here ({reason}); {RENDER_REMEDY}")


class DMCPixels(gym.Env):
    """One task of the DeepMind Control suite, seen through a camera.

    Observations (3, H, W) uint8, a single frame: stacking is the caller's. Actions (A,) float32 in -1..1, scaled to
    the task's bounds and repeated `action_repeat` times, with their rewards summed. `terminated` is a true end of the
    task (discount 0) or of a simulation that diverges, which ends with a black frame and the rewards so far;
    `truncated` is the time limit.
    """

    def __init__(self, env_id, image_size=84, action_repeat=2, quality="standard"):
        choose_renderer()
        try:
            from dm_control import suite
            from dm_control.mujoco.engine import Camera
            from dm_control.rl.control import PhysicsError
        except Exception as error:  # whatever a renderer that can't be loaded raises
            raise UsageError(f"MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {error}; {RENDER_REMEDY}") from None
        domain, _, task = env_id.partition("-")
        if (domain, task) not in suite.ALL_TASKS:
            known = ["-".join(pair) for pair in suite.ALL_TASKS]
            close = difflib.get_close_matches(env_id, known, n=3) or ["cartpole-swingup", "walker-walk", "cheetah-run"]
            raise UsageError(f"--env-id {env_id}: unknown environment; did you mean {', '.join(close)}?")
        self.env, self.divergence = suite.load(domain, task), PhysicsError
        self.low, self.high = self.env.action_spec().minimum, self.env.action_spec().maximum  # (A,) float64 each
        if not (math.isfinite(self.env._step_limit) and np.isfinite([self.low, self.high]).all()):
            raise UsageError(f"--env-id {env_id}: its episodes or actions have no bounds; choose another one")
        self.action_repeat = action_repeat
        self.observation_space = gym.spaces.Box(0, 255, (3, image_size, image_size), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.low.shape, np.float32)

        model = self.env.physics.model
        # A framebuffer of the image's size instead of 640x480: the same pixels, and less to clear.
        model.vis.global_.offwidth = model.vis.global_.offheight = image_size
        if quality == "fast":
            model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
            model.light_castshadow[:] = 0
            model.mat_reflectance[:] = 0
        try:
            # One camera for good: physics.render makes a new scene for every frame.
            self.camera = Camera(self.env.physics, image_size, image_size, 2 if domain == "quadruped" else 0)
            self._observe()
        except Exception as error:
            raise UsageError(
                f"rendering with MUJOCO_GL={os.environ.get('MUJOCO_GL')} failed ({error}); {RENDER_REMEDY}"
            ) from None

    @property
    def max_steps(self):
        """Steps of the longest episode."""
        return math.ceil(math.ceil(self.env._step_limit) / self.action_repeat)

    def _observe(self):
        return np.ascontiguousarray(self.camera.render().transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W) uint8

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task.random.seed(seed)
        self.env.reset()
        return self._observe(), {}

    def step(self, action):
        action = self.low + (self.high - self.low) * (np.asarray(action, dtype=np.float64) + 1) / 2
        reward = 0.0
        for _ in range(self.action_repeat):
            try:
                time_step = self.env.step(action)
            except self.divergence:  # as dm_control's composer ends such an episode
                return np.zeros(self.observation_space.shape, np.uint8), reward, True, False, {}
            reward += time_step.reward or 0.0
            if time_step.last():
                break
        terminated = time_step.last() and time_step.discount == 0
        return self._observe(), reward, terminated, time_step.last() and not terminated, {}

    def get_state(self):
        """State of the task's random numbers, on which the next episode depends after its reset."""
        kind, keys, *rest = self.env.task.random.get_state()
        return [kind, keys.tolist(), *rest]

    def set_state(self, state):
        self.env.task.random.set_state(tuple(state))

    def close(self):
        self.env.close()


def is_dmc(env_id):
    """Whether this is the name of a domain-task and not an EnvPool or Gymnasium id such as Pong-v5."""
    return bool(re.fullmatch(r"[a-z0-9_]+-[a-z0-9_]+", env_id)) and not re.search(r"-v\d+$", env_id)


# ---------------------------------------------------------------------------------------------------------------------
# Data: frames with the true state, in memory
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Data:
    """Observations, each a stack of frames, with the true state and the group that is held out as a whole."""

    frames: torch.Tensor  # (F, C, H, W) uint8
    stacks: torch.Tensor  # (N, S) int64: the frames of observation n, the oldest first
    groups: torch.Tensor  # (N,) int64: task on Jump, else episode or section of a sequence
    states: torch.Tensor  # (N, D) float32; D = 0 where the state is unknown
    names: list  # of the D dimensions

    @property
    def obs_shape(self):
        c, h, w = self.frames.shape[1:]
        return self.stacks.shape[1] * c, h, w

    def observations(self, rows):
        """Observations (B, S * C, H, W) uint8 of rows (B,) int64, channels last in memory."""
        images = self.frames[self.stacks[rows]].flatten(1, 2)
        return images.contiguous(memory_format=torch.channels_last)

    @cached_property
    def digest(self):
        """Checksum that tells whether a resumed run sees the same data."""
        return zlib.crc32(self.frames.numpy()) ^ zlib.crc32(self.states.numpy())


def check_memory(size, flag):
    """Raises UsageError where `size` bytes of frames don't fit into memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > 0.8 * memory:
        raise UsageError(
            f"{flag}: the frames take {size / 2**30:.1f} GiB of {memory / 2**30:.1f} GiB memory; choose fewer"
        )


JUMP_STATE = ["agent x", "agent y", "obstacle x", "floor y"]  # pixels


def jump_states(tasks):
    """All states (S, 4) int64 of Jump's tasks, columns JUMP_STATE, and the tasks' indices (S,).

    The agent is wherever it can be without touching the obstacle: up to 16 pixels high, and not higher than it has
    come to the right.
    """
    grid = np.meshgrid(np.arange(len(tasks)), np.arange(56), np.arange(17), indexing="ij")
    task, x, height = (axis.ravel() for axis in grid)
    obstacle, floor = np.array(tasks)[task].T
    env = JumpVectorEnv
    beside = (obstacle + env.OBSTACLE_W <= x) | (obstacle >= x + env.AGENT_W)
    possible = (height <= x) & (beside | (height >= env.OBSTACLE_H))
    return np.stack([x, floor + height, obstacle, floor], axis=1)[possible], task[possible]


def jump_data(tasks, states, task_ids):
    """Data of Jump's `tasks` with an observation of each of the states (N, 4) int64."""
    env = JumpVectorEnv(1, tasks)
    env.num_envs, env.task_ids, env.x, env.y = len(states), task_ids, states[:, 0], states[:, 1]
    rows = torch.arange(len(states))[:, None]
    frames, states = torch.from_numpy(env._observe()), torch.from_numpy(states.astype(np.float32))
    return Data(frames, rows, torch.from_numpy(task_ids), states, JUMP_STATE)


def jump_walks(tasks, count, seed):
    """`count` states (count, 4) of a random policy that jumps now and then, and the tasks' indices.

    Every other episode starts behind the obstacle, where a random policy hardly ever gets.
    """
    rng, env = np.random.default_rng(seed), JumpVectorEnv(64, tasks)
    env.reset(seed=seed)
    states, task_ids, was_done = [], [], np.ones(64, dtype=bool)
    while 64 * len(states) < 2 * count:  # an episode's last frame is left out: the agent is in the obstacle or gone
        obstacle, floor = env.task_obstacle[env.task_ids], env.task_floor[env.task_ids]
        env.x[was_done] = np.where(rng.random(64) < 0.5, np.minimum(obstacle + env.OBSTACLE_W, 55), 0)[was_done]
        alive = ~env.done
        states.append(np.stack([env.x, env.y, obstacle, floor], axis=1)[alive])
        task_ids.append(env.task_ids[alive])
        was_done = env.done.copy()
        env.step(rng.random(64) < 0.05)
    states, task_ids = np.concatenate(states), np.concatenate(task_ids)
    chosen = rng.permutation(len(states))[:count]
    return states[chosen], task_ids[chosen]


def true_state(env):
    """The suite's state observations of a DMCPixels, by name: {name: float}."""
    observations = env.env.task.get_observation(env.env.physics)
    return {f"{key}[{i}]": float(x) for key, value in observations.items() for i, x in enumerate(np.ravel(value))}


def dmc_data(args, env_id, frame_stack, image_size, episodes, length):
    """Data of a random policy on a task of the DeepMind Control suite: `episodes` of `length` frames each.

    Every other episode starts from random joint angles. The first observation is made of `frame_stack` true frames, so
    that velocities can be seen. Dimensions of the state that never change are dropped.
    """
    env = DMCPixels(env_id, image_size, args.action_repeat, args.render_quality)  # checks the name first
    from dm_control.suite.utils import randomizers

    rng, frames, states = np.random.default_rng(args.seed), [], []
    frame, _ = env.reset(seed=args.seed)
    for episode in tqdm(range(episodes), desc=f"frames of {env_id}", file=sys.stdout, disable=None):
        env.reset()
        if episode % 2:
            with env.env.physics.reset_context():
                randomizers.randomize_limited_and_rotational_joints(env.env.physics, env.env.task.random)
        for _ in range(length):  # shorter than the time limit
            action = rng.uniform(-1, 1, env.action_space.shape)
            frame, *_ = env.step(action)
            frames.append(frame)
            states.append(list(true_state(env).values()))
    names = list(true_state(env))
    env.close()
    stacks = np.arange(episodes * length).reshape(episodes, length)
    stacks = np.lib.stride_tricks.sliding_window_view(stacks, frame_stack, axis=1)  # (episodes, length - S + 1, S)
    groups = np.arange(episodes).repeat(stacks.shape[1])
    stacks = np.ascontiguousarray(stacks.reshape(-1, frame_stack))
    states = np.array(states, dtype=np.float32)[stacks[:, -1]]
    varies = states.std(axis=0) > 1e-4
    names = [name for name, keep in zip(names, varies) if keep]
    parts = (np.stack(frames), stacks, groups, np.ascontiguousarray(states[:, varies]))
    return Data(*(torch.from_numpy(part) for part in parts), names)


IMAGES, ARRAYS = (".png", ".jpg", ".jpeg"), (".npy", ".npz")


def read_frames(path):
    """The arrays of one file, [(N, C, H, W) uint8, ...]. Nothing in it is executed. Raises UsageError."""
    try:
        if path.suffix.lower() in IMAGES:
            from PIL import Image

            with Image.open(path) as image:
                if image.mode[0] in "IF":  # 16 and 32 bits
                    raise UsageError(f"--frames {path}: pixels are {image.mode}, not 8 bits; convert the image")
                grey = image.mode in ("1", "L", "LA")
                arrays = [np.asarray(image.convert("L" if grey else "RGB"))[None]]  # (1, H, W) or (1, H, W, 3)
        else:
            loaded = np.load(path, allow_pickle=False)
            arrays = [loaded] if path.suffix.lower() == ".npy" else [loaded[name] for name in sorted(loaded.files)]
    except UsageError:
        raise
    except Exception as error:  # Pillow and NumPy raise whatever a damaged file makes them stumble over
        raise UsageError(f"--frames {path}: can't be read ({error}); repair or remove it") from None
    for i, array in enumerate(arrays):
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or not array.size:
            raise UsageError(
                f"--frames {path}: holds {array.dtype} of shape {array.shape}; needed are uint8 frames (N, C, H, W), "
                "(N, H, W, C) or (N, H, W)"
            )
        array = array[:, None] if array.ndim == 3 else array
        arrays[i] = array.transpose(0, 3, 1, 2) if array.shape[-1] < array.shape[1] else array
    return arrays


def folder_data(folder, frame_stack):
    """Data of a folder's images and arrays. Raises UsageError."""
    if not Path(folder).is_dir():
        raise UsageError(f"--frames {folder}: not a folder; name one with {', '.join(IMAGES + ARRAYS)} files")
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGES + ARRAYS)
    if not paths:
        raise UsageError(f"--frames {folder}: no frames in it; put {', '.join(IMAGES + ARRAYS)} files there")
    sequences, images, size, first = [], [], 0, None
    for path in tqdm(paths, desc="frames", file=sys.stdout, disable=None):
        for array in read_frames(path):
            first = first or (path, array.shape[1:])
            if array.shape[1:] != first[1]:
                raise UsageError(
                    f"--frames {folder}: shapes are mixed, {first[0].name} has {first[1]} and {path.name} has "
                    f"{array.shape[1:]} (channels, height, width); bring them to one size"
                )
            size += 2 * array.nbytes  # once more while they are concatenated
            check_memory(size, f"--frames {folder}")
            (images if path.suffix.lower() in IMAGES else sequences).append(array)
    sequences += [np.concatenate(images)] if images else []
    stacks, groups, start = [], [], 0
    for i, sequence in enumerate(sequences):
        ends = np.arange(start + frame_stack - 1, start + len(sequence))
        stacks.append(ends[:, None] + np.arange(1 - frame_stack, 1))
        groups.append(20 * i + 20 * np.arange(len(ends)) // max(len(ends), 1))  # twenty sections, to hold some out
        start += len(sequence)
    frames = torch.from_numpy(np.ascontiguousarray(np.concatenate(sequences)))
    stacks, groups = (torch.from_numpy(np.concatenate(parts)) for parts in (stacks, groups))
    if len(stacks) < 20:
        raise UsageError(f"--frames {folder}: {len(stacks)} observations are too few; give at least 20")
    return Data(frames, stacks, groups, torch.zeros(len(stacks), 0), [])


def jump_task_list(args):
    return (
        parse_jump_tasks(args.jump_tasks)
        if args.jump_tasks
        else [task for task in JUMP_GRID if task not in JUMP_TASK_SETS["target"]]
    )


def make_data(args):
    """The data that the arguments describe, the same every time. Raises UsageError."""
    if args.frames:
        data = folder_data(args.frames, args.frame_stack)
        expected = (1, 60, 60) if args.env_id == "Jump-v0" else data.obs_shape
        if data.obs_shape != expected:
            raise UsageError(
                f"--frames {args.frames}: observations are {data.obs_shape}, those of {args.env_id} {expected}; "
                "name the environment that the frames are from with --env-id"
            )
        return data
    if is_dmc(args.env_id):
        length = 50 + args.frame_stack - 1
        episodes = max(2, math.ceil(args.num_frames / length))
        check_memory(2 * episodes * length * 3 * args.image_size**2, f"--num-frames {args.num_frames}")
        return dmc_data(args, args.env_id, args.frame_stack, args.image_size, episodes, length)
    check_memory(2 * args.num_frames * 3600, f"--num-frames {args.num_frames}")
    tasks = jump_task_list(args)
    if args.objective == "simsiam":
        return jump_data(tasks, *jump_walks(tasks, args.num_frames, args.seed))
    states, task_ids = jump_states(tasks)
    chosen = np.random.default_rng(args.seed).permutation(len(states))[: args.num_frames]
    return jump_data(tasks, states[chosen], task_ids[chosen])


def split(groups, seed):
    """Rows (N,) of training and held-out data: a tenth of the groups, at least one, is held out. Raises UsageError."""
    unique = groups.unique()
    if len(unique) < 2:
        raise UsageError("--jump-tasks: one task alone leaves none to hold out; give two or more")
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))
    held_out = torch.isin(groups, unique[order[: max(1, len(unique) // 10)]])
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


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


def drqv2_layers(channels):
    """The four convolutional layers of Yarats et al. 2021."""
    shapes = [(channels, 2), (32, 1), (32, 1), (32, 1)]  # channels in, stride
    return [nn.Sequential(layer_init(nn.Conv2d(c, 32, 3, stride)), nn.ReLU(inplace=True)) for c, stride in shapes]


class Encoder(nn.Module):
    """f of ppo_pisco.py (nature, impala: features (B, feature_dim)) or of drqv2_pisco.py (drqv2: maps (B, 32, H', W')).

    Images (B, C, H, W) uint8 -> float32, with the weights' names, their initial values and the outputs of the encoder
    there. The layers are numbered from the bottom.
    """

    def __init__(self, architecture, obs_shape, feature_dim):
        super().__init__()
        self.architecture, self.feature_dim = architecture, feature_dim
        makers = {"nature": nature_layers, "impala": impala_layers, "drqv2": drqv2_layers}
        layers = makers[architecture](obs_shape[0])
        try:
            with torch.no_grad():
                flat = nn.Sequential(*layers)(torch.zeros(1, *obs_shape)).numel()
        except RuntimeError:
            raise UsageError(
                f"--encoder {architecture}: images of {obs_shape[1]}x{obs_shape[2]} are too small"
            ) from None
        if architecture != "drqv2":
            rectify = [nn.ReLU()] if architecture == "impala" else []  # its residual blocks end without one
            linear = layer_init(nn.Linear(flat, feature_dim))
            layers.append(nn.Sequential(*rectify, nn.Flatten(), linear, nn.ReLU(inplace=True)))
            flat = feature_dim
        self.layers, self.out_features = nn.ModuleList(layers), flat

    def activations(self, obs):
        """The pixels as the first layer gets them and every layer's output, [float32 (B, ...), ...]."""
        x = obs.to(torch.float32, memory_format=torch.channels_last)
        x = x.div_(255).sub_(0.5) if self.architecture == "drqv2" else x.mul_(1 / 255)
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        return outputs

    def forward(self, obs):
        return self.activations(obs)[-1]


class StateModel(nn.Module):
    """Encoder and a linear head for the standardised state."""

    def __init__(self, encoder, num_states):
        super().__init__()
        self.encoder = encoder
        self.head = layer_init(nn.Linear(encoder.out_features, num_states), std=1)

    def forward(self, obs):
        """Images (B, C, H, W) uint8 -> states (B, D), standardised."""
        return self.head(self.encoder(obs).flatten(1))


class SimSiam(nn.Module):
    """Encoder, projector and predictor of Chen and He 2021."""

    def __init__(self, encoder, dim):
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(encoder.out_features, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True),
            nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim, affine=False),
        )  # fmt: skip
        self.predictor = nn.Sequential(
            nn.Linear(dim, dim // 4, bias=False), nn.BatchNorm1d(dim // 4), nn.ReLU(inplace=True),
            nn.Linear(dim // 4, dim),
        )  # fmt: skip

    def forward(self, views):
        """Images (B, C, H, W) uint8 -> projections z and predictions p, (B, dim) each."""
        z = self.projector(self.encoder(views).flatten(1))
        return z, self.predictor(z)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentations, losses and scores: pure functions
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


def simsiam_loss(z1, z2, p1, p2):
    """Symmetrised negative cosine similarity of sg z and p (Chen and He 2021, eq. 2); features (B, D)."""
    one_two = F.cosine_similarity(z1.detach(), p2, dim=-1).mean()
    two_one = F.cosine_similarity(z2.detach(), p1, dim=-1).mean()
    return -0.5 * (one_two + two_one)


def r2_score(prediction, target):
    """Coefficient of determination of every column: (N, D) each -> (D,); 1 is perfect, 0 is the mean's."""
    residual = (target - prediction).square().sum(0)
    return 1 - residual / (target - target.mean(0)).square().sum(0)


def collapse_std(z):
    """Mean over the dimensions of the normalised projections' standard deviation: (B, d) -> scalar.

    About 1 / sqrt(d) where they are spread over the sphere, 0 where all are the same (Chen and He 2021, figure 2).
    """
    return F.normalize(z, dim=-1).std(0).mean()


# ---------------------------------------------------------------------------------------------------------------------
# Run folder: checkpoints, metrics
# ---------------------------------------------------------------------------------------------------------------------
METRICS = [
    "step", "charts/SPS", "losses/train", "eval/loss", "eval/r2", "eval/r2_lowest", "eval/collapse_std",
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


STATE = {"model", "optimizer", "step", "score", "seconds", "torch_rng", "data"}  # what every checkpoint holds


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


class RunFolder:
    """runs/<env>__<objective>__<seed>__<time>/: args.json, metrics.csv, TensorBoard events, checkpoint.pt and the one
    before it."""

    def __init__(self, path):
        self.path = Path(path)

    @classmethod
    def create(cls, args):
        name = f"{args.env_id.replace('/', '-').replace(':', '-')}__{args.objective}__{args.seed}__{int(time.time())}"
        path = Path(args.runs_dir) / name
        try:
            while path.exists():  # another run of this second
                path = path.with_name(path.name + "_")
            path.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"--runs-dir {args.runs_dir}: can't make the run folder ({error})") from None
        try:
            saved = {key: value for key, value in asdict(args).items() if key != "resume"}
            write_atomically(path / "args.json", lambda file: file.write(json.dumps(saved, indent=2).encode()))
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

    def open_logs(self, args, step):
        """Opens metrics.csv and TensorBoard to go on after `step`; later rows of a killed run are dropped."""
        path, kept = self.path / "metrics.csv", []
        if path.exists():
            with open(path, newline="") as file:
                try:
                    reader = csv.DictReader(file)
                    rows = [row for row in reader if None not in row.values()]
                    if reader.fieldnames != METRICS or any(None in row for row in rows):
                        raise ValueError("other columns")
                    kept = [row for row in rows if int(row["step"]) <= step]
                except (ValueError, TypeError, csv.Error):
                    raise UsageError(f"--resume {self.path}: metrics.csv is damaged; move it away") from None
        text = io.StringIO()
        writer = csv.DictWriter(text, METRICS)
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(path, lambda file: file.write(text.getvalue().encode()))
        self.csv_file = open(path, "a", newline="")
        self.csv_writer = csv.DictWriter(self.csv_file, METRICS)
        # Its thread's trace is no help to anyone: what it can't write is an OSError of the next call here as well.
        threading.excepthook = lambda args: issubclass(args.exc_type, OSError) or threading.__excepthook__(args)
        self.tensorboard = SummaryWriter(self.path, purge_step=step + 1 if args.resume else None)
        if not step:
            rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
            self.tensorboard.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")

    def log(self, row):
        """Appends a row keyed by METRICS to metrics.csv and TensorBoard."""
        self.csv_writer.writerow(row)
        self.csv_file.flush()
        for key, value in row.items():
            if key != "step":
                self.tensorboard.add_scalar(key, value, row["step"])

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.csv_file.close()
        self.tensorboard.close()


# ---------------------------------------------------------------------------------------------------------------------
# Weights file
# ---------------------------------------------------------------------------------------------------------------------
def output_path(args):
    """Where the weights go: --output, or where the algorithms look for them. Raises UsageError if a file is there."""
    slug = args.env_id.replace("/", "-").lower()
    path = Path(args.output) if args.output else ENCODERS / f"{slug}__{args.encoder}__{args.objective}.safetensors"
    if path.is_dir() or path.exists() and not args.force:
        raise UsageError(f"--output {path}: exists; add --force to replace a file or name another one")
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"--output {path}: can't write into {folder}; name another file")
    return path


def write_weights(path, tensors, metadata):
    """Writes tensors and metadata, {str: str}, as .safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_atomically(path, lambda file: file.write(safetensors.torch.save(tensors, metadata)))


def read_weights(path):
    """The encoder of a weights file and its metadata. Nothing in the file is executed. Raises UsageError."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise UsageError(f"--encoder-weights {path}: no such file; make one with pretrain_encoder.py") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"--encoder-weights {path}: not a readable .safetensors file ({error})") from None
    architecture = metadata.get("architecture")
    if architecture not in ("nature", "impala", "drqv2"):
        raise UsageError(f"--encoder-weights {path}: holds {architecture or 'an unknown architecture'}; make it anew")
    try:
        obs_shape = tuple(int(number) for number in json.loads(metadata["observation_shape"]))
        encoder = Encoder(architecture, obs_shape, int(metadata.get("feature_dim") or 0))
        encoder.load_state_dict(tensors)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--encoder-weights {path}: tensors and metadata don't fit together ({reason})") from None
    if not all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values()):
        raise UsageError(f"--encoder-weights {path}: holds values that are not finite float32; make the file anew")
    return encoder, metadata


def usage(path, metadata):
    """The command that uses a weights file."""
    env_id, size = metadata["environment"], json.loads(metadata["observation_shape"])
    command = f"python {(DRQV2 if metadata['architecture'] == 'drqv2' else PPO).name}"
    command += f" --env-id {env_id}" if env_id != "Jump-v0" else ""
    command += f" --encoder-weights {path} --freeze-layers 2"
    if metadata["architecture"] == "drqv2":
        command += f" --image-size {size[1]}" if size[1] != 84 else ""
        return command + (f" --frame-stack {size[0] // 3}" if size[0] != 9 else "")
    command += f" --encoder {metadata['architecture']}" if metadata["architecture"] != "nature" else ""
    return command + (f" --feature-dim {metadata['feature_dim']}" if metadata["feature_dim"] != "256" else "")


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining on frames: state, simsiam
# ---------------------------------------------------------------------------------------------------------------------
def state_targets(data, rows):
    """The states of all observations, standardised by those of `rows`: (N, D) float32."""
    if not data.names:
        return data.states
    mean, std = data.states[rows].mean(0), data.states[rows].std(0)
    return (data.states - mean) / torch.where(std > 1e-4, std, 1.0)  # what is constant in these rows keeps its unit


def simsiam_forward(model, obs, args):
    """Loss on two augmented views of images (B, C, H, W) uint8, and the projections (2B, dim)."""
    (z1, p1), (z2, p2) = (model(augment(obs, args.augmentation, args.shift_pixels)) for _ in range(2))
    return simsiam_loss(z1, z2, p1, p2), torch.cat([z1, z2])


@torch.no_grad()
def evaluate(model, data, targets, rows, args, device):
    """Scores on the held-out rows, {name: float}; changes nothing, neither the model nor the random numbers."""
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)  # the same views every time
        batches = [(data.observations(r).to(device), targets[r].to(device)) for r in rows.split(args.batch_size)]
        if args.objective == "state":
            prediction = torch.cat([model(obs) for obs, _ in batches])
            target = torch.cat([target for _, target in batches])
            # In units of the training data's variance, 1: a held-out task of Jump alone has none in obstacle and floor.
            r2 = (1 - (prediction - target).square().mean(0)).tolist()
            score = {"loss": F.mse_loss(prediction, target).item(), "r2": float(np.mean(r2)), "r2_lowest": min(r2)}
            score |= {f"r2 {name}": value for name, value in zip(data.names, r2)}
        else:
            losses, z = zip(*(simsiam_forward(model, obs, args) for obs, _ in batches))
            weights = torch.tensor([len(obs) for obs, _ in batches], dtype=torch.float32)
            loss = (torch.stack(losses).cpu() * weights).sum() / weights.sum()
            score = {"loss": loss.item(), "collapse_std": collapse_std(torch.cat(z)).item()}
    model.train()
    return score


def is_reached(score, args):
    return args.objective == "state" and score.get("r2", -math.inf) >= args.target_r2


def training_loss(model, data, targets, rows, args, device):
    obs = data.observations(rows).to(device)
    if args.objective == "state":
        return F.mse_loss(model(obs), targets[rows].to(device))
    return simsiam_forward(model, obs, args)[0]


def fit(args, model, optimizer, data, targets, rows, folder, device, step, score, seconds):
    """Trains from update `step` to the end. Returns the last update and its score. Raises UsageError."""
    train_rows, held_out = rows
    with progress_bar(step, args.total_steps) as bar:
        while step < args.total_steps and not is_reached(score, args):
            began = time.perf_counter()
            losses, until = [], min(step + args.eval_interval, args.total_steps)
            for _ in range(step, until):
                batch = train_rows[torch.randint(len(train_rows), (args.batch_size,))]
                loss = training_loss(model, data, targets, batch, args, device)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                bar.update()
            step, score = until, evaluate(model, data, targets, held_out, args, device)
            seconds += time.perf_counter() - began
            row = {"step": step, "charts/SPS": step / seconds, "losses/train": torch.stack(losses).mean().item()}
            row |= {f"eval/{name}": value for name, value in score.items() if f"eval/{name}" in METRICS}
            if not all(math.isfinite(value) for value in [*row.values(), *score.values()]):
                raise UsageError(
                    f"the loss is not finite; the last good checkpoint, if any, is kept in {folder.path}; try a "
                    "smaller --learning-rate"
                )
            state = {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "score": score,
                "seconds": seconds, "data": data.digest, "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
            }  # fmt: skip
            with interrupt_later():
                folder.log(row)
                folder.save_checkpoint(state)
            shown = "r2" if args.objective == "state" else "collapse_std"
            bar.set_postfix({shown: f"{score[shown]:.3f}"}, refresh=False)
    return step, score


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


def restore(state, model, optimizer, data, args):
    """Puts a checkpoint's state back. Returns step, score and seconds. Raises UsageError if it doesn't fit."""
    if state["data"] != data.digest:
        raise UsageError(f"--resume {args.resume}: the frames are not those of the run; start it anew")
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"].cpu())
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"][: torch.cuda.device_count()]])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"--resume {args.resume}: the checkpoint does not belong to args.json") from None
    return state["step"], state["score"], state["seconds"]


def pretrain(args):
    """One run of state or simsiam. Returns the weights file's path and its metadata. Raises UsageError, OSError."""
    check_args(args)
    check_data_args(args)
    path = output_path(args)
    device = set_up(args)
    state = RunFolder(args.resume).load_checkpoint(device) if args.resume else None
    data = make_data(args)
    rows = split(data.groups, args.seed)
    targets = state_targets(data, rows[0])
    encoder = Encoder(args.encoder, data.obs_shape, args.feature_dim)
    is_state = args.objective == "state"
    model = StateModel(encoder, len(data.names)) if is_state else SimSiam(encoder, args.projector_dim)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, fused=True)
    step, score, seconds = restore(state, model, optimizer, data, args) if state else (0, {}, 0.0)

    folder = RunFolder(args.resume) if args.resume else RunFolder.create(args)
    print(f"{len(rows[0]):,} observations {data.obs_shape} for training, {len(rows[1]):,} held out")
    print(f"run folder: {folder.path}", flush=True)
    folder.open_logs(args, step)
    try:
        with folder:
            step, score = fit(args, model, optimizer, data, targets, rows, folder, device, step, score, seconds)
    except KeyboardInterrupt:
        print(f"pretrain_encoder.py: go on with: python pretrain_encoder.py --resume {folder.path}", file=sys.stderr)
        raise
    if is_state:
        outcome = "reached" if is_reached(score, args) else f"not reached in --total-steps {args.total_steps}"
        each = ", ".join(f"{name} {score[f'r2 {name}']:.4f}" for name in data.names)
        print(f"held-out R2 {score['r2']:.4f} ({each}) after {step} updates, --target-r2 {args.target_r2} {outcome}")
    else:
        ideal = args.projector_dim**-0.5
        print(
            f"held-out loss {score['loss']:.4f}, std of the projections {score['collapse_std']:.4f} (best {ideal:.4f})"
        )
    write_weights(path, encoder.state_dict(), weights_metadata(args, data.obs_shape, step, score))
    return path, weights_metadata(args, data.obs_shape, step, score)


def weights_metadata(args, obs_shape, step, score):
    """What load_encoder of the algorithms checks and a reader wants to know, {str: str}."""
    return {
        "architecture": args.encoder,
        "feature_dim": str(args.feature_dim) if args.encoder != "drqv2" else "",
        "observation_shape": json.dumps(list(obs_shape)),
        "environment": args.env_id,
        "tasks": (args.jump_tasks or "grid without target") if args.env_id == "Jump-v0" and not args.frames else "",
        "objective": args.objective,
        "score": json.dumps(score),
        "steps": str(step),
        "seed": str(args.seed),
        "versions": json.dumps({"torch": torch.__version__, "gymnasium": gym.__version__, "numpy": np.__version__}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining by reinforcement learning
# ---------------------------------------------------------------------------------------------------------------------
def check_resumed(args, saved):
    """Raises UsageError for flags that are not those of the run to go on with, args.json as the dict `saved`."""
    for field in fields(RLArgs):
        key = "total_frames" if field.name == "total_timesteps" and "total_frames" in saved else field.name
        value, made_with = getattr(args, field.name), (saved | {"objective": "rl"}).get(key)
        if key in {*saved, "objective"} - {"resume"} and value not in (field.default, made_with):
            flag = f"--{field.name.replace('_', '-')}"
            raise UsageError(f"{flag} {value}: the run was made with {made_with}; drop {flag} or start anew")


def run_algorithm(args, further):
    """Runs ppo_pisco.py or drqv2_pisco.py on the source tasks, `further` flags added. Returns exit code, run folder."""
    if args.resume:
        check_resumed(args, saved_args(args.resume))
        program = DRQV2 if "total_frames" in saved_args(args.resume) else PPO
        command, pattern = ["--resume", args.resume], None
    else:
        if any(re.split("[=_-]+", word)[1:3] == ["exp", "name"] for word in further):
            raise UsageError("--exp-name: pretraining gives its run a name of its own; drop the flag")
        name = f"pretrain-{os.getpid()}"  # a name of its own, to find the run folder again
        command = ["--exp-name", name, "--encoder-weights", "none", "--freeze-layers", "0", "--ssl", "none"]
        command += ["--env-id", args.env_id, "--seed", str(args.seed), "--runs-dir", args.runs_dir]
        if is_dmc(args.env_id):
            program = DRQV2
            command += ["--total-frames", str(args.total_timesteps)] if args.total_timesteps is not None else []
        else:
            program = PPO
            command += ["--anneal-lr", "--ent-coef", "0.003"]  # time to settle on a nearly deterministic policy
            command += ["--jump-tasks", args.jump_tasks, "--encoder", args.encoder]
            steps = 300_000 if args.total_timesteps is None else args.total_timesteps
            command += ["--total-timesteps", str(steps)]
        pattern = f"*__{name}__{args.seed}__*"
    process = subprocess.Popen([sys.executable, str(program), *command, *further])
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # Ctrl-C reaches the training too: it ends by itself
            continue
    folders = sorted(Path(args.runs_dir).glob(pattern), key=os.path.getmtime) if pattern else [Path(args.resume)]
    return code, folders[-1] if folders else None


def export(folder, args):
    """Writes the run's encoder, its score on the source tasks in the metadata. Returns path, metadata and score.

    Raises UsageError where the file exists and OSError where it can't be written.
    """
    with safetensors.safe_open(folder / "encoder.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    score = json.loads((folder / "evaluation.json").read_text())["metrics"]
    if metadata["objective"].endswith("ssl none)"):  # the usual case; another loss stays named
        metadata["objective"] = "rl"
    metadata["score"] = json.dumps(score)
    args.env_id, args.encoder = metadata["environment"], metadata["architecture"]
    path = output_path(args)
    write_weights(path, tensors, metadata)
    return path, metadata, score


def pretrain_rl(args, further):
    """Reinforcement learning and its export. Returns the exit code. Raises UsageError, OSError."""
    if not args.resume:
        args.encoder = args.encoder or ("drqv2" if is_dmc(args.env_id) else "nature")
        check_family(args.env_id, args.encoder)
    if args.output or not args.resume:  # before the training, not after it
        output_path(args)
    code, folder = run_algorithm(args, further)
    if code:
        if code == 130 and folder:
            further = f" --output {shlex.quote(args.output)}" if args.output else ""
            further += " --force" if args.force else ""
            command = f"python pretrain_encoder.py --resume {folder}{further}"
            print(f"pretrain_encoder.py: go on with: {command}", file=sys.stderr)
        return code
    path, metadata, score = export(folder, args)
    print("source tasks:", ", ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in score.items()))
    print(f"wrote {path}; use it with: {usage(path, metadata)}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Probe
# ---------------------------------------------------------------------------------------------------------------------
PENALTIES = [10.0**power for power in range(-7, 2)]  # of the ridge, in units of the rows' mean squared norm


def weighted_mean(x, weights):
    return (weights[:, None] * x).sum(0) / weights.sum()


def eigen_ridge(x, y, weights):
    """What ridge fits of one data set share, whatever their penalty: centred rows, times the root of their weights, as
    u diag(s) vT, from the smaller of both Gram matrices (the primal or the dual form).

    x (n, d), y (n, k), weights (n,) float64 -> u (n, r), s (r,), v (d, r), centred y (n, k).
    """
    root = weights.sqrt()[:, None]
    a, b = root * (x - weighted_mean(x, weights)), root * (y - weighted_mean(y, weights))
    n, d = a.shape
    squares, vectors = torch.linalg.eigh(a.T @ a if d < n else a @ a.T)
    keep = squares > 1e-12 * squares[-1].clamp(min=1e-300)
    s, vectors = squares[keep].sqrt(), vectors[:, keep]
    u, v = (a @ vectors / s, vectors) if d < n else (vectors, a.T @ vectors / s)
    return u, s, v, b


def ridge(x, y, penalty, weights=None):
    """Minimises sum_i weights_i |y_i - x_i w - c|^2 + penalty |w|^2. Returns w (d, k) and c (k,).

    x (n, d), y (n, k), weights (n,), float64 each.
    """
    weights = torch.ones_like(x[:, 0]) if weights is None else weights
    u, s, v, b = eigen_ridge(x, y, weights)
    w = v @ ((s / (s**2 + penalty))[:, None] * (u.T @ b))
    return w, weighted_mean(y, weights) - weighted_mean(x, weights) @ w


def fit_ridge(x, y, groups, weights):
    """Ridge with that one of PENALTIES whose leave-one-group-out error among these rows is the smallest.

    The errors are exact and need no further fits: with the hat matrix H of all rows, the residuals of a group g that
    is left out are (1 - H_gg)^-1 r_g, where r are the residuals of the fit to all rows.
    """
    u, s, v, b = eigen_ridge(x, y, weights)
    root = (weights / weights.sum()).sqrt()
    unit = (s**2).sum() / len(x)
    errors = []
    for penalty in PENALTIES:
        shrink = s**2 / (s**2 + penalty * unit)
        residual = b - u @ (shrink[:, None] * (u.T @ b))
        error = 0.0
        for group in groups.unique():
            g = groups == group
            hat = (u[g] * shrink) @ u[g].T + root[g][:, None] * root[g]
            eye = torch.eye(len(hat), dtype=hat.dtype)
            error += torch.linalg.solve(eye - hat, residual[g]).square().sum().item()
        errors.append(error)
    penalty = PENALTIES[int(np.argmin(errors))] * unit
    w = v @ ((s / (s**2 + penalty))[:, None] * (u.T @ b))
    return w, weighted_mean(y, weights) - weighted_mean(x, weights) @ w


def compress(x):
    """Features (n, d) -> (n, at most n) float64 with the same inner products, so that a ridge predicts the same."""
    n, d = x.shape
    if d <= n:
        return x.double()
    gram = sum(part.double() @ part.double().T for part in (x - x.mean(0)).split(4096, dim=1))
    squares, vectors = torch.linalg.eigh(gram)
    return vectors * squares.clamp(min=0).sqrt()


def balanced_accuracy(prediction, label):
    """Mean over both classes of the share that is recognised: prediction, label (n,) bool -> float."""
    return ((prediction & label).sum() / label.sum() + (~prediction & ~label).sum() / (~label).sum()).item() / 2


def class_weights(label):
    """Weights (n,) float64 with which both classes of label (n,) bool count the same."""
    share = label.double().mean().clamp(1e-9, 1 - 1e-9)
    return torch.where(label, 0.5 / share, 0.5 / (1 - share))


def optimal_action(states):
    """On Jump states (N, 4): whether the agent must jump now (N,) bool, and where this is a question (N,) bool: on the
    ground before the obstacle. There is one right moment, 14 pixels before the obstacle."""
    agent_x, agent_y, obstacle_x, floor_y = states.T
    return obstacle_x - agent_x == 14, (agent_y == floor_y) & (agent_x + JumpVectorEnv.AGENT_W <= obstacle_x)


def out_of_group(x, y, groups, weights):
    """Predictions (n, k) for every row of a ridge that was fitted to the other groups."""
    prediction = torch.empty_like(y)
    for group in groups.unique():
        g = groups == group
        w, c = fit_ridge(x[~g], y[~g], groups[~g], weights[~g])
        prediction[g] = x[g] @ w + c
    return prediction


def score_features(x, y, groups, is_source, score, weigh):
    """Scores of one set of features x (n, d) as {source, target, transfer}.

    source and target: each group predicted from the other ones of its set; transfer: fitted to all source rows, scored
    on the target rows. `score(prediction, y)` gives the number, `weigh(y)` the rows' weights in a fit.
    """
    x, scores = compress(x), {}
    for name, rows in (("source", is_source), ("target", ~is_source)):
        scores[name] = score(out_of_group(x[rows], y[rows], groups[rows], weigh(y[rows])), y[rows])
    w, c = fit_ridge(x[is_source], y[is_source], groups[is_source], weigh(y[is_source]))
    return scores | {"transfer": score(x[~is_source] @ w + c, y[~is_source])}


R2_FLOOR = -1.0  # a fit can miss by any amount: worse than this is all the same


def state_score(prediction, target):
    return r2_score(prediction, target).clamp(min=R2_FLOOR).mean().item()


def action_score(prediction, target):
    return balanced_accuracy(prediction[:, 0] > 0, target[:, 0] > 0)


@torch.no_grad()
def layer_features(encoder, data):
    """Yields for the pixels and each layer {variant: features (N, d) float32}: the mean over the map's places and the
    whole map. One layer at a time is kept, as maps are large."""
    for layer in range(len(encoder.layers) + 1):
        outputs = [
            encoder.activations(data.observations(rows))[layer] for rows in torch.arange(len(data.stacks)).split(64)
        ]
        x = torch.cat(outputs)
        yield {"pooled": x.mean((2, 3)) if x.ndim == 4 else x, "flat": x.flatten(1)}


def probe_encoder(encoder, data, is_source, is_jump, name):
    """All scores of one encoder: a list of dicts of layer, variant, metric, source, target, transfer."""
    states = data.states.double()
    # What is the same in a whole set says nothing there.
    varies = (states[is_source].std(0) > 0) & (states[~is_source].std(0) > 0)
    if not varies.any():
        raise UsageError("--jump-source, --jump-target: no state varies within both; give more tasks")
    state = ((states - states.mean(0)) / states.std(0))[:, varies]
    results = []
    for layer, variants in enumerate(tqdm(layer_features(encoder, data), name, len(encoder.layers) + 1, disable=None)):
        for variant, x in variants.items():
            scores = score_features(x, state, data.groups, is_source, state_score, lambda y: torch.ones_like(y[:, 0]))
            results.append({"layer": layer, "variant": variant, "metric": "state R2", **scores})
            if is_jump:
                jump, asked = optimal_action(data.states)
                label = torch.where(jump, 1.0, -1.0).double()[asked, None]
                scores = score_features(
                    x[asked], label, data.groups[asked], is_source[asked], action_score,
                    lambda y: class_weights(y[:, 0] > 0),
                )  # fmt: skip
                results.append({"layer": layer, "variant": variant, "metric": "action accuracy", **scores})
    return results


def probe_data(args, metadata):
    """Data of the source and the target environment in one, and which rows (N,) bool are the source's.

    Raises UsageError where the encoder doesn't fit to the environment.
    """
    env_id = args.env_id or metadata.get("environment", "")
    obs_shape = tuple(json.loads(metadata["observation_shape"]))
    if env_id == "Jump-v0":
        if args.target_env_id not in (None, "Jump-v0"):
            raise UsageError(f"--target-env-id {args.target_env_id}: Jump-v0 has target tasks; see --jump-target")
        expected, parts = (1, 60, 60), []
    elif is_dmc(env_id):
        if args.target_env_id is None:
            raise UsageError(
                f"--target-env-id: name the environment to transfer to from {env_id}, such as its twin task"
            )
        expected = (obs_shape[0] // 3 * 3, obs_shape[1], obs_shape[1])
    else:
        raise UsageError(f"--env-id {env_id}: its true state is unknown; choose Jump-v0 or a DeepMind Control task")
    if obs_shape != expected:
        raise UsageError(
            f"--encoder-weights {args.encoder_weights}: made for images {obs_shape}, not those of {env_id}"
        )
    if env_id == "Jump-v0":
        for flag, text in (("--jump-source", args.jump_source), ("--jump-target", args.jump_target)):
            try:
                tasks = parse_jump_tasks(text)
            except UsageError as error:
                raise UsageError(str(error).replace("--jump-tasks", flag)) from None
            if len(tasks) < 3:
                raise UsageError(f"{flag} {text}: give three or more tasks, to leave one out")
            parts.append(jump_data(tasks, *probe_states(tasks, args.seed)))
    else:
        stack, size = obs_shape[0] // 3, obs_shape[1]
        parts = [dmc_data(args, one, stack, size, args.episodes, 5 + stack - 1) for one in (env_id, args.target_env_id)]
        for part in parts:
            part.groups = part.groups * 8 // args.episodes
        if parts[0].names != parts[1].names:
            raise UsageError(
                f"--target-env-id {args.target_env_id}: its state is not that of {env_id}; no common probe"
            )
    source, target = parts
    rows = len(source.stacks)
    data = Data(
        torch.cat([source.frames, target.frames]),
        torch.cat([source.stacks, target.stacks + len(source.frames)]),
        torch.cat([source.groups, target.groups + source.groups.max() + 1]),
        torch.cat([source.states, target.states]),
        source.names,
    )
    return data, torch.arange(len(data.stacks)) < rows


def probe_states(tasks, seed):
    """Jump's states for the probe: of every task all those on the ground before the obstacle, and forty others."""
    states, task_ids = jump_states(tasks)
    asked = optimal_action(states)[1]
    order = np.random.default_rng(seed).permutation(len(states))
    others = [order[(task_ids == task)[order] & ~asked[order]][:40] for task in range(len(tasks))]
    chosen = np.sort(np.concatenate([np.flatnonzero(asked), *others]))
    return states[chosen], task_ids[chosen]


def average(results):
    """Scores of several random encoders (lists as probe_encoder's) as their means."""
    columns = ("source", "target", "transfer")
    return [rows[0] | {c: float(np.mean([row[c] for row in rows])) for c in columns} for rows in zip(*results)]


COLUMNS = ["encoder", "layer", "variant", "metric", "source", "target", "transfer"]


def table(results, control):
    """The scores as text: a row per metric, variant and layer, the pretrained encoder's beside the random ones'."""
    lines = [f"{'':31}{'pretrained':^27}  {'random':^27}"]
    header = "".join(f"{column:>9}" for column in ("source", "target", "transfer"))
    lines.append(f"{'metric':<16}{'variant':<8}{'layer':>7}{header}  {header}")
    pairs = sorted(zip(results, control), key=lambda pair: (pair[0]["metric"], pair[0]["variant"], pair[0]["layer"]))
    for pretrained, rand in pairs:
        numbers = ["".join(f"{row[c]:>9.3f}" for c in ("source", "target", "transfer")) for row in (pretrained, rand)]
        layer = pretrained["layer"] or "pixels"
        lines.append(f"{pretrained['metric']:<16}{pretrained['variant']:<8}{layer:>7}{numbers[0]}  {numbers[1]}")
    return "\n".join(lines)


def layer_scores(results):
    """The number by which layers are compared, a list from the pixels on: the target score of the better variant,
    averaged over the metrics."""
    best = {}
    for row in results:
        key = row["layer"], row["metric"]
        best[key] = max(best.get(key, -math.inf), row["target"])
    layers = range(max(row["layer"] for row in results) + 1)
    return [float(np.mean([value for (layer, _), value in best.items() if layer == i])) for i in layers]


def recommend(results, control, tolerance):
    """How many layers to freeze, and the reason as a sentence.

    The layers above the frozen ones are trained on the target task, so what counts is how much of it a fit on target
    tasks reads from a layer, not how a fit on the source carries over. The rule: the deepest layer that loses at most
    `tolerance` against the best layer and reads no worse than the same layer with random weights; else none.
    """
    scores, chance = layer_scores(results), layer_scores(control)
    best = max(scores)
    fits = [k for k in range(1, len(scores)) if scores[k] >= best - tolerance and scores[k] >= chance[k]]
    if not fits:
        return 0, f"no layer comes within {tolerance} of the best target score, {best:.3f}, and is no worse than random"
    k = fits[-1]
    reason = f"layer {k} has the target score {scores[k]:.3f} (random weights {chance[k]:.3f}, best layer {best:.3f})"
    if k + 1 < len(scores):
        worse = f"less than random weights, {chance[k + 1]:.3f}" if scores[k + 1] >= best - tolerance else "too little"
        reason += f", layer {k + 1} has {scores[k + 1]:.3f}, {worse}"
    return k, reason


def draw_probe(path, results, control, count, title):
    """PNG of the scores over the layers: a panel per metric and variant, random encoders dashed, `count` marked."""
    from matplotlib.figure import Figure

    colours = {"source": "#0072b2", "target": "#d55e00", "transfer": "#009e73"}  # colour-blind safe
    metrics, variants = (list(dict.fromkeys(row[key] for row in results)) for key in ("metric", "variant"))
    layers = range(max(row["layer"] for row in results) + 1)
    figure = Figure(figsize=(9, 3 * len(metrics) + 0.8), layout="constrained")
    panels = figure.subplots(len(metrics), len(variants), sharex=True, sharey="row", squeeze=False)
    for i, metric in enumerate(metrics):
        for j, variant in enumerate(variants):
            axes = panels[i, j]
            axes.axvline(count, color="0.8", linewidth=6, label="recommended K")
            for rows, style, name in ((results, "-o", "pretrained"), (control, "--o", "random")):
                rows = [row for row in rows if (row["metric"], row["variant"]) == (metric, variant)]
                for column, colour in colours.items():
                    values, face = [row[column] for row in rows], colour if style == "-o" else "white"
                    axes.plot(layers, values, style, color=colour, markerfacecolor=face, label=f"{column}, {name}")
            axes.set_title(f"{metric}, {variant}", fontsize=10)
            axes.set_xticks(layers, ["pixels", *layers[1:]])
            axes.grid(alpha=0.3)
        panels[i, 0].set_ylabel(metric)
    for axes in panels[-1]:
        axes.set_xlabel("layer")
    figure.suptitle(title)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def probe(args):
    """Fits all probes, prints the table, writes probe.csv and probe.png. Raises UsageError, OSError."""
    check_args(args)
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    path = Path(args.encoder_weights)
    encoder, metadata = read_weights(path)
    data, is_source = probe_data(args, metadata)
    folder = Path(args.output or f"runs/probe__{path.stem}")
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    except OSError as error:
        raise UsageError(f"--output {folder}: can't make the folder ({error})") from None
    is_jump = data.names == JUMP_STATE
    print(f"{int(is_source.sum()):,} source and {int((~is_source).sum()):,} target observations, {path}", flush=True)
    runs = {"pretrained": probe_encoder(encoder, data, is_source, is_jump, "pretrained")}
    for seed in range(args.seed + 1, args.seed + 1 + args.num_random):
        torch.manual_seed(seed)
        rand = Encoder(encoder.architecture, data.obs_shape, encoder.feature_dim)
        runs[f"random {seed}"] = probe_encoder(rand, data, is_source, is_jump, f"random {seed}")
    results, control = runs["pretrained"], average([rows for name, rows in runs.items() if name != "pretrained"])
    count, reason = recommend(results, control, args.tolerance)

    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows({"encoder": name, **row} for name, rows in runs.items() for row in rows)
    write_atomically(folder / "probe.csv", lambda file: file.write(text.getvalue().encode()))
    draw_probe(folder / "probe.png", results, control, count, f"{path.name}: --freeze-layers {count}")
    print(table(results, control), f"wrote {folder / 'probe.csv'} and probe.png", sep="\n")
    print(f"recommended: --freeze-layers {count}, as {reason}")


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
    ("be positive", lambda x: x > 0, "eval_interval frame_stack feature_dim total_steps learning_rate "
     "action_repeat num_random"),
    ("not be negative", lambda x: x >= 0, "seed torch_threads shift_pixels tolerance"),
    ("be at least 2", lambda x: x >= 2, "batch_size"),
    ("be at least 8", lambda x: x >= 8, "episodes"),
    ("be at least 4", lambda x: x >= 4, "projector_dim"),
    ("be finite", math.isfinite, "learning_rate target_r2 tolerance"),
    ("be at least 20", lambda x: x >= 20, "num_frames"),
    ("be at most 2**30", lambda x: x <= 2**30, "seed"),
]  # fmt: skip


def check_args(args):
    """Raises UsageError for values that no run can have, before anything is made or written."""
    rules = [(f"be {field.type}", partial(has_type, kind=field.type), field.name) for field in fields(args)]
    for rule, possible, names in rules + LIMITS:  # tyro checks types on the command line, nobody those of args.json
        for name in names.split():
            if hasattr(args, name) and not possible(getattr(args, name)):
                raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)!r}: must {rule}")


def check_family(env_id, encoder):
    """Raises UsageError for an encoder that the environment's algorithm doesn't have."""
    if is_dmc(env_id) != (encoder == "drqv2"):
        possible = "drqv2" if is_dmc(env_id) else "nature and impala"
        raise UsageError(f"--encoder {encoder}: the algorithm for {env_id} has {possible}; see --env-id")


def check_data_args(args):
    """Raises UsageError for data that `state` and `simsiam` can't have."""
    check_family(args.env_id, args.encoder)
    if args.env_id == "Jump-v0":
        jump_task_list(args)
    if args.frames and args.objective == "state":
        raise UsageError("--frames: these have no true state; use --objective simsiam")
    if not args.frames and args.env_id != "Jump-v0" and not is_dmc(args.env_id):
        remedy = "use --objective rl" if args.objective == "state" else "give its frames with --frames"
        raise UsageError(
            f"--env-id {args.env_id}: --objective {args.objective} makes frames of Jump-v0 and of DeepMind "
            f"Control tasks alone; {remedy}"
        )
    if not args.frames and args.env_id == "Jump-v0" and args.frame_stack != 1:
        raise UsageError(f"--frame-stack {args.frame_stack}: ppo_pisco.py shows Jump-v0 one frame at a time; drop it")


def parse_flags(kind, argv, **options):
    """The command line as `kind`. What tyro complains of in a box becomes one line: a UsageError."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(kind, args=argv, description=__doc__, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UsageError(re.sub("[\u2500-\u257f]", " ", stderr.getvalue())) from None


def saved_args(folder):
    """args.json of a run folder as a dict. Raises UsageError."""
    try:
        saved = json.loads((Path(folder) / "args.json").read_text())
    except FileNotFoundError:
        raise UsageError(f"--resume {folder}: not a run folder, it has no args.json") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--resume {folder}: args.json can't be read ({error})") from None
    if not isinstance(saved, dict):
        raise UsageError(f"--resume {folder}: args.json was written by another version of this script")
    return saved


def parse_args(argv):
    """The arguments of `state` and `simsiam`; with --resume those of the run, which other flags may repeat but not
    change, --output and --force apart. Raises UsageError."""
    args = parse_flags(Args, argv)
    if args.resume is None:
        args.encoder = args.encoder or ("drqv2" if is_dmc(args.env_id) else "nature")
        is_drqv2 = args.encoder == "drqv2"
        args.frame_stack = (3 if is_drqv2 else 1) if args.frame_stack is None else args.frame_stack
        args.learning_rate = (3e-4 if is_drqv2 else 1e-3) if args.learning_rate is None else args.learning_rate
        return args
    saved = saved_args(args.resume)
    if saved.keys() != asdict(args).keys() - {"resume"}:
        raise UsageError(f"--resume {args.resume}: args.json was written by another version of this script")
    saved = Args(**saved, resume=args.resume)
    check_args(saved)
    given = parse_flags(Args, argv, default=saved)
    for key, value in asdict(given).items():
        if value != getattr(saved, key) and key not in ("output", "force"):
            flag = f"--{key.replace('_', '-')}"
            raise UsageError(f"{flag} {value}: the run was made with {getattr(saved, key)}; drop {flag} or start anew")
    return given


def asked_objective(argv):
    """The objective that a command line is about: with --resume that of the run. Raises UsageError."""
    words = [part for word in argv for part in word.split("=", 1)]
    flags = dict(zip(words, words[1:]))
    if "--resume" in flags:
        return saved_args(flags["--resume"]).get("objective", "rl")  # the algorithms' runs have none
    return flags.get("--objective", "rl")


def main(argv=None):
    """Runs the command line `argv`. Returns the exit code: 0, 2 for bad input or 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    keep_memory()
    try:
        if argv[:1] == ["probe"]:
            probe(parse_flags(ProbeArgs, argv[1:]))
            return 0
        if asked_objective(argv) in ("state", "simsiam"):
            path, metadata = pretrain(parse_args(argv))
            print(f"wrote {path}; use it with: {usage(path, metadata)}")
            return 0
        return pretrain_rl(*parse_flags(RLArgs, argv, return_unknown_args=True))
    except (UsageError, OSError) as error:
        print(f"pretrain_encoder.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
