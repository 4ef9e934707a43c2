"""Where a reward is good and where it is not: the same number on parts of a table."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.metrics.intervals import Estimate

_WORD = re.compile(r"\S+")
_NEGATION = re.compile(r"\b(no|not|never|none|nothing|nobody|without|cannot|except)\b|n['’]t\b", re.IGNORECASE)
_LENGTHS = (5, 10, 20, 40)


@dataclass(frozen=True)
class Slice:
    """The rows in which every one of the `columns` has the value given with it."""

    columns: tuple[tuple[str, str], ...]
    estimate: Estimate


def sliced(
    columns: Mapping[str, Sequence[object]], measure: Callable[[np.ndarray], Estimate], least: int = 1
) -> tuple[Slice, ...]:
    """What `measure` finds on every combination of values that occurs in `columns`, in their order.

    Args:
        columns: by name, a value for each of N rows.
        measure: takes the places of rows.
        least: combinations in fewer rows are left out.

    Raises:
        ValueError: the columns are not of the same length.
    """
    if len({len(values) for values in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(values)}" for name, values in columns.items())
        raise ValueError(f"columns: of different lengths ({lengths})")
    rows: dict[tuple[str, ...], list[int]] = {}
    for row, values in enumerate(zip(*columns.values(), strict=True)):
        rows.setdefault(tuple(map(str, values)), []).append(row)
    return tuple(
        Slice(tuple(zip(columns, values, strict=True)), measure(np.array(found)))
        for values, found in sorted(rows.items())
        if len(found) >= least
    )


def generator_pair(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Which two generators made the images of each pair, whichever came first."""
    return [" / ".join(sorted(pair)) for pair in zip(first, second, strict=True)]


def same_model(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Whether both images of each pair are by the `same` generator, or the comparison is a `cross` one."""
    return ["same" if a == b else "cross" for a, b in zip(first, second, strict=True)]


def length(prompts: Sequence[str]) -> list[str]:
    """The number of words of each prompt, as a range."""
    edges = (0, *_LENGTHS)
    ranges = [f"{low + 1:02}-{high:02} words" for low, high in zip(edges, _LENGTHS, strict=False)]
    ranges.append(f"{_LENGTHS[-1] + 1} words or more")
    counts = [len(_WORD.findall(prompt)) for prompt in prompts]
    return [ranges[place] for place in np.searchsorted(_LENGTHS, counts, side="left")]


def truncated(cut: Iterable[bool]) -> list[str]:
    """Whether each prompt is read to its end, or was `cut` before."""
    return ["cut" if before else "whole" for before in cut]


def negation(prompts: Sequence[str]) -> list[str]:
    """Whether each prompt says what must not be there, in one of the usual English words."""
    return ["negated" if _NEGATION.search(prompt) else "plain" for prompt in prompts]
