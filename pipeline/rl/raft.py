"""RAFT (2304.06767): fine-tuning on the best of N pictures; and supervised fine-tuning on chosen ones.

Of each group the pictures with the highest rewards are kept, and the policy learns to paint them, by the flow-matching
loss on fresh noise (algorithm 1, with one optimiser step where the paper trains to the end):

    loss = |v - (eps - x0)|^2 + kl |v - v_ref|^2

Off-line it learns from the pictures that win most of the run's preference pairs instead. Both are baselines: they show
what selection alone gives, without a push away from what is worse. A few Euler steps do not quite paint what many
would, and a policy that regresses on such pictures of its own drifts with them, whichever it selects; `kl` holds it.
Errors are those of eps on a generator that was trained on a variance preserving path, as in its own training.

Shapes: P prompts, K siblings, M pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from models.paths import velocity
from pipeline.rl.advantage import Advantages, group_advantages, unrated
from pipeline.rl.algorithm import Algorithm, Examples, Loss, Velocities, apart
from pipeline.rl.forward import forward_draws
from pipeline.rl.preferred import Preferences
from pipeline.rl.rollout import Plan, Rollout, Times
from pipeline.rl.settings import AlgorithmSettings


class RAFTConfig(AlgorithmSettings):
    """Learns from the `best` of each group (`online`), or of each prompt's pairs (`preferences`, off-line).

    Off-line `finetune.group_size` counts for nothing: each prompt is painted once, to measure on.

    Attributes:
        best: so many of each group are kept, or of the pictures in a prompt's pairs.
        draws: noisy copies of each of them, at times spread evenly.
        kl: weighs |v - v_ref|^2.
    """

    type: Literal["raft"] = "raft"
    whole_groups: ClassVar[bool] = True
    source: Literal["online", "preferences"] = "online"
    best: int = Field(1, ge=1)
    draws: int = Field(4, ge=1)
    kl: float = Field(1.0, ge=0)

    @property
    def offline(self) -> bool:
        return self.source == "preferences"

    def check(self, steps: int, siblings: int) -> None:
        if not self.offline and self.best >= siblings:
            raise ValueError(f"algorithm.best: {self.best} of a group of {siblings} leaves nothing to choose from")


@dataclass(frozen=True)
class Chosen(Examples):
    """Pictures noised, and the velocities `target` (M, ...) of their paths."""

    target: Tensor


class RAFT(Algorithm):
    """The algorithm as the trainer sees it; with `preferences` it is supervised fine-tuning."""

    needs_old = False
    whole_groups = RAFTConfig.whole_groups

    def __init__(self, config: RAFTConfig, preferences: Preferences | None = None):
        self.config, self.preferences = config, preferences
        self.needs_reference = config.kl > 0

    def rollout_plan(self, seed: int, iteration: int, times: Times, siblings: int) -> Plan:
        return Plan.ode(times, siblings)

    def advantages(self, rewards_PK: Tensor, valid_PK: Tensor) -> Advantages:
        """Ranks within the group, K for the best; 0 where there is no reward."""
        if self.preferences:
            return unrated(rewards_PK)
        signal = group_advantages(rewards_PK, valid_PK).kept & (valid_PK.sum(1) > self.config.best)
        ordered = torch.where(valid_PK, rewards_PK, -torch.inf).argsort(dim=1, stable=True)
        ranks = torch.where(valid_PK, ordered.argsort(dim=1) + 1, 0).to(rewards_PK)
        return Advantages(torch.where(signal[:, None], ranks, 0.0), signal)

    def examples(
        self, rollout: Rollout, advantages_PK: Tensor, ids: Sequence[str], seed: Sequence[str | int]
    ) -> Sequence[Chosen]:
        best = self.config.best
        if self.preferences:
            x0 = self.preferences.latents([key for one in ids for key in self.preferences.best(one, best)])
        else:
            places = advantages_PK.topk(best).indices
            siblings = rollout.latents.unflatten(0, advantages_PK.shape)
            x0 = siblings[torch.arange(len(ids), device=places.device)[:, None], places].flatten(0, 1)
        draws = forward_draws(x0, ids, [range(best)] * len(ids), self.config.draws, rollout.plan.times[0], seed)
        return [Chosen(draw.x_t, draw.t, draw.prompt, velocity(x0, draw.noise)) for draw in draws]

    def loss(self, examples: Chosen, v: Velocities) -> Loss:
        error, kl = v.counts * apart(v.policy, examples.target), v.moved
        return Loss(error + self.config.kl * kl, kl.detach(), torch.zeros_like(error))
