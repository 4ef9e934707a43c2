"""A made-up network that predicts eps on a variance preserving path, as diffusers' schedulers and as we ask it."""

import torch
from torch import Tensor

RANDOM = torch.Generator().manual_seed(0)
LATENTS = torch.randn(3, 2, 4, 4, generator=RANDOM, dtype=torch.float64)


def eps(x_vp: Tensor, ratio: float) -> Tensor:
    """At `x_vp` with this ratio of noise to signal."""
    return 0.9 * torch.tanh(x_vp + 0.3 * ratio / (1 + ratio)) + 0.05 * x_vp.flip(-1)


def predict(x_t: Tensor, t: float) -> Tensor:
    """The flow's velocity at `x_t`, `t`: (eps - x_t) / (1 - t)."""
    return (eps(x_t * size(t), t / (1 - t)) - x_t) / (1 - t)


def size(t: float) -> float:
    """How much larger latents are than on the flow: on a VP path the squares of signal and noise add up to 1."""
    return ((1 - t) ** 2 + t**2) ** -0.5


def flow_time(signal: float) -> float:
    """Of a timestep with this cumulative product of alphas."""
    return (1 - signal) ** 0.5 / (signal**0.5 + (1 - signal) ** 0.5)
