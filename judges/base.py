"""What every judge answers with, and the contract it keeps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Answer:
    """One question about one picture: `margin` is logit P(yes) - logit P(no) in nats, `probability` its sigmoid."""

    question: str
    margin: float

    @property
    def probability(self) -> float:
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, self.margin))))


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one picture and its prompt.

    `margin` is a log-odds in nats that the picture shows the prompt, `value` the same as a probability. Where
    `valid` is False the judge could not answer, both are NaN, and the picture must be left out, never scored 0.
    """

    margin: float
    evidence: tuple[Answer, ...]
    judge: str
    template: str
    valid: bool = True

    @property
    def value(self) -> float:
        return 1 / (1 + math.exp(-max(-60.0, min(60.0, self.margin)))) if self.valid else math.nan


class Judge(Protocol):
    """Scores pictures (uint8, H x W x 3) against their prompts, one verdict each, in order."""

    id: str
    template: str

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Verdict]: ...
