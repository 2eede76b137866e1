# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "torch==2.13.0", "gymnasium==1.4.0", "envpool==1.2.5", "dm-control==1.0.38", "mujoco==3.6.0", "numpy==2.4.6",
#     "tyro==1.0.17", "tensorboard==2.21.0", "safetensors==0.8.0", "tqdm==4.70.1", "pillow==13.0.0",
# ]
# ///
"""Make encoder weights for --encoder-weights of ppo_pisco.py and drqv2_pisco.py.

    python pretrain_encoder.py --output encoders/mine.safetensors     # rl: PPO on MSR Jump's source tasks
    python pretrain_encoder.py --env-id walker-stand                  # rl: DrQ-v2; further flags go to the algorithm
    python pretrain_encoder.py --resume runs/RUN --output encoders/mine.safetensors   # go on with a killed rl run
    python pretrain_encoder.py --objective state --output encoders/state.safetensors  # regress the true state
    python pretrain_encoder.py --objective simsiam --frames my_frames --env-id Pong-v5 --frame-stack 4   # no reward

`--objective rl` is the way of Arnold and Sha, arXiv 2302.06009: the algorithm trains from random weights, without a
self-supervised loss and without frozen layers, and its heads are discarded. `state` is supervised regression from
images to the true state, `simsiam` (X. Chen and K. He 2021, arXiv 2011.10566) needs images alone. `--objective state
--help` shows the flags of these two, the algorithms' own --help those that rl passes on.

`--frames` is a folder. Its images, of all formats that Pillow reads, make one sequence, frame_2 before frame_10;
transparency is dropped. Every animation is one more, and every array in its .npy and .npz files: uint8 of shape
(N, C, H, W), (N, H, W), (N, H, W, 1) or (N, H, W, 3). Four channels at the end are refused: RGBA can't be told from
four stacked images.
"""

import contextlib
import json
import math
import re
import shlex
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from PIL import Image, ImageSequence
from tqdm import tqdm

import drqv2_pisco
import ppo_pisco
from ppo_pisco import JUMP_GRID, JUMP_TASK_SETS, JumpVectorEnv, parse_jump_tasks


# --- Arguments -------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    objective: Literal["rl", "state", "simsiam"] = "rl"  # what the encoder is trained for
    env_id: str = "Jump-v0"  # source environment, an id of ppo_pisco.py or of drqv2_pisco.py (domain-task)
    output: str | None = None  # weights file to write (default: encoders/<env>__<encoder>__<objective>.safetensors)
    force: bool = False  # replace the output file if there is one


@dataclass
class RLArgs(Args):
    resume: str | None = None  # run folder of a killed rl run to go on with; use the command that it printed


@dataclass
class FrameArgs(Args):
    # Experiment
    seed: int = 1  # seed of the data, the initial weights, the batches and the augmentation
    cuda: bool = True  # use a CUDA device where there is one
    torch_deterministic: bool = True  # ask cuDNN for deterministic algorithms
    torch_threads: int = 0  # CPU threads of PyTorch (0: PyTorch's own choice, one per physical core)
    bf16: bool = False  # compute the encoder in bfloat16; faster on GPUs and on CPUs with AMX, slower on others
    eval_interval: int = 250  # updates between two evaluations on the held-out data (0: only at the end)

    # Data
    jump_tasks: str = ""  # Jump-v0: a set's name or a list of obstacle:floor (default: the grid without the targets)
    frames: str | None = None  # simsiam: folder of your own images and arrays, see above
    num_frames: int = 20_000  # images that are rendered; --frames takes all there are
    frame_stack: int = 1  # images that make an observation; Jump-v0 has one
    image_size: int = 84  # DeepMind Control: height and width of an image in pixels
    action_repeat: int = 2  # DeepMind Control: frames for which every action is repeated
    render_quality: Literal["standard", "fast"] = "standard"  # DeepMind Control: choose what drqv2_pisco.py will see

    # Encoder
    encoder: str = "nature"  # architecture: nature, impala (DeepMind Control: drqv2), or a model such as timm:resnet18
    feature_dim: int = 256  # size of the encoder's output z; DeepMind Control has none here

    # Training
    total_steps: int = 5_000  # most updates
    target_r2: float = 0.999  # state: stop once the held-out R2, averaged over the state's dimensions, reaches this
    batch_size: int = 128  # observations per update
    learning_rate: float = 1e-3  # learning rate of Adam
    augmentation: Literal["shift", "noise"] = "shift"  # simsiam: random augmentation that makes the views
    shift_pixels: int = 4  # simsiam: largest shift in pixels, in each direction
    projector_dim: int = 256  # simsiam: width of the projector; the predictor's hidden layer has a quarter of it


def choose_algorithm(env_id):
    """The module that trains on an environment: ids without version and module are tasks of DeepMind Control."""
    return ppo_pisco if re.search(r"-v\d+$|[:/]", env_id) else drqv2_pisco


def parse_args(argv):
    """The arguments of a command line, and the flags in it that go to the algorithm."""
    first, _ = tyro.cli(Args, args=[w for w in argv if w not in ("-h", "--help")], return_unknown_args=True)
    if first.objective == "rl":
        return tyro.cli(RLArgs, args=argv, description=__doc__, return_unknown_args=True)
    dmc = {"encoder": "drqv2", "frame_stack": 3, "learning_rate": 3e-4}
    dmc = dmc if choose_algorithm(first.env_id) is drqv2_pisco else {}
    defaults = FrameArgs(objective=first.objective, env_id=first.env_id, **dmc)
    return tyro.cli(FrameArgs, args=argv, default=defaults, description=__doc__), []


# --- Data: images with the true state, in memory ---------------------------------------------------------------------
@dataclass
class Data:
    """Observations, each a stack of images, with the true state and the group that is held out as a whole."""

    images: torch.Tensor  # (F, C, H, W) uint8
    stacks: torch.Tensor  # (N, S) int64: the images of observation n, the oldest first
    groups: torch.Tensor  # (N,) int64: task on Jump, else episode or section of a sequence
    states: torch.Tensor  # (N, D) float32; D = 0 where the state is unknown
    names: list  # of the D dimensions

    @property
    def obs_shape(self):
        c, h, w = self.images.shape[1:]
        return self.stacks.shape[1] * c, h, w

    def observations(self, rows):
        """Observations (B, S * C, H, W) uint8 of rows (B,) int64, channels last in memory."""
        return self.images[self.stacks[rows]].flatten(1, 2).contiguous(memory_format=torch.channels_last)


JUMP_STATE = ["agent x", "agent y", "obstacle x", "floor y"]  # pixels


def jump_states(tasks):
    """All states (S, 4) int64 of Jump's tasks, columns JUMP_STATE, and the tasks' indices (S,). The agent is wherever
    it can be without touching the obstacle: up to 16 pixels high, and not higher than it has come to the right."""
    grid = np.meshgrid(np.arange(len(tasks)), np.arange(56), np.arange(17), indexing="ij")
    task, x, height = (axis.ravel() for axis in grid)
    obstacle, floor = np.array(tasks)[task].T
    beside = (obstacle + JumpVectorEnv.OBSTACLE_W <= x) | (obstacle >= x + JumpVectorEnv.AGENT_W)
    possible = (height <= x) & (beside | (height >= JumpVectorEnv.OBSTACLE_H))
    return np.stack([x, floor + height, obstacle, floor], axis=1)[possible], task[possible]


def jump_walks(tasks, count, seed):
    """`count` states (count, 4) of a random policy that jumps now and then, and the tasks' indices (count,). Every
    other episode starts behind the obstacle, where such a policy hardly ever gets."""
    rng, env = np.random.default_rng(seed), JumpVectorEnv(64, tasks)
    env.reset(seed=seed)
    states, task_ids, was_done = [], [], np.ones(64, dtype=bool)
    while 64 * len(states) < 2 * count:  # an episode's last image is left out: the agent is in the obstacle or gone
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


def jump_data(tasks, states, task_ids):
    """Data of Jump's `tasks` with an observation of each of the states (N, 4) int64."""
    env = JumpVectorEnv(1, tasks)
    env.num_envs, env.task_ids, env.x, env.y = len(states), task_ids, states[:, 0], states[:, 1]
    images, rows = torch.from_numpy(env.observe()), torch.arange(len(states))[:, None]
    return Data(images, rows, torch.from_numpy(task_ids), torch.from_numpy(states.astype(np.float32)), JUMP_STATE)


def dmc_data(args, env_id, frame_stack, image_size, episodes, length):
    """Data of a random policy on a task of the DeepMind Control suite: `episodes` of `length` images each, every other
    one from random joint angles. The first observation is made of `frame_stack` true images, so that velocities can be
    seen. Dimensions of the state that never change are dropped. Raises SystemExit."""
    if env_id.startswith("manipulation"):
        raise SystemExit(f"--env-id {env_id}: not rendered here; use --objective rl or a task such as walker-walk")
    env = drqv2_pisco.DMCPixels(env_id, image_size, args.action_repeat, args.render_quality)  # chooses the renderer
    from dm_control.suite.utils import randomizers

    rng, images, states = np.random.default_rng(args.seed), [], []
    env.reset(seed=args.seed)
    for episode in tqdm(range(episodes), desc=f"images of {env_id}", file=sys.stdout, disable=None):
        env.reset()
        if episode % 2:
            with env.env.physics.reset_context():
                randomizers.randomize_limited_and_rotational_joints(env.env.physics, env.random)
        for _ in range(length):  # shorter than the time limit
            image, *_ = env.step(rng.uniform(-1, 1, env.action_space.shape))
            images.append(image)
            observation = env.env.task.get_observation(env.env.physics)  # the suite's state {name: float or array}
            states.append(np.concatenate([np.ravel(value) for value in observation.values()]))
    names = np.array([f"{name}[{i}]" for name, value in observation.items() for i in range(np.size(value))])
    env.close()
    stacks = np.arange(episodes * length).reshape(episodes, length)
    stacks = np.lib.stride_tricks.sliding_window_view(stacks, frame_stack, axis=1)  # (episodes, length - S + 1, S)
    groups = np.arange(episodes).repeat(stacks.shape[1])
    stacks = np.ascontiguousarray(stacks.reshape(-1, frame_stack))
    states = np.array(states, dtype=np.float32)[stacks[:, -1]]
    varies = states.std(axis=0) > 1e-4
    parts = (np.stack(images), stacks, groups, np.ascontiguousarray(states[:, varies]))
    return Data(*(torch.from_numpy(part) for part in parts), names[varies].tolist())


IMAGES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def natural_key(name):
    """Sorts frame_2 before frame_10: every other part of the split is a number."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))], name


def channels_first(array):
    """One of the arrays that --frames takes -> (N, C, H, W) uint8. Raises ValueError."""
    is_known = array.dtype == np.uint8 and array.ndim in (3, 4) and array.size > 0
    # The last axis is the channels': there are fewer of them than rows, and four at most in a single image (H, W, C).
    is_last = is_known and array.shape[-1] < (array.shape[1] if array.ndim == 4 else 5)
    if not is_known or is_last and (array.ndim == 3 or array.shape[-1] not in (1, 3)):
        shapes = "(N, C, H, W), (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
        raise ValueError(f"holds {array.dtype} of shape {array.shape}, needed are uint8 arrays {shapes}")
    array = array[:, None] if array.ndim == 3 else array
    return array.transpose(0, 3, 1, 2) if is_last else array


def read_frames(path):
    """The arrays of one file, [(N, C, H, W) uint8, ...]. Nothing in it is executed. Raises SystemExit."""
    try:
        if path.suffix.lower() in IMAGES:
            with Image.open(path) as image:
                if image.mode[0] in "IF":  # 16 and 32 bits
                    raise ValueError(f"pixels are {image.mode}, not 8 bits")
                mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
                pixels = np.stack([np.asarray(frame.convert(mode)) for frame in ImageSequence.Iterator(image)])
            arrays = [pixels.reshape(*pixels.shape[:3], -1)]  # (N, H, W, 1 or 3), N > 1 in an animation
        else:
            loaded = np.load(path, allow_pickle=False)
            arrays = [loaded[name] for name in loaded.files] if path.suffix.lower() == ".npz" else [loaded]
        return [channels_first(array) for array in arrays]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SystemExit(f"--frames {path}: {error}; convert the file or take it away") from None


def folder_data(folder, frame_stack):
    """Data of a folder's images and arrays. Raises SystemExit."""
    files = sorted(Path(folder).expanduser().glob("*"), key=lambda path: natural_key(path.name))
    paths = [path for path in files if path.suffix.lower() in IMAGES | {".npy", ".npz"}]
    if not paths:
        raise SystemExit(f"--frames {folder}: not a folder with images, .npy or .npz files; name another one")
    print(f"--frames {folder}: {len(paths)} files are read, {len(files) - len(paths)} left out", flush=True)
    images, sequences = [], []  # arrays (1, C, H, W) and (N, C, H, W) uint8
    for path in tqdm(paths, desc="frames", file=sys.stdout, disable=None):
        arrays = read_frames(path)
        (images if path.suffix.lower() in IMAGES and len(arrays[0]) == 1 else sequences).extend(arrays)
    shapes = {array.shape[1:] for array in images + sequences}
    if len(shapes) > 1:
        raise SystemExit(f"--frames {folder}: shapes (C, H, W) are mixed, {sorted(shapes)}; bring them to one size")
    sequences += [np.concatenate(images)] if images else []
    stacks, groups, start = [], [], 0
    for i, sequence in enumerate(sequences):
        ends = np.arange(start + frame_stack - 1, start + len(sequence))
        stacks.append(ends[:, None] + np.arange(1 - frame_stack, 1))
        groups.append(20 * i + 20 * np.arange(len(ends)) // max(len(ends), 1))  # twenty sections, to hold some out
        start += len(sequence)
    images = torch.from_numpy(np.ascontiguousarray(np.concatenate(sequences)))
    stacks, groups = (torch.from_numpy(np.concatenate(parts)) for parts in (stacks, groups))
    if len(stacks) < 20:
        raise SystemExit(f"--frames {folder}: {len(stacks)} observations are too few; give at least 20")
    return Data(images, stacks, groups, torch.zeros(len(stacks), 0), [])


def make_data(args):
    """The data that the arguments describe, the same every time. Raises SystemExit."""
    if args.frames:
        if args.objective == "state":
            raise SystemExit("--frames: these have no true state; use --objective simsiam")
        data = folder_data(args.frames, args.frame_stack)
        found = shown = (args.frame_stack, *data.images.shape[1:])
        if choose_algorithm(args.env_id) is ppo_pisco:
            with contextlib.suppress(SystemExit, ImportError):  # not on this machine
                envs = ppo_pisco.ImageEnvs(ppo_pisco.parse_args(["--env-id", args.env_id]), 1)
                shown = (envs.frame_stack, envs.obs_shape[0] // envs.frame_stack, *envs.obs_shape[1:])
        elif "-" in args.env_id:  # the control suite shows colours, of any size
            shown = (found[0], 3, *found[2:])
        if found != shown:
            raise SystemExit(f"--env-id {args.env_id}: shows (stack, C, H, W) = {shown}, --frames has {found}")
        return data
    if choose_algorithm(args.env_id) is drqv2_pisco:
        length = 50 + args.frame_stack - 1
        episodes = max(2, math.ceil(args.num_frames / length))
        return dmc_data(args, args.env_id, args.frame_stack, args.image_size, episodes, length)
    if args.env_id != "Jump-v0":
        remedy = "use --objective rl" if args.objective == "state" else "give its images with --frames"
        raise SystemExit(f"--env-id {args.env_id}: only Jump-v0 and control tasks are rendered here; {remedy}")
    if args.frame_stack != 1:
        raise SystemExit(f"--frame-stack {args.frame_stack}: Jump-v0 shows one image at a time; drop the flag")
    targets = JUMP_TASK_SETS["target"]
    tasks = parse_jump_tasks(args.jump_tasks) if args.jump_tasks else [x for x in JUMP_GRID if x not in targets]
    if args.objective == "simsiam":
        return jump_data(tasks, *jump_walks(tasks, args.num_frames, args.seed))
    states, task_ids = jump_states(tasks)
    chosen = np.random.default_rng(args.seed).permutation(len(states))[: args.num_frames]
    return jump_data(tasks, states[chosen], task_ids[chosen])


def split(groups, seed):
    """Rows (N,) of training and held-out data: a tenth of the groups, at least one, is held out. Raises SystemExit."""
    unique = groups.unique()
    if len(unique) < 2:
        raise SystemExit("--jump-tasks: one task alone leaves none to hold out; give two or more")
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed))
    held_out = torch.isin(groups, unique[order[: max(1, len(unique) // 10)]])
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


def standardise(states, rows):
    """States (N, D) float32, standardised by those of `rows`; what is constant in these keeps its unit."""
    mean, std = states[rows].mean(0), states[rows].std(0)
    return (states - mean) / torch.where(std > 1e-4, std, 1.0)


# --- Networks and objectives -----------------------------------------------------------------------------------------
class StateModel(nn.Module):
    """Supervised regression: the encoder, with `width` features, and a linear head for the standardised state."""

    def __init__(self, encoder, width, names):
        super().__init__()
        self.encoder, self.names = encoder, names
        self.head = ppo_pisco.layer_init(nn.Linear(width, len(names)), std=1)

    def forward(self, obs):
        """Images (B, C, H, W) uint8 -> states (B, D), standardised."""
        return self.head(self.encoder(obs).flatten(1))

    def loss(self, obs, targets):
        return F.mse_loss(self(obs), targets)

    def score(self, batches):
        """Scores {name: float} on batches of images (B, C, H, W) uint8 and states (B, D). R2 is in units of the
        training data's variance, 1, as a held-out task of Jump alone has none in obstacle and floor."""
        predictions, targets = (torch.cat(parts) for parts in zip(*((self(obs), target) for obs, target in batches)))
        r2 = (1 - (predictions - targets).square().mean(0)).tolist()
        score = {"loss": F.mse_loss(predictions, targets).item(), "r2": float(np.mean(r2)), "r2_lowest": min(r2)}
        return score | {f"r2 {name}": value for name, value in zip(self.names, r2)}


class SimSiam(nn.Module):
    """The encoder, with `width` features, the projector and the predictor of Chen and He 2021."""

    def __init__(self, encoder, width, args):
        super().__init__()
        dim, self.args = args.projector_dim, args
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True),
            nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim, affine=False),
        )  # fmt: skip
        self.predictor = nn.Sequential(
            nn.Linear(dim, dim // 4, bias=False), nn.BatchNorm1d(dim // 4), nn.ReLU(inplace=True),
            nn.Linear(dim // 4, dim),
        )  # fmt: skip

    def forward(self, obs):
        """Images (B, C, H, W) uint8 -> loss () on two augmented views, and their projections (2B, dim)."""
        views = (ppo_pisco.augment(obs, self.args) for _ in range(2))
        z1, z2 = (self.projector(self.encoder(view).flatten(1)) for view in views)  # (B, dim) each
        p1, p2 = self.predictor(z1), self.predictor(z2)
        loss = 0.5 * (ppo_pisco.simsiam_loss(z1, p2) + ppo_pisco.simsiam_loss(z2, p1))
        return loss, torch.cat([z1, z2])

    def loss(self, obs, targets):
        return self(obs)[0]

    def score(self, batches):
        """Scores {name: float} on batches of images (B, C, H, W) uint8 and what stands beside them."""
        losses, z, sizes = zip(*((*self(obs), len(obs)) for obs, _ in batches))
        weights = torch.tensor(sizes, dtype=torch.float32)
        loss = (torch.stack(losses).cpu() * weights).sum() / weights.sum()
        return {"loss": loss.item(), "collapse_std": collapse_std(torch.cat(z)).item()}


def collapse_std(z):
    """Standard deviation of normalised projections (B, d), the mean over the dimensions: about 1 / sqrt(d) where they
    are spread over the sphere, 0 where all are the same (Chen and He 2021, figure 2)."""
    return F.normalize(z, dim=-1).std(0).mean()


# --- Training: state, simsiam ----------------------------------------------------------------------------------------
def start_training(model):
    """Everything trains but the statistics of the encoder's own normalisation: no algorithm will move them either."""
    model.train().encoder.eval()


@torch.no_grad()
def evaluate(model, data, targets, rows, args, device):
    """Scores on the held-out rows, {name: float}; changes nothing, neither the model nor the random numbers."""
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)  # the same views every time
        batches = ((data.observations(r).to(device), targets[r].to(device)) for r in rows.split(args.batch_size))
        score = model.score(batches)
    start_training(model)
    return score


def fit(args, model, data, targets, train_rows, held_out, device):
    """Trains to the target or to the last update. Returns a row {step, losses/train, eval/...} for each evaluation.
    targets (N, D) float32; train_rows and held_out: rows of the data, int64. Raises SystemExit."""
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, fused=True)
    history, losses = [], []
    with tqdm(total=args.total_steps, file=sys.stdout, dynamic_ncols=True, disable=None) as bar:
        for step in range(1, args.total_steps + 1):
            batch = train_rows[torch.randint(len(train_rows), (args.batch_size,))]  # (B,) int64
            loss = model.loss(data.observations(batch).to(device), targets[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            bar.update()
            if (args.eval_interval <= 0 or step % args.eval_interval) and step < args.total_steps:
                continue
            score = evaluate(model, data, targets, held_out, args, device)
            history.append({"step": step, "losses/train": torch.stack(losses).mean().item()})
            history[-1] |= {f"eval/{name}": value for name, value in score.items()}
            losses = []
            if not all(math.isfinite(value) for value in history[-1].values()):
                raise SystemExit("the loss is not finite; try a smaller --learning-rate")
            shown = "r2" if "r2" in score else "collapse_std"
            bar.set_postfix({shown: f"{score[shown]:.4f}"}, refresh=False)
            bar.write(f"update {step:,}: held-out loss {score['loss']:.4f}, {shown} {score[shown]:.4f}")
            if score.get("r2", -math.inf) >= args.target_r2:
                break
    return history


def pretrain_on_images(args):
    """One run of state or simsiam. Returns the weights file's path. Raises SystemExit."""
    algorithm = choose_algorithm(args.env_id)
    path = output_path(args, args)
    device = algorithm.set_up(args)
    data = make_data(args)
    train_rows, held_out = split(data.groups, args.seed)
    encoder = algorithm.Encoder(args, data.obs_shape)
    width = encoder.eval()(torch.zeros(1, *data.obs_shape, dtype=torch.uint8)).numel()
    model = SimSiam(encoder, width, args) if args.objective == "simsiam" else StateModel(encoder, width, data.names)
    start_training(model.to(device, memory_format=torch.channels_last))
    print(f"device: {device}, {torch.get_num_threads()} threads")
    print(f"{len(train_rows):,} observations {data.obs_shape} for training, {len(held_out):,} held out", flush=True)
    targets = standardise(data.states, train_rows) if args.objective == "state" else data.states
    last = fit(args, model, data, targets, train_rows, held_out, device)[-1]
    score = {name.removeprefix("eval/"): value for name, value in last.items() if name.startswith("eval/")}
    print(f"after {last['step']} updates:", ", ".join(f"{name} {value:.4f}" for name, value in score.items()))
    tasks = (args.jump_tasks or "grid without target") if args.env_id == "Jump-v0" and not args.frames else ""
    algorithm.save_encoder(
        path, encoder, observation_shape=json.dumps(data.obs_shape), environment=args.env_id, tasks=tasks,
        frame_stack=data.stacks.shape[1], image_channels=data.images.shape[1],
        objective=args.objective, score=json.dumps(score), steps=last["step"], seed=args.seed,
    )  # fmt: skip
    return path


# --- Weights file ----------------------------------------------------------------------------------------------------
def output_path(args, algorithm_args):
    """Where the weights go, a place that may be written. Raises SystemExit where something is in the way."""
    name = re.sub(r"[^\w.-]+", "-", f"{algorithm_args.env_id.lower()}__{algorithm_args.encoder}__{args.objective}")
    path = args.output or ppo_pisco.ENCODERS / f"{name}.safetensors"
    path = Path(path).expanduser()
    if path.exists() and not (args.force and path.is_file()):  # --force must not replace a device
        raise SystemExit(f"--output {path}: exists; name another file, or replace a regular one with --force")
    path.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()  # where nothing can be written is found out now
    return path


def read_metadata(path):
    """The metadata {str: str} of a weights file. Nothing in it is executed."""
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


def usage(path):
    """The command that uses a weights file, ready to be pasted into a shell."""
    metadata = read_metadata(path)
    algorithm, env_id = choose_algorithm(metadata["environment"]), metadata["environment"]
    _, size, _ = json.loads(metadata["observation_shape"])
    needed = {"image_size": size, "frame_stack": int(metadata["frame_stack"])}
    needed = {"feature_dim": int(metadata["feature_dim"])} if algorithm is ppo_pisco else needed
    needed |= {"encoder": metadata["architecture"]}
    defaults = algorithm.parse_args(["--env-id", env_id])
    words = ["python", f"{algorithm.__name__}.py", "--env-id", env_id, "--encoder-weights", str(path)]
    for name, value in needed.items():
        if value != getattr(defaults, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--freeze-layers", "2"])


# --- Reinforcement learning ------------------------------------------------------------------------------------------
# On Jump, more time, to settle on a nearly deterministic policy
JUMP_SOURCE = ["--jump-tasks", "source", "--total-timesteps", "300000", "--anneal-lr", "--ent-coef", "0.003"]


def pretrain_rl(args, further):
    """Trains with ppo_pisco.py or drqv2_pisco.py and keeps the encoder. `further` flags go to the algorithm and beat
    those given here. Returns the weights file's path. Raises SystemExit."""
    if args.resume:
        saved = Path(args.resume).expanduser() / "args.json"
        algorithm = drqv2_pisco if saved.is_file() and "total_frames" in saved.read_text() else ppo_pisco
        flags = ["--resume", args.resume]
    else:
        algorithm = choose_algorithm(args.env_id)
        flags = ["--env-id", args.env_id, "--exp-name", "pretrain_encoder"]
        flags += ["--encoder-weights", "none", "--freeze-layers", "0", "--ssl", "none"]
        flags += JUMP_SOURCE if args.env_id == "Jump-v0" else []
    algorithm_args = algorithm.parse_args([*flags, *further])
    path = output_path(args, algorithm_args)  # before the training, not after it
    program = [__file__, "--output", str(path), *(["--force"] if args.force else [])]
    folder = algorithm.train(algorithm_args, program)
    encoder, evaluation = folder / "encoder.safetensors", folder / "evaluation.json"
    score = json.loads(evaluation.read_text())["metrics"] if evaluation.exists() else {}  # --eval-episodes 0
    metadata = read_metadata(encoder) | {"score": json.dumps(score)}
    if algorithm_args.ssl == "none":  # the usual case; another loss stays named
        metadata["objective"] = "rl"
    algorithm.write_atomically(path, safetensors.torch.save(safetensors.torch.load_file(encoder), metadata))
    return path


# --- Main ------------------------------------------------------------------------------------------------------------
def main(argv=None):
    args, further = parse_args(sys.argv[1:] if argv is None else list(argv))
    path = pretrain_rl(args, further) if args.objective == "rl" else pretrain_on_images(args)
    print(f"wrote {path}; for this --env-id or another one, use it with: {usage(path)}")


if __name__ == "__main__":
    main()
