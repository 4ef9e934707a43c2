"""What every loss can do, and what most of them share.

Shapes: B pairs; K outcomes of a pair, 2 (a better, b better) or 3 (a better, tie, b better).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn


@dataclass(frozen=True)
class Scores:
    """What a reward model says of B images, in nats of log-odds where the loss does not say otherwise.

    Attributes:
        mean: (B,) the reward.
        log_std: (B,) log of the standard deviation of the reward; None where the model is sure of it.
        noise: (B,) sigma(t) of the noise in the latents that were scored; None for clean ones.
        heads: (B, M) what each of several heads says, of which `mean` is the mean; None where there is one.
    """

    mean: Tensor
    log_std: Tensor | None = None
    noise: Tensor | None = None
    heads: Tensor | None = None

    @classmethod
    def of_heads(cls, heads: Tensor, noise: Tensor | None = None) -> "Scores":
        """From what M heads say (B, M)."""
        if heads.shape[1] == 1:
            return cls(heads[:, 0], noise=noise)
        return cls(heads.mean(dim=1), noise=noise, heads=heads)

    def members(self) -> list["Scores"]:
        """Of each head alone."""
        if self.heads is None:
            return [self]
        return [replace(self, mean=head, heads=None) for head in self.heads.unbind(1)]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Scores":
        """All of it there, in that precision."""
        return Scores(**{name: None if part is None else part.to(device, dtype) for name, part in vars(self).items()})

    def __getitem__(self, rows: Sequence[int] | slice) -> "Scores":
        """Those of some of the images, or of images that stand in several rows."""
        return Scores(**{name: None if part is None else part[rows] for name, part in vars(self).items()})


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of several batches as one; each must know the same of its images."""
    known = [name for name, value in vars(parts[0]).items() if value is not None]
    return Scores(**{name: torch.cat([getattr(part, name) for part in parts]) for name in known})


@dataclass(frozen=True, kw_only=True)
class PairLoss(ABC):
    """What every loss can do.

    Attributes:
        of_margins: whether its target is a number of each image rather than a preference.
    """

    of_margins: ClassVar[bool] = False

    type: str

    def __post_init__(self) -> None:
        if self.type != type(self).type:
            raise ValueError(f"type: {self.type!r} is not {type(self).type!r}")

    def __call__(
        self,
        a: Scores,
        b: Scores,
        target: Tensor,
        weight: Tensor | None = None,
        free: nn.ParameterDict | None = None,
        generator: Generator | None = None,
    ) -> Tensor:
        """The weighted mean over pairs, a scalar.

        Args:
            a: the scores of the first images, `b` of the second.
            target: what the loss is to explain, see there; a soft label is (B,), the probability in [0, 1] that the
                first is better.
            weight: (B,) non-negative; None weighs all pairs the same.
            free: what `parameters` made; None takes the loss's own values.
            generator: for losses that sample.

        Raises:
            ValueError: scores or target lack what the loss needs.
        """
        loss = self.per_pair(a, b, target, free, generator)
        return loss.mean() if weight is None else (weight * loss).sum() / weight.sum()

    def target(self, label: Tensor, margin: Tensor) -> Tensor:
        """What this loss is to explain, of soft labels (B,) and of the judge's margins in nats (B, 2)."""
        return label

    def parameters(self) -> nn.ParameterDict:
        """What of this loss is learned beside the model, fresh; it wants a larger learning rate than weights do."""
        return nn.ParameterDict()

    def fitted(self, free: nn.ParameterDict) -> Self:
        """This loss with the learned values as its own."""
        return self

    def outcomes(self, a: Scores, b: Scores, free: nn.ParameterDict | None = None) -> Tensor:
        """Probabilities (B, K) of the outcomes; rows sum to 1, the middle of three columns is the tie."""
        return self.log_outcomes(a, b, free).exp()

    def probability(self, a: Scores, b: Scores, free: nn.ParameterDict | None = None) -> Tensor:
        """The expected soft label (B,): P(a better), plus half of P(tie) where there are ties."""
        return without_ties(self.log_outcomes(a, b, free))[:, 0].exp()

    def log_odds(self, a: Scores, b: Scores, free: nn.ParameterDict | None = None) -> Tensor:
        """The log-odds (B,) of `probability` in nats, finite where that rounds to 0 or 1."""
        first, second = without_ties(self.log_outcomes(a, b, free)).unbind(dim=1)
        return first - second

    def nll(self, a: Scores, b: Scores, label: Tensor, free: nn.ParameterDict | None = None) -> Tensor:
        """What soft labels (B,) cost under `probability`, (B,) in nats: one number for all losses.

        Computed from logarithms, it is finite where a probability would round to 0 or 1.
        """
        return cross_entropy(without_ties(self.log_outcomes(a, b, free)), torch.stack([label, 1 - label], dim=1))

    @abstractmethod
    def log_outcomes(self, a: Scores, b: Scores, free: nn.ParameterDict | None = None) -> Tensor:
        """Log-probabilities (B, K) of the outcomes, finite for any finite scores of fp32."""

    @abstractmethod
    def per_pair(
        self, a: Scores, b: Scores, target: Tensor, free: nn.ParameterDict | None, generator: Generator | None
    ) -> Tensor:
        """The loss (B,) of each pair."""


@dataclass(frozen=True, kw_only=True)
class Likelihood(PairLoss):
    """Cross-entropy -sum_k q_k log P_k of labels q and outcomes P.

    The target is a soft label (B,), or (B, 3) with the probabilities that a is better, that they tie, that b is
    better. A model without ties gives half of each tie to either side, as PickScore does (2305.01569).

    Attributes:
        smoothing: share of every label that is spread evenly over the outcomes (1512.00567, section 7).
    """

    smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing: {self.smoothing} is not a share from 0 to below 1")

    def per_pair(
        self, a: Scores, b: Scores, target: Tensor, free: nn.ParameterDict | None, generator: Generator | None
    ) -> Tensor:
        return cross_entropy(self.log_outcomes(a, b, free), self.smoothed(self.labels(target)))

    def labels(self, target: Tensor) -> Tensor:
        """`target` as probabilities (B, K) of this model's outcomes."""
        p = target if target.ndim == 1 else three_columns(target)[:, 0] + target[:, 1] / 2
        return torch.stack([p, 1 - p], dim=1)

    def smoothed(self, labels: Tensor) -> Tensor:
        return (1 - self.smoothing) * labels + self.smoothing / labels.shape[1]


def cross_entropy(log_outcomes: Tensor, labels: Tensor) -> Tensor:
    """-sum_k q_k log P_k (B,) in nats, of log P and q (B, K)."""
    return -(labels * log_outcomes).sum(dim=1)


def without_ties(log_outcomes: Tensor) -> Tensor:
    """Log-probabilities (B, 2) in which half of a tie is a win of either side, from (B, K)."""
    if log_outcomes.shape[1] == 2:
        return log_outcomes
    return torch.logaddexp(log_outcomes[:, ::2], log_outcomes[:, 1:2] - math.log(2))


def both(log_p: Callable[[Tensor], Tensor], difference: Tensor) -> Tensor:
    """Log-probabilities (B, 2) of a win of a and of b, `log_p` being that of the image which is ahead by its argument.

    `difference` is (B,), or (B, S) where `log_p` averages over S nodes.
    """
    return torch.stack([log_p(difference), log_p(-difference)], dim=1)


def three_columns(target: Tensor) -> Tensor:
    """`target` if it is (B, 3), otherwise ValueError."""
    if target.ndim != 2 or target.shape[1] != 3:
        raise ValueError(f"target: {tuple(target.shape)}, but soft labels are (pairs,) and those with ties (pairs, 3)")
    return target


def check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: {value} is not a positive number")


def check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: {value} is negative or infinite")


def check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: {value!r} is none of {', '.join(known)}")
