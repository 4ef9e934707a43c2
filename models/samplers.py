"""One step from time t down to s < t, in one signature for every sampler; log-probabilities of such steps.

A step gives the mean and standard deviation of a Gaussian and the latents drawn from it. Where eta is 0 each of them
but `ddpm` is the deterministic Euler step of the flow, which is DDIM's. Latents are (B, ...), times are floats in
[0, 1] of the flow, see `paths`; a model of another path that was brought to it is stepped by `ode`, `ddim`, `ddpm` and
`dpm2m` as it would be on its own.

Heun's method and DPM-Solver++(2M) are Euler's step with another velocity than the one at hand, which a second look at
the network corrects, or the step before. `SOLVERS` say with which velocity a step is taken, and `walk` takes all steps
of a path by any of the names.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from models.paths import endpoints

Velocity = Callable[[Tensor, float], Tensor]
"""What a network says is the velocity at `x_t` (B, ...), `t`."""


@dataclass(frozen=True)
class Step:
    """`x` = `mean` + `std` * noise, all at time s."""

    mean: Tensor
    std: float
    x: Tensor


Sampler = Callable[[Tensor, Tensor, float, float, float, Tensor | None], Step]

_START = 0.99
"""Times above it are where paths start: at noise alone, or a little before."""


def ode(x_t: Tensor, v: Tensor, t: float, s: float, eta: float = 0.0, noise: Tensor | None = None) -> Step:
    """Euler's step of the flow ODE; `eta` and `noise` are ignored."""
    mean = x_t + (s - t) * v
    return Step(mean, 0.0, mean)


def ddim(x_t: Tensor, v: Tensor, t: float, s: float, eta: float, noise: Tensor | None) -> Step:
    """DDIM (2010.02502, equations 12 and 16) with `eta` in [0, 1], from the ODE to DDPM.

    The variance is eta^2 that of q(x_s | x_t, x0), (s / t)^2 (t^2 - ((1 - t) / (1 - s))^2 s^2). It scales as the path
    does, so on a VP path it is the published one.
    """
    x0, eps = endpoints(x_t, v, t)
    kept = s * (1 - t) / ((1 - s) * t)  # the ratio of noise to signal at s, over that at t
    std = eta * s * math.sqrt(1 - kept * kept)
    return _drawn((1 - s) * x0 + math.sqrt(s * s - std * std) * eps, std, noise)


def ddpm(x_t: Tensor, v: Tensor, t: float, s: float, eta: float, noise: Tensor | None) -> Step:
    """The ancestral step (2006.11239, equations 6 and 7): the posterior given the x0 at hand; `eta` is ignored."""
    return ddim(x_t, v, t, s, 1.0, noise)


def sde(x_t: Tensor, v: Tensor, t: float, s: float, eta: float, noise: Tensor | None) -> Step:
    """Euler-Maruyama's step of the SDE with the flow's marginals (Flow-GRPO, 2505.05470, equation 9).

    The diffusion g = eta sqrt(t / (1 - t)) is infinite at t = 1, where paths start, if not a little before. There 1 - s
    takes the place of 1 - t under the root.
    """
    dt = s - t
    g = eta * math.sqrt(t / (1 - (s if t > _START else t)))
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


STOCHASTIC: dict[str, Sampler] = {"ddim": ddim, "ddpm": ddpm, "sde": sde, "dance": dance, "cps": cps}
SAMPLERS: dict[str, Sampler] = {"ode": ode, **STOCHASTIC}


@dataclass(frozen=True)
class Seen:
    """What the step before saw: its time, and the data (B, ...) that the velocity there pointed to."""

    t: float
    x0: Tensor


Solver = Callable[[Velocity, Tensor, float, float, Seen | None], tuple[Tensor, Seen | None]]


def euler(predict: Velocity, x_t: Tensor, t: float, s: float, seen: Seen | None = None) -> tuple[Tensor, None]:
    """The velocity at hand."""
    return predict(x_t, t), None


def heun(predict: Velocity, x_t: Tensor, t: float, s: float, seen: Seen | None = None) -> tuple[Tensor, None]:
    """The mean of the velocities at both ends of Euler's step (2206.00364, algorithm 1, without churn).

    The network is asked twice, but once where s is 0.
    """
    v = predict(x_t, t)
    return v if s == 0 else (v + predict(ode(x_t, v, t, s).x, s)) / 2, None


def dpm2m(predict: Velocity, x_t: Tensor, t: float, s: float, seen: Seen | None = None) -> tuple[Tensor, Seen]:
    """The velocity to an x0 extrapolated from the step before (DPM-Solver++(2M), 2211.01095, algorithm 2).

    With lambda = log((1 - t) / t) and r = (lambda_t - lambda_last) / (lambda_s - lambda_t) it is
    x0 + (x0 - x0_last) / (2 r). The first step and the one to s = 0 are Euler's.
    """
    v = predict(x_t, t)
    x0, _ = endpoints(x_t, v, t)
    if seen is None or s == 0:
        return v, Seen(t, x0)
    inverse = (_log_snr(s) - _log_snr(t)) / (_log_snr(t) - _log_snr(seen.t))
    return (x_t - x0 - (x0 - seen.x0) * (inverse / 2)) / t, Seen(t, x0)


def _log_snr(t: float) -> float:
    return math.log((1 - t) / t) if t < 1 else -math.inf


SOLVERS: dict[str, Solver] = {"heun": heun, "dpm2m": dpm2m}


def calls(sampler: str, steps: int) -> int:
    """How often `walk` asks the network."""
    return 2 * steps - 1 if sampler == "heun" else steps


def walk(
    predict: Velocity,
    x: Tensor,
    times: Sequence[float],
    sampler: str = "ode",
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """From latents (B, ...) at `times[0]` to those at the last of `times`, by a name of `SAMPLERS` or `SOLVERS`.

    `noise(number)` is that of a step; without it no sampler draws.

    Raises:
        ValueError: the name is unknown, or its `eta` is not between 0 and 1.
    """
    if sampler not in SAMPLERS and sampler not in SOLVERS:
        raise ValueError(f"sampler: unknown {sampler}; known here: {', '.join([*SAMPLERS, *SOLVERS])}")
    if sampler in STOCHASTIC and not 0 <= eta <= 1:
        raise ValueError(f"eta: {eta} is not between 0 and 1")
    solver, step = SOLVERS.get(sampler, euler), SAMPLERS.get(sampler, ode)
    seen = None
    for number, (t, s) in enumerate(pairwise(times)):
        v, seen = solver(predict, x, t, s, seen)
        x = step(x, v, t, s, eta, noise(number) if noise else None).x
    return x


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
