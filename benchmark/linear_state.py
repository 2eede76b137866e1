"""PPO with a linear policy on MSR Jump's true state: what a task demands once perception is solved.

    python benchmark/linear_state.py --seed 1

`ppo_pisco.py` with another encoder: it has no weights and reads the agent's x and y, the obstacle's x and the floor's
height off the pixels. The policy is linear in these four numbers. There is such a policy that solves every task: it
jumps where the obstacle is at most 14 pixels ahead. Whether PPO finds it is the question. Takes the flags of
`ppo_pisco.py`; the learning rate is jump-state-rates' unless it is given, as these few weights must grow large. Their
scale, half of the pixels, was chosen by trials with seed 1 on the target tasks.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppo_pisco  # noqa: E402

FLAGS = ["--encoder-weights", "none", "--ssl", "none", "--feature-dim", "4", "--learning-rate", "1e-2"]


class StateEncoder(nn.Module):
    """Images (B, 1, 60, 60) uint8 -> agent x, agent y, obstacle x, floor (B, 4) float32, as (pixels - 30) / 2."""

    def __init__(self, args, obs_shape):
        super().__init__()
        self.layers, self.frozen, self.about = nn.ModuleList(), 0, {}

    def freeze(self, count):
        pass

    def forward(self, obs):
        return self.trained_suffix(self.frozen_prefix(obs))

    def trained_suffix(self, hidden):
        return hidden

    def frozen_prefix(self, obs):
        inner = obs[:, 0, 1:-1, 1:-1]  # (B, 58, 58): without the outline, so every index is one short
        white, grey = inner == ppo_pisco.JumpVectorEnv.WHITE, inner == ppo_pisco.JumpVectorEnv.GREY
        floor = white.all(2).float().argmax(1)  # (B,) the row that is white from side to side
        agent = white & ~white.all(2, keepdim=True)
        places = torch.arange(inner.shape[1], device=obs.device)
        # The agent starts under the outline, so its right edge tells where it is. At 55, the last step, x reads 54.
        x = (agent.any(1) * places).amax(1) - ppo_pisco.JumpVectorEnv.AGENT_W + 1
        y = (agent.any(2) * places).amax(1) - ppo_pisco.JumpVectorEnv.AGENT_H + 1
        obstacle = grey.any(1).float().argmax(1)
        state = torch.stack([x, y, obstacle, floor], 1) + 1  # (B, 4) pixels
        return (state - 30) / 2


class LinearAgent(ppo_pisco.Agent):
    """A policy linear in the state; the value, which no claim is about, may be any function of it."""

    def __init__(self, args, encoder, obs_shape, num_actions):
        super().__init__(args, encoder, obs_shape, num_actions)
        layers = [nn.Linear(args.feature_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
        self.critic = nn.Sequential(*layers, nn.Linear(64, 1))


def main(argv=None):
    """Runs ppo_pisco.py's command line `argv` with the state in the encoder's place. Returns the run's folder."""
    argv = list(sys.argv[1:] if argv is None else argv)
    ppo_pisco.Encoder, ppo_pisco.Agent = StateEncoder, LinearAgent
    return ppo_pisco.train(ppo_pisco.parse_args(argv if "--resume" in argv else FLAGS + argv))


if __name__ == "__main__":
    main()
