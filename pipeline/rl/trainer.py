"""The algorithm-blind trainer: rolls out, asks the reward, lets the algorithm make a loss, steps the optimiser.

It owns accelerate, accumulation, the moving average and the state that a resumed run needs. Each iteration is a
function of its number and of that state, because all noise is keyed by (seed, iteration, prompt, sibling, step).
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from models import lora
from models.generator import Conditioning, NativeGenerator
from pipeline.compiling import compile_module
from pipeline.prompts import PromptRow
from pipeline.rl.advantage import Advantages, mixed_advantages
from pipeline.rl.algorithm import Algorithm, Examples, Velocities
from pipeline.rl.rollout import Rollout, rollout
from pipeline.rl.settings import TrainerSettings
from pipeline.settings import UserError
from pipeline.training import Average, load_state, save_state, trapezoid
from rewards.mixture import Normaliser, mixture_of
from rewards.reward import Reward


@dataclass(frozen=True)
class Iteration:
    """What one iteration did, over all processes, and this process's pictures with their prompts and rewards.

    `term_means` and `term_stds` are of each term of the reward, as the terms gave them.
    """

    reward_mean: float
    reward_std: float
    term_means: tuple[float, ...]
    term_stds: tuple[float, ...]
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
    """Moves a LoRA on `generator` towards `reward`, which may be a mixture.

    Rollouts run on `plain`, a twin of the transformer into which the adapter is merged before each of them: it is
    faster than base and adapter side by side, and the base weights stay exact.
    """

    def __init__(
        self,
        generator: NativeGenerator,
        reward: Reward,
        algorithm: Algorithm,
        settings: TrainerSettings,
        seed: int,
        accelerator: Accelerator,
    ):
        ranks = accelerator.num_processes
        if settings.groups % (ranks * settings.updates):
            raise UserError(
                f"finetune.groups: {settings.groups} is no multiple of {ranks} processes x {settings.updates} updates"
            )
        self.generator, self.reward, self.algorithm = generator, mixture_of(reward), algorithm
        self.settings, self.seed, self.accelerator = settings, seed, accelerator
        self.plain = copy.deepcopy(generator.transformer)
        if settings.compile:
            compile_module(self.plain, accelerator.device)
        lora.attach(generator.transformer, generator.lora_targets, settings.lora.rank, settings.lora.alpha, seed)
        self.tuned: nn.Module = generator.transformer
        self.trained = [p for p in self.tuned.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.95)
        )
        self.average = Average({"lora": self.tuned}, settings.average)
        self.wrapped = accelerator.prepare_model(self.tuned)
        by = self.reward.normalise
        self.normaliser = None if by == "none" else Normaliser(by, len(self.reward.terms))
        self.done = 0

    def iterate(self, prompts: Sequence[PromptRow]) -> Iteration:
        """One iteration on `prompts`, the same on every process; each takes its share of them."""
        settings, rank, ranks = self.settings, self.accelerator.process_index, self.accelerator.num_processes
        mine = list(prompts[rank::ranks])
        with torch.no_grad():
            cond = self.generator.encode([prompt.text for prompt in mine])
        rolled = self._roll(cond, mine)
        siblings = [prompt for prompt in mine for _ in range(settings.group_size)]
        values = self.reward.each(list(rolled.images), [prompt.text for prompt in siblings])
        terms_PKM = torch.from_numpy(values).to(self.accelerator.device).unflatten(0, (len(mine), settings.group_size))
        terms_PKM = self.accelerator.gather(terms_PKM)
        valid_PK = terms_PKM.isfinite().all(-1)
        if not valid_PK.any():
            raise UserError(f"finetune: no picture of iteration {self.done} got a reward; the same command goes on")
        found = self._advantages(terms_PKM, valid_PK, [p.id for r in range(ranks) for p in prompts[r::ranks]])
        own = slice(rank * len(mine), (rank + 1) * len(mine))
        factor = trapezoid(self.done, settings.iterations, 0, round(settings.decay * settings.iterations))
        self.optimizer.param_groups[0]["lr"] = settings.learning_rate * factor
        examples = self.algorithm.examples(rolled, found.values[own], [p.id for p in mine], self._seed)
        learned = self._learn(examples, cond, found.kept[own], int(found.kept.sum()))
        self.average.update(self.done)
        self.done += 1
        terms = terms_PKM[valid_PK]  # (N, M)
        seen = torch.from_numpy(self.reward.total(terms.cpu().numpy()).values)
        return Iteration(
            reward_mean=float(seen.mean()),
            reward_std=float(seen.std(correction=0)),
            term_means=tuple(terms.mean(0).tolist()),
            term_stds=tuple(terms.std(0, correction=0).tolist()),
            **learned,
            groups=len(prompts),
            groups_dropped=len(prompts) - int(found.kept.sum()),
            images=rolled.images,
            prompts=siblings,
            rewards=self.reward.total(values).values,
        )

    def _advantages(self, terms_PKM: Tensor, valid_PK: Tensor, ids: Sequence[str]) -> Advantages:
        """Of the groups of all processes, in the order of `ids`."""
        if self.normaliser:
            normalised = self.normaliser(terms_PKM.cpu().numpy(), valid_PK.cpu().numpy(), ids)
            terms_PKM = torch.from_numpy(normalised).to(terms_PKM.device)
        weights = torch.from_numpy(self.reward.weights).to(terms_PKM.device)
        return mixed_advantages(terms_PKM, valid_PK, weights, self.reward.combine, self.algorithm.advantages)

    def _roll(self, cond: Conditioning, prompts: Sequence[PromptRow]) -> Rollout:
        settings = self.settings
        lora.merge_into(self.plain, self.tuned)
        plan = self.algorithm.rollout_plan(self.seed, self.done, settings.steps, settings.shift, settings.group_size)
        ids = [prompt.id for prompt in prompts]
        return rollout(self.generator, self.predict(self.plain), cond, ids, self._seed, plan, settings.batch)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block `tuned` and `plain` are the moving average, which is what is kept in the end."""
        self.average.swap()
        lora.merge_into(self.plain, self.tuned)
        try:
            yield
        finally:
            self.average.swap()

    @property
    def _seed(self) -> tuple[str | int, ...]:
        """What keys the noise of this iteration, with prompt and sibling."""
        return self.seed, "finetune", self.done

    @staticmethod
    def predict(network: nn.Module) -> Callable[[Tensor, float | Tensor, Conditioning], Tensor]:
        """The velocity by `network`, this trainer's `tuned` or `plain`, as the generator's `predict` would give it."""

        def predict(x: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
            times = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
            return network(x, times, cond.tokens)

        return predict

    def _learn(self, examples: Sequence[Examples], cond: Conditioning, kept_P: Tensor, kept: int) -> dict[str, float]:
        """Optimiser steps on the groups that have a signal, `kept` over all processes; means of what was watched."""
        settings = self.settings
        watched = torch.zeros(3, device=self.accelerator.device)
        norms = 0.0
        for update in range(settings.updates):
            groups = kept_P.nonzero()[:, 0]
            groups = groups[groups % settings.updates == update]
            share = max(1, kept) / settings.updates / self.accelerator.num_processes
            weight = float(len(groups) > 0) * len(kept_P) / share / sum(map(len, examples))
            if not len(groups):
                # Every process must take part in the exchange of gradients.
                groups = groups.new_zeros(1)
            pieces = [piece for each in examples for piece in _pieces(each, groups, settings.batch)]
            for index, piece in enumerate(pieces):
                waits = index + 1 < len(pieces)
                with self.accelerator.no_sync(self.wrapped) if waits else contextlib.nullcontext():
                    watched += self._backward(piece, cond, weight)
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

    def _backward(self, piece: Examples, cond: Conditioning, weight: float) -> Tensor:
        """Add the gradient of one piece, each of its inputs weighing `weight`; loss, KL and clip fraction (3,)."""
        asked = (piece.x_t, piece.t, cond[piece.prompt])
        reference = old = None
        with torch.no_grad():
            if self.algorithm.needs_reference:
                with lora.reference(self.tuned):
                    reference = self.predict(self.tuned)(*asked)
            if self.algorithm.needs_old:
                old = self.predict(self.plain)(*asked)
        loss = self.algorithm.loss(piece, Velocities(self.predict(self.wrapped)(*asked), reference, old))
        total = weight * loss.total.sum()
        self.accelerator.backward(total)
        return torch.stack([total.detach(), weight * loss.kl.sum(), weight * loss.clipped.sum()])

    def save(self, folder: Path) -> None:
        """Write the state of this moment; every process holds the same, one writes."""
        seen = self.normaliser.state() if self.normaliser else None
        save_state(folder, self._state(), [self.optimizer], {"done": self.done, "normaliser": seen})

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        extra = load_state(folder, self._state(), [self.optimizer])
        self.done = extra["done"]
        if self.normaliser:
            self.normaliser.load(extra["normaliser"])

    def _state(self) -> dict[str, nn.Module]:
        return {"lora": self.tuned, "average": self.average}


def _pieces(examples: Examples, groups: Tensor, size: int) -> Iterator[Examples]:
    """The examples of `groups` in batches of at most `size`."""
    for rows in torch.isin(examples.prompt, groups).nonzero()[:, 0].split(size):
        yield examples[rows]
