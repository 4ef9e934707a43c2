"""Trains a reward model on preference pairs of images, on trl's RewardTrainer, resumable bit for bit.

Where the image tower is frozen its features are computed once, and a step costs only what reads them. What a step
sees is a function of its number: an epoch is a permutation keyed by (seed, epoch), the epochs are laid end to end
and cut into full batches, and the trainer walks through them as through one; noise, where a backbone wants any, is
keyed by a pair's place in that order. So there is no random state to restore, no partial batch, and no epoch's end
at which a resumed run evaluates twice.

Of trl's trainer this keeps the loop, the optimiser, the schedule and the processes (accelerate); it replaces
the loss, the evaluation and the checkpoints, which here are safetensors and JSON, whole or absent.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import (
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from trl import RewardConfig, RewardTrainer

from models.keys import sample_key
from rewards.backbones import Frozen, RewardModel, Trained, filled, make_trainable, merge
from rewards.losses import BradleyTerry, PairLoss, Scores
from rewards.metrics import pairwise_accuracy

Key = tuple[str, int]  # prompt id and sample number
Picture = Callable[[str, int], np.ndarray | Image.Image]
OnStep = Callable[[int, int, dict[str, float]], None]

_COLUMNS = ("prompt_id", "prompt", "sample_a", "sample_b", "label", "weight", "split")
_ENCODED_AT_ONCE = 32
_LOSS_LEARNING_RATE = 1e-2
"""Of what a loss learns, one number of the order of 1, over some hundred steps."""
_FROZEN, _BRADLEY_TERRY = Frozen(), BradleyTerry()
_LOGGED = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "eval_nll": "heldout_nll",
    "eval_accuracy": "heldout_accuracy",
}


class Stopped(Exception):
    """Training stopped because it was asked to. A checkpoint stands; the same call goes on from it."""


@dataclass(frozen=True)
class RewardTraining:
    """How a reward model is trained: AdamW, gradients clipped to norm 1, a linear schedule, no dropout.

    Learning rate and decay suit a BLIP-2 of full size (2301.12597, appendix, fine-tuning for retrieval).

    Attributes:
        epochs: passes over the training pairs; the model is evaluated after each.
        batch: pairs a step, over all processes together.
        warmup: share of the steps over which the learning rate rises from 0.
        save_steps: a checkpoint every so many steps, besides one after each epoch.
        cache_features: hold the features of all images in memory, in fp32, where the tower is frozen; False encodes
            them at every step.
        trained: how much of the model is trained.
        loss: how scores explain soft labels.
    """

    epochs: int = 3
    batch: int = 32
    learning_rate: float = 1e-5
    weight_decay: float = 0.05
    warmup: float = 0.1
    seed: int = 0
    save_steps: int = 200
    cache_features: bool = True
    trained: Trained = _FROZEN
    loss: PairLoss = _BRADLEY_TERRY

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is less than 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: {self.learning_rate} is not a positive number")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: {self.weight_decay} is negative or infinite")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: {self.warmup} is not a share from 0 to below 1")


def train(
    model: RewardModel,
    pairs: Dataset,
    images: Picture,
    config: RewardTraining,
    folder: Path,
    on_step: OnStep = lambda step, steps, shown: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train `model` in place, on the device it is on; it ends with the weights of the lowest held-out NLL, adapters
    merged.

    Args:
        pairs: rows with the fields of `preferences.Pair`, both splits.
        images: the picture, PIL or uint8 (H, W, 3), of a prompt id and a sample number.
        folder: for checkpoints alone; where one stands, training goes on from it.
        on_step: called on every process with the step, the number of steps, and what was measured: `loss`,
            `learning_rate`, `grad_norm` after a step, `heldout_nll`, `heldout_accuracy` after an evaluation.
        should_stop: asked after every step; the yes of one process stops all.

    Returns:
        `steps`, `best_step`, `train_pairs`, `heldout_pairs`, the weighted `heldout_nll` in nats and the
        `heldout_accuracy` of the best step, `curve`, both of these for every evaluation, `trained_parameters`, and
        `loss`, its settings with what it learned. The NLL is that of the soft labels under the probabilities that
        the loss makes of scores, so it can be compared between losses.

    Raises:
        Stopped: `should_stop` said so; the last step, if there was one, is in a checkpoint.
        ValueError: a column or a split of `pairs` is missing or out of range, or `batch` does not divide.
        FloatingPointError: the loss is no finite number.
    """
    rows = _split_rows(pairs)
    steps = step_count(len(rows["train"]), config)
    per_epoch = steps // config.epochs
    arguments = _arguments(config, folder, per_epoch, on_cpu=model.device.type == "cpu")
    make_trainable(model, config.trained, sample_key(config.seed, "adapters"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model.to(arguments.device)
    table, keys, texts = _numbered(pairs)
    encoder = _Encoder(model, images, keys)
    features = encoder.all(should_stop).__getitem__ if config.cache_features and model.caches else encoder
    order = _order(rows["train"], steps * config.batch, config.seed)
    learner = _Learner(model, config.loss)
    trainer = _PairTrainer(
        learner,
        arguments,
        data_collator=_Collator(model, features, model.tokens(texts), config.seed),
        train_dataset=Dataset.from_dict({**table[order], "draw": range(len(order))}),
        eval_dataset=table.select(rows["heldout"]),
        processing_class=model.tokenizer,
        compute_metrics=_heldout_metrics,
        callbacks=[_Conductor(on_step, should_stop)],
    )
    trainer.remove_callback(PrinterCallback)
    # It would write the tokenizer's special tokens into the config of a language model that is not there.
    trainer.processing_class = None
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.is_dir() else None)
    best = trainer.restore_best()
    merge(model)
    model.requires_grad_(False)
    curve = [
        {"step": entry["step"], "heldout_nll": entry["eval_nll"], "heldout_accuracy": entry["eval_accuracy"]}
        for entry in trainer.state.log_history
        if "eval_nll" in entry
    ]
    chosen = next(point for point in curve if point["step"] == best)
    return {
        "steps": steps,
        "best_step": best,
        "train_pairs": len(rows["train"]),
        "heldout_pairs": len(rows["heldout"]),
        "heldout_nll": chosen["heldout_nll"],
        "heldout_accuracy": chosen["heldout_accuracy"],
        "curve": curve,
        "trained_parameters": trained,
        "loss": asdict(config.loss.fitted(learner.free)),
    }


def step_count(pairs: int, config: RewardTraining) -> int:
    """Optimiser steps on so many training pairs."""
    return config.epochs * max(1, round(pairs / config.batch))


def _split_rows(pairs: Dataset) -> dict[str, list[int]]:
    """The row numbers of each split of `pairs`, which is checked."""
    if missing := [name for name in _COLUMNS if name not in pairs.column_names]:
        raise ValueError(f"pairs: no column {', '.join(missing)}")
    splits = list(pairs["split"])
    rows = {name: [row for row, split in enumerate(splits) if split == name] for name in ("train", "heldout")}
    for name, found in rows.items():
        if not found:
            raise ValueError(f"split: no pair is in {name}")
    label, weight = np.asarray(pairs["label"]), np.asarray(pairs["weight"])
    if not ((label >= 0) & (label <= 1)).all():
        raise ValueError("label: not every one is a probability")
    if not ((weight > 0) & np.isfinite(weight)).all():
        raise ValueError("weight: not every one is a positive number")
    return rows


def _order(rows: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` row numbers: `rows` in a permutation keyed by `seed` and epoch, epoch after epoch."""
    epochs = math.ceil(count / len(rows))
    order = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)]
    return np.concatenate(order)[:count].tolist()


def _arguments(config: RewardTraining, folder: Path, per_epoch: int, on_cpu: bool) -> RewardConfig:
    processes = PartialState(cpu=on_cpu).num_processes
    if config.batch % processes:
        raise ValueError(f"batch: {config.batch} pairs cannot be shared evenly by {processes} processes")
    # trl turns checkpointing of activations on; transformers renamed the switch after 5.17.
    switches = ("activation_checkpointing", "gradient_checkpointing")
    known = {field.name for field in fields(RewardConfig)}
    return RewardConfig(
        **{next(switch for switch in switches if switch in known): False},
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=config.batch // processes,
        per_device_eval_batch_size=config.batch // processes,
        train_sampling_strategy="sequential",
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=round(config.warmup * config.epochs * per_epoch),
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        seed=config.seed,
        eval_strategy="steps",
        eval_steps=per_epoch,
        metric_for_best_model="nll",
        greater_is_better=False,
        save_strategy="steps",
        save_steps=config.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,
        use_cpu=on_cpu,
        bf16=False,
        # A LLaVA does not read its last vision layers.
        ddp_find_unused_parameters=not isinstance(config.trained, Frozen),
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )


class _Learner(PreTrainedModel):
    """A reward model and what its loss learns, as trl wants a model to look: a classifier with one label."""

    def __init__(self, model: RewardModel, loss: PairLoss):
        super().__init__(PreTrainedConfig(num_labels=1))
        self.model = model
        self.loss = loss
        self.free = loss.parameters()

    def forward(
        self, features: Tensor, tokens: dict[str, Tensor], label: Tensor, weight: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss of B pairs, and log-probabilities of either order and both rewards (B, 4), without gradient.

        `key` seeds a loss that samples.
        """
        generator = None if key is None else torch.Generator().manual_seed(int(key))
        first, second = _halves(self.model(features, tokens))
        # Weights average 1 over all pairs, not over each process's share of a batch: only undivided by that
        # share's weights do the gradients of several processes average to that of one.
        loss = self.loss(first, second, label, weight, self.free, generator) * weight.mean()
        with torch.no_grad():
            orders = _without_ties(self.loss.log_outcomes(first, second, self.free))
            found = torch.cat([orders, torch.stack([first.mean, second.mean], dim=1)], dim=1)
        return loss, found


def _halves(scores: Scores) -> tuple[Scores, Scores]:
    """Those of the first and of the second images."""
    columns = (scores.mean, scores.log_std, scores.noise)
    halves = [(None, None) if column is None else column.chunk(2) for column in columns]
    return Scores(*(first for first, _ in halves)), Scores(*(second for _, second in halves))


def _without_ties(log_outcomes: Tensor) -> Tensor:
    """Log-probabilities (B, 2) of either order, from those (B, K) of the outcomes; a tie is half of each."""
    if log_outcomes.shape[1] == 2:
        return log_outcomes
    win, tie, lose = log_outcomes.unbind(1)
    half = tie - math.log(2)
    return torch.stack([torch.logaddexp(win, half), torch.logaddexp(lose, half)], dim=1)


class _Encoder:
    """What never changes of images, by number (n, ...).

    It encodes a fixed number at once, so that they are the same to the bit whether cached or not.
    """

    def __init__(self, model: RewardModel, picture: Picture, keys: Sequence[Key]):
        self.model = model
        self.picture = picture
        self.keys = keys

    @torch.no_grad()
    def __call__(self, numbers: Sequence[int]) -> Tensor:
        parts = []
        for start in range(0, len(numbers), _ENCODED_AT_ONCE):
            chosen = [self.keys[number] for number in numbers[start : start + _ENCODED_AT_ONCE]]
            pixels = self.model.pixels([self.picture(*key) for key in chosen])
            features = self.model.encode(filled(pixels, _ENCODED_AT_ONCE).to(self.model.device))
            parts.append(features[: len(chosen)].float())
        return torch.cat(parts)

    def all(self, should_stop: Callable[[], bool]) -> Tensor:
        """The features of every image, in main memory. Raises Stopped where `should_stop` says so."""
        parts = []
        for start in range(0, len(self.keys), _ENCODED_AT_ONCE):
            if _any_process(should_stop()):
                raise Stopped
            parts.append(self(range(start, min(start + _ENCODED_AT_ONCE, len(self.keys)))).cpu())
        return torch.cat(parts)


@dataclass(frozen=True)
class _Collator:
    """Gathers a batch of B pairs, all first images before all second ones.

    Attributes:
        features: image numbers to features (n, ...).
        tokens: those of every prompt, (P, L, ...).
        seed: of the noise in which the model may be trained; both images of a pair have the same.
    """

    model: RewardModel
    features: Callable[[list[int]], Tensor]
    tokens: dict[str, Tensor]
    seed: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        images = [row["a"] for row in rows] + [row["b"] for row in rows]
        prompts = [row["prompt"] for row in rows] * 2
        features = self.features(images)  # (2B, ...)
        tokens = {name: value[prompts] for name, value in self.tokens.items()}  # (2B, L, ...)
        drawn = {}
        if "draw" in rows[0]:
            keys = [sample_key(self.seed, "noise", row["draw"]) for row in rows]
            features, tokens = self.model.noised(features, tokens, keys * 2)
            drawn["key"] = torch.tensor([sample_key(self.seed, "loss", rows[0]["draw"])])
        return {
            "features": features,
            "tokens": tokens,
            "label": torch.tensor([row["label"] for row in rows]),  # (B,)
            "weight": torch.tensor([row["weight"] for row in rows]),  # (B,)
            **drawn,
        }


def _numbered(pairs: Dataset) -> tuple[Dataset, list[Key], list[str]]:
    """`pairs` with numbers in the place of images and prompts, and what the numbers stand for."""
    first = list(zip(pairs["prompt_id"], pairs["sample_a"], strict=True))
    second = list(zip(pairs["prompt_id"], pairs["sample_b"], strict=True))
    keys = {key: number for number, key in enumerate(dict.fromkeys(first + second))}
    texts = {text: number for number, text in enumerate(dict.fromkeys(pairs["prompt"]))}
    columns = {
        "a": [keys[key] for key in first],
        "b": [keys[key] for key in second],
        "prompt": [texts[text] for text in pairs["prompt"]],
        "label": list(pairs["label"]),
        "weight": list(pairs["weight"]),
    }
    return Dataset.from_dict(columns), list(keys), list(texts)


def _heldout_metrics(prediction: EvalPrediction) -> dict[str, float]:
    log_p, log_q, reward_a, reward_b = prediction.predictions.T
    label, weight = prediction.label_ids.T
    surprise = -(label * log_p + (1 - label) * log_q)
    return {
        "nll": float(np.average(surprise, weights=weight)),
        "accuracy": pairwise_accuracy(reward_a, reward_b, label),
    }


def _any_process(flag: bool) -> bool:
    return bool(gather(torch.tensor([int(flag)], device=PartialState().device)).any())


class _Conductor(TrainerCallback):
    """Reports, saves what was evaluated, and stops after a save."""

    def __init__(self, on_step: OnStep, should_stop: Callable[[], bool]):
        self.on_step = on_step
        self.should_stop = should_stop
        self.stopping = False

    def on_step_end(self, args: RewardConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stopping = _any_process(self.should_stop())
        control.should_save |= control.should_evaluate or self.stopping

    def on_save(self, args: RewardConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stopping and state.global_step < state.max_steps:
            raise Stopped

    def on_log(self, args: RewardConfig, state: TrainerState, control: TrainerControl, logs: dict, **_: Any) -> None:
        shown = {ours: logs[theirs] for theirs, ours in _LOGGED.items() if theirs in logs}
        for name in ("loss", "heldout_nll"):
            if not math.isfinite(shown.get(name, 0.0)):
                raise FloatingPointError(f"the {name} is {shown[name]} at step {state.global_step}")
        if shown:
            self.on_step(state.global_step, state.max_steps, shown)


class _PairTrainer(RewardTrainer):
    """trl's reward trainer for batches of a `_Collator`."""

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
