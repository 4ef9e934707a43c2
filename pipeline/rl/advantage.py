"""How much better each sibling is than its group.

Shapes: P prompts, K siblings, M terms of a mixture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """`values` (P, K), 0 where there is no reward or no signal; `kept` (P,) tells the groups that have a signal."""

    values: Tensor
    kept: Tensor


def group_advantages(
    rewards_PK: Tensor, valid_PK: Tensor, scale: str = "global", limit: float = 5.0, least_std: float = 1e-4
) -> Advantages:
    """(r - mean of the group) / std, clipped to +-`limit` (GRPO, 2402.03300, section 4.1).

    `scale` is `group`, the group's own std, or `global`, the root mean square deviation over all groups, as in
    Flow-GRPO. Rewards that are not valid take no part. A group with fewer than two valid rewards, or whose
    std is below `least_std`, is dropped (DAPO, 2503.14476, section 3.2).
    """
    count = valid_PK.sum(1, keepdim=True)
    rewards = torch.where(valid_PK, rewards_PK, 0.0)
    mean = rewards.sum(1, keepdim=True) / count.clamp(min=1)
    away = torch.where(valid_PK, rewards - mean, 0.0)
    std_P1 = (away.square().sum(1, keepdim=True) / count.clamp(min=1)).sqrt()
    kept = (count >= 2) & (std_P1 >= least_std)
    spread = std_P1 if scale == "group" else (away.square().sum() / count.sum().clamp(min=1)).sqrt()
    values = (away / spread.clamp(min=least_std)).clamp(-limit, limit)
    return Advantages(torch.where(kept, values, 0.0), kept[:, 0])


def mixed_advantages(
    rewards_PKM: Tensor,
    valid_PK: Tensor,
    weights_M: Tensor,
    combine: Literal["rewards", "advantages"],
    advantages: Callable[[Tensor, Tensor], Advantages],
) -> Advantages:
    """What `advantages`, an algorithm's, makes of several rewards.

    `rewards` adds them up by weight: a term counts by how much it differs within groups. `advantages` adds up what it
    makes of each term, and takes that for a reward (GDPO, 2601.05242, section 3): every term counts by its weight,
    whatever its spread.
    """
    terms = rewards_PKM
    if combine == "advantages":
        terms = torch.stack([advantages(term, valid_PK).values for term in rewards_PKM.unbind(-1)], dim=-1)
    return advantages((terms * weights_M).sum(-1), valid_PK)
