"""What the trainer knows of an algorithm: how it rolls out, where it asks for velocities, and its loss of them.

Shapes: P prompts, K siblings, M inputs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import numpy as np
from torch import Tensor, nn

from pipeline.rl.advantage import Advantages
from pipeline.rl.rollout import Plan, Rollout, Times

Ask = Callable[[Tensor, float | Tensor, Tensor], Tensor]
"""What a network predicts at `x_t`, `t` and the index of each input's prompt."""


@dataclass(frozen=True)
class Examples:
    """M inputs at which an algorithm asks for velocities: `x_t` (M, ...) at `t`, a float or (M,).

    `prompt` (M,) is the index of each input's prompt. A subclass adds what the loss needs beside; its tensors have
    M rows too.
    """

    x_t: Tensor
    t: float | Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.x_t)

    def ask(self, predict: Ask) -> Tensor:
        """The velocities that the loss is of, from a network's `predict`: here those of the inputs.

        A subclass whose loss takes more than one velocity of each input asks for them all.
        """
        return predict(self.x_t, self.t, self.prompt)

    def __getitem__(self, rows: Tensor) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class Velocities:
    """What the policy, the reference and the policy that rolled out predict for M inputs; None where not needed.

    `average` is what the policy's moving average predicts. `reward` rates latents (M, ...) at time 0, each under the
    prompt of its input: (M,), with a gradient.

    `counts`, a float or (M,), is by how much a squared difference of velocities counts. At one input those of eps are
    (1 - t) as large (`models.paths`), so where the generator was trained on a variance preserving path, as whose losses
    of eps the published ones are written, (1 - t)^2 makes of the flow's losses exactly those.
    """

    policy: Tensor
    reference: Tensor | None = None
    old: Tensor | None = None
    reward: Callable[[Tensor], Tensor] | None = None
    average: Tensor | None = None
    counts: Tensor | float = 1.0

    @property
    def moved(self) -> Tensor:
        """The mean square of what the policy has moved from the reference, (M,), as it `counts`; 0 where there is
        none."""
        if self.reference is None:
            return self.policy.new_zeros(len(self.policy))
        return self.counts * apart(self.policy, self.reference)


def apart(v: Tensor, other: Tensor) -> Tensor:
    """Mean square difference of velocities (M, ...), (M,)."""
    return (v - other).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Loss:
    """Of each input, (M,): `total` to minimise, and what is worth watching of it; `watched` by a name, (M,) too.

    Where there is a ratio rho of the policy to the one that rolled out, `ratio_error` is the largest |rho - 1|.
    """

    total: Tensor
    kl: Tensor
    clipped: Tensor
    watched: Mapping[str, Tensor] = field(default_factory=dict)
    ratio_error: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """A module that an algorithm trains beside the generator, with a learning rate of its own."""

    module: nn.Module
    learning_rate: float


class Scaler(Protocol):
    """Brings rewards (P, K, M) of the prompts `ids` to the scale of what it has seen; `rewards.mixture.Normaliser`."""

    def __call__(self, values_PKM: np.ndarray, valid_PK: np.ndarray, ids: Sequence[str]) -> np.ndarray: ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


class Algorithm(Protocol):
    """One file each, and a class that inherits from this; the trainer knows none of them.

    With `whole_groups` all siblings of a prompt come together; otherwise `examples` may be given some of them,
    whose numbers are `rollout.numbers`. An example is `rows` of a network call.
    """

    needs_reference: bool
    needs_old: bool
    needs_average: bool = False
    needs_features: bool = False
    needs_gradient: bool = False
    whole_groups: bool = False
    rows: int = 1

    def parts(self, width: int, seed: int) -> dict[str, Part]:
        """What it trains of its own, such as a critic on features (M, 2, width); `seed` decides the weights."""
        return {}

    def scaler(self, terms: int) -> Scaler | None:
        """A new one for rewards of so many terms, where the algorithm takes them on a scale that lasts."""
        return None

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """What is told of an iteration, given the means over all inputs of what the losses watched."""
        return dict(means)

    def rollout_plan(self, seed: int, iteration: int, times: Times, siblings: int) -> Plan: ...

    def advantages(self, rewards_PK: Tensor, valid_PK: Tensor) -> Advantages: ...

    def examples(
        self, rollout: Rollout, advantages_PK: Tensor, ids: Sequence[str], seed: Sequence[str | int]
    ) -> Sequence[Examples]:
        """Sets of examples, each with as many from every group; `ids` name the prompts, they and `seed` key noise."""
        ...

    def loss(self, examples: Examples, v: Velocities) -> Loss: ...
