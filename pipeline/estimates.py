"""Numbers on verdicts with 95 % intervals over prompts.

Every interval is that of `rewards.metrics`, a bootstrap of whole prompts. A statistic that is no mean is given as the
mean of its linearised values, one a picture, which vary as it does.

Arrays have one entry a picture (N,): `margin` in nats, NaN without a verdict; `truth` the probability that it follows
its prompt; `prompts` what it belongs to. What cannot be known is None.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from judges.pairwise import fit_temperature
from rewards.metrics import intervals
from rewards.metrics.correlation import auc
from rewards.metrics.intervals import NOTHING, Estimate, linearised
from rewards.metrics.probabilities import Bin, ece_estimate, reliability, temperature_estimate

LEAST = 1
"""People label few pictures, so an interval of few prompts is shown for what it is worth."""


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
    """The mean of the values that are not NaN."""
    return intervals.mean(values, prompts, LEAST)


def share(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """`mean` for values between 0 and 1."""
    return intervals.share(values, prompts, LEAST)


def accuracy(margin: np.ndarray, truth: np.ndarray, prompts: np.ndarray) -> Accuracy:
    """How often "yes", a positive margin, is right. Left out are pictures without a verdict or with a torn truth."""
    known = np.isfinite(margin) & (truth != 0.5)
    margin, follows, prompts = margin[known], truth[known] > 0.5, prompts[known]
    right = ((margin > 0) == follows).astype(float)
    balanced = np.full(len(margin), np.nan)
    if follows.any() and not follows.all():
        balanced = linearised(right, follows, (right[follows].mean() + right[~follows].mean()) / 2, weight=0.5)
    return Accuracy(
        balanced=share(balanced, prompts),
        plain=share(right, prompts),
        follow=share(np.where(follows, right, np.nan), prompts),
        stray=share(np.where(follows, np.nan, right), prompts),
        auc=auc(margin, follows, prompts, LEAST),
    )


def rise(before: np.ndarray, after: np.ndarray, truth: np.ndarray, prompts: np.ndarray) -> Estimate:
    """By how much balanced accuracy rose from the margins `before` to those `after`, on the same pictures."""
    known = np.isfinite(before) & np.isfinite(after) & (truth != 0.5)
    follows, prompts = truth[known] > 0.5, prompts[known]
    right = [((margin[known] > 0) == follows).astype(float) for margin in (before, after)]
    if follows.all() or not follows.any():
        return NOTHING
    change = right[1] - right[0]
    balanced = (change[follows].mean() + change[~follows].mean()) / 2
    return mean(linearised(change, follows, balanced, weight=0.5), prompts)


def calibration(margin: np.ndarray, truth: np.ndarray, prompts: np.ndarray) -> Calibration:
    """Probabilities, the sigmoids of the margins, against the truth; pictures without a verdict are left out."""
    known = np.isfinite(margin)
    margin, truth, prompts = margin[known], truth[known], prompts[known]
    found = scaled = NOTHING
    try:
        temperature, note = fit_temperature(margin, truth), ""
        found = temperature_estimate(margin, truth, prompts, temperature, LEAST)
        scaled = ece_estimate(expit(margin / temperature), truth, prompts, LEAST)
    except ValueError as error:
        note = str(error)
    return Calibration(
        ece=ece_estimate(expit(margin), truth, prompts, LEAST),
        temperature=found,
        scaled_ece=scaled,
        note=note,
        reliability=tuple(reliability(expit(margin), truth)),
    )
