"""Flow-GRPO (2505.05470): group-relative policy gradient on the stochastic steps of a flow's sampler.

For each step drawn in the rollout, with ratio rho = exp(log p(x_s) - log p_old(x_s)), log-probabilities averaged
over latent dimensions, and the group-relative advantage A of the picture it led to:

    loss = -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + beta KL(p || p_ref)

(equations 3 and 5). What we change: stochastic steps fill a short window that moves over the first part of the
path, and siblings share everything before it (`rollout`), so the first step of the window is evaluated once for
a whole group, and its noise alone tells siblings apart. What we leave out: classifier-free guidance in training.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from models.keys import sample_key
from models.samplers import SAMPLERS, gaussian_kl, log_prob
from pipeline.rl.advantage import Advantages, group_advantages
from pipeline.rl.algorithm import Examples, Loss, Velocities
from pipeline.rl.rollout import Plan, Rollout
from pipeline.settings import Section


class GRPOConfig(Section):
    """`window` stochastic steps start anywhere from step 0 to `last_start`; `clip` is on the averaged scale."""

    type: Literal["grpo"] = "grpo"
    sampler: Literal["sde", "cps"] = "cps"
    eta: float = Field(0.7, gt=0, lt=1)
    window: int = Field(1, ge=1)
    last_start: int = Field(3, ge=0)
    clip: float = Field(1e-4, gt=0)
    kl: float = Field(0.01, ge=0)
    advantage_scale: Literal["group", "global"] = "global"
    advantage_limit: float = Field(5.0, gt=0)


@dataclass(frozen=True)
class Steps(Examples):
    """Stochastic steps from `t` to `s`: `x_t` (M, ...) to its F successors `x_s` (M, F, ...), their log-probabilities
    `old` (M, F) under the policy that drew them, and the `advantages` (M, F) of the pictures they led to."""

    s: float
    x_s: Tensor
    old: Tensor
    advantages: Tensor


class GRPO:
    """The algorithm as the trainer sees it."""

    needs_old = False

    def __init__(self, config: GRPOConfig):
        self.config = config
        self.needs_reference = config.kl > 0

    def rollout_plan(self, seed: int, iteration: int, steps: int, shift: float, siblings: int) -> Plan:
        start = random.Random(sample_key(seed, "window", iteration)).randint(0, self.config.last_start)
        return Plan(steps, shift, self.config.sampler, self.config.eta, start, self.config.window, siblings)

    def advantages(self, rewards_PK: Tensor, valid_PK: Tensor) -> Advantages:
        return group_advantages(rewards_PK, valid_PK, self.config.advantage_scale, self.config.advantage_limit)

    def examples(
        self, rollout: Rollout, advantages_PK: Tensor, ids: Sequence[str], seed: Sequence[str | int]
    ) -> Sequence[Steps]:
        return [
            Steps(t.x_t, t.t, t.prompt, t.s, t.x_s, t.old, advantages_PK.reshape(t.old.shape))
            for t in rollout.transitions
        ]

    def loss(self, examples: Steps, v: Velocities) -> Loss:
        step = SAMPLERS[self.config.sampler]
        t, s, eta = examples.t, examples.s, self.config.eta
        drawn = step(examples.x_t, v.policy, t, s, eta, None)
        fan = examples.x_s.shape[1]
        new = log_prob(examples.x_s.flatten(0, 1), drawn.mean.repeat_interleave(fan, 0), drawn.std)
        ratio = (new.view_as(examples.old) - examples.old).exp()
        clipped = ratio.clamp(1 - self.config.clip, 1 + self.config.clip)
        gain = torch.minimum(ratio * examples.advantages, clipped * examples.advantages).mean(1)
        kl = torch.zeros_like(gain)
        if v.reference is not None:
            kl = gaussian_kl(drawn.mean, step(examples.x_t, v.reference, t, s, eta, None).mean, drawn.std)
        outside = ((ratio - 1).abs() > self.config.clip).float().mean(1)
        return Loss(self.config.kl * kl - gain, kl.detach(), outside.detach())
