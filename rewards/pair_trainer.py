"""trl's RewardTrainer on pairs of images: our losses, held-out numbers, and checkpoints that are whole or absent."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from trl import RewardConfig, RewardTrainer

from judges.pairwise import fit_temperature
from rewards.backbones import RewardModel
from rewards.batches import Dtype, autocast, encoded
from rewards.losses import PairLoss, Scores
from rewards.losses.base import without_ties
from rewards.metrics import pairwise_accuracy

OnStep = Callable[[int, int, dict[str, float]], None]

_LOSS_LEARNING_RATE = 1e-2
"""Of what a loss learns, one number of the order of 1, over some hundred steps."""
_LOGGED = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "eval_nll": "heldout_nll",
    "eval_accuracy": "heldout_accuracy",
}


class Stopped(Exception):
    """Training stopped because it was asked to. A checkpoint stands; the same call goes on from it."""


class Learner(PreTrainedModel):
    """A reward model and what its loss learns, as trl wants a model to look: a classifier with one label."""

    def __init__(self, model: RewardModel, loss: PairLoss, dtype: Dtype, cached: bool):
        super().__init__(PreTrainedConfig(num_labels=1))
        self.model = model
        self.loss = loss
        self.products = dtype
        self.cached = cached
        self.free = loss.parameters()

    def forward(
        self,
        shown: Tensor,
        tokens: dict[str, Tensor],
        label: Tensor,
        margin: Tensor,
        weight: Tensor,
        first: Tensor,
        second: Tensor,
        noise: Tensor | None = None,
        key: Tensor | None = None,
        bootstrap: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The loss of B pairs, and log-probabilities of either order and both rewards (B, 4), without gradient.

        `shown` (U, ...) are features, or the pixels to make them of, and `first` and `second` (B,) the places of the
        pairs' images among them. `noise` (U,) keys that in which the model is trained, `key` seeds a loss that samples,
        `bootstrap` (B, M) is what pairs weigh for each head of an ensemble.
        """
        generator = None if key is None else torch.Generator().manual_seed(int(key))
        features = shown if self.cached else encoded(self.model, shown, self.products)
        if noise is not None:
            features, tokens = self.model.noised(features, tokens, noise.tolist())
        with autocast(features.device, self.products):
            scores = self.model(features, tokens)
        first, second = (_single(scores[side]) for side in (first, second))
        # Weights average 1 over all pairs, not over each process's share of a batch: only undivided by that
        # share's weights do the gradients of several processes average to that of one.
        target = self.loss.target(label, margin)
        members = list(zip(first.members(), second.members(), strict=True))
        weights = (weight[:, None] * (1.0 if bootstrap is None else bootstrap)).expand(-1, len(members)).unbind(1)
        losses = [
            self.loss(a, b, target, each, self.free, generator) * each.mean()
            for (a, b), each in zip(members, weights, strict=True)
        ]
        loss = torch.stack(losses).mean()
        with torch.no_grad():
            orders = without_ties(self.loss.log_outcomes(first, second, self.free))
            found = torch.cat([orders, torch.stack([first.mean, second.mean], dim=1)], dim=1)
        return loss, found


def _single(scores: Scores) -> Scores:
    """The same in fp32."""
    return Scores(**{name: None if part is None else part.float() for name, part in vars(scores).items()})


def heldout_metrics(prediction: EvalPrediction) -> dict[str, float]:
    log_p, log_q, reward_a, reward_b = prediction.predictions.T
    label, weight = prediction.label_ids.T
    surprise = -(label * log_p + (1 - label) * log_q)
    return {
        "nll": float(np.average(surprise, weights=weight)),
        "accuracy": pairwise_accuracy(reward_a, reward_b, label),
        "temperature": _temperature(reward_a - reward_b, label),
    }


def _temperature(margin: np.ndarray, label: np.ndarray) -> float:
    """By which margins are divided to be nats, NaN where no temperature fits."""
    try:
        return fit_temperature(margin, label)
    except ValueError:
        return math.nan


def any_process(flag: bool) -> bool:
    return bool(gather(torch.tensor([int(flag)], device=PartialState().device)).any())


def is_spent(state: TrainerState, patience: int | None) -> bool:
    """Whether the last `patience` evaluations did not lower the held-out NLL."""
    found = [entry["eval_nll"] for entry in state.log_history if "eval_nll" in entry]
    return patience is not None and len(found) > patience and min(found[-patience:]) >= min(found[:-patience])


class Conductor(TrainerCallback):
    """Reports, saves what was evaluated, and stops after a save."""

    def __init__(self, on_step: OnStep, should_stop: Callable[[], bool], patience: int | None):
        self.on_step = on_step
        self.should_stop = should_stop
        self.patience = patience
        self.stopping = False

    def on_step_end(self, args: RewardConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stopping = any_process(self.should_stop())
        control.should_save |= control.should_evaluate or self.stopping

    def on_save(self, args: RewardConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop |= is_spent(state, self.patience)
        if self.stopping and state.global_step < state.max_steps and not control.should_training_stop:
            raise Stopped

    def on_log(self, args: RewardConfig, state: TrainerState, control: TrainerControl, logs: dict, **_: Any) -> None:
        shown = {ours: logs[theirs] for theirs, ours in _LOGGED.items() if theirs in logs}
        for name in ("loss", "heldout_nll"):
            if not math.isfinite(shown.get(name, 0.0)):
                raise FloatingPointError(f"the {name} is {shown[name]} at step {state.global_step}")
        if shown:
            self.on_step(state.global_step, state.max_steps, shown)


class PairTrainer(RewardTrainer):
    """trl's reward trainer for batches of a `Collator`."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _send_telemetry(self) -> None:
        pass

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """What the loss learns has a rate of its own."""
        if self.optimizer is None:
            super().create_optimizer(self.model.model)
            if free := list(self.model.free.parameters()):
                self.optimizer.add_param_group({"params": free, "lr": _LOSS_LEARNING_RATE, "weight_decay": 0.0})
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        return model(**inputs)[0]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """What is known of each pair: a mean of batch losses would depend on the batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            found = model(**inputs)[1]
        return None, found, torch.stack([inputs["label"], inputs["weight"]], dim=1)

    def restore_best(self) -> int:
        """Load the weights with the lowest held-out NLL; their step."""
        best = self.state.best_global_step
        self._load_from_checkpoint(str(self._checkpoint(best)))
        return best

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write beside the checkpoint's place, flush, rename; then drop all but this one and the best."""
        if self.args.should_save:
            place = self._checkpoint(self.state.global_step)
            partial = place.with_name(f"partial-{place.name}")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self._write_state(partial)
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            partial.rename(place)
            for other in place.parent.glob("*checkpoint-*"):
                if other not in (place, self._checkpoint(self.state.best_global_step)):
                    shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def _write_state(self, folder: Path) -> None:
        weights = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        optimizer = self.optimizer.state_dict()
        moments = {
            f"{parameter}.{name}": value
            for parameter, values in optimizer["state"].items()
            for name, value in values.items()
        }
        schedule = {"param_groups": optimizer["param_groups"], "scheduler": self.lr_scheduler.state_dict()}
        save_file(weights, folder / "weights.safetensors")
        save_file(moments, folder / "optimizer.safetensors")
        (folder / "schedule.json").write_text(json.dumps(schedule), encoding="utf-8")
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights = load_file(Path(resume_from_checkpoint) / "weights.safetensors")
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                if value.requires_grad:
                    value.copy_(weights[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(Path(checkpoint) / "optimizer.safetensors").items():
            parameter, name = key.split(".")
            state.setdefault(int(parameter), {})[name] = value
        schedule = json.loads((Path(checkpoint) / "schedule.json").read_text(encoding="utf-8"))
        self.optimizer.load_state_dict({"state": state, "param_groups": schedule["param_groups"]})
        self.lr_scheduler.load_state_dict(schedule["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing in training draws a random number."""
