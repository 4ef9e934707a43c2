"""Which of two images is better: asked of a model that sees both, or read off the scores of one that sees one.

A model that sees two images prefers a place as well as an image. Asked in both orders, p = 1/2 [p(1|A,B) + 1 -
p(1|B,A)] is symmetric whatever the preference (RLAIF, 2309.00267, section 3.1), and an answer that follows the
place alone comes out as 1/2. Scores give p = sigmoid((s_A - s_B) / T), the Bradley-Terry model, with T fitted on
labels. Where a run needs a score for each image, `GroupJudge` goes the other way, from comparisons to strengths.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import scipy.optimize
from scipy.sparse.csgraph import connected_components
from scipy.special import expit, log_expit, logsumexp

from judges.base import VQA, Answer, Comparer, Judge, Question, Sample, Verdict, images_of, probability
from judges.questions import Whole

Wording = Callable[[str], Sequence[Question]]
"""The questions which of two images is better for a prompt: two choices, the one that names the first is expected."""


class Better:
    """Which image shows the prompt better, in each of several `templates` with `{prompt}` in it."""

    def __init__(self, templates: Sequence[str] = ('Which image shows "{prompt}" better, image 1 or image 2?',)):
        self.whole = Whole(templates)

    def __call__(self, prompt: str) -> list[Question]:
        return [replace(question, choices=("1", "2"), expected="1") for question in self.whole(prompt)]


class PairwiseJudge:
    """Shows a model both images in both orders and takes the mean of P(the first is better).

    A verdict's evidence holds two answers for each question of `wording`: in the order given, then swapped. The
    margin of both speaks for the first sample, so that their signs differ where the order decided. One that could
    not be had makes the verdict invalid: half a comparison is a biased one.

    Args:
        vqa: a model of at least two images a sample.
        wording: its questions' probabilities are averaged by their weights.
        tie: probabilities this close to 1/2 become 1/2.

    Raises:
        ValueError: the model sees one image only, or `tie` is out of range.
    """

    def __init__(self, vqa: VQA, wording: Wording | None = None, tie: float = 0.0, name: str = "pairwise"):
        if vqa.most_images < 2:
            raise ValueError(f"vqa: {vqa.id} takes one image at a time; compare its scores with ScoreComparer")
        if not 0 <= tie < 0.5:
            raise ValueError(f"tie: {tie} is not a distance from 1/2, from 0 to below 0.5")
        self.vqa, self.wording, self.tie = vqa, wording or Better(), tie
        self.id, self.template = f"{name}({vqa.id})", vqa.template

    def compare(self, first: Sequence[Sample], second: Sequence[Sample], prompts: Sequence[str]) -> list[Verdict]:
        samples, asked = [], []
        for a, b, prompt in zip(first, second, prompts, strict=True):
            samples += [[_single(a), _single(b)], [_single(b), _single(a)]]
            questions = _checked(self.wording(prompt))
            asked += [questions, [replace(q, expected=q.choices[1]) for q in questions]]
        answered = self.vqa.ask(samples, asked)
        return [
            self._verdict(questions, list(zip(given, swapped, strict=True)))
            for questions, given, swapped in zip(asked[::2], answered[::2], answered[1::2], strict=True)
        ]

    def _verdict(self, questions: Sequence[Question], answers: Sequence[tuple[Answer, Answer]]) -> Verdict:
        evidence = tuple(itertools.chain(*answers))
        for place, answer in enumerate(evidence):
            if not answer.valid:
                order = "swapped" if place % 2 else "given"
                reason = f"in the order {order}: {answer.question} {answer.error or 'no finite margin'}"
                return Verdict(math.nan, evidence, self.id, self.template, False, reason)
        margins = np.array([answer.margin for answer in evidence])
        margin = _mean_probability(margins, np.repeat([question.weight for question in questions], 2))
        tied = abs(probability(margin) - 0.5) <= self.tie
        return Verdict(0.0 if tied else margin, evidence, self.id, self.template)


def _single(sample: Sample) -> np.ndarray:
    images = images_of(sample)
    if len(images) != 1:
        raise ValueError(f"samples: two single images can be compared, but a sample has {len(images)}")
    return images[0]


def _checked(questions: Sequence[Question]) -> Sequence[Question]:
    if not questions:
        raise ValueError("wording: it asks nothing")
    for question in questions:
        if len(question.choices) != 2 or question.expected != question.choices[0]:
            raise ValueError(f"wording: {question.text!r} must have two choices and expect the first")
    return questions


def _mean_probability(margins: np.ndarray, weights: np.ndarray) -> float:
    """The log-odds of the weighted mean of sigmoid(`margins`), exact where that is nearly 0 or 1."""
    return float(logsumexp(log_expit(margins), b=weights) - logsumexp(log_expit(-margins), b=weights))


def order_margins(verdicts: Iterable[Verdict]) -> np.ndarray:
    """Margins for the first sample, in the order given and swapped, of each question in valid verdicts: (N, 2).

    Raises:
        ValueError: the verdicts are not those of a PairwiseJudge.
    """
    pairs = []
    for verdict in verdicts:
        given, swapped = verdict.evidence[::2], verdict.evidence[1::2]
        if [answer.question for answer in given] != [answer.question for answer in swapped]:
            raise ValueError(f"verdicts: {verdict.judge} did not ask every question in both orders")
        if verdict.valid:
            pairs += [(a.margin, b.margin) for a, b in zip(given, swapped, strict=True)]
    return np.array(pairs).reshape(-1, 2)


def flip_rate(verdicts: Iterable[Verdict]) -> float:
    """Share of a PairwiseJudge's questions whose answer changed with the order; NaN without any."""
    margins = order_margins(verdicts)
    return float(np.mean(margins.prod(1) < 0)) if len(margins) else math.nan


def first_share(verdicts: Iterable[Verdict]) -> float:
    """How often a PairwiseJudge's model chose the image shown first, a tie counting half; 1/2 without bias."""
    margins = order_margins(verdicts) * [1, -1]
    return float(np.heaviside(margins, 0.5).mean()) if len(margins) else math.nan


class ScoreComparer:
    """Compares through the scores of a judge that sees one sample at a time: margin (s_A - s_B) / `temperature`.

    The evidence is that of the first sample, then that of the second. Fit the temperature with `fit_temperature`.
    """

    def __init__(self, judge: Judge, temperature: float = 1.0):
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: {temperature} is not a positive number of nats")
        self.judge, self.temperature = judge, temperature
        self.id, self.template = f"scores({judge.id})", judge.template

    def compare(self, first: Sequence[Sample], second: Sequence[Sample], prompts: Sequence[str]) -> list[Verdict]:
        scored = self.judge.score([*first, *second], [*prompts, *prompts])
        return [self._verdict(a, b) for a, b in zip(scored[: len(prompts)], scored[len(prompts) :], strict=True)]

    def _verdict(self, first: Verdict, second: Verdict) -> Verdict:
        sides = (("first", first), ("second", second))
        reason = next((f"{side} sample: {v.reason or 'no verdict'}" for side, v in sides if not v.valid), "")
        margin = math.nan if reason else (first.margin - second.margin) / self.temperature
        return Verdict(margin, first.evidence + second.evidence, self.id, self.template, not reason, reason)


def fit_temperature(gaps: Sequence[float], labels: Sequence[float]) -> float:
    """T in nats such that sigmoid(gap / T) has the greatest likelihood: logistic regression through the origin.

    Args:
        gaps: s_A - s_B of each pair, in nats: (N,).
        labels: the probability that A is better, in [0, 1]: (N,).

    Raises:
        ValueError: out of range, or no T is best: the labels agree with every gap, so that the smaller T the
            better, or on the whole with none, so that an infinite one is best.
    """
    gap, label = np.asarray(gaps, float), np.asarray(labels, float)
    if gap.ndim != 1 or gap.shape != label.shape:
        raise ValueError(f"labels: {label.shape} for gaps of shape {gap.shape}; give one for each")
    if not np.isfinite(gap).all():
        raise ValueError("gaps: not all are finite; leave out pairs without a valid verdict")
    if not ((label >= 0) & (label <= 1)).all():
        raise ValueError("labels: not all are probabilities from 0 to 1")
    agreement = np.where(gap > 0, label, 1 - label)
    agreeing, disagreeing = np.abs(gap) @ agreement, np.abs(gap) @ (1 - agreement)
    if agreeing <= disagreeing:
        raise ValueError("labels: they do not follow the gaps, so no temperature fits; check which image is A")
    if disagreeing == 0:
        raise ValueError("labels: all follow the gaps, so that no temperature is too small; add labels")

    def loss(log_temperature: float) -> float:
        margin = gap * math.exp(-log_temperature)
        return float(-np.mean(label * log_expit(margin) + (1 - label) * log_expit(-margin)))

    scale = math.log(np.abs(gap).max())
    found = scipy.optimize.minimize_scalar(loss, bracket=(scale - 1, scale), tol=1e-10)
    return math.exp(found.x)


def bradley_terry(p: np.ndarray, ridge: float = 1e-4) -> np.ndarray:
    """Strengths s (K,), in nats, under which P(i better than j) = sigmoid(s_i - s_j) fits `p` (K, K) best.

    Maximises sum p_ij log sigmoid(s_i - s_j) + (1 - p_ij) log sigmoid(s_j - s_i) - ridge/2 |s|^2 over all i, j that
    were compared. The ridge centres the strengths and keeps them finite where one item wins always; without it this
    is the model of Hunter (2004, Annals of Statistics 32, section 1), with soft labels for wins.

    Args:
        p: NaN where i and j were not compared. The diagonal says nothing; p_ij and p_ji count as two comparisons.

    Returns:
        NaN for items that no chain of comparisons connects with the largest set of connected ones (of equal sets,
        that of the first item): strengths of separate sets are not on one scale.

    Raises:
        ValueError: `p` is not square, or holds what is not a probability; `ridge` is not positive.
    """
    p = np.asarray(p, float)
    if p.ndim != 2 or p.shape[0] != p.shape[1]:
        raise ValueError(f"p: {p.shape} is not square")
    if ((p < 0) | (p > 1)).any():
        raise ValueError("p: not all are probabilities from 0 to 1")
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge: {ridge} is not a positive number")
    connected = _largest_set(~np.isnan(p))
    inner = p[np.ix_(connected, connected)]
    first, second = np.nonzero(~np.isnan(inner))
    label, item = inner[first, second], np.eye(len(connected))
    design = item[first] - item[second]  # (M, K): +1 and -1 for the two items of each comparison

    def loss(s: np.ndarray) -> float:
        margin = design @ s
        return float(-label @ log_expit(margin) - (1 - label) @ log_expit(-margin) + ridge / 2 * s @ s)

    def gradient(s: np.ndarray) -> np.ndarray:
        return design.T @ (expit(design @ s) - label) + ridge * s

    def hessian(s: np.ndarray) -> np.ndarray:
        margin = design @ s
        return (design.T * (expit(margin) * expit(-margin))) @ design + ridge * item

    strengths = np.full(len(p), np.nan)
    if len(connected):
        start = np.zeros(len(connected))
        # Strictly convex, so it can only end at the minimum: within the tolerance, or where rounding hides progress.
        found = scipy.optimize.minimize(loss, start, method="trust-exact", jac=gradient, hess=hessian, tol=1e-10)
        strengths[connected] = found.x
    return strengths


def _largest_set(compared: np.ndarray) -> np.ndarray:
    """The places of the largest set of two or more items that comparisons connect."""
    _, label = connected_components(compared, directed=False)
    sizes = np.bincount(label, minlength=1)
    return np.flatnonzero(label == sizes.argmax()) if sizes.max() > 1 else np.array([], int)


class GroupJudge:
    """Scores the images of each prompt by comparing them with one another.

    In each of `rounds`, every image meets the one so many places further on, in a ring; with rounds from half the
    group on, all meet all. A verdict's margin is the image's Bradley-Terry strength, in nats above the group's mean,
    and its evidence one answer for each image it met. An image is invalid where nothing valid compares it with the
    others. Margins of different prompts are not on one scale, and all images of a prompt belong into one call.
    """

    def __init__(self, comparer: Comparer, rounds: int = 2):
        if rounds < 1:
            raise ValueError(f"rounds: {rounds} is not a number of rounds from 1")
        self.comparer, self.rounds = comparer, rounds
        self.id, self.template = f"{rounds} rounds({comparer.id})", comparer.template

    def score(self, images: Sequence[Sample], prompts: Sequence[str]) -> list[Verdict]:
        groups: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(row)
        matches = [(rows[i], rows[j]) for rows in groups.values() for i, j in ring(len(rows), self.rounds)]
        first, second = [images[i] for i, _ in matches], [images[j] for _, j in matches]
        compared = iter(self.comparer.compare(first, second, [prompts[i] for i, _ in matches]))
        verdicts = {}
        for rows in groups.values():
            met = {match: next(compared) for match in ring(len(rows), self.rounds)}
            verdicts |= zip(rows, self._verdicts(len(rows), met), strict=True)
        return [verdicts[row] for row in range(len(images))]

    def _verdicts(self, count: int, met: dict[tuple[int, int], Verdict]) -> list[Verdict]:
        """The verdicts on the `count` images of one prompt, of which some `met`."""
        p = np.full((count, count), np.nan)
        evidence: list[list[Answer]] = [[] for _ in range(count)]
        for (i, j), verdict in met.items():
            p[i, j] = verdict.value
            evidence[i].append(_answer(j, verdict, verdict.margin))
            evidence[j].append(_answer(i, verdict, -verdict.margin))
        return [
            self._verdict(float(strength), tuple(answers))
            for strength, answers in zip(bradley_terry(p), evidence, strict=True)
        ]

    def _verdict(self, strength: float, evidence: tuple[Answer, ...]) -> Verdict:
        if math.isfinite(strength):
            return Verdict(strength, evidence, self.id, self.template)
        failure = next((answer.error for answer in evidence if answer.error), "as for its neighbours")
        reason = f"not compared with its siblings: {failure}" if evidence else "no siblings to compare it with"
        return Verdict(math.nan, evidence, self.id, self.template, False, reason)


def _answer(other: int, verdict: Verdict, margin: float) -> Answer:
    """A comparison as evidence on one of its images."""
    question = f"better than image {other + 1} of this prompt"
    if not verdict.valid:
        return Answer.failed(question, verdict.reason or "no verdict")
    return Answer(question, margin, "yes" if margin > 0 else "no", verdict.certainty)


def ring(count: int, rounds: int) -> list[tuple[int, int]]:
    """Who meets whom, each pair once: i and i + step (modulo `count`) for steps of 1 to `rounds`."""
    met = {tuple(sorted((i, (i + step) % count))) for i in range(count) for step in range(1, rounds + 1)}
    return sorted((i, j) for i, j in met if i != j)
