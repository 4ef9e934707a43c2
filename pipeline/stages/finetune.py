"""The stage `finetune`: a LoRA on the generator moves towards the reward.

Leaves the moving average of the adapter, or where the watch stopped the training an earlier one, the curves, and a few
pictures of every iteration, on which `evaluate` measures what the reward does not see.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import Field, model_validator

import models
import rewards
from judges.base import Judge
from models.samplers import calls
from pipeline.forecast import fits
from pipeline.judging import told
from pipeline.mixing import MixtureConfig, ModelTerm, RewardChoice, mixture_config
from pipeline.pace import call_seconds, embedded, judging_seconds
from pipeline.pictures import pictures_of
from pipeline.prompts import PromptRow, PromptSource, draw_key
from pipeline.rl import AlgorithmConfig, algorithm_of
from pipeline.rl.dpo import DPOConfig
from pipeline.rl.grpo import GRPOConfig
from pipeline.rl.journal import Journal, folder, missing
from pipeline.rl.preferred import Preferences
from pipeline.rl.settings import RefreshSettings, TrainerSettings, WatchSettings
from pipeline.runner import Context, Interrupted, Stage, Work
from pipeline.settings import UserError
from pipeline.stages.reward import NO_INFLUENCE
from pipeline.stages.sample import columns
from pipeline.store import read_rows, write_rows

if TYPE_CHECKING:
    from pipeline.rl.refresh import Refresh
    from pipeline.rl.trainer import Iteration, Trainer
    from pipeline.rl.watch import Watch

ADAPTER, WHOLE = "lora", "transformer"
"""Where what was trained is kept: an adapter, or every weight."""

CURVES = datasets.Features(
    {
        "iteration": datasets.Value("int32"),
        **{
            name: datasets.Value("float32")
            for name in ("reward_mean", "reward_std", "kl", "loss", "grad_norm", "clip_fraction", "ratio_error")
        },
        "groups": datasets.Value("int32"),
        "groups_dropped": datasets.Value("int32"),
        "images": datasets.Value("int32"),
    }
)
ROLLOUTS = datasets.Features(
    {
        "iteration": datasets.Value("int32"),
        "prompt_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "skill": datasets.Value("string"),
        "reward": datasets.Value("float32"),
        "image": datasets.Image(),
    }
)
TERMS = datasets.Features(
    {
        "iteration": datasets.Value("int32"),
        "term": datasets.Value("string"),
        "weight": datasets.Value("float32"),
        "mean": datasets.Value("float32"),
        "std": datasets.Value("float32"),
    }
)
"""Of each term of a mixture, as it was before it was normalised."""

_TUNED = 0.6
"""Of the calls that a path takes, what rolling out, rating and learning from a picture of the embedded world cost: its
siblings share most of a path, and learn from a step of it."""

_TABLES = {"curves": CURVES, "rollouts": ROLLOUTS, "terms": TERMS}

_REFUSED = {
    "FSDP": "shards what is trained; to share out frozen weights set finetune.shard to true",
    "DEEPSPEED": "shards gradients and moments, which of an adapter are megabytes; finetune.shard shares out weights",
}
"""What else accelerate could do, and why not."""


class FinetuneConfig(TrainerSettings):
    """Reinforcement learning of the generator.

    Attributes:
        reward: the reward `model`, the `judge` itself (direct RLAIF), the `gold` oracle of the embedded world, or a
            mixture (see `pipeline.mixing`).
        refresh: train the reward model on the policy's own pictures now and then; never where it is null.
        allow_gold: must be true where `gold`, which is there to measure, is among the rewards.
        kept_images: pictures of each iteration that are kept, to measure on.
        save_every: iterations between two checkpoints.
        watch: checks for signs that the reward is hacked, which can end the training; none where it is null.
        seed: of prompts and noise; the run's where it is null. Another one repeats the training on the same reward.
        trackers: who is told the curves besides `log.jsonl`; their files are in `trackers/` of the run.
    """

    algorithm: Annotated[AlgorithmConfig, Field(discriminator="type")] = GRPOConfig()
    reward: RewardChoice = "model"
    refresh: RefreshSettings | None = None
    allow_gold: bool = False
    kept_images: int = Field(24, ge=0)
    save_every: int = Field(10, ge=1)
    watch: WatchSettings | None = WatchSettings()
    seed: int | None = None
    trackers: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()

    @model_validator(mode="after")
    def _trackers_are_there(self) -> Self:
        if lost := missing(self.trackers):
            raise ValueError(f"trackers: {lost[0]} is not installed; pip install '.[{lost[0]}]', or leave it out")
        return self

    @model_validator(mode="after")
    def _base_is_kept_where_it_is_asked_for(self) -> Self:
        if self.lora or self.keep_base:
            return self
        if self.watch:
            raise ValueError(
                "watch: it measures the KL from the base model, of which full fine-tuning keeps no copy; "
                "set finetune.keep_base to true, or watch to null"
            )
        algorithm = algorithm_of(self.algorithm)
        if algorithm.needs_reference or algorithm.needs_features:
            raise ValueError(
                f"algorithm: {self.algorithm.type} asks the base model, of which full fine-tuning keeps no copy; set "
                "finetune.keep_base to true (or the algorithm's kl to 0, where that is what asks)"
            )
        return self

    @model_validator(mode="after")
    def _gold_is_allowed(self) -> Self:
        if "gold" in self.rewarded and not self.allow_gold:
            raise ValueError("reward: the gold oracle only measures; set finetune.allow_gold to true to train on it")
        return self

    @model_validator(mode="after")
    def _something_is_refreshed(self) -> Self:
        if self.refresh and "model" not in self.rewarded:
            raise ValueError("refresh: the run's reward model is not among the rewards; set it to null")
        return self

    @model_validator(mode="after")
    def _algorithm_has_room(self) -> Self:
        self.algorithm.check(self.steps, self.group_size)
        return self

    @model_validator(mode="after")
    def _siblings_may_come_apart(self) -> Self:
        if self.enlarge and self.algorithm.whole_groups:
            raise ValueError(
                f"enlarge: {self.algorithm.type} chooses among siblings that are painted together; set it to 0, or "
                "take an algorithm that weighs each picture: grpo, ppo, ddpo, nft or awm"
            )
        return self

    @model_validator(mode="after")
    def _reward_can_be_followed(self) -> Self:
        if self.algorithm.follows_reward:
            self.mixture.check_gradient(self.algorithm.type)
        return self

    @model_validator(mode="after")
    def _network_can_be_sharded(self) -> Self:
        if self.shard and self.refresh:
            raise ValueError(
                "shard: a refresh paints other numbers of pictures on every process; set finetune.refresh to null, or "
                "shard to false"
            )
        if self.shard and self.inverts:
            raise ValueError(
                "shard: inversion takes another transformer, whole on every process; set "
                "finetune.algorithm.inversion to false, or shard to false"
            )
        return self

    def check_generator(self, dtype: str) -> None:
        """Raises UserError where a generator with weights of `dtype` cannot be trained so."""
        self.check_weights(dtype, algorithm_of(self.algorithm).needs_old)

    @property
    def inverts(self) -> bool:
        """Whether noise of pictures is found by a transformer of its own."""
        return isinstance(self.algorithm, DPOConfig) and self.algorithm.inversion

    @property
    def trained(self) -> TrainerSettings:
        """As the trainer takes them: off-line each prompt is painted once, to measure on."""
        return self.model_copy(update={"group_size": 1}) if self.algorithm.offline else self

    @property
    def kept_folder(self) -> str:
        """Of the artifact; `models.load_generator` reads it."""
        return ADAPTER if self.lora else WHOLE

    @property
    def mixture(self) -> MixtureConfig:
        return mixture_config(self.reward)

    @property
    def rewarded(self) -> set[str]:
        """The types of the rewards."""
        return {term.type for term in self.mixture.terms}


def _depends(config: Any) -> dict[str, Any]:
    settings: FinetuneConfig = config.finetune
    settings.mixture.check(config.reward, settings.algorithm.follows_reward)
    asked = "judge" in settings.rewarded or settings.refresh or (settings.watch and settings.watch.judge)
    return {
        "version": 6,
        "seed": config.seed,
        "generator": config.generator.depends(),
        "prompts": config.prompts.depends(),
        "finetune": settings.model_dump(mode="json", exclude={"trackers", "shard"}),
        "judge": config.judge.depends() if asked else None,
        "rewards": settings.mixture.depends(),
        "refreshed": _refreshed(config) if settings.refresh else None,
    }


def _refreshed(config: Any) -> dict[str, Any]:
    """What a refresh depends on besides."""
    reward = config.reward.model_dump(mode="json", exclude={"backbone", "ensemble", *NO_INFLUENCE})
    drawn = config.sample.model_dump(mode="json", include={"steps", "shift", "sampler", "eta"})
    return {"prefer": config.prefer.model_dump(mode="json"), "reward": reward, "sample": drawn}


def _work(config: Any) -> Work:
    settings: FinetuneConfig = config.finetune
    images, call = settings.iterations * settings.helpings * settings.trained.group_size, call_seconds(config)
    chosen = settings.algorithm.model_dump()
    rolled = calls(chosen.get("sampler", "ode"), settings.steps)
    if config.generator.ours:
        learning = images * _TUNED * rolled * call
    elif call is not None:
        algorithm = algorithm_of(settings.algorithm)
        others = algorithm.needs_reference + algorithm.needs_old + algorithm.needs_average
        learned = chosen.get("draws") or chosen.get("window") or chosen.get("last") or settings.steps
        learning = images * (rolled * call + learned * (call_seconds(config, learning=True) + others * call))
    else:
        learning = None
    judged = images if "judge" in settings.rewarded else 0
    rated = images if settings.rewarded & {"model", "checkpoint"} else 0
    painted = 0.0
    if refresh := settings.refresh:
        fresh = (settings.iterations - 1) // refresh.every * refresh.prompts * refresh.images
        images, judged = images + fresh, judged + fresh
        painted += fresh * config.sample.calls
    if watch := settings.watch:
        looked = (1 + -(-settings.iterations // watch.every)) * watch.prompts * (watch.images + 1)
        images, judged = images + looked, judged + looked * watch.judge
        painted += looked * settings.steps
    parts = {
        "learning": learning,
        "checks and refreshes": None if call is None else painted * call,
        "the judge": judging_seconds(config.judge, judged) if judged else 0.0,
        "the reward": 0.0 if embedded(config) or not rated else None,
    }
    return Work.of(images, parts, config.generator.dtype if settings.dtype == "float32" else settings.dtype)


def _run(context: Context) -> None:
    from pipeline.rl.trainer import Iteration, Trainer

    settings: FinetuneConfig = context.config.finetune
    if settings.seed is not None:
        context = replace(context, config=context.config.model_copy(update={"seed": settings.seed}))
    config, artifact = context.config, context.artifact
    waits = settings.shards(context.accelerator.num_processes)
    generator = config.generator.build(str(context.accelerator.device), waits=waits)
    reward = settings.mixture.build(context)
    preferences = preferences_of(context, generator) if settings.algorithm.offline else None
    algorithm = algorithm_of(settings.algorithm, preferences)
    accelerator = _accelerator(context)
    measured = settings.watch is not None
    trainer = Trainer(generator, reward, algorithm, settings.trained, config.seed, accelerator, measured)
    prompts = preferences or config.prompts
    if (checkpoint := artifact.resume / "trainer").is_dir():
        trainer.load(checkpoint)
    judge = _one_judge(context, trainer)
    watch = _watch(context, trainer, prompts, judge)
    refresh = _refresh(context, trainer, judge)
    journal = Journal(artifact, accelerator, config.name, trainer.done)
    pending: list[Iteration] = []

    def save() -> None:
        """Set the rows down before the checkpoint: after a kill between them the same rows are made again."""
        if context.accelerator.is_main_process and pending:
            _set_down(context, pending, trainer.done - len(pending))
            journal.settle()
            trainer.save(checkpoint)
        pending.clear()

    total = settings.iterations
    with context.progress.track(total, "iterations", "finetune", trainer.done) as advance:
        while True:
            if refresh and refresh.due(trainer.done):
                save()
                refresh.bring_up(trainer.done)
                if watch:
                    watch.rate_again()
            if watch and watch.due:
                save()
                watch.check()
            if trainer.done == total or (watch and watch.stopped):
                break
            others = partial(_others, config, prompts, trainer.done)
            done = trainer.iterate(_drawn(config, prompts, trainer.done), others)
            pending.append(done)
            journal.tell(trainer.done - 1, {**_curve(done), **done.watched})
            advance(1, reward=done.reward_mean, kl=done.kl)
            if trainer.done % settings.save_every == 0 or trainer.done == total:
                save()
            try:
                context.check_stop()
            except Interrupted:
                save()
                raise
    journal.write()
    if context.accelerator.is_main_process:
        for name, features in _TABLES.items():
            parts = [datasets.Dataset.from_parquet(str(path)) for path in sorted(artifact.resume.glob(f"{name}-*"))]
            if parts:
                write_rows(artifact, f"{name}-00000.parquet", datasets.concatenate_datasets(parts).to_list(), features)
        if refresh:
            refresh.write()
        if watch:
            watch.write()
        if watch and watch.stopped:
            artifact.write_folder(settings.kept_folder, watch.copy_kept)
        else:
            trainer.average.swap()
            artifact.write_folder(settings.kept_folder, trainer.policy.save)


def preferences_of(context: Context, generator: "models.Generator") -> Preferences:
    """The pairs of the run. Raises UserError where the generator does not paint pictures of their size."""
    pictures = pictures_of(context.inputs)
    height, width = generator.pixel_shape
    for key in pictures.one_of_each_size():
        if (size := pictures(*key).shape[:2]) != (height, width):
            raise UserError(
                f"finetune.algorithm.source: a picture of the pairs is {size[1]} x {size[0]} pixels, and the "
                f"generator paints {width} x {height}; scale them, or take online"
            )
    invert = _inversion(context, generator) if context.config.finetune.inverts else None
    return Preferences(read_rows(context.inputs["prefer"]).to_list(), pictures, generator.latents, invert)


def _inversion(
    context: Context, generator: "models.Generator"
) -> Callable[[torch.Tensor, Sequence[str]], torch.Tensor]:
    """From latents and their prompts to the noise from which the base model paints them.

    `generator`, which will be trained, is still that model. The copy that stays it shares all weights that are frozen.
    """
    settings: FinetuneConfig = context.config.finetune
    base = generator.copied(shared=settings.lora is not None)
    with told("finetune"):
        times = base.times(settings.steps, settings.shift)

    @torch.no_grad()
    def invert(latents: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        found = []
        for start in range(0, len(prompts), settings.batch):
            part = slice(start, start + settings.batch)
            with told("finetune"):
                cond = base.encode(prompts[part])
            found.append(models.noise_of(partial(base.predict, cond=cond), latents[part], times, vp=base.vp))
        return torch.cat(found)

    return invert


def _accelerator(context: Context) -> Accelerator:
    """Raises UserError where processes share what the trainer takes to be whole on each."""
    found = Accelerator(
        mixed_precision="no",  # finetune.dtype decides
        log_with=list(context.config.finetune.trackers) or None,
        project_dir=folder(context.run_dir),
    )
    kind = found.distributed_type.value
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
        why = _REFUSED.get(kind, "is no way in which processes share fine-tuning here")
        raise UserError(f"accelerate: {kind} {why}; launch with configs/accelerate/ddp.yaml")
    return found


def _drawn(config: Any, source: PromptSource | Preferences, iteration: int) -> list[PromptRow]:
    """The prompts of an iteration."""
    groups = config.finetune.groups
    prompts = source.draw(draw_key(config.seed, "finetune", iteration), groups)
    if len(prompts) < groups:
        raise UserError(f"finetune.groups: {groups}, but there are only {len(prompts)} prompts")
    return prompts


def _others(
    config: Any, source: PromptSource | Preferences, iteration: int, attempt: int, count: int, but: Set[str]
) -> list[PromptRow]:
    """More prompts for an iteration, none of those `but`; a function of its arguments, so that a resumed run asks for
    the same."""
    prompts = source.draw(draw_key(config.seed, "finetune", iteration, "redraw", attempt), count + len(but))
    return [prompt for prompt in prompts if prompt.id not in but][:count]


def _one_judge(context: Context, trainer: "Trainer") -> Callable[[], Judge]:
    """Gives the run's judge to all who ask: that of the reward where it is one, otherwise a new one."""

    @cache
    def judge() -> Judge:
        own = [term.reward.judge for term in trainer.reward.terms if isinstance(term.reward, rewards.JudgeReward)]
        return own[0] if own else context.config.judge.build(str(context.accelerator.device))

    return judge


def _refresh(context: Context, trainer: "Trainer", judge: Callable[[], Judge]) -> "Refresh | None":
    from pipeline.rl.refresh import Refresh

    settings: FinetuneConfig = context.config.finetune
    if settings.refresh is None:
        return None
    terms = zip(settings.mixture.terms, trainer.reward.terms, strict=True)
    learned = [(term, built.reward) for term, built in terms if isinstance(term, ModelTerm)]
    return Refresh(context, settings.refresh, trainer.generator, learned, settings.iterations, judge)


def _watch(
    context: Context, trainer: "Trainer", source: PromptSource | Preferences, judge: Callable[[], Judge]
) -> "Watch | None":
    from pipeline.rl.watch import Watch

    config, settings = context.config, context.config.finetune.watch
    if settings is None:
        return None
    is_reward = all(isinstance(term.reward, rewards.JudgeReward) for term in trainer.reward.terms)
    asked = judge() if settings.judge and not is_reward else None
    drawn = (prompt for iteration in range(config.finetune.iterations) for prompt in _drawn(config, source, iteration))
    return Watch(context, settings, trainer, asked, drawn)


def _curve(done: "Iteration") -> dict[str, float | None]:
    return {name: getattr(done, name) for name in CURVES if name not in ("iteration", "images")}


def _set_down(context: Context, pending: Sequence["Iteration"], first: int) -> None:
    """Keep the rows of the iterations from `first` in the stage's own space until it ends."""
    curves, rollouts, terms = [], [], []
    mixed = context.config.finetune.mixture.terms
    for number, done in enumerate(pending, first):
        curves.append({"iteration": number, **_curve(done), "images": done.pictures})
        if len(mixed) > 1:
            for term, mean, std in zip(mixed, done.term_means, done.term_stds, strict=True):
                terms.append({"iteration": number, "term": term.name, "weight": term.weight, "mean": mean, "std": std})
        kept = np.linspace(0, len(done.images) - 1, min(len(done.images), context.config.finetune.kept_images))
        for row in kept.astype(int):
            shown = {"reward": float(done.rewards[row]), "image": Image.fromarray(done.images[row])}
            rollouts.append({"iteration": number, **columns(done.prompts[row]), **shown})
    for (name, features), rows in zip(_TABLES.items(), (curves, rollouts, terms), strict=True):
        if not rows:
            continue
        path = context.artifact.resume / f"{name}-{first:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)


FINETUNE = Stage("finetune", ("sample", "prefer", "reward"), _depends, _work, _run, check=fits("finetune"))
