"""The algorithm-blind trainer: rolls out, asks the reward, lets the algorithm make a loss, steps the optimiser.

It owns accelerate, accumulation, the moving average and the state that a resumed run needs. Each iteration is a
function of its number and of that state, because all noise is keyed by (seed, iteration, prompt, sibling, step).
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from models import lora
from models.generator import Conditioning, NativeGenerator
from pipeline.prompts import PromptRow
from pipeline.rl.advantage import Advantages
from pipeline.rl.grpo import GRPO
from pipeline.rl.rollout import Rollout, Transition, rollout
from pipeline.settings import Section, UserError
from pipeline.training import Average, load_state, save_state
from rewards.reward import Reward


class LoraSettings(Section):
    """The adapter (2106.09685): B A is scaled by `alpha` / `rank`."""

    rank: int = Field(32, ge=1)
    alpha: float = Field(64.0, gt=0)


class TrainerSettings(Section):
    """What every algorithm is trained with.

    Attributes:
        groups: prompts an iteration, over all processes.
        group_size: pictures of each.
        updates: optimiser steps an iteration, each on an equal share of the groups.
        steps: network calls a picture; `shift` spends more of them near the noise.
        average: decay of the moving average of the adapter, which is what is kept in the end.
        batch: pictures a network call.
    """

    iterations: int = Field(100, ge=1)
    groups: int = Field(32, ge=1)
    group_size: int = Field(16, ge=2)
    updates: int = Field(1, ge=1)
    steps: int = Field(8, ge=1)
    shift: float = Field(1.0, gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    average: float = Field(0.9, ge=0, lt=1)
    lora: LoraSettings = LoraSettings()
    batch: int = Field(256, ge=1)


@dataclass(frozen=True)
class Iteration:
    """What one iteration did, over all processes, and this process's pictures with their prompts and rewards."""

    reward_mean: float
    reward_std: float
    kl: float
    loss: float
    grad_norm: float
    clip_fraction: float
    groups: int
    groups_dropped: int
    images: np.ndarray
    prompts: list[PromptRow]
    rewards: np.ndarray


class Trainer:
    """Moves a LoRA on `generator` towards `reward`.

    Rollouts run on `plain`, a twin of the transformer into which the adapter is merged before each of them: it is
    faster than base and adapter side by side, and the base weights stay exact.
    """

    def __init__(
        self,
        generator: NativeGenerator,
        reward: Reward,
        algorithm: GRPO,
        settings: TrainerSettings,
        seed: int,
        accelerator: Accelerator,
    ):
        ranks = accelerator.num_processes
        if settings.groups % (ranks * settings.updates):
            raise UserError(
                f"finetune.groups: {settings.groups} is no multiple of {ranks} processes x {settings.updates} updates"
            )
        self.generator, self.reward, self.algorithm = generator, reward, algorithm
        self.settings, self.seed, self.accelerator = settings, seed, accelerator
        self.plain = copy.deepcopy(generator.transformer)
        lora.attach(generator.transformer, generator.lora_targets, settings.lora.rank, settings.lora.alpha, seed)
        self.tuned: nn.Module = generator.transformer
        self.trained = [p for p in self.tuned.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.95)
        )
        self.average = Average({"lora": self.tuned}, settings.average)
        self.wrapped = accelerator.prepare_model(self.tuned)
        self.done = 0

    def iterate(self, prompts: Sequence[PromptRow]) -> Iteration:
        """One iteration on `prompts`, the same on every process; each takes its share of them."""
        settings, rank, ranks = self.settings, self.accelerator.process_index, self.accelerator.num_processes
        mine = list(prompts[rank::ranks])
        with torch.no_grad():
            cond = self.generator.encode([prompt.text for prompt in mine])
        rolled = self._roll(cond, mine)
        siblings = [prompt for prompt in mine for _ in range(settings.group_size)]
        rewards = self.reward(list(rolled.images), [prompt.text for prompt in siblings])
        shape = (len(mine), settings.group_size)
        values, valid = (
            torch.from_numpy(a).to(self.accelerator.device).view(shape) for a in (rewards.values, rewards.valid)
        )
        every, every_valid = self.accelerator.gather(values), self.accelerator.gather(valid)
        found = self.algorithm.advantages(every, every_valid)
        own = slice(rank * len(mine), (rank + 1) * len(mine))
        learned = self._learn(
            rolled.transitions, cond, Advantages(found.values[own], found.kept[own]), int(found.kept.sum())
        )
        self.average.update(self.done)
        self.done += 1
        seen = every[every_valid]
        return Iteration(
            reward_mean=float(seen.mean()),
            reward_std=float(seen.std(correction=0)),
            **learned,
            groups=len(prompts),
            groups_dropped=len(prompts) - int(found.kept.sum()),
            images=rolled.images,
            prompts=siblings,
            rewards=rewards.values,
        )

    def _roll(self, cond: Conditioning, prompts: Sequence[PromptRow]) -> Rollout:
        settings = self.settings
        lora.merge_into(self.plain, self.tuned)
        plan = self.algorithm.rollout_plan(self.seed, self.done, settings.steps, settings.shift, settings.group_size)
        ids = [prompt.id for prompt in prompts]
        seed = (self.seed, "finetune", self.done)
        return rollout(self.generator, self._predict(self.plain), cond, ids, seed, plan, settings.batch)

    @staticmethod
    def _predict(network: nn.Module) -> Callable[[Tensor, float, Conditioning], Tensor]:
        def predict(x: Tensor, t: float, cond: Conditioning) -> Tensor:
            return network(x, torch.full((len(x),), t, dtype=x.dtype, device=x.device), cond.tokens)

        return predict

    def _learn(
        self, transitions: Sequence[Transition], cond: Conditioning, advantages: Advantages, kept: int
    ) -> dict[str, float]:
        """Optimiser steps on the groups that have a signal, `kept` over all processes; means of what was watched."""
        settings, predict = self.settings, self._predict(self.wrapped)
        watched = torch.zeros(3, device=self.accelerator.device)
        norms = 0.0
        for update in range(settings.updates):
            groups = advantages.kept.nonzero()[:, 0]
            groups = groups[groups % settings.updates == update]
            share = max(1, kept) / settings.updates / self.accelerator.num_processes
            weight = float(len(groups) > 0) / share / len(transitions)
            if not len(groups):
                # Every process must take part in the exchange of gradients.
                groups = groups.new_zeros(1)
            pieces = [piece for t in transitions for piece in _pieces(t, advantages.values, groups, settings.batch)]
            for index, (piece, gains, per_group) in enumerate(pieces):
                waits = index + 1 < len(pieces)
                with self.accelerator.no_sync(self.wrapped) if waits else contextlib.nullcontext():
                    watched += self._backward(predict, piece, gains, cond, weight / per_group)
            norms += float(nn.utils.clip_grad_norm_(self.trained, settings.max_grad_norm))
            if kept:
                self.optimizer.step()
            self.optimizer.zero_grad()
        loss, kl, clipped = self.accelerator.reduce(watched / settings.updates, "sum").tolist()
        ranks = self.accelerator.num_processes
        return {
            "loss": loss / ranks,
            "kl": kl / ranks,
            "clip_fraction": clipped / ranks,
            "grad_norm": norms / settings.updates,
        }

    def _backward(
        self,
        predict: Callable[[Tensor, float, Conditioning], Tensor],
        piece: Transition,
        gains: Tensor,
        cond: Conditioning,
        weight: float,
    ) -> Tensor:
        """Add the gradient of one piece, each of its inputs weighing `weight`; loss, KL and clip fraction (3,)."""
        asked = (piece.x_t, piece.t, cond[piece.prompt])
        v_ref = None
        if self.algorithm.needs_reference:
            with torch.no_grad(), lora.reference(self.tuned):
                v_ref = self._predict(self.tuned)(*asked)
        loss = self.algorithm.loss(piece, predict(*asked), v_ref, gains)
        total = weight * loss.total.sum()
        self.accelerator.backward(total)
        return torch.stack([total.detach(), weight * loss.kl.sum(), weight * loss.clipped.sum()])

    def save(self, folder: Path) -> None:
        """Write the state of this moment; every process holds the same, one writes."""
        save_state(folder, self._state(), [self.optimizer], {"done": self.done})

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        self.done = load_state(folder, self._state(), [self.optimizer])["done"]

    def _state(self) -> dict[str, nn.Module]:
        return {"lora": self.tuned, "average": self.average}


def _pieces(
    transition: Transition, values_PK: Tensor, groups: Tensor, size: int
) -> Iterator[tuple[Transition, Tensor, int]]:
    """The inputs of `groups` in batches of at most `size`, their advantages (M, F), and how many a group has."""
    gains = values_PK.reshape(transition.x_s.shape[:2])
    chosen = torch.isin(transition.prompt, groups).nonzero()[:, 0]
    for rows in chosen.split(size):
        fields = {name: getattr(transition, name)[rows] for name in ("x_t", "x_s", "prompt", "old")}
        yield replace(transition, **fields), gains[rows], len(transition.x_t) // len(values_PK)
