"""DDPO (2305.13301): PPO's clipped objective on every step of the sampler, with a running baseline of each prompt.

Painting is a Markov decision process: states are (x_t, t, prompt), actions are the sampler's steps, and the one reward
comes at the end. With rho = exp(log p(x_s) - log p_old(x_s)), averaged over latent dimensions (DDPO-IS, equation 3,
with the clip of section 4.3),

    loss = -min(rho A, clip(rho, 1 - clip, 1 + clip) A) + kl KL(p || p_ref),   A = (r - mean) / std

with the mean and the standard deviation of the prompt's latest rewards, of earlier iterations too, or of all pictures
of this iteration where the prompt was seen too seldom. Every picture has a path of its own, from its first noise on.
The paper's steps are `sampler: ddim` with `eta: 1`, exactly so on a model that predicts eps (`models.paths`). What we
add: the KL, 0 by default, and other samplers.

Shapes: P prompts, K siblings, M terms of a mixture.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.rl.advantage import Advantages
from pipeline.rl.algorithm import Algorithm, Loss, Velocities
from pipeline.rl.grpo import GRPO, GRPOConfig, Steps
from pipeline.rl.rollout import Plan, Rollout, Times
from pipeline.rl.settings import AlgorithmSettings
from rewards.normalising import LEAST_STD


class PathConfig(AlgorithmSettings):
    """How paths are drawn, each from a noise of its own, and how far an update may go.

    Attributes:
        window: stochastic steps; null for all but the last.
        last_start: the window starts anywhere from step 0 to this one.
        clip: of the ratio, on the scale of averaged log-probabilities.
        kl: weight of the KL from the reference.
        advantage_limit: advantages are clipped to +-this.
    """

    sampler: Literal["sde", "dance", "cps", "ddim"] = "cps"
    eta: float = Field(0.7, gt=0, le=1)
    window: Annotated[int, Field(ge=1)] | None = None
    last_start: int = Field(0, ge=0)
    clip: float = Field(1e-4, gt=0)
    kl: float = Field(0.0, ge=0)
    advantage_limit: float = Field(5.0, gt=0)

    @property
    def policy(self) -> GRPOConfig:
        """The same as settings of the clipped policy gradient, of which only advantages are not its own."""
        shared = self.model_dump(include=set(PathConfig.model_fields) - {"type"})
        return GRPOConfig(**shared, fans=())

    def check(self, steps: int, siblings: int) -> None:
        """Raises ValueError where a path of so many steps has no room for the window."""
        self.policy.check(steps, siblings)


class DDPOConfig(PathConfig):
    """The last `buffer` rewards of a prompt are its baseline, once there are `least` of them."""

    type: Literal["ddpo"] = "ddpo"
    buffer: int = Field(32, ge=2)
    least: int = Field(16, ge=2)

    @model_validator(mode="after")
    def _enough_fit(self) -> Self:
        if self.least > self.buffer:
            raise ValueError(f"least: {self.least} is above the buffer of {self.buffer}, and would never be reached")
        return self


class DDPO(Algorithm):
    """The algorithm as the trainer sees it."""

    needs_old = False

    def __init__(self, config: DDPOConfig):
        self.config = config
        self.policy = GRPO(config.policy)
        self.needs_reference = config.kl > 0

    def scaler(self, terms: int) -> "Latest":
        return Latest(self.config.buffer, self.config.least)

    def rollout_plan(self, seed: int, iteration: int, times: Times, siblings: int) -> Plan:
        return self.policy.rollout_plan(seed, iteration, times, siblings)

    def advantages(self, rewards_PK: Tensor, valid_PK: Tensor) -> Advantages:
        """Of rewards that the scaler has brought to their baseline."""
        limit = self.config.advantage_limit
        return Advantages(torch.where(valid_PK, rewards_PK, 0.0).clamp(-limit, limit), valid_PK.any(1))

    def examples(
        self, rollout: Rollout, advantages_PK: Tensor, ids: Sequence[str], seed: Sequence[str | int]
    ) -> Sequence[Steps]:
        return self.policy.examples(rollout, advantages_PK, ids, seed)

    def loss(self, examples: Steps, v: Velocities) -> Loss:
        return self.policy.loss(examples, v)


class Latest:
    """Brings each term to mean 0 and standard deviation 1 over the prompt's last `buffer` rewards, those at hand
    included, or over all that are at hand where the prompt has fewer than `least`. All processes must give it the same.
    """

    def __init__(self, buffer: int, least: int):
        self.buffer, self.least = buffer, least
        self.seen: dict[str, np.ndarray] = {}

    def __call__(self, values_PKM: np.ndarray, valid_PK: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        """Normalised values (P, K, M) of the prompts `ids`, after the valid ones have been kept."""
        values = values_PKM.astype(np.float64)
        here = values[valid_PK]  # (N, M)
        scaled = np.empty_like(values)
        for key, group, valid in zip(ids, values, valid_PK, strict=True):
            self.seen[key] = np.concatenate([self.seen.get(key, here[:0]), group[valid]])[-self.buffer :]
        for row, key in enumerate(ids):
            kept = self.seen[key]
            known = kept if len(kept) >= self.least else here
            scaled[row] = (values[row] - known.mean(0)) / np.maximum(known.std(0), LEAST_STD)
        return scaled.astype(np.float32)

    def state(self) -> dict[str, Any]:
        """JSON-able; floats survive to the bit."""
        return {key: kept.tolist() for key, kept in self.seen.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.seen = {key: np.array(kept) for key, kept in state.items()}
