"""Numbers with 95 % intervals over prompts.

Images of one prompt share its difficulty, so they are no independent observations: every interval is a percentile
bootstrap of whole prompts (Efron & Tibshirani, An Introduction to the Bootstrap, chapter 13). A resample is how often
each of C prompts was drawn, and a statistic that is a function of sums over prompts is computed for all R resamples
by one matrix product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

LEAST_PROMPTS = 50
"""Of fewer prompts a percentile interval is too narrow to be shown."""

_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, and of how many values of how many `prompts` it is; what is not known is None."""

    value: float | None
    interval: tuple[float, float] | None
    count: int
    prompts: int

    @property
    def note(self) -> str:
        """Why there is no interval; empty where there is one."""
        if self.interval is not None:
            return ""
        if self.value is None:
            return "nothing to measure it on"
        if self.prompts < LEAST_PROMPTS:
            return f"no interval: {self.prompts} prompts, and it takes {LEAST_PROMPTS}"
        return "no interval: too many resamples leave it undefined"


NOTHING = Estimate(None, None, 0, 0)


def resample(
    statistic: Callable[[np.ndarray], np.ndarray], clusters: int, seed: int = 0, size: int | None = None
) -> np.ndarray:
    """The `statistic` of 2,000 resamples of `clusters`, drawn with replacement: (R, ...).

    Args:
        statistic: takes how often each cluster was drawn (R, C), gives one value or more for each resample (R, ...).
        size: how many are drawn; as many as there are by default.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return statistic(_drawn(clusters, seed, size or clusters).astype(float))


@lru_cache(maxsize=4)
def _drawn(clusters: int, seed: int, size: int) -> np.ndarray:
    """Drawing takes longer than all that is done with it, and many statistics are of the same prompts."""
    drawn = np.random.default_rng(seed).multinomial(size, np.full(clusters, 1 / clusters), size=_RESAMPLES)
    return drawn.astype(np.int16)


def estimate_of_draws(
    statistic: Callable[[np.ndarray], np.ndarray], clusters: int, count: int, least: int = LEAST_PROMPTS
) -> Estimate:
    """Any statistic of `count` values in `clusters` prompts, given as for `resample`.

    It has no interval for fewer than `least` prompts, nor for a single one, which tells nothing of others, nor where it
    is undefined in more than one resample of twenty.
    """
    if not clusters:
        return NOTHING
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = float(statistic(np.ones((1, clusters)))[0])
    if not np.isfinite(value):
        return Estimate(None, None, count, clusters)
    interval = _percentiles(resample(statistic, clusters)) if clusters >= max(least, 2) else None
    return Estimate(value, interval, count, clusters)


def estimate(
    columns: ArrayLike,
    prompts: ArrayLike,
    statistic: Callable[[np.ndarray], np.ndarray],
    least: int = LEAST_PROMPTS,
) -> Estimate:
    """A statistic of sums: means, ratios, moments, least squares.

    Args:
        columns: (N, M) what is summed; a row that is not finite is left out.
        prompts: (N,) what each row belongs to.
        statistic: from sums (R, M) to (R,).
        least: refuse an interval for fewer prompts.
    """
    columns, prompts = np.asarray(columns, dtype=float), np.asarray(prompts)
    known = np.isfinite(columns).all(axis=1)
    sums = prompt_sums(columns[known], prompts[known])
    return estimate_of_draws(lambda drawn: statistic(drawn @ sums), len(sums), int(known.sum()), least)


def prompt_sums(columns: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The sums (C, M) of `columns` (N, M) over each prompt, in the order of `np.unique`."""
    found, cluster = np.unique(prompts, return_inverse=True)
    return np.stack([np.bincount(cluster, column, len(found)) for column in columns.T], axis=1)


def prompt_means(values: ArrayLike, prompts: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The mean (C,) of the known values of each prompt that has any, and these prompts (C,)."""
    values, prompts = np.asarray(values, dtype=float), np.asarray(prompts)
    known = np.isfinite(values)
    sums = prompt_sums(np.stack([values[known], np.ones(known.sum())], axis=1), prompts[known])
    return sums[:, 0] / sums[:, 1], np.unique(prompts[known])


def groups(prompts: ArrayLike) -> tuple[np.ndarray, list[np.ndarray]]:
    """The prompts (C,) in order, and the places of each one's rows."""
    found, cluster, sizes = np.unique(np.asarray(prompts), return_inverse=True, return_counts=True)
    return found, np.split(np.argsort(cluster, kind="stable"), np.cumsum(sizes)[:-1]) if len(found) else []


def mean(values: ArrayLike, prompts: ArrayLike, least: int = LEAST_PROMPTS) -> Estimate:
    """The mean of the values (N,) that are not NaN, each counting the same ("micro")."""
    values = np.asarray(values, dtype=float)
    columns = np.stack([values, np.ones(len(values))], axis=1)
    return estimate(columns, prompts, lambda sums: sums[..., 0] / sums[..., 1], least)


def prompt_share(values: ArrayLike, prompts: ArrayLike, least: int = LEAST_PROMPTS) -> Estimate:
    """`share` with every prompt counting the same, whatever its number of values ("macro")."""
    values = np.asarray(values, dtype=float)
    means, found = prompt_means(values, prompts)
    overall = share(means, found, least)
    return Estimate(overall.value, overall.interval, int(np.isfinite(values).sum()), len(found))


def share(values: ArrayLike, prompts: ArrayLike, least: int = LEAST_PROMPTS) -> Estimate:
    """`mean` for values between 0 and 1.

    Where it is 0 or 1, a resample never differs, and an interval without width would claim certainty; it is Wilson's
    then, as if each prompt were one trial.
    """
    found = mean(values, prompts, least)
    if found.value is None:
        return found
    interval = found.interval
    if found.value in (0.0, 1.0) and found.prompts >= least:
        interval = wilson_interval(int(found.value) * found.prompts, found.prompts)
    bounded = interval and (max(0.0, interval[0]), min(1.0, interval[1]))
    return Estimate(found.value, bounded, found.count, found.prompts)


def standard_error(values: ArrayLike, prompts: ArrayLike, least: int = LEAST_PROMPTS) -> float | None:
    """Of `mean`, the images of a prompt being no independent witnesses (2411.00640, section 2.2); None for fewer than
    `least` prompts."""
    values = np.asarray(values, dtype=float)
    known = np.isfinite(values)
    found, cluster = np.unique(np.asarray(prompts)[known], return_inverse=True)
    if len(found) < max(least, 2):
        return None
    apart = np.bincount(cluster, values[known] - values[known].mean())
    return float(np.sqrt((apart**2).sum() * len(found) / (len(found) - 1)) / known.sum())


def linearised(values: np.ndarray, side: np.ndarray, statistic: float, weight: float) -> np.ndarray:
    """Values with the mean `statistic`, which moves by `weight` times the mean of `values` on each of two sides.

    They vary as the statistic does (Cochran, Sampling Techniques, 3rd ed., chapter 9A), and are defined in resamples
    that miss a side.
    """
    linear = np.full(len(values), statistic)
    for part in (side, ~side):
        linear[part] += weight * len(values) / part.sum() * (values[part] - values[part].mean())
    return linear


def clustered_interval(
    values: ArrayLike, clusters: ArrayLike, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The interval of `mean` for any number of clusters, (NaN, NaN) for none.

    Args:
        clusters: (N,) what each value belongs to, its prompt id.
    """
    values, clusters = np.asarray(values, dtype=float), np.asarray(clusters)
    known = np.isfinite(values)
    if not known.any():
        return float("nan"), float("nan")
    sums = prompt_sums(np.stack([values[known], np.ones(known.sum())], axis=1), clusters[known])

    def means(drawn: np.ndarray) -> np.ndarray:
        sum_, size = (drawn @ sums).T
        return sum_ / size

    low, high = np.quantile(resample(means, len(sums), seed), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion of independent trials (JASA 22, 1927)."""
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def halves(prompts: ArrayLike, seed: int = 0) -> np.ndarray:
    """Whether each row (N,) belongs to the first half of the prompts, drawn at random: what is fitted on one half may
    be tried on the other."""
    found, cluster = np.unique(np.asarray(prompts), return_inverse=True)
    return np.random.default_rng(seed).permutation(len(found))[cluster] < len(found) / 2


def _percentiles(values: np.ndarray) -> tuple[float, float] | None:
    known = values[~np.isnan(values)]
    if len(known) < 0.95 * len(values):
        return None
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(known, [0.025, 0.975])
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None
