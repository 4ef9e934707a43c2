"""The stage `finetune`: a LoRA on the generator moves towards the reward.

Leaves the moving average of the adapter, or where the watch stopped the training an earlier one, the curves, and a few
pictures of every iteration, on which `evaluate` measures what the reward does not see.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

import datasets
import numpy as np
from accelerate import Accelerator
from PIL import Image
from pydantic import Field, model_validator

import models
import rewards
from pipeline.mixing import MixtureConfig, ModelTerm, RewardChoice, mixture_config
from pipeline.prompts import PromptRow, draw_key
from pipeline.rl import AlgorithmConfig, algorithm_of
from pipeline.rl.grpo import GRPOConfig
from pipeline.rl.settings import RefreshSettings, TrainerSettings, WatchSettings
from pipeline.runner import Context, Interrupted, Stage, Work
from pipeline.settings import UserError
from pipeline.stages.judge import JUDGE_SECONDS
from pipeline.stages.reward import NO_INFLUENCE
from pipeline.stages.sample import CALL_SECONDS, columns
from pipeline.store import write_rows

if TYPE_CHECKING:
    from pipeline.rl.refresh import Refresh
    from pipeline.rl.trainer import Iteration, Trainer
    from pipeline.rl.watch import Watch

ADAPTER = "lora"

CURVES = datasets.Features(
    {
        "iteration": datasets.Value("int32"),
        **{
            name: datasets.Value("float32")
            for name in ("reward_mean", "reward_std", "kl", "loss", "grad_norm", "clip_fraction")
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

_TABLES = {"curves": CURVES, "rollouts": ROLLOUTS, "terms": TERMS}


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
    """

    algorithm: Annotated[AlgorithmConfig, Field(discriminator="type")] = GRPOConfig()
    reward: RewardChoice = "model"
    refresh: RefreshSettings | None = None
    allow_gold: bool = False
    kept_images: int = Field(24, ge=0)
    save_every: int = Field(10, ge=1)
    watch: WatchSettings | None = WatchSettings()

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
    def _window_ends_before_the_last_step(self) -> Self:
        if isinstance(self.algorithm, GRPOConfig):
            most = self.steps - 1 - self.algorithm.window
            if self.algorithm.last_start > most:
                raise ValueError(
                    f"algorithm.last_start: {self.algorithm.last_start} is above {most}; the last of {self.steps} "
                    f"steps has no noise, and {self.algorithm.window} stochastic ones must end before it"
                )
        return self

    @property
    def mixture(self) -> MixtureConfig:
        return mixture_config(self.reward)

    @property
    def rewarded(self) -> set[str]:
        """The types of the rewards."""
        return {term.type for term in self.mixture.terms}


def _depends(config: Any) -> dict[str, Any]:
    settings: FinetuneConfig = config.finetune
    settings.mixture.check(config.reward)
    asked = "judge" in settings.rewarded or settings.refresh or (settings.watch and settings.watch.judge)
    return {
        "version": 3,
        "finetune": settings.model_dump(mode="json"),
        "judge": config.judge.depends() if asked else None,
        "rewards": settings.mixture.depends(),
        "refreshed": _refreshed(config) if settings.refresh else None,
    }


def _refreshed(config: Any) -> dict[str, Any]:
    """What a refresh depends on besides."""
    reward = config.reward.model_dump(mode="json", exclude={"backbone", "ensemble", *NO_INFLUENCE})
    drawn = config.sample.model_dump(mode="json", include={"steps", "shift"})
    return {"prefer": config.prefer.model_dump(mode="json"), "reward": reward, "sample": drawn}


def _work(config: Any) -> Work:
    settings: FinetuneConfig = config.finetune
    images = settings.iterations * settings.groups * settings.group_size
    work = Work(images, images * settings.steps * CALL_SECONDS * 0.6)
    if refresh := settings.refresh:
        fresh = (settings.iterations - 1) // refresh.every * refresh.prompts * refresh.images
        seconds = fresh * (config.sample.steps * CALL_SECONDS + JUDGE_SECONDS)
        work = Work(work.images + fresh, work.seconds + seconds)
    if watch := settings.watch:
        looked = (1 + -(-settings.iterations // watch.every)) * watch.prompts * (watch.images + 1)
        seconds = looked * (settings.steps * CALL_SECONDS + watch.judge * JUDGE_SECONDS)
        work = Work(work.images + looked, work.seconds + seconds)
    return work


def _run(context: Context) -> None:
    from pipeline.rl.trainer import Iteration, Trainer

    config, artifact = context.config, context.artifact
    settings: FinetuneConfig = config.finetune
    generator = models.load_generator(config.generator.checkpoint, device=str(context.accelerator.device))
    reward = settings.mixture.build(context)
    trainer = Trainer(generator, reward, algorithm_of(settings.algorithm), settings, config.seed, Accelerator())
    if (checkpoint := artifact.resume / "trainer").is_dir():
        trainer.load(checkpoint)
    watch = _watch(context, trainer)
    refresh = _refresh(context, trainer)
    pending: list[Iteration] = []

    def save() -> None:
        """Set the rows down before the checkpoint: after a kill between them the same rows are made again."""
        if context.accelerator.is_main_process and pending:
            _set_down(context, pending, trainer.done - len(pending))
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
            done = trainer.iterate(_drawn(config, trainer.done))
            pending.append(done)
            advance(1, reward=done.reward_mean, kl=done.kl)
            if trainer.done % settings.save_every == 0 or trainer.done == total:
                save()
            try:
                context.check_stop()
            except Interrupted:
                save()
                raise
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
            artifact.write_folder(ADAPTER, watch.copy_kept)
        else:
            trainer.average.swap()
            artifact.write_folder(ADAPTER, lambda folder: models.lora.save(generator.transformer, folder))


def _drawn(config: Any, iteration: int) -> list[PromptRow]:
    """The prompts of an iteration."""
    groups = config.finetune.groups
    prompts = config.prompts.draw(draw_key(config.seed, "finetune", iteration), groups)
    if len(prompts) < groups:
        raise UserError(f"finetune.groups: {groups}, but there are only {len(prompts)} prompts")
    return prompts


def _refresh(context: Context, trainer: "Trainer") -> "Refresh | None":
    from pipeline.rl.refresh import Refresh

    settings: FinetuneConfig = context.config.finetune
    if settings.refresh is None:
        return None
    terms = zip(settings.mixture.terms, trainer.reward.terms, strict=True)
    learned = [(term, built.reward) for term, built in terms if isinstance(term, ModelTerm)]
    return Refresh(context, settings.refresh, trainer.generator, learned, settings.iterations)


def _watch(context: Context, trainer: "Trainer") -> "Watch | None":
    from pipeline.rl.watch import Watch

    config, settings = context.config, context.config.finetune.watch
    if settings is None:
        return None
    is_reward = all(isinstance(term.reward, rewards.JudgeReward) for term in trainer.reward.terms)
    judge = config.judge.build(str(context.accelerator.device)) if settings.judge and not is_reward else None
    drawn = (prompt for iteration in range(config.finetune.iterations) for prompt in _drawn(config, iteration))
    return Watch(context, settings, trainer, judge, drawn)


def _set_down(context: Context, pending: Sequence["Iteration"], first: int) -> None:
    """Keep the rows of the iterations from `first` in the stage's own space until it ends."""
    curves, rollouts, terms = [], [], []
    mixed = context.config.finetune.mixture.terms
    for number, done in enumerate(pending, first):
        curve = {name: getattr(done, name) for name in CURVES if name not in ("iteration", "images")}
        images = len(done.images) * context.accelerator.num_processes
        curves.append({"iteration": number, **curve, "images": images})
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


FINETUNE = Stage("finetune", ("sample", "prefer", "reward"), _depends, _work, _run)
