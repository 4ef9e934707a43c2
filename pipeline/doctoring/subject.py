"""The run as it is examined: its own generator, adapter, algorithm and reward, with a few prompts and siblings.

Every check trains a policy of its own on a copy of the generator, so that none sees what another did. Copies share the
weights that are frozen, where these are not sharded.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

import rewards
from judges.audit import unremembered
from models.generator import Conditioning, Generator
from models.geometry import Unknown
from models.keys import sample_key
from models.samplers import keyed_noise
from pipeline.forecast import Painter, device_memory, needs
from pipeline.judging import told
from pipeline.loop import run_dir
from pipeline.mixing import ModelTerm, RewardTerm
from pipeline.prompts import PromptRow, draw_key
from pipeline.rl import AlgorithmConfig, algorithm_of
from pipeline.rl.algorithm import Algorithm, Examples, Loss, Velocities
from pipeline.rl.preferred import Preferences
from pipeline.rl.rollout import Plan, Rollout, rollout
from pipeline.rl.settings import TrainerSettings
from pipeline.rl.trainer import Iteration, Trainer
from pipeline.runner import Context, states
from pipeline.settings import UserError
from pipeline.sharding import shard
from pipeline.stages import STAGES
from pipeline.stages.finetune import FinetuneConfig, preferences_of
from pipeline.store import Artifact
from rewards.mixture import Mixture
from rewards.reward import Rewards

GROUPS, SIBLINGS = 2, 4
"""Prompts a process, and pictures of each."""

NUDGE = 0.01
"""Standard deviation of what is added to every trained weight, to leave the base model by a little."""


class Drawn:
    """A reward that looks at no picture: keyed by prompt and place in the group, so that every group has a signal and
    no rounding of a picture reaches a gradient."""

    def __call__(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> Rewards:
        seen: Counter[str] = Counter()
        values = []
        for prompt in prompts:
            values.append(sample_key("doctor", prompt, seen[prompt]) / 2**63)
            seen[prompt] += 1
        return Rewards.of(values)


class Recorded:
    """An algorithm, and every loss that it was asked for."""

    def __init__(self, algorithm: Algorithm):
        self.algorithm = algorithm
        self.asked: list[tuple[Examples, Velocities]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.algorithm, name)

    def loss(self, examples: Examples, v: Velocities) -> Loss:
        self.asked.append((examples, replace(v, policy=v.policy.detach())))
        return self.algorithm.loss(examples, v)


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Attributes:
        config: of the run. `settings` are those of its trainer, shrunk, and in float32.
        generator: that of the run with float32 weights, in which a difference is a bug and no rounding; the run's own
            where the device has no room for them, or where weights are sharded.
        own: that of the run as it is, where weights are sharded whole and in main memory. No check changes either.
        reward: that of the run.
        prompts: one for each group of all processes.
        preferences: what an off-line algorithm learns from.
    """

    config: Any
    settings: TrainerSettings
    generator: Generator
    own: Generator
    reward: Mixture
    prompts: tuple[PromptRow, ...]
    preferences: Preferences | None

    @property
    def exact(self) -> bool:
        """Whether there are float32 weights to examine."""
        return self.generator.dtype == torch.float32

    @property
    def processes(self) -> int:
        return len(self.prompts) // GROUPS

    @property
    def sharded(self) -> bool:
        """Whether the weights are shared out over the processes."""
        return self.settings.shards(self.processes)

    @property
    def algorithm(self) -> AlgorithmConfig:
        """The settings of the run's algorithm."""
        return self.config.finetune.algorithm

    @cached_property
    def plan(self) -> Plan:
        """How the first iteration rolls out."""
        with told("finetune"):
            times = tuple(self.generator.times(self.settings.steps, self.settings.shift))
        return self.made().rollout_plan(self.config.seed, 0, times, self.settings.group_size)

    @cached_property
    def first(self) -> Iteration:
        """The first iteration, before which policy, old policy and base model are one."""
        return self.trainer(own=True, dtype=self.config.finetune.dtype).iterate(self.prompts)

    @cached_property
    def drawn(self) -> Mixture:
        """The reward with `Drawn` for every term; that of the run itself where its gradient is followed."""
        if self.algorithm.follows_reward:
            return self.reward
        return replace(self.reward, terms=tuple(replace(term, reward=Drawn()) for term in self.reward.terms))

    def made(self, **changes: Any) -> Algorithm:
        """The run's algorithm, with changes to its settings."""
        return algorithm_of(self.algorithm.model_copy(update=changes), self.preferences)

    def trainer(
        self, reward: Mixture | None = None, algorithm: Algorithm | None = None, own: bool = False, **settings: Any
    ) -> Trainer:
        """A trainer before its first iteration, by default with the reward `drawn`, on `generator` or on `own`."""
        generator = self.own if own or self.sharded else self.generator
        return Trainer(
            generator.copied(shared=self.settings.lora is not None and not self.sharded),
            reward or self.drawn,
            algorithm or self.made(),
            self.settings.model_copy(update=settings),
            self.config.seed,
            Accelerator(),
            measured=True,
        )

    def cond(self, prompts: Sequence[PromptRow] | None = None) -> Conditioning:
        with torch.no_grad(), told("finetune"):
            return self.generator.encode([prompt.text for prompt in prompts or self.prompts])

    def noise(self, count: int) -> Tensor:
        """Latents (count, ...) at the first time."""
        keys = [sample_key(self.config.seed, "doctor", place) for place in range(count)]
        noise = keyed_noise(keys, self.generator.latent_shape, self.generator.device)
        return self.generator.prior_std(self.plan.times[0]) * noise

    def asked(self) -> tuple[Tensor, float, Conditioning]:
        """What a network can be asked: latents, their time, and a prompt for each."""
        return self.noise(len(self.prompts)), 0.5, self.cond()

    def rolled(self, prompts: Sequence[PromptRow]) -> Rollout:
        """What the base model rolls out for `prompts`, as the algorithm asks for it."""
        predict, cond, ids = self.generator.predict, self.cond(prompts), [prompt.id for prompt in prompts]
        seed = self.config.seed, "finetune", 0
        return rollout(self.generator, predict, cond, ids, seed, self.plan, self.settings.batch)


def nudged(trainer: Trainer) -> list[Tensor]:
    """Move every trained weight by a little keyed noise; what was added."""
    steps = []
    with torch.no_grad():
        for place, weight in enumerate(trainer.trained):
            noise = keyed_noise([sample_key("nudge", place)], weight.shape, weight.device)[0]
            steps.append(NUDGE * noise.to(weight.dtype))
            weight += steps[-1]
    return steps


def gradients(trainer: Trainer, prompts: Sequence[PromptRow]) -> tuple[list[Tensor], Iteration]:
    """The gradients that the optimiser is handed in the first of its steps in an iteration, and what the iteration did.

    Raises:
        UserError: it took no step.
    """
    found: list[list[Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trainer.trained])

    hook = trainer.optimizer.register_step_pre_hook(keep)
    done = trainer.iterate(prompts)
    hook.remove()
    if not found:
        raise UserError("doctor: no group of pictures had a signal, so that nothing was learned; change seed")
    return found[0], done


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in one vector, float64, on the CPU."""
    return torch.cat([tensor.detach().double().cpu().flatten() for tensor in tensors])


def examined(config: Any, context: Context, say: Callable[[str], None]) -> Subject:
    """Load what is examined; `say` is told in a line what differs from the run.

    Raises:
        UserError: something that the settings name is not there, or there are too few prompts.
    """
    settings, ranks = config.finetune, context.accelerator.num_processes
    changes = {
        "groups": GROUPS * ranks,
        "group_size": _siblings(settings),
        "updates": 1,
        "max_grad_norm": 1e9,
        "enlarge": 0,
    }
    changes |= {"compile": False, "dtype": "float32", "twin": settings.has_twin(config.generator.dtype)}
    small = settings.model_copy(update=changes)
    context, device = _standing(config.model_copy(update={"finetune": small}), context), context.accelerator.device
    own = config.generator.build(str(device), waits=settings.shards(ranks))
    if settings.shards(ranks):
        generator = _sharded(own, device)
    else:
        generator = own.in_float32() if _exact_fits(config, small, ranks) else own
    preferences = None
    if settings.algorithm.offline:
        if "prefer" not in context.inputs:
            raise UserError(
                f"doctor needs the result of prefer, which is not complete in {run_dir(config)} for these settings; "
                "run the stage prefer first"
            )
        preferences = preferences_of(context, generator)
    prompts = (preferences or config.prompts).draw(draw_key(config.seed, "doctor"), GROUPS * ranks)
    if len(prompts) < GROUPS * ranks:
        raise UserError(f"prompts: doctor takes {GROUPS * ranks}, but there are only {len(prompts)}; add some")
    reward = _reward(config, context, say)
    return Subject(config, small.trained, generator, own, reward, tuple(prompts), preferences)


def _sharded(generator: Generator, device: torch.device) -> Generator:
    """A copy on `device`, its weights shared out; the transformer of `generator` stays in main memory."""
    other = generator.copied()
    shard(other.transformer, device)
    return other.to(device)


def _exact_fits(config: Any, settings: FinetuneConfig, ranks: int) -> bool:
    """Whether float32 weights have room beside those of the run, as far as can be told."""
    if config.generator.dtype == "float32":
        return True
    generator = config.generator.model_copy(update={"dtype": "float32"})
    changed = config.model_copy(update={"generator": generator, "finetune": settings})
    memory = device_memory(ranks)
    try:
        need = next(need for need in needs(changed, ranks, memory) if need.stage == "finetune")
    except Unknown:
        return True
    return need.total + Painter(config).weights <= memory


def _siblings(settings: FinetuneConfig) -> int:
    """The fewest, from `SIBLINGS` on, for which the algorithm has room."""
    for count in range(SIBLINGS, settings.group_size):
        with contextlib.suppress(ValueError):
            settings.algorithm.check(settings.steps, count)
            return count
    return settings.group_size


def _standing(config: Any, context: Context) -> Context:
    """With the complete artifacts of the run for inputs."""
    folder = run_dir(config)
    standing = [entry.stage.name for entry in states(config, STAGES, folder) if entry.state == "reuse"]
    return replace(context, config=config, inputs={name: Artifact(folder / name) for name in standing})


def _reward(config: Any, context: Context, say: Callable[[str], None]) -> Mixture:
    """The reward of the run, whose terms remember nothing that they were asked."""
    mixture = config.finetune.mixture
    if any(isinstance(term, ModelTerm) for term in mixture.terms) and "reward" not in context.inputs:
        say("the reward model of the run is not trained yet: its untrained backbone stands in for it")
    built = [_built(term, config, context) for term in mixture.terms]
    terms = tuple(rewards.Term(term.name, one, term.weight) for term, one in zip(mixture.terms, built, strict=True))
    return Mixture(terms, mixture.combine, mixture.normalise)


def _built(term: RewardTerm, config: Any, context: Context) -> "rewards.Reward":
    if isinstance(term, ModelTerm) and "reward" not in context.inputs:
        model = config.reward.untrained(config.seed).to(context.accelerator.device).eval()
        return rewards.ModelReward(model, reading=rewards.Reading(term.reading, term.coefficient))
    built = term.build(context)
    return rewards.JudgeReward(unremembered(built.judge)) if isinstance(built, rewards.JudgeReward) else built
