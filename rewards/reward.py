"""Rewards as reinforcement learning sees them: pictures and prompts in, values and their validity out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from judges.base import Judge
from judges.shapes.oracle import gold
from rewards.backbones import RewardModel, filled, load_model
from rewards.losses import Scores, joined


@dataclass(frozen=True)
class Rewards:
    """`values` (B,) float32; where `valid` (B,) bool is False there is no reward, and the value is NaN."""

    values: np.ndarray
    valid: np.ndarray

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Rewards":
        """Valid where `values` are finite."""
        values = np.asarray(values, dtype=np.float32)
        valid = np.isfinite(values)
        return cls(np.where(valid, values, np.float32(np.nan)), valid)


class Reward(Protocol):
    """Rates pictures (uint8, H x W x 3) against their prompts, in order; higher is better."""

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Rewards: ...


@dataclass(frozen=True)
class Reading:
    """How several opinions become one value (Coste et al., 2310.02743, section 4).

    `worst` is the least head's; `penalised` is the mean less `coefficient` times the standard deviation, over the heads
    or, where there is one, that which the model gives of its reward. The paper subtracts the variance; a standard
    deviation has the unit of the reward.
    """

    how: Literal["mean", "worst", "penalised"] = "mean"
    coefficient: float = 1.0

    def __call__(self, scores: Scores) -> Tensor:
        """Values (B,). Raises ValueError where the scores do not hold what is read."""
        if self.how == "mean":
            return scores.mean
        if scores.heads is not None:
            if self.how == "worst":
                return scores.heads.amin(dim=1)
            return scores.mean - self.coefficient * scores.heads.std(dim=1, correction=0)
        if self.how == "worst" or scores.log_std is None:
            raise ValueError(
                f"reading: {self.how!r}, but the reward model has one head; train several (reward.ensemble.heads)"
            )
        return scores.mean - self.coefficient * scores.log_std.exp()


class ModelReward:
    """A reward model's score: log-odds in nats, where its loss was Bradley-Terry.

    The network always runs on exactly `batch` pictures, the last batch filled up: a value is the same to the
    bit whatever else is rated with it.

    Args:
        reading: what of its scores is the value.
        temperature: by which values are divided; that which `rewards.train` fits makes nats of them.
    """

    def __init__(self, model: RewardModel, batch: int = 32, reading: Reading = Reading(), temperature: float = 1.0):
        self.model = model
        self.batch = batch
        self.reading = reading
        self.temperature = temperature
        self._tokens: dict[str, dict[str, Tensor]] = {}

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Rewards:
        """The values read from `scores`, which raises the same errors."""
        return Rewards.of((self.reading(self.scores(images, prompts)) / self.temperature).numpy())

    def value(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """The values (B,) of what the model's tower gave of pictures, with a gradient; the batch is taken as it is."""
        tokens = {name: rows.to(features.device) for name, rows in self.encoded(prompts).items()}
        return self.reading(self.model.score(features, tokens)).float() / self.temperature

    @torch.inference_mode()
    def scores(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Scores:
        """Scores (B,) in fp32 on the CPU.

        Raises:
            ValueError: a prompt is too long, a picture has a size that the model does not read, or there are not as
                many prompts as images.
        """
        if len(images) != len(prompts):
            raise ValueError(f"prompts: {len(prompts)} for {len(images)} images")
        if not len(images):
            return Scores(torch.empty(0))
        tokens = self.encoded(prompts)
        found: list[Scores] = []
        for start in range(0, len(images), self.batch):
            part = slice(start, start + self.batch)
            pixels = self._filled(self.model.pixels(images[part]))
            told = {name: self._filled(value[part]) for name, value in tokens.items()}
            found.append(replace(self.model.reward(self.model.encode(pixels), told), noise=None))
        return joined(found)[: len(images)].to("cpu", torch.float32)

    def _filled(self, rows: Tensor) -> Tensor:
        return filled(rows, self.batch).to(self.model.device)

    def encoded(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the model reads of prompts (B, L, ...); an RL run asks for the same ones again and again."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._tokens]:
            found = self.model.tokens(new)
            self._tokens |= {prompt: {n: value[row] for n, value in found.items()} for row, prompt in enumerate(new)}
        rows = [self._tokens[prompt] for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class JudgeReward:
    """Direct RLAIF (2309.00267, section 3.2.2): the judge's margin, in nats, is the reward."""

    def __init__(self, judge: Judge):
        self.judge = judge

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Rewards:
        verdicts = self.judge.score(images, prompts)
        return Rewards.of([verdict.margin if verdict.valid else np.nan for verdict in verdicts])


class GoldReward:
    """1 where the oracle of the embedded world accepts, otherwise 0: what the best of judges would say."""

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Rewards:
        return Rewards.of([float(right) for right in gold(images, prompts)])


def load_reward(folder: str | Path, device: str | torch.device = "cpu") -> ModelReward:
    """The reward model, of any backbone, that was saved in `folder`. Raises FileNotFoundError where there is none."""
    return ModelReward(load_model(folder).to(device))
