"""Gaussian paths between data and noise, and the conversions between what networks predict.

On a path x = alpha(t) x0 + sigma(t) eps: t = 0 is data, t = 1 is noise. All of Salon works on the rectified flow,

    x_t = (1 - t) x0 + t eps,   v = dx_t / dt = eps - x0

(2209.03003; Stable Diffusion 3, 2403.03206, equation 13). A network that was trained on another path, or predicts
something else, is brought to it exactly: x / (alpha + sigma) is on the flow at time sigma / (alpha + sigma), with the
same x0 and eps (paths differ in scale and time alone: 2206.00364, section 2), so an Euler step of the flow is a step of
DDIM, and no sampler or algorithm needs to know. All functions are pure and elementwise; `t` is a float or a tensor (B,)
against latents (B, ...).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Prediction = Literal["velocity", "eps", "v", "x0", "score"]
"""What a network predicts: dx / dt of its own path; the noise; v = alpha eps - sigma x0 (2202.00512, appendix D); the
data; the score, -eps / sigma."""


def like(t: Tensor | float, x: Tensor) -> Tensor:
    """`t`, a float or (B,), shaped to broadcast over `x` (B, ...)."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def noised(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t on the flow from `x0` to `noise`."""
    t = like(t, x0)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """dx_t / dt of the flow."""
    return noise - x0


def endpoints(x_t: Tensor, v: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
    """The (x0, eps) which the velocity `v` of the flow at `x_t` points to: the inverse of `noised` and `velocity`."""
    t = like(t, x_t)
    return x_t - t * v, x_t + (1 - t) * v


def shifted(t: float, shift: float) -> float:
    """The time whose ratio of noise to signal is `shift` times that of `t` (2403.03206, section 5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


def schedule(steps: int, shift: float = 1.0) -> list[float]:
    """`steps` + 1 times from 1 to 0; `shift` > 1 spends more of them near the noise."""
    if steps < 1:
        raise ValueError(f"steps: {steps} is below 1")
    return [shifted(1 - i / steps, shift) for i in range(steps + 1)]


@dataclass(frozen=True)
class Point:
    """A path at a time: the shares of data and noise, and their derivatives in time."""

    alpha: Tensor
    sigma: Tensor
    alpha_rate: Tensor
    sigma_rate: Tensor

    @property
    def flow_time(self) -> Tensor:
        """At which the flow has this ratio of signal to noise."""
        return self.sigma / (self.alpha + self.sigma)

    def like(self, x: Tensor) -> "Point":
        """Shaped to broadcast over `x` (B, ...)."""
        return Point(*(like(each, x) for each in (self.alpha, self.sigma, self.alpha_rate, self.sigma_rate)))


class Path(Protocol):
    """A Gaussian path over times in [0, 1]."""

    def at(self, t: Tensor) -> Point: ...

    def time(self, flow: Tensor) -> Tensor:
        """At which the path has the ratio of signal to noise that the flow has at `flow`."""
        ...


@dataclass(frozen=True)
class Flow:
    """The rectified flow."""

    def at(self, t: Tensor) -> Point:
        one = torch.ones_like(t)
        return Point(1 - t, t, -one, one)

    def time(self, flow: Tensor) -> Tensor:
        return flow


@dataclass(frozen=True)
class VP:
    """The variance preserving path of a linear noise schedule (2011.13456, equation 33): DDPM's, in continuous time."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def at(self, t: Tensor) -> Point:
        beta = self.beta_min + (self.beta_max - self.beta_min) * t
        log_alpha = -(self.beta_min + beta) * t / 4
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        return Point(alpha, sigma, -beta * alpha / 2, beta * alpha.square() / (2 * sigma))

    def time(self, flow: Tensor) -> Tensor:
        low, more = self.beta_min, self.beta_max - self.beta_min
        minus_log_alpha = torch.log1p((flow / (1 - flow)).square()) / 2
        # The larger root is written such that nothing cancels near the data.
        return 4 * minus_log_alpha / (low + (low * low + 4 * more * minus_log_alpha).sqrt())


@dataclass(frozen=True)
class Cosine:
    """The variance preserving path whose angle grows with time (2102.09672, section 3.2, without its offset)."""

    def at(self, t: Tensor) -> Point:
        angle = t * (math.pi / 2)
        alpha, sigma = angle.cos(), angle.sin()
        return Point(alpha, sigma, -sigma * (math.pi / 2), alpha * (math.pi / 2))

    def time(self, flow: Tensor) -> Tensor:
        return torch.atan2(flow, 1 - flow) * (2 / math.pi)


PathName = Literal["flow", "vp", "cosine"]
PATHS: dict[str, Path] = {"flow": Flow(), "vp": VP(), "cosine": Cosine()}


def ends_on_path(kind: Prediction, prediction: Tensor, x: Tensor, point: Point) -> tuple[Tensor, Tensor]:
    """The (x0, eps) which a `prediction` of some kind at `x` (B, ...) points to.

    It divides by alpha where eps or the score is predicted, by sigma where x0 is, and otherwise by neither.
    """
    p = point.like(x)
    match kind:
        case "eps":
            return (x - p.sigma * prediction) / p.alpha, prediction
        case "score":
            return (x + p.sigma.square() * prediction) / p.alpha, -p.sigma * prediction
        case "x0":
            return prediction, (x - p.alpha * prediction) / p.sigma
        case "v":
            square = p.alpha.square() + p.sigma.square()
            return (p.alpha * x - p.sigma * prediction) / square, (p.sigma * x + p.alpha * prediction) / square
        case "velocity":
            turn = p.alpha * p.sigma_rate - p.sigma * p.alpha_rate
            x0 = (p.sigma_rate * x - p.sigma * prediction) / turn
            return x0, (p.alpha * prediction - p.alpha_rate * x) / turn
    raise ValueError(f"prediction: unknown {kind}; known here: {', '.join(get_args(Prediction))}")


def on_path(x0: Tensor, eps: Tensor, point: Point) -> Tensor:
    """The x of a point of a path from `x0` to `eps` (B, ...)."""
    p = point.like(x0)
    return p.alpha * x0 + p.sigma * eps


def predicted(kind: Prediction, x0: Tensor, eps: Tensor, point: Point) -> Tensor:
    """What a perfect network of this kind predicts on the path from `x0` to `eps` (B, ...).

    It is the inverse of `ends_on_path`.
    """
    p = point.like(x0)
    match kind:
        case "eps":
            return eps
        case "score":
            return -eps / p.sigma
        case "x0":
            return x0
        case "v":
            return p.alpha * eps - p.sigma * x0
        case "velocity":
            return p.alpha_rate * x0 + p.sigma_rate * eps
    raise ValueError(f"prediction: unknown {kind}; known here: {', '.join(get_args(Prediction))}")


@dataclass(frozen=True)
class Parametrisation:
    """What a network predicts, and on which path: all it takes to bring it to the flow.

    Raises:
        ValueError: beginning with the field's name.
    """

    path: PathName = "flow"
    prediction: Prediction = "velocity"

    def __post_init__(self) -> None:
        for field, known in (("path", get_args(PathName)), ("prediction", get_args(Prediction))):
            if (value := getattr(self, field)) not in known:
                raise ValueError(f"{field}: unknown {value}; known here: {', '.join(known)}")

    @property
    def last(self) -> float:
        """The path's time at which painting starts, which is before one at which eps or score tell nothing of x0."""
        return 0.995 if self.prediction in ("eps", "score") and self.path != "vp" else 1.0

    def times(self, steps: int, shift: float) -> list[float]:
        """`steps` + 1 times of the flow down to 0, spread over the path's own time."""
        if self._is_flow:
            return schedule(steps, shift)
        own = torch.tensor([self.last * t for t in schedule(steps, shift)], dtype=torch.float64)
        return PATHS[self.path].at(own).flow_time.tolist()

    def inputs(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, ...) of the flow at its times (B,) as they are on the path, and at its times."""
        if self._is_flow:
            return x_t, t
        time = PATHS[self.path].time(t.clamp(max=self.times(1, 1.0)[0]))
        point = PATHS[self.path].at(time)
        return x_t * like(point.alpha + point.sigma, x_t), time

    def velocity(self, network: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        """The flow's velocity at `x_t` (B, ...), `t` (B,), by a network that is asked on its own path."""
        x, time = self.inputs(x_t, t)
        found = network(x, time)
        if self._is_flow:
            return found
        return velocity(*ends_on_path(self.prediction, found, x, PATHS[self.path].at(time)))

    @property
    def _is_flow(self) -> bool:
        return self.path == "flow" and self.prediction == "velocity"


FLOW = Parametrisation()
