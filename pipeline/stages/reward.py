"""The stage `reward`: a reward model learns the judge's preferences."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import datasets
from pydantic import Field, model_validator

from models.keys import sample_key
from pipeline.judging import told
from pipeline.pace import embedded
from pipeline.pictures import pictures_of
from pipeline.rewarding import BackboneConfig, BradleyTerryLoss, FrozenTower, LossConfig, TrainConfig
from pipeline.runner import Context, Interrupted, Stage, Work
from pipeline.settings import Section
from pipeline.store import Artifact, read_rows
from rewards.losses import PairLoss, make_loss

if TYPE_CHECKING:
    from rewards.backbones import RewardModel
    from rewards.batches import Picture

STEP_SECONDS = 0.25
"""A training step on 32 pairs of the embedded world, on the reference machine."""

NO_INFLUENCE = ("save_steps", "cache_features", "workers", "gradient_checkpointing")
"""Settings that do not change a reward model."""


class EnsembleConfig(Section):
    """Several `heads` on the features of one backbone, which differ in where they start and in what prompts weigh."""

    heads: int = Field(1, ge=1)


class RewardConfig(Section):
    """The reward model and how it is trained; see `rewards.train`.

    Attributes:
        grouped: the pairs of a prompt follow one another, so that a step reads their pictures once.
        patience: training ends early after so many epochs in a row that did not lower the held-out NLL.
        cache_features: hold the features of all pictures in memory, where what makes them is frozen.
        workers: processes that decode pictures, of which each process has its own.
        dtype: of products; bfloat16 is faster on hardware that has it, and takes less memory.
        gradient_checkpointing: less memory for a third more work.
    """

    backbone: BackboneConfig
    train: TrainConfig = FrozenTower()
    loss: LossConfig = BradleyTerryLoss()
    ensemble: EnsembleConfig = EnsembleConfig()
    epochs: int = Field(3, ge=1)
    batch: int = Field(32, ge=1)
    grouped: bool = False
    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    save_steps: int = Field(100, ge=1)
    patience: int | None = Field(None, ge=1)
    cache_features: bool = True
    workers: int = Field(0, ge=0)
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _backbone_gives_what_is_read(self) -> Self:
        chat = self.backbone.type == "chat"
        if self.loss.type == "gaussian" and not chat:
            raise ValueError(
                f"loss: gaussian reads the standard deviation of a reward, and a {self.backbone.type} backbone gives "
                "none; take backbone chat, or another loss"
            )
        if self.ensemble.heads > 1 and chat:
            raise ValueError("ensemble: a chat reward takes one head; set heads to 1, or take another backbone")
        return self

    def untrained(self, seed: int) -> "RewardModel":
        """The reward model before it has seen preferences. Raises UserError where its checkpoint does not fit."""
        with told("reward.backbone"):
            model = self.backbone.build(sample_key(seed, "reward"))
        if self.ensemble.heads == 1:
            return model
        with told("reward"):
            return model.with_heads(self.ensemble.heads, sample_key(seed, "heads"))


def _depends(config: Any) -> dict[str, Any]:
    settings = config.reward.model_dump(mode="json", exclude={"backbone", *NO_INFLUENCE})
    return {"version": 2, "seed": config.seed, "reward": settings, "backbone": config.reward.backbone.depends()}


def _work(config: Any) -> Work:
    pairs = config.prefer.most(config.sample.prompts, config.sample.images_per_prompt)
    seconds = 0.5 * pairs * config.reward.epochs / 32 * STEP_SECONDS
    return Work.of(0, {"training": seconds if embedded(config) else None})


def _run(context: Context) -> None:
    config: RewardConfig = context.config.reward
    pairs = read_rows(context.inputs["prefer"])
    pictures = pictures_of(context.inputs)
    model = config.untrained(context.config.seed)
    with told("reward.backbone"):
        for key in pictures.one_of_each_size():
            model.pixels([pictures(*key)])
        model.tokens(list(dict.fromkeys(pairs["prompt"])))
    learn(context, model, pairs, pictures, config.epochs)


def learn(context: Context, model: "RewardModel", pairs: datasets.Dataset, pictures: "Picture", epochs: int) -> None:
    """Train `model` on `pairs`, whose pictures `pictures` gives; write it and its numbers.

    Raises:
        Interrupted: a signal was seen; the same call goes on.
    """
    # trl takes seconds to import; settings and finished runs do not wait for it.
    from rewards.train import RewardTraining, Stopped, split_rows, step_count, train

    config: RewardConfig = context.config.reward
    settings = RewardTraining(
        **config.model_dump(exclude={"backbone", "train", "loss", "ensemble", "epochs"}),
        epochs=epochs,
        seed=context.config.seed,
        trained=config.train.build(),
        loss=config.loss.build(),
    )
    folder: Path = context.artifact.resume / "trainer"
    with told("reward"):
        steps = step_count(len(split_rows(pairs, settings.loss)["train"]), settings)
    with context.progress.track(steps, "steps", "reward") as advance:
        done = 0

        def on_step(step: int, steps: int, shown: dict[str, float]) -> None:
            nonlocal done
            advance(step - done, **{name: shown[name] for name in ("loss", "heldout_accuracy") if name in shown})
            done = step

        try:
            metrics = train(
                model.to(context.accelerator.device),
                pairs,
                pictures,
                settings,
                folder,
                on_step,
                lambda: context.stop.raised,
            )
        except Stopped:
            raise Interrupted from None
    if context.accelerator.is_main_process:
        context.artifact.write_folder("model", model.save_pretrained)
        context.artifact.write_text("metrics.json", json.dumps(metrics, indent=2) + "\n")


def trained_loss(artifact: Artifact) -> PairLoss:
    """What makes preferences of the scores of the reward model in `artifact`, with what it learned."""
    return make_loss(**json.loads(artifact.path("metrics.json").read_text(encoding="utf-8"))["loss"])


REWARD = Stage("reward", ("sample", "prefer"), _depends, _work, _run)
