"""PPO on augmented images, a baseline without a self-supervised loss: ppo_pisco.py with an augmentation before RL.

    python benchmark/augmented.py    # all flags are those of ppo_pisco.py, but nothing may be frozen

The policy acts on clean images, and the probabilities that it had then are those of PPO's ratio; every minibatch of
training is augmented anew (RAD in Raileanu et al. 2021, "Automatic Data Augmentation for Generalization in RL").
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_pisco  # noqa: E402


def augmented_loss(agent, obs, hidden, *batch, of=ppo_pisco.minibatch_loss):
    """ppo_pisco.minibatch_loss of augmented observations; its arguments, the last one of which is args."""
    return of(agent, ppo_pisco.augment(obs, batch[-1]), hidden, *batch)


if __name__ == "__main__":
    args = ppo_pisco.parse_args()
    args.ssl, args.exp_name = "none", Path(__file__).stem
    if args.freeze_layers:
        raise SystemExit("--freeze-layers: what frozen layers make of clean images is kept; leave it at 0 here")
    ppo_pisco.minibatch_loss = augmented_loss
    ppo_pisco.train(args, program=(__file__,))
