"""Flow-GRPO (2505.05470): group-relative policy gradient on the stochastic steps of a flow's sampler.

For each step drawn in the rollout, with ratio rho = exp(log p(x_s) - log p_old(x_s)), log-probabilities averaged
over latent dimensions, and the group-relative advantage A of the picture it led to:

    loss = -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + beta KL(p || p_ref)

(equations 3 and 5). What we change: stochastic steps fill a short window that moves over the first part of the
path, and siblings share everything before it (`rollout`), so the first step of the window is evaluated once for
a whole group, and its noise alone tells siblings apart. What we leave out: classifier-free guidance in training.
"""

import random
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from models.generator import sample_key
from models.samplers import SAMPLERS, gaussian_kl, log_prob
from pipeline.rl.advantage import Advantages, group_advantages
from pipeline.rl.rollout import Plan, Transition
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
class Loss:
    """Of each input, (M,): `total` to minimise, and what is worth watching of it."""

    total: Tensor
    kl: Tensor
    clipped: Tensor


class GRPO:
    """The algorithm as the trainer sees it."""

    needs_critic = False
    needs_reference = True
    needs_trajectory = True
    offline = False

    def __init__(self, config: GRPOConfig):
        self.config = config

    def rollout_plan(self, seed: int, iteration: int, steps: int, shift: float, siblings: int) -> Plan:
        start = random.Random(sample_key(seed, "window", iteration)).randint(0, self.config.last_start)
        return Plan(steps, shift, self.config.sampler, self.config.eta, start, self.config.window, siblings)

    def advantages(self, rewards_PK: Tensor, valid_PK: Tensor) -> Advantages:
        return group_advantages(rewards_PK, valid_PK, self.config.advantage_scale, self.config.advantage_limit)

    def loss(self, transition: Transition, v: Tensor, v_ref: Tensor | None, advantages: Tensor) -> Loss:
        """`v` and `v_ref` (M, ...) are the policy's and the reference's velocities, `advantages` is (M, F)."""
        step = SAMPLERS[self.config.sampler]
        t, s, eta = transition.t, transition.s, self.config.eta
        drawn = step(transition.x_t, v, t, s, eta, None)
        fan = transition.x_s.shape[1]
        new = log_prob(transition.x_s.flatten(0, 1), drawn.mean.repeat_interleave(fan, 0), drawn.std)
        ratio = (new.view_as(transition.old) - transition.old).exp()
        clipped = ratio.clamp(1 - self.config.clip, 1 + self.config.clip)
        gain = torch.minimum(ratio * advantages, clipped * advantages).mean(1)
        kl = torch.zeros(len(v), device=v.device)
        if v_ref is not None:
            kl = gaussian_kl(drawn.mean, step(transition.x_t, v_ref, t, s, eta, None).mean, drawn.std)
        outside = ((ratio - 1).abs() > self.config.clip).float().mean(1)
        return Loss(self.config.kl * kl - gain, kl.detach(), outside.detach())
