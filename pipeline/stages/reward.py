"""The stage `reward`: a reward model learns the judge's preferences."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from models.keys import sample_key
from pipeline.judging import told
from pipeline.rewarding import BackboneConfig, BradleyTerryLoss, FrozenTower, LossConfig, TrainConfig
from pipeline.runner import Context, Interrupted, Stage, Work
from pipeline.settings import Section
from pipeline.store import read_rows

if TYPE_CHECKING:
    from rewards.backbones import RewardModel

STEP_SECONDS = 0.25
"""A training step on 32 pairs of the embedded world, on the reference machine."""


class RewardConfig(Section):
    """The reward model and how it is trained; see `rewards.train`.

    Attributes:
        cache_features: hold the features of all pictures in memory, where what makes them is frozen.
    """

    backbone: BackboneConfig
    train: TrainConfig = FrozenTower()
    loss: LossConfig = BradleyTerryLoss()
    epochs: int = Field(3, ge=1)
    batch: int = Field(32, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    save_steps: int = Field(100, ge=1)
    cache_features: bool = True

    def untrained(self, seed: int) -> "RewardModel":
        """The reward model before it has seen preferences. Raises UserError where its checkpoint does not fit."""
        with told("reward.backbone"):
            return self.backbone.build(sample_key(seed, "reward"))


def _depends(config: Any) -> dict[str, Any]:
    settings = config.reward.model_dump(mode="json", exclude={"backbone", "save_steps", "cache_features"})
    return {"version": 2, "seed": config.seed, "reward": settings, "backbone": config.reward.backbone.depends()}


def _work(config: Any) -> Work:
    pairs = config.sample.prompts * config.prefer.rule.most(config.sample.images_per_prompt)
    return Work(seconds=0.5 * pairs * config.reward.epochs / 32 * STEP_SECONDS)


def _run(context: Context) -> None:
    # trl takes seconds to import; settings and finished runs do not wait for it.
    from rewards.train import RewardTraining, Stopped, step_count, train

    config: RewardConfig = context.config.reward
    pairs = read_rows(context.inputs["prefer"])
    pictures = read_rows(context.inputs["sample"])
    place = {key: row for row, key in enumerate(zip(pictures["prompt_id"], pictures["sample"], strict=True))}
    settings = RewardTraining(
        epochs=config.epochs,
        batch=config.batch,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup=config.warmup,
        seed=context.config.seed,
        save_steps=config.save_steps,
        cache_features=config.cache_features,
        trained=config.train.build(),
        loss=config.loss.build(),
    )
    model = config.untrained(context.config.seed)
    with told("reward.backbone"):
        model.pixels([np.asarray(pictures[0]["image"])])
        model.tokens(list(dict.fromkeys(pairs["prompt"])))
    folder: Path = context.artifact.resume / "trainer"
    steps = step_count(sum(split == "train" for split in pairs["split"]), settings)
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
                lambda prompt_id, sample: np.asarray(pictures[place[prompt_id, sample]]["image"]),
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


REWARD = Stage("reward", ("sample", "prefer"), _depends, _work, _run)
