"""The stage `finetune`: a LoRA on the generator moves towards the reward.

Leaves the moving average of the adapter, the curves, and a few pictures of every iteration, on which `evaluate`
measures what the reward does not see.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import datasets
import numpy as np
from accelerate import Accelerator
from PIL import Image
from pydantic import Field, model_validator

import models
import rewards
from pipeline.compiling import compile_module
from pipeline.prompts import draw_key
from pipeline.rl import AlgorithmConfig, algorithm_of
from pipeline.rl.grpo import GRPOConfig
from pipeline.rl.settings import TrainerSettings
from pipeline.runner import Context, Interrupted, Stage, Work
from pipeline.settings import UserError
from pipeline.stages.sample import CALL_SECONDS, columns
from pipeline.store import write_rows

if TYPE_CHECKING:
    from pipeline.rl.trainer import Iteration

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


class FinetuneConfig(TrainerSettings):
    """Reinforcement learning of the generator.

    Attributes:
        reward: the reward `model`, the `judge` itself (direct RLAIF), or the `gold` oracle of the embedded world.
        allow_gold: must be true where the reward is `gold`, which is there to measure.
        kept_images: pictures of each iteration that are kept, to measure on.
        save_every: iterations between two checkpoints.
    """

    algorithm: Annotated[AlgorithmConfig, Field(discriminator="type")] = GRPOConfig()
    reward: Literal["model", "judge", "gold"] = "model"
    allow_gold: bool = False
    kept_images: int = Field(24, ge=0)
    save_every: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _gold_is_allowed(self) -> Self:
        if self.reward == "gold" and not self.allow_gold:
            raise ValueError("reward: the gold oracle only measures; set finetune.allow_gold to true to train on it")
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


def _depends(config: Any) -> dict[str, Any]:
    settings = config.finetune.model_dump(mode="json")
    judge = config.judge.depends() if config.finetune.reward == "judge" else None
    return {"version": 1, "finetune": settings, "judge": judge}


def _work(config: Any) -> Work:
    settings: FinetuneConfig = config.finetune
    images = settings.iterations * settings.groups * settings.group_size
    return Work(images, images * settings.steps * CALL_SECONDS * 0.6)


def _reward(context: Context) -> "rewards.Reward":
    kind, device = context.config.finetune.reward, str(context.accelerator.device)
    if kind == "model":
        reward = rewards.load_reward(context.inputs["reward"].folder / "model", device)
        if context.config.finetune.compile:
            for part in reward.model.networks():
                compile_module(part, context.accelerator.device)
        return reward
    if kind == "judge":
        return rewards.JudgeReward(context.config.judge.build(device))
    return rewards.GoldReward()


def _run(context: Context) -> None:
    from pipeline.rl.trainer import Iteration, Trainer

    config, artifact = context.config, context.artifact
    settings: FinetuneConfig = config.finetune
    generator = models.load_generator(config.generator.checkpoint, device=str(context.accelerator.device))
    trainer = Trainer(
        generator, _reward(context), algorithm_of(settings.algorithm), settings, config.seed, Accelerator()
    )
    if (checkpoint := artifact.resume / "trainer").is_dir():
        trainer.load(checkpoint)
    pending: list[Iteration] = []

    def save() -> None:
        """Set the rows down before the checkpoint: after a kill between them the same rows are made again."""
        if context.accelerator.is_main_process and pending:
            _set_down(context, pending, trainer.done - len(pending))
            trainer.save(checkpoint)
        pending.clear()

    total = settings.iterations
    with context.progress.track(total, "iterations", "finetune", trainer.done) as advance:
        while trainer.done < total:
            prompts = config.prompts.draw(draw_key(config.seed, "finetune", trainer.done), settings.groups)
            if len(prompts) < settings.groups:
                raise UserError(f"finetune.groups: {settings.groups}, but there are only {len(prompts)} prompts")
            done = trainer.iterate(prompts)
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
        for name, features in (("curves", CURVES), ("rollouts", ROLLOUTS)):
            parts = [datasets.Dataset.from_parquet(str(path)) for path in sorted(artifact.resume.glob(f"{name}-*"))]
            write_rows(artifact, f"{name}-00000.parquet", datasets.concatenate_datasets(parts).to_list(), features)
        trainer.average.swap()
        artifact.write_folder(ADAPTER, lambda folder: models.lora.save(generator.transformer, folder))


def _set_down(context: Context, pending: Sequence["Iteration"], first: int) -> None:
    """Keep the rows of the iterations from `first` in the stage's own space until it ends."""
    curves, rollouts = [], []
    for number, done in enumerate(pending, first):
        curve = {name: getattr(done, name) for name in CURVES if name not in ("iteration", "images")}
        images = len(done.images) * context.accelerator.num_processes
        curves.append({"iteration": number, **curve, "images": images})
        kept = np.linspace(0, len(done.images) - 1, min(len(done.images), context.config.finetune.kept_images))
        for row in kept.astype(int):
            shown = {"reward": float(done.rewards[row]), "image": Image.fromarray(done.images[row])}
            rollouts.append({"iteration": number, **columns(done.prompts[row]), **shown})
    for name, rows, features in (("curves", curves, CURVES), ("rollouts", rollouts, ROLLOUTS)):
        path = context.artifact.resume / f"{name}-{first:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)


FINETUNE = Stage("finetune", ("reward",), _depends, _work, _run)
