"""Numbers on verdicts with 95 % intervals over prompts.

Pictures of one prompt are no independent witnesses, so every interval is `rewards.metrics.clustered_interval`, a
bootstrap of whole prompts. It is one of means; a statistic that is none is given as the mean of its linearised values,
one a picture, which vary as it does (Cochran, Sampling Techniques, 3rd ed., chapter 9A).

Arrays have one entry a picture (N,): `margin` in nats, NaN without a verdict; `truth` the probability that it follows
its prompt; `prompts` what it belongs to. What cannot be known is None.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import rankdata

from judges.pairwise import fit_temperature
from rewards.metrics import Bin, clustered_interval, reliability, wilson_interval

BINS = 10


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, and of how many values of how many `prompts` it is."""

    value: float | None
    interval: tuple[float, float] | None
    count: int
    prompts: int


@dataclass(frozen=True)
class Accuracy:
    """How often a judge is right on pictures of which the truth is certain.

    Attributes:
        balanced: the mean of `follow` and `stray`: 0.5 for one that always says the same.
        plain: the share of right verdicts.
        follow: that share among pictures that follow their prompt.
        stray: that share among those that do not.
        auc: the probability that a picture that follows has a higher margin than one that does not.
    """

    balanced: Estimate
    plain: Estimate
    follow: Estimate
    stray: Estimate
    auc: Estimate


@dataclass(frozen=True)
class Calibration:
    """Whether a judge's probabilities can be taken at their word.

    Attributes:
        ece: expected calibration error.
        temperature: the T for which sigmoid(margin / T) fits the truth best; None where none does.
        scaled_ece: what the error would be with it.
        note: why there is no temperature.
        reliability: predicted against observed.
    """

    ece: Estimate
    temperature: Estimate
    scaled_ece: Estimate
    note: str
    reliability: tuple[Bin, ...]


def mean(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """The mean of the values that are not NaN. A single prompt tells nothing of others, so it has no interval."""
    known = np.isfinite(values)
    count, clusters = int(known.sum()), len(np.unique(prompts[known]))
    if not count:
        return Estimate(None, None, 0, 0)
    interval = clustered_interval(values, prompts) if clusters > 1 else None
    return Estimate(float(values[known].mean()), interval, count, clusters)


def share(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """`mean` for values between 0 and 1.

    Where it is 0 or 1, a resample never differs, and an interval without width would claim certainty; it is Wilson's
    then, as if each prompt were one trial.
    """
    found = mean(values, prompts)
    if found.value is None:
        return found
    interval = found.interval
    if found.value in (0.0, 1.0):
        interval = wilson_interval(int(found.value) * found.prompts, found.prompts)
    bounded = interval and (max(0.0, interval[0]), min(1.0, interval[1]))
    return Estimate(found.value, bounded, found.count, found.prompts)


def accuracy(margin: np.ndarray, truth: np.ndarray, prompts: np.ndarray) -> Accuracy:
    """How often "yes", a positive margin, is right. Left out are pictures without a verdict or with a torn truth."""
    known = np.isfinite(margin) & (truth != 0.5)
    margin, follows, prompts = margin[known], truth[known] > 0.5, prompts[known]
    right = ((margin > 0) == follows).astype(float)
    balanced = auc = np.full(len(margin), np.nan)
    if follows.any() and not follows.all():
        above = _placements(margin, follows)
        balanced = _linearised(right, follows, (right[follows].mean() + right[~follows].mean()) / 2, weight=0.5)
        auc = _linearised(above, follows, above[follows].mean(), weight=1.0)
    return Accuracy(
        balanced=share(balanced, prompts),
        plain=share(right, prompts),
        follow=share(np.where(follows, right, np.nan), prompts),
        stray=share(np.where(follows, np.nan, right), prompts),
        auc=share(auc, prompts),
    )


def rise(before: np.ndarray, after: np.ndarray, truth: np.ndarray, prompts: np.ndarray) -> Estimate:
    """By how much balanced accuracy rose from the margins `before` to those `after`, on the same pictures."""
    known = np.isfinite(before) & np.isfinite(after) & (truth != 0.5)
    follows, prompts = truth[known] > 0.5, prompts[known]
    right = [((margin[known] > 0) == follows).astype(float) for margin in (before, after)]
    if follows.all() or not follows.any():
        return Estimate(None, None, 0, 0)
    change = right[1] - right[0]
    balanced = (change[follows].mean() + change[~follows].mean()) / 2
    return mean(_linearised(change, follows, balanced, weight=0.5), prompts)


def _linearised(values: np.ndarray, side: np.ndarray, statistic: float, weight: float) -> np.ndarray:
    """Values with the mean `statistic`, which moves by `weight` times the mean of `values` on each of two sides."""
    linear = np.full(len(values), statistic)
    for part in (side, ~side):
        linear[part] += weight * len(values) / part.sum() * (values[part] - values[part].mean())
    return linear


def _placements(margin: np.ndarray, follows: np.ndarray) -> np.ndarray:
    """For each picture the share of the other side that its margin is on the right side of, ties counting half; their
    mean on either side is the AUC (DeLong et al., Biometrics 44, 1988)."""
    placed = np.empty(len(margin))
    for part, sign in ((follows, 1), (~follows, -1)):
        below = rankdata(sign * margin)[part] - rankdata(sign * margin[part])
        placed[part] = below / (~part).sum()
    return placed


def calibration(margin: np.ndarray, truth: np.ndarray, prompts: np.ndarray) -> Calibration:
    """Probabilities, the sigmoids of the margins, against the truth; pictures without a verdict are left out."""
    known = np.isfinite(margin)
    margin, truth, prompts = margin[known], truth[known], prompts[known]
    unknown = Estimate(None, None, 0, 0)
    try:
        temperature, note = fit_temperature(margin, truth), ""
    except ValueError as error:
        temperature, note = None, str(error)
    return Calibration(
        ece=_ece(expit(margin), truth, prompts),
        temperature=unknown if temperature is None else _temperature(margin, truth, prompts, temperature),
        scaled_ece=unknown if temperature is None else _ece(expit(margin / temperature), truth, prompts),
        note=note,
        reliability=tuple(reliability(expit(margin), truth, BINS)),
    )


def _ece(probability: np.ndarray, truth: np.ndarray, prompts: np.ndarray) -> Estimate:
    """`rewards.metrics.ece` as a mean: each gap has the sign of its bin's."""
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    gap = probability - truth
    return share(np.sign(np.bincount(place, gap, BINS))[place] * gap, prompts)


def _temperature(margin: np.ndarray, truth: np.ndarray, prompts: np.ndarray, fitted: float) -> Estimate:
    """The interval is that of 1/T, whose estimating equation is the likelihood's; None where that reaches 0."""
    p = expit(margin / fitted)
    scores, information = margin * (truth - p), float(np.mean(margin**2 * p * (1 - p)))
    found = mean(1 / fitted + scores / information, prompts)
    bounded = found.interval is not None and found.interval[0] > 0
    interval = (1 / found.interval[1], 1 / found.interval[0]) if bounded and found.interval else None
    return Estimate(fitted, interval, found.count, found.prompts)
