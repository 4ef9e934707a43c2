"""From latents back to the noise that a sampler paints them from.

Euler's step from t to s < t is x_s = x_t + (s - t) v(x_t, t). Backwards x_t is unknown on both sides:

- `ddim` (2010.02502, section 4.3) puts x_s in its place where the network is asked.
- `fixed-point` (2309.04907) puts in the x_t found so far, again and again, and comes to the x_t from which the step
  leads to x_s.
- `easyinv` (2408.05159) is `ddim` that mixes each x_t with the x_s before it, for some steps.
- `bdia` (2307.10829) paints and inverts by another step, of x at three neighbouring times, which is solved for the last
  as well as for the first; so it returns exactly, given the latents at two times.

Each works on the flow and on a variance preserving path (`vp`), where it keeps eps rather than the velocity from x_s to
x_t and is the published one: what it mixes, it mixes as they are on that path, which is larger by 1 / |(1 - t, t)|.
All latents are (B, ...) on the flow, see `paths`; times fall to 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor

from models.samplers import Velocity, ode, walk

Method = Literal["ddim", "fixed-point", "easyinv", "bdia"]


@dataclass(frozen=True)
class Inverted:
    """Latents (B, ...) at the first time, and where painting needs them those at the second too."""

    first: Tensor
    second: Tensor | None = None


@dataclass(frozen=True)
class Inversion:
    """How noise is found, and what is painted from it.

    Attributes:
        iterations: how often `fixed-point` asks the network for each step; the others do once.
        keep: of each x_t that `easyinv` mixes, the rest being x_s.
        start, length: where it begins to mix and for how long, as shares of the steps from the data on: the paper's for
            Stable Diffusion 1.4; for SDXL it has 0.85 and 0.1.
        gamma: how much of the step before `bdia` puts right; 0 would be Euler's step.

    Raises:
        ValueError: beginning with the field's name.
    """

    method: Method = "fixed-point"
    iterations: int = 5
    keep: float = 0.5
    start: float = 0.05
    length: float = 0.2
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"method: unknown {self.method}; known here: {', '.join(get_args(Method))}")
        if self.iterations < 1:
            raise ValueError(f"iterations: {self.iterations} is below 1")
        for name in ("keep", "gamma"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not above 0 and at most 1")
        for name in ("start", "length"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a share between 0 and 1")

    def invert(self, predict: Velocity, latents: Tensor, times: Sequence[float], vp: bool = False) -> Inverted:
        """What `paint` makes `latents` of, as near as the method comes."""
        match self.method:
            case "ddim":
                return Inverted(invert(predict, latents, times, 1, vp))
            case "easyinv":
                return Inverted(easyinv(predict, latents, times, self.keep, self.start, self.length, vp))
            case "bdia":
                if len(times) < 3:
                    raise ValueError("steps: bdia takes two or more")
                return Inverted(*bdia(predict, latents, times, self.gamma, vp))
        return Inverted(invert(predict, latents, times, self.iterations, vp))

    def paint(self, predict: Velocity, found: Inverted, times: Sequence[float], vp: bool = False) -> Tensor:
        """Latents at time 0."""
        if found.second is None:
            return walk(predict, found.first, times)
        return bdia_paint(predict, found.first, found.second, times, self.gamma, vp)


def invert(predict: Velocity, latents: Tensor, times: Sequence[float], iterations: int = 3, vp: bool = False) -> Tensor:
    """The latents (B, ...) at `times[0]` from which Euler's steps over `times`, which fall to 0, lead to `latents`.

    `predict(x_t, t)` is the velocity; it is asked `iterations` times a step. With one it is DDIM inversion.
    """
    x_s = latents
    for t, s in reversed(list(pairwise(times))):
        x_s = _raised(predict, x_s, t, s, iterations, vp)
    return x_s


def noise_of(
    predict: Velocity, latents: Tensor, times: Sequence[float], iterations: int = 3, vp: bool = False
) -> Tensor:
    """The eps (B, ...) such that `latents` noised with it to `times[0]` are what `invert` finds there."""
    first = times[0]
    return (invert(predict, latents, times, iterations, vp) - (1 - first) * latents) / first


def easyinv(
    predict: Velocity,
    latents: Tensor,
    times: Sequence[float],
    keep: float = 0.5,
    start: float = 0.05,
    length: float = 0.2,
    vp: bool = False,
) -> Tensor:
    """DDIM inversion whose latents are mixed with those before them in steps between `start` and `start` + `length`, as
    shares of all from the data on."""
    x_s, steps = latents, len(times) - 1
    for number, (t, s) in enumerate(reversed(list(pairwise(times)))):
        x_t = _raised(predict, x_s, t, s, 1, vp)
        if number and start * steps < number < (start + length) * steps:
            x_t = keep * x_t + (1 - keep) * x_s * (_size(s, vp) / _size(t, vp))
        x_s = x_t
    return x_s


def bdia(
    predict: Velocity, latents: Tensor, times: Sequence[float], gamma: float = 1.0, vp: bool = False
) -> tuple[Tensor, Tensor]:
    """The latents at `times[0]` and `times[1]` from which `bdia_paint` leads back to `latents`.

    The step next to the data is by DDIM inversion, which the way back does not take.
    """
    *_, t, s = times
    x_s, x_t = latents, _raised(predict, latents, t, s, 1, vp)
    for before, t, s in reversed(list(zip(times, times[1:], times[2:], strict=False))):
        v = predict(x_t, t)
        away = (x_s - ode(x_t, v, t, s).x) * (_size(s, vp) / (gamma * _size(before, vp)))
        x_s, x_t = x_t, ode(x_t, v, t, before).x + away
    return x_t, x_s


def bdia_paint(
    predict: Velocity, first: Tensor, second: Tensor, times: Sequence[float], gamma: float = 1.0, vp: bool = False
) -> Tensor:
    """From latents at `times[0]` and `times[1]` to those at time 0 (2307.10829, section 4).

    A step goes from t to s as Euler's does, and puts `gamma` of the difference right between where it was at the time
    before and where Euler's step back would lead from t.
    """
    x_before, x_t = first, second
    for before, t, s in zip(times, times[1:], times[2:], strict=False):
        v = predict(x_t, t)
        away = x_before - ode(x_t, v, t, before).x
        x_before, x_t = x_t, ode(x_t, v, t, s).x + away * (gamma * _size(before, vp) / _size(s, vp))
    return x_t


def _raised(predict: Velocity, x_s: Tensor, t: float, s: float, iterations: int, vp: bool) -> Tensor:
    """The latents at `t` from which Euler's step leads to `x_s`, after so many iterations."""
    x_t = x_s * (_size(s, vp) / _size(t, vp))
    for _ in range(iterations):
        v = predict(x_t, t)
        if vp:
            eps = x_t + (1 - t) * v
            x_t = (1 - t) * (x_s - s * eps) / (1 - s) + t * eps
        else:
            x_t = ode(x_s, v, s, t).x
    return x_t


def _size(t: float, vp: bool) -> float:
    """How much larger latents at `t` are on the model's own path than on the flow."""
    return 1 / math.hypot(1 - t, t) if vp else 1.0
