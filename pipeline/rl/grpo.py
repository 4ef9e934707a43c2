"""Flow-GRPO (2505.05470): group-relative policy gradient on the stochastic steps of a flow's sampler.

For each step drawn in the rollout, with ratio rho = exp(log p(x_s) - log p_old(x_s)), log-probabilities averaged
over latent dimensions, and the group-relative advantage A of the picture it led to:

    loss = -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + beta KL(p || p_ref)

(equations 3 and 5). What we change: stochastic steps fill a short window that moves over the first part of the
path, and siblings share everything before it (`rollout`), so the first step of the window is evaluated once for
a whole group, and its noise alone tells siblings apart.

Its relatives are settings:

- Windows: at random early (Flow-GRPO-Fast), sliding with the iteration (MixGRPO, 2507.21802), or all steps, from
  noises of their own (`fans: []`), which is Flow-GRPO as published. The last step has none where it is deterministic.
- `fans`: siblings part little by little (BranchGRPO, 2509.06040). A path that parts again gets the mean advantage of
  what it led to; we leave out the paper's normalisation by depth and its pruning.
- `clip_high`: more room upwards than downwards (DAPO, 2503.14476, section 3.1).
- `guard` (GRPO-Guard, 2510.22319): with d = mean(p) - mean(p_old), the ratio
  rho = exp[(log p - log p_old + |d|^2 / (2 std^2)) std] has its centre at 1 and the same spread at each step, and the
  policy's part of the loss is divided by t - s.
- `divergence` (Flow-DPPO, 2606.11025): rho A without clip, and without gradient where KL(p_old || p) is above this and
  A would move rho further from 1.
- `advantage_scale: none` (Dr. GRPO), `advantage_baseline`, and `advantage_of: win_rate` (Pref-GRPO, 2508.20751), of
  the reward's order within the group rather than of a judge's comparisons: see `advantage`.
- `step_weight: noise` (TempFlow-GRPO, 2508.04324): each step counts by the standard deviation of its noise, relative to
  the mean over the path's steps. Its branches with one noisy step each are our window of one.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from models.keys import sample_key
from models.samplers import SAMPLERS, Step, gaussian_kl, log_prob
from pipeline.rl.advantage import Advantages, Baseline, Scale, group_advantages, win_rates
from pipeline.rl.algorithm import Algorithm, Examples, Loss, Velocities
from pipeline.rl.rollout import Plan, Rollout, Times
from pipeline.rl.settings import AlgorithmSettings


class GRPOConfig(AlgorithmSettings):
    """How steps are drawn, what they are worth, and how far an update may go.

    Attributes:
        sampler, eta: see `models.samplers`; `ddim` with 1 is DDPM's ancestral step.
        window: stochastic steps; null for all but the last.
        last_start: the window starts anywhere from step 0 to this one.
        slide_every: iterations after which the window moves on by a step, beginning again behind `last_start`; at
            random in each iteration where it is null.
        fans: into how many each path parts at the steps of the window, from the first on. Their product divides the
            group's size; what it leaves start from noises of their own. Where it is null, all part at the first.
        clip: of the ratio, on the scale of averaged log-probabilities; upwards `clip_high` where that is given.
        guard: the ratio normalised, see above; `clip` is then on another scale.
        divergence: in nats on the averaged scale; takes the place of the clip.
        kl: weight of the KL from the reference.
        step_weight: `noise` weighs a step by its noise.
        advantage_of: the `reward`, or its `win_rate` within the group.
    """

    type: Literal["grpo"] = "grpo"
    sampler: Literal["sde", "dance", "cps", "ddim"] = "cps"
    eta: float = Field(0.7, gt=0, le=1)
    window: Annotated[int, Field(ge=1)] | None = 1
    last_start: int = Field(3, ge=0)
    slide_every: Annotated[int, Field(ge=1)] | None = None
    fans: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    clip: float = Field(1e-4, gt=0)
    clip_high: Annotated[float, Field(gt=0)] | None = None
    guard: bool = False
    divergence: Annotated[float, Field(gt=0)] | None = None
    kl: float = Field(0.01, ge=0)
    step_weight: Literal["none", "noise"] = "none"
    advantage_of: Literal["reward", "win_rate"] = "reward"
    advantage_baseline: Baseline = "group"
    advantage_scale: Scale = "global"
    advantage_limit: float = Field(5.0, gt=0)

    @model_validator(mode="after")
    def _one_trust_region(self) -> Self:
        if self.divergence is not None and (self.guard or self.clip_high is not None):
            raise ValueError("divergence: takes the place of the clip; set guard to false and clip_high to null")
        return self

    def check(self, steps: int, siblings: int) -> None:
        """Raises ValueError where a path of so many steps, or a group of so many siblings, has no room for this."""
        window = steps - 1 if self.window is None else self.window
        if window < 1:
            raise ValueError(f"algorithm.window: {steps} step leaves none with noise; set finetune.steps to 2 or more")
        most = steps - 1 - window
        if self.window is not None and self.last_start > most:
            raise ValueError(
                f"algorithm.last_start: {self.last_start} is above {most}; the last of {steps} steps has no noise, "
                f"and {window} stochastic ones must end before it"
            )
        if self.fans is None:
            return
        if len(self.fans) > window:
            raise ValueError(
                f"algorithm.fans: {len(self.fans)} steps at which paths part, in a window of {window}; "
                f"make the window {len(self.fans)} or more"
            )
        if siblings % math.prod(self.fans):
            raise ValueError(
                f"algorithm.fans: {list(self.fans)} makes {math.prod(self.fans)} paths of one, which do not divide a "
                f"group of {siblings}"
            )


@dataclass(frozen=True)
class Steps(Examples):
    """Stochastic steps from `t` to `s`: `x_t` (M, ...) to its F successors `x_s` (M, F, ...).

    `advantages` (M, F) are those of the pictures that each led to, on average. Under the policy that drew them, `mean`
    (M, ...) is the Gaussian's mean and `old` (M, F) the log-probability. `weight` is what the step counts.
    """

    s: float
    x_s: Tensor
    old: Tensor
    advantages: Tensor
    mean: Tensor
    weight: float = 1.0


class GRPO(Algorithm):
    """The algorithm as the trainer sees it."""

    needs_old = False

    def __init__(self, config: GRPOConfig):
        self.config = config
        self.needs_reference = config.kl > 0

    def rollout_plan(self, seed: int, iteration: int, times: Times, siblings: int) -> Plan:
        config = self.config
        start, window = _start(config, seed, iteration), config.window
        if window is None:
            start, window = 0, len(times) - 2
        return Plan(times, config.sampler, config.eta, start, window, siblings, config.fans)

    def advantages(self, rewards_PK: Tensor, valid_PK: Tensor) -> Advantages:
        config = self.config
        if config.advantage_of == "win_rate":
            rewards_PK = win_rates(rewards_PK, valid_PK)
        return group_advantages(
            rewards_PK, valid_PK, config.advantage_scale, config.advantage_limit, baseline=config.advantage_baseline
        )

    def examples(
        self, rollout: Rollout, advantages_PK: Tensor, ids: Sequence[str], seed: Sequence[str | int]
    ) -> Sequence[Steps]:
        return [
            Steps(
                t.x_t,
                t.t,
                t.prompt,
                t.s,
                t.x_s,
                t.old,
                advantages_PK.reshape(*t.old.shape, -1).mean(2),
                t.mean,
                1.0 if self.config.step_weight == "none" else noise_weight(rollout.plan, t.t, t.s),
            )
            for t in rollout.transitions
        ]

    def loss(self, examples: Steps, v: Velocities) -> Loss:
        config, step = self.config, SAMPLERS[self.config.sampler]
        t, s, eta = examples.t, examples.s, config.eta
        drawn = step(examples.x_t, v.policy, t, s, eta, None)
        change = log_ratio(examples, drawn)
        error = (change.exp() - 1).abs().amax(1).detach()
        if config.guard:
            change = (change + gaussian_kl(drawn.mean, examples.mean, drawn.std).unsqueeze(1)) * drawn.std
        ratio = change.exp()
        if config.divergence is None:
            high = config.clip if config.clip_high is None else config.clip_high
            clipped = ratio.clamp(1 - config.clip, 1 + high)
            gain = torch.minimum(ratio * examples.advantages, clipped * examples.advantages)
            outside = (ratio - 1 > high) | (ratio - 1 < -config.clip)
        else:
            apart = gaussian_kl(drawn.mean, examples.mean, drawn.std).unsqueeze(1) > config.divergence
            outside = apart & ((ratio - 1) * examples.advantages > 0)
            gain = torch.where(outside, 0.0, ratio * examples.advantages)
        gain = gain.mean(1) * (examples.weight / (t - s if config.guard else 1.0))
        kl = torch.zeros_like(gain)
        if v.reference is not None:
            kl = gaussian_kl(drawn.mean, step(examples.x_t, v.reference, t, s, eta, None).mean, drawn.std)
        return Loss(config.kl * kl - gain, kl.detach(), outside.float().mean(1).detach(), ratio_error=error)


def log_ratio(examples: Steps, drawn: Step) -> Tensor:
    """log p - log p_old of the successors, (M, F), averaged over latent dimensions; `drawn` has the policy's mean."""
    fan = examples.x_s.shape[1]
    new = log_prob(examples.x_s.flatten(0, 1), drawn.mean.repeat_interleave(fan, 0), drawn.std)
    return new.view_as(examples.old) - examples.old


def noise_weight(plan: Plan, t: float, s: float) -> float:
    """The standard deviation of the step from t to s, relative to the mean over all steps of the path but the last."""
    x = torch.zeros(1)

    def std(t: float, s: float) -> float:
        return SAMPLERS[plan.sampler](x, x, t, s, plan.eta, None).std

    others = [std(*pair) for pair in list(pairwise(plan.times))[:-1]]
    return std(t, s) * len(others) / sum(others)


def _start(config: GRPOConfig, seed: int, iteration: int) -> int:
    """The first step of the window of an iteration."""
    if config.slide_every is not None:
        return iteration // config.slide_every % (config.last_start + 1)
    return random.Random(sample_key(seed, "window", iteration)).randint(0, config.last_start)
