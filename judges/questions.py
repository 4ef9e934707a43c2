"""From a prompt to questions, and from their answers to one log-odds.

Questions form a graph by their `parents` (DSG, 2310.18235). An aggregate is a pure function of questions and valid
answers; those of the literature differ in whether they count answers or multiply probabilities.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy.special import log_expit

from judges.base import VQA, Answer, Question, Sample, Verdict, log_odds

Decompose = Callable[[str], Sequence[Question]]
"""The questions of a prompt. Raises ValueError for a prompt that it cannot take apart."""

Aggregate = Callable[[Sequence[Question], Sequence[Answer]], float]
"""The log-odds, in nats, that the sample shows the prompt."""


def weakest(questions: Sequence[Question], answers: Sequence[Answer]) -> float:
    """The smallest margin: a sample shows the prompt only if nothing speaks against it."""
    return min(answer.margin for answer in answers)


def mean_margin(questions: Sequence[Question], answers: Sequence[Answer]) -> float:
    """The weighted mean of the margins: for several wordings of one question."""
    return float(np.average([a.margin for a in answers], weights=_weights(questions)))


def accuracy(questions: Sequence[Question], answers: Sequence[Answer]) -> float:
    """Share of expected answers (TIFA, 2303.11897, equation 1), as log-odds with half an answer added to each side."""
    return _counted(own_hits(answers), questions)


def dsg(questions: Sequence[Question], answers: Sequence[Answer]) -> float:
    """`accuracy`, where a question counts only if its parents were answered as expected (DSG, 2310.18235)."""
    return _counted(dsg_hits(questions, answers), questions)


def product(questions: Sequence[Question], answers: Sequence[Answer]) -> float:
    """All at once, as if independent: the product of the probabilities (BLIP-VQA of T2I-CompBench, 2307.06350)."""
    log_share = float(log_expit([a.margin for a in answers]).sum())
    return log_share - math.log(max(-math.expm1(log_share), 1e-12))


def soft_tifa(questions: Sequence[Question], answers: Sequence[Answer]) -> float:
    """The geometric mean of the probabilities (Soft-TIFA, GenEval 2), as log-odds."""
    logs = [math.log(max(a.probability, 1e-12)) for a in answers]
    return log_odds(math.exp(float(np.average(logs, weights=_weights(questions)))))


AGGREGATES: dict[str, Aggregate] = {
    found.__name__: found for found in (weakest, mean_margin, accuracy, dsg, product, soft_tifa)
}


def own_hits(answers: Sequence[Answer]) -> list[float]:
    """1 where a question was answered as expected, otherwise 0."""
    return [float(answer.margin > 0) for answer in answers]


def dsg_hits(questions: Sequence[Question], answers: Sequence[Answer]) -> list[float]:
    """`own_hits`, less those of questions with a parent that was not answered as expected.

    Not transitive: a parent counts by its own answer, as where the authors compute their correlations.
    """
    own = own_hits(answers)
    return [
        own[place] * min((own[parent] for parent in question.parents), default=1.0)
        for place, question in enumerate(checked_graph(questions))
    ]


def checked_graph(questions: Sequence[Question]) -> Sequence[Question]:
    """`questions`, if their parents exist and form no circle. Raises ValueError otherwise."""
    done: set[int] = set()
    while len(done) < len(questions):
        free = {i for i, q in enumerate(questions) if i not in done and set(q.parents) <= done}
        if not free:
            stuck = next(q for i, q in enumerate(questions) if i not in done)
            raise ValueError(f"question: {stuck.text!r} depends on itself or on a question that is not there")
        done |= free
    return questions


def _weights(questions: Sequence[Question]) -> list[float]:
    return [question.weight for question in questions]


def _counted(hits: Sequence[float], questions: Sequence[Question]) -> float:
    weights = np.array(_weights(questions))
    count = float(np.dot(hits, weights / weights.mean()))
    return log_odds((count + 0.5) / (len(hits) + 1))


class Whole:
    """The prompt in one question for each of several `templates` with `{prompt}` in it (VQAScore, 2404.01291)."""

    def __init__(self, templates: Sequence[str] = ('Does this figure show "{prompt}"?',)):
        for template in templates:
            if template.count("{prompt}") != 1:
                raise ValueError(f"templates: {template!r} must hold {{prompt}} once")
        self.templates = tuple(templates)

    def __call__(self, prompt: str) -> list[Question]:
        return [Question(template.replace("{prompt}", prompt)) for template in self.templates]


class Rating:
    """How well the prompt is shown, on a scale from `low` to `high`, in each of several `templates`.

    Scales of one digit suit all tokenizers, which may write 10 as 1 and 0.

    Raises:
        ValueError: a template does not hold `{prompt}` once, or the scale does not rise.
    """

    def __init__(
        self,
        templates: Sequence[str] = ('From {low} to {high}, how well does this image show "{prompt}"?',),
        low: int = 1,
        high: int = 9,
    ):
        if not 0 <= low < high:
            raise ValueError(f"low, high: {low} to {high} is not a scale; give whole numbers from 0 that rise")
        self.whole = Whole([t.replace("{low}", str(low)).replace("{high}", str(high)) for t in templates])
        self.scores = tuple(str(score) for score in range(low, high + 1))

    def __call__(self, prompt: str) -> list[Question]:
        return [replace(q, choices=self.scores, expected=self.scores[-1], scale=True) for q in self.whole(prompt)]


class QuestionJudge:
    """Asks what `decompose` makes of a prompt and lets `aggregate` weigh the answers.

    One answer that could not be had makes the verdict invalid: a mean over what is left would favour whatever
    happened to fail. So does a prompt that `decompose` refuses by `ValueError`. `name` says of what the questions are
    made, and with the aggregate it becomes part of the judge's id.
    """

    def __init__(self, vqa: VQA, decompose: Decompose, aggregate: Aggregate = weakest, name: str = "questions"):
        self.vqa, self.decompose, self.aggregate = vqa, decompose, aggregate
        self.id, self.template = f"{name}-{aggregate.__name__}({vqa.id})", vqa.template

    def score(self, images: Sequence[Sample], prompts: Sequence[str]) -> list[Verdict]:
        asked = {prompt: self._asked(prompt) for prompt in dict.fromkeys(prompts)}
        answered = self.vqa.ask(images, [asked[prompt][0] for prompt in prompts])
        return [self._verdict(*asked[prompt], answers) for prompt, answers in zip(prompts, answered, strict=True)]

    def _asked(self, prompt: str) -> tuple[Sequence[Question], str]:
        """The questions on a prompt, or none and the reason."""
        try:
            questions = checked_graph(self.decompose(prompt))
        except ValueError as error:
            return (), str(error)
        return questions, "" if questions else f"prompt: there is nothing to ask about {prompt!r}"

    def _verdict(self, questions: Sequence[Question], refused: str, answers: Sequence[Answer]) -> Verdict:
        reason = refused or next((f"{a.question} {a.error or 'no finite margin'}" for a in answers if not a.valid), "")
        margin = math.nan if reason else self.aggregate(questions, answers)
        return Verdict(margin, tuple(answers), self.id, self.template, not reason, reason)
