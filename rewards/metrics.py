"""How well a reward model predicts preferences: pure functions of numpy arrays.

`label` is the probability in [0, 1] that the first image of a pair is better, 0.5 a tie; `probability` is
what the model says of the same. N is the number of pairs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import xlogy
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score

_RESAMPLES = 2000


@dataclass(frozen=True)
class Bin:
    """Pairs of like prediction: the mean of what was predicted and of what was observed, and their number."""

    predicted: float
    observed: float
    pairs: int


def pairwise_accuracy(reward_a: ArrayLike, reward_b: ArrayLike, label: ArrayLike) -> float:
    """Share of pairs whose better image has the higher reward, by ImageReward's convention (2304.05977).

    Every pair counts the same whatever its prompt, pairs with label 0.5 are left out, and equal rewards are
    wrong. NaN where no pair is left.
    """
    correct = correctness(reward_a, reward_b, label)
    return float(np.nanmean(correct)) if np.isfinite(correct).any() else float("nan")


def correctness(reward_a: ArrayLike, reward_b: ArrayLike, label: ArrayLike) -> np.ndarray:
    """`pairwise_accuracy` pair by pair (N,): 1 right, 0 wrong, NaN for a label of 0.5."""
    margin, wanted = np.asarray(reward_a) - np.asarray(reward_b), np.asarray(label, dtype=float) - 0.5
    return np.where(wanted == 0, np.nan, (np.sign(margin) == np.sign(wanted)).astype(float))


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


def clustered_interval(
    values: ArrayLike, clusters: ArrayLike, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` (N,), whole clusters drawn at a time.

    Pairs of one prompt share its difficulty and its images, so they are no independent observations. 2,000
    resamples; values that are NaN are left out.

    Args:
        clusters: (N,) what each value belongs to, its prompt id.
    """
    values, clusters = np.asarray(values, dtype=float), np.asarray(clusters)
    kept = ~np.isnan(values)
    if not kept.any():
        return float("nan"), float("nan")
    _, cluster = np.unique(clusters[kept], return_inverse=True)
    sums, sizes = np.bincount(cluster, values[kept]), np.bincount(cluster)
    count = len(sizes)
    # How often each cluster is drawn is all that a mean needs to know of a resample.
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    means = (drawn @ sums) / (drawn @ sizes)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion of independent trials (JASA 22, 1927)."""
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def reliability(probability: ArrayLike, label: ArrayLike, bins: int = 10) -> list[Bin]:
    """Predicted against observed in `bins` equal intervals of [0, 1], empty ones left out.

    scikit-learn's `calibration_curve` takes hard labels only.
    """
    probability, label = np.asarray(probability, dtype=float), np.asarray(label, dtype=float)
    place = np.minimum((probability * bins).astype(int), bins - 1)
    return [
        Bin(float(probability[place == k].mean()), float(label[place == k].mean()), int((place == k).sum()))
        for k in np.unique(place)
    ]


def ece(probability: ArrayLike, label: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error (1706.04599, eq. 3): the mean distance of the bins from the diagonal."""
    found = reliability(probability, label, bins)
    return sum(b.pairs * abs(b.predicted - b.observed) for b in found) / sum(b.pairs for b in found)


def nll(probability: ArrayLike, label: ArrayLike) -> float:
    """Mean cross-entropy in nats; infinite where a certain prediction is wrong.

    scikit-learn's `log_loss` takes hard labels only.
    """
    probability, label = np.asarray(probability, dtype=float), np.asarray(label, dtype=float)
    return float(-np.mean(xlogy(label, probability) + xlogy(1 - label, 1 - probability)))


def brier(probability: ArrayLike, label: ArrayLike) -> float:
    """Mean squared difference of probability and label (Brier, 1950)."""
    return float(np.mean((np.asarray(probability, dtype=float) - np.asarray(label, dtype=float)) ** 2))
