"""Regression of scores on numbers that each image has by itself."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, huber_loss, logsigmoid, mse_loss

from rewards.losses.base import PairLoss, Scores, both, check_one_of, check_positive


@dataclass(frozen=True, kw_only=True)
class Pointwise(PairLoss):
    """Regression of each image's score on a number of its own, such as the judge's margin.

    The target is (B, 2), the numbers of the first and of the second images; the loss of a pair is the mean of its two.

    Attributes:
        error: `mse`, `huber` (Annals of Mathematical Statistics 35, 1964), or `bce`, where the target is a probability
            in [0, 1] and the score its log-odds.
        delta: where Huber's error turns from square to linear, in units of the target.
        temperature: units of the score that make a preference of 73 %: pairs follow Bradley-Terry.
    """

    of_margins: ClassVar[bool] = True

    type: Literal["pointwise"] = "pointwise"
    error: Literal["mse", "huber", "bce"] = "mse"
    delta: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("error", self.error, ("mse", "huber", "bce"))
        check_positive("delta", self.delta)
        check_positive("temperature", self.temperature)

    def target(self, label: Tensor, margin: Tensor) -> Tensor:
        """The margins; for `bce` the probabilities of which they are the log-odds."""
        return torch.sigmoid(margin) if self.error == "bce" else margin

    def log_outcomes(self, a: Scores, b: Scores, free: nn.ParameterDict | None = None) -> Tensor:
        return both(logsigmoid, (a.mean - b.mean) / self.temperature)

    def per_pair(
        self, a: Scores, b: Scores, target: Tensor, free: nn.ParameterDict | None, generator: Generator | None
    ) -> Tensor:
        if target.ndim != 2 or target.shape[1] != 2:
            raise ValueError(f"target: {tuple(target.shape)}, but a number for either image is (pairs, 2)")
        scores = torch.stack([a.mean, b.mean], dim=1)
        if self.error == "bce":
            loss = binary_cross_entropy_with_logits(scores, target, reduction="none")
        elif self.error == "huber":
            loss = huber_loss(scores, target, reduction="none", delta=self.delta)
        else:
            loss = mse_loss(scores, target, reduction="none")
        return loss.mean(dim=1)
