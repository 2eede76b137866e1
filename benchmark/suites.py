"""The benchmark's suites. A suite is a program with the flags that all its methods share, and a table: method -> flags.
Its `n` is the number of seeds that its protocol asks for or, where that allows fewer, the number run; they begin at its
`first_seed`, a number or one for every method. In a suite over `cells` a method's name is "CELL, METHOD". The encoders
of a suite of `encoders` are kept with its results: made again on another kind of CPU they are others.

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


# DrQ-v2 on two CPU cores: its own settings but for smaller images and batches and plain rendering.
DMC_SMALL = "drqv2_pisco.py --render-quality fast --image-size 64 --shift-pixels 3 --batch-size 64"
DMC_SMALL_BALANCE = "--env-id cartpole-balance --total-frames 100000 --encoder-weights none --ssl none"
# An action is held for eight frames and every step has its update: half the updates for as many frames, and cheaper
# ones by narrower heads and an encoder in bfloat16. Discount and n-step return look about as far ahead in frames as
# before, the target critics follow as fast.
DMC_REPEAT_8 = (
    "--bf16 --action-repeat 8 --update-every 1 --hidden-dim 256 --learning-rate 3e-4 --gamma 0.96 --nstep 1 --tau 0.02 "
    "--stddev-end 0.2 --stddev-steps 5000 --seed-frames 2000 --explore-steps 250"
)
BALANCE = "encoders/cartpole-balance__drqv2__rl.safetensors"
DMC_REUSE = {
    "from scratch": "--encoder-weights none --ssl none",
    "frozen": "--freeze-layers 4 --ssl none",
    "finetuned": "--freeze-layers 0 --ssl none",
    "frozen bottom": "--freeze-layers 2 --ssl none",
    "frozen bottom + PiSCO": "--freeze-layers 2 --ssl pisco",
}

# DrQ-v2 with its own settings, for a GPU
DMC_OFFICIAL = "drqv2_pisco.py --encoder-weights none --ssl none --total-frames 100000"
DMC_WALKER = "--nstep 1 --batch-size 512"
DMC_MEDIUM = "--stddev-steps 500000"  # for tasks that DrQ-v2's authors count as medium
DMC_SOURCES = {
    "cartpole-balance": "--env-id cartpole-balance",
    "walker-stand": f"--env-id walker-stand {DMC_WALKER}",
    "walker-walk": f"--env-id walker-walk {DMC_WALKER}",
    "hopper-stand": "--env-id hopper-stand",
}
DMC_ENCODERS = {source: encoder_of("dmc-source", source, 1) for source in DMC_SOURCES}
DMC_TARGETS = {  # target task: its source and its own flags
    "cartpole-swingup": ("cartpole-balance", ""),
    "walker-walk": ("walker-stand", DMC_WALKER),
    "walker-run": ("walker-walk", f"{DMC_WALKER} {DMC_MEDIUM}"),
    "hopper-hop": ("hopper-stand", DMC_MEDIUM),
}

# MSR Jump
JUMP_FROZEN = "--freeze-layers 2"  # the bottom: the two layers whose stride is the distance of the floors
# The seven obstacles of source and target on a floor of neither: learning rates are chosen by them.
VALIDATION = join((obstacle, 26) for obstacle in range(20, 45, 4))
# The same on a floor that the state encoder was trained on, between the floors of source and target.
STATE_VALIDATION = join((obstacle, 14) for obstacle in range(20, 45, 4))
OWN_TASKS = "--no-eval-grid"  # the grid's tasks, which no score is of there, cost a third of a short run's time
SCRATCH = "--encoder-weights none --freeze-layers 0"
STATE = "--encoder-weights encoders/jump-v0__nature__state.safetensors"

QUICKSTART = {
    "program": "ppo_pisco.py",
    "methods": {
        "freeze 2 + PiSCO": "--freeze-layers 2",
        "from scratch": "--encoder-weights none --freeze-layers 0 --ssl none",
    },
}

# The learning rates of the suites *-rates, the same for every method; protocols stand beside the results.
RATES = ("3e-4", "1e-3", "3e-3", "1e-2", "3e-2")
MLP = "--head-layers 1"
BASELINES = {  # method: program and flags
    "from scratch": f"ppo_pisco.py {SCRATCH} --ssl none",
    "frozen, linear head": "ppo_pisco.py --freeze-layers 4 --ssl none",
    "frozen, MLP head": f"ppo_pisco.py --freeze-layers 4 --ssl none {MLP}",
    "finetuned": "ppo_pisco.py --freeze-layers 0 --ssl none",
    "frozen bottom": f"ppo_pisco.py {JUMP_FROZEN} --ssl none",
    "frozen bottom + PiSCO": f"ppo_pisco.py {JUMP_FROZEN} --ssl pisco",
}
FURTHER_LOSSES = {
    "finetuned + PiSCO": "ppo_pisco.py --freeze-layers 0 --ssl pisco",
    "frozen bottom + SimSiam": f"ppo_pisco.py {JUMP_FROZEN} --ssl simsiam",
    "frozen bottom + CURL": f"ppo_pisco.py {JUMP_FROZEN} --ssl curl",
    "frozen bottom + consistency": f"ppo_pisco.py {JUMP_FROZEN} --ssl consistency",
}
STATE_BASELINES = {
    "true state, linear": "benchmark/linear_state.py",
    "true state, MLP": f"benchmark/linear_state.py {MLP}",
    "state encoder, frozen, linear head": f"ppo_pisco.py {STATE} --freeze-layers 4 --ssl none",
    "state encoder, frozen, MLP head": f"ppo_pisco.py {STATE} --freeze-layers 4 --ssl none {MLP}",
    "state encoder, finetuned": f"ppo_pisco.py {STATE} --freeze-layers 0 --ssl none",
}
# What the suites *-rates have chosen by their protocols; both times a frozen encoder's better head is the MLP.
OWN_RATE = dict.fromkeys(BASELINES, "3e-3") | {"frozen, linear head": "3e-2"}
OWN_RATE |= {
    "true state, linear": "1e-2",
    "true state, MLP": "3e-3",
    "state encoder, frozen, linear head": "1e-2",
    "state encoder, frozen, MLP head": "3e-3",
    "state encoder, finetuned": "1e-3",
    "finetuned + PiSCO": "1e-3",
    "frozen bottom + SimSiam": "1e-3",
    "frozen bottom + CURL": "3e-3",
    "frozen bottom + consistency": "3e-3",
    "impala, from scratch": "3e-4",
    "impala, 0 frozen": "1e-3",
    "impala, 4 frozen": "1e-3",
    "impala, 7 frozen": "3e-3",
    "impala, 10 frozen": "3e-3",
    "impala, 0 frozen + PiSCO": "1e-3",
    "impala, 4 frozen + PiSCO": "1e-3",
    "impala, 7 frozen + PiSCO": "1e-3",
    "impala, 10 frozen + PiSCO": "3e-3",
    "nature, finetuned": "1e-3",
    "nature, frozen bottom": "1e-3",
}

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
# As pretrain_encoder.py makes the shipped encoder, with other seeds than that one's
ENCODER_SEEDS = (2, 3)
JUMP_SOURCE = (
    f"ppo_pisco.py {SCRATCH} --ssl none --total-timesteps 300000 --anneal-lr --ent-coef 0.003 --eval-interval 30720"
)

IMPALA_SOURCE = f"{JUMP_SOURCE} --encoder impala"
IMPALA = {"impala, from scratch": f"ppo_pisco.py --encoder impala {SCRATCH} --ssl none"} | {
    f"impala, {k} frozen{plus}": f"ppo_pisco.py --encoder impala --freeze-layers {k} --ssl {ssl}"
    + (f" {MLP}" if k == 10 else "")
    for ssl, plus in (("none", ""), ("pisco", " + PiSCO"))
    for k in (0, 4, 7, 10)
}

NATURE = {f"nature, {name}": BASELINES[name] for name in ("finetuned", "frozen bottom")}


# The loss with the acting policy as its teacher: settings are chosen on floors that no result is about
LIFTED = join([(x, 36) for x in (20, 28, 36, 44)] + [(x, 28) for x in (24, 32, 40)])  # `target`, moved up
LIFTED_GRID = join((x, y) for x in range(20, 46) for y in range(27, 38))
DEPTHS = {"frozen bottom": JUMP_FROZEN, "finetuned": "--freeze-layers 0", "from scratch": SCRATCH}


def with_loss(loss, projector="none", coef="1", fraction="0.5", rate="1e-3"):
    """Flags of a loss whose teacher is the state, all named."""
    flags = f"--projector {projector} --ssl-coef {coef} --ssl-fraction {fraction} --learning-rate {rate}"
    return f"--ssl {loss} --ssl-teacher state {flags}"


SETTINGS = {f"{p}, weight {c}": with_loss("pisco", p, c) for p, c in (
    ("none", "1"), ("residual", "1"), ("none", "3"), ("residual", "3"), ("none", "0.3"), ("mlp", "1"),
)} | {f"none, weight {c}, whole minibatch": with_loss("pisco", coef=c, fraction="1") for c in ("1", "3")}  # fmt: skip
RATES_OF_TWO = {f"no loss, rate {r}": f"--ssl none --learning-rate {r}" for r in ("3e-4", "1e-3", "3e-3")} | {
    f"none, weight 1, rate {r}": with_loss("pisco", rate=r) for r in ("3e-4", "3e-3")
}
OTHER_LOSSES = {f"{kind}, weight {c}": with_loss(kind, "mlp", c) for kind in ("simsiam", "curl") for c in (
    "0.1", "0.3", "1", "3",
)}  # fmt: skip


METHODS = BASELINES | FURTHER_LOSSES
# PiSCO's gain at two priors of jumping, with the rate of the older suites and with the methods' own
JUMP_PRIOR = {
    f"prior {prior}, {name} at {rate or 'its own rate'}": f"{METHODS[name]} --jump-tasks target --jump-prior {prior} "
    f"--learning-rate {rate or OWN_RATE[name]}"
    for prior in ("0.05", "0.1")
    for base, rate in (("frozen bottom", "1e-3"), ("frozen bottom", None), ("finetuned", None))
    for name in (base, f"{base} + PiSCO")
}


def with_encoder(methods, encoder):
    """The methods with a pretrained encoder's file, but for the one from scratch."""
    return {
        m: flags if "--encoder-weights none" in flags else f"{flags} --encoder-weights {encoder}"
        for m, flags in methods.items()
    }


def over_rates(methods, tasks=VALIDATION, rates=RATES, length="--eval-interval 20480", n=5):
    """A suite that gives every method every learning rate, on validation tasks, with half as many evaluations."""
    flags = f"--jump-tasks {tasks} {length}"
    return {
        "program": "",
        "n": n,
        "methods": {
            f"{name}, {r}": f"{method} {flags} --learning-rate {r}" for name, method in methods.items() for r in rates
        },
    }


def with_own_rates(methods, tasks):
    """The methods on these tasks with their own learning rates."""
    return {name: f"{flags} --jump-tasks {tasks} --learning-rate {OWN_RATE[name]}" for name, flags in methods.items()}


def on_target(methods):
    """A suite that runs these methods with their own learning rates on the target tasks."""
    return {"program": "", "n": 10, "methods": with_own_rates(methods, "target")}


def in_cells(methods_of, splits=SPLITS):
    """{"SPLIT encoder SEED, METHOD": flags} of methods with their own learning rates on every split's target tasks,
    with each of the encoders of the suite that they begin with; methods_of {suite: methods}."""
    return {
        f"{split} encoder {seed}, {name}": f"{flags} {OWN_TASKS}"
        for split in splits
        for seed in ENCODER_SEEDS
        for sources, methods in methods_of.items()
        for name, flags in with_encoder(
            with_own_rates(methods, SPLITS[split][1]), encoder_of(sources, split, seed)
        ).items()
    }


def first_seeds(cells, first):
    """{name: first seed} of cells with up to three seeds each, other ones with the second encoder."""
    return {name: first if f" encoder {ENCODER_SEEDS[0]}, " in name else first + 3 for name in cells}


CELLS = in_cells({"jump-sources": {name: flags for name, flags in METHODS.items() if name != "frozen, linear head"}})
FIVE = ("from scratch", "frozen, MLP head", "finetuned", "frozen bottom", "frozen bottom + PiSCO")
CELL_SEEDS = first_seeds(CELLS, 201)
FIVE_IN_CELLS = {name: flags for name, flags in CELLS.items() if name.split(", ", 1)[1] in FIVE}
# The large encoder and, beside it, nature
IMPALA_CELLS = in_cells({"jump-impala-sources": IMPALA, "jump-sources": NATURE}, ["lattice 8 floors"])


SUITES = {
    # Which learning rate is every method's own? On the validation tasks.
    "jump-rates": over_rates(BASELINES),
    # Is the paper's recipe ahead of baselines with learning rates of their own?
    "jump-baselines": on_target(BASELINES),
    "jump-loss-rates": over_rates(FURTHER_LOSSES),
    # Does PiSCO's gain depend on the prior of jumping, or on the learning rate?
    "jump-prior": {"program": "", "n": 20, "first_seed": 101, "methods": JUMP_PRIOR},
    # Which projector, weight, share of the minibatch and learning rate, where the acting policy is the teacher?
    "jump-settings": {
        "program": f"ppo_pisco.py --jump-tasks {LIFTED} --jump-eval-tasks {LIFTED_GRID} --eval-interval 20480",
        "score": "eval/greedy_unseen_success",
        "methods": {
            f"{depth}, {name}": f"{freezing} {loss}"
            for settings in (SETTINGS, RATES_OF_TWO, OTHER_LOSSES)
            for name, loss in settings.items()
            for depth, freezing in DEPTHS.items()
            if depth != "from scratch"
            or name
            in (
                "none, weight 1",
                "residual, weight 1",
                "none, weight 3",
                "none, weight 1, whole minibatch",
                "none, weight 3, whole minibatch",
                *RATES_OF_TWO,
            )
        },
    },
    # The encoders of jump-cells, two seeds, and those of jump-impala.
    "jump-sources": {
        "program": JUMP_SOURCE,
        "encoders": True,
        "n": 2,
        "first_seed": ENCODER_SEEDS[0],
        "methods": {split: f"--jump-tasks {source}" for split, (source, _) in SPLITS.items()},
    },
    # Do the paper's claims hold over splits and encoders?
    "jump-cells": {"program": "", "n": 3, "first_seed": CELL_SEEDS, "cells": True, "methods": CELLS},
    # Are finetuned features easier to learn from, and more robust to noise? On the networks of jump-cells.
    "jump-noise": {
        "program": "benchmark/jump_noise.py",
        "n": 3,
        "first_seed": CELL_SEEDS,
        "cells": True,
        "methods": {name: flags.removeprefix("ppo_pisco.py ") for name, flags in FIVE_IN_CELLS.items()},
    },
    # Does training from scratch catch up?
    "jump-long": {
        "program": "",
        "n": 3,
        "first_seed": 211,
        "methods": {
            name: f"{flags} --total-timesteps 307200 --eval-interval 30720"
            for name, flags in FIVE_IN_CELLS.items()
            if name.startswith(("lattice 8 floors", "lattice 5 grid")) and f" encoder {ENCODER_SEEDS[0]}, " in name
        },
    },
    "jump-impala-sources": {
        "program": IMPALA_SOURCE,
        "encoders": True,
        "n": 2,
        "first_seed": ENCODER_SEEDS[0],
        "methods": {"lattice 8 floors": "--jump-tasks source"},
    },
    "jump-impala-rates": over_rates(
        with_encoder(IMPALA, encoder_of("jump-impala-sources", "lattice 8 floors", ENCODER_SEEDS[0]))
        | with_encoder(NATURE, encoder_of("jump-sources", "lattice 8 floors", ENCODER_SEEDS[0])),
        rates=("3e-4", "1e-3", "3e-3"),
        length=f"--total-timesteps 51200 --eval-interval 10240 {OWN_TASKS}",
        n=2,
    ),
    # Does freezing matter more for a large encoder?
    "jump-impala": {"program": "", "n": 2, "first_seed": first_seeds(IMPALA_CELLS, 301), "methods": IMPALA_CELLS},
    # Is finetuning needed even where the features hold the whole state?
    "jump-state-rates": over_rates(STATE_BASELINES, tasks=STATE_VALIDATION),
    "jump-state-baselines": on_target(STATE_BASELINES),
    # The README's main command beside the same number of steps from scratch.
    "quickstart": QUICKSTART,
    # The same with `--cpus 2`, as on a machine of two cores: PyTorch's number of threads changes the last digits.
    "quickstart-two-cores": QUICKSTART,
    # Generalisation from 18 tasks to the grid's 286.
    "jump-grid": {
        "program": f"ppo_pisco.py {SCRATCH} --total-timesteps 307200 --eval-interval 30720",
        "score": "eval/greedy_grid_success",
        "methods": {
            f"{tasks}, {ssl}": f"--jump-tasks {tasks} --ssl {ssl}{weight}"
            for tasks in ("wide", "narrow", "random")
            for ssl, weight in (("none", ""), ("pisco", " --ssl-coef 0.1"))
        },
    },
    # Does DrQ-v2 learn within an hour on a CPU? The second method is an earlier configuration that was dropped.
    "dmc-small": {
        "program": DMC_SMALL,
        "methods": {
            "from scratch": DMC_SMALL_BALANCE,
            "fewer, longer steps": "--hidden-dim 256 --action-repeat 4 --update-every 1 --learning-rate 3e-4 "
            "--tau 0.02 --gamma 0.98 --nstep 1 --stddev-end 0.2 --stddev-steps 8000 --seed-frames 2000 "
            "--explore-steps 250 --env-id cartpole-balance --total-frames 60000 --encoder-weights none --ssl none",
        },
    },
    # How long does its first method take with `--cpus 2`, on a machine with nothing else to do?
    "dmc-small-two-cores": {
        "program": DMC_SMALL,
        "methods": {"from scratch": DMC_SMALL_BALANCE},
    },
    # From cartpole-balance's encoder to a task that is learned in longer steps.
    "dmc-sparse": {
        "n": 5,
        "program": f"{DMC_SMALL} {DMC_REPEAT_8} --env-id cartpole-balance_sparse --total-frames 100000 "
        f"--eval-interval 10000 --encoder-weights {BALANCE}",
        "methods": {name: flags for name, flags in DMC_REUSE.items() if name != "frozen bottom"},
    },
    # Would a comparison on cartpole-swingup say anything: does training from scratch pass 500?
    "dmc-swingup-gate": {
        "n": 1,
        "first_seed": 101,
        "program": f"{DMC_SMALL} {DMC_REPEAT_8} --env-id cartpole-swingup --total-frames 200000 --eval-interval 20000",
        "methods": {"from scratch": DMC_REUSE["from scratch"]},
    },
    # To compare with the official agent's published scores.
    "dmc-official": {
        "program": DMC_OFFICIAL,
        "methods": {
            "cartpole-balance": DMC_SOURCES["cartpole-balance"],
            "cartpole-swingup": "--env-id cartpole-swingup",
            "walker-stand": DMC_SOURCES["walker-stand"],
        },
    },
    # The encoders for dmc-transfer: seed 1 is enough.
    "dmc-source": {"program": DMC_OFFICIAL, "encoders": True, "methods": DMC_SOURCES},
    # From the encoders of dmc-source to harder tasks of the same body.
    "dmc-transfer": {
        "program": "drqv2_pisco.py --total-frames 100000",
        "methods": {
            f"{target}, {method}": f"--env-id {target} {own} {flags}"
            for target, (source, own) in DMC_TARGETS.items()
            for method, flags in with_encoder(DMC_REUSE, DMC_ENCODERS[source]).items()
        },
    },
}
