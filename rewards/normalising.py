"""Values of rewards brought to a common scale, over all seen so far or prompt by prompt.

Of numpy alone: whoever asks for this does not wait for the models that give the values.

Shapes: P prompts, K siblings, M terms, N values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

LEAST_STD = 1e-4
"""Values that differ by less than this are not stretched to a standard deviation of 1."""


@dataclass(frozen=True)
class Moments:
    """Of the values seen so far: their number, and of each term mean and sum of squared deviations from it."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def none(cls, terms: int) -> Self:
        return cls(0, np.zeros(terms), np.zeros(terms))

    @property
    def std(self) -> np.ndarray:
        """(M,), of the population."""
        return np.sqrt(self.squares / max(1, self.count))

    def joined(self, values: np.ndarray) -> "Moments":
        """With more values (N, M) (Chan, Golub and LeVeque, 1983)."""
        if not len(values):
            return self
        count, mean = self.count + len(values), values.mean(axis=0)
        squares = ((values - mean) ** 2).sum(axis=0)
        away = mean - self.mean
        return Moments(
            count,
            self.mean + away * len(values) / count,
            self.squares + squares + away**2 * self.count * len(values) / count,
        )


class Normaliser:
    """Brings each term to mean 0 and standard deviation 1 over the values seen so far, those at hand included.

    `running` takes all values together; `prompt` those of each prompt by themselves, this iteration's and earlier
    ones' (the idea of Flow-GRPO's per-prompt statistics, 2505.05470). All processes must give it the same.
    """

    def __init__(self, by: Literal["running", "prompt"], terms: int):
        self.by = by
        self.terms = terms
        self.moments: dict[str, Moments] = {}

    def __call__(self, values_PKM: np.ndarray, valid_PK: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Normalised values (P, K, M) of the prompts `ids`, after the valid ones have been counted."""
        keys = list(ids) if self.by == "prompt" else [""] * len(ids)
        values = values_PKM.astype(np.float64)
        for key, group, valid in zip(keys, values, valid_PK, strict=True):
            self.moments[key] = self._seen(key).joined(group[valid])
        mean, std = (np.stack([getattr(self._seen(key), name) for key in keys])[:, None] for name in ("mean", "std"))
        return ((values - mean) / np.maximum(std, LEAST_STD)).astype(np.float32)

    def _seen(self, key: str) -> Moments:
        return self.moments.get(key, Moments.none(self.terms))

    def state(self) -> dict[str, Any]:
        """JSON-able; floats survive to the bit."""
        return {key: [m.count, m.mean.tolist(), m.squares.tolist()] for key, m in self.moments.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.moments = {key: Moments(n, np.array(mean), np.array(squares)) for key, (n, mean, squares) in state.items()}
