"""The benchmark's suites. A suite is a program with the flags that all its methods share, and a table: method -> flags.

What stands beside a method's name is all that sets it apart. Every flag is the program's own: `python ppo_pisco.py
--help`, `python drqv2_pisco.py --help`.
"""

# DrQ-v2 on two CPU cores: small images, batches and networks, fewer and longer steps. Not the official settings.
DMC_SMALL = (
    "drqv2_pisco.py --render-quality fast --image-size 64 --shift-pixels 3 --batch-size 64 --hidden-dim 256 "
    "--action-repeat 4 --update-every 1 --learning-rate 3e-4 --tau 0.02 --gamma 0.98 --nstep 1 --stddev-end 0.2 "
    "--stddev-steps 8000 --seed-frames 2000 --explore-steps 250"
)

SUITES = {
    # The README's main command beside the same number of steps from scratch.
    "quickstart": {
        "program": "ppo_pisco.py",
        "methods": {
            "freeze 2 + PiSCO": "--freeze-layers 2",
            "from scratch": "--encoder-weights none --freeze-layers 0 --ssl none",
        },
    },
    # Which part of a pretrained encoder is of use on the target tasks, and which loss on top?
    "jump-transfer": {
        "program": "ppo_pisco.py",
        "methods": {
            "from scratch": "--encoder-weights none --ssl none",
            "from scratch + PiSCO": "--encoder-weights none --ssl pisco",
            "frozen": "--freeze-layers all --ssl none",
            "finetuned": "--ssl none",
            "finetuned + PiSCO": "--ssl pisco",
            "frozen bottom": "--freeze-layers 2 --ssl none",
            "frozen bottom + SimSiam": "--freeze-layers 2 --ssl simsiam",
            "frozen bottom + CURL": "--freeze-layers 2 --ssl curl",
            "frozen bottom + consistency": "--freeze-layers 2 --ssl consistency",
            "frozen bottom + PiSCO": "--freeze-layers 2 --ssl pisco",
        },
    },
    # How deep to freeze?
    "jump-depth": {
        "program": "ppo_pisco.py",
        "methods": {
            f"{k} frozen, {ssl}": f"--freeze-layers {k} --ssl {ssl}" for ssl in ("none", "pisco") for k in range(5)
        },
    },
    # Does DrQ-v2 learn within an hour on a CPU?
    "dmc-small": {
        "program": f"{DMC_SMALL} --env-id cartpole-balance --total-frames 60000",
        "methods": {"from scratch": "--encoder-weights none --ssl none"},
    },
    # The same settings, from cartpole-balance's encoder to cartpole-swingup.
    "dmc-transfer-small": {
        "program": f"{DMC_SMALL} --env-id cartpole-swingup --total-frames 60000",
        "methods": {"freeze 2 + PiSCO": "--freeze-layers 2", "from scratch": "--encoder-weights none --ssl none"},
    },
    # DrQ-v2 with its own settings, for a GPU; to compare with the official agent's published scores.
    "dmc-official": {
        "program": "drqv2_pisco.py --encoder-weights none --ssl none --total-frames 100000",
        "methods": {
            "cartpole-balance": "--env-id cartpole-balance",
            "cartpole-swingup": "--env-id cartpole-swingup",
            "walker-stand": "--env-id walker-stand --nstep 1 --batch-size 512",
        },
    },
}


def folder_of(parent, suite, method):
    """The folder of a method's runs under `parent`, one folder a seed in it."""
    return parent / suite / method.replace(" ", "_")
