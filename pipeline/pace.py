"""Seconds that a stage's work takes on the reference machine: measured for the embedded world, counted for a network.

What nobody measured or can count is None, and `runner.Work` says so.
"""

from typing import Any

from pipeline import forecast
from pipeline.runner import REFERENCE_SPEED

CALL_SECONDS = 1.5e-3
"""One network call for one picture of the embedded generator, its share of decoding included."""

JUDGE_SECONDS = 6e-3
"""One picture and its questions for the embedded judge, and more than a reward model of that world takes for one."""


def call_seconds(config: Any, learning: bool = False) -> float | None:
    """One network call for one picture, or one with its backward pass."""
    if config.generator.ours and not learning:
        return CALL_SECONDS
    return forecast.call_seconds(config, REFERENCE_SPEED, learning)


def judging_seconds(judge: Any, images: int) -> float | None:
    """So many pictures for the judge of these settings."""
    shipped = judge.type == "questions" and (judge.model.type, judge.questions.type) == ("blip2", "shapes")
    return images * JUDGE_SECONDS if shipped else None


def rewarding_seconds(config: Any, images: int) -> float | None:
    """So many pictures for the run's reward model."""
    return images * JUDGE_SECONDS if embedded(config) else None


def embedded(config: Any) -> bool:
    """Whether pictures are the embedded world's, for which reward models were timed."""
    return config.prompts.type == "shapes" and config.prefer.table is None and config.reward.backbone.type != "chat"
