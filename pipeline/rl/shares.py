"""Which pictures of an iteration each process rolls out, rates and learns from.

P groups of K siblings lie on a grid: a process has every `columns`-th group, and of each the same stretch of siblings.
Groups stay whole as long as that leaves nobody idle; otherwise several processes share a group, each rolling out the
steps that its siblings have in common. Statistics of groups are made of the rewards of all processes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from pipeline.settings import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """What the process `rank` does of `groups` groups of `group_size` pictures.

    The processes stand in `columns` columns, in which as many groups are shared out, and `rows`, among which the
    siblings of each are.
    """

    groups: int
    group_size: int
    columns: int
    rows: int
    rank: int

    @property
    def group_numbers(self) -> range:
        """Of this process's groups, among all."""
        return range(self.rank // self.rows, self.groups, self.columns)

    @property
    def siblings(self) -> range:
        """Of this process, in each of its groups."""
        row = self.rank % self.rows
        return range(row * self.group_size // self.rows, (row + 1) * self.group_size // self.rows)

    def part(self, values_PK: Tensor) -> Tensor:
        """This process's (p, k) of the `values_PK` of all pictures, or (p,) of (P,)."""
        mine = values_PK[self.group_numbers.start :: self.columns]
        return mine if mine.ndim == 1 else mine[:, self.siblings.start : self.siblings.stop]

    def of(self, groups: Sequence[T]) -> list[T]:
        """This process's of all `groups`."""
        return [groups[number] for number in self.group_numbers]


def share_of(groups: int, group_size: int, ranks: int, rank: int, whole: bool = False, even: bool = False) -> Share:
    """The share that leaves the busiest process the fewest pictures; of equal ones that with the wholest groups.

    Args:
        whole: no group may be shared by several processes.
        even: all processes must have as many groups, and of each as many siblings.

    Raises:
        UserError: there is none in which every process has something to do, or none that is even.
    """
    rows = [rows for rows in range(1, ranks + 1) if ranks % rows == 0 and rows <= (1 if whole else group_size)]
    grids = [(ranks // each, each) for each in rows if ranks // each <= groups]
    if even:
        grids = [grid for grid in grids if groups % grid[0] == 0 and group_size % grid[1] == 0]
    if even and not grids:
        remedy = "" if whole else f", or finetune.group_size one of {ranks}"
        raise UserError(
            f"finetune.groups: finetune.shard takes as many pictures on every process, and {groups} groups of "
            f"{group_size} cannot be shared out evenly over {ranks}; make it a multiple of {ranks}{remedy}"
        )
    if not grids:
        remedy = "" if whole else f", or finetune.group_size {max(ranks, group_size)} or more"
        raise UserError(
            f"finetune.groups: {groups} groups of {group_size} cannot be shared out over {ranks} processes; "
            f"make it {ranks} or more{remedy}"
        )
    columns, rows = min(grids, key=lambda grid: math.ceil(groups / grid[0]) * math.ceil(group_size / grid[1]))
    return Share(groups, group_size, columns, rows, rank)


def assembled(shares: Sequence[Share], parts: Sequence[np.ndarray]) -> np.ndarray:
    """Values (P, K, ...) of all pictures, from the (p, k, ...) of each process's share."""
    first = shares[0]
    whole = np.empty((first.groups, first.group_size, *parts[0].shape[2:]), dtype=parts[0].dtype)
    for share, part in zip(shares, parts, strict=True):
        whole[np.ix_(share.group_numbers, share.siblings)] = part
    return whole
