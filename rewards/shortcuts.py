"""Whether a reward follows what a picture looks like instead of what it shows.

A reward that brightness, saturation or JPEG blocks can raise will be raised so. Pictures are uint8 (H, W, 3).
"""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy.ndimage import laplace

from judges.probes import Probe
from rewards.metrics.correlation import partial_correlation
from rewards.metrics.intervals import Estimate, mean, prompt_means, share

if TYPE_CHECKING:
    from rewards.reward import Reward

_BLOCK = 8  # pixels: the side of a JPEG block
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True)
class Statistics:
    """What a picture looks like.

    Attributes:
        brightness: mean luma, 0 to 1; `contrast` is its standard deviation.
        saturation: mean saturation of HSV, 0 to 1.
        edges: mean size of the gradient of luma, per pixel.
        sharpness: variance of the Laplacian of luma.
        blockiness: luma steps across the borders of 8 x 8 blocks relative to those elsewhere, less 1; 0 for a picture
            that has no blocks, NaN for one without such borders.
        megapixels: its size.
    """

    brightness: float
    contrast: float
    saturation: float
    edges: float
    sharpness: float
    blockiness: float
    megapixels: float


NAMES = tuple(field.name for field in fields(Statistics))


@dataclass(frozen=True)
class Shortcut:
    """How a reward moves with one statistic within prompts: a correlation, and what is left of it given gold."""

    name: str
    correlation: Estimate
    given_gold: Estimate | None


@dataclass(frozen=True)
class Effect:
    """What a change of the picture or the prompt does to a reward.

    Attributes:
        expects: what it ought to do to it: leave it the `same`, or lower it (`no`).
        shift: mean change, in standard deviations of the reward among images of one prompt, or among all where no
            prompt has two.
        fell: the share of pictures whose reward fell, no change counting half.
    """

    name: str
    expects: str
    shift: Estimate
    fell: Estimate


def statistics(image: np.ndarray) -> Statistics:
    """Of one picture."""
    pixels = image / 255
    luma = pixels @ _LUMA
    highest, lowest = pixels.max(axis=-1), pixels.min(axis=-1)
    saturation = np.divide(highest - lowest, highest, out=np.zeros_like(highest), where=highest > 0)
    down, across = np.diff(luma, axis=0), np.diff(luma, axis=1)
    return Statistics(
        brightness=float(luma.mean()),
        contrast=float(luma.std()),
        saturation=float(saturation.mean()),
        edges=float(np.hypot(down[:, :-1], across[:-1]).mean()) if min(luma.shape) > 1 else 0.0,
        sharpness=float(laplace(luma).var()),
        blockiness=_blockiness(np.abs(down).mean(axis=1), np.abs(across).mean(axis=0)),
        megapixels=luma.size / 1e6,
    )


def _blockiness(*steps: np.ndarray) -> float:
    """From the mean steps between neighbouring rows, and between neighbouring columns."""
    at_border = [np.arange(1, len(step) + 1) % _BLOCK == 0 for step in steps]
    border = np.concatenate([step[place] for step, place in zip(steps, at_border, strict=True)])
    within = np.concatenate([step[~place] for step, place in zip(steps, at_border, strict=True)])
    if not len(border):
        return float("nan")
    return float(border.mean() / within.mean() - 1) if within.mean() > 0 else 0.0


def table(images: Iterable[np.ndarray]) -> np.ndarray:
    """The statistics (N, S) of pictures, in the order of `NAMES`."""
    return np.array([astuple(statistics(image)) for image in images], dtype=float).reshape(-1, len(NAMES))


def shortcuts(
    reward: ArrayLike,
    found: np.ndarray,
    prompts: ArrayLike,
    gold: ArrayLike | None = None,
    names: Sequence[str] = NAMES,
) -> tuple[Shortcut, ...]:
    """The correlations of a reward (N,) with statistics (N, S) within prompts, given `gold` (N,) if there is one.

    A reward may follow a statistic because better pictures have more of it; given gold it has no reason to.
    """
    return tuple(
        Shortcut(
            name,
            partial_correlation(reward, column, prompts),
            None if gold is None else partial_correlation(reward, column, prompts, [gold]),
        )
        for name, column in zip(names, found.T, strict=True)
    )


def effects(
    reward: "Reward", images: Sequence[np.ndarray], prompts: Sequence[str], probes: Sequence[Probe]
) -> tuple[Effect, ...]:
    """What each of `probes` that is for all pictures does to a reward, on the pictures to which it applies."""
    names = np.asarray(prompts)
    before = reward(images, prompts).values.astype(float)
    scale = spread(before, names) or np.nan
    found = []
    for probe in probes:
        if probe.tried_on != "all":
            continue
        shown = [probe.picture(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        asked = [probe.prompt(prompt, prompts) for prompt in prompts]
        rows = [row for row in range(len(images)) if shown[row] is not None and asked[row] is not None]
        after = reward([shown[row] for row in rows], [asked[row] for row in rows]).values
        change = after - before[rows]
        fell = (1 - np.sign(change)) / 2
        found.append(Effect(probe.name, probe.expects, mean(change / scale, names[rows]), share(fell, names[rows])))
    return tuple(found)


def spread(values: np.ndarray, prompts: np.ndarray) -> float:
    """Standard deviation within prompts, or over all where no prompt has two."""
    known = np.isfinite(values)
    means, found = prompt_means(values, prompts)
    within = values[known] - means[np.searchsorted(found, prompts[known])]
    freedom = known.sum() - len(found)
    return float(np.sqrt((within**2).sum() / freedom)) if freedom > 0 else float(np.nanstd(values))
