"""The benchmark's suites: what run.py can run, and what plot.py asks of the kept results.

A suite is a program with the flags that all its methods share, and a table: method -> flags. Its `n` is the number of
seeds that its protocol asks for; they begin at its `first_seed`, a number or one for every method. In a suite of CELLS
a method's name is "CELL, METHOD". The encoders of a suite of `encoders` are kept with its results: made again on
another CPU they are others. A suite that is in the results alone had the defaults of another commit: its runs.csv names
it beside every command.

What stands beside a method's name is all that sets it apart. Every flag is the program's own: `python ppo_pisco.py
--help`, `python drqv2_pisco.py --help`.
"""

import hashlib
from pathlib import Path


def seeds_of(suite, method, n):
    """The first n seeds of a suite's method."""
    first = SUITES[suite].get("first_seed", 1)
    first = first[method] if isinstance(first, dict) else first
    return list(range(first, first + n))


def weights_folder(work, flags):
    """The folder below `work` with the networks that the program and flags [program, flag, ...] have trained here."""
    return work / "weights" / hashlib.sha256(" ".join(flags).encode()).hexdigest()[:16]


def encoder_of(suite, method, seed, results=Path("benchmark/results")):
    """The path of the encoder that a run of a suite with "encoders" leaves in the folder `results`."""
    return results / suite / "encoders" / f"{method.replace(' ', '_')}__{seed}.safetensors"


def join(tasks):
    """Jump's tasks [(obstacle, floor)] as --jump-tasks takes them."""
    return ",".join(f"{obstacle}:{floor}" for obstacle, floor in tasks)


# ---------------------------------------------------------------------------------------------------------------------
# What can be run
# ---------------------------------------------------------------------------------------------------------------------
# DrQ-v2 on two CPU cores: its own settings but for smaller images and batches and plain rendering.
DMC_SMALL = "drqv2_pisco.py --render-quality fast --image-size 64 --shift-pixels 3 --batch-size 64"
# And with fewer, longer steps, as in dmc-sparse
DMC_REPEAT_8 = (
    f"{DMC_SMALL} --bf16 --action-repeat 8 --update-every 1 --hidden-dim 256 --learning-rate 3e-4 --gamma 0.96 "
    "--nstep 1 --tau 0.02 --stddev-end 0.2 --stddev-steps 5000 --seed-frames 2000 --explore-steps 250 "
    "--eval-interval 10000"
)
SCRATCH = "--encoder-weights none --freeze-layers 0"
# As pretrain_encoder.py makes the shipped encoder, with other seeds than that one's
ENCODER_SEEDS = (2, 3)
JUMP_SOURCE = (
    f"ppo_pisco.py {SCRATCH} --ssl none --total-timesteps 300000 --anneal-lr --ent-coef 0.003 --eval-interval 30720"
)
# Pairs of source and target tasks. Two frozen layers have a stride of 8 pixels: only where target tasks are source
# tasks moved by multiples of 8, in the first two, do they see a target task as they saw a source task, elsewhere.
CHECKERS_8 = [(x, y) for x in range(20, 45, 8) for y in (2, 10, 18)]
CHECKERS_4 = [(x, y) for x in range(20, 45, 4) for y in (10, 14, 18)]
SPLITS = {  # name: source tasks, target tasks
    "lattice 8 floors": ("source", "target"),
    "lattice 8 checkers": tuple(join((x, y) for x, y in CHECKERS_8 if (x + y) % 16 == colour) for colour in (6, 14)),
    "lattice 4 checkers": tuple(join((x, y) for x, y in CHECKERS_4 if (x + y) % 8 == colour) for colour in (6, 2)),
    "lattice 5 grid": (
        join((x, y) for x in (20, 30, 40) for y in (10, 20)),
        join((x, y) for x in (25, 35, 45) for y in (5, 15, 25)),
    ),
}


def with_encoder(methods, encoder):
    """The methods {name: flags} with a pretrained encoder's file, but for the one from scratch."""
    return {
        m: flags if "--encoder-weights none" in flags else f"{flags} --encoder-weights {encoder}"
        for m, flags in methods.items()
    }


def in_cells(methods):
    """{"SPLIT encoder SEED, METHOD": flags} of the methods on every split's target tasks, with each of its encoders."""
    return {
        f"{split} encoder {seed}, {name}": f"{flags} --jump-tasks {target}"
        for split, (_, target) in SPLITS.items()
        for seed in ENCODER_SEEDS
        for name, flags in with_encoder(methods, encoder_of("jump-sources", split, seed)).items()
    }


def seeds_of_cells(methods):
    """{method: first seed} of methods in cells; others with each encoder, as from scratch needs none."""
    return {name: 401 if "encoder 2," in name else 411 for name in methods}


# The loss with the acting policy as its teacher: settings are chosen on floors that no result is about
LIFTED = join([(x, 36) for x in (20, 28, 36, 44)] + [(x, 28) for x in (24, 32, 40)])  # `target`, moved up
LIFTED_GRID = join((x, y) for x in range(20, 46) for y in range(27, 38))
ON_LIFTED = f"--jump-tasks {LIFTED} --jump-eval-tasks {LIFTED_GRID} --eval-interval 20480"
DEPTHS = {"frozen bottom": "--freeze-layers 2", "finetuned": "--freeze-layers 0", "from scratch": SCRATCH}


def with_loss(loss, projector="none", coef="1", fraction="0.5", rate="1e-3"):
    """Flags of a loss whose teacher is the state, all named."""
    flags = f"--projector {projector} --ssl-coef {coef} --ssl-fraction {fraction} --learning-rate {rate}"
    return f"--ssl {loss} --ssl-teacher state {flags}"


SETTINGS = {f"{p}, weight {c}": with_loss("pisco", p, c) for p, c in (
    ("none", "1"), ("residual", "1"), ("none", "3"), ("residual", "3"), ("none", "0.3"), ("mlp", "1"),
)} | {f"{p}, weight {c}, whole minibatch": with_loss("pisco", p, c, "1") for p, c in (
    ("none", "1"), ("none", "3"), ("residual", "3"),
)}  # fmt: skip
RATES_OF_TWO = {f"no loss, rate {r}": f"--ssl none --learning-rate {r}" for r in ("3e-4", "1e-3", "3e-3")} | {
    f"none, weight 3, whole minibatch, rate {r}": with_loss("pisco", coef="3", fraction="1", rate=r)
    for r in ("3e-4", "3e-3")
}
OTHER_LOSSES = {f"{kind}, weight {c}": with_loss(kind, "mlp", c, "1") for kind in ("simsiam", "curl") for c in (
    "0.1", "0.3", "1", "3",
)}  # fmt: skip
ANNEALED = {f"no loss, annealed, rate {r}": f"--ssl none --anneal-lr --learning-rate {r}" for r in ("3e-3", "1e-2")} | {
    f"none, weight 3, whole minibatch, annealed, rate {r}": with_loss("pisco", coef="3", fraction="1", rate=r)
    + " --anneal-lr"
    for r in ("3e-3", "1e-2")
}
FOR_SCRATCH = [f"{x}, weight {c}" for x, c in (("none", "1"), ("residual", "1"), ("none", "3"))]
FOR_SCRATCH += [*(name for name in SETTINGS if "whole" in name), *RATES_OF_TWO, *ANNEALED]


def with_and_without(depths, rate, rate_of_loss):
    """{"DEPTH", "DEPTH + loss": flags} of the depths, without a loss and with the default one, each at its rate."""
    losses = {"": f"--ssl none --learning-rate {rate}", " + loss": with_loss("pisco", "none", "3", "1", rate_of_loss)}
    return {f"{x}{loss}": f"{DEPTHS[x]} {flags}" for x in depths for loss, flags in losses.items()}


# Rates that jump-settings has chosen, the same at all depths
WITH_AND_WITHOUT = with_and_without(("finetuned", "frozen bottom", "from scratch"), "3e-3", "1e-3")
IN_CELLS = in_cells(WITH_AND_WITHOUT)
# Rates are those of jump-loss-rates and jump-rates, weights of SimSiam and CURL those of jump-settings
PAGES = "--ssl pisco --ssl-teacher view --projector mlp --ssl-coef 0.1 --ssl-fraction 1"  # the paper's pseudocode
OTHERS = in_cells(
    {
        "finetuned + PiSCO": f"{DEPTHS['finetuned']} {PAGES} --learning-rate 1e-3",
        "frozen bottom + PiSCO": f"{DEPTHS['frozen bottom']} {PAGES} --learning-rate 3e-3",
        "frozen, MLP head": "--freeze-layers all --head-layers 1 --ssl none --learning-rate 3e-3",
        "finetuned + loss on noise": f"{WITH_AND_WITHOUT['finetuned + loss']} --augmentation noise",
    }
)
KNOWN_LOSSES = in_cells(
    {
        f"{depth} + {name}": f"{DEPTHS[depth]} {with_loss(name.lower(), 'mlp', coef, '1')}"
        for depth in ("finetuned", "frozen bottom")
        for name, coef in (("SimSiam", "3"), ("CURL", "1"))
    }
)
AUGMENTED = in_cells(
    {
        f"finetuned on augmented images, rate {rate}": f"{DEPTHS['finetuned']} --learning-rate {rate}"
        for rate in ("1e-3", "3e-3")
    }
)
# First-person 3D: short runs from a hallway to a room
MINIWORLD = "ppo_pisco.py --eval-interval 4096 --eval-episodes 20"
MINIWORLD_ROOM = f"{MINIWORLD} --total-timesteps 40960 --env-id miniworld:MiniWorld-OneRoom-v0"


def in_first_person(rate="1e-3", encoder=3):
    """Three depths without and with the default loss, from an encoder of the hallway."""
    return with_encoder(with_and_without(DEPTHS, rate, rate), encoder_of("miniworld-sources", "hallway", encoder))


SUITES = {
    # The README's main command beside the same number of steps from scratch.
    "quickstart": {
        "program": "ppo_pisco.py",
        "methods": {
            "frozen bottom + loss": "--freeze-layers 2",
            "from scratch": f"{SCRATCH} --ssl none --learning-rate 3e-3",
        },
    },
    # Which projector, weight, share of the minibatch and learning rate, where the acting policy is the teacher?
    "jump-settings": {
        "program": f"ppo_pisco.py {ON_LIFTED}",
        "methods": {
            f"{depth}, {name}": f"{freezing} {loss}"
            for settings in (SETTINGS, RATES_OF_TWO, ANNEALED, OTHER_LOSSES)
            for name, loss in settings.items()
            for depth, freezing in DEPTHS.items()
            if depth != "from scratch" or name in FOR_SCRATCH
        },
    },
    # What does the loss give on tasks that are never trained?
    "jump-unseen": {
        "program": "ppo_pisco.py",
        "n": 5,
        "first_seed": seeds_of_cells(IN_CELLS),
        "methods": IN_CELLS,
    },
    # And what do other losses, augmentations and heads give on them? Two seeds of jump-unseen
    "jump-others": {
        "program": "ppo_pisco.py",
        "n": 2,
        "first_seed": seeds_of_cells(OTHERS),
        "methods": OTHERS,
    },
    "jump-simsiam-curl": {
        "program": "ppo_pisco.py",
        "n": 1,
        "first_seed": seeds_of_cells(KNOWN_LOSSES),
        "methods": KNOWN_LOSSES,
    },
    "jump-augmented": {
        "program": "benchmark/augmented.py",
        "n": 2,
        "first_seed": seeds_of_cells(AUGMENTED),
        "methods": AUGMENTED,
    },
    "jump-augmented-rates": {
        "program": f"benchmark/augmented.py {ON_LIFTED}",
        "methods": {
            f"finetuned on augmented images, {rate}": f"{DEPTHS['finetuned']} --learning-rate {rate}"
            for rate in ("3e-4", "1e-3", "3e-3")
        },
    },
    # From 18 tasks to the grid's other 268, as Agarwal et al. 2021 ask: do the loss and twice the time solve them?
    "jump-18": {
        "program": "ppo_pisco.py --eval-interval 30720",
        "n": 5,
        "first_seed": 501,
        "methods": {
            f"{tasks}, {name}": f"{flags} --jump-tasks {tasks}"
            for tasks in ("wide", "narrow", "random")
            for name, flags in (
                ("no loss", f"{WITH_AND_WITHOUT['from scratch']} --total-timesteps 307200"),
                ("loss", f"{WITH_AND_WITHOUT['from scratch + loss']} --total-timesteps 307200"),
                ("loss, twice as long", f"{WITH_AND_WITHOUT['from scratch + loss']} --total-timesteps 614400"),
            )
        },
    },
    # Does an encoder help in first-person 3D? From a hallway to a room, with rates chosen in a smaller one
    "miniworld": {
        "program": MINIWORLD_ROOM,
        "n": 5,
        "first_seed": 301,
        "methods": in_first_person(),
    },
    # And with four more encoders?
    "miniworld-encoders": {
        "program": MINIWORLD_ROOM,
        "n": 2,
        "first_seed": 306,
        "methods": {
            f"{name}, encoder {encoder}": in_first_person(encoder=encoder)[name]
            for name in ("finetuned", "frozen bottom")
            for encoder in (4, 5, 6, 7)
        },
    },
    "miniworld-sources": {
        "program": f"{MINIWORLD} --total-timesteps 40960 --env-id miniworld:MiniWorld-Hallway-v0",
        "encoders": True,
        "n": 6,
        "first_seed": 2,
        "methods": {"hallway": f"{SCRATCH} --ssl none --learning-rate 1e-3"},
    },
    "miniworld-rates": {
        "program": f"{MINIWORLD} --total-timesteps 20480 --env-id miniworld:MiniWorld-OneRoomS6-v0",
        "n": 1,
        "first_seed": 201,
        "methods": {
            f"{name}, {rate}": flags
            for rate in ("3e-4", "1e-3", "3e-3")
            for name, flags in in_first_person(rate).items()
        },
    },
    # The encoders of the suites over cells, two seeds for every split, and a large one.
    "jump-sources": {
        "program": JUMP_SOURCE,
        "encoders": True,
        "n": 2,
        "first_seed": ENCODER_SEEDS[0],
        "methods": {split: f"--jump-tasks {source}" for split, (source, _) in SPLITS.items()},
    },
    "jump-impala-sources": {
        "program": f"{JUMP_SOURCE} --encoder impala",
        "encoders": True,
        "n": 2,
        "first_seed": ENCODER_SEEDS[0],
        "methods": {"lattice 8 floors": "--jump-tasks source"},
    },
    # Does DrQ-v2 learn within an hour and a half on a CPU?
    "dmc-small": {
        "program": DMC_SMALL,
        "methods": {
            "from scratch": "--env-id cartpole-balance --total-frames 100000 --encoder-weights none --ssl none"
        },
    },
    # Which weight of the default loss moves the policy that acts?
    "dmc-weight": {
        "program": f"{DMC_REPEAT_8} --env-id cartpole-balance --total-frames 50000 {SCRATCH}",
        "n": 1,
        "methods": {"no loss": "--ssl none"}
        | {
            f"weight {c}": f"--ssl pisco --ssl-teacher state --projector none --ssl-fraction 0.2 --ssl-coef {c}"
            for c in ("1", "10", "100")
        },
    },
    # To compare with the official agent's published scores, on a GPU.
    "dmc-official": {
        "program": "drqv2_pisco.py --encoder-weights none --ssl none --total-frames 100000",
        "methods": {
            "cartpole-balance": "--env-id cartpole-balance",
            "cartpole-swingup": "--env-id cartpole-swingup",
            "walker-stand": "--env-id walker-stand --nstep 1 --batch-size 512",
        },
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# What is asked of the kept results
# ---------------------------------------------------------------------------------------------------------------------
BESIDE_UNSEEN = ("jump-others", "jump-simsiam-curl", "jump-augmented")  # one table
UNSEEN_CELLS = ("jump-unseen", *BESIDE_UNSEEN, "jump-18")
CELLS = ("jump-cells", "jump-noise", "jump-impala", *UNSEEN_CELLS)
UNSEEN = ("jump-settings", *UNSEEN_CELLS)
SCORES = dict.fromkeys(UNSEEN, "greedy_unseen_success")  # not the usual column
FIVE = ("from scratch", "frozen, MLP head", "finetuned", "frozen bottom", "frozen bottom + PiSCO")
FROM_SCRATCH, FROZEN, FINETUNED, BOTTOM, RECIPE = FIVE
LOSSES = [f"{BOTTOM} + {loss}" for loss in ("SimSiam", "CURL", "PiSCO without projector")]
STDS = (0, 2, 4, 8, 16, 32, 64)  # of jump-noise, in grey levels of 255
UNDER_NOISE = (", change under noise", ", relative change")  # of jump-noise
AGAIN = (", equal minutes", ", noise")  # of jump-unseen, on the trained tasks
MEASURED_ONCE = (*UNDER_NOISE, AGAIN[1])  # one score a run, not a curve
CLAIMS = (
    "1. finetuning is needed",
    "2. finetuned features: easier to learn from, more robust",
    "3. bottom layers transfer, top layers must adapt",
    "4. frozen bottom + PiSCO beats the alternatives",
)
# What the protocols beside the results predict, in families of claims, whose predictions share an error of 0.05:
# (suite, method, other one, margin): the first one's score is above the second's, or not further below than the margin.
FAMILIES = {
    "verdicts": {
        CLAIMS[0]: [("jump-cells", FINETUNED, FROZEN, 0.0)],
        CLAIMS[1]: [("jump-noise", FINETUNED + x, FROZEN + x, 0.0) for x in (", fresh head", *UNDER_NOISE)],
        CLAIMS[2]: [("jump-cells", BOTTOM, FINETUNED, 0.1), ("jump-cells", BOTTOM, FROZEN, 0.0)],
        CLAIMS[3]: [("jump-cells", RECIPE, x, 0.0) for x in (*FIVE[:3], f"{FINETUNED} + PiSCO", BOTTOM, *LOSSES)],
    },
    "priors": {
        "PiSCO's gain": [
            ("jump-prior", f"prior {prior}, {base} + PiSCO at {rate}", f"prior {prior}, {base} at {rate}", 0.0)
            for prior in ("0.05", "0.1")
            for base, rate in ((BOTTOM, "1e-3"), (BOTTOM, "its own rate"), (FINETUNED, "its own rate"))
        ]
    },
    "control": {"positive control": [("dmc-sparse", x, FROM_SCRATCH, 0.0) for x in (FINETUNED, "frozen")]},
    "unseen": {
        claim: [("jump-unseen", f"{x} + loss", x, 0.0) for x in methods]
        for claim, methods in (
            ("the loss solves tasks never trained", (FINETUNED, BOTTOM)),
            ("secondary, uncorrected", (FROM_SCRATCH,)),
        )
    },
    "freezing again": {"freezing the bottom gains": [("jump-unseen", BOTTOM + x, FINETUNED + x, 0.0) for x in AGAIN]},
    "first person": {"a frozen bottom gains": [("miniworld", BOTTOM, FROM_SCRATCH, 0.0)]},
    "18 tasks": {"the loss solves the other 268": [("jump-18", "loss", "no loss", 0.0)]},
}
AT_THE_END = ("unseen", "18 tasks")  # families judged by the last evaluation, others by the mean over the run
IMPALA = [f"impala, {k} frozen" for k in (0, 4, 7, 10)]
PANELS = {  # a suite's learning curves: {title: {label: method}}, or all methods in one panel
    "jump-cells": {
        "starts": {name: name for name in (*FIVE[:4], RECIPE)},
        "losses": {name: name for name in (BOTTOM, *LOSSES, RECIPE)},
    },
    "jump-long": {
        split: {name: f"{split} encoder 2, {name}" for name in FIVE} for split in ("lattice 8 floors", "lattice 5 grid")
    },
    "jump-impala": {
        title: {name: name for name in ("impala, from scratch", *(f"{name}{plus}" for name in IMPALA))}
        for title, plus in (("without a loss", ""), ("with PiSCO", " + PiSCO"))
    },
    "dmc-sparse": {},
    "miniworld": {
        title: {depth: f"{depth}{plus}" for depth in DEPTHS}
        for title, plus in (("without a loss", ""), ("with the loss", " + loss"))
    },
}
GRIDS = {  # the README's first picture, Jump's tasks: {title: (suite, methods, tasks that they were trained on)}
    "solved": {
        "without the loss": ("jump-unseen", "lattice 8 floors *, frozen bottom", "target"),
        "with it": ("jump-unseen", "lattice 8 floors *, frozen bottom + loss", "target"),
    },
}
