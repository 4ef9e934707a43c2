"""ReFL (2304.05977, section 3) and DRaFT-K (2309.17400, section 4): the gradient of the reward itself.

The rollout goes on without gradient to a late step, at time t, and from there the policy makes x0 of x_t with one:

- DRaFT-K walks the last K steps of the sampler. With K the number of all steps, the gradient is that of the whole path.
- ReFL jumps, by x0 = x_t - t v, from one of the last steps, drawn anew in each iteration.

What is minimised is phi(r(x0)) + kl |v - v_ref|^2, with v = (x_t - x0) / t the mean velocity of the way. DRaFT's phi is
-r; ReFL's is max(0, hinge - r), which stops where the reward is high enough. What we leave out: ReFL's loss on pictures
of its pretraining, for which the penalty on velocities stands, and its factor on the reward, which Adam cancels;
DRaFT-LV's several noises; gradients through the encoding of prompts.

Shapes: P prompts, K siblings, M = P K inputs.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from models.keys import sample_key
from models.paths import endpoints
from models.samplers import ode
from pipeline.rl.advantage import Advantages, unrated
from pipeline.rl.algorithm import Algorithm, Ask, Examples, Loss, Velocities
from pipeline.rl.rollout import Plan, Rollout, Times
from pipeline.rl.settings import AlgorithmSettings


class ReFLConfig(AlgorithmSettings):
    """Learns from one of the last `late` steps.

    Attributes:
        hinge: rewards above this are high enough; null where none is. The paper's 2 is for ImageReward's scale.
        kl: weighs |v - v_ref|^2.
    """

    type: Literal["refl"] = "refl"
    follows_reward: ClassVar[bool] = True
    late: int = Field(3, ge=1)
    hinge: float | None = None
    kl: float = Field(1e-2, ge=0)

    def check(self, steps: int, siblings: int) -> None:
        if self.late > steps:
            raise ValueError(f"algorithm.late: {self.late}, but a picture takes {steps} steps")


class DRaFTConfig(AlgorithmSettings):
    """Learns from the last `last` steps, the K of DRaFT-K; memory grows with them.

    Attributes:
        kl: weighs |v - v_ref|^2.
    """

    type: Literal["draft"] = "draft"
    follows_reward: ClassVar[bool] = True
    last: int = Field(1, ge=1)
    kl: float = Field(1e-2, ge=0)

    def check(self, steps: int, siblings: int) -> None:
        if self.last > steps:
            raise ValueError(f"algorithm.last: {self.last}, but a picture takes {steps} steps")


@dataclass(frozen=True)
class Ways(Examples):
    """Ways from `x_t` at the first of `times` to time 0 at the last, by Euler's steps of the flow."""

    times: tuple[float, ...]

    def ask(self, predict: Ask) -> Tensor:
        """The mean velocity of each way, (M, ...)."""
        x = self.x_t
        for t, s in pairwise(self.times):
            x = ode(x, predict(x, t, self.prompt), t, s).x
        return (self.x_t - x) / self.times[0]


class DirectReward(Algorithm):
    """ReFL or DRaFT-K, as the trainer sees it."""

    needs_old = False
    needs_gradient = True

    def __init__(self, config: ReFLConfig | DRaFTConfig):
        self.config = config
        self.needs_reference = config.kl > 0

    def rollout_plan(self, seed: int, iteration: int, times: Times, siblings: int) -> Plan:
        if isinstance(self.config, DRaFTConfig):
            kept = len(times) - 1 - self.config.last
        else:
            drawn = random.Random(sample_key(seed, "late", iteration)).randint(1, self.config.late)
            kept = len(times) - 1 - drawn
        return Plan.ode(times, siblings, kept)

    def advantages(self, rewards_PK: Tensor, valid_PK: Tensor) -> Advantages:
        return unrated(rewards_PK)

    def examples(
        self, rollout: Rollout, advantages_PK: Tensor, ids: Sequence[str], seed: Sequence[str | int]
    ) -> Sequence[Ways]:
        plan, device = rollout.plan, rollout.latents.device
        times = plan.times[plan.kept :]
        if isinstance(self.config, ReFLConfig):
            times = times[0], 0.0
        prompt = torch.arange(len(ids), device=device).repeat_interleave(advantages_PK.shape[1])
        return [Ways(rollout.kept, times[0], prompt, times)]

    def loss(self, examples: Ways, v: Velocities) -> Loss:
        x0, _ = endpoints(examples.x_t, v.policy, examples.t)
        reward = v.reward(x0)
        hinge = self.config.hinge if isinstance(self.config, ReFLConfig) else None
        total = -reward if hinge is None else (hinge - reward).clamp(min=0)
        kl = v.moved
        return Loss(total + self.config.kl * kl, kl.detach(), torch.zeros_like(total))
