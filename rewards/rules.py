"""A reward that is computed of the picture alone."""

from collections.abc import Sequence

import numpy as np

from rewards.reward import Rewards
from rewards.shortcuts import NAMES, table


class RuleReward:
    """A statistic of the picture itself (see `rewards.shortcuts.Statistics`): a penalty, with a negative weight.

    With bounds it is the distance of the statistic from [`low`, `high`], 0 within. A statistic that a picture does not
    have is not valid.

    Raises:
        ValueError: there is no such statistic; the message starts with `name`.
    """

    def __init__(self, name: str, low: float | None = None, high: float | None = None):
        if name not in NAMES:
            raise ValueError(f"name: {name!r} is none of {', '.join(NAMES)}")
        self.place = NAMES.index(name)
        self.low, self.high = low, high

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Rewards:
        values = table(images)[:, self.place]
        if self.low is None and self.high is None:
            return Rewards.of(values)
        return Rewards.of(np.abs(values - np.clip(values, self.low, self.high)))
