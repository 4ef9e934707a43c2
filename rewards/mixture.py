"""Several rewards as one: the sum of weighted terms.

A term that fails on a picture makes the picture's mixture invalid: the sum of the others would be a score for something
else.

Shapes: B pictures, M terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rewards.reward import Reward, Rewards


@dataclass(frozen=True)
class Term:
    """A reward, what it is called, and what it weighs; a negative weight makes it a penalty."""

    name: str
    reward: Reward
    weight: float = 1.0


@dataclass(frozen=True)
class Mixture:
    """The weighted sum of `terms`, itself a reward, as they are: so it can be compared over a run.

    What is learned from them is the trainer's: it may normalise the terms first, `running` or by `prompt`, and
    add up their `advantages` instead of the `rewards`.
    """

    terms: tuple[Term, ...]
    combine: Literal["rewards", "advantages"] = "rewards"
    normalise: Literal["none", "running", "prompt"] = "none"

    @property
    def weights(self) -> np.ndarray:
        """(M,) float32."""
        return np.array([term.weight for term in self.terms], dtype=np.float32)

    def each(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        """What each term says (B, M) float32, NaN where it fails."""
        return np.stack([term.reward(images, prompts).values for term in self.terms], axis=1)

    def total(self, values: np.ndarray) -> Rewards:
        """Of values (B, M)."""
        return Rewards.of((values * self.weights).sum(axis=1))

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Rewards:
        return self.total(self.each(images, prompts))


def mixture_of(reward: Reward) -> Mixture:
    """`reward` itself if it is one, otherwise a mixture of it alone."""
    return reward if isinstance(reward, Mixture) else Mixture((Term("reward", reward),))
