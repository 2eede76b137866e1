"""DrQ-v2 with PiSCO: finetune a pretrained encoder on the DeepMind Control suite, bottom layers frozen, from pixels.

    python drqv2_pisco.py --freeze-layers 2                                 # cartpole-swingup, encoder of the balance
    python drqv2_pisco.py --encoder-weights none --ssl none                 # DrQ-v2 from scratch, its own settings
    python drqv2_pisco.py --resume runs/cartpole-swingup__drqv2_pisco__1__1700000000    # go on with a killed run
    tensorboard --logdir runs

PiSCO is the self-supervised loss of S. M. R. Arnold and F. Sha, "Policy-Induced Self-Supervision Improves
Representation Finetuning in Visual RL", arXiv 2302.06009: two augmented views of a state must induce the same policy.
DrQ-v2 is the agent of D. Yarats et al., "Mastering Visual Continuous Control", arXiv 2107.09645. The file reads top to
bottom: arguments, environment, networks, losses, replay, update, checkpoints, evaluation, main. It needs no other file
of this repository but the encoder weights, a `.safetensors` file.

A step is one action of the agent, a frame one step of the simulation: `--action-repeat` frames a step.
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
import shutil
import signal
import subprocess
import sys
import threading
import time
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
    """seed of the environment, the initial weights, the exploration, the batches and the augmentation"""
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
    """compile the losses with torch.compile; worth its start-up time on a GPU"""
    bf16: bool = False
    """compute the encoder in bfloat16; worth it on a GPU and on a CPU with AMX, other CPUs become slower"""
    track: bool = False
    """also log to Weights & Biases (pip install wandb)"""
    wandb_project_name: str = "pisco"
    """the Weights & Biases project"""
    wandb_entity: str | None = None
    """the Weights & Biases team"""
    capture_video: bool = False
    """write a GIF of the first episode of every evaluation"""
    checkpoint_interval: int = 10_000
    """frames between two checkpoints, which are written at an episode's end"""
    eval_interval: int = 10_000
    """frames between two evaluations; there is always one at the end (0: only that one)"""
    eval_episodes: int = 10
    """episodes per evaluation, played with the policy's mean"""

    # Environment
    env_id: str = "cartpole-swingup"
    """domain-task of the DeepMind Control suite, such as walker-walk or ball_in_cup-catch"""
    image_size: int = 84
    """height and width of a frame in pixels"""
    frame_stack: int = 3
    """frames that make an observation"""
    action_repeat: int = 2
    """frames for which every action is repeated"""
    render_quality: Literal["standard", "fast"] = "standard"
    """fast: no shadows, reflections and multisampling; the simulation stays the same"""

    # Encoder
    encoder_weights: str = "shipped"
    """a .safetensors file, `none` (random weights) or `shipped` (the file of encoders/ for this environment, if any;
    cartpole-balance has its own, so a run from scratch there needs `none`)"""
    freeze_layers: int | Literal["all"] = 0
    """how many of the encoder's layers stay frozen, from the bottom (0: finetune everything)"""
    freeze_random: bool = False
    """allow freezing layers of an encoder with random weights"""

    # PiSCO and its alternatives
    ssl: Literal["pisco", "simsiam", "curl", "consistency", "none"] = "pisco"
    """self-supervised loss on two augmented views, the first of which is the critic's"""
    ssl_coef: float = 0.1
    """weight lambda of the self-supervised loss"""
    ssl_fraction: float = 0.2
    """share of every batch on which the self-supervised loss is computed"""
    pisco_std: float | Literal["schedule"] = 1.0
    """pisco, consistency: standard deviation of the policies compared; `schedule`: the exploration's, which makes the
    loss 100 times as heavy in the end"""
    augmentation: Literal["shift", "noise"] = "shift"
    """random augmentation A that makes the views"""
    shift_pixels: int = 4
    """largest shift in pixels, in each direction"""
    projector_dim: int = 256
    """hidden width of the projector h (pisco, simsiam)"""
    curl_tau: float = 0.05
    """curl: step of the key encoder's moving average, once per update"""

    # DrQ-v2
    total_frames: int = 1_000_000
    """frames of the whole run"""
    learning_rate: float = 1e-4
    """learning rate of Adam"""
    batch_size: int = 256
    """transitions per update"""
    gamma: float = 0.99
    """discount factor"""
    nstep: int = 3
    """steps of reward in the critics' target"""
    tau: float = 0.01
    """step of the target critics' moving average, once per update"""
    feature_dim: int = 50
    """size of the trunks' output, the features z"""
    hidden_dim: int = 1024
    """width of the policy's and the critics' hidden layers"""
    update_every: int = 2
    """steps between two updates"""
    seed_frames: int = 4_000
    """frames before the first update"""
    explore_steps: int = 2_000
    """steps with uniformly random actions in the beginning"""
    stddev_start: float = 1.0
    """standard deviation of the exploration in the beginning"""
    stddev_end: float = 0.1
    """standard deviation of the exploration in the end"""
    stddev_steps: int = 100_000
    """steps (not frames) over which the standard deviation goes from start to end, linearly"""
    stddev_clip: float = 0.3
    """largest deviation of an action from the policy's mean in the losses"""
    replay_size: int = 1_000_000
    """transitions that the replay buffer has room for, about 1% of them kept back for --resume; fewer where the run is
    shorter"""
    replay_on_device: bool = True
    """on CUDA: keep the replay buffer's frames in the device's memory"""


# ---------------------------------------------------------------------------------------------------------------------
# Environment
# ---------------------------------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------
def layer_init(layer):
    """Orthogonal weights, with a rectifier's gain in convolutions, and no bias."""
    nn.init.orthogonal_(layer.weight, 2**0.5 if isinstance(layer, nn.Conv2d) else 1.0)
    nn.init.zeros_(layer.bias)
    return layer


class Encoder(nn.Module):
    """f: images (B, C, H, W) uint8 -> feature maps (B, 32, H', W') float32; the layers are numbered from the bottom.

    The first `frozen` layers take no gradient, build no graph and stay in eval mode.
    """

    def __init__(self, obs_shape, bf16=False):
        super().__init__()
        layers = []
        for i in range(4):
            conv = nn.Conv2d(32 if i else obs_shape[0], 32, 3, stride=1 if i else 2)
            layers.append(nn.Sequential(layer_init(conv), nn.ReLU(inplace=True)))
        self.layers = nn.ModuleList(layers)
        self.frozen, self.bf16 = 0, bf16
        side = (obs_shape[1] - 3) // 2 + 1 - 6
        if side < 1:
            raise UsageError(f"--image-size {obs_shape[1]}: too small for the encoder; choose at least 15")
        self.map_shape = (32, side, side)

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
        """Pixels as float32 in -0.5..0.5, through the frozen layers."""
        # Channels-last convolutions are faster on a CPU.
        x = obs.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(0.5)  # (B, C, H, W)
        for layer in self.layers[: self.frozen]:
            x = layer(x)
        return x

    def forward(self, obs):
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            x = self.frozen_prefix(obs)
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


class MapLinear(nn.Linear):
    """nn.Linear on the flattened feature maps (B, C, H, W), without their copy.

    Flattening channels-last maps means to reorder them, forwards and backwards; reordering the weights is cheaper.
    """

    def __init__(self, map_shape, out_features):
        super().__init__(math.prod(map_shape), out_features)
        self.map_shape = map_shape

    def forward(self, maps):
        if len(maps) == 1:
            return super().forward(maps.flatten(1))
        weight = self.weight.view(-1, *self.map_shape).permute(0, 2, 3, 1).flatten(1)  # (out, H * W * C)
        return F.linear(maps.permute(0, 2, 3, 1).flatten(1), weight, self.bias)


def make_trunk(map_shape, feature_dim):
    """Feature maps (B, C, H, W) -> features (B, feature_dim) in -1..1."""
    return nn.Sequential(layer_init(MapLinear(map_shape, feature_dim)), nn.LayerNorm(feature_dim), nn.Tanh())


def make_mlp(sizes):
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [layer_init(nn.Linear(inputs, outputs)), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    def __init__(self, map_shape, num_actions, args):
        super().__init__()
        self.trunk = make_trunk(map_shape, args.feature_dim)
        self.policy = make_mlp([args.feature_dim, args.hidden_dim, args.hidden_dim, num_actions])

    def mean(self, z):
        """The policy head: features (B, feature_dim) -> means (B, A) of the truncated normal pi(.|z)."""
        return self.policy(z).tanh()

    def forward(self, maps):
        return self.mean(self.trunk(maps))


class Critic(nn.Module):
    def __init__(self, map_shape, num_actions, args):
        super().__init__()
        self.trunk = make_trunk(map_shape, args.feature_dim)
        sizes = [args.feature_dim + num_actions, args.hidden_dim, args.hidden_dim, 1]
        self.q1, self.q2 = make_mlp(sizes), make_mlp(sizes)

    def values(self, features, actions):
        """Both critics' values (B, 1) at features (B, feature_dim) of the trunk and actions (B, A)."""
        inputs = torch.cat([features, actions], dim=-1)
        return self.q1(inputs), self.q2(inputs)

    def forward(self, maps, actions):
        return self.values(self.trunk(maps), actions)


class Agent(nn.Module):
    """Encoder f, actor, twin critics and their target, and the projector h of the self-supervised loss."""

    def __init__(self, args, obs_shape, num_actions):
        super().__init__()
        dim = args.feature_dim
        self.encoder = Encoder(obs_shape, args.bf16)
        map_shape = self.encoder.map_shape
        self.actor = Actor(map_shape, num_actions, args)
        self.critic = Critic(map_shape, num_actions, args)
        self.critic_target = Critic(map_shape, num_actions, args).requires_grad_(False)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.projector = nn.Identity()  # consistency: PiSCO with h = identity
        if args.ssl in ("pisco", "simsiam"):
            self.projector = make_mlp([dim, args.projector_dim, dim])
        elif args.ssl == "curl":
            self.projector = nn.Linear(dim, dim, bias=False)  # CURL's bilinear similarity W
            # The key encoder follows f and the actor's trunk, see update.
            self.key_encoder = nn.Sequential(Encoder(obs_shape, args.bf16), make_trunk(map_shape, dim))
            self.key_encoder.requires_grad_(False)
            self.key_encoder[1].load_state_dict(self.actor.trunk.state_dict())


def weights_path(args):
    """The encoder file that --encoder-weights stands for, or None for random weights. Raises UsageError."""
    if args.encoder_weights == "none":
        return None
    if args.encoder_weights != "shipped":
        return Path(args.encoder_weights)
    source = SHIPPED_SOURCES.get(args.env_id, args.env_id)
    path = Path(__file__).resolve().parent / "encoders" / f"{source}__drqv2__rl.safetensors"
    if path.exists():
        return path
    if args.freeze_layers:
        raise UsageError(
            f"--encoder-weights shipped: no encoder for {args.env_id} is shipped ({path.name}); "
            "give a .safetensors file, or none with --freeze-layers 0 or --freeze-random"
        )
    return None


SHIPPED_SOURCES = {"cartpole-swingup": "cartpole-balance"}  # target: the source task whose encoder it starts from


def load_encoder(path, encoder):
    """Fills `encoder` from a .safetensors file and returns the file's metadata.

    Nothing in the file is executed. Raises UsageError where the file is missing, damaged, not an encoder's, of another
    architecture or shape, or holds values that are not finite. The file's images may have been of another size:
    convolutions take any.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            found = metadata.get("architecture", "an unknown architecture")
            if found != "drqv2":
                raise UsageError(f"--encoder-weights {path}: holds {found}, not drqv2; make one with this script")
            expected = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            if shapes != expected:
                wrong = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))[0]
                raise UsageError(
                    f"--encoder-weights {path}: tensor {wrong} is {shapes.get(wrong, 'missing')} in the file, "
                    f"{expected.get(wrong, 'unknown')} here; the file was made for images "
                    f"{metadata.get('observation_shape')}; see --frame-stack"
                )
            tensors = {name: file.get_tensor(name) for name in shapes}
    except FileNotFoundError:
        raise UsageError(f"--encoder-weights {path}: no such file; a run leaves one as encoder.safetensors") from None
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"--encoder-weights {path}: not a readable .safetensors file ({error})") from None
    if not all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values()):
        raise UsageError(f"--encoder-weights {path}: holds values that are not finite float32; make the file anew")
    encoder.load_state_dict(tensors)
    return metadata


def save_encoder(path, encoder, args, obs_shape, frame):
    """Writes the encoder with the metadata that load_encoder checks and a reader wants to know."""
    metadata = {
        "architecture": "drqv2",
        "observation_shape": json.dumps(list(obs_shape)),
        "environment": args.env_id,
        "objective": f"rl (drqv2, ssl {args.ssl})",
        "steps": str(frame),
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


def stddev_schedule(step, start, end, duration):
    """Standard deviation at a step: from `start` to `end` within `duration` steps, linearly, then constant."""
    progress = min(step / duration, 1.0)
    return (1.0 - progress) * start + progress * end


def truncated_normal(mu, noise, clip=None):
    """Actions (B, A) in -1..1 at means mu and noise ~ N(0, sigma^2), clipped to -clip..clip if clip is given.

    The gradient reaches mu as if nothing had been cut off at the bounds (straight-through).
    """
    actions = mu + (noise if clip is None else noise.clamp(-clip, clip))
    inside = actions.detach().clamp(-1 + 1e-6, 1 - 1e-6)
    return inside + (actions - actions.detach())


def sample_nstep(rewards, terminated, gamma):
    """n-step return (B,) of rewards (B, n), and the discount (B,) of the value that is bootstrapped after it.

    terminated (B, n) bool: a true terminal ends the sum and leaves nothing to bootstrap; a time limit does not count.
    """
    total, discount = np.zeros_like(rewards[:, 0]), np.ones_like(rewards[:, 0])
    for reward, end in zip(rewards.T, terminated.T):
        total += discount * reward
        discount *= gamma * ~end
    return total, discount


def critic_loss(q1, q2, target_q):
    """Both critics' mean squared errors, summed; all (B, 1)."""
    return F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)


def gaussian_kl(p_mu, q_mu, std):
    """KL(p || q) of normals with the same standard deviation in every dimension: means (B, A) -> (B,)."""
    return ((p_mu - q_mu) / std).square().sum(-1) / 2


def pisco_loss(z1_mu, z2_mu, p1_mu, p2_mu, std):
    """PiSCO (Arnold and Sha 2023): 1/2 mean KL(sg pi(.|z1) || pi(.|p2)) + 1/2 mean KL(sg pi(.|z2) || pi(.|p1)).

    Takes the policy's means (B, A) at the features z and at the projections p = h(z) of both views. The gradient flows
    through the p side alone.
    """
    one_two = gaussian_kl(z1_mu.detach(), p2_mu, std).mean()
    two_one = gaussian_kl(z2_mu.detach(), p1_mu, std).mean()
    return 0.5 * (one_two + two_one)


def simsiam_loss(z1, z2, p1, p2):
    """Symmetrised negative cosine similarity of sg z and p (Chen and He 2021, eq. 2); features (B, D)."""
    one_two = F.cosine_similarity(z1.detach(), p2, dim=-1).mean()
    two_one = F.cosine_similarity(z2.detach(), p1, dim=-1).mean()
    return -0.5 * (one_two + two_one)


def info_nce_loss(queries, keys):
    """InfoNCE (van den Oord et al. 2018): query i (B, D) has to pick key i out of all keys (B, D), by dot product."""
    return F.cross_entropy(queries @ keys.T, torch.arange(len(keys), device=keys.device))


def ssl_loss(agent, views, z1, z2, kind, std):
    """The self-supervised loss `kind` on two views (2B, C, H, W) uint8 with features z1, z2 (B, D) of the actor's
    trunk, and how far the views' actions lie apart on average."""
    p1, p2 = agent.projector(torch.cat([z1, z2])).chunk(2)
    with torch.no_grad():
        z1_mu, z2_mu = agent.actor.mean(torch.cat([z1, z2])).chunk(2)
    if kind in ("pisco", "consistency"):
        p1_mu, p2_mu = agent.actor.mean(torch.cat([p1, p2])).chunk(2)
        loss = pisco_loss(z1_mu, z2_mu, p1_mu, p2_mu, std)
    elif kind == "simsiam":
        loss = simsiam_loss(z1, z2, p1, p2)
    else:  # curl, symmetrised like the others
        with torch.no_grad():
            k1, k2 = agent.key_encoder(views).chunk(2)
        loss = 0.5 * (info_nce_loss(p1, k2) + info_nce_loss(p2, k1))
    return loss, (z1_mu - z2_mu).abs().mean()


# ---------------------------------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------------------------------
class Replay:
    """Ring of frames in a memory-mapped file, every frame stored once and stacked when it is sampled.

    A row holds a frame and what led to it: action, reward and true end; in an episode's first row these say nothing.
    Rows are counted from the run's beginning; row i lies at i % rows. Only finished episodes are sampled. The oldest
    ones are given up `slack` rows before they are overwritten, and slack is more than is written from the checkpoint
    before the last one on: so a killed run has left whole whatever it samples when it goes on from either of them.
    """

    def __init__(self, path, rows, slack, frame_shape, num_actions, seed, device, resuming=False):
        self.rows, self.slack, self.device = rows, slack, device
        self.dtype = self.row_dtype(frame_shape, num_actions)
        if resuming and (not path.exists() or path.stat().st_size != rows * self.dtype.itemsize):
            raise UsageError(f"--resume: {path} is missing or not of this run; start the run anew")
        if not resuming:
            with open(path, "wb") as file:  # a full disk is noticed here, not by a crash in the middle of the run
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, rows * self.dtype.itemsize)
                else:  # macOS
                    file.truncate(rows * self.dtype.itemsize)
        self.data = np.memmap(path, self.dtype, "r+", shape=(rows,))
        self.frames = torch.from_numpy(self.data["frame"])  # (rows, 3, H, W) uint8
        if device is not None:
            self.frames = torch.empty(self.frames.shape, dtype=torch.uint8, device=device)
        self.head = self.start = 0  # rows written; first row of the unfinished episode
        self.episodes = []  # [first row, steps] of every episode that can be sampled
        self.generator = np.random.default_rng(seed)

    @staticmethod
    def row_dtype(frame_shape, num_actions):
        columns = [("frame", "u1", frame_shape), ("action", "f4", (num_actions,)), ("reward", "f4"), ("end", "?")]
        return np.dtype(columns, align=True)

    def add(self, frame, action=0.0, reward=0.0, terminated=False):
        """Appends a frame (3, H, W) uint8 and the step that led to it; an episode's first frame comes without."""
        i = self.head % self.rows
        row = self.data[i : i + 1]
        row["frame"], row["action"], row["reward"], row["end"] = frame, action, reward, terminated
        if self.device is not None:
            self.frames[i] = to_device(frame, self.device)
        self.head += 1

    def end_episode(self, nstep):
        """Makes the episode just added one that can be sampled, unless it is shorter than a sample."""
        if self.head - self.start > nstep:
            self.episodes.append([self.start, self.head - self.start - 1])
        self.start = self.head
        while self.episodes and self.episodes[0][0] < self.head + self.slack - self.rows:
            self.episodes.pop(0)

    def sample_rows(self, batch_size, nstep):
        """Rows (B,) int64 of the first observations of `batch_size` samples and of their episodes' first frames.

        An episode at random, then one of its steps at random, but none so late that the sample would cross its end.
        """
        first, steps = np.array(self.episodes)[self.generator.integers(len(self.episodes), size=batch_size)].T
        return first + self.generator.integers(steps - nstep + 1), first

    def stacks(self, rows, first, frame_stack):
        """Observations (B, 3 * frame_stack, H, W) uint8 that end with `rows`; before `first` its frame is repeated."""
        index = np.maximum(rows[:, None] + np.arange(1 - frame_stack, 1), first[:, None]) % self.rows  # (B, stack)
        index = torch.from_numpy(index)
        if self.device is not None:
            index = index.pin_memory().to(self.device, non_blocking=True)
        return self.frames.index_select(0, index.flatten()).view(len(rows), -1, *self.frames.shape[2:])

    def sample(self, batch_size, nstep, gamma, frame_stack, device):
        """A batch on the device: obs, actions (B, A), n-step rewards (B, 1), discounts (B, 1) and next obs."""
        rows, first = self.sample_rows(batch_size, nstep)
        obs, next_obs = (self.stacks(r, first, frame_stack) for r in (rows, rows + nstep))
        steps = (rows[:, None] + np.arange(1, nstep + 1)) % self.rows  # (B, n)
        returns = sample_nstep(self.data["reward"][steps], self.data["end"][steps], gamma)  # (B,) each
        actions = self.data["action"][steps[:, 0]]
        small = (to_device(x, device) for x in (actions, *(r.astype(np.float32)[:, None] for r in returns)))
        if self.device is None and device.type == "cuda":
            obs, next_obs = (x.pin_memory().to(device, non_blocking=True) for x in (obs, next_obs))
        return obs, *small, next_obs

    def get_state(self):
        """All but the rows, which are on the disk then. Taken between two episodes."""
        self.data.flush()
        rng = json.dumps(self.generator.bit_generator.state)
        return {"head": self.head, "episodes": [list(episode) for episode in self.episodes], "rng": rng}

    def set_state(self, state):
        self.head = self.start = state["head"]
        self.episodes = [list(episode) for episode in state["episodes"]]
        self.generator.bit_generator.state = json.loads(state["rng"])
        if self.device is not None:
            for i in range(0, min(self.head, self.rows), 4096):
                self.frames[i : i + 4096] = torch.from_numpy(self.data["frame"][i : i + 4096])

    def __len__(self):
        """Steps in the episodes that can be sampled."""
        return sum(steps for _, steps in self.episodes)


def replay_size(args, max_steps):
    """Rows and slack of the run's replay buffer, for episodes of `max_steps` steps: see Replay."""
    all_rows, wanted = (
        math.ceil(steps / max_steps) * (max_steps + 1)
        for steps in (args.total_frames // args.action_repeat, args.replay_size)
    )
    if all_rows <= wanted:  # nothing is overwritten: there is room for as many early ends as an episode has steps
        return all_rows + max_steps + 1, max_steps + 1
    return wanted, 2 * math.ceil(args.checkpoint_interval / args.action_repeat) + 3 * (max_steps + 1)


def check_memory(args, env, device):
    """Returns the size of the replay buffer in bytes. Raises UsageError where there is no room for it."""
    rows, slack = replay_size(args, env.max_steps)
    size = rows * Replay.row_dtype(env.observation_space.shape, env.action_space.shape[0]).itemsize
    flags = f"--replay-size {args.replay_size} --total-frames {args.total_frames}"
    if args.replay_size < args.total_frames // args.action_repeat and rows < 2 * slack:
        raise UsageError(
            f"--replay-size {args.replay_size}: too small; with --checkpoint-interval {args.checkpoint_interval} it "
            f"must be at least {2 * slack}"
        )
    folder = Path(args.runs_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    places = [
        ("memory", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 0.8, "choose smaller numbers"),
        (
            "free disk",
            math.inf if args.resume else shutil.disk_usage(folder).free,
            "choose smaller numbers, or see --runs-dir",
        ),
    ]
    if device.type == "cuda" and args.replay_on_device:
        remedy = "give --no-replay-on-device or choose smaller numbers"
        places.append(("free device memory", torch.cuda.mem_get_info()[0] * 0.8, remedy))
    for place, room, remedy in places:
        if size > room:
            raise UsageError(
                f"{flags}: the replay buffer takes {size / 2**30:.1f} GiB of {room / 2**30:.1f} GiB {place}; {remedy}"
            )
    return size


def make_replay(path, args, env, device, resuming):
    on_device = device.type == "cuda" and args.replay_on_device
    shape, num_actions = env.observation_space.shape, env.action_space.shape[0]
    rows, slack = replay_size(args, env.max_steps)
    return Replay(path, rows, slack, shape, num_actions, args.seed, device if on_device else None, resuming)


# ---------------------------------------------------------------------------------------------------------------------
# Acting and update
# ---------------------------------------------------------------------------------------------------------------------
def to_device(obs, device):
    """Observations (N, C, H, W) uint8 as a tensor on the device, without waiting for the copy."""
    obs = torch.from_numpy(np.ascontiguousarray(obs))
    return obs.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else obs


@torch.no_grad()
def act(agent, obs, device, std=0.0):
    """Action (A,) float32 at one observation (C, H, W) uint8: the policy's mean plus noise."""
    mu = agent.actor(agent.encoder(to_device(obs[None], device)))
    action = truncated_normal(mu, std * torch.randn_like(mu)) if std else mu
    action = action[0].cpu().numpy()
    if not np.isfinite(action).all():
        raise UsageError(
            "the policy is not finite; the last good checkpoint, if any, is kept in the run folder; "
            "try a smaller --learning-rate or --ssl-coef"
        )
    return action


def critic_ssl_loss(agent, views, action, reward, discount, next_obs, std, args):
    """L = L_critic + lambda L_ssl -> loss, the first views' feature maps without gradient, statistics.

    views (B + b, C, H, W) uint8: the first view of the whole batch, then the second view of its first b rows. action
    (B, A), reward and discount (B, 1), next_obs (B, C, H, W) uint8, std () float32.
    """
    batch_size, b = len(action), len(views) - len(action)
    with torch.no_grad():
        next_maps = agent.encoder(next_obs)
        next_mu = agent.actor(next_maps)
        next_action = truncated_normal(next_mu, std * torch.randn_like(next_mu), args.stddev_clip)
        target_q = reward + discount * torch.min(*agent.critic_target(next_maps, next_action))
    maps = agent.encoder(views)
    # Both trunks see all rows: slices of the features are cheap, slices of the maps are not.
    q1, q2 = agent.critic.values(agent.critic.trunk(maps)[:batch_size], action)
    loss = critic_loss(q1, q2, target_q)
    stats = {"batch_reward": reward.mean(), "critic_target_q": target_q.mean(), "critic_q1": q1.mean()}
    stats |= {"critic_q2": q2.mean(), "critic_loss": loss}
    if b:
        z = agent.actor.trunk(maps)
        both = torch.cat([views[:b], views[batch_size:]]) if args.ssl == "curl" else None
        pisco_std = std if args.pisco_std == "schedule" else args.pisco_std
        stats[args.ssl], stats["view_distance"] = ssl_loss(agent, both, z[:b], z[batch_size:], args.ssl, pisco_std)
        loss = loss + args.ssl_coef * stats[args.ssl]
    return loss, maps[:batch_size].detach(), {name: value.detach() for name, value in stats.items()}


def actor_loss(agent, maps, std, args):
    """-Q of the policy's own actions at feature maps (B, 32, H', W')."""
    mu = agent.actor(maps)
    action = truncated_normal(mu, std * torch.randn_like(mu), args.stddev_clip)
    return -torch.min(*agent.critic(maps, action)).mean()


def grad_norm(parameters):
    """Euclidean norm of all gradients together; 0 where there is none."""
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    return torch.stack(norms).norm() if norms else torch.zeros(())


def update(agent, optimizers, batch, std, args, losses=(critic_ssl_loss, actor_loss)):
    """One update from a batch of Replay.sample: critics and encoder, then the actor, then the averages.

    The self-supervised loss adds to the gradients of the encoder and of the actor; each is stepped once. Returns the
    statistics as tensors () on the device: nothing here waits for it.
    """
    obs, action, reward, discount, next_obs = batch
    b = math.ceil(args.ssl_fraction * len(obs)) if args.ssl != "none" else 0
    std = torch.full((), std, device=obs.device)
    views, next_obs = (augment(x, args.augmentation, args.shift_pixels) for x in (obs, next_obs))
    if b:
        views = torch.cat([views, augment(obs[:b], args.augmentation, args.shift_pixels)])
    loss, maps, stats = losses[0](agent, views, action, reward, discount, next_obs, std, args)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    encoder, zero = agent.encoder, torch.zeros((), device=obs.device)  # zero keeps the sums on the device
    stats["grad_norm_encoder"] = zero + grad_norm(encoder.layers[encoder.frozen :].parameters())
    stats["grad_norm_frozen"] = zero + grad_norm(encoder.layers[: encoder.frozen].parameters())
    optimizers[0].step()

    loss = losses[1](agent, maps, std, args)
    loss.backward(inputs=list(agent.actor.parameters()))  # none for the critics
    optimizers[1].step()
    stats["actor_loss"] = loss.detach()

    with torch.no_grad():
        torch._foreach_lerp_(list(agent.critic_target.parameters()), list(agent.critic.parameters()), args.tau)
        if args.ssl == "curl":
            followed = [*agent.encoder.parameters(), *agent.actor.trunk.parameters()]
            torch._foreach_lerp_(list(agent.key_encoder.parameters()), followed, args.curl_tau)
    return stats


def mean_statistics(history):
    """Means of the updates' statistics as floats, with one transfer from the device."""
    if not history:
        return {}
    table = torch.stack([torch.stack(list(stats.values())) for stats in history]).mean(dim=0).tolist()
    return dict(zip(history[0], table))


# ---------------------------------------------------------------------------------------------------------------------
# Run folder: checkpoints, metrics
# ---------------------------------------------------------------------------------------------------------------------
METRICS = [
    "frame", "episode_return", "eval/episode_length", "charts/episodic_return", "charts/episodic_length", "charts/FPS",
    "charts/stddev", "charts/replay_steps", "losses/batch_reward", "losses/critic_target_q", "losses/critic_q1",
    "losses/critic_q2", "losses/critic_loss", "losses/actor_loss", "losses/pisco", "losses/simsiam", "losses/curl",
    "losses/consistency", "losses/view_distance", "losses/grad_norm_encoder", "losses/grad_norm_frozen",
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
STATE = {"args", "agent", "optimizers", "step", "replay", "env", "seconds", "torch_rng"}


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
    it, the replay buffer's file, model.safetensors, encoder.safetensors and the evaluation's files."""

    def __init__(self, path):
        self.path = Path(path)

    @classmethod
    def create(cls, args):
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
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

    def open_logs(self, args, frame):
        """Opens metrics.csv and TensorBoard to go on after frame; later rows of a killed run are dropped."""
        path, kept = self.path / "metrics.csv", []
        if path.exists():
            with open(path, newline="") as file:
                # A row cut short by a kill has no last column.
                try:
                    reader = csv.DictReader(file)
                    rows = [row for row in reader if None not in row.values()]
                    if reader.fieldnames != METRICS or any(None in row for row in rows):
                        raise ValueError("other columns")
                    kept = [row for row in rows if int(row["frame"]) <= frame]
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
        self.tensorboard = SummaryWriter(self.path, purge_step=frame + 1 if args.resume else None)
        if not frame:
            rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
            self.tensorboard.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")

    def log(self, row):
        """Appends one row of numbers, keyed by METRICS, to metrics.csv and TensorBoard. NaN means: none yet."""
        row = {key: value for key, value in row.items() if not (isinstance(value, float) and math.isnan(value))}
        self.csv_writer.writerow(row)
        self.csv_file.flush()
        for key, value in row.items():
            if key != "frame":
                self.tensorboard.add_scalar(key, value, row["frame"])

    def export(self, agent, args, obs_shape, frame):
        """Writes model.safetensors, all networks, and encoder.safetensors, the weights for another run."""
        tensors = {name: tensor.contiguous() for name, tensor in agent.state_dict().items()}
        write_atomically(self.path / "model.safetensors", lambda file: file.write(safetensors.torch.save(tensors)))
        save_encoder(self.path / "encoder.safetensors", agent.encoder, args, obs_shape, frame)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.csv_file.close()
        self.tensorboard.close()
        if kind is KeyboardInterrupt:
            print(
                f"drqv2_pisco.py: interrupted; go on with: python drqv2_pisco.py --resume {self.path}", file=sys.stderr
            )


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------
def play_episode(agent, env, device, frame_stack, seed, frames=None):
    """Return and length in steps of an episode played with the policy's mean; its frames are appended to `frames`."""
    frame, _ = env.reset(seed=seed)
    obs = np.concatenate([frame] * frame_stack)  # (3 * frame_stack, H, W) uint8
    total, length, done = 0.0, 0, False
    while not done:
        if frames is not None and len(frames) < GIF_FRAMES:
            frames.append(frame[None])
        frame, reward, terminated, truncated, _ = env.step(act(agent, obs, device))
        obs = np.concatenate([obs[3:], frame])
        total, length, done = total + reward, length + 1, terminated or truncated
    return total, length


def evaluate(agent, args, device, frame, folder):
    """Plays episodes on an environment of its own, writes evaluation.json (on request: a GIF) and returns the averages
    under their metric names."""
    frames = [] if args.capture_video else None
    seed = args.seed + 1_000_003 + 101 * frame  # apart from the training's, and the same in a resumed run
    with contextlib.closing(DMCPixels(args.env_id, args.image_size, args.action_repeat, args.render_quality)) as env:
        episodes = [
            play_episode(agent, env, device, args.frame_stack, (seed + i) % 2**32, None if i else frames)
            for i in range(args.eval_episodes)
        ]
    returns, lengths = ([episode[i] for episode in episodes] for i in range(2))
    metrics = {"episode_return": float(np.mean(returns)), "eval/episode_length": float(np.mean(lengths))}
    results = {"frame": frame, "env_id": args.env_id, "return": returns, "length": lengths, "metrics": metrics}
    write_atomically(folder / "evaluation.json", lambda file: file.write(json.dumps(results, indent=1).encode()))
    if frames:
        write_gif(folder / f"evaluation_{frame}.gif", frames, upside_down=False)
    return metrics


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
    ("be positive", lambda x: x > 0, "image_size frame_stack action_repeat total_frames batch_size nstep feature_dim "
     "hidden_dim update_every stddev_steps replay_size projector_dim checkpoint_interval eval_episodes learning_rate "
     "ssl_fraction stddev_clip"),
    ("not be negative", lambda x: x >= 0, "seed torch_threads eval_interval ssl_coef shift_pixels seed_frames "
     "explore_steps stddev_start stddev_end"),
    ("lie in 0..1", lambda x: 0 <= x <= 1, "gamma tau curl_tau ssl_fraction"),
    ("be finite", math.isfinite, "learning_rate ssl_coef"),
    ("be at most 2**30", lambda x: x <= 2**30, "seed eval_episodes"),
    ("be at most 2**60", lambda x: x <= 2**60, "total_frames replay_size seed_frames explore_steps stddev_steps nstep "
     "checkpoint_interval eval_interval action_repeat"),
    ("be at most 65,536", lambda x: x <= 2**16, "feature_dim hidden_dim projector_dim batch_size"),
    ("be at most 1,024", lambda x: x <= 2**10, "shift_pixels torch_threads image_size frame_stack"),
    ("be at most 1e6", lambda x: x <= 1e6, "stddev_start stddev_end stddev_clip"),
    ("lie in 1e-6..1e6, or be schedule", lambda x: x == "schedule" or 1e-6 <= x <= 1e6, "pisco_std"),
]  # fmt: skip


def check_args(args):
    """Raises UsageError for values that no run can have, before anything is made or written."""
    rules = [(f"be {field.type}", partial(has_type, kind=field.type), field.name) for field in fields(Args)]
    for rule, possible, names in rules + LIMITS:  # tyro checks types on the command line, nobody those of args.json
        for name in names.split():
            if not possible(getattr(args, name)):
                raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)!r}: must {rule}")
    if args.pisco_std == "schedule" and 0 in (args.stddev_start, args.stddev_end):
        raise UsageError("--pisco-std schedule: --stddev-start and --stddev-end must be positive then")
    if 0 < args.eval_interval < args.action_repeat:
        raise UsageError(f"--eval-interval {args.eval_interval}: less than one step of {args.action_repeat} frames")
    if args.total_frames < args.action_repeat:
        raise UsageError(f"--total-frames {args.total_frames}: less than one step of {args.action_repeat} frames")
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


def keep_memory():
    """Makes glibc keep freed memory: else it maps every large activation anew, which costs an update a third more."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back
    mallopt(-2, 2**28)  # M_TOP_PAD: grow by 256 MiB at a time


def make_agent(args, env, device, resuming=False):
    """The agent, its encoder loaded and frozen as asked for, and a text that says so. Raises UsageError.

    When `resuming`, the weights are left to the checkpoint."""
    _, *size = env.observation_space.shape
    obs_shape = (3 * args.frame_stack, *size)
    agent = Agent(args, obs_shape, env.action_space.shape[0])
    encoder, path = agent.encoder, None if resuming else weights_path(args)
    count = len(encoder.layers) if args.freeze_layers == "all" else args.freeze_layers
    if not 0 <= count <= len(encoder.layers):
        raise UsageError(f"--freeze-layers {count}: the encoder has layers 0..{len(encoder.layers)}")
    if path is None and count and not args.freeze_random and not resuming:
        raise UsageError(
            f"--freeze-layers {count}: the encoder's weights are random; give --encoder-weights, or --freeze-random"
        )
    origin = "weights of the checkpoint" if resuming else "random weights"
    if path is not None:
        metadata = load_encoder(path, encoder)
        made_for = metadata.get("observation_shape", "?")
        origin = f"{path}, {metadata.get('objective')} on {metadata.get('environment')}, images {made_for}"
    encoder.freeze(count)
    if args.ssl == "curl":
        agent.key_encoder[0].load_state_dict(encoder.state_dict())
    text = f"encoder: drqv2 for {obs_shape} images, {origin}\n{encoder.table()}"
    return agent.to(device, memory_format=torch.channels_last), text


def make_optimizers(agent, learning_rate):
    """Adam for the encoder's trained layers and the critics, and another for the actor and the projector."""
    groups = [(agent.encoder, agent.critic), (agent.actor, agent.projector)]
    trained = [[p for module in group for p in module.parameters() if p.requires_grad] for group in groups]
    return [torch.optim.Adam(parameters, lr=learning_rate, fused=True) for parameters in trained]


def training_state(args, agent, optimizers, env, replay, step, seconds):
    """All that the next episode depends on, as tensors and plain values."""
    return {
        "args": run_args(args), "agent": agent.state_dict(), "step": step,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers], "replay": replay.get_state(),
        "env": env.get_state(), "seconds": seconds, "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }  # fmt: skip


def restore(state, agent, optimizers, env, replay, args):
    """Puts a checkpoint's state back. Raises UsageError if it doesn't fit."""
    try:
        if state["args"] != run_args(args):
            raise ValueError("of another run")
        agent.load_state_dict(state["agent"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["torch_rng"].cpu())
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"][: torch.cuda.device_count()]])
        env.set_state(state["env"])
        if replay is not None:  # a finished run has none
            replay.set_state(state["replay"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"--resume {args.resume}: the checkpoint does not belong to args.json") from None


def check_finite(losses, folder):
    """Raises UsageError for losses or gradients that are not finite, before they reach a checkpoint."""
    bad = [name for name, value in losses.items() if not math.isfinite(value)]
    if bad:
        raise UsageError(
            f"{bad[0]} is not finite; the last good checkpoint, if any, is kept in {folder.path}; "
            "try a smaller --learning-rate or --ssl-coef"
        )


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
    """A bar over frames with speed and ETA; a line every half minute where the output is no terminal."""
    interval = 0.5 if sys.stdout.isatty() else 30  # seconds
    return tqdm(
        initial=initial, total=total, unit="frame", unit_scale=True, file=sys.stdout, mininterval=interval,
        dynamic_ncols=True,
    )  # fmt: skip


def run(args, env, agent, optimizers, replay, folder, bar, device, step, seconds):
    """Plays and trains from `step`, which begins an episode, to the end of the run."""
    total_steps, seed_steps, eval_steps, checkpoint_steps = (
        frames // args.action_repeat
        for frames in (args.total_frames, args.seed_frames, args.eval_interval, args.checkpoint_interval)
    )
    losses = tuple(torch.compile(f) if args.compile else f for f in (critic_ssl_loss, actor_loss))
    saved, done, history = replay.head, True, []
    while step < total_steps:
        began = time.perf_counter()
        if done:
            frame, _ = env.reset()
            replay.add(frame)
            obs, episode_return, length = np.concatenate([frame] * args.frame_stack), 0.0, 0
        std = stddev_schedule(step, args.stddev_start, args.stddev_end, args.stddev_steps)
        if step < args.explore_steps:
            action = torch.rand(env.action_space.shape).mul(2).sub(1).numpy()
        else:
            action = act(agent, obs, device, std)
        if step >= seed_steps and step % args.update_every == 0 and replay.episodes:
            batch = replay.sample(args.batch_size, args.nstep, args.gamma, args.frame_stack, device)
            history.append(update(agent, optimizers, batch, std, args, losses))
        frame, reward, terminated, truncated, _ = env.step(action)
        replay.add(frame, action, reward, terminated)
        obs = np.concatenate([obs[3:], frame])
        step, episode_return, length = step + 1, episode_return + reward, length + 1
        done, last, frames = terminated or truncated, step == total_steps, step * args.action_repeat

        row = {}
        if done or last:
            statistics, history = mean_statistics(history), []
            check_finite(statistics, folder)
            row = {f"losses/{name}": value for name, value in statistics.items()}
        seconds += time.perf_counter() - began
        if done:
            replay.end_episode(args.nstep)
            row |= {"charts/episodic_return": episode_return, "charts/episodic_length": length}
            row |= {"charts/FPS": frames / seconds, "charts/stddev": std, "charts/replay_steps": len(replay)}
            bar.set_postfix({"return": f"{episode_return:.1f}"}, refresh=False)
        if last or eval_steps and step % eval_steps == 0:
            row |= evaluate(agent, args, device, frames, folder.path)
        with interrupt_later():
            if row:
                folder.log({"frame": frames, **row})
            if last or done and replay.head - saved >= checkpoint_steps:  # rows: the replay's slack counts them
                folder.save_checkpoint(training_state(args, agent, optimizers, env, replay, step, seconds))
                saved = replay.head
        bar.update(args.action_repeat)


def train(args):
    """One whole run. Returns its folder. Raises UsageError for bad arguments, OSError where a file can't be written."""
    check_args(args)
    device = set_up(args)
    total_steps = args.total_frames // args.action_repeat
    state = RunFolder(args.resume).load_checkpoint(device) if args.resume else None
    start, seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
    env = DMCPixels(args.env_id, args.image_size, args.action_repeat, args.render_quality)
    if args.nstep >= env.max_steps:
        raise UsageError(f"--nstep {args.nstep}: must be less than an episode's {env.max_steps} steps")
    env.reset(seed=args.seed)
    agent, description = make_agent(args, env, device, state is not None)
    optimizers = make_optimizers(agent, args.learning_rate)
    size = check_memory(args, env, device)

    folder = RunFolder(args.resume) if args.resume else RunFolder.create(args)
    print(description, f"replay buffer: {size / 2**20:,.0f} MiB", f"run folder: {folder.path}", sep="\n", flush=True)
    replay_path = folder.path / "replay.bin"
    replay = make_replay(replay_path, args, env, device, state is not None) if start < total_steps else None
    if state:
        restore(state, agent, optimizers, env, replay, args)
    folder.open_logs(args, start * args.action_repeat)
    with progress_bar(start * args.action_repeat, total_steps * args.action_repeat) as bar, folder:
        if replay is not None:
            run(args, env, agent, optimizers, replay, folder, bar, device, start, seconds)
    env.close()
    obs_shape = (3 * args.frame_stack, args.image_size, args.image_size)
    folder.export(agent, args, obs_shape, total_steps * args.action_repeat)
    replay_path.unlink(missing_ok=True)  # it is there to resume a run, and this one is finished
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
        print(f"drqv2_pisco.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"drqv2_pisco.py: error: {error}; make room or change --runs-dir, then go on with --resume", file=sys.stderr
        )
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("drqv2_pisco.py: error: out of memory; choose smaller batches, images or networks", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print("evaluation:", ", ".join(f"{name.removeprefix('eval/')} {value:.3f}" for name, value in metrics.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
