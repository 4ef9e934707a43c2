"""Classifier-free guidance (2207.12598): a prediction is moved away from that under a negative prompt.

With weight w the guided prediction is negative + w (positive - negative), which at w = 1 is the positive one, and then
nothing else is computed. It is the same in eps, x0, score and velocity, as w and 1 - w add up to 1. The weight may
change along the path:

- `interval` (2404.07724): `scale` for times in [`low`, `high`], 1 elsewhere.
- `linear`, `cosine` (2404.13040, section 4): 1 + (scale - 1) f(t) with f = 2 (1 - t) or 1 + cos(pi t), which grow
  from 0 at the noise and have mean 1 over t, so that `scale` is the mean weight.
- `clamp-linear` (2404.13040, section 5): `linear`, but at least `least`.

The paper's t is the training timestep; ours is the flow's time, see `paths`, which for a model trained on another path
is its image on the flow's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, Self, TypeVar, get_args

import torch
from torch import Tensor

Schedule = Literal["constant", "interval", "linear", "cosine", "clamp-linear"]


class Rows(Protocol):
    """Conditions that are taken by rows and put together, as `models.generator.Conditioning`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor) -> Self: ...

    @staticmethod
    def joined(parts: "list[Rows]") -> "Rows": ...


R = TypeVar("R", bound=Rows)


@dataclass(frozen=True)
class Guidance:
    """How far predictions are moved from the negative prompt's, over the flow's time.

    Attributes:
        scale: 1 is no guidance.
        low, high: times between which `interval` guides.
        least: weight that `clamp-linear` does not go below.

    Raises:
        ValueError: beginning with the field's name.
    """

    scale: float = 1.0
    schedule: Schedule = "constant"
    low: float = 0.0
    high: float = 1.0
    least: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.scale < math.inf:
            raise ValueError(f"scale: {self.scale} is not a number from 1, which is no guidance, upwards")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule: unknown {self.schedule}; known here: {', '.join(get_args(Schedule))}")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low: {self.low} and high: {self.high} are not times with 0 <= low < high <= 1")
        if not 1 <= self.least <= self.scale:
            raise ValueError(f"least: {self.least} is not between 1 and the scale, {self.scale}")

    @property
    def needs_negative(self) -> bool:
        """Whether any time has a weight other than 1."""
        return self.scale != 1

    def at(self, t: float | Tensor) -> float | Tensor:
        """The weight at `t`, a float or (B,); one for each where it changes with time."""
        if self.schedule == "constant":
            return self.scale
        if isinstance(t, Tensor):
            return torch.tensor([self.at(each) for each in t.flatten().tolist()]).to(t).view_as(t)
        more = self.scale - 1
        match self.schedule:
            case "interval":
                return self.scale if self.low <= t <= self.high else 1.0
            case "linear":
                return 1 + more * 2 * (1 - t)
            case "cosine":
                return 1 + more * (1 + math.cos(math.pi * t))
        return max(self.least, 1 + more * 2 * (1 - t))


NO_GUIDANCE = Guidance()


def guided(
    predict: Callable[[Tensor, float | Tensor, R], Tensor],
    x_t: Tensor,
    t: float | Tensor,
    cond: R,
    negative: R,
    weight: float | Tensor,
    adjust: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The prediction at `x_t` (B, ...) under `cond`, moved from that under `negative` by `weight`, a float or (B,).

    Both are asked for in one batch, first those of `cond`, then those of `negative` for the rows whose weight is not 1.
    `adjust` makes of what is guided and of its positive prediction what is returned, for families that rescale it.
    """
    weights = torch.as_tensor(weight, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))
    if isinstance(weight, Tensor):
        rows = (weights != 1).nonzero()[:, 0]
    else:
        rows = torch.arange(len(x_t) if weight != 1 else 0, device=x_t.device)
    if not len(rows):
        return predict(x_t, t, cond)
    times = torch.cat([t, t[rows]]) if isinstance(t, Tensor) and t.ndim else t
    both = predict(torch.cat([x_t, x_t[rows]]), times, type(cond).joined([cond, negative[rows]])).to(x_t.dtype)
    positive, other = both[: len(x_t)], both[len(x_t) :]
    w = weights[rows].reshape(-1, *[1] * (x_t.ndim - 1))
    moved = other + w * (positive[rows] - other)
    if adjust:
        moved = adjust(moved, positive[rows])
    return moved if len(rows) == len(x_t) else positive.index_copy(0, rows, moved)
