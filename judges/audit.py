"""What the verdicts of a judge tell about it before anyone knows the truth, and which questions it gets wrong.

Arrays of N verdicts hold NaN where there is none: a failure is neither a yes nor a no.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from judges.base import Comparer, Judge, Verdict
from judges.cache import CachedVQA
from judges.ensemble import Ensemble
from judges.pairwise import GroupJudge, PairwiseJudge, ScoreComparer
from judges.questions import QuestionJudge, Whole

J = TypeVar("J", Judge, Comparer)


@dataclass(frozen=True)
class Asked:
    """One question, in how many pictures its answer is known, and in which of these it was answered wrongly.

    Attributes:
        wrong: (N,) 1 where the answer was wrong, 0 where it was right.
        prompts: the prompt of each.
    """

    question: str
    wrong: tuple[float, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Spread:
    """How far wordings of one question disagree about each of N pictures; NaN where one of them had no answer.

    Attributes:
        deviation: (N,) standard deviation of the margins, in nats.
        changed: (N,) 1 where some said yes and others no, otherwise 0.
    """

    deviation: np.ndarray
    changed: np.ndarray


def margins(verdicts: Iterable[Verdict]) -> np.ndarray:
    """The margins (N,), in nats."""
    return np.array([verdict.margin if verdict.valid else np.nan for verdict in verdicts], dtype=float)


def decisions(margin: np.ndarray) -> np.ndarray:
    """1 for yes, a positive margin; 0 for no."""
    return np.where(np.isnan(margin), np.nan, (margin > 0).astype(float))


def agreement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 where two margins decide alike, 0 where they don't, NaN where there is only one: (N,)."""
    a, b = decisions(first), decisions(second)
    return np.where(np.isnan(a) | np.isnan(b), np.nan, (a == b).astype(float))


def spread(margin: np.ndarray) -> Spread:
    """The disagreement of W wordings over their margins (W, N)."""
    decided = decisions(margin)
    return Spread(np.std(margin, axis=0), decided.max(0) - decided.min(0))


def failures(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Why there was no verdict, and how often, the most frequent reason first.

    Of a verdict that failed for an answer it is that answer's error, so that one fault counts as one whatever was
    asked.
    """
    return dict(Counter(_reason(verdict) for verdict in verdicts if not verdict.valid).most_common())


def _reason(verdict: Verdict) -> str:
    errors = (answer.error for answer in verdict.evidence if answer.error)
    return next(errors, verdict.reason or "no reason given")


def questions_asked(
    verdicts: Iterable[Verdict], truths: Iterable[Sequence[bool | None]], prompts: Iterable[str]
) -> list[Asked]:
    """Every question in the evidence of which the truth is known, those with most wrong answers first.

    Args:
        truths: for each verdict and each of its answers whether the expected answer is the right one; None where that
            is not known.
    """
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for verdict, known, prompt in zip(verdicts, truths, prompts, strict=True):
        for answer, truth in zip(verdict.evidence, known, strict=True):
            if truth is not None and answer.valid:
                found[answer.question].append((float((answer.margin > 0) != truth), prompt))
    asked = [Asked(question, *zip(*rows, strict=True)) for question, rows in found.items()]
    return sorted(asked, key=lambda one: (-sum(one.wrong), -np.mean(one.wrong), one.question))


def unremembered(judge: J) -> J:
    """A judge, or a comparer, without the caches in it: asked twice, it answers twice."""
    fresh = copy.copy(judge)
    match fresh:
        case QuestionJudge(vqa=CachedVQA(vqa=inner)) | PairwiseJudge(vqa=CachedVQA(vqa=inner)):
            fresh.vqa = inner
        case ScoreComparer(judge=scorer):
            fresh.judge = unremembered(scorer)
        case GroupJudge(comparer=comparer):
            fresh.comparer = unremembered(comparer)
        case Ensemble(judges=members):
            fresh.judges = tuple(unremembered(member) for member in members)
    return fresh


def reworded(judge: Judge, templates: Sequence[str]) -> list[QuestionJudge]:
    """The judge's model asked about whole prompts, in each of the `templates` with `{prompt}` in it; none for a judge
    that asks no questions."""
    if not isinstance(judge, QuestionJudge):
        return []
    return [QuestionJudge(judge.vqa, Whole([template])) for template in templates]
