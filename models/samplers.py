"""One step from time t down to s < t, in one signature for every sampler; log-probabilities of such steps.

A step gives the mean and standard deviation of a Gaussian and the latents drawn from it. Where eta is 0 each of
them is the deterministic Euler step of the flow. Latents are (B, ...), times are floats in [0, 1], see `paths`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.paths import endpoints


@dataclass(frozen=True)
class Step:
    """`x` = `mean` + `std` * noise, all at time s."""

    mean: Tensor
    std: float
    x: Tensor


Sampler = Callable[[Tensor, Tensor, float, float, float, Tensor | None], Step]


def ode(x_t: Tensor, v: Tensor, t: float, s: float, eta: float = 0.0, noise: Tensor | None = None) -> Step:
    """Euler's step of the flow ODE; `eta` and `noise` are ignored."""
    mean = x_t + (s - t) * v
    return Step(mean, 0.0, mean)


def sde(x_t: Tensor, v: Tensor, t: float, s: float, eta: float, noise: Tensor | None) -> Step:
    """Euler-Maruyama's step of the SDE with the flow's marginals (Flow-GRPO, 2505.05470, equation 9).

    The diffusion g = eta sqrt(t / (1 - t)) is infinite at t = 1, where s takes the place of t under the root.
    """
    dt = s - t
    g = eta * math.sqrt(t / (1 - (s if t == 1 else t)))
    mean = x_t * (1 + g * g * dt / (2 * t)) + v * (1 + g * g * (1 - t) / (2 * t)) * dt
    return _drawn(mean, g * math.sqrt(-dt), noise)


def cps(x_t: Tensor, v: Tensor, t: float, s: float, eta: float, noise: Tensor | None) -> Step:
    """Coefficients-preserving step (Flow-CPS, 2509.05952): noise and signal keep the shares that time s asks for."""
    x0, eps = endpoints(x_t, v, t)
    std = s * math.sin(eta * math.pi / 2)
    return _drawn((1 - s) * x0 + math.sqrt(s * s - std * std) * eps, std, noise)


def dance(x_t: Tensor, v: Tensor, t: float, s: float, eta: float, noise: Tensor | None) -> Step:
    """Euler-Maruyama's step of the SDE whose diffusion is `eta` at all times (DanceGRPO, 2505.07818, equation 8).

    The score of the marginal at t is -eps / t, with the noise eps that the velocity points to.
    """
    dt = s - t
    _, eps = endpoints(x_t, v, t)
    return _drawn(x_t + v * dt + eps * (eta * eta * dt / (2 * t)), eta * math.sqrt(-dt), noise)


def _drawn(mean: Tensor, std: float, noise: Tensor | None) -> Step:
    return Step(mean, std, mean if noise is None or std == 0 else mean + std * noise)


SAMPLERS: dict[str, Sampler] = {"ode": ode, "sde": sde, "dance": dance, "cps": cps}


def log_prob(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """log N(x; mean, std^2) in nats, *averaged* over the latent dimensions: (B, ...) -> (B,).

    The field quotes clip ranges on this scale (Flow-GRPO's 1e-4); a sum would be `x[0].numel()` times larger.
    """
    squares = ((x - mean) / std).square().flatten(1).mean(1)
    return -0.5 * squares - math.log(std) - 0.5 * math.log(2 * math.pi)


def gaussian_kl(mean: Tensor, other: Tensor, std: float) -> Tensor:
    """KL between two steps of one `std`, in nats, averaged over the latent dimensions as `log_prob` is: (B,)."""
    return ((mean - other) / std).square().flatten(1).mean(1) / 2


def keyed_noise(keys: list[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise (len(keys), *shape), each row drawn from its own 64-bit key on the CPU.

    A sample's noise therefore does not depend on its batch, its rank or the device.
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(key)) for key in keys]
    return torch.stack(rows).to(device)
