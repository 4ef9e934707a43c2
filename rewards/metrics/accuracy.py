"""How often a reward orders two images as the label does, by every convention in use.

Four published accuracies share one name and differ in what they do with ties. Each is here the mean of a credit that
a pair earns, over all pairs or over the means of prompts. `label` (N,) is the probability in [0, 1] that the first
image of a pair is better, 0.5 a tie; `prompts` (N,) is what a pair belongs to.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import comb
from sklearn.metrics import balanced_accuracy_score

from rewards.metrics.intervals import (
    NOTHING,
    Estimate,
    groups,
    halves,
    linearised,
    prompt_share,
    share,
)

Credit = Callable[[ArrayLike, ArrayLike, ArrayLike, float | np.ndarray], np.ndarray]
"""What each pair (N,) earns, given both rewards, the label, and the margin up to which rewards are a tie."""


@dataclass(frozen=True)
class Agreement:
    """The accuracies of one reward on one table of pairs, named after who published them.

    Attributes:
        imagereward: ties of the label left out, equal rewards wrong, every pair the same (2304.05977).
        hpsv2: the same, every prompt the same (2306.09341).
        hpsv2_inversion: a tie on either side is right, every prompt the same: one minus the share of inversions.
        pickscore: a half for a tie on one side, one for a tie on both (2305.01569); `pickscore_threshold` is the margin
            that counts as a tie.
        acc23: pairwise accuracy with tie calibration (2305.14324): ties must be predicted too, every prompt the same.
        balanced: the mean of the accuracies where the first and where the second image is better.
    """

    imagereward: Estimate
    hpsv2: Estimate
    hpsv2_inversion: Estimate
    pickscore: Estimate
    acc23: Estimate
    balanced: Estimate
    pickscore_threshold: float
    acc23_threshold: float


def agreement(reward_a: ArrayLike, reward_b: ArrayLike, label: ArrayLike, prompts: ArrayLike) -> Agreement:
    """All accuracies of the pairs (N,) with finite rewards.

    Each half of the prompts is credited with the threshold that is best on the other half; the thresholds given are
    those that are best on all.
    """
    a, b, label = (np.asarray(values, dtype=float) for values in (reward_a, reward_b, label))
    known = np.isfinite(a) & np.isfinite(b)
    a, b, label, prompts = a[known], b[known], label[known], np.asarray(prompts)[known]
    correct = correctness(a, b, label)
    half = half_credit(a, b, label, cross_fitted_threshold(half_credit, a, b, label, prompts))
    calibrated = three_way_credit(a, b, label, cross_fitted_threshold(three_way_credit, a, b, label, prompts))
    return Agreement(
        imagereward=share(correct, prompts),
        hpsv2=prompt_share(correct, prompts),
        hpsv2_inversion=prompt_share(concordance(a, b, label), prompts),
        pickscore=share(half, prompts),
        acc23=prompt_share(calibrated, prompts),
        balanced=_balanced(correct, label, prompts),
        pickscore_threshold=tuned_threshold(half_credit, a, b, label),
        acc23_threshold=tuned_threshold(three_way_credit, a, b, label),
    )


def pairwise_accuracy(reward_a: ArrayLike, reward_b: ArrayLike, label: ArrayLike) -> float:
    """Share of pairs whose better image has the higher reward, by ImageReward's convention (2304.05977).

    Every pair counts the same whatever its prompt, pairs with label 0.5 are left out, and equal rewards are
    wrong. NaN where no pair is left.
    """
    correct = correctness(reward_a, reward_b, label)
    return float(np.nanmean(correct)) if np.isfinite(correct).any() else float("nan")


def correctness(reward_a: ArrayLike, reward_b: ArrayLike, label: ArrayLike) -> np.ndarray:
    """`pairwise_accuracy` pair by pair (N,): 1 right, 0 wrong, NaN for a label of 0.5."""
    predicted, wanted = _signs(reward_a, reward_b, label)
    return np.where(wanted == 0, np.nan, (predicted == wanted).astype(float))


def concordance(reward_a: ArrayLike, reward_b: ArrayLike, label: ArrayLike) -> np.ndarray:
    """0 for a pair (N,) that is ordered the wrong way round, otherwise 1: HPSv2's `inversion_score` pair by pair."""
    predicted, wanted = _signs(reward_a, reward_b, label)
    return (predicted * wanted >= 0).astype(float)


def half_credit(
    reward_a: ArrayLike, reward_b: ArrayLike, label: ArrayLike, threshold: float | np.ndarray = 0.0
) -> np.ndarray:
    """1 for a pair (N,) that is judged right, a tie included, 1/2 where one side alone is a tie, otherwise 0.

    This is PickScore's (2305.01569), who set the threshold on the difference of the two probabilities,
    which grows with the margin.
    """
    predicted, wanted = _signs(reward_a, reward_b, label, threshold)
    return 1 - np.abs(predicted - wanted) / 2


def three_way_credit(
    reward_a: ArrayLike, reward_b: ArrayLike, label: ArrayLike, threshold: float | np.ndarray = 0.0
) -> np.ndarray:
    """1 for a pair (N,) whose order, or tie, is the label's, otherwise 0: acc_eq (2305.14324)."""
    predicted, wanted = _signs(reward_a, reward_b, label, threshold)
    return (predicted == wanted).astype(float)


def tuned_threshold(credit: Credit, reward_a: ArrayLike, reward_b: ArrayLike, label: ArrayLike) -> float:
    """The least margin, 0 or that of a pair, at which calling margins up to it ties earns most credit."""
    margin = np.abs(np.asarray(reward_a, dtype=float) - np.asarray(reward_b, dtype=float))
    order = np.argsort(margin, kind="stable")
    tied, decided = (credit(reward_a, reward_b, label, limit)[order] for limit in (np.inf, -1.0))
    limits = np.unique(np.append(margin, 0.0))
    earned = np.append(0.0, np.cumsum(tied - decided))[np.searchsorted(margin[order], limits, side="right")]
    return float(limits[np.argmax(np.round(earned, 9))])


def cross_fitted_threshold(
    credit: Credit, reward_a: np.ndarray, reward_b: np.ndarray, label: np.ndarray, prompts: np.ndarray
) -> np.ndarray:
    """For each pair (N,) the threshold that is best for the half of the prompts to which it does not belong."""
    first = halves(prompts)
    if first.all():
        return np.zeros(len(first))
    limits = [tuned_threshold(credit, reward_a[rows], reward_b[rows], label[rows]) for rows in (~first, first)]
    return np.where(first, *limits)


def balanced_accuracy(reward_a: ArrayLike, reward_b: ArrayLike, label: ArrayLike) -> float:
    """The mean of the accuracies where the first and where the second image is better.

    A model that always prefers one position scores 0.5 however the labels lie. Ties are dealt with as in
    `pairwise_accuracy`.
    """
    margin, label = np.asarray(reward_a) - np.asarray(reward_b), np.asarray(label, dtype=float)
    decided = label != 0.5
    truth = label[decided] > 0.5
    predicted = np.where(margin[decided] == 0, ~truth, margin[decided] > 0)
    return float(balanced_accuracy_score(truth, predicted)) if decided.any() else float("nan")


def win_rate(score: ArrayLike, rival: ArrayLike, prompts: ArrayLike) -> Estimate:
    """The share of comparisons (N,) in which `score` beats its `rival`, ties as a half; NaN on either side is none."""
    return share((np.sign(np.asarray(score, dtype=float) - np.asarray(rival, dtype=float)) + 1) / 2, prompts)


def label_ceiling(label: ArrayLike, prompts: ArrayLike) -> Estimate:
    """The accuracy of one who knows every label, against choices drawn from the labels: no reward can do better."""
    label = np.asarray(label, dtype=float)
    return share(np.where(label == 0.5, np.nan, np.maximum(label, 1 - label)), prompts)


def best_of(reward: ArrayLike, gold: ArrayLike, prompts: ArrayLike, n: int = 4) -> Estimate:
    """How often the image with the highest reward is the best, or one of the best, of n images of a prompt.

    The mean over all subsets of n images that a prompt has; prompts with fewer are left out. Equal highest rewards
    share the credit, as in RewardBench 2 (2506.01937).

    Args:
        reward: (N,) what chooses; `gold` (N,) what says which are best.
    """
    reward, gold, prompts = np.asarray(reward, dtype=float), np.asarray(gold, dtype=float), np.asarray(prompts)
    known = np.isfinite(reward) & np.isfinite(gold)
    reward, gold, prompts = reward[known], gold[known], prompts[known]
    found, places = groups(prompts)
    shares = [_best_of(reward[rows], gold[rows], n) if len(rows) >= n else np.nan for rows in places]
    return share(shares, found)


def _best_of(reward: np.ndarray, gold: np.ndarray, n: int) -> float:
    beaten = gold[:, None] >= gold
    below = (beaten & (reward[:, None] > reward)).sum(axis=1)
    level = (beaten & (reward[:, None] == reward)).sum(axis=1) - 1
    ties = np.arange(n)
    # Subsets in which image i has the highest reward and gold, t of the others having the same reward.
    subsets = comb(level[:, None], ties) * comb(below[:, None], n - 1 - ties) / (ties + 1)
    return float(subsets.sum() / comb(len(reward), n))


def _signs(
    reward_a: ArrayLike, reward_b: ArrayLike, label: ArrayLike, threshold: float | np.ndarray = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Which image the reward and the label prefer (N,): 1 the first, -1 the second, 0 neither."""
    margin = np.asarray(reward_a, dtype=float) - np.asarray(reward_b, dtype=float)
    predicted = np.where(np.abs(margin) <= threshold, 0.0, np.sign(margin))
    return predicted, np.sign(np.asarray(label, dtype=float) - 0.5)


def _balanced(correct: np.ndarray, label: np.ndarray, prompts: np.ndarray) -> Estimate:
    decided = label != 0.5
    correct, first, prompts = correct[decided], label[decided] > 0.5, prompts[decided]
    if first.all() or not first.any():
        return NOTHING
    balanced = (correct[first].mean() + correct[~first].mean()) / 2
    return share(linearised(correct, first, balanced, weight=0.5), prompts)
