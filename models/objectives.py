"""What a generator is pretrained on: a regression at times drawn along its path, each with a weight.

Flow matching (2209.03003; 2403.03206, section 3), diffusion (2006.11239; 2202.00512) and denoising score matching
(2011.13456, section 3.3) differ in the path and in what is predicted, which is the generator's `Parametrisation`, in
how times are drawn, and in how much an error counts at each (2303.00848, section 3):

    flow matching     path flow, velocity           times logit-normal, weight plain
    diffusion         path vp or cosine, eps or v   times uniform, weight plain, or min-snr
    score matching    path vp, score                times uniform, weight simple, or likelihood
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from models.generator import NativeGenerator
from models.paths import PATHS, Point, Prediction, like, on_path, predicted

Times = Literal["logit-normal", "uniform", "mode", "cosmap"]
Weight = Literal["plain", "simple", "min-snr", "likelihood"]

_EDGE = 1e-4  # of the quantiles that times are drawn at


@dataclass(frozen=True)
class Objective:
    """How times are drawn along the path, and how much an error counts at each.

    Attributes:
        times: the distribution of times (2403.03206, section 3.1), all but `uniform` with more of them in the middle.
        mean, std: of `logit-normal`; a mean above 0 is nearer to the noise.
        heavy: how much `mode` prefers the middle, from -1 to 1.75; 0 is uniform.
        weight: what is averaged is the squared error of what is predicted (`plain`), or of eps (`simple`: of the score,
            times sigma^2), or of x0 times min(SNR, `gamma`) (`min-snr`, 2303.09556), or of x0 times the rate at which
            the SNR falls (`likelihood`: the bound of 2107.00630, section 5, but for a factor).

    Raises:
        ValueError: beginning with the field's name.
    """

    times: Times = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    heavy: float = 1.29
    weight: Weight = "plain"
    gamma: float = 5.0

    def __post_init__(self) -> None:
        for field, known in (("times", get_args(Times)), ("weight", get_args(Weight))):
            if (value := getattr(self, field)) not in known:
                raise ValueError(f"{field}: unknown {value}; known here: {', '.join(known)}")
        for field in ("std", "gamma"):
            if getattr(self, field) <= 0:
                raise ValueError(f"{field}: {getattr(self, field)} is not above 0")
        if not -1 <= self.heavy <= 1.75:
            raise ValueError(f"heavy: {self.heavy} is not between -1 and 1.75")

    def at(self, quantiles: Tensor) -> Tensor:
        """The times in [0, 1] of quantiles (B,) of their distribution, `mode`'s counted from the noise."""
        u = quantiles.clamp(_EDGE, 1 - _EDGE)
        match self.times:
            case "logit-normal":
                return (self.mean + self.std * torch.special.ndtri(u)).sigmoid()
            case "mode":
                return 1 - u - self.heavy * ((u * (math.pi / 2)).cos().square() - 1 + u)
            case "cosmap":
                return 1 - 1 / ((u * (math.pi / 2)).tan() + 1)
        return u

    def weights(self, prediction: Prediction, point: Point) -> Tensor:
        """Of the squared error of a `prediction` at a point of its path: (B,)."""
        if self.weight == "plain":
            return torch.ones_like(point.alpha)
        a, s = point.alpha, point.sigma
        turn = a * point.sigma_rate - s * point.alpha_rate
        slope = {"eps": a / s, "score": a / s**2, "x0": 1.0, "v": (a**2 + s**2) / s, "velocity": turn / s}
        snr = (a / s) ** 2
        of_x0 = {"simple": snr, "min-snr": snr.clamp(max=self.gamma), "likelihood": 2 * a * turn / s**3}
        return of_x0[self.weight] / slope[prediction] ** 2

    def loss(self, generator: NativeGenerator, x0: Tensor, captions: list[str], noise_key: int) -> Tensor:
        """Weighted mean square error of what the transformer predicts on the way from `x0` (B, ...) to noise.

        Times are stratified over the batch; they and the noise belong to `noise_key`.
        """
        own, x0 = generator.parametrisation, x0.to(generator.device)
        random = torch.Generator().manual_seed(noise_key)
        noise = torch.randn(x0.shape, generator=random).to(x0.device)
        quantiles = (torch.arange(len(x0)) + torch.rand(len(x0), generator=random)) / len(x0)
        t = own.last * self.at(quantiles).to(x0.device)
        point = PATHS[own.path].at(t)
        found = generator.asked(generator.transformer, on_path(x0, noise, point), t, generator.encode(captions))
        errors = (found - predicted(own.prediction, x0, noise, point)).square()
        return (like(self.weights(own.prediction, point), errors) * errors).mean()
