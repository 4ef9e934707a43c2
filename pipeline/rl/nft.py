"""DiffusionNFT (2509.16117): policy optimisation on the forward process, without trajectories or likelihoods.

Finished pictures x0 are noised to random times. With the velocity v of the policy and v_old of the one that drew
x0, an implicit positive and an implicit negative policy are regressed on x0 (equation 5 and algorithm 1):

    v+ = (1 - beta) v_old + beta v,   v- = (1 + beta) v_old - beta v
    loss = (r |x0(v+) - x0|^2 + (1 - r) |x0(v-) - x0|^2) / beta,   r = 1/2 + A / (2 limit)

where x0(v) = x_t - t v, each error is divided by its own mean size, and A is the group-relative advantage clipped
to +-limit. What we leave out: the old policy as a slow average; ours is the policy that drew the pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from models.paths import endpoints
from pipeline.rl.algorithm import Examples, Loss, Velocities
from pipeline.rl.forward import Forward, ForwardSettings
from pipeline.rl.rollout import Rollout


class NFTConfig(ForwardSettings):
    """`beta` is how far the policy is extrapolated either way."""

    type: Literal["nft"] = "nft"
    beta: float = Field(1.0, gt=0)


@dataclass(frozen=True)
class Rated(Examples):
    """Pictures `x0` (M, ...) noised, and the share `r` (M,) of each that counts as good."""

    x0: Tensor
    r: Tensor


class NFT(Forward):
    """The algorithm as the trainer sees it."""

    config: NFTConfig

    def examples(
        self, rollout: Rollout, advantages_PK: Tensor, ids: Sequence[str], seed: Sequence[str | int]
    ) -> Sequence[Rated]:
        x0, r = rollout.latents, 0.5 + advantages_PK.flatten() / (2 * self.config.advantage_limit)
        return [Rated(draw.x_t, draw.t, draw.prompt, x0, r) for draw in self.drawn(rollout, ids, seed)]

    def loss(self, examples: Rated, v: Velocities) -> Loss:
        beta = self.config.beta
        good = _error((1 - beta) * v.old + beta * v.policy, examples)
        bad = _error((1 + beta) * v.old - beta * v.policy, examples)
        total = (examples.r * good + (1 - examples.r) * bad) / beta
        kl = v.moved
        return Loss(total + self.config.kl * kl, kl.detach(), torch.zeros_like(total))


def _error(v: Tensor, examples: Rated) -> Tensor:
    """Mean square error of the x0 that `v` points to, divided by its mean size, (M,)."""
    away = (endpoints(examples.x_t, v, examples.t)[0] - examples.x0).flatten(1)
    return away.square().mean(1) / away.detach().abs().mean(1).clamp(min=1e-5)
