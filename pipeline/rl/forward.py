"""The forward process, for algorithms that need no trajectories: finished pictures noised to drawn times.

`Forward` is what algorithms have in common that weigh such pictures by their advantage in the group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from models.keys import sample_key
from models.paths import noised
from models.samplers import keyed_noise
from pipeline.rl.advantage import Advantages, Scale, group_advantages
from pipeline.rl.algorithm import Algorithm
from pipeline.rl.rollout import Plan, Rollout, Times
from pipeline.rl.settings import AlgorithmSettings

EARLIEST, LATEST = 0.02, 0.98
"""Between these times velocities are asked for: at the ends of the path one of its two sides tells nothing."""


def times(keys: Sequence[int], draw: int, draws: int, first: float, device: torch.device) -> Tensor:
    """Times (N,), one a key, in the `draw`-th of `draws` equal parts of [0, `first`], the first time of a path."""
    uniform = torch.tensor([key / 2**63 for key in keys], device=device)
    return ((draw + uniform) / draws * first).clamp(EARLIEST, LATEST)


def drawn(
    keys: Sequence[int], draw: int, draws: int, first: float, shape: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Times (N,) and standard normal noise (N, *shape), both of their keys alone."""
    return times(keys, draw, draws, first, device), keyed_noise(list(keys), tuple(shape), device)


@dataclass(frozen=True)
class Draw:
    """Pictures noised with `noise` (M, ...) to `x_t` (M, ...) at times `t` (M,), and the index of each one's prompt."""

    x_t: Tensor
    t: Tensor
    prompt: Tensor
    noise: Tensor


def forward_draws(
    x0: Tensor, ids: Sequence[str], siblings: Sequence[range], draws: int, first: float, seed: Sequence[str | int]
) -> Iterator[Draw]:
    """Each picture `x0` (M, ...), siblings side by side, noised `draws` times, at times spread evenly up to `first`.

    `ids` name the prompts and `siblings` the pictures of each, as many of all; they and `seed` key time and noise.
    """
    prompt = torch.arange(len(ids), device=x0.device).repeat_interleave(len(x0) // len(ids))
    for draw in range(draws):
        keys = [sample_key(*seed, i, k, "draw", draw) for i, own in zip(ids, siblings, strict=True) for k in own]
        t, noise = drawn(keys, draw, draws, first, x0.shape[1:], x0.device)
        yield Draw(noised(x0, noise, t), t, prompt, noise)


class ForwardSettings(AlgorithmSettings):
    """`draws` copies of each picture `sampler` paints, noised to times spread evenly; `kl` weighs |v - v_ref|^2."""

    sampler: Literal["ode", "heun", "dpm2m"] = "ode"
    draws: int = Field(2, ge=1)
    kl: float = Field(1e-4, ge=0)
    advantage_scale: Scale = "global"
    advantage_limit: float = Field(5.0, gt=0)


class Forward(Algorithm):
    """Pictures by the ODE, their advantages in the group, and copies of them noised."""

    needs_old = True

    def __init__(self, config: ForwardSettings):
        self.config = config
        self.needs_reference = config.kl > 0

    def rollout_plan(self, seed: int, iteration: int, times: Times, siblings: int) -> Plan:
        return Plan.ode(times, siblings, solver=self.config.sampler)

    def advantages(self, rewards_PK: Tensor, valid_PK: Tensor) -> Advantages:
        return group_advantages(rewards_PK, valid_PK, self.config.advantage_scale, self.config.advantage_limit)

    def drawn(self, rollout: Rollout, ids: Sequence[str], seed: Sequence[str | int]) -> Iterator[Draw]:
        """The pictures noised, `draws` times."""
        first = rollout.plan.times[0]
        return forward_draws(rollout.latents, ids, rollout.numbers, self.config.draws, first, seed)
