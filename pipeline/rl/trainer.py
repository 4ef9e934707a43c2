"""The algorithm-blind trainer: rolls out, asks the reward, lets the algorithm make a loss, steps the optimiser.

It owns accelerate, accumulation, the moving average and the state that a resumed run needs. Each iteration is a
function of its number and of that state, because all noise is keyed by (seed, iteration, prompt, sibling, step).
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from models.generator import Conditioning, Generator
from pipeline.compiling import compile_module, filled_to
from pipeline.judging import told
from pipeline.prompts import PromptRow
from pipeline.rl.advantage import Advantages, mixed_advantages, over_groups, variances
from pipeline.rl.algorithm import Algorithm, Examples, Velocities
from pipeline.rl.policy import policy_of
from pipeline.rl.rollout import Rollout, joined, rollout
from pipeline.rl.settings import TrainerSettings
from pipeline.rl.shares import Share, assembled, share_of
from pipeline.settings import UserError
from pipeline.sharding import shard
from pipeline.training import Average, load_state, save_state, trapezoid
from rewards.backbones.base import filled
from rewards.gradients import Gradient
from rewards.mixture import mixture_of
from rewards.normalising import Normaliser
from rewards.reward import Reward


@dataclass(frozen=True)
class Iteration:
    """What one iteration did, over all processes, and this process's pictures with their prompts and rewards.

    `term_means` and `term_stds` are of each term of the reward, as the terms gave them; `watched` is the algorithm's.
    `ratio_error` is the largest |rho - 1| of the first update: on-policy it is that of the log-probabilities.
    `pictures` is how many all processes painted.
    """

    reward_mean: float
    reward_std: float
    term_means: tuple[float, ...]
    term_stds: tuple[float, ...]
    kl: float
    loss: float
    grad_norm: float
    clip_fraction: float
    ratio_error: float | None
    watched: dict[str, float]
    groups: int
    groups_dropped: int
    pictures: int
    images: np.ndarray
    prompts: list[PromptRow]
    rewards: np.ndarray


@dataclass(frozen=True)
class Painted:
    """Siblings that were rolled out together, K for each of the `prompts` of all processes, `mine` among them.

    A group may have more siblings in another of these. `values` (B, M) are what the reward's terms say of this
    process's pictures, `terms_PKM` of all.
    """

    prompts: Sequence[PromptRow]
    mine: Sequence[PromptRow]
    share: Share
    cond: Conditioning
    rolled: Rollout
    values: np.ndarray
    terms_PKM: Tensor


class Others(Protocol):
    """So many prompts for the attempt of this number, fewer where there are not as many; none of those `but`."""

    def __call__(self, attempt: int, count: int, but: Set[str]) -> Sequence[PromptRow]: ...


class Trainer:
    """Moves a LoRA on `generator`, or its whole transformer, towards `reward`, which may be a mixture.

    Rollouts run on `plain`, a twin of the transformer that is brought up to the policy before each of them: with a LoRA
    merged into it, it is faster than base and adapter side by side, and the base weights stay exact. Where there is no
    twin (`TrainerSettings.twin`), `plain` is `tuned` itself.

    Where the network is `sharded`, every call of it is one of all processes: they roll out even shares, and a
    process with less to learn from makes up for it by pieces without weight. The generator may wait in main memory.

    Args:
        measured: whether somebody beside the algorithm asks for the base model.

    Raises:
        UserError: the groups cannot be shared out over the processes, or weights of this dtype cannot be trained so.
    """

    def __init__(
        self,
        generator: Generator,
        reward: Reward,
        algorithm: Algorithm,
        settings: TrainerSettings,
        seed: int,
        accelerator: Accelerator,
        measured: bool = False,
    ):
        self.generator, self.reward, self.algorithm = generator, mixture_of(reward), algorithm
        self.settings, self.seed, self.accelerator = settings, seed, accelerator
        with told("finetune"):
            self.times = tuple(generator.times(settings.steps, settings.shift))
        plan = algorithm.rollout_plan(seed, 0, self.times, settings.group_size)
        whole = algorithm.whole_groups or not plan.divisible
        size = settings.groups, settings.group_size, accelerator.num_processes
        self.sharded = settings.shards(accelerator.num_processes)
        self.shares = [share_of(*size, rank, whole, self.sharded) for rank in range(accelerator.num_processes)]
        self.share = self.shares[accelerator.process_index]
        dtype = str(generator.dtype).removeprefix("torch.")
        settings.check_weights(dtype, algorithm.needs_old)
        twin = copy.deepcopy(generator.transformer) if settings.has_twin(dtype) else None
        self.compiled = twin is not None and settings.compile and compile_module(twin, accelerator.device)
        needs_base = measured or algorithm.needs_reference or algorithm.needs_features
        self.policy = policy_of(generator, settings, needs_base, seed)
        self.tuned: nn.Module = self.policy.network
        self.plain: nn.Module = self.tuned if twin is None else twin
        if self.sharded:
            shard(self.tuned, accelerator.device)
            generator.to(accelerator.device)
        if settings.gradient_checkpointing:
            self.tuned.enable_gradient_checkpointing()
        self.trained = [p for p in self.tuned.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.95)
        )
        parts = algorithm.parts(_feature_width(generator) if algorithm.needs_features else 0, seed)
        self.parts = {name: part.module.to(accelerator.device) for name, part in parts.items()}
        for part in parts.values():
            self.optimizer.add_param_group({"params": list(part.module.parameters()), "lr": part.learning_rate})
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = Average({"lora": self.tuned}, settings.average)
        self.wrapped = self.tuned if self.sharded else accelerator.prepare_model(self.tuned)
        self.grad_scaler = torch.amp.GradScaler(accelerator.device.type, enabled=settings.dtype == "float16")
        by = self.reward.normalise
        with told("finetune"):
            self.gradient = Gradient(self.reward, generator) if algorithm.needs_gradient else None
        self.normaliser = None if by == "none" else Normaliser(by, len(self.reward.terms))
        self.scaler = algorithm.scaler(len(self.reward.terms) if self.reward.combine == "advantages" else 1)
        self.done = 0

    def iterate(self, prompts: Sequence[PromptRow], others: Others | None = None) -> Iteration:
        """One iteration on `prompts`, the same on every process; each takes its share of them.

        Where `settings.redraws` allow it, `others` are asked for prompts to make up for groups without a signal. Then
        the groups that vary most are enlarged by `settings.enlarge`.
        """
        settings = self.settings
        painted = [self._paint(prompts)]
        for attempt in range(settings.redraws if others else 0):
            missing = settings.groups - int(self._advantages(painted).kept.sum())
            if missing <= 0:
                break
            count = self._shared_out(missing)
            more = others(attempt, count, {prompt.id for part in painted for prompt in part.prompts})
            if len(more) < count:
                break
            painted.append(self._paint(more))
        if settings.enlarge:
            painted.append(self._paint(self._most_varied(painted), settings.group_size))
        found = self._advantages(painted, final=True)
        terms_PKM = torch.cat([part.terms_PKM for part in painted])
        valid_PK = terms_PKM.isfinite().all(-1)
        if not valid_PK.any():
            raise UserError(f"finetune: no picture of iteration {self.done} got a reward; the same command goes on")
        factor = trapezoid(self.done, settings.iterations, 0, round(settings.decay * settings.iterations))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        mine = [prompt for part in painted for prompt in part.mine]
        rolled, texts = joined([part.rolled for part in painted]), [prompt.text for prompt in mine]
        examples = self.algorithm.examples(rolled, self._own(painted, found.values), [p.id for p in mine], self._seed)
        cond, kept_P = Conditioning.joined([part.cond for part in painted]), self._own(painted, found.kept)
        numbers_P = self._own(painted, torch.arange(len(found.kept), device=kept_P.device))
        learned = self._learn(examples, cond, texts, kept_P, numbers_P, int(found.kept.sum()))
        self.average.update(self.done)
        self.done += 1
        terms, groups_R = terms_PKM[valid_PK], _groups(painted).to(valid_PK.device)  # (N, M), (R,)
        seen = torch.from_numpy(self.reward.total(terms.cpu().numpy()).values)
        return Iteration(
            reward_mean=float(seen.mean()),
            reward_std=float(seen.std(correction=0)),
            term_means=tuple(terms.mean(0).tolist()),
            term_stds=tuple(terms.std(0, correction=0).tolist()),
            **learned,
            groups=len(groups_R.unique()),
            groups_dropped=len(groups_R[~found.kept].unique()),
            pictures=valid_PK.numel(),
            images=rolled.images,
            prompts=[prompt for prompt in mine for _ in self.share.siblings],
            rewards=self.reward.total(np.concatenate([part.values for part in painted])).values,
        )

    def _shared_out(self, groups: int) -> int:
        """At least so many groups, and as many as leave no process without one."""
        columns = self.share.columns
        return math.ceil(groups / columns) * columns if self.sharded else max(groups, columns)

    def _most_varied(self, painted: Sequence[Painted]) -> list[PromptRow]:
        """The prompts of `settings.enlarge` groups, in the order in which they were painted."""
        terms_PKM, valid_PK, weights_M = self._scaled(painted, final=False)
        order = variances((terms_PKM * weights_M).sum(-1), valid_PK).argsort(descending=True, stable=True)
        prompts = [prompt for part in painted for prompt in part.prompts]
        return [prompts[place] for place in sorted(order[: self._shared_out(self.settings.enlarge)].tolist())]

    def _paint(self, prompts: Sequence[PromptRow], first: int = 0) -> Painted:
        """Roll out and rate the groups of `prompts`, each process its share, the siblings numbered from `first` on."""
        shares = [replace(share, groups=len(prompts)) for share in self.shares]
        share = shares[self.accelerator.process_index]
        mine = share.of(prompts)
        with torch.no_grad(), told("finetune"):
            cond = self.generator.encode([prompt.text for prompt in mine])
        rolled, values = self._rated(mine, cond, first)
        return Painted(prompts, mine, share, cond, rolled, values, self._gathered(values, rolled, shares))

    def _rated(self, mine: Sequence[PromptRow], cond: Conditioning, first: int) -> tuple[Rollout, np.ndarray]:
        """Groups rolled out, and what the terms say (B, M) of the pictures, which are asked in order, lot by lot."""
        lots = torch.arange(len(mine)).tensor_split(min(self.settings.overlap, len(mine)))
        if len(lots) == 1:
            alone = self._roll(cond, mine, first)
            return alone, self.reward.each(list(alone.images), [one.text for one in mine for _ in self.share.siblings])
        rolled, rated = [], []
        with ThreadPoolExecutor(max_workers=1) as rater:
            for lot in lots:
                prompts = [mine[row] for row in lot.tolist()]
                rolled.append(self._roll(cond[lot.to(cond.device)], prompts, first))
                texts = [prompt.text for prompt in prompts for _ in self.share.siblings]
                rated.append(rater.submit(copy_context().run, self.reward.each, list(rolled[-1].images), texts))
            return joined(rolled), np.concatenate([one.result() for one in rated])

    @staticmethod
    def _own(painted: Sequence[Painted], values: Tensor) -> Tensor:
        """This process's part of `values`, (P, K) or (P,), of all groups."""
        parts = values.split([len(part.prompts) for part in painted])
        return torch.cat([part.share.part(value) for part, value in zip(painted, parts, strict=True)])

    def _gathered(self, values: np.ndarray, rolled: Rollout, shares: Sequence[Share]) -> Tensor:
        """What the terms say (P, K, M) of all processes' pictures, given what they say (B, M) of this one's."""
        share = shares[self.accelerator.process_index]
        mine = values.reshape(len(share.group_numbers), len(share.siblings), -1)
        drawn = rolled.latents, *(transition.old for transition in rolled.transitions)
        found = gather_object([(mine, all(bool(each.isfinite().all()) for each in drawn))])
        if not all(finite for _, finite in found):
            raise self._not_finite("a log-probability or a latent")
        return torch.from_numpy(assembled(shares, [part for part, _ in found])).to(self.accelerator.device)

    def _advantages(self, painted: Sequence[Painted], final: bool = False) -> Advantages:
        """Of the groups of all processes."""
        advantages = over_groups(self.algorithm.advantages, _groups(painted).to(self.accelerator.device))
        terms_PKM, valid_PK, weights_M = self._scaled(painted, final)
        return mixed_advantages(terms_PKM, valid_PK, weights_M, self.reward.combine, advantages)

    def _scaled(self, painted: Sequence[Painted], final: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Terms (P, K, M) of the groups of all processes on the scale of what was seen so far, which pictures have them
        (P, K), and their weights (M,). Where it is `final` they count among what was seen from now on."""
        terms_PKM, weights_M = torch.cat([part.terms_PKM for part in painted]), self._weights
        valid_PK, ids = terms_PKM.isfinite().all(-1), [prompt.id for part in painted for prompt in part.prompts]
        seen = self.normaliser, self.scaler
        normaliser, scaler = seen if final else copy.deepcopy(seen)
        if normaliser:
            normalised = normaliser(terms_PKM.cpu().numpy(), valid_PK.cpu().numpy(), ids)
            terms_PKM = torch.from_numpy(normalised).to(terms_PKM.device)
        if scaler:
            if self.reward.combine == "rewards":
                terms_PKM, weights_M = (terms_PKM * weights_M).sum(-1, keepdim=True), torch.ones_like(weights_M[:1])
            scaled = scaler(terms_PKM.cpu().numpy(), valid_PK.cpu().numpy(), ids)
            terms_PKM = torch.from_numpy(scaled).to(terms_PKM.device)
        return terms_PKM, valid_PK, weights_M

    @property
    def _weights(self) -> Tensor:
        """Of the reward's terms, (M,)."""
        return torch.from_numpy(self.reward.weights).to(self.accelerator.device)

    def _roll(self, cond: Conditioning, prompts: Sequence[PromptRow], first: int) -> Rollout:
        settings = self.settings
        self.bring_up()
        siblings = self.share.siblings
        plan = self.algorithm.rollout_plan(self.seed, self.done, self.times, len(siblings))
        plan = replace(plan, first=first + siblings.start)
        ids = [prompt.id for prompt in prompts]
        features = self._features if self.algorithm.needs_features else None
        return rollout(self.generator, self.predict(self.plain), cond, ids, self._seed, plan, settings.batch, features)

    def _features(self, x: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        with self.reference(), self._autocast():
            return self.generator.features(x, t, cond).to(x.dtype)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block `tuned` and `plain` are the moving average, which is what is kept in the end."""
        self.average.swap()
        self.bring_up()
        try:
            yield
        finally:
            self.average.swap()

    def bring_up(self) -> None:
        """Make the twin, if there is one, what `tuned` is now."""
        if self.plain is not self.tuned:
            self.policy.merge_into(self.plain)

    def reference(self) -> contextlib.AbstractContextManager[None]:
        """Within the block `tuned` is the base model. Raises UserError where that was not kept."""
        return self.policy.reference()

    @property
    def _seed(self) -> tuple[str | int, ...]:
        """What keys the noise of this iteration, with prompt and sibling."""
        return self.seed, "finetune", self.done

    def predict(self, network: nn.Module) -> Callable[[Tensor, float | Tensor, Conditioning], Tensor]:
        """The velocity by `network`, this trainer's `tuned` or `plain`, as the generator's `predict` would give it,
        but computed in the dtype of the settings, and where it is compiled by calls of few sizes."""
        static = self.compiled and network is self.plain

        def predict(x: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
            asked = x, t, cond
            size = filled_to(len(x), self.settings.batch)
            if static and size > len(x):
                rows = filled(torch.arange(len(x), device=x.device), size)
                asked = x[rows], t[rows] if isinstance(t, Tensor) and t.ndim else t, cond[rows]
            with self._autocast():
                v = self.generator.velocity(network, *asked)
            return v[: len(x)].to(x.dtype)

        return predict

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        if self.settings.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.accelerator.device.type, getattr(torch, self.settings.dtype))

    def _learn(
        self,
        examples: Sequence[Examples],
        cond: Conditioning,
        texts: Sequence[str],
        kept_P: Tensor,
        numbers_P: Tensor,
        kept: int,
    ) -> dict[str, Any]:
        """Optimiser steps on this process's groups that have a signal, `kept` over all processes; means of what was
        watched. `numbers_P` are the groups' numbers among all, which share them out over the updates."""
        settings = self.settings
        watched: dict[str, Tensor] = {}
        errors: list[Tensor] = []
        norms = 0.0
        here = len(kept_P) * len(self.share.siblings) / settings.group_size  # groups' worth of pictures
        for update in range(settings.updates):
            groups = (kept_P & (numbers_P % settings.updates == update)).nonzero()[:, 0]
            share = max(1, kept) / settings.updates / self.accelerator.num_processes
            weight = float(len(groups) > 0) * here / share / len(examples)
            if not len(groups):
                # Every process must take part in the exchange of gradients.
                groups = groups.new_zeros(1)
            # Every set weighs the same, and so does every picture, whether several share an input or not.
            size = max(1, settings.batch // self.algorithm.rows)
            sets = [[(piece, weight / len(each)) for piece in _pieces(each, groups, size)] for each in examples]
            pieces = list(chain.from_iterable(self._levelled(sets)))
            for index, (piece, each_weighs) in enumerate(pieces):
                waits = index + 1 < len(pieces)
                with self.accelerator.no_sync(self.wrapped) if waits else contextlib.nullcontext():
                    sums, error = self._backward(piece, cond, texts, each_weighs)
                for name, value in sums.items():
                    watched[name] = watched.get(name, 0.0) + value
                if error is not None and update == 0:
                    errors.append(error)
            norms += self._step(kept > 0)
        means = self.accelerator.reduce(torch.stack(list(watched.values())) / settings.updates, "sum").tolist()
        told = {name: mean / self.accelerator.num_processes for name, mean in zip(watched, means, strict=True)}
        curves = {name: told.pop(name) for name in ("loss", "kl", "clip_fraction")}
        if not all(map(math.isfinite, curves.values())):
            raise self._not_finite("the loss")
        return {
            **curves,
            "ratio_error": self.accelerator.gather(torch.stack(errors).amax(0, True)).max().item() if errors else None,
            "grad_norm": norms / settings.updates,
            "watched": self.algorithm.summary(told),
        }

    def _levelled(self, sets: Sequence[list[tuple[Examples, float]]]) -> Iterator[list[tuple[Examples, float]]]:
        """Each set with as many weighed pieces as all processes go through; what is added has no weight."""
        for pieces, most in zip(sets, self.most([len(pieces) for pieces in sets]), strict=True):
            first, _ = pieces[0]
            yield pieces + [(first[torch.zeros(1, dtype=torch.long)], 0.0)] * (most - len(pieces))

    def most(self, counts: Sequence[int]) -> list[int]:
        """`counts` of what this process asks of `tuned`; where that is sharded, the largest of all processes, as each
        has to call it equally often."""
        if not self.sharded:
            return list(counts)
        return self.accelerator.gather(torch.tensor([counts], device=self.accelerator.device)).amax(0).tolist()

    def _step(self, moves: bool) -> float:
        """Step the optimiser, if it `moves`, and forget the gradient; its norm, before it was clipped."""
        own = [list(part.parameters()) for part in self.parts.values()]
        for each in (self.trained, *own) if self.sharded else own:
            self._exchange(each)
        self.grad_scaler.unscale_(self.optimizer)
        modules = [self.trained, *own]
        norms = [float(nn.utils.clip_grad_norm_(each, self.settings.max_grad_norm)) for each in modules]
        overflows = self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() >= 1
        if not all(map(math.isfinite, norms)):
            if not overflows:
                raise self._not_finite("the gradient")
            norms = [0.0]
        if moves:
            self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        self.optimizer.zero_grad()
        return norms[0]

    def _not_finite(self, what: str) -> UserError:
        """Nothing of this iteration has been saved when this is raised, on every process alike."""
        wider = "" if self.settings.dtype == "float32" else ", or finetune.dtype: float32"
        return UserError(
            f"finetune.learning_rate: {what} of iteration {self.done} is not finite, and nothing of it was saved; "
            f"try a lower one{wider}"
        )

    def _exchange(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give every process the mean gradient, as the wrapper of the generator does for its own."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _backward(
        self, piece: Examples, cond: Conditioning, texts: Sequence[str], weight: float
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Add the gradient of one piece, each of its inputs weighing `weight`; what was watched, summed up so, and how
        far a ratio is from 1 at most."""
        reference = old = average = None

        def asked(network: nn.Module) -> Tensor:
            predict = self.predict(network)
            return piece.ask(lambda x_t, t, prompt: predict(x_t, t, cond[prompt]))

        def reward(latents: Tensor) -> Tensor:
            return self.gradient(latents, [texts[prompt] for prompt in piece.prompt.tolist()])

        with torch.no_grad():
            if self.algorithm.needs_reference:
                with self.reference():
                    reference = asked(self.tuned)
            if self.algorithm.needs_old:
                old = asked(self.plain)
            if self.algorithm.needs_average:
                self.average.swap()
                average = asked(self.tuned)
                self.average.swap()
        rated = reward if self.algorithm.needs_gradient else None
        counts = (1 - piece.t) ** 2 if self.generator.vp else 1.0
        loss = self.algorithm.loss(piece, Velocities(asked(self.wrapped), reference, old, rated, average, counts))
        total = weight * loss.total.sum()
        self.accelerator.backward(self.grad_scaler.scale(total))
        seen = {"kl": loss.kl, "clip_fraction": loss.clipped, **loss.watched}
        error = None if loss.ratio_error is None else loss.ratio_error.max()
        return {"loss": total.detach(), **{name: weight * value.sum() for name, value in seen.items()}}, error

    def save(self, folder: Path) -> None:
        """Write the state of this moment; every process holds the same, one writes."""
        seen = self.normaliser.state() if self.normaliser else None
        scale = self.scaler.state() if self.scaler else None
        extra = {
            "done": self.done,
            "normaliser": seen,
            "scaler": scale,
            "grad_scaler": self.grad_scaler.state_dict(),
        }
        save_state(folder, self._state(), [self.optimizer], extra)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""
        extra = load_state(folder, self._state(), [self.optimizer])
        self.done = extra["done"]
        self.grad_scaler.load_state_dict(extra["grad_scaler"])
        if self.normaliser:
            self.normaliser.load(extra["normaliser"])
        if self.scaler:
            self.scaler.load(extra["scaler"])

    def _state(self) -> dict[str, nn.Module]:
        return {"lora": self.tuned, "average": self.average, **self.parts}


def _feature_width(generator: Generator) -> int:
    """Raises UserError where the generator's family has no features."""
    try:
        return generator.feature_width
    except NotImplementedError as error:
        raise UserError(f"finetune.algorithm: it asks for features of the generator: {error}") from None


def _groups(painted: Sequence[Painted]) -> Tensor:
    """The number of the group (R,) of each row of siblings; those of one prompt are one group."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(prompt.id, len(numbers)) for part in painted for prompt in part.prompts])


def _pieces(examples: Examples, groups: Tensor, size: int) -> Iterator[Examples]:
    """The examples of `groups` in batches of at most `size`."""
    for rows in torch.isin(examples.prompt, groups).nonzero()[:, 0].split(size):
        yield examples[rows]
