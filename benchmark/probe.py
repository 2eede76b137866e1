"""Tell by linear models how many of an encoder's layers to freeze: what does a ridge regression read from each?

    python benchmark/probe.py                                                       # the shipped encoder of MSR Jump
    python benchmark/probe.py --encoder-weights encoders/cartpole-balance__drqv2__rl.safetensors \\
        --target-env-id cartpole-swingup

Fits a ridge to every layer's activations, for the true state (R2) and, on MSR Jump, for the optimal action among the
steps on the ground before the obstacle (balanced accuracy). Random encoders of the same architecture are the control.
Prints a table and the recommended --freeze-layers, and writes probe.csv and probe.png.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import safetensors
import torch
import tyro
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
from ppo_pisco import JumpVectorEnv, parse_jump_tasks  # noqa: E402
from pretrain_encoder import JUMP_STATE, Data, choose_algorithm, dmc_data, jump_data, jump_states  # noqa: E402


@dataclass
class Args:
    encoder_weights: str = str(ROOT / "encoders" / "jump-v0__nature__rl.safetensors")  # the .safetensors file to probe
    env_id: str | None = None  # source: Jump-v0 or a DeepMind Control task (default: what the weights file names)
    target_env_id: str | None = None  # DeepMind Control: the task to transfer to
    jump_source: str = "source"  # Jump-v0: source tasks, a set's name or a list of obstacle:floor
    jump_target: str = "target"  # Jump-v0: target tasks, likewise
    output: str | None = None  # folder for probe.csv and probe.png (default: runs/probe__<name of the weights file>)
    seed: int = 1  # seed of the images; the random encoders have the seeds that follow
    num_random: int = 3  # randomly initialised encoders of the same architecture
    episodes: int = 100  # DeepMind Control: of each task, five observations each; an eighth is held out at a time
    action_repeat: int = 2  # DeepMind Control: steps of the environment for which every action is repeated
    render_quality: Literal["standard", "fast"] = "standard"  # DeepMind Control: as in drqv2_pisco.py
    tolerance: float = 0.05  # score that a frozen layer may lose against the best layer on the target tasks
    torch_threads: int = 0  # CPU threads of PyTorch (0: PyTorch's own choice, one per physical core)


# --- Ridge -----------------------------------------------------------------------------------------------------------
PENALTIES = [10.0**power for power in range(-7, 2)]  # in units of the rows' mean squared norm


def weighted_mean(x, weights):
    return (weights[:, None] * x).sum(0) / weights.sum()


def eigen_ridge(x, y, weights):
    """What ridge fits of x (n, d), y (n, k), weights (n,), float64 each, share whatever their penalty: the centred rows
    times the root of their weights as u diag(s) v^T, u (n, r), s (r,), v (d, r), from the smaller of both Gram matrices
    (the primal or the dual form), and the centred y (n, k)."""
    root = weights.sqrt()[:, None]
    a, b = root * (x - weighted_mean(x, weights)), root * (y - weighted_mean(y, weights))
    n, d = a.shape
    squares, vectors = torch.linalg.eigh(a.T @ a if d < n else a @ a.T)
    kept = squares > 1e-12 * squares[-1].clamp(min=1e-300)
    s, vectors = squares[kept].sqrt(), vectors[:, kept]
    u, v = (a @ vectors / s, vectors) if d < n else (vectors, a.T @ vectors / s)
    return u, s, v, b


def ridge(x, y, penalty, weights, parts=None):
    """Minimises sum_i weights_i |y_i - x_i w - c|^2 + penalty |w|^2 for x (n, d), y (n, k), weights (n,), float64 each.
    Returns w (d, k) and c (k,). parts: what eigen_ridge says of the same, where it is known."""
    u, s, v, b = parts or eigen_ridge(x, y, weights)
    w = v @ ((s / (s**2 + penalty))[:, None] * (u.T @ b))
    return w, weighted_mean(y, weights) - weighted_mean(x, weights) @ w


def fit_ridge(x, y, groups, weights):
    """Ridge with that one of PENALTIES whose leave-one-group-out error among these rows is the smallest. The errors are
    exact and need no further fits: with the hat matrix H of all rows, the residuals of a group g that is left out are
    (1 - H_gg)^-1 r_g, where r are the residuals of the fit to all rows."""
    parts = u, s, v, b = eigen_ridge(x, y, weights)
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
            error += torch.linalg.solve(torch.eye(len(hat)).double() - hat, residual[g]).square().sum().item()
        errors.append(error)
    return ridge(x, y, PENALTIES[int(np.argmin(errors))] * unit, weights, parts)


def compress(x):
    """Features (n, d) -> (n, at most n) float64 with the same inner products, so that a ridge predicts the same."""
    n, d = x.shape
    if d <= n:
        return x.double()
    gram = sum(part.double() @ part.double().T for part in (x - x.mean(0)).split(4096, dim=1))
    squares, vectors = torch.linalg.eigh(gram)
    return vectors * squares.clamp(min=0).sqrt()


def out_of_group(x, y, groups, weights):
    """Predictions (n, k) for every row of a ridge that was fitted to the other groups."""
    prediction = torch.empty_like(y)
    for group in groups.unique():
        g = groups == group
        w, c = fit_ridge(x[~g], y[~g], groups[~g], weights[~g])
        prediction[g] = x[g] @ w + c
    return prediction


# --- Labels and scores -----------------------------------------------------------------------------------------------
def optimal_action(states):
    """On Jump states (N, 4): whether the agent must jump now (N,) bool, and where this is a question (N,) bool: on the
    ground before the obstacle. There is one right moment, 14 pixels before the obstacle."""
    agent_x, agent_y, obstacle_x, floor_y = states.T
    return obstacle_x - agent_x == 14, (agent_y == floor_y) & (agent_x + JumpVectorEnv.AGENT_W <= obstacle_x)


def state_score(prediction, target):
    """Mean over the columns (n, k) of R2: 1 is perfect, 0 is the mean's. A fit can miss by any amount: worse than -1 is
    all the same."""
    residual = (target - prediction).square().sum(0)
    r2 = 1 - residual / (target - target.mean(0)).square().sum(0)
    return r2.clamp(min=-1.0).mean().item()


def balanced_accuracy(prediction, target):
    """Mean over both classes of the share that is recognised: (n, 1) each, whose signs are the classes."""
    predicted, label = prediction > 0, target > 0
    return ((predicted & label).sum() / label.sum() + (~predicted & ~label).sum() / (~label).sum()).item() / 2


def class_weights(target):
    """Weights (n,) float64 with which both classes, the signs of target (n, 1), count the same."""
    label = target[:, 0] > 0
    share = label.double().mean().clamp(1e-9, 1 - 1e-9)
    return torch.where(label, 0.5 / share, 0.5 / (1 - share))


def equal_weights(target):
    return torch.ones_like(target[:, 0])


def score_features(x, y, groups, is_source, score, weigh):
    """Scores {source, target, transfer} of one set of features x (n, d). source and target: each group predicted from
    the other ones of its set; transfer: fitted to all source rows, scored on the target rows. `score(prediction, y)`
    gives the number, `weigh(y)` the rows' weights in a fit."""
    x, scores = compress(x), {}
    for name, rows in (("source", is_source), ("target", ~is_source)):
        scores[name] = score(out_of_group(x[rows], y[rows], groups[rows], weigh(y[rows])), y[rows])
    w, c = fit_ridge(x[is_source], y[is_source], groups[is_source], weigh(y[is_source]))
    return scores | {"transfer": score(x[~is_source] @ w + c, y[~is_source])}


# --- Encoders and data -----------------------------------------------------------------------------------------------
def read_encoder(path):
    """The encoder of a weights file, the file's metadata, and a function that makes a random one. Raises SystemExit."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        obs_shape, algorithm = json.loads(metadata["observation_shape"]), choose_algorithm(metadata["environment"])
    except (OSError, safetensors.SafetensorError, KeyError) as error:
        raise SystemExit(f"--encoder-weights {path}: {error}; make the file with pretrain_encoder.py") from None
    feature_dim = int(metadata.get("feature_dim") or 0)  # DrQ-v2's encoder has none
    args = SimpleNamespace(encoder=metadata["architecture"], feature_dim=feature_dim, bf16=False)
    encoder = algorithm.Encoder(args, obs_shape)
    algorithm.load_encoder(path, encoder)
    return encoder, metadata, lambda: algorithm.Encoder(args, obs_shape)


@torch.no_grad()
def layer_features(encoder, data):
    """Yields for the pixels and each layer {variant: features (N, d) float32}: the mean over the map's places, or a
    ViT's tokens, and all of it. One layer at a time is kept, as maps are large."""
    for layer in range(len(encoder.layers) + 1):
        encoder.freeze(layer)
        parts = torch.arange(len(data.stacks)).split(64)
        x = torch.cat([encoder.frozen_prefix(data.observations(rows)) for rows in parts])
        yield {"pooled": x.mean((2, 3)) if x.ndim == 4 else x.mean(1) if x.ndim == 3 else x, "flat": x.flatten(1)}


def probe_states(tasks, seed):
    """Jump's states for the probe: of every task all those on the ground before the obstacle, and forty others."""
    states, task_ids = jump_states(tasks)
    asked = optimal_action(states)[1]
    order = np.random.default_rng(seed).permutation(len(states))
    others = [order[(task_ids == task)[order] & ~asked[order]][:40] for task in range(len(tasks))]
    chosen = np.sort(np.concatenate([np.flatnonzero(asked), *others]))
    return states[chosen], task_ids[chosen]


def probe_data(args, metadata):
    """Data of the source and the target environment in one, and which rows (N,) bool are the source's. Raises
    SystemExit where the encoder doesn't fit to the environment."""
    env_id = args.env_id or metadata["environment"]
    channels, size, _ = obs_shape = json.loads(metadata["observation_shape"])
    if env_id == "Jump-v0":
        if obs_shape != [1, 60, 60]:
            raise SystemExit(f"--encoder-weights {args.encoder_weights}: made for images {obs_shape}, not Jump-v0's")
        task_sets = [parse_jump_tasks(args.jump_source), parse_jump_tasks(args.jump_target)]
        if min(map(len, task_sets)) < 3:
            raise SystemExit("--jump-source, --jump-target: give three or more tasks each, to leave one out")
        source, target = (jump_data(tasks, *probe_states(tasks, args.seed)) for tasks in task_sets)
    elif choose_algorithm(metadata["environment"]).__name__ == "ppo_pisco":
        raise SystemExit(f"--env-id {env_id}: its true state is unknown; probe an encoder of Jump-v0 or a control task")
    elif args.target_env_id is None:
        raise SystemExit(f"--target-env-id: name the task to transfer to from {env_id}, such as its twin")
    else:
        stack, ids = channels // 3, (env_id, args.target_env_id)
        source, target = (dmc_data(args, one, stack, size, args.episodes, 5 + stack - 1) for one in ids)
        for data in (source, target):
            data.groups = data.groups * 8 // args.episodes
        if source.names != target.names:
            raise SystemExit(f"--target-env-id {ids[1]}: its state is not that of {env_id}; name another task")
    data = Data(
        torch.cat([source.images, target.images]),
        torch.cat([source.stacks, target.stacks + len(source.images)]),
        torch.cat([source.groups, target.groups + source.groups.max() + 1]),
        torch.cat([source.states, target.states]),
        source.names,
    )
    return data, torch.arange(len(data.stacks)) < len(source.stacks)


def probe_encoder(encoder, data, is_source, name):
    """All scores of one encoder: a list of dicts of layer, variant, metric, source, target, transfer."""
    states = data.states.double()
    # What is the same in a whole set says nothing there.
    varies = (states[is_source].std(0) > 0) & (states[~is_source].std(0) > 0)
    state = ((states - states.mean(0)) / states.std(0))[:, varies]
    results = []
    for layer, variants in enumerate(tqdm(layer_features(encoder, data), name, len(encoder.layers) + 1, disable=None)):
        for variant, x in variants.items():
            scores = score_features(x, state, data.groups, is_source, state_score, equal_weights)
            results.append({"layer": layer, "variant": variant, "metric": "state R2", **scores})
            if data.names == JUMP_STATE:
                jump, asked = optimal_action(data.states)
                label, groups = torch.where(jump, 1.0, -1.0).double()[asked, None], data.groups[asked]
                scores = score_features(x[asked], label, groups, is_source[asked], balanced_accuracy, class_weights)
                results.append({"layer": layer, "variant": variant, "metric": "action accuracy", **scores})
    return results


# --- Recommendation, table, figure -----------------------------------------------------------------------------------
SCORES = ("source", "target", "transfer")


def average(results):
    """Scores of several random encoders (lists as probe_encoder's) as their means."""
    return [rows[0] | {name: float(np.mean([row[name] for row in rows])) for name in SCORES} for rows in zip(*results)]


def layer_scores(results):
    """The number by which layers are compared, a list from the pixels on: the target score of the better variant,
    averaged over the metrics."""
    best = {}  # layer: {metric: score}
    for row in results:
        scores = best.setdefault(row["layer"], {})
        scores[row["metric"]] = max(scores.get(row["metric"], -math.inf), row["target"])
    return [float(np.mean(list(best[layer].values()))) for layer in sorted(best)]


def recommend(results, control, tolerance):
    """How many layers to freeze, and the reason as a sentence. The layers above the frozen ones are trained on the
    target task, so what counts is how much of it a fit on target tasks reads from a layer, not how a fit on the source
    carries over. The rule: the deepest layer that loses at most `tolerance` against the best layer and reads no worse
    than the same layer with random weights; else none."""
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


def table(results, control):
    """The scores as text: a row per metric, variant and layer, the pretrained encoder's beside the random ones'."""
    header, lines = "".join(f"{name:>9}" for name in SCORES), [f"{'':31}{'pretrained':^27}  {'random':^27}"]
    lines.append(f"{'metric':<16}{'variant':<8}{'layer':>7}{header}  {header}")
    pairs = sorted(zip(results, control), key=lambda pair: (pair[0]["metric"], pair[0]["variant"], pair[0]["layer"]))
    for row, random in pairs:
        numbers = ["".join(f"{scores[name]:>9.3f}" for name in SCORES) for scores in (row, random)]
        lines.append(f"{row['metric']:<16}{row['variant']:<8}{row['layer'] or 'pixels':>7}{numbers[0]}  {numbers[1]}")
    return "\n".join(lines)


def draw(path, results, control, count, title):
    """PNG of the scores over the layers: a panel per metric and variant, random encoders dashed, `count` marked."""
    colours = dict(zip(SCORES, ("#0072b2", "#d55e00", "#009e73")))  # colour-blind safe
    metrics, variants = (list(dict.fromkeys(row[key] for row in results)) for key in ("metric", "variant"))
    layers = range(max(row["layer"] for row in results) + 1)
    figure = Figure(figsize=(9, 3 * len(metrics) + 0.8), layout="constrained")
    panels = figure.subplots(len(metrics), len(variants), sharex=True, sharey="row", squeeze=False)
    for (i, j), axes in np.ndenumerate(panels):
        axes.axvline(count, color="0.8", linewidth=6, label="recommended K")
        for rows, style, name in ((results, "-o", "pretrained"), (control, "--o", "random")):
            rows = [row for row in rows if (row["metric"], row["variant"]) == (metrics[i], variants[j])]
            for score, colour in colours.items():
                values, face = [row[score] for row in rows], colour if style == "-o" else "white"
                axes.plot(layers, values, style, color=colour, markerfacecolor=face, label=f"{score}, {name}")
        axes.set_title(f"{metrics[i]}, {variants[j]}", fontsize=10)
        axes.set_xticks(layers, ["pixels", *layers[1:]])
        axes.set(xlabel="layer", ylabel=metrics[i])
        axes.label_outer()
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, format="png", dpi=120)


def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__)
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    encoder, metadata, make_random = read_encoder(args.encoder_weights)
    data, is_source = probe_data(args, metadata)
    name = Path(args.encoder_weights).name
    folder = Path(args.output or f"runs/probe__{Path(name).stem}")
    folder.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    print(f"{int(is_source.sum()):,} source and {int((~is_source).sum()):,} target observations, {name}", flush=True)
    runs = {"pretrained": probe_encoder(encoder, data, is_source, "pretrained")}
    for seed in range(args.seed + 1, args.seed + 1 + args.num_random):
        torch.manual_seed(seed)
        runs[f"random {seed}"] = probe_encoder(make_random(), data, is_source, f"random {seed}")
    rows = [{"encoder": who, **row} for who, rows in runs.items() for row in rows]
    (folder / "probe.csv").write_text("".join(",".join(map(str, r)) + "\n" for r in (rows[0], *map(dict.values, rows))))
    results, *random = runs.values()
    control = average(random)
    count, reason = recommend(results, control, args.tolerance)
    draw(folder / "probe.png", results, control, count, f"{name}: --freeze-layers {count}")
    print(table(results, control), f"wrote {folder / 'probe.csv'} and probe.png", sep="\n")
    print(f"recommended: --freeze-layers {count}, as {reason}")


if __name__ == "__main__":
    main()
