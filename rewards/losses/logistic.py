"""Preferences whose log-odds are differences of rewards: Bradley-Terry, and its two extensions by ties."""

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import logsigmoid

from rewards.losses.base import (
    Likelihood,
    Scores,
    both,
    check_not_negative,
    check_one_of,
    check_positive,
    cross_entropy,
    three_columns,
)


@dataclass(frozen=True, kw_only=True)
class BradleyTerry(Likelihood):
    """P(a better) = sigmoid(r_a - r_b) (Bradley & Terry, Biometrika 39, 1952).

    With hard labels the loss of ImageReward (2304.05977, section 2.3), with soft ones that of RLAIF.

    Attributes:
        margin: nats by which the better image of a decided pair has to win before it counts as that likely (Llama 2,
            2307.09288, eq. 2); it shrinks with |2p - 1| to nothing for a tie. No part of `probability`.
    """

    type: Literal["bradley_terry"] = "bradley_terry"
    margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("margin", self.margin)

    def log_outcomes(self, a: Scores, b: Scores, free: nn.ParameterDict | None = None) -> Tensor:
        return both(logsigmoid, a.mean - b.mean)

    def per_pair(
        self, a: Scores, b: Scores, target: Tensor, free: nn.ParameterDict | None, generator: Generator | None
    ) -> Tensor:
        labels = self.labels(target)
        margin = (self.margin * (labels[:, 0] - labels[:, 1]).abs()).unsqueeze(1)
        difference = torch.stack([a.mean - b.mean, b.mean - a.mean], dim=1)
        return cross_entropy(logsigmoid(difference - margin), self.smoothed(labels))


@dataclass(frozen=True, kw_only=True)
class Tied(Likelihood):
    """What the two models with ties share: a positive tie parameter, learned as its logarithm.

    Attributes:
        tie: the parameter, or where it starts; at 0 there would be no ties.
        learn: False leaves it where it is.
        reading: what a soft label p says of ties. `band`: those within `band` of 0.5 are ties, all others (p, 0, 1-p).
            `half`: p is P(a) + P(tie) / 2 with all the tie there is room for, 1 - |2p - 1|.
        band: half the width of that band; 0 takes exact 0.5 alone.
    """

    tie: float
    learn: bool = True
    reading: Literal["band", "half"] = "band"
    band: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tie", self.tie)
        check_one_of("reading", self.reading, ("band", "half"))
        if not 0 <= self.band < 0.5:
            raise ValueError(f"band: {self.band} is not from 0 to below 0.5")

    def parameters(self) -> nn.ParameterDict:
        start = {"log_tie": nn.Parameter(torch.tensor(math.log(self.tie)))} if self.learn else {}
        return nn.ParameterDict(start)

    def fitted(self, free: nn.ParameterDict) -> Self:
        return replace(self, tie=free["log_tie"].exp().item()) if self.learn else self

    def labels(self, target: Tensor) -> Tensor:
        if target.ndim > 1:
            return three_columns(target)
        if self.reading == "half":
            win, lose = (2 * target - 1).clamp(min=0), (1 - 2 * target).clamp(min=0)
            return torch.stack([win, 1 - win - lose, lose], dim=1)
        tie = ((target - 0.5).abs() <= self.band).to(target.dtype)
        return torch.stack([target * (1 - tie), tie, (1 - target) * (1 - tie)], dim=1)

    def _log_tie(self, like: Tensor, free: nn.ParameterDict | None) -> Tensor:
        return free["log_tie"] if self.learn and free is not None else like.new_tensor(math.log(self.tie))


@dataclass(frozen=True, kw_only=True)
class RaoKupper(Tied):
    """Ties where the difference is not felt (Rao & Kupper, JASA 62, 1967).

    P(a better) = sigmoid(r_a - r_b - eta), P(b better) = sigmoid(r_b - r_a - eta), the rest are ties: a logistic
    difference within +-eta. `tie` is eta = log theta, in nats. HPSv3 and VideoReward (2501.13918) use this model.
    """

    type: Literal["rao_kupper"] = "rao_kupper"
    tie: float = math.log(2)

    def log_outcomes(self, a: Scores, b: Scores, free: nn.ParameterDict | None = None) -> Tensor:
        margin = a.mean - b.mean
        eta = self._log_tie(margin, free).exp()
        win, lose = logsigmoid(margin - eta), logsigmoid(-margin - eta)
        # log (theta^2 - 1) without computing theta, which overflows.
        tie = 2 * eta + torch.log(-torch.expm1(-2 * eta)) + win + lose
        return torch.stack([win, tie, lose], dim=1)


@dataclass(frozen=True, kw_only=True)
class Davidson(Tied):
    """Ties in proportion to the geometric mean of both strengths (Davidson, JASA 65, 1970).

    P(a better) : P(tie) : P(b better) = e^r_a : nu e^((r_a + r_b) / 2) : e^r_b, so ties leave the odds of the decided
    pairs to Bradley-Terry. `tie` is nu; equal images tie with probability nu / (2 + nu).
    """

    type: Literal["davidson"] = "davidson"
    tie: float = 1.0

    def log_outcomes(self, a: Scores, b: Scores, free: nn.ParameterDict | None = None) -> Tensor:
        half = (a.mean - b.mean) / 2
        log_tie = self._log_tie(half, free).expand_as(half)
        return torch.stack([half, log_tie, -half], dim=1).log_softmax(dim=1)
