"""Whether the probabilities of a reward can be taken at their word.

`probability` (N,) is what a reward says of the first image of a pair being better, sigmoid(`margin`); `label` (N,)
what is true of it, both in [0, 1].
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, log_expit, ndtr, xlogy

from judges.pairwise import fit_temperature
from rewards.metrics.accuracy import correctness
from rewards.metrics.correlation import auc
from rewards.metrics.intervals import LEAST_PROMPTS, NOTHING, Estimate, halves, mean, share

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs of like prediction: the mean of what was predicted and of what was observed, and their number."""

    predicted: float
    observed: float
    pairs: int


@dataclass(frozen=True)
class Fit:
    """How well probabilities fit the labels: `nll` in nats a pair."""

    nll: Estimate
    brier: Estimate
    ece: Estimate
    reliability: tuple[Bin, ...]


@dataclass(frozen=True)
class Calibration:
    """Probabilities as they are, and after their margins were divided by a temperature.

    Attributes:
        after: with, for each half of the prompts, the temperature that fits the other half best; None where none fits.
        temperature: the one that fits all pairs best, in nats.
        note: why there is none.
    """

    before: Fit
    after: Fit | None
    temperature: Estimate
    note: str


@dataclass(frozen=True)
class MarginBin:
    """Pairs whose rewards lie `low` to `high` nats apart: the accuracy that the margins claim, and the one found."""

    low: float
    high: float
    claimed: float
    accuracy: Estimate


@dataclass(frozen=True)
class SigmaBin:
    """Pairs with a standard deviation from `low` to `high`: the share of wrong orders claimed, and the one found."""

    low: float
    high: float
    claimed: float
    error: Estimate


@dataclass(frozen=True)
class Uncertainty:
    """Whether a reward that knows its uncertainty errs where it is uncertain.

    Attributes:
        auc: the probability that a pair ordered wrongly has a greater standard deviation than one ordered rightly; 0.5
            for a σ that tells nothing.
    """

    auc: Estimate
    bins: tuple[SigmaBin, ...]


def calibration(margin: ArrayLike, label: ArrayLike, prompts: ArrayLike) -> Calibration:
    """Both fits of the pairs (N,) with a finite margin, in nats."""
    margin, label = np.asarray(margin, dtype=float), np.asarray(label, dtype=float)
    known = np.isfinite(margin)
    margin, label, prompts = margin[known], label[known], np.asarray(prompts)[known]
    before = _fit(margin, label, prompts)
    first = halves(prompts)
    try:
        temperature = fit_temperature(margin, label)
        scales = [fit_temperature(margin[rows], label[rows]) for rows in (~first, first)]
    except ValueError as error:
        return Calibration(before, None, NOTHING, str(error))
    after = _fit(margin / np.where(first, *scales), label, prompts)
    return Calibration(before, after, temperature_estimate(margin, label, prompts, temperature), "")


def _fit(margin: np.ndarray, label: np.ndarray, prompts: np.ndarray) -> Fit:
    probability = expit(margin)
    return Fit(
        nll=mean(-(label * log_expit(margin) + (1 - label) * log_expit(-margin)), prompts),
        brier=mean((probability - label) ** 2, prompts),
        ece=ece_estimate(probability, label, prompts),
        reliability=tuple(reliability(probability, label)),
    )


def reliability(probability: ArrayLike, label: ArrayLike, bins: int = BINS) -> list[Bin]:
    """Predicted against observed in `bins` equal intervals of [0, 1], empty ones left out.

    scikit-learn's `calibration_curve` takes hard labels only.
    """
    probability, label = np.asarray(probability, dtype=float), np.asarray(label, dtype=float)
    place = _place(probability, bins)
    return [
        Bin(float(probability[place == k].mean()), float(label[place == k].mean()), int((place == k).sum()))
        for k in np.unique(place)
    ]


def ece(probability: ArrayLike, label: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error (1706.04599, eq. 3): the mean distance of the bins from the diagonal."""
    found = reliability(probability, label, bins)
    return sum(b.pairs * abs(b.predicted - b.observed) for b in found) / sum(b.pairs for b in found)


def ece_estimate(
    probability: np.ndarray, label: np.ndarray, prompts: np.ndarray, least: int = LEAST_PROMPTS
) -> Estimate:
    """`ece` as a mean: each gap has the sign of its bin's."""
    place, gap = _place(probability, BINS), probability - label
    return share(np.sign(np.bincount(place, gap, BINS))[place] * gap, prompts, least)


def temperature_estimate(
    margin: np.ndarray, label: np.ndarray, prompts: np.ndarray, fitted: float, least: int = LEAST_PROMPTS
) -> Estimate:
    """The temperature `fitted` to all pairs, with the interval of 1/T, whose estimating equation is the likelihood's;
    None where that reaches 0."""
    p = expit(margin / fitted)
    scores, information = margin * (label - p), float(np.mean(margin**2 * p * (1 - p)))
    found = mean(1 / fitted + scores / information, prompts, least)
    bounded = found.interval is not None and found.interval[0] > 0
    interval = (1 / found.interval[1], 1 / found.interval[0]) if bounded and found.interval else None
    return Estimate(fitted, interval, found.count, found.prompts)


def nll(probability: ArrayLike, label: ArrayLike) -> float:
    """Mean cross-entropy in nats; infinite where a certain prediction is wrong.

    scikit-learn's `log_loss` takes hard labels only.
    """
    probability, label = np.asarray(probability, dtype=float), np.asarray(label, dtype=float)
    return float(-np.mean(xlogy(label, probability) + xlogy(1 - label, 1 - probability)))


def brier(probability: ArrayLike, label: ArrayLike) -> float:
    """Mean squared difference of probability and label (Brier, 1950)."""
    return float(np.mean((np.asarray(probability, dtype=float) - np.asarray(label, dtype=float)) ** 2))


def accuracy_by_margin(
    margin: ArrayLike, label: ArrayLike, prompts: ArrayLike, bins: int = BINS
) -> tuple[MarginBin, ...]:
    """Accuracy against the size of the margin, in `bins` of as many pairs each; ties of the label are left out."""
    margin, label, prompts = np.asarray(margin, dtype=float), np.asarray(label, dtype=float), np.asarray(prompts)
    known = np.isfinite(margin) & (label != 0.5)
    margin, label, prompts = margin[known], label[known], prompts[known]
    correct, size = correctness(margin, np.zeros(len(margin)), label), np.abs(margin)
    return tuple(
        MarginBin(low, high, float(expit(size[rows]).mean()), share(correct[rows], prompts[rows]))
        for low, high, rows in _quantiles(size, bins)
    )


def uncertainty(
    margin: ArrayLike, sigma: ArrayLike, label: ArrayLike, prompts: ArrayLike, bins: int = BINS
) -> Uncertainty:
    """Wrong orders against the standard deviation of the margin, in `bins` of as many pairs each.

    A Gaussian margin claims to be wrong with probability Φ(-|margin| / σ). Ties of the label are left out.

    Args:
        sigma: (N,) of the margin, √(σ_a² + σ_b²) of two independent rewards.
    """
    margin, sigma, label, prompts = (np.asarray(values) for values in (margin, sigma, label, prompts))
    known = np.isfinite(margin) & np.isfinite(sigma) & (label != 0.5)
    margin, sigma, label, prompts = margin[known], sigma[known], label[known], prompts[known]
    wrong = 1 - correctness(margin, np.zeros(len(margin)), label)
    claimed = ndtr(-np.abs(margin) / sigma)
    found = tuple(
        SigmaBin(low, high, float(claimed[rows].mean()), share(wrong[rows], prompts[rows]))
        for low, high, rows in _quantiles(sigma, bins)
    )
    return Uncertainty(auc(sigma, wrong > 0, prompts), found)


def _place(probability: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((probability * bins).astype(int), bins - 1)


def _quantiles(values: np.ndarray, bins: int) -> list[tuple[float, float, np.ndarray]]:
    """Lowest, highest and rows of each of `bins` parts of like size; equal values stay together."""
    if not len(values):
        return []
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
    place = np.searchsorted(edges, values, side="left")
    parts = [place == k for k in np.unique(place)]
    return [(float(values[rows].min()), float(values[rows].max()), rows) for rows in parts]
