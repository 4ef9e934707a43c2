"""What the trainer knows of an algorithm: how it rolls out, where it asks for velocities, and its loss of them.

Shapes: P prompts, K siblings, M inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, Self

from torch import Tensor

from pipeline.rl.advantage import Advantages
from pipeline.rl.rollout import Plan, Rollout


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

    def __getitem__(self, rows: Tensor) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class Velocities:
    """What the policy, the reference and the policy that rolled out predict for M inputs; None where not needed."""

    policy: Tensor
    reference: Tensor | None = None
    old: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """Of each input, (M,): `total` to minimise, and what is worth watching of it."""

    total: Tensor
    kl: Tensor
    clipped: Tensor


class Algorithm(Protocol):
    """One file each; the trainer knows none of them."""

    needs_reference: bool
    needs_old: bool

    def rollout_plan(self, seed: int, iteration: int, steps: int, shift: float, siblings: int) -> Plan: ...

    def advantages(self, rewards_PK: Tensor, valid_PK: Tensor) -> Advantages: ...

    def examples(
        self, rollout: Rollout, advantages_PK: Tensor, ids: Sequence[str], seed: Sequence[str | int]
    ) -> Sequence[Examples]:
        """Sets of examples, each with as many from every group; `ids` name the prompts, they and `seed` key noise."""
        ...

    def loss(self, examples: Examples, v: Velocities) -> Loss: ...
