"""Preferences by rewards of which each is a Gaussian: with a learned variance, or with a known one.

Shapes: B pairs, S nodes of an integral.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
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
)

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)


@dataclass(frozen=True, kw_only=True)
class Gaussian(Likelihood):
    """Rewards r ~ N(mu, sigma^2) of which the model gives both (HPSv3, 2508.03789; PURM, 2503.22480).

    `closed_form` is P(a better) = P(r_a > r_b) = Phi((mu_a - mu_b) / sqrt(sigma_a^2 + sigma_b^2)). `sampled` is
    E[sigmoid(r_a - r_b)], a Bradley-Terry model of uncertain strengths: the mean over `samples` draws, and without a
    generator the integral itself, by Gauss-Hermite quadrature, as whenever a probability is asked for. The noise of a
    step is that of the generator it is called with, so a generator keyed by the step repeats it.

    The closed form does not change when all mu and sigma are scaled alike, and hard labels that can be told apart
    drive sigma to 0. Against both stands `regularisation` times KL(N(0, sigma^2) || N(0, 1)), averaged over the two
    images (2003.11339, without its term for the mean).

    Attributes:
        samples: draws a pair.
        regularisation: weight of the divergence.
        min_std: added to sigma in quadrature, so that a gradient stays finite; in units of the reward.
    """

    type: Literal["gaussian"] = "gaussian"
    likelihood: Literal["closed_form", "sampled"] = "closed_form"
    samples: int = 64
    regularisation: float = 0.01
    min_std: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("likelihood", self.likelihood, ("closed_form", "sampled"))
        if self.samples < 1:
            raise ValueError(f"samples: {self.samples} is less than 1")
        check_not_negative("regularisation", self.regularisation)
        check_positive("min_std", self.min_std)

    def log_outcomes(self, a: Scores, b: Scores, free: nn.ParameterDict | None = None) -> Tensor:
        return self._log_outcomes(a, b, None)

    def per_pair(
        self, a: Scores, b: Scores, target: Tensor, free: nn.ParameterDict | None, generator: Generator | None
    ) -> Tensor:
        loss = cross_entropy(self._log_outcomes(a, b, generator), self.smoothed(self.labels(target)))
        return loss + self.regularisation * (divergence(_log_std(a)) + divergence(_log_std(b))) / 2

    def _log_outcomes(self, a: Scores, b: Scores, generator: Generator | None) -> Tensor:
        log_variance = torch.logaddexp(2 * _log_std(a), 2 * _log_std(b))
        log_variance = torch.logaddexp(log_variance, log_variance.new_tensor(math.log(2 * self.min_std**2)))
        margin = a.mean - b.mean
        if self.likelihood == "closed_form":
            return both(log_ndtr, margin * torch.exp(-log_variance / 2))
        nodes, log_weights = self._nodes(margin, generator)
        drawn = margin.unsqueeze(1) + torch.exp(log_variance / 2).unsqueeze(1) * nodes  # (B, S)
        return both(lambda difference: torch.logsumexp(logsigmoid(difference) + log_weights, dim=1), drawn)

    def _nodes(self, like: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """Standard normal deviates, drawn (B, S) or fixed (1, S), and the logs of their weights, which sum to 1."""
        if generator is None:
            nodes, weights = like.new_tensor(_NODES), like.new_tensor(_WEIGHTS / _WEIGHTS.sum())
            kept = weights > 0  # the outermost are nothing in fp32
            return nodes[kept].unsqueeze(0), weights[kept].log()
        drawn = torch.randn(len(like), self.samples, generator=generator, device=generator.device, dtype=like.dtype)
        return drawn.to(like.device), like.new_tensor(-math.log(self.samples))


@dataclass(frozen=True, kw_only=True)
class Thurstone(Likelihood):
    """Rewards with a variance that is known, not learned (Thurstone, Psychological Review 34, 1927).

    P(a better) = Phi((r_a - r_b) / sqrt(v_a + v_b)), v = slope sigma(t)^2 + variance with the noise sigma(t) of the
    latents that were scored: DiNa-LRM's noise-calibrated likelihood (2602.11146), which asks less of a score the less
    of the image there was to see. Clean images have one variance, Thurstone's case V.

    Attributes:
        slope: growth of the variance of one score with that of the noise.
        variance: of the score of a clean image; 0.5 makes P = Phi(r_a - r_b).
        objective: `nll`, or DiNa-LRM's `fidelity` 1 - sum_k sqrt(q_k P_k) (FRank, Tsai et al., SIGIR 2007), which is
            bounded where a label is hopelessly wrong; but where hard labels are drawn with odds o it is least at the
            odds o^2, so it makes confident what was only noisy.
    """

    type: Literal["thurstone"] = "thurstone"
    slope: float = 2.0
    variance: float = 0.05
    objective: Literal["nll", "fidelity"] = "nll"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative("slope", self.slope)
        check_positive("variance", self.variance)
        check_one_of("objective", self.objective, ("nll", "fidelity"))

    def log_outcomes(self, a: Scores, b: Scores, free: nn.ParameterDict | None = None) -> Tensor:
        return both(log_ndtr, (a.mean - b.mean) / torch.sqrt(self._variance(a) + self._variance(b)))

    def per_pair(
        self, a: Scores, b: Scores, target: Tensor, free: nn.ParameterDict | None, generator: Generator | None
    ) -> Tensor:
        if self.objective == "nll":
            return super().per_pair(a, b, target, free, generator)
        return infidelity(self.log_outcomes(a, b), self.smoothed(self.labels(target)))

    def _variance(self, scores: Scores) -> Tensor:
        if scores.noise is None:
            return scores.mean.new_tensor(self.variance)
        return self.slope * scores.noise**2 + self.variance


def infidelity(log_outcomes: Tensor, labels: Tensor) -> Tensor:
    """1 - sum_k sqrt(q_k P_k) (B,), from 0 to 1, of log P and q (B, K): a squared Hellinger distance."""
    return 1 - (labels.sqrt() * torch.exp(log_outcomes / 2)).sum(dim=1)


def divergence(log_std: Tensor) -> Tensor:
    """KL(N(0, sigma^2) || N(0, 1)) in nats, elementwise: 0 at sigma = 1, infinite towards either end."""
    return torch.expm1(2 * log_std) / 2 - log_std


def log_ndtr(z: Tensor) -> Tensor:
    """log Phi(z), elementwise.

    The gradient of torch's own is the exponential of a difference of squares, in fp32 wrong by a factor of 6 at
    z = -10,000.
    """
    below, above = z.clamp(max=0) / -math.sqrt(2), z.clamp(min=0) / math.sqrt(2)
    tail = torch.log(torch.special.erfcx(below) / 2) - below**2
    return torch.where(z < 0, tail, torch.log1p(-torch.special.erfc(above) / 2))


def _log_std(scores: Scores) -> Tensor:
    if scores.log_std is None:
        raise ValueError("log_std: the model gives none; take one with two outputs, or another loss than gaussian")
    return scores.log_std
