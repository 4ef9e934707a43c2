"""PPO (1707.06347) with a critic: each step of the sampler is credited with what it changed in the expected reward.

Painting is a Markov decision process whose states are (x_t, t, prompt) and whose one reward comes at the end
(`ddpo`). A critic V (`critic`) tells from a state what reward to expect, and with generalised advantage estimation
(1506.02438) over the stochastic steps, ratio rho = exp(log p(x_s) - log p_old(x_s)), averaged over latent dimensions:

    loss = -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + kl KL(p || p_ref)
           + max((V - G)^2, (V_old + clip(V - V_old, +-value_clip) - G)^2) / 2,   G = A + V_old

(1707.06347, equations 7 and 9; the clip of values is that of its implementations, 2005.12729, section 3). A path is
compared with what the critic expected, and with no sibling, so a group whose pictures are all alike teaches too. What
we change: rewards are brought to mean 0 and standard deviation 1 over the run so far, which is the critic's scale, and
advantages are not normalised again; policy and critic share no weights, so the value loss has no coefficient. What we
leave out: an entropy bonus, as the sampler's noise is fixed.

Shapes: P prompts, K siblings, M inputs, F successors, T steps, N = P K paths.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from models.keys import sample_key
from pipeline.rl.advantage import Advantages
from pipeline.rl.algorithm import Algorithm, Loss, Part, Velocities
from pipeline.rl.critic import Critic, gae, value_loss
from pipeline.rl.ddpo import PathConfig
from pipeline.rl.grpo import GRPO, Steps
from pipeline.rl.rollout import Plan, Rollout, Times
from pipeline.settings import Section
from rewards.normalising import Normaliser


class CriticSettings(Section):
    """A head of so many `hidden` units; AdamW with a learning rate of its own."""

    hidden: int = Field(128, ge=1)
    learning_rate: float = Field(5e-3, gt=0)


class PPOConfig(PathConfig):
    """Beside the paths, how steps are credited.

    Attributes:
        gamma: discount of a step.
        gae_lambda: 1 trusts what a path brought, 0 the critic's view of the next state.
        value_clip: how far values may move in an iteration, in standard deviations of the reward.
    """

    type: Literal["ppo"] = "ppo"
    window: Annotated[int, Field(ge=1)] | None = 3
    last_start: int = Field(2, ge=0)
    kl: float = Field(0.01, ge=0)
    gamma: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    value_clip: float = Field(0.2, gt=0)
    critic: CriticSettings = CriticSettings()


@dataclass(frozen=True, kw_only=True)
class Valued(Steps):
    """Steps whose inputs have `features` (M, 2, W), and had the value `expected` (M,) when they were drawn.

    `returns` (M, F) are the critic's targets, `outcome` (M, F) the discounted rewards, and `valid` (M, F) tells where
    there was one.
    """

    features: Tensor
    expected: Tensor
    returns: Tensor
    outcome: Tensor
    valid: Tensor


class PPO(Algorithm):
    """The algorithm as the trainer sees it."""

    needs_old = False
    needs_features = True

    def __init__(self, config: PPOConfig):
        self.config = config
        self.policy = GRPO(config.policy)
        self.needs_reference = config.kl > 0

    def parts(self, width: int, seed: int) -> dict[str, Part]:
        settings = self.config.critic
        self.critic = Critic(width, settings.hidden, sample_key(seed, "critic"))
        return {"critic": Part(self.critic, settings.learning_rate)}

    def scaler(self, terms: int) -> Normaliser:
        return Normaliser("running", terms)

    def rollout_plan(self, seed: int, iteration: int, times: Times, siblings: int) -> Plan:
        return self.policy.rollout_plan(seed, iteration, times, siblings)

    def advantages(self, rewards_PK: Tensor, valid_PK: Tensor) -> Advantages:
        """The rewards themselves, NaN where there is none: the critic knows what to compare them with."""
        return Advantages(torch.where(valid_PK, rewards_PK, torch.nan), valid_PK.any(1))

    @torch.no_grad()
    def examples(
        self, rollout: Rollout, advantages_PK: Tensor, ids: Sequence[str], seed: Sequence[str | int]
    ) -> Sequence[Valued]:
        config, drawn = self.config, rollout.transitions
        valid_N = advantages_PK.isfinite().flatten()
        rewards_PK = advantages_PK.nan_to_num(0.0)
        expected_TN = torch.stack([self.critic(step.features) for step in drawn])
        gains_TN = gae(expected_TN, rewards_PK.flatten(), config.gamma, config.gae_lambda)
        limit = config.advantage_limit
        found = []
        for i, steps in enumerate(self.policy.examples(rollout, rewards_PK, ids, seed)):
            shape, ahead = steps.old.shape, len(drawn) - 1 - i
            taken = {field.name: getattr(steps, field.name) for field in fields(steps)}
            taken["advantages"] = (gains_TN[i] * valid_N).clamp(-limit, limit).view(shape)
            found.append(
                Valued(
                    **taken,
                    features=drawn[i].features,
                    expected=expected_TN[i],
                    returns=(gains_TN[i] + expected_TN[i]).view(shape),
                    outcome=(rewards_PK.flatten() * config.gamma**ahead).view(shape),
                    valid=valid_N.view(shape),
                )
            )
        return found

    def loss(self, examples: Valued, v: Velocities) -> Loss:
        policy, valid = self.policy.loss(examples, v), examples.valid
        values = self.critic(examples.features)
        wrong = (value_loss(values, examples.expected, examples.returns, self.config.value_clip) * valid).mean(1)
        residual = examples.outcome - examples.expected.unsqueeze(1)
        moments = {"residual": residual, "residual_square": residual.square()}
        moments |= {"outcome": examples.outcome, "outcome_square": examples.outcome.square()}
        watched = {name: (value * valid).mean(1) for name, value in moments.items()}
        watched |= {"valid": valid.float().mean(1), "value_loss": wrong.detach()}
        return replace(policy, total=policy.total + wrong, watched=watched)

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """The value loss, and the share of the variance of what paths brought that the critic had expected."""
        mean = {name: value / means["valid"] for name, value in means.items()}
        left, all_of_it = (mean[f"{name}_square"] - mean[name] ** 2 for name in ("residual", "outcome"))
        explained = 1 - left / all_of_it if all_of_it > 0 else math.nan
        return {"value_loss": mean["value_loss"], "explained_variance": explained}
