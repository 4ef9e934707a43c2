"""How a reward moves with another score, within the images of a prompt and over all images.

N images, each with its prompt; images without both scores are left out.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from rewards.metrics.intervals import (
    LEAST_PROMPTS,
    NOTHING,
    Estimate,
    estimate,
    estimate_of_draws,
    linearised,
    mean,
    share,
)

_ROWS = 256
"""So many images are compared with all at once, and so many resamples ranked: what keeps memory small."""


def spearman(x: ArrayLike, y: ArrayLike, prompts: ArrayLike) -> Estimate:
    """The mean over prompts of each one's rank correlation; prompts in which a score is constant have none."""
    x, y, prompts = _known(x, y, prompts)
    first, second = siblings(prompts)

    def ranks(score: np.ndarray) -> np.ndarray:
        return np.bincount(first, np.sign(score[first] - score[second]), len(score))

    rank_x, rank_y = ranks(x), ranks(y)  # centred within their prompt
    return _mean_ratio(rank_x * rank_y, rank_x**2, rank_y**2, prompts)


def kendall(x: ArrayLike, y: ArrayLike, prompts: ArrayLike) -> Estimate:
    """The mean over prompts of each one's Kendall τ_b; prompts in which a score is constant have none."""
    x, y, prompts = _known(x, y, prompts)
    first, second = siblings(prompts)
    sign_x, sign_y = (np.sign(score[first] - score[second]) for score in (x, y))
    return _mean_ratio(sign_x * sign_y, sign_x**2, sign_y**2, prompts[first])


def pooled_spearman(x: ArrayLike, y: ArrayLike, prompts: ArrayLike) -> Estimate:
    """The rank correlation of all images; it also rewards telling easy prompts from hard ones."""
    x, y, prompts = _known(x, y, prompts)
    found, cluster = np.unique(prompts, return_inverse=True)

    def statistic(drawn: np.ndarray) -> np.ndarray:
        parts = np.array_split(drawn, -(-len(drawn) // _ROWS))
        return np.concatenate([_weighted_spearman(x, y, part[:, cluster]) for part in parts])

    return estimate_of_draws(statistic, len(found), len(x))


def pooled_kendall(x: ArrayLike, y: ArrayLike, prompts: ArrayLike) -> Estimate:
    """Kendall's τ_b of all images. Time grows with N²; the interval is that of its projection on single images
    (Hájek), whose means τ_b is a ratio of."""
    x, y, prompts = _known(x, y, prompts)
    count = len(x)
    if count < 2:
        return NOTHING
    compared = np.empty((count, 3))
    rank_x, rank_y = (rankdata(score).astype(np.float32) for score in (x, y))
    for start in range(0, count, _ROWS):
        rows = slice(start, start + _ROWS)
        sign_x, sign_y = (np.sign(rank[rows, None] - rank) for rank in (rank_x, rank_y))
        compared[rows, 0] = np.einsum("ij,ij->i", sign_x, sign_y)
    for place, score in enumerate((x, y), 1):
        _, level, equals = np.unique(score, return_inverse=True, return_counts=True)
        compared[:, place] = count - equals[level]
    whole = compared.mean(axis=0)

    def statistic(sums: np.ndarray) -> np.ndarray:
        both, x_alone, y_alone = np.moveaxis(2 * sums[..., 1:] / sums[..., :1] - whole, -1, 0)
        return both / np.sqrt(x_alone * y_alone)

    return estimate(np.concatenate([np.ones((count, 1)), compared], axis=1), prompts, statistic)


def partial_correlation(x: ArrayLike, y: ArrayLike, prompts: ArrayLike, given: Sequence[ArrayLike] = ()) -> Estimate:
    """Pearson's correlation of x and y within prompts, what both share with `given` scores taken out.

    Scores are taken relative to their mean over the prompt, so that what a prompt asks for does not confound.
    """
    return estimate(moments(x, y, prompts, given), prompts, correlation_of_moments)


def moments(x: ArrayLike, y: ArrayLike, prompts: ArrayLike, given: Sequence[ArrayLike] = ()) -> np.ndarray:
    """The products (N, S²) of S scores, each relative to its mean over the prompt; NaN where one is not known."""
    scores = np.stack([np.asarray(score, dtype=float) for score in (x, y, *given)], axis=1)  # (N, S)
    known = np.isfinite(scores).all(axis=1)
    centred = np.full_like(scores, np.nan)
    _, cluster = np.unique(np.asarray(prompts)[known], return_inverse=True)
    size = np.bincount(cluster)
    for place, column in enumerate(scores[known].T):
        relative = column - (np.bincount(cluster, column) / size)[cluster]
        relative[size[cluster] == 1] = np.nan  # an image without siblings tells nothing
        # What rounding leaves of a constant is no variation.
        centred[known, place] = np.where(np.abs(relative) <= 1e-12 * np.abs(column), 0.0, relative)
    return (centred[:, :, None] * centred[:, None, :]).reshape(len(scores), -1)


def correlation_of_moments(sums: np.ndarray) -> np.ndarray:
    """The partial correlation (R,) of the first two of S scores, from the sums (R, S²) of their `moments`."""
    size = round(sums.shape[-1] ** 0.5)
    covariance = sums.reshape(*sums.shape[:-1], size, size)
    scale = np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1))
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = covariance / (scale[..., :, None] * scale[..., None, :])
    found = np.full(scaled.shape[:-2], np.nan)
    defined = np.isfinite(scaled).all(axis=(-2, -1))
    known = scaled[defined]
    both, shared, given = known[:, :2, :2], known[:, :2, 2:], known[:, 2:, 2:]
    left = both - shared @ np.linalg.pinv(given, hermitian=True) @ shared.swapaxes(-2, -1)
    # Of a score that the given ones determine, rounding alone is left.
    variance = np.diagonal(left, axis1=-2, axis2=-1)
    variance = np.where(variance > 1e-10, variance, np.nan)
    found[defined] = left[:, 0, 1] / np.sqrt(variance.prod(axis=-1))
    return found


def auc(score: ArrayLike, positive: ArrayLike, prompts: ArrayLike, least: int = LEAST_PROMPTS) -> Estimate:
    """The probability that the score of a positive is above that of a negative, ties counting half."""
    score, positive, prompts = np.asarray(score, dtype=float), np.asarray(positive, dtype=bool), np.asarray(prompts)
    if positive.all() or not positive.any():
        return NOTHING
    above = _placements(score, positive)
    return share(linearised(above, positive, above[positive].mean(), weight=1.0), prompts, least)


def siblings(prompts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both places of every ordered pair of two images of one prompt."""
    order = np.argsort(prompts, kind="stable")
    _, start, size = np.unique(prompts[order], return_index=True, return_counts=True)
    first = np.repeat(np.arange(len(order)), np.repeat(size, size))
    offset = np.arange(len(first)) - np.repeat(np.cumsum(size**2) - size**2, size**2)
    second = np.repeat(start, size**2) + offset % np.repeat(size, size**2)
    other = first != second
    return order[first[other]], order[second[other]]


def _known(x: ArrayLike, y: ArrayLike, prompts: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, prompts = np.asarray(x, dtype=float), np.asarray(y, dtype=float), np.asarray(prompts)
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known], prompts[known]


def _mean_ratio(both: np.ndarray, x_alone: np.ndarray, y_alone: np.ndarray, prompts: np.ndarray) -> Estimate:
    """The mean over prompts of Σ both / √(Σ x_alone · Σ y_alone)."""
    found, cluster = np.unique(prompts, return_inverse=True)
    product, square_x, square_y = (np.bincount(cluster, part, len(found)) for part in (both, x_alone, y_alone))
    scale = np.sqrt(square_x * square_y)
    return mean(np.divide(product, scale, out=np.full(len(found), np.nan), where=scale > 0), found)


def _weighted_spearman(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The rank correlation (R,) of images each of which stands `weights` (R, N) times."""
    total = weights.sum(axis=1, keepdims=True)
    first, second = (_midranks(score, weights) - total / 2 for score in (x, y))
    product, square_x, square_y = ((weights * part).sum(axis=1) for part in (first * second, first**2, second**2))
    return product / np.sqrt(square_x * square_y)


def _midranks(score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How many stand below each image, those beside it counting half: (R, N)."""
    _, level = np.unique(score, return_inverse=True)
    order = np.argsort(level, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(level[order])), len(order) - 1)
    below = np.pad(np.cumsum(weights[:, order], axis=1)[:, ends], ((0, 0), (1, 0)))
    return ((below[:, 1:] + below[:, :-1]) / 2)[:, level]


def _placements(score: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """For each value the share of the other side that it is on the right side of, ties counting half; their mean on
    either side is the AUC (DeLong et al., Biometrics 44, 1988)."""
    placed = np.empty(len(score))
    for part, sign in ((positive, 1), (~positive, -1)):
        below = rankdata(sign * score)[part] - rankdata(sign * score[part])
        placed[part] = below / (~part).sum()
    return placed
