"""D3PO (2311.13231): direct preference optimisation on the steps of the sampler, without a reward model's gradient.

Siblings start from one noise and part at the first step. Of the best and the worst of a group, a and b, every
stochastic step is a pair of actions of which the first is preferred:

    z = beta [(log p(a_s) - log p_ref(a_s)) - (log p(b_s) - log p_ref(b_s))],   loss = -log sigma(z) + kl KL(p || p_ref)

(section 4; log-probabilities are averaged over latent dimensions). What we change: a person's choice between two
pictures is the reward's between the extremes of a group. What we add: the KL. It is `dpo` with the error of a step,
|a_s - mean|^2 / std^2, in the place of the velocity's.

Shapes: P prompts, K siblings, M pairs, F successors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from models.samplers import SAMPLERS, Step, gaussian_kl
from pipeline.rl.advantage import Advantages, group_advantages
from pipeline.rl.algorithm import Algorithm, Ask, Examples, Loss, Velocities
from pipeline.rl.dpo import best_and_worst, preference_loss
from pipeline.rl.rollout import Plan, Rollout, Times, Transition
from pipeline.rl.settings import AlgorithmSettings


class D3POConfig(AlgorithmSettings):
    """How paths are drawn, and how far preferences move the policy.

    Attributes:
        window: the first steps are stochastic, so many of them; null for all but the last.
        beta: how much log-probabilities count.
        kl: weight of the KL from the reference.
    """

    type: Literal["d3po"] = "d3po"
    rows: ClassVar[int] = 2
    whole_groups: ClassVar[bool] = True
    sampler: Literal["sde", "dance", "cps", "ddim"] = "cps"
    eta: float = Field(0.7, gt=0, le=1)
    window: Annotated[int, Field(ge=1)] | None = None
    beta: float = Field(100.0, gt=0)
    kl: float = Field(0.0, ge=0)

    def check(self, steps: int, siblings: int) -> None:
        if steps < 2 or (self.window or 1) > steps - 1:
            raise ValueError(
                f"algorithm.window: {self.window or 'all'} of {steps} steps, of which the last has no noise; "
                "raise finetune.steps"
            )


@dataclass(frozen=True)
class StepPairs(Examples):
    """Steps from `x_t` (M, 2, ...) at `t` to `x_s` (M, 2, ...) at `s`, of the better and of the worse picture."""

    s: float
    x_s: Tensor

    def ask(self, predict: Ask) -> Tensor:
        """(M, 2, ...)."""
        return predict(self.x_t.flatten(0, 1), self.t, self.prompt.repeat_interleave(2)).unflatten(0, (-1, 2))


class D3PO(Algorithm):
    """The algorithm as the trainer sees it."""

    needs_reference = True
    needs_old = False
    whole_groups = D3POConfig.whole_groups
    rows = D3POConfig.rows

    def __init__(self, config: D3POConfig):
        self.config = config

    def rollout_plan(self, seed: int, iteration: int, times: Times, siblings: int) -> Plan:
        config = self.config
        return Plan(times, config.sampler, config.eta, 0, config.window or len(times) - 2, siblings)

    def advantages(self, rewards_PK: Tensor, valid_PK: Tensor) -> Advantages:
        return group_advantages(rewards_PK, valid_PK, "group")

    def examples(
        self, rollout: Rollout, advantages_PK: Tensor, ids: Sequence[str], seed: Sequence[str | int]
    ) -> Sequence[StepPairs]:
        prompt = torch.arange(len(ids), device=rollout.latents.device)
        chosen = prompt[:, None], best_and_worst(advantages_PK)
        return [_pairs(step, chosen, prompt, advantages_PK.shape[1]) for step in rollout.transitions]

    def loss(self, examples: StepPairs, v: Velocities) -> Loss:
        policy, reference = self._step(examples, v.policy), self._step(examples, v.reference)
        away = _errors(examples, policy) - _errors(examples, reference)
        total, z = preference_loss(away, torch.ones_like(away[:, 0]), self.config.beta)
        kl = gaussian_kl(policy.mean, reference.mean, policy.std).view_as(away).mean(1)
        watched = {"preference_accuracy": (z > 0).float().detach()}
        return Loss(total + self.config.kl * kl, kl.detach(), torch.zeros_like(kl), watched)

    def _step(self, examples: StepPairs, v: Tensor) -> Step:
        """Of all pictures, (2 M, ...)."""
        step = SAMPLERS[self.config.sampler]
        return step(examples.x_t.flatten(0, 1), v.flatten(0, 1), examples.t, examples.s, self.config.eta, None)


def _pairs(step: Transition, chosen: tuple[Tensor, Tensor], prompt: Tensor, siblings: int) -> StepPairs:
    """The steps of the `chosen`, indices (P, 1) and (P, 2); siblings that have not parted share their input."""
    fan = step.x_s.shape[1]
    x_t, x_s = step.x_t.repeat_interleave(fan, 0), step.x_s.flatten(0, 1)
    x_t, x_s = (x.unflatten(0, (-1, siblings))[chosen] for x in (x_t, x_s))
    return StepPairs(x_t, step.t, prompt, step.s, x_s)


def _errors(examples: StepPairs, step: Step) -> Tensor:
    """(M, 2): -2 log p of the steps that were taken, up to a constant."""
    away = (examples.x_s.flatten(0, 1) - step.mean) / step.std
    return away.square().flatten(1).mean(1).unflatten(0, (-1, 2))
