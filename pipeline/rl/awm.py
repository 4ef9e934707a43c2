"""Advantage-weighted matching (AWM, 2509.25050): the flow-matching loss itself, weighed by how good a picture is.

Finished pictures x0 are noised to random times, and minus the pretraining loss stands for the log-probability:

    log p = -t ((|v - (eps - x0)|^2 + 1e-10)^huber - (1e-10)^huber) / huber

with squares averaged over latent dimensions. With the ratio rho = exp(log p - log p_old) and the group-relative
advantage A, brought from +-limit to +-1,

    loss = -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + kl |v - v_ref|^2 + kl_average |v - v_average|^2

where v_average is of the policy's moving average, which keeps a step from undoing those before it. Where `huber` is 1,
log p is the plain loss weighed by t; the generalised Huber's small power lets no single picture rule the gradient.

What we change: the moving average is the trainer's, whose pace is `finetune.average`; it is also what is kept in the
end. It lags several iterations behind the policy, the paper's code's less than one, so `kl_average` is smaller than its
1. log p is of the flow's velocities whatever the generator was trained on, as the paper's are. What we leave out: times
shifted to the noise, and SA-Solver for rollouts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from models.paths import velocity
from pipeline.rl.algorithm import Examples, Loss, Velocities, apart
from pipeline.rl.forward import Forward, ForwardSettings
from pipeline.rl.rollout import Rollout

_LEAST = 1e-10


class AWMConfig(ForwardSettings):
    """`huber` is the power of the squared error; `kl_average` weighs |v - v_average|^2."""

    type: Literal["awm"] = "awm"
    draws: int = Field(4, ge=1)
    huber: float = Field(0.25, gt=0, le=1)
    clip: float = Field(1.0, gt=0)
    kl: float = Field(0.03, ge=0)
    kl_average: float = Field(0.01, ge=0)


@dataclass(frozen=True)
class Matched(Examples):
    """Pictures noised, the `target` velocities (M, ...) that lead back to them, and how good they are, `gain` (M,)."""

    target: Tensor
    gain: Tensor


class AWM(Forward):
    """The algorithm as the trainer sees it."""

    config: AWMConfig

    def __init__(self, config: AWMConfig):
        super().__init__(config)
        self.needs_average = config.kl_average > 0

    def examples(
        self, rollout: Rollout, advantages_PK: Tensor, ids: Sequence[str], seed: Sequence[str | int]
    ) -> Sequence[Matched]:
        x0, gain = rollout.latents, advantages_PK.flatten() / self.config.advantage_limit
        return [
            Matched(draw.x_t, draw.t, draw.prompt, velocity(x0, draw.noise), gain)
            for draw in self.drawn(rollout, ids, seed)
        ]

    def loss(self, examples: Matched, v: Velocities) -> Loss:
        config = self.config
        change = self._likelihood(examples, v.policy) - self._likelihood(examples, v.old)
        ratio = change.exp()
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        total = -torch.minimum(ratio * examples.gain, clipped * examples.gain)
        if v.average is not None:
            total = total + config.kl_average * v.counts * apart(v.policy, v.average)
        outside = ((ratio - 1).abs() > config.clip).float()
        kl = v.moved
        return Loss(total + config.kl * kl, kl.detach(), outside.detach(), ratio_error=(ratio - 1).abs().detach())

    def _likelihood(self, examples: Matched, v: Tensor) -> Tensor:
        """What stands for log p of each picture, (M,)."""
        power = self.config.huber
        return -examples.t * ((apart(v, examples.target) + _LEAST) ** power - _LEAST**power) / power
