"""How far a reward can be optimised before what it stands for suffers (Gao, Schulman & Hilton, 2210.10760).

The `proxy` is the reward that is optimised, the `gold` what it stands for: an oracle, people, or a judge that the
proxy was not trained on. d = √KL is the distance from the base model. Gao et al. find gold to rise as R = d(α - βd)
under best-of-n sampling and as R = d(α - β ln d) under reinforcement learning, so that it peaks where
β > 0. We fit by least squares, all points weighing the same. Distances of a run may be in any unit of √KL, as long as
the same unit is used to stop it; α and β are in that unit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gammaln

from rewards.metrics.intervals import NOTHING, Estimate, estimate, groups, mean

Form = Literal["best_of_n", "rl"]


@dataclass(frozen=True)
class Fit:
    """R(d) of one reward, with R(0) = 0.

    Attributes:
        peak: the distance at which R is highest, and `best` what R is there; no value where `beta` is not determined.
        stop: the distance up to which R still rises, all but surely: where the interval of the peak begins, and not
            beyond what was measured. None where no peak is known.
        note: what the fit cannot tell, and what would help; may be empty.
    """

    form: Form
    alpha: Estimate
    beta: Estimate
    peak: Estimate
    best: Estimate
    stop: float | None
    note: str


@dataclass(frozen=True)
class Point:
    """Mean gains over the base model at one distance, `kl` = `distance`²; `n` images to choose from, if they were."""

    distance: float
    kl: float
    n: int | None
    proxy: Estimate
    gold: Estimate


@dataclass(frozen=True)
class Overoptimisation:
    """The curves of proxy and gold, and what was fitted to them."""

    points: tuple[Point, ...]
    proxy: Fit
    gold: Fit


def best_of_n(
    proxy: ArrayLike, gold: ArrayLike, prompts: ArrayLike, sizes: Sequence[int] | None = None
) -> Overoptimisation:
    """Both curves for choosing the best of n images of a prompt by the proxy.

    Args:
        proxy: (N,) and `gold` (N,) of images of the base model; images that lack one are left out.
        prompts: (N,) what each image belongs to.
        sizes: values of n; by default powers of two up to the number of images that every prompt has.

    Raises:
        ValueError: a prompt has fewer images than the largest n, or there are no two values of n above 1.
    """
    proxy, gold, prompts = np.asarray(proxy, dtype=float), np.asarray(gold, dtype=float), np.asarray(prompts)
    known = np.isfinite(proxy) & np.isfinite(gold)
    proxy, gold, prompts = proxy[known], gold[known], prompts[known]
    if not len(proxy):
        raise ValueError("proxy: no image has both a proxy and a gold value")
    found, places = groups(prompts)
    scarce = min(range(len(found)), key=lambda place: len(places[place]))
    least = len(places[scarce])
    sizes = [2**k for k in range(least.bit_length())] if sizes is None else sorted({1, *sizes})
    if sizes[-1] > least:
        name = str(found[scarce])
        raise ValueError(f"sizes: the best of {sizes[-1]}, but prompt {name!r} has {least} images; sample more")
    if len(sizes) < 3:
        raise ValueError(f"sizes: {sizes} has no two values above 1; sample 4 images of each prompt, or more")
    expected = np.empty((2, len(found), len(sizes)))
    for place, rows in enumerate(places):
        chances = chosen(proxy[rows], sizes)  # (S, K)
        expected[:, place] = chances @ proxy[rows], chances @ gold[rows]
    gains = expected - expected[..., :1]
    kl = kl_of_best_of_n(sizes)
    points = tuple(
        Point(float(np.sqrt(kl[k])), float(kl[k]), n, *(mean(gain[:, k], found) for gain in gains))
        for k, n in enumerate(sizes)
    )
    distance = np.tile(np.sqrt(kl), len(found))
    fits = (fit(distance, gain.ravel(), np.repeat(found, len(sizes)), "best_of_n") for gain in gains)
    return Overoptimisation(points, *fits)


def over_training(kl: ArrayLike, proxy: ArrayLike, gold: ArrayLike, prompts: ArrayLike) -> Overoptimisation:
    """Both curves of a run of reinforcement learning.

    Args:
        kl: (N,) from the base model, in nats, of the policy that made each image, the same for all of one checkpoint.
        proxy: (N,) gain of each image over the mean of the base model's on the same prompt; `gold` (N,) likewise.
        prompts: (N,) what each image belongs to.
    """
    kl, proxy, gold, prompts = (np.asarray(values) for values in (kl, proxy, gold, prompts))
    points = tuple(
        Point(
            float(np.sqrt(value)),
            float(value),
            None,
            *(mean(gain[kl == value], prompts[kl == value]) for gain in (proxy, gold)),
        )
        for value in np.unique(kl)
    )
    return Overoptimisation(points, *(fit(np.sqrt(kl), gain, prompts, "rl") for gain in (proxy, gold)))


def kl_of_best_of_n(n: ArrayLike) -> np.ndarray:
    """ln n - (n - 1)/n in nats: of the best of n from one sample (2009.01325, appendix G.3); an upper bound where
    samples can be equal (2401.01879)."""
    n = np.asarray(n, dtype=float)
    return np.log(n) - (n - 1) / n


def chosen(proxy: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """With what probability each of K images is the best by `proxy` (K,) of n drawn without replacement: (S, K).

    The mean of gold with these weights is the unbiased estimate of gold under best-of-n (2112.09332, appendix I):
    the image of rank i of K is the best of C(i - 1, n - 1) of the C(K, n) subsets. Equal images share their chances.
    """
    total = _chances(len(proxy), tuple(sizes))
    _, level, equals = np.unique(proxy, return_inverse=True, return_counts=True)
    ends = np.cumsum(equals)
    return ((total[:, ends] - total[:, ends - equals]) / equals)[:, level]


@lru_cache
def _chances(count: int, sizes: tuple[int, ...]) -> np.ndarray:
    """That the best of n is among the i lowest of `count`, for i from 0: (S, count + 1)."""
    rank, n = np.arange(1, count + 1), np.asarray(sizes)[:, None]
    by_rank = np.where(rank >= n, np.exp(_log_binomial(rank - 1, n - 1) - _log_binomial(count, n)), 0.0)
    return np.pad(np.cumsum(by_rank, axis=1), ((0, 0), (1, 0)))


def _log_binomial(n: np.ndarray | int, k: np.ndarray) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(np.maximum(n - k, 0) + 1)


def fit(distance: ArrayLike, gain: ArrayLike, prompts: ArrayLike, form: Form) -> Fit:
    """Least squares of `gain` (N,) over the base model against `distance` (N,) = √KL.

    Raises:
        ValueError: there are no two distances above 0.
    """
    d, gain = np.asarray(distance, dtype=float), np.asarray(gain, dtype=float)
    if len(np.unique(d[d > 0])) < 2:
        raise ValueError("distance: alpha and beta take two distances above 0; measure at more of them")
    bend = d**2 if form == "best_of_n" else d * np.log(np.where(d > 0, d, 1.0))
    sums = np.stack([d**2, -d * bend, bend**2, d * gain, -bend * gain], axis=1)

    def of(part: int) -> Estimate:
        return estimate(sums, prompts, lambda totals: _solve(totals, form)[part])

    alpha, beta, peak, best = (of(part) for part in range(4))
    note = _undetermined(beta)
    if note:
        return Fit(form, alpha, beta, NOTHING, NOTHING, None, note)
    farthest = float(d.max())
    begins = peak.interval[0] if peak.interval else None
    if peak.value is not None and peak.value > farthest:
        note = f"the peak lies beyond the farthest distance measured, {farthest:.3g}; measure farther to be sure of it"
    return Fit(form, alpha, beta, peak, best, None if begins is None else min(begins, farthest), note)


def _solve(sums: np.ndarray, form: Form) -> tuple[np.ndarray, ...]:
    """α, β, the distance of the peak and the height there (R,), from the sums (R, 5) of the normal equations."""
    aa, ab, bb, ay, by = np.moveaxis(sums, -1, 0)
    determinant = aa * bb - ab**2
    alpha, beta = (bb * ay - ab * by) / determinant, (aa * by - ab * ay) / determinant
    peak = alpha / (2 * beta) if form == "best_of_n" else np.exp(alpha / beta - 1)
    peak = np.where(beta > 0, np.maximum(peak, 0.0), np.inf)
    best = alpha * peak / 2 if form == "best_of_n" else beta * peak
    return alpha, beta, peak, np.where(beta > 0, best, np.inf)


def _undetermined(beta: Estimate) -> str:
    """Why beta does not tell where gold peaks; empty if it does."""
    if beta.interval is None:
        return f"beta is not determined: {beta.note}"
    low, high = beta.interval
    if low <= 0 <= high:
        return (
            f"beta is not determined: its interval, {low:.3g} to {high:.3g}, holds 0; take more prompts, or go farther"
        )
    return "" if low > 0 else "beta is below 0: no sign of a peak within the distances measured"
