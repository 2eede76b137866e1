# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "dm-control==1.0.38", "mujoco==3.6.0", "numpy==2.4.6",
#     "tyro==1.0.17", "tensorboard==2.21.0", "safetensors==0.8.0", "tqdm==4.70.1", "pillow==13.0.0"]
# ///
"""DrQ-v2 with PiSCO: finetune a pretrained encoder on the DeepMind Control suite, bottom layers frozen, from pixels.

    python drqv2_pisco.py --freeze-layers 2                                 # cartpole-swingup, encoder of the balance
    python drqv2_pisco.py --encoder-weights none --ssl none                 # DrQ-v2 from scratch, its own settings
    python drqv2_pisco.py --env-id walker-walk --help                       # the defaults of this task
    python drqv2_pisco.py --resume runs/cartpole-swingup__drqv2_pisco__1__1700000000000000    # go on with a killed run

PiSCO is the self-supervised loss of S. M. R. Arnold and F. Sha, "Policy-Induced Self-Supervision Improves
Representation Finetuning in Visual RL", arXiv 2302.06009: two augmented views of a state must induce the same policy.
That is `--ssl-teacher view --projector mlp`. By default the view that RL is trained on is the teacher of the other one.
DrQ-v2 is the agent of D. Yarats et al., "Mastering Visual Continuous Control", arXiv 2107.09645. The file needs no
other one of this repository but the encoder weights (.safetensors).

A step is one action of the agent. global_step counts the environment's steps, `--action-repeat` to an action: these are
the frames of DrQ-v2's paper and of the flags.
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
    seed: int = 1  # seed of the environment, the initial weights, the exploration, the batches and the augmentation
    runs_dir: str = "runs"  # folder in which the run folder is made
    resume: str | None = None  # run folder of a killed run to go on with; every other argument comes from that run
    cuda: bool = True  # use a CUDA device where there is one
    torch_deterministic: bool = True  # ask cuDNN for deterministic algorithms
    torch_threads: int = 0  # CPU threads of PyTorch (0: PyTorch's own choice, one per physical core)
    compile: bool = False  # compile the losses with torch.compile; worth its start-up time on a GPU
    bf16: bool = False  # compute the encoder in bfloat16; faster on GPUs and on CPUs with AMX, slower on others
    track: bool = False  # also log to Weights & Biases (pip install wandb)
    wandb_project_name: str = "pisco"  # the Weights & Biases project
    capture_video: bool = False  # write a GIF of the first episode of every evaluation
    checkpoint_interval: int = 10_000  # frames between two checkpoints, beside those before evaluations (0: only those)
    eval_interval: int = 10_000  # frames between two evaluations; the last is at the end (0: only that one)
    eval_episodes: int = 10  # episodes per evaluation, played with the policy's mean
    eval_max_steps: int = 27_000  # most steps of an evaluation's episode

    # Environment
    env_id: str = "cartpole-swingup"  # domain-task of the DeepMind Control suite, or manipulation-reach_duplo
    image_size: int = 84  # height and width of an image in pixels (manipulation: always 84)
    frame_stack: int = 3  # images that make an observation
    action_repeat: int = 2  # frames for which every action is repeated
    render_quality: Literal["standard", "fast"] = "standard"  # fast: no shadows, reflections, multisampling (suite)

    # Encoder
    encoder: str = "drqv2"  # architecture: drqv2, or a model of timm such as timm:resnet18
    encoder_weights: str = "none"  # a .safetensors file, `none`: random weights, `timm`: timm's own
    freeze_layers: int | Literal["all"] = 0  # how many of the encoder's layers stay frozen, from the bottom
    freeze_random: bool = False  # allow freezing layers of an encoder with random weights

    # PiSCO and its alternatives
    ssl: Literal["pisco", "simsiam", "curl", "none"] = "pisco"  # self-supervised loss: on policies, features, or none
    ssl_teacher: Literal["state", "view"] = "state"  # a view learns from the state that RL sees, or two from each other
    ssl_coef: float = 100.0  # weight lambda of the self-supervised loss; losses/ssl_grad_share tells what it comes to
    ssl_fraction: float = 0.2  # share of every batch on which the self-supervised loss is computed
    pisco_std: float | Literal["schedule"] = 1.0  # sigma of the policies compared (`schedule`: the exploration's)
    augmentation: Literal["shift", "noise"] = "shift"  # random augmentation A, of the critics' and actor's images too
    shift_pixels: int = 4  # largest shift in pixels, in each direction
    projector: Literal["mlp", "residual", "none"] = "none"  # h: an MLP, z plus an MLP that begins at zero, the identity
    projector_dim: int = 256  # hidden width of the projector, which simsiam has in any case; curl has a matrix instead
    curl_tau: float = 0.05  # curl: step of the key encoder's moving average, once per update

    # DrQ-v2
    total_frames: int = 1_100_000  # frames of the whole run
    learning_rate: float = 1e-4  # learning rate of Adam
    batch_size: int = 256  # transitions per update
    gamma: float = 0.99  # discount factor
    nstep: int = 3  # steps of reward in the critics' target
    tau: float = 0.01  # step of the target critics' moving average, once per update
    feature_dim: int = 50  # size of the trunks' output, the features z
    hidden_dim: int = 1024  # width of the policy's and the critics' hidden layers
    update_every: int = 2  # steps between two updates
    seed_frames: int = 4_000  # frames before the first update
    explore_steps: int = 2_000  # steps with uniformly random actions in the beginning
    stddev_start: float = 1.0  # standard deviation of the exploration in the beginning
    stddev_end: float = 0.1  # standard deviation of the exploration in the end
    stddev_steps: int = 100_000  # steps over which the standard deviation goes from start to end, linearly
    stddev_clip: float = 0.3  # largest deviation of an action from the policy's mean in the losses
    replay_size: int = 1_000_000  # transitions that the replay buffer has room for; fewer where the run is shorter


# Above are the official defaults of easy tasks, which other tasks have too; what --env-id matches has these on top.
MEDIUM = {"total_frames": 3_100_000, "stddev_steps": 500_000}
DEFAULTS = [
    ("cartpole-swingup", {"encoder_weights": str(ENCODERS / "cartpole-balance__drqv2__rl.safetensors")}),
    ("acrobot-swingup|cartpole-swingup_sparse|cheetah-run|finger-turn_.*|hopper-hop|walker-run", MEDIUM),
    ("(manipulation|quadruped|reacher)-.*", MEDIUM),
    ("quadruped-run", {"replay_size": 100_000}),
    ("walker-.*", {"nstep": 1, "batch_size": 512}),
    ("humanoid-.*", {"total_frames": 30_100_000, "stddev_steps": 2_000_000, "learning_rate": 8e-5, "feature_dim": 100}),
]


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


# --- Environment -----------------------------------------------------------------------------------------------------
class DMCPixels(gym.Env):
    """One task of the DeepMind Control suite, seen through a camera.

    Observations (3, H, W) uint8, a single image: stacking is the caller's. Actions (A,) float32 in -1..1, scaled to
    the task's bounds and repeated `action_repeat` times, with their rewards summed. `terminated` is a true end of the
    task (discount 0) or of a simulation that diverges, which ends with a black image and the rewards so far;
    `truncated` is the time limit."""

    def __init__(self, env_id, image_size=84, action_repeat=2, quality="standard"):
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # dm_control itself would try GLFW, which needs a living display
        from dm_control import manipulation, suite
        from dm_control.mujoco.engine import Camera
        from dm_control.rl.control import PhysicsError

        tasks = {f"{domain}-{task}" for domain, task in suite.ALL_TASKS if domain != "lqr"}  # whose episodes never end
        tasks |= {f"manipulation-{task[:-7]}" for task in manipulation.ALL if task.endswith("_vision")}
        if env_id not in tasks:
            close = difflib.get_close_matches(env_id, tasks) or ["cartpole-swingup", "walker-walk"]
            raise SystemExit(f"--env-id {env_id}: unknown (games: ppo_pisco.py); did you mean {', '.join(close)}?")
        domain, task = env_id.split("-")
        self.action_repeat, self.divergence, self.camera = action_repeat, PhysicsError, None
        if domain == "manipulation":  # brings its own images of 84x84 pixels
            self.env = manipulation.load(f"{task}_vision")
            self.random, image_size = self.env.random_state, 84
        else:
            self.env = suite.load(domain, task)
            self.random, model = self.env.task.random, self.env.physics.model
            # A framebuffer of the image's size instead of 640x480: the same pixels, and less to clear.
            model.vis.global_.offwidth = model.vis.global_.offheight = image_size
            if quality == "fast":
                model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
                model.light_castshadow[:] = 0
                model.mat_reflectance[:] = 0
            # One camera for good: physics.render makes a new scene for every image.
            self.camera = Camera(self.env.physics, image_size, image_size, 2 if domain == "quadruped" else 0)
        spec = self.env.action_spec()
        self.low, self.high = spec.minimum, spec.maximum  # (A,) float64 each
        if max(-self.low.min(), self.high.max()) > 1e6:
            raise SystemExit(f"--env-id {env_id}: its actions have no limits; give its actuators a ctrlrange")
        self.observation_space = gym.spaces.Box(0, 255, (3, image_size, image_size), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.low.shape, np.float32)

    def _image(self, time_step):
        pixels = self.camera.render() if self.camera else time_step.observation["front_close"][0]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W) uint8

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.random.seed(seed)
        return self._image(self.env.reset()), {}

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
        return self._image(time_step), reward, terminated, time_step.last() and not terminated, {}

    def get_state(self):
        """State of the task's random numbers, on which the next episode depends after its reset."""
        kind, keys, *rest = self.random.get_state()
        return [kind, keys.tolist(), *rest]

    def set_state(self, state):
        self.random.set_state(tuple(state))

    def close(self):
        self.env.close()


def make_env(args):
    """An environment of images (C, H, W) uint8 and actions (A,) in -1..1. Your own with its own --env-id goes here, as
    gym.wrappers.RescaleAction(Mine(), -1.0, 1.0); it repeats actions itself, or runs with --action-repeat 1. Without
    get_state and set_state it resumes with fresh episodes."""
    return DMCPixels(args.env_id, args.image_size, args.action_repeat, args.render_quality)


# --- Networks --------------------------------------------------------------------------------------------------------
def layer_init(layer):
    """Orthogonal weights, with a rectifier's gain in convolutions, and no bias."""
    nn.init.orthogonal_(layer.weight, 2**0.5 if isinstance(layer, nn.Conv2d) else 1.0)
    nn.init.zeros_(layer.bias)
    return layer


def drqv2_layers(channels):
    """The four convolutional layers of Yarats et al. 2021."""
    convs = (nn.Conv2d(32 if i else channels, 32, 3, stride=1 if i else 2) for i in range(4))
    return [nn.Sequential(layer_init(conv), nn.ReLU(inplace=True)) for conv in convs]


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
    """f: images (B, C, H, W) uint8 -> feature maps (B, C', H', W') or a ViT's tokens (B, N, D), float32. The layers are
    numbered from the bottom; the first `frozen` ones take no gradient and build no graph."""

    def __init__(self, args, obs_shape):
        super().__init__()
        make_layers = {"drqv2": drqv2_layers}.get(args.encoder)
        self.timm = None if make_layers else partial(timm_layers, args.encoder, obs_shape[0], -0.5)
        self.layers = nn.Sequential(*(make_layers(obs_shape[0]) if make_layers else self.timm()))
        with torch.no_grad():
            self.map_shape = self.layers.eval()(torch.zeros(1, *obs_shape)).shape[1:]
        self.frozen, self.bf16 = 0, args.bf16
        self.about = {"architecture": args.encoder}  # what a weights file must agree with; images may be of any size

    def freeze(self, count):
        """Freezes the `count` bottom layers, or "all"."""
        self.frozen = len(self.layers) if count == "all" else count
        if not 0 <= self.frozen <= len(self.layers):
            raise SystemExit(f"--freeze-layers {count}: this encoder has 0 to {len(self.layers)} layers to freeze")
        self.layers[: self.frozen].requires_grad_(False)

    @torch.no_grad()
    def frozen_prefix(self, obs):
        """Images (B, C, H, W) uint8 -> pixels in -0.5..0.5 through the frozen layers (B, ...), float32 or bfloat16."""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            # Channels-last convolutions are faster on a CPU.
            x = obs.to(torch.float32, memory_format=torch.channels_last).div_(255).sub_(0.5)
            return self.layers[: self.frozen](x)

    def trained_suffix(self, hidden):
        """What frozen_prefix returns -> feature maps (B, C', H', W') or tokens (B, N, D), float32."""
        with torch.autocast(hidden.device.type, torch.bfloat16, enabled=self.bf16):
            return self.layers[self.frozen :](hidden).float()

    def forward(self, obs):
        return self.trained_suffix(self.frozen_prefix(obs))


class MapLinear(nn.Linear):
    """nn.Linear on the flattened feature maps (B, C, H, W), without their copy: flattening channels-last maps means to
    reorder them, forwards and backwards; reordering the weights is cheaper. Tokens (B, N, D) have their order."""

    def __init__(self, map_shape, out_features):
        super().__init__(math.prod(map_shape), out_features)
        self.map_shape = map_shape

    def forward(self, maps):
        if len(maps) == 1 or maps.ndim == 3:
            return super().forward(maps.flatten(1))
        weight = self.weight.view(-1, *self.map_shape).permute(0, 2, 3, 1).flatten(1)  # (out, H * W * C)
        return F.linear(maps.permute(0, 2, 3, 1).flatten(1), weight, self.bias)


def make_trunk(map_shape, feature_dim):
    """Feature maps (B, C, H, W) -> features (B, feature_dim) in -1..1."""
    return nn.Sequential(layer_init(MapLinear(map_shape, feature_dim)), nn.LayerNorm(feature_dim), nn.Tanh())


def make_mlp(sizes):
    layers = [part for pair in zip(sizes, sizes[1:]) for part in (layer_init(nn.Linear(*pair)), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers[:-1])


class Actor(nn.Module):
    def __init__(self, map_shape, action_dim, args):
        super().__init__()
        self.trunk = make_trunk(map_shape, args.feature_dim)
        self.policy = make_mlp([args.feature_dim, args.hidden_dim, args.hidden_dim, action_dim])

    def mean(self, z):
        """The policy head: features (B, feature_dim) -> means (B, A) of the truncated normal pi(.|z)."""
        return self.policy(z).tanh()

    def forward(self, maps):
        return self.mean(self.trunk(maps))


class Critic(nn.Module):
    def __init__(self, map_shape, action_dim, args):
        super().__init__()
        self.trunk = make_trunk(map_shape, args.feature_dim)
        sizes = [args.feature_dim + action_dim, args.hidden_dim, args.hidden_dim, 1]
        self.q1, self.q2 = make_mlp(sizes), make_mlp(sizes)

    def values(self, features, actions):
        """Both critics' values (B, 1) at features (B, feature_dim) of the trunk and actions (B, A)."""
        inputs = torch.cat([features, actions], dim=-1)
        return self.q1(inputs), self.q2(inputs)

    def forward(self, maps, actions):
        return self.values(self.trunk(maps), actions)


class Agent(nn.Module):
    """Encoder f, actor, twin critics and their target, and the projector h of the self-supervised loss."""

    def __init__(self, args, encoder, action_dim):
        super().__init__()
        dim, map_shape = args.feature_dim, encoder.map_shape
        self.encoder = encoder
        self.actor = Actor(map_shape, action_dim, args)
        self.critic = Critic(map_shape, action_dim, args)
        self.critic_target = Critic(map_shape, action_dim, args).requires_grad_(False)
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.projector = nn.Identity()
        if args.ssl == "curl":
            self.projector = nn.Linear(dim, dim, bias=False)  # CURL's bilinear similarity W
            # The key encoder follows f and the actor's trunk, see update.
            self.key_encoder = copy.deepcopy(nn.Sequential(encoder, self.actor.trunk)).requires_grad_(False)
        elif args.ssl == "simsiam" or args.ssl != "none" and args.projector != "none":
            self.projector = make_mlp([dim, args.projector_dim, dim])
            if args.projector == "residual":
                nn.init.zeros_(self.projector[-1].weight)  # with ssl_loss's sum it begins as the identity
        self.eval()  # one policy acts, learns and is kept: no statistics move, nothing drops out


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


def stddev_schedule(step, start, end, duration):
    """Standard deviation at a step: from `start` to `end` within `duration` steps, linearly, then constant."""
    progress = min(step / duration, 1.0)
    return (1.0 - progress) * start + progress * end


def truncated_normal(mu, noise, clip=None):
    """Actions (B, A) in -1..1 at means mu and noise ~ N(0, sigma^2), clipped to -clip..clip if clip is given. The
    gradient reaches mu as if nothing had been cut off at the bounds (straight-through)."""
    actions = mu + (noise if clip is None else noise.clamp(-clip, clip))
    inside = actions.detach().clamp(-1 + 1e-6, 1 - 1e-6)
    return inside + (actions - actions.detach())


def sample_nstep(rewards, terminated, gamma):
    """n-step return (B,) of rewards (B, n), and the discount (B,) of the value that is bootstrapped after it.
    terminated (B, n) bool: a true terminal ends the sum and leaves nothing to bootstrap, a time limit does not."""
    total, discount = np.zeros_like(rewards[:, 0]), np.ones_like(rewards[:, 0])
    for reward, end in zip(rewards.T, terminated.T):
        total += discount * reward
        discount *= gamma * ~end
    return total, discount


def gaussian_kl(p_mu, q_mu, std):
    """KL(p || q) of normals with the same standard deviation in every dimension: means (B, A) -> (B,)."""
    return ((p_mu - q_mu) / std).square().sum(-1) / 2


def pisco_loss(teacher_mu, student_mu, std):
    """PiSCO in one direction (Arnold and Sha 2023): mean KL(sg pi(.|z1) || pi(.|p2)), means (B, A) at the teacher's
    features z1 and the student's projected ones p2 = h(z2). The gradient flows through the latter alone."""
    return gaussian_kl(teacher_mu.detach(), student_mu, std).mean()


def simsiam_loss(z, p):
    """Negative cosine similarity of the teacher's features sg z and the student's p, (B, D) each (Chen and He 2021)."""
    return -F.cosine_similarity(z.detach(), p, dim=-1).mean()


def info_nce_loss(keys, queries):
    """InfoNCE (van den Oord et al. 2018): query i (B, D) has to pick key i out of all keys (B, D), by dot product."""
    return F.cross_entropy(queries @ keys.T, torch.arange(len(keys), device=keys.device))


def ssl_loss(agent, z_teacher, z_student, teachers, std, args):
    """The loss of students with features z_student (n, D) that learn from teachers with z_teacher, the features of the
    images `teachers`. With two views both are both views, one after the other, and each learns from the other."""
    p, z_teacher = agent.projector(z_student), z_teacher.detach()
    if args.projector == "residual" and args.ssl != "curl":
        p = z_student + p
    if args.ssl == "pisco":
        loss, teacher, student = partial(pisco_loss, std=std), agent.actor.mean(z_teacher), agent.actor.mean(p)
    elif args.ssl == "simsiam":
        loss, teacher, student = simsiam_loss, z_teacher, p
    elif args.ssl == "curl":
        loss, teacher, student = info_nce_loss, agent.key_encoder(teachers), p
    directions = 2 if args.ssl_teacher == "view" else 1
    pairs = zip(teacher.chunk(directions), student.chunk(directions)[::-1])
    return sum(loss(*pair) for pair in pairs) / directions


# --- Replay ----------------------------------------------------------------------------------------------------------
class Replay:
    """Ring of images in a memory-mapped file, each stored once and stacked when it is sampled.

    A row holds an image and what led to it: action, reward and true end; in an episode's first row these say nothing.
    Rows are counted from the run's beginning; row i lies at i % rows. Only finished episodes are sampled, and whole
    ones. A resumed run gives up what the killed one has overwritten since its checkpoint, so that it ends bitwise the
    same only as long as the ring is not full."""

    def __init__(self, path, rows, image_shape, action_dim, seed):
        columns = [("index", "i8"), ("image", "u1", image_shape), ("action", "f4", (action_dim,))]
        dtype = np.dtype([*columns, ("reward", "f4"), ("end", "?")], align=True)
        # A full disk is noticed here, not by a crash later. In append mode glibc couldn't help the file system.
        with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, rows * dtype.itemsize)
            else:  # macOS
                file.truncate(rows * dtype.itemsize)
        self.rows, self.data = rows, np.memmap(path, dtype, "r+", shape=(rows,))
        self.images = torch.from_numpy(self.data["image"])  # (rows, C, H, W) uint8
        self.head = self.start = 0  # rows written; first row of the unfinished episode
        self.episodes = []  # [first row, steps] of every episode that can be sampled
        self.generator = np.random.default_rng(seed)

    def add(self, image, action=0.0, reward=0.0, terminated=False):
        """Appends an image (C, H, W) uint8 and the step that led to it; an episode's first image comes without."""
        if self.episodes and self.episodes[0][0] <= self.head - self.rows:  # its first row is overwritten now
            self.episodes.pop(0)
        row = self.data[self.head % self.rows :][:1]
        row["index"] = -1  # a kill from here on leaves a row that is neither the old one nor the new one
        row["image"], row["action"], row["reward"], row["end"] = image, action, reward, terminated
        row["index"] = self.head
        self.head += 1

    def end_episode(self, nstep):
        """Makes the episode just added one that can be sampled, unless it is shorter than a sample."""
        if nstep < self.head - self.start <= self.rows:
            self.episodes.append([self.start, self.head - self.start - 1])
        self.start = self.head

    def sample_rows(self, batch_size, nstep):
        """Rows (B,) int64 of the first observations of `batch_size` samples and of their episodes' first images. An
        episode at random, then one of its steps at random, but none so late that the sample would cross its end."""
        first, steps = np.array(self.episodes)[self.generator.integers(len(self.episodes), size=batch_size)].T
        return first + self.generator.integers(steps - nstep + 1), first

    def stacks(self, rows, first, frame_stack, device="cpu"):
        """Observations (B, C * frame_stack, H, W) uint8 that end with `rows`; before `first` its image is repeated."""
        index = np.maximum(rows[:, None] + np.arange(1 - frame_stack, 1), first[:, None]) % self.rows  # (B, stack)
        images = self.images.new_empty(index.size, *self.images.shape[1:], pin_memory="cuda" in str(device))
        torch.index_select(self.images, 0, torch.from_numpy(index.ravel()), out=images)  # no copy to pin
        return images.view(len(rows), -1, *self.images.shape[2:])

    def sample(self, args, device):
        """A batch on the device: obs, actions (B, A), n-step rewards (B, 1), discounts (B, 1) and next obs."""
        rows, first = self.sample_rows(args.batch_size, args.nstep)
        steps = (rows[:, None] + np.arange(1, args.nstep + 1)) % self.rows  # (B, n)
        reward, discount = sample_nstep(self.data["reward"][steps], self.data["end"][steps], args.gamma)  # (B,) each
        obs, next_obs = (self.stacks(r, first, args.frame_stack, device) for r in (rows, rows + args.nstep))
        action = torch.from_numpy(self.data["action"][steps[:, 0]])
        reward, discount = (torch.from_numpy(x.astype(np.float32)[:, None]) for x in (reward, discount))
        return [x.to(device, non_blocking=True) for x in (obs, action, reward, discount, next_obs)]

    def get_state(self):
        """All but the rows, which are on the disk then. Taken between two episodes."""
        self.data.flush()
        return {"head": self.head, "episodes": self.episodes, "rng": self.generator.bit_generator.state}

    def set_state(self, state):
        self.head = self.start = state["head"]
        self.generator.bit_generator.state = state["rng"]
        # What was written after the checkpoint lies from head on, up to a row that is still of the round before.
        end = max(self.head, self.rows)
        while end < self.head + self.rows and self.data["index"][end % self.rows] != end - self.rows:
            end += 1
        self.episodes = [episode for episode in state["episodes"] if episode[0] >= end - self.rows]


# --- Acting and update -----------------------------------------------------------------------------------------------
@torch.no_grad()
def act(agent, obs, device, std=0.0):
    """Action (A,) float32 at one observation (C, H, W) uint8: the policy's mean plus noise."""
    mu = agent.actor(agent.encoder(torch.from_numpy(obs[None]).to(device)))
    action = truncated_normal(mu, std * torch.randn_like(mu)) if std else mu
    return action[0].cpu().numpy()


def critic_ssl_loss(agent, views, action, reward, discount, next_obs, std, args):
    """L_critic and lambda L_ssl, the first views' feature maps without gradient, and statistics. views (B + b, C, H, W)
    uint8: the first view of the whole batch, then the second view of its first b rows. action (B, A), reward and
    discount (B, 1), next_obs (B, C, H, W) uint8, std () float32."""
    batch_size, b = len(action), len(views) - len(action)
    with torch.no_grad():
        next_maps = agent.encoder(next_obs)
        next_mu = agent.actor(next_maps)
        next_action = truncated_normal(next_mu, std * torch.randn_like(next_mu), args.stddev_clip)
        target_q = reward + discount * torch.min(*agent.critic_target(next_maps, next_action))
    maps = agent.encoder(views)
    # Both trunks see all rows: slices of the features are cheap, slices of the maps are not.
    q1, q2 = agent.critic.values(agent.critic.trunk(maps)[:batch_size], action)
    loss = F.mse_loss(q1, target_q) + F.mse_loss(q2, target_q)
    stats = {"batch_reward": reward.mean(), "critic_target_q": target_q.mean(), "critic_q1": q1.mean()}
    stats |= {"critic_q2": q2.mean(), "critic_loss": loss}
    ssl = torch.zeros_like(loss)
    if b:
        z = agent.actor.trunk(maps)
        views, z = (torch.cat([x[:b], x[batch_size:]]) for x in (views, z))  # (2b, ...): RL's own view, then the other
        teacher, student = (slice(b), slice(b, None)) if args.ssl_teacher == "state" else (slice(2 * b),) * 2
        pisco_std = std if args.pisco_std == "schedule" else args.pisco_std
        stats[args.ssl] = ssl_loss(agent, z[teacher], z[student], views[teacher], pisco_std, args)
        ssl = args.ssl_coef * stats[args.ssl]
    return loss, ssl, maps[:batch_size].detach(), {name: value.detach() for name, value in stats.items()}


def actor_loss(agent, maps, std, args):
    """-Q of the policy's own actions at feature maps (B, ...) of the encoder."""
    mu = agent.actor(maps)
    action = truncated_normal(mu, std * torch.randn_like(mu), args.stddev_clip)
    return -torch.min(*agent.critic(maps, action)).mean()


def update(agent, critic_optimizer, actor_optimizer, batch, std, args, once=None):
    """One update from a batch of Replay.sample: critics and encoder, then the actor, then the averages. The
    self-supervised loss adds to the gradients of the encoder and of the actor; each is stepped once. Returns the
    statistics as tensors () on the device: nothing here waits for it. The dict `once`, where given, takes those for
    which one update in a while is enough."""
    critic_loss_function = torch.compile(critic_ssl_loss) if args.compile else critic_ssl_loss
    actor_loss_function = torch.compile(actor_loss) if args.compile else actor_loss
    obs, action, reward, discount, next_obs = batch
    b = math.ceil(args.ssl_fraction * len(obs)) if args.ssl != "none" else 0
    std = torch.full((), std, device=obs.device)
    views, next_obs = augment(obs, args), augment(next_obs, args)
    if b:
        views = torch.cat([views, augment(obs[:b], args)])
    function = critic_loss_function if once is None else critic_ssl_loss  # a compiled graph is freed by its first use
    loss, ssl, maps, stats = function(agent, views, action, reward, discount, next_obs, std, args)
    if once is not None:
        # On a CPU the training's random numbers are the same without it.
        with torch.no_grad(), torch.random.fork_rng([]):
            mu, view_mu = (agent.actor(agent.encoder(x)) for x in (obs[:64], augment(obs[:64], args)))
            once["view_distance"] = (mu - view_mu).abs().mean()
        trained = [p for p in agent.encoder.parameters() if p.requires_grad]
        if b and trained:  # lambda L_ssl's gradient on the encoder over L_critic's
            norms = [nn.utils.get_total_norm(torch.autograd.grad(x, trained, retain_graph=True)) for x in (ssl, loss)]
            once["ssl_grad_share"] = norms[0] / (norms[1] + 1e-12)
    critic_optimizer.zero_grad()
    actor_optimizer.zero_grad()
    (loss + ssl).backward()
    norms = [p.grad.norm() for p in agent.encoder.parameters() if p.grad is not None]
    stats["grad_norm_encoder"] = torch.stack(norms).norm() if norms else torch.zeros_like(std)
    critic_optimizer.step()

    loss = actor_loss_function(agent, maps, std, args)
    loss.backward(inputs=list(agent.actor.parameters()))  # none for the critics
    actor_optimizer.step()
    stats["actor_loss"] = loss.detach()

    with torch.no_grad():
        torch._foreach_lerp_(list(agent.critic_target.parameters()), list(agent.critic.parameters()), args.tau)
        if args.ssl == "curl":
            followed = [*agent.encoder.parameters(), *agent.actor.trunk.parameters()]
            torch._foreach_lerp_(list(agent.key_encoder.parameters()), followed, args.curl_tau)
    return stats


def mean_statistics(history):
    """Means of the updates' statistics [{name: tensor ()}], as floats. Raises SystemExit where one is not finite."""
    if not history:
        return {}
    means = torch.stack([torch.stack(list(stats.values())) for stats in history]).mean(dim=0).tolist()
    if not all(math.isfinite(mean) for mean in means):
        raise SystemExit("the loss is not finite; try a smaller --learning-rate or --ssl-coef")
    return dict(zip(history[0], means))


# --- Evaluation ------------------------------------------------------------------------------------------------------
def play_episode(agent, env, args, device, seed, images=None):
    """Return and length in steps of an episode played with the policy's mean. Its images (C, H, W) uint8 are added to
    `images`, where given, thinned out to 160 pixels at most."""
    image, _ = env.reset(seed=seed)
    obs = np.concatenate([image] * args.frame_stack)  # (C * frame_stack, H, W) uint8
    thin, total = math.ceil(max(image.shape[1:]) / 160), 0.0
    for length in range(1, args.eval_max_steps + 1):
        if images is not None and len(images) < 1000:
            images.append(image[:, ::thin, ::thin].copy())
        image, reward, terminated, truncated, _ = env.step(act(agent, obs, device))
        obs, total = np.concatenate([obs[len(image) :], image]), total + float(reward)
        if terminated or truncated:
            return total, length
    print(f"evaluation: an episode was cut off after {length} steps")
    return total, length


def evaluate(agent, args, device, global_step, folder):
    """Plays episodes, writes evaluation.json and on request a GIF, and returns the averages by metric name."""
    env, episodes, images = make_env(args), [], []
    seeds = np.random.SeedSequence([args.seed, global_step]).generate_state(args.eval_episodes)  # of this seed alone
    for i, seed in enumerate(seeds.tolist()):
        episodes.append(play_episode(agent, env, args, device, seed, images if args.capture_video and not i else None))
    env.close()
    returns, lengths = zip(*episodes)
    metrics = {"eval/greedy_return": float(np.mean(returns)), "eval/greedy_length": float(np.mean(lengths))}
    results = {"global_step": global_step, "env_id": args.env_id, "return": returns, "length": lengths}
    write_atomically(folder / "evaluation.json", json.dumps(results | {"metrics": metrics}, indent=1).encode())
    if images:
        write_gif(folder / f"evaluation_{global_step}.gif", images)
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


def make_optimizers(agent, learning_rate):
    """Adam for the encoder's trained layers and the critics, and another for the actor and the projector."""
    critic = [p for module in (agent.encoder, agent.critic) for p in module.parameters() if p.requires_grad]
    actor = [*agent.actor.parameters(), *agent.projector.parameters()]
    return torch.optim.Adam(critic, lr=learning_rate, fused=True), torch.optim.Adam(actor, lr=learning_rate, fused=True)


def train(args, program=(__file__,)):
    """One whole run. Returns its folder. Raises SystemExit, naming the flag and the remedy, where none is possible."""
    total_steps, seed_steps = args.total_frames // args.action_repeat, args.seed_frames // args.action_repeat
    if math.ceil(max(seed_steps, 1) / args.update_every) * args.update_every >= total_steps:
        raise SystemExit(f"--total-frames {args.total_frames}: no update in it; see --seed-frames, --update-every")
    if not 0 <= args.ssl_fraction <= 1:
        raise SystemExit(f"--ssl-fraction {args.ssl_fraction}: a share of the batch; give 0 to 1")
    device = set_up(args)
    state = load_checkpoint(args.resume, device) if args.resume else None
    step = state["step"] if state else 0
    env = make_env(args)
    env.reset(seed=args.seed + step)  # another seed after a resume
    channels, *size = image_shape = env.observation_space.shape
    obs_shape, action_dim = (args.frame_stack * channels, *size), env.action_space.shape[0]
    encoder = make_encoder(args, obs_shape, args.frame_stack, resuming=state is not None)
    agent = Agent(args, encoder, action_dim).to(device, memory_format=torch.channels_last)
    critic_optimizer, actor_optimizer = make_optimizers(agent, args.learning_rate)
    folder = Path(args.resume).expanduser() if args.resume else make_run_folder(args)
    try:  # The file stays open: the system unlocks it when this process ends, be it by a kill.
        fcntl.lockf(os.open(folder / "args.json", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):  # Another error comes from a mount that has no locks.
            raise SystemExit(f"--resume {folder}: another process is at work in it; wait for its end") from None
    if state and step < total_steps and not (folder / "replay.bin").exists():
        raise SystemExit(f"--resume {folder}: replay.bin is missing; start the run anew")
    if args.track:
        import wandb

        about = {"project": args.wandb_project_name, "name": folder.name, "id": folder.name, "config": asdict(args)}
        wandb.init(**about, resume="allow", sync_tensorboard=True)
    # An episode's first image has a row too; a finished run that comes back to its last evaluation needs none.
    num_rows = min(args.replay_size, total_steps + total_steps // 100 + 1000) if step < total_steps else 1
    replay = Replay(folder / "replay.bin", num_rows, image_shape, action_dim, args.seed)
    row, rows_before, seconds = [state[name] for name in ("row", "rows_before", "seconds")] if state else ({}, 0, 0.0)
    if state:
        agent.load_state_dict(state["agent"])
        critic_optimizer.load_state_dict(state["critic_optimizer"])
        actor_optimizer.load_state_dict(state["actor_optimizer"])
        torch.set_rng_state(state["torch_rng"].cpu())
        if device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        replay.set_state(state["replay"])
        if state["env"]:
            env.unwrapped.set_state(state["env"])

    cmd = shlex.join(["python", *program, "--resume", str(folder)])
    print(f"replay buffer: {replay.data.nbytes / 2**20:,.0f} MiB")
    print(f"device: {device}, {torch.get_num_threads()} threads\nrun folder: {folder}\nafter a kill: {cmd}", flush=True)
    # What a killed run logged from its checkpoint on is dropped. In metrics.csv the columns' names are the first line.
    for path in folder.glob("metrics.csv"):
        write_atomically(path, b"".join(path.read_bytes().splitlines(keepends=True)[: 1 + rows_before]))
    writer = SummaryWriter(folder, purge_step=step * args.action_repeat if args.resume else None)
    bar = tqdm(initial=step * args.action_repeat, total=total_steps * args.action_repeat, unit="frame", unit_scale=True,
        file=sys.stdout, mininterval=0.5 if sys.stdout.isatty() else 30, dynamic_ncols=True)  # fmt: skip
    evaluation_due = bool(state) and state["evaluation_due"]
    while True:  # an episode a time
        if step == total_steps:
            env.close()  # a simulator may be there once only
            tensors = {name: tensor.contiguous() for name, tensor in agent.state_dict().items()}
            write_atomically(folder / "model.safetensors", safetensors.torch.save(tensors))
            save_encoder(folder / "encoder.safetensors", encoder, observation_shape=json.dumps(obs_shape),
                environment=args.env_id, objective=f"rl (drqv2, ssl {args.ssl})", steps=row["global_step"],
                seed=args.seed)  # fmt: skip
            (folder / "replay.bin").unlink(missing_ok=True)  # it is there to resume a run, and this one is finished
        # After checkpoint and weights, as it can take long, and fail: a run that ends in it comes back to it at once.
        if evaluation_due:
            row |= evaluate(agent, args, device, row["global_step"], folder)
        if row:
            append_metrics(folder / "metrics.csv", row)
            rows_before += 1
        for name, number in row.items():
            writer.add_scalar(name, number, row["global_step"])
        if step == total_steps:
            break
        began, first_step = time.perf_counter(), step
        image, _ = env.reset()
        replay.add(image)
        obs, episode_return, done, history = np.concatenate([image] * args.frame_stack), 0.0, False, []
        once = {}
        # One that outgrows the ring, and so can't be sampled, is given up.
        while not done and step < total_steps and replay.head - replay.start <= replay.rows:
            std = stddev_schedule(step, args.stddev_start, args.stddev_end, args.stddev_steps)
            if step < args.explore_steps:
                action = torch.rand(env.action_space.shape).mul(2).sub(1).numpy()
            else:
                action = act(agent, obs, device, std)
            if step >= seed_steps and step % args.update_every == 0 and replay.episodes:
                batch = replay.sample(args, device)
                measured = once if step % (100 * args.update_every) == 0 else None
                history.append(update(agent, critic_optimizer, actor_optimizer, batch, std, args, measured))
            image, reward, terminated, truncated, _ = env.step(action)
            replay.add(image, action, reward, terminated)
            obs = np.concatenate([obs[channels:], image], dtype=np.uint8, casting="no")
            step, episode_return, done = step + 1, episode_return + float(reward), terminated or truncated
            bar.update(args.action_repeat)
        seconds += time.perf_counter() - began

        before, after, last = first_step * args.action_repeat, step * args.action_repeat, step == total_steps  # frames
        images, _ = replay.head - replay.start, replay.end_episode(args.nstep)  # of this episode
        unusable = not replay.episodes and (images > replay.rows or truncated and images <= args.nstep)
        if unusable or last and not critic_optimizer.state:
            (folder / "replay.bin").unlink()
            raise SystemExit("--total-frames, --nstep, --replay-size: no episode has nstep steps and fits the buffer")
        row = {"global_step": after, "charts/SPS": after / seconds, "charts/stddev": std}
        if done:
            row["charts/episodic_return"], row["charts/episodic_length"] = episode_return, step - first_step
            row["charts/replay_steps"] = sum(steps for _, steps in replay.episodes)
            bar.set_postfix({"return": f"{episode_return:.1f}"}, refresh=False)
        numbers = mean_statistics(history) | {name: value.item() for name, value in once.items()}
        row |= {f"losses/{name}": number for name, number in numbers.items()}
        intervals = args.eval_interval, args.checkpoint_interval
        evaluation_due, checkpoint_due = (last or k > 0 and after // k > before // k for k in intervals)
        evaluation_due &= args.eval_episodes > 0
        if evaluation_due or checkpoint_due:
            state = {
                "step": step, "evaluation_due": evaluation_due, "row": row, "rows_before": rows_before,
                "seconds": seconds, "agent": agent.state_dict(), "critic_optimizer": critic_optimizer.state_dict(),
                "actor_optimizer": actor_optimizer.state_dict(), "replay": replay.get_state(),
                "env": getattr(env.unwrapped, "get_state", lambda: None)(), "torch_rng": torch.get_rng_state(),
                "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
            }  # fmt: skip
            torch.save(state, buffer := io.BytesIO())
            write_atomically(folder / "checkpoint.pt", buffer.getvalue())
    bar.close()
    writer.close()
    print("evaluation:", ", ".join(f"{key[5:]} {score:.3f}" for key, score in row.items() if "eval/" in key) or "none")
    return folder


if __name__ == "__main__":
    train(parse_args())
