"""A critic of half-painted pictures: the reward that a path will end with, told from where it is now.

Painting is a Markov decision process whose states are (x_t, t, prompt) (DDPO, 2305.13301, section 4.2). The critic is
a small head on what the base generator, its adapter off, makes of a state: the base already knows which picture it is
about to paint, and from what it was told, while a network of the critic's own would have to learn to see first. Such
features do not move while the policy does, so those of the rollout serve every update, and the gradient of the critic
reaches nothing else. What this leaves out: features of several layers, and where in the picture something is.

Shapes: M states, W width, H hidden units, F successors of a state, T steps, N paths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Critic(nn.Module):
    """Values (M,) of states, given `models.generator`'s features of them (M, 2, `width`).

    Time and prompt, the second of the features, scale and shift what is read of the first (FiLM, 1709.07871): one head
    serves all noise levels, and whether a picture is right depends on its prompt. At first all values are 0; the other
    weights depend on `seed` alone.
    """

    def __init__(self, width: int, hidden: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.read = nn.Linear(width, hidden)
            self.modulation = nn.Linear(width, 2 * hidden)
            self.mix = nn.Linear(hidden, hidden)
            self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, features: Tensor) -> Tensor:
        painted, told = F.layer_norm(features, features.shape[2:]).unbind(1)  # (M, W) each
        scale, shift = self.modulation(told).chunk(2, 1)  # (M, H) each
        x = F.silu(self.read(painted))
        return self.out(F.silu(self.mix(x * (1 + scale) + shift))).squeeze(1)


def gae(values_TN: Tensor, rewards_N: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages (T, N) of paths whose one reward comes after the last step (1506.02438, equation 16).

    With d_i = gamma V_{i+1} - V_i before the last step and d_T = r - V_T, they are A_i = d_i + gamma lam A_{i+1}:
    the error of one step where `lam` is 0, and what the path brought over what was expected where it is 1.
    """
    ahead = torch.cat([gamma * values_TN[1:], rewards_N[None]])
    advantage, found = torch.zeros_like(rewards_N), []
    for error in (ahead - values_TN).flip(0):
        advantage = error + gamma * lam * advantage
        found.append(advantage)
    return torch.stack(found[::-1])


def value_loss(values_M: Tensor, old_M: Tensor, returns_MF: Tensor, clip: float) -> Tensor:
    """Half the squared error of the values, (M, F), or that of values kept within `clip` of the `old` ones where it is
    larger (PPO as implemented, 1707.06347; 2005.12729, section 3)."""
    kept = old_M + (values_M - old_M).clamp(-clip, clip)
    errors = [(value.unsqueeze(1) - returns_MF).square() for value in (values_M, kept)]
    return torch.maximum(*errors) / 2
