"""The stage `reward`: a reward model learns the judge's preferences."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

import rewards
from pipeline.runner import Context, Interrupted, Stage, Work
from pipeline.settings import Section
from pipeline.store import hash_path, read_rows

STEP_SECONDS = 0.25
"""A training step on 32 pairs of the embedded world, on the reference machine."""


class RewardConfig(Section):
    """A Q-Former with a scalar head on a BLIP-2 image-text-matching checkpoint; see `rewards.train`."""

    backbone: str
    epochs: int = Field(3, ge=1)
    batch: int = Field(32, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    save_steps: int = Field(100, ge=1)


def _depends(config: Any) -> dict[str, Any]:
    settings = config.reward.model_dump(mode="json", exclude={"backbone", "save_steps"})
    return {
        "version": 1,
        "seed": config.seed,
        "reward": settings,
        "backbone": hash_path(config.reward.backbone),
    }


def _work(config: Any) -> Work:
    siblings = config.sample.images_per_prompt
    pairs = config.sample.prompts * (siblings * (siblings - 1) // 2 if config.prefer.strategy == "all" else 1)
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
    )
    model = rewards.QFormerReward.from_itm(config.backbone)
    processor = rewards.RewardProcessor.from_pretrained(config.backbone)
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
                processor,
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
        context.artifact.write_folder("model", processor.save_pretrained)
        context.artifact.write_text("metrics.json", json.dumps(metrics, indent=2) + "\n")


REWARD = Stage("reward", ("sample", "prefer"), _depends, _work, _run)
