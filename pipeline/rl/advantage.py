"""How much better each sibling is than its group.

Shapes: P prompts, K siblings, M terms of a mixture, R rows of siblings.
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


Scale = Literal["group", "global", "none"]
Baseline = Literal["group", "global"]


def group_advantages(
    rewards_PK: Tensor,
    valid_PK: Tensor,
    scale: Scale = "global",
    limit: float = 5.0,
    least_std: float = 1e-4,
    baseline: Baseline = "group",
) -> Advantages:
    """(r - mean) / std, clipped to +-`limit` (GRPO, 2402.03300, section 4.1).

    `baseline` is the `group`'s mean, or the `global` one of all groups. `scale` is `group`, the group's own std,
    `global`, the root mean square deviation over all groups, as in Flow-GRPO, or `none` (Dr. GRPO, 2503.20783, section
    3.2), where `limit` is in the reward's unit. Rewards that are not valid take no part. A group with fewer than two
    valid rewards, or whose std is below `least_std`, is dropped (DAPO, 2503.14476, section 3.2).
    """
    count = valid_PK.sum(1, keepdim=True)
    rewards = torch.where(valid_PK, rewards_PK, 0.0)
    if baseline == "group":
        mean = rewards.sum(1, keepdim=True) / count.clamp(min=1)
    else:
        mean = rewards.sum() / count.sum().clamp(min=1)
    away = torch.where(valid_PK, rewards - mean, 0.0)
    std_P1 = (away.square().sum(1, keepdim=True) / count.clamp(min=1)).sqrt()
    kept = (count >= 2) & (std_P1 >= least_std)
    if scale == "none":
        values = away.clamp(-limit, limit)
    else:
        spread = std_P1 if scale == "group" else (away.square().sum() / count.sum().clamp(min=1)).sqrt()
        values = (away / spread.clamp(min=least_std)).clamp(-limit, limit)
    return Advantages(torch.where(kept, values, 0.0), kept[:, 0])


def variances(rewards_PK: Tensor, valid_PK: Tensor) -> Tensor:
    """Of each group's valid rewards (P,), of the population; 0 where they are fewer than two or all but equal."""
    away = group_advantages(rewards_PK, valid_PK, "none", torch.inf).values
    return away.square().sum(1) / valid_PK.sum(1).clamp(min=1)


def over_groups(
    advantages: Callable[[Tensor, Tensor], Advantages], groups_R: Tensor
) -> Callable[[Tensor, Tensor], Advantages]:
    """`advantages` of siblings that lie in several rows (R, K): rows of equal `groups_R`, from 0 on, are one group."""
    same = groups_R.unsqueeze(0) == groups_R.unsqueeze(1)
    place_R = same.tril(-1).sum(1)  # a row's, among those of its group
    size = int(groups_R.max()) + 1, int(place_R.max()) + 1

    def of_rows(rewards_RK: Tensor, valid_RK: Tensor) -> Advantages:
        rewards, valid = (values.new_zeros(*size, values.shape[1]) for values in (rewards_RK, valid_RK))
        rewards[groups_R, place_R], valid[groups_R, place_R] = rewards_RK, valid_RK
        found = advantages(rewards.flatten(1), valid.flatten(1))
        return Advantages(found.values.view_as(rewards)[groups_R, place_R], found.kept[groups_R])

    return of_rows


def win_rates(rewards_PK: Tensor, valid_PK: Tensor, least_gap: float = 1e-4) -> Tensor:
    """The share of its valid siblings that each picture beats, (P, K), a draw counting half (Pref-GRPO, 2508.20751).

    Rewards that differ by less than `least_gap` are a draw. Only the order within a group counts, so that neither a
    reward's scale nor one picture far from the others decides how hard the policy is moved. What has no valid
    reward, or no valid sibling, has 1/2.
    """
    gap_PKK = torch.where(valid_PK, rewards_PK, 0.0).unsqueeze(2) - torch.where(valid_PK, rewards_PK, 0.0).unsqueeze(1)
    won = (gap_PKK > least_gap).float() + 0.5 * (gap_PKK.abs() <= least_gap)
    itself = torch.eye(rewards_PK.shape[1], dtype=torch.bool, device=rewards_PK.device)
    rivals = valid_PK.unsqueeze(1) & valid_PK.unsqueeze(2) & ~itself
    count = rivals.sum(2)
    return torch.where(count > 0, (won * rivals).sum(2) / count.clamp(min=1), 0.5)


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


def unrated(rewards_PK: Tensor) -> Advantages:
    """For an algorithm that learns from every group, whatever its rewards."""
    return Advantages(torch.zeros_like(rewards_PK), torch.ones_like(rewards_PK[:, 0], dtype=torch.bool))
