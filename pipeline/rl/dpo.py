"""Diffusion-DPO (2311.12908): the better picture of a pair becomes easier to denoise than the worse one.

Both pictures x_a, x_b of a pair are noised to the same time with the same noise. With e the mean square error of the
predicted velocity over latent dimensions, Delta = e(policy) - e(reference), and p the probability that a is better,

    z = -beta / 2 (Delta_a - Delta_b),   loss = -p log sigma(z) - (1 - p) log sigma(-z) + kl |v - v_ref|^2

(equation 14, whose beta T omega is our beta; with a soft label its cross-entropy takes the place of the logarithm).
Pairs are those of the run, with the judge's soft labels, or on-line the best and the worst of each group by their
reward, of which the first is taken to be better for sure. What we add: a penalty on velocities beside beta's. On a
generator that was trained on a variance preserving path, as the paper's were, all these errors are those of eps.

With `inversion` the noise of a picture is that from which the base model paints it, as in Inversion-DPO (2507.11554):
what is noised so lies on the base model's way to it. What we leave out of that: its loss on whole trajectories.

Shapes: P prompts, K siblings, M pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from models.keys import sample_key
from models.paths import noised, velocity
from pipeline.rl import forward
from pipeline.rl.advantage import Advantages, group_advantages, unrated
from pipeline.rl.algorithm import Algorithm, Ask, Examples, Loss, Velocities
from pipeline.rl.preferred import Preferences
from pipeline.rl.rollout import Plan, Rollout, Times
from pipeline.rl.settings import AlgorithmSettings


class DPOConfig(AlgorithmSettings):
    """Pairs of `preferences` (off-line), or of each group's best and worst picture (`online`).

    Off-line `finetune.group_size` counts for nothing: each prompt is painted once, to measure on.

    Attributes:
        beta: how much the errors count; where it is null, 2000 off-line and 100 on-line.
        draws: times to which the pairs of an iteration are noised; off-line each draw takes other pairs.
        inversion: noise pictures of `preferences` with what the base model paints them from, which takes three times
            finetune.steps network calls a picture, and of a transformer that is trained as a whole one more copy.
        kl: weighs |v - v_ref|^2.
    """

    type: Literal["dpo"] = "dpo"
    rows: ClassVar[int] = 2
    whole_groups: ClassVar[bool] = True
    source: Literal["online", "preferences"] = "online"
    beta: float | None = Field(None, gt=0)
    draws: int = Field(2, ge=1)
    inversion: bool = False
    kl: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _what_is_inverted_is_not_its_own(self) -> Self:
        if self.inversion and not self.offline:
            raise ValueError("inversion: on-line pictures come from a known noise; set source to preferences")
        return self

    @property
    def offline(self) -> bool:
        return self.source == "preferences"

    @property
    def strength(self) -> float:
        return self.beta or (2000.0 if self.offline else 100.0)


@dataclass(frozen=True)
class Pairs(Examples):
    """Pairs `x_t` (M, 2, ...) at `t` (M,), the velocities `target` (M, 2, ...) of their paths, and the probability
    `label` (M,) that the first of each is the better one."""

    target: Tensor
    label: Tensor

    def ask(self, predict: Ask) -> Tensor:
        """(M, 2, ...)."""
        t, prompt = self.t.repeat_interleave(2), self.prompt.repeat_interleave(2)
        return predict(self.x_t.flatten(0, 1), t, prompt).unflatten(0, (-1, 2))

    def errors(self, v: Tensor) -> Tensor:
        """(M, 2)."""
        return (v - self.target).square().flatten(2).mean(2)


def preference_loss(away_M2: Tensor, label: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The cross-entropy (M,) in nats of labels, and the log-odds z (M,), from how much more the policy is off
    than the reference."""
    z = -beta / 2 * (away_M2[:, 0] - away_M2[:, 1])
    return -label * F.logsigmoid(z) - (1 - label) * F.logsigmoid(-z), z


def best_and_worst(advantages_PK: Tensor) -> Tensor:
    """Indices (P, 2) of the best and the worst sibling; those without a reward are neither, their advantage being 0."""
    return torch.stack([advantages_PK.argmax(1), advantages_PK.argmin(1)], 1)


def _chosen(preferences: Preferences, ids: Sequence[str], seed: Sequence[str | int]) -> tuple[Tensor, Tensor]:
    """Latents (P, 2, ...) of a pair of each prompt, and the probability (P,) that the first is better."""
    found = preferences.choose(ids, seed)
    pictures = [(choice.prompt_id, sample) for choice in found for sample in (choice.a, choice.b)]
    return preferences.latents(pictures).unflatten(0, (-1, 2)), torch.tensor([choice.label for choice in found])


class DPO(Algorithm):
    """The algorithm as the trainer sees it; with `preferences` it is the off-line one."""

    needs_reference = True
    needs_old = False
    whole_groups = DPOConfig.whole_groups
    rows = DPOConfig.rows

    def __init__(self, config: DPOConfig, preferences: Preferences | None = None):
        self.config, self.preferences = config, preferences

    def rollout_plan(self, seed: int, iteration: int, times: Times, siblings: int) -> Plan:
        return Plan.ode(times, siblings)

    def advantages(self, rewards_PK: Tensor, valid_PK: Tensor) -> Advantages:
        if self.preferences:
            return unrated(rewards_PK)
        return group_advantages(rewards_PK, valid_PK, "group")

    def examples(
        self, rollout: Rollout, advantages_PK: Tensor, ids: Sequence[str], seed: Sequence[str | int]
    ) -> Sequence[Pairs]:
        prompt = torch.arange(len(ids), device=rollout.latents.device)
        sets = []
        for draw in range(self.config.draws):
            if self.preferences:
                pairs, label = _chosen(self.preferences, ids, (*seed, draw))
            else:
                siblings = rollout.latents.unflatten(0, advantages_PK.shape)
                pairs, label = siblings[prompt[:, None], best_and_worst(advantages_PK)], torch.ones(len(ids))
            keys = [sample_key(*seed, i, "draw", draw) for i in ids]
            first = rollout.plan.times[0]
            t, noise = forward.drawn(keys, draw, self.config.draws, first, pairs.shape[2:], pairs.device)
            noise = noise[:, None].expand_as(pairs)
            if self.preferences and self.config.inversion:
                texts = [self.preferences.prompts[i].text for i in ids for _ in range(2)]
                noise = self.preferences.invert(pairs.flatten(0, 1), texts).view_as(pairs)
            sets.append(Pairs(noised(pairs, noise, t), t, prompt, velocity(pairs, noise), label.to(pairs)))
        return sets

    def loss(self, examples: Pairs, v: Velocities) -> Loss:
        away = examples.errors(v.policy) - examples.errors(v.reference)
        away = (away.T * v.counts).T
        total, z = preference_loss(away, examples.label, self.config.strength)
        kl = v.moved
        right = ((z > 0) == (examples.label > 0.5)).float()
        return Loss(total + self.config.kl * kl, kl.detach(), torch.zeros_like(kl), {"preference_accuracy": right})
