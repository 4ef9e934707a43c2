"""Signals that a reward is being gamed, for a run of fine-tuning to warn, stop and roll back by.

Each signal is a number that grows with the trouble, and a threshold that the base model itself would seldom exceed:
both sides of a comparison are drawn anew from the base model's prompts, as many as there are, and in one draw of a
hundred at most any of the signals that can stop a run is beyond its threshold (Bonferroni). The base model must have
been seen on at least 50 prompts, otherwise a signal is `unknown`.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rewards.metrics.correlation import moments
from rewards.metrics.intervals import LEAST_PROMPTS, groups, prompt_means, resample
from rewards.shortcuts import NAMES

LEAST_FOLLOWED = 0.5
"""Of a rise of the reward the judge is expected to follow at least this share, in standard deviations."""

STOPPING = ("heldout_gap", "judge_divergence", "diversity_loss", "kl_frontier")
"""What can stop a run. The other signals warn: better pictures have other pixels too, and siblings that disagree are no
trouble as long as the judge rises with the reward."""

QUANTILE = 1 - 0.01 / len(STOPPING)
"""Of the draws of a signal from the base model: its threshold."""

Status = Literal["ok", "alarm", "unknown"]


@dataclass(frozen=True)
class Signal:
    """An `alarm` where `value` is above `threshold`, `unknown` where either cannot be had (NaN)."""

    name: str
    value: float
    threshold: float
    status: Status


@dataclass(frozen=True)
class Measured:
    """Values (N,) of images and what prompt each belongs to (N,); NaN is left out."""

    values: np.ndarray
    prompts: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """Of each prompt (C,)."""
        return prompt_means(self.values, self.prompts)[0]


@dataclass(frozen=True)
class Action:
    """What to do after the last check; `roll_back_to` is the number of the last check before the trouble, None where
    there was none."""

    kind: Literal["go_on", "warn", "stop"]
    alarms: tuple[str, ...]
    roll_back_to: int | None


def heldout_gap(
    rollout: Measured,
    heldout: Measured,
    base_rollout: Measured,
    base_heldout: Measured,
) -> Signal:
    """By how much more the reward rose on the prompts of the rollouts than on prompts that are held out.

    All four are the reward's; the last two are of the base model.
    """
    sides = [(one.means, base.means) for one, base in ((rollout, base_rollout), (heldout, base_heldout))]
    value = _rise(*sides[0]) - _rise(*sides[1])
    null = _null_rise(sides[0], 0) - _null_rise(sides[1], 2)
    return _signal("heldout_gap", value, null, *(base for _, base in sides))


def judge_divergence(reward: Measured, judge: Measured, base_reward: Measured, base_judge: Measured) -> Signal:
    """By how much the judge stays behind what the reward's rise lets expect of it on the same images, in standard
    deviations of the base model's images.

    Expected is the regression of judge on reward over these: of a reward that knows the judge with correlation r, the
    judge follows a rise by r times as many standard deviations, and an honest run should not be blamed for the rest. A
    reward with a lower correlation than `LEAST_FOLLOWED` is not excused by it.
    """
    of_base = _standardised(base_reward, base_reward), _standardised(base_judge, base_judge)
    slope = max(LEAST_FOLLOWED, float(np.nanmean(of_base[0] * of_base[1])))
    apart = slope * _standardised(reward, base_reward) - _standardised(judge, base_judge)
    means = Measured(apart, reward.prompts).means
    base = Measured(slope * of_base[0] - of_base[1], base_reward.prompts).means
    return _signal("judge_divergence", _rise(means, base), _null_rise((means, base), 0), base)


def judge_disagreement(reward: Measured, judge: Measured, base_reward: Measured, base_judge: Measured) -> Signal:
    """Half the mean square difference of reward and judge among siblings, both in standard deviations of the base
    model's siblings.

    Of the base model itself it is one minus their correlation. A correlation would also fall when siblings become
    equally good, as there is less to order among them then.
    """
    scale, judged = (np.sqrt(np.nanmean(_squares(one.values, one.prompts))) for one in (base_reward, base_judge))

    def apart(first: Measured, second: Measured) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            gaps = first.values / scale - second.values / judged
        return Measured(_squares(gaps, first.prompts) / 2, first.prompts).means

    means, base = apart(reward, judge), apart(base_reward, base_judge)
    value = float(means.mean()) if len(means) else math.nan
    return _signal("judge_disagreement", value, _draws(base, len(means), 0), base)


def diversity_loss(images: ArrayLike, prompts: ArrayLike, base_images: ArrayLike, base_prompts: ArrayLike) -> Signal:
    """By what share the images of a prompt have come closer to one another.

    Args:
        images: (N, ...) pictures or features of them, siblings having the same of `prompts` (N,).
    """
    apart, base = distances(images, prompts), distances(base_images, base_prompts)
    value = 1 - apart.mean() / base.mean() if len(apart) and len(base) else np.nan
    null = 1 - _draws(base, len(apart), 0) / _draws(base, len(base), 1)
    return _signal("diversity_loss", value, null, base)


def distances(images: ArrayLike, prompts: ArrayLike) -> np.ndarray:
    """The root mean square distance (C,) of two siblings, per dimension; prompts with a single image have none."""
    flat = np.asarray(images, dtype=np.float32).reshape(len(images), -1)
    _, places = groups(prompts)
    # The mean square distance of two of K is twice their variance with K - 1 degrees of freedom.
    spread = [2 * flat[rows].var(axis=0, ddof=1, dtype=float).mean() for rows in places if len(rows) > 1]
    return np.sqrt(np.array(spread, dtype=float))


def pixel_shifts(
    found: np.ndarray,
    prompts: ArrayLike,
    base_found: np.ndarray,
    base_prompts: ArrayLike,
    names: Sequence[str] = NAMES,
) -> tuple[Signal, ...]:
    """How far the mean of each statistic has moved either way, in standard deviations of the base model's prompts.

    Args:
        found: (N, S) from `rewards.shortcuts.table`; `base_found` likewise. What does not vary is passed over.
    """
    signals = []
    for name, column, base_column in zip(names, found.T, base_found.T, strict=True):
        means = Measured(column, np.asarray(prompts)).means
        base = Measured(base_column, np.asarray(base_prompts)).means
        spread = base.std() if len(base) else 0.0
        if spread > 1e-9 * np.abs(base).max(initial=0):
            null = np.abs(_null_rise((means, base), 0)) / spread
            signals.append(_signal(name, abs(_rise(means, base)) / spread, null, base))
    return tuple(signals)


def kl_frontier(kl: ArrayLike, reward: ArrayLike, prompts: int, base: Measured) -> Signal:
    """By how much the last check falls behind the best reward that an earlier one had at no greater KL.

    Args:
        kl: (T,) from the base model at each check, in any unit.
        reward: (T,) mean of a reward that is not trained on (the judge's, or gold) on held-out prompts, NaN where it is
            not known.
        prompts: how many prompts each check is on.
        base: the same reward of the base model's images.
    """
    kl, reward = np.asarray(kl, dtype=float), np.asarray(reward, dtype=float)
    earlier = reward[:-1][(kl[:-1] <= kl[-1]) & np.isfinite(reward[:-1])]
    means = base.means
    if not len(earlier):
        return Signal("kl_frontier", float("nan"), float("nan"), "unknown")
    best = np.max([_draws(means, prompts, check) for check in range(len(earlier))], axis=0)
    null = best - _draws(means, prompts, len(earlier))
    return _signal("kl_frontier", float(earlier.max() - reward[-1]), null, means)


def frontier(kl: ArrayLike, reward: ArrayLike) -> np.ndarray:
    """The checks (F,) that no other beats in both KL and reward, by rising KL: where to roll back to."""
    kl, reward = np.asarray(kl, dtype=float), np.asarray(reward, dtype=float)
    order = np.lexsort((-reward, kl))
    best = np.maximum.accumulate(reward[order])
    return order[np.diff(best, prepend=-np.inf) > 0]


def act(history: Sequence[Sequence[Signal]], patience: int = 2, stopping: Collection[str] = STOPPING) -> Action:
    """Warn at an alarm; stop when one signal of `stopping` has raised it in each of the last `patience` checks, and say
    where to go back to.

    Args:
        history: the signals of every check so far, the first being number 0.
    """
    raised = [{signal.name for signal in check if signal.status == "alarm"} for check in history]
    if not raised or not raised[-1]:
        return Action("go_on", (), None)
    lasting = set.intersection(*raised[-patience:]) & set(stopping) if len(raised) >= patience else set()
    if not lasting:
        return Action("warn", tuple(sorted(raised[-1])), None)
    calm = [check for check, names in enumerate(raised) if not names & lasting]
    return Action("stop", tuple(sorted(lasting)), calm[-1] if calm else None)


def _signal(name: str, value: float, null: np.ndarray, *bases: np.ndarray) -> Signal:
    if not np.isfinite(value) or min(len(base) for base in bases) < LEAST_PROMPTS:
        return Signal(name, float(value), float("nan"), "unknown")
    threshold = float(np.nanquantile(null, QUANTILE))
    return Signal(name, float(value), threshold, "alarm" if value > threshold else "ok")


def _rise(means: np.ndarray, base: np.ndarray) -> float:
    return float(means.mean() - base.mean()) if len(means) and len(base) else float("nan")


def _null_rise(side: tuple[np.ndarray, np.ndarray], seed: int) -> np.ndarray:
    """The rises (R,) of a model that is the base model itself, from the means of the prompts of both."""
    means, base = side
    return _draws(base, len(means), seed) - _draws(base, len(base), seed + 1)


def _draws(means: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The mean (R,) of `size` prompts of the base model, drawn with replacement."""
    if not len(means) or not size:
        return np.array([np.nan])
    return resample(lambda drawn: drawn @ means / size, len(means), seed, size)


def _standardised(measured: Measured, base: Measured) -> np.ndarray:
    return (measured.values - np.nanmean(base.values)) / np.nanstd(base.values)


def _squares(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Of what each image (N,) is above or below its siblings."""
    return moments(values, values, prompts)[:, 0]
