"""Several judges as one: their weighted mean, or whichever thinks least of a sample.

Means lower variance; the worst of several judges is harder to game than any of them, and where they disagree a
reward is least to be trusted (reward-model ensembles, 2310.02743).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from judges.base import Judge, Sample, Verdict

How = Literal["mean", "worst"]


@dataclass(frozen=True)
class EnsembleVerdict(Verdict):
    """A verdict made of those of several `members`; its evidence is theirs, one after the other."""

    members: tuple[Verdict, ...] = ()

    @property
    def disagreement(self) -> float:
        """Standard deviation of the members' margins, in nats; NaN where one could not answer."""
        return float(np.std([member.margin for member in self.members]))


class Ensemble:
    """The `mean` of its members' margins, weighted by `weights` (equal where None), or the `worst` of them.

    A member that could not answer makes the verdict invalid: over the rest, margins would mean something else.

    Raises:
        ValueError: no judges, as many weights as judges are not given, one is not positive, or the worst is weighted.
    """

    def __init__(self, judges: Sequence[Judge], weights: Sequence[float] | None = None, how: How = "mean"):
        if not judges:
            raise ValueError("judges: an ensemble needs at least one")
        if how not in ("mean", "worst"):
            raise ValueError(f"how: {how!r} is neither 'mean' nor 'worst'")
        if how == "worst" and weights is not None:
            raise ValueError("weights: the worst margin has none; leave them out or say how='mean'")
        self.judges, self.how = tuple(judges), how
        self.weights = _checked(weights, len(judges)) if weights is not None else (1 / len(judges),) * len(judges)
        members = [judge.id for judge in judges]
        if how == "mean":
            members = [f"{weight:.4g} {member}" for weight, member in zip(self.weights, members, strict=True)]
        self.id = f"{how}({', '.join(members)})"
        self.template = "; ".join(dict.fromkeys(judge.template for judge in judges))

    def score(self, images: Sequence[Sample], prompts: Sequence[str]) -> list[EnsembleVerdict]:
        scored = [judge.score(images, prompts) for judge in self.judges]
        return [self._verdict(members) for members in zip(*scored, strict=True)]

    def _verdict(self, members: tuple[Verdict, ...]) -> EnsembleVerdict:
        reason = next((f"{m.judge}: {m.reason or 'no verdict'}" for m in members if not m.valid), "")
        evidence = tuple(answer for member in members for answer in member.evidence)
        return EnsembleVerdict(
            math.nan if reason else self._margin([member.margin for member in members]),
            evidence,
            self.id,
            self.template,
            not reason,
            reason,
            members,
        )

    def _margin(self, margins: Sequence[float]) -> float:
        return min(margins) if self.how == "worst" else float(np.dot(margins, self.weights))


def _checked(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """The weights, summing to 1."""
    if len(weights) != count:
        raise ValueError(f"weights: {len(weights)} for {count} judges; give one for each")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise ValueError(f"weights: {weight} is not a positive number; leave out a judge that should not count")
    return tuple(weight / math.fsum(weights) for weight in weights)
