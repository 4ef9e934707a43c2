"""All that can be computed of a reward from its scores of pictures of which it is known which are better.

Who knows it names a task: the `judge`, whose soft labels the reward was trained on; `people`; or `gold`, an oracle.
Each task is a set of pairs of pictures of one prompt. Beside the reward stand other scorers on the same pairs: what it
was before its training, a public model, the judge, and a random one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from rewards.losses import PairLoss, Scores
from rewards.metrics.accuracy import Agreement, agreement, best_of, correctness, label_ceiling, win_rate
from rewards.metrics.correlation import kendall, pooled_kendall, pooled_spearman, siblings, spearman
from rewards.metrics.intervals import LEAST_PROMPTS, Estimate, mean, share, standard_error
from rewards.metrics.probabilities import (
    Calibration,
    MarginBin,
    Uncertainty,
    accuracy_by_margin,
    calibration,
    uncertainty,
)
from rewards.metrics.slices import generator_pair, length, negation, same_model, sliced, truncated
from rewards.preferences import unit_hash

TaskName = Literal["judge", "people", "gold"]

BEST_OF = 4
REWARD, CEILING = "reward", "label ceiling"
BEFORE, BASELINE = "before training", "CLIP"


@dataclass(frozen=True)
class Pictures:
    """N pictures, and what is known of each; numbers are (N,), NaN where they are not known.

    Attributes:
        prompt_ids, prompts, skills: what each was made for; "" for no skill.
        models: what painted each; "" where that is not known.
        read: as much of each prompt as the reward reads.
        reward, sigma: the reward and its standard deviation.
        judge: the judge's margin in nats.
        gold: 1 where it follows its prompt, otherwise 0.
        rivals: scores by others, by their names.
    """

    prompt_ids: np.ndarray
    prompts: np.ndarray
    skills: np.ndarray
    models: np.ndarray
    read: np.ndarray
    reward: np.ndarray
    sigma: np.ndarray
    judge: np.ndarray
    gold: np.ndarray
    rivals: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Pairs:
    """P pairs: the places (P,) of both pictures, and the `label` (P,), the probability that the first is better."""

    task: TaskName
    first: np.ndarray
    second: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class Line:
    """How well a scorer orders the pairs of a task; ties of the label are left out, and equal scores are wrong.

    Attributes:
        accuracy: how often it prefers the side that the label holds likelier; `error` is the standard error.
        drawn: the probability that the label gives to the side it prefers: the accuracy against choices drawn from soft
            labels, for which the label ceiling is the most that can be had.
        lead: of the reward's accuracy over this one, on the same pairs; None for the reward itself and for the ceiling.
    """

    task: TaskName
    scorer: str
    accuracy: Estimate
    error: float | None
    drawn: Estimate
    lead: Estimate | None


@dataclass(frozen=True)
class Ranking:
    """How the reward ranks pictures: within prompts, over all, and how often its best of four is the best."""

    spearman: Estimate
    kendall: Estimate
    pooled_spearman: Estimate
    pooled_kendall: Estimate
    best_of_4: Estimate


@dataclass(frozen=True)
class Task:
    """The reward on one task.

    Attributes:
        win_rate: how often the label prefers the picture that the reward prefers, ties of either as a half.
        ceiling: what one who knows every label would score against choices drawn from them.
        ranking: None where nobody gave single pictures a number.
        uncertainty: None where the reward has no standard deviation.
    """

    name: TaskName
    pairs: int
    prompts: int
    agreement: Agreement
    win_rate: Estimate
    ceiling: Estimate
    ranking: Ranking | None
    calibration: Calibration
    by_margin: tuple[MarginBin, ...]
    uncertainty: Uncertainty | None


@dataclass(frozen=True)
class SliceLine:
    """The reward's accuracy on the pairs of a task that have the `value` in the `column`."""

    task: TaskName
    column: str
    value: str
    accuracy: Estimate


@dataclass(frozen=True)
class Painter:
    """How often the pictures of a model win against those of others, by the label and by the reward."""

    model: str
    by_label: Estimate
    by_reward: Estimate


@dataclass(frozen=True)
class Evaluation:
    """What was found. The first task is the one to believe: gold, where it is known of enough prompts.

    Attributes:
        lines: the headline table, task by task.
        painters: by the first task; none where it is not known what painted the pictures.
    """

    lines: tuple[Line, ...]
    tasks: tuple[Task, ...]
    slices: tuple[SliceLine, ...]
    painters: tuple[Painter, ...]

    @property
    def line(self) -> Line:
        """That of the reward on the first task."""
        return next(line for line in self.lines if line.scorer == REWARD)

    @property
    def labelled(self) -> Task:
        """The task whose labels are probabilities: not that of gold, where there is another."""
        return next((task for task in self.tasks if task.name != "gold"), self.tasks[0])


def evaluate(pictures: Pictures, labelled: Pairs, loss: PairLoss) -> Evaluation:
    """Everything about the `labelled` pairs, and about the pairs of siblings that gold tells apart.

    Args:
        loss: what makes probabilities of the reward's scores.

    Raises:
        ValueError: no pair has a label that prefers one side, or no score.
    """
    tasks = [pairs for pairs in (gold_pairs(pictures), labelled) if np.isfinite(_right(pictures.reward, pairs)).any()]
    if not tasks:
        raise ValueError("label: no pair with two scores has a better picture")
    tasks.sort(key=lambda pairs: len(set(pictures.prompt_ids[pairs.first])) < LEAST_PROMPTS)
    lines = [line for pairs in tasks for line in _lines(pictures, pairs)]
    slices = [found for pairs in tasks for found in _slices(pictures, pairs)]
    found = tuple(_task(pictures, pairs, loss) for pairs in tasks)
    return Evaluation(tuple(lines), found, tuple(slices), _painters(pictures, tasks[0]))


def gold_pairs(pictures: Pictures) -> Pairs:
    """All pairs of pictures of one prompt of which one follows it and the other does not, in an order by hash."""
    first, second = siblings(pictures.prompt_ids)
    ordered = first < second
    first, second = first[ordered], second[ordered]
    told = np.abs(pictures.gold[first] - pictures.gold[second]) == 1
    places = zip(first[told], second[told], strict=True)
    names = [(pictures.prompt_ids[a], str(a), str(b)) for a, b in places]
    swap = np.array([unit_hash("order", *name) < 0.5 for name in names], dtype=bool)
    a, b = np.where(swap, second[told], first[told]), np.where(swap, first[told], second[told])
    return Pairs("gold", a, b, pictures.gold[a])


def random_scores(prompt_ids: Sequence[str]) -> np.ndarray:
    """Scores (N,) in [0, 1) that only the place of a picture decides."""
    return np.array([unit_hash("random", str(name), str(row)) for row, name in enumerate(prompt_ids)])


def log_odds(pictures: Pictures, pairs: Pairs, loss: PairLoss) -> np.ndarray:
    """Those (P,) with which the loss says that the first picture is better, in nats; NaN without both scores."""

    def scores(places: np.ndarray) -> Scores:
        sigma = torch.as_tensor(pictures.sigma[places])
        return Scores(torch.as_tensor(pictures.reward[places]), sigma.log() if sigma.isfinite().any() else None)

    return loss.log_odds(scores(pairs.first), scores(pairs.second)).numpy()


def _lines(pictures: Pictures, pairs: Pairs) -> list[Line]:
    prompts, decided = pictures.prompt_ids[pairs.first], pairs.label != 0.5
    scorers = {REWARD: pictures.reward, **pictures.rivals}
    if pairs.task != "judge":
        scorers["judge"] = pictures.judge
    scorers["random"] = random_scores(pictures.prompt_ids)
    best = np.where(decided, np.maximum(pairs.label, 1 - pairs.label), np.nan)
    own = _right(pictures.reward, pairs)
    found = []
    for name, scores in scorers.items():
        right = _right(scores, pairs)
        drawn = np.where(right == 1, best, 1 - best)
        drawn[np.isnan(right)] = np.nan
        lead = None if name == REWARD else mean(own - right, prompts)
        if np.isfinite(right).any():
            found.append(_line(pairs.task, name, right, drawn, lead, prompts))
    return [*found, _line(pairs.task, CEILING, np.where(decided, 1.0, np.nan), best, None, prompts)]


def _line(
    task: TaskName, name: str, right: np.ndarray, drawn: np.ndarray, lead: Estimate | None, prompts: np.ndarray
) -> Line:
    return Line(task, name, share(right, prompts), standard_error(right, prompts), share(drawn, prompts), lead)


def _right(scores: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Pair by pair (P,): 1 right, 0 wrong, NaN for a tie of the label or without both scores."""
    a, b = scores[pairs.first], scores[pairs.second]
    return np.where(np.isfinite(a - b), correctness(a, b, pairs.label), np.nan)


def _task(pictures: Pictures, pairs: Pairs, loss: PairLoss) -> Task:
    first, second, label = pairs.first, pairs.second, pairs.label
    prompts = pictures.prompt_ids[first]
    a, b = pictures.reward[first], pictures.reward[second]
    margin = log_odds(pictures, pairs, loss)
    sigma = np.hypot(pictures.sigma[first], pictures.sigma[second])
    won = _label_of_preferred(a, b, label)
    return Task(
        name=pairs.task,
        pairs=len(pairs),
        prompts=len(set(prompts)),
        agreement=agreement(a, b, label, prompts),
        win_rate=win_rate(won, 1 - won, prompts),
        ceiling=label_ceiling(label, prompts),
        ranking=_ranking(pictures, {"judge": pictures.judge, "gold": pictures.gold}.get(pairs.task)),
        calibration=calibration(margin, label, prompts),
        by_margin=accuracy_by_margin(margin, label, prompts),
        uncertainty=uncertainty(a - b, sigma, label, prompts) if np.isfinite(sigma).any() else None,
    )


def _label_of_preferred(a: np.ndarray, b: np.ndarray, label: np.ndarray) -> np.ndarray:
    """With what probability the picture with the higher reward is the better one, 1/2 where both are equal."""
    return 0.5 + np.sign(a - b) * (label - 0.5)


def _ranking(pictures: Pictures, truth: np.ndarray | None) -> Ranking | None:
    if truth is None:
        return None
    both = pictures.reward, truth, pictures.prompt_ids
    return Ranking(
        spearman=spearman(*both),
        kendall=kendall(*both),
        pooled_spearman=pooled_spearman(*both),
        pooled_kendall=pooled_kendall(*both),
        best_of_4=best_of(*both, n=BEST_OF),
    )


def _slices(pictures: Pictures, pairs: Pairs) -> list[SliceLine]:
    """By every column in which the pairs differ."""
    first, second = pairs.first, pairs.second
    prompts, texts = pictures.prompt_ids[first], list(pictures.prompts[first])
    right = _right(pictures.reward, pairs)
    columns = {
        "skill": list(pictures.skills[first]),
        "prompt length": length(texts),
        "prompt read": truncated((pictures.read != pictures.prompts)[first]),
        "negation": negation(texts),
    }
    if all(pictures.models[first]) and all(pictures.models[second]):
        painted = pictures.models[first], pictures.models[second]
        columns |= {"generators": generator_pair(*painted), "same generator": same_model(*painted)}
    return [
        SliceLine(pairs.task, name, found.columns[0][1], found.estimate)
        for name, values in columns.items()
        if len(set(values)) > 1
        for found in sliced({name: values}, lambda rows: share(right[rows], prompts[rows]))
    ]


def _painters(pictures: Pictures, pairs: Pairs) -> tuple[Painter, ...]:
    first, second = pictures.models[pairs.first], pictures.models[pairs.second]
    a, b = pictures.reward[pairs.first], pictures.reward[pairs.second]
    prompts = pictures.prompt_ids[pairs.first]
    found = []
    for model in sorted(set(filter(None, [*first, *second]))):
        rows = (first == model) ^ (second == model)
        sign = np.where(first == model, 1, -1)
        by = [
            win_rate(sign[rows] * score[rows], np.zeros(rows.sum()), prompts[rows])
            for score in (pairs.label - 0.5, a - b)
        ]
        if rows.any():
            found.append(Painter(str(model), *by))
    return tuple(found)
