"""The settings of the trainer, whatever the algorithm, of the watch over it, and of refreshing its reward."""

from typing import Literal

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


class RefreshSettings(Section):
    """How the reward model keeps up with what the policy paints; see `pipeline.rl.refresh`.

    Attributes:
        every: iterations between two refreshes.
        prompts: of the training prompts, with `images` pictures each, fresh from the policy.
        epochs: over the pairs of a refresh.
        replay: the share of them that are the run's old pairs.
    """

    every: int = Field(100, ge=1)
    prompts: int = Field(64, ge=2)
    images: int = Field(4, ge=2)
    epochs: int = Field(1, ge=1)
    replay: float = Field(0.5, ge=0, lt=1)


class WatchSettings(Section):
    """Checks for signs that the reward is hacked; see `pipeline.rl.checks` and `rewards.hacking`.

    Attributes:
        every: iterations between two checks; the base model and the last iteration are checked too.
        prompts: that many held out, and as many that are trained on; thresholds are learned from 50 or more.
        images: pictures of each held-out prompt; of the others one.
        judge: ask the run's judge too, for what the reward is not trained on. Where it is the reward it is not asked.
        stop_on: what ends a training when it lasts; the other signals, or all where this is empty, only warn. A loss of
            diversity is not among them, as some of it comes with most success.
        patience: checks in a row that make an alarm last.
    """

    every: int = Field(20, ge=1)
    prompts: int = Field(64, ge=50)
    images: int = Field(2, ge=2)
    judge: bool = True
    stop_on: tuple[Literal["heldout_gap", "judge_divergence", "diversity_loss", "kl_frontier"], ...] = (
        "heldout_gap",
        "judge_divergence",
        "kl_frontier",
    )
    patience: int = Field(2, ge=1)
