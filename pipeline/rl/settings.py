"""The settings of the trainer, whatever the algorithm."""

from pydantic import Field

from pipeline.settings import Section


class LoraSettings(Section):
    """The adapter (2106.09685): B A is scaled by `alpha` / `rank`."""

    rank: int = Field(32, ge=1)
    alpha: float = Field(64.0, gt=0)


class TrainerSettings(Section):
    """What every algorithm is trained with.

    Attributes:
        groups: prompts an iteration, over all processes.
        group_size: pictures of each.
        updates: optimiser steps an iteration, each on an equal share of the groups.
        steps: network calls a picture; `shift` spends more of them near the noise.
        decay: share of the iterations, at the end, over which the learning rate falls to 0.
        average: decay of the moving average of the adapter, which is what is kept in the end.
        batch: pictures a network call.
        compile: torch.compile what runs in rollouts, where this machine can; pays on runs of minutes.
    """

    iterations: int = Field(100, ge=1)
    groups: int = Field(32, ge=1)
    group_size: int = Field(16, ge=2)
    updates: int = Field(1, ge=1)
    steps: int = Field(8, ge=1)
    shift: float = Field(1.0, gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    decay: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    average: float = Field(0.9, ge=0, lt=1)
    lora: LoraSettings = LoraSettings()
    batch: int = Field(256, ge=1)
    compile: bool = False
