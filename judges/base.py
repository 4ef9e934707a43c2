"""What every judge answers with, and the two contracts it is built from.

A `VQA` model answers questions about samples. A `Judge` turns a prompt into questions, asks, and turns the answers
into a verdict. Whoever can answer questions can therefore judge in every way there is, and be cached and audited.

A failure is never a score: an answer that could not be had says why and carries NaN, and so does its verdict.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

TEMPLATE = "Question: {} Answer:"
"""What a BLIP-2 was taught to answer after (2301.12597, section 4.3), with the question in it."""

Sample = np.ndarray | Sequence[np.ndarray]
"""A picture, uint8 (H, W, 3), or several in order: the frames of a clip, the views of an object, two to compare."""


class Unavailable(Exception):
    """A judge cannot be reached at all, now. Nothing is wrong with the questions: the same call may succeed later."""


@dataclass(frozen=True)
class Question:
    """Something to ask about a sample.

    Attributes:
        text: the question, without instructions on how to answer.
        choices: what may be answered; empty where any text may.
        expected: the answer that speaks for the prompt, one of the choices.
        parents: places, in the same list, of questions without whose expected answer this one makes no sense (DSG,
            2310.18235, section 3).
        weight: how much it counts among its likes.
        scale: whether the choices are whole numbers in rising order, whose expectation counts. The expected answer is
            the best of them, the first or the last.
    """

    text: str
    choices: tuple[str, ...] = ("yes", "no")
    expected: str = "yes"
    parents: tuple[int, ...] = ()
    weight: float = 1.0
    scale: bool = False

    def __post_init__(self):
        if not self.text.strip():
            raise ValueError("question: the text is empty")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"question: the weight {self.weight} of {self.text!r} must be positive and finite")
        if self.choices and self.expected not in self.choices:
            raise ValueError(f"question: expected {self.expected!r} is none of the choices {', '.join(self.choices)}")
        if self.scale:
            self._check_scale()

    @property
    def values(self) -> tuple[float, ...]:
        """How much of what is expected each choice is, from 0 to 1."""
        if not self.scale:
            return tuple(float(choice == self.expected) for choice in self.choices)
        numbers = [int(choice) for choice in self.choices]
        worst = numbers[0] if self.expected == self.choices[-1] else numbers[-1]
        return tuple((number - worst) / (int(self.expected) - worst) for number in numbers)

    def _check_scale(self) -> None:
        numbers = [int(choice) for choice in self.choices if choice.isdecimal()]
        if len(numbers) < max(2, len(self.choices)) or numbers != sorted(set(numbers)):
            raise ValueError(f"question: {self.text!r} has the scale {', '.join(self.choices)}; give numbers that rise")
        if self.expected not in (self.choices[0], self.choices[-1]):
            raise ValueError(f"question: expected {self.expected!r} is at no end of the scale of {self.text!r}")


@dataclass(frozen=True)
class Answer:
    """The answer to one question about one sample.

    Attributes:
        question: its text.
        margin: log-odds, in nats, that the answer is the expected one: log P(expected) - log P(any other choice); of a
            scale, those of the expectation's place on it. NaN where there is no answer.
        text: the likeliest answer; of a scale, the expectation.
        certainty: the model's self-certainty, KL(uniform || p) in nats over whatever it chose from (Intuitor,
            2505.19590, equation 2); NaN where it is not known.
        error: why there is no answer; empty where there is one.
    """

    question: str
    margin: float
    text: str = ""
    certainty: float = math.nan
    error: str = ""

    @property
    def valid(self) -> bool:
        return not self.error and math.isfinite(self.margin)

    @property
    def probability(self) -> float:
        """P(expected); NaN where there is no answer."""
        return probability(self.margin)

    @classmethod
    def failed(cls, question: str, error: str) -> "Answer":
        """No answer, and why."""
        return cls(question, math.nan, error=error)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one sample and its prompt, or of two samples, the first being better.

    `margin` is a log-odds in nats, `value` the same as a probability. Where `valid` is False the judge could not
    answer, for the `reason` given: both are NaN, and the sample must be left out, never scored 0.
    """

    margin: float
    evidence: tuple[Answer, ...]
    judge: str
    template: str
    valid: bool = True
    reason: str = ""

    @property
    def value(self) -> float:
        return probability(self.margin) if self.valid else math.nan

    @property
    def disagreement(self) -> float:
        """Standard deviation, in nats, of the margins of several judges; NaN of one judge's verdict."""
        return math.nan

    @property
    def certainty(self) -> float:
        """Mean self-certainty, in nats, of the answers of which it is known; NaN where of none."""
        known = [answer.certainty for answer in self.evidence if not math.isnan(answer.certainty)]
        return float(np.mean(known)) if known else math.nan


class VQA(Protocol):
    """Answers questions about samples.

    `id` names weights and way of asking: equal ids give equal answers. `most_images` is how many pictures a sample
    may have. Answers do not depend on what else is asked in the same call. Raises `Unavailable` where nobody answers.
    """

    id: str
    template: str
    most_images: int

    def ask(self, samples: Sequence[Sample], questions: Sequence[Sequence[Question]]) -> list[list[Answer]]: ...


class Judge(Protocol):
    """Scores samples against their prompts, one verdict each, in order."""

    id: str
    template: str

    def score(self, images: Sequence[Sample], prompts: Sequence[str]) -> list[Verdict]: ...


class Comparer(Protocol):
    """Compares samples of one prompt: a verdict's margin is the log-odds that the first is better."""

    id: str
    template: str

    def compare(self, first: Sequence[Sample], second: Sequence[Sample], prompts: Sequence[str]) -> list[Verdict]: ...


def bare_verdict(judge: Judge, margin: float, excess: int) -> Verdict:
    """The verdict of a judge that asks nothing; `excess` tokens of the prompt, if above 0, are more than it reads."""
    reason = f"the prompt is {excess} tokens longer than {judge.id} can read" if excess > 0 else ""
    if not reason and not math.isfinite(margin):
        reason = "no finite margin"
    return Verdict(math.nan if reason else margin, (), judge.id, judge.template, not reason, reason)


def probability(margin: float) -> float:
    """The sigmoid of a log-odds, without overflow; NaN of NaN."""
    if math.isnan(margin):
        return math.nan
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, margin))))


def log_odds(probability: float, least: float = 1e-6) -> float:
    """The inverse of `probability`, with probabilities kept within `least` of 0 and 1."""
    kept = min(max(probability, least), 1 - least)
    return math.log(kept) - math.log1p(-kept)


def images_of(sample: Sample) -> list[np.ndarray]:
    """The pictures of a sample."""
    return [sample] if isinstance(sample, np.ndarray) else list(sample)


def only_image(sample: Sample) -> np.ndarray:
    """The picture of a sample for those who look at one at a time. Raises ValueError for a sample of several."""
    images = images_of(sample)
    if len(images) != 1:
        raise ValueError(
            f"samples: this judge looks at one image at a time, the sample has {len(images)}; use PerFrame"
        )
    return images[0]
