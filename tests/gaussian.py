"""A generator whose data are N(mean, spread^2) in every latent dimension, for algorithms whose optimum is known."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from models.generator import Conditioning
from models.paths import like, schedule
from models.samplers import SAMPLERS
from pipeline.rl.algorithm import Algorithm, Velocities
from pipeline.rl.rollout import Plan, Rollout, rollout

SPREAD, BASE, GOAL = 0.5, 0.0, 1.0


class Gaussian:
    """The exact velocity for a mean, which is all that is tuned; pictures are the latents themselves."""

    def __init__(self, dimensions: int):
        self.latent_shape = (dimensions,)

    @staticmethod
    def prior_std(t: float) -> float:
        return 1.0

    @staticmethod
    def velocity(x_t: Tensor, t: Tensor | float, mean: Tensor | float) -> Tensor:
        t = like(t, x_t)
        away = (x_t - (1 - t) * mean) / ((1 - t) ** 2 * SPREAD**2 + t**2)
        return t * away - (mean + (1 - t) * SPREAD**2 * away)

    def decode(self, latents: Tensor, batch: int | None = None) -> Tensor:
        return latents

    def painted(self, mean: Tensor, plan: Plan, seed: tuple) -> Rollout:
        cond = Conditioning(torch.zeros(1, 1, 1))
        return rollout(self, lambda x, t, _: self.velocity(x, t, mean), cond, ["p"], seed, plan, 10**6)

    def drawn(self, mean: Tensor, plan: Plan, seed: tuple) -> Rollout:
        """Pictures of the distribution itself, which the sampler only comes near to."""
        random = torch.Generator().manual_seed(hash(seed) % 2**32)
        x0 = mean + SPREAD * torch.randn(plan.siblings, *self.latent_shape, generator=random)
        return Rollout(x0, x0, (), plan, (plan.numbers,))


def push(t: float) -> float:
    """How much the velocity at t changes with the mean."""
    x = torch.zeros(1, 1)
    return float(Gaussian.velocity(x, t, 1.0) - Gaussian.velocity(x, t, 0.0))


def course(plan: Plan) -> tuple[float, float, float, float]:
    """Of the mean picture offset + slope * mean: offset, slope, what of the slope comes from noisy steps, and how fast
    the KL of a path grows, 2 KL / (change of the mean)^2, in nats a dimension."""
    offset, slope, noisy, growth = torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1), 0.0
    for number, (t, s) in enumerate(pairwise(plan.times)):
        within = plan.start <= number < plan.start + plan.window

        def step(x: Tensor, mean: float, t: float = t, s: float = s, sampler: str = plan.sampler if within else "ode"):
            return SAMPLERS[sampler](x, Gaussian.velocity(x, t, mean), t, s, plan.eta, None)

        pushed = step(torch.zeros(1, 1), 1.0).mean - step(torch.zeros(1, 1), 0.0).mean
        offset, slope, noisy = step(offset, 0.0).mean, step(slope, 0.0).mean + pushed, step(noisy, 0.0).mean
        if within:
            noisy, growth = noisy + pushed, growth + float(pushed / step(offset, 0.0).std) ** 2
    return float(offset), float(slope), float(noisy), growth


def quadratic(pictures: Tensor, strength: float) -> Tensor:
    """Of pictures (K, D): -strength / 2 times the squared distance from the goal, (1, K)."""
    return -0.5 * strength * (pictures - GOAL).square().sum(1)[None]


def tuned(
    algorithm: Algorithm,
    roll: Callable[[Tensor, Plan, tuple], Rollout],
    strength: float,
    curvature: float,
    iterations: int,
    plan: tuple[int, int],
) -> float:
    """The mean after `iterations` Newton steps of shrinking size on the loss; `plan` is steps and siblings."""
    mean = torch.tensor(BASE, requires_grad=True)
    for i in range(iterations):
        steps, siblings = plan
        rolled = roll(mean.detach(), algorithm.rollout_plan(0, i, tuple(schedule(steps)), siblings), (0, i))
        rewards = quadratic(rolled.latents, strength)
        gains = algorithm.advantages(rewards, torch.ones_like(rewards, dtype=torch.bool)).values
        total = torch.zeros(())
        for examples in algorithm.examples(rolled, gains, ["p"], (0, i)):
            base, old = (Gaussian.velocity(examples.x_t, examples.t, m) for m in (BASE, mean.detach()))
            policy = Gaussian.velocity(examples.x_t, examples.t, mean)
            total = total + algorithm.loss(examples, Velocities(policy, base, old)).total.mean()
        (gradient,) = torch.autograd.grad(total, mean)
        mean.data -= gradient / curvature / (i + 1)
    return mean.item()
