"""Trains a reward model on preference pairs of images, on trl's RewardTrainer, resumable bit for bit.

Where the image tower is frozen its features are computed once, and a step costs only what reads them; where it is
trained, other processes decode the pictures of the next steps. A step reads a picture once, whatever number of its
pairs share it.

What a step sees is a function of its number: an epoch is a permutation keyed by (seed, epoch), the epochs are laid end
to end and cut into full batches, and the trainer walks through them as through one; noise, where a backbone wants any,
is keyed by a pair's place in that order. So there is no random state to restore, no partial batch, and no epoch's end
at which a resumed run evaluates twice.

Of trl's trainer this keeps the loop, the optimiser, the schedule and the processes (accelerate); it replaces
the loss, the evaluation and the checkpoints, which here are safetensors and JSON, whole or absent.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
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

from judges.pairwise import fit_temperature
from models.keys import sample_key
from rewards.backbones import Frozen, RewardModel, Trained, checkpointed, filled, make_trainable, merge
from rewards.heads import LEVELLED, bootstrap_weights, level
from rewards.losses import BradleyTerry, PairLoss, Scores
from rewards.metrics import pairwise_accuracy

Key = tuple[str, int]  # prompt id and sample number
Picture = Callable[[str, int], np.ndarray | Image.Image]
OnStep = Callable[[int, int, dict[str, float]], None]
Dtype = Literal["float32", "bfloat16"]

_MARGINS = ("margin_a", "margin_b")
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
        grouped: the pairs of a prompt follow one another, and so share most of their pictures, which a step reads once
            (InstructGPT, 2203.02155, section 3.5). A step then sees fewer prompts: it suits larger batches.
        warmup: share of the steps over which the learning rate rises from 0.
        save_steps: a checkpoint every so many steps, besides one after each epoch.
        patience: training ends after so many evaluations in a row that did not lower the held-out NLL; None never
            ends it early. The learning rate falls as if it were to go on.
        cache_features: hold the features of all images in memory, in fp32, where the tower is frozen; False encodes
            them at every step.
        workers: processes that decode pictures; 0 decodes them between the steps. It changes no result.
        dtype: of products (autocast); weights, losses and the optimiser's state are fp32 in any case.
        gradient_checkpointing: keep the input of each layer alone and compute what is inside again for the gradient:
            a third more work, the same result, and a fraction of the memory.
        trained: how much of the model is trained.
        loss: how scores explain soft labels.
    """

    epochs: int = 3
    batch: int = 32
    grouped: bool = False
    learning_rate: float = 1e-5
    weight_decay: float = 0.05
    warmup: float = 0.1
    seed: int = 0
    save_steps: int = 200
    patience: int | None = None
    cache_features: bool = True
    workers: int = 0
    dtype: Dtype = "float32"
    gradient_checkpointing: bool = False
    trained: Trained = _FROZEN
    loss: PairLoss = _BRADLEY_TERRY

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "save_steps", "patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is less than 1")
        if self.workers < 0:
            raise ValueError(f"workers: {self.workers} is less than 0")
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype: {self.dtype!r} is none of {', '.join(get_args(Dtype))}")
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
        images: the picture, PIL or uint8 (H, W, 3), of a prompt id and a sample number; with `workers` it is called
            in other processes.
        folder: for checkpoints alone; where one stands, training goes on from it.
        on_step: called on every process with the step, the number of steps, and what was measured: `loss`,
            `learning_rate`, `grad_norm` after a step, `heldout_nll`, `heldout_accuracy` after an evaluation.
        should_stop: asked after every step; the yes of one process stops all.

    Returns:
        `steps`, those done, `best_step`, `train_pairs`, `heldout_pairs`, the weighted `heldout_nll` in nats and the
        `heldout_accuracy` of the best step, the `temperature` by which its margins would be divided to fit the held-out
        labels best (None where none fits), `curve`, both of these for every evaluation, `trained_parameters`, and
        `loss`, its settings with what it learned. The NLL is that of the soft labels under the probabilities that
        the loss makes of scores, so it can be compared between losses.

    Raises:
        Stopped: `should_stop` said so; the last step, if there was one, is in a checkpoint.
        ValueError: a column or a split of `pairs` is missing or out of range, or `batch` does not divide.
        FloatingPointError: the loss is no finite number.
    """
    rows = split_rows(pairs, config.loss)
    steps = step_count(len(rows["train"]), config)
    per_epoch = steps // config.epochs
    arguments = _arguments(config, folder, per_epoch, on_cpu=model.device.type == "cpu")
    make_trainable(model, config.trained, sample_key(config.seed, "adapters"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    model.to(arguments.device)
    table, keys, texts = _numbered(pairs)
    read = _Reader(model, images, keys)
    cached = config.cache_features and model.caches
    shown = _all_features(read, config, should_stop).__getitem__ if cached else read
    arguments.dataloader_num_workers = 0 if cached else config.workers
    groups = list(pairs["prompt_id"]) if config.grouped else None
    order = training_order(rows["train"], steps * config.batch, config.seed, groups)
    told = model.tokens(texts)
    bootstrap = bootstrap_weights(texts, model.head_count, config.seed) if model.head_count > 1 else None
    learner = _Learner(model, config.loss, config.dtype, cached)
    trainer = _PairTrainer(
        learner,
        arguments,
        data_collator=_Collator(shown, told, config.seed, model.noisy, bootstrap),
        train_dataset=Dataset.from_dict({**table[order], "draw": range(len(order))}),
        eval_dataset=table.select(rows["heldout"]),
        processing_class=model.tokenizer,
        compute_metrics=_heldout_metrics,
        callbacks=[_Conductor(on_step, should_stop, config.patience)],
    )
    trainer.remove_callback(PrinterCallback)
    # It would write the tokenizer's special tokens into the config of a language model that is not there.
    trainer.processing_class = None
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    stood = TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME)) if last else None
    if stood and _is_spent(stood, config.patience):
        trainer.state = stood
    else:
        with checkpointed(model, config.gradient_checkpointing):
            trainer.train(resume_from_checkpoint=last)
    best = trainer.restore_best()
    merge(model)
    model.requires_grad_(False)
    if model.head_count > 1:
        seen = table.select(rows["train"][:LEVELLED])
        level(model, read, list(seen["a"]) + list(seen["b"]), told, list(seen["prompt"]) * 2)
    found = [entry for entry in trainer.state.log_history if "eval_nll" in entry]
    chosen = next(entry for entry in found if entry["step"] == best)
    temperature = chosen["eval_temperature"]
    return {
        "steps": trainer.state.global_step,
        "best_step": best,
        "train_pairs": len(rows["train"]),
        "heldout_pairs": len(rows["heldout"]),
        "heldout_nll": chosen["eval_nll"],
        "heldout_accuracy": chosen["eval_accuracy"],
        "temperature": temperature if math.isfinite(temperature) else None,
        "curve": [
            {"step": entry["step"], "heldout_nll": entry["eval_nll"], "heldout_accuracy": entry["eval_accuracy"]}
            for entry in found
        ],
        "trained_parameters": trained,
        "loss": asdict(config.loss.fitted(learner.free)),
    }


def step_count(pairs: int, config: RewardTraining) -> int:
    """Optimiser steps on so many training pairs."""
    return config.epochs * max(1, round(pairs / config.batch))


def split_rows(pairs: Dataset, loss: PairLoss) -> dict[str, list[int]]:
    """The row numbers of each split of `pairs`.

    Raises:
        ValueError: a column or a split is missing, a value out of range, or what `loss` learns is not there; the
            message starts with the field's name.
    """
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
    if loss.of_margins and not np.isfinite(_margins(pairs)).all():
        raise ValueError(f"loss: {loss.type} learns the judge's margins, and not every picture has one")
    return rows


def _margins(pairs: Dataset) -> np.ndarray:
    """The judge's margins (N, 2) of both images, NaN where the table does not tell."""
    known = [pairs[name] if name in pairs.column_names else [math.nan] * len(pairs) for name in _MARGINS]
    return np.array(known, dtype=np.float32).T


def training_order(rows: Sequence[int], count: int, seed: int, prompts: Sequence[str] | None = None) -> list[int]:
    """`count` row numbers: `rows` in a permutation keyed by `seed` and epoch, epoch after epoch.

    With `prompts`, the id of every row of the table, the rows of a prompt come one after the other.
    """
    order: list[int] = []
    for epoch in range(math.ceil(count / len(rows))):
        drawn = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
        if prompts is not None:
            first = {prompts[row]: place for place, row in reversed(list(enumerate(drawn)))}
            drawn.sort(key=lambda row: first[prompts[row]])
        order += drawn
    return order[:count]


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
        features = shown if self.cached else _encoded(self.model, shown, self.products)
        if noise is not None:
            features, tokens = self.model.noised(features, tokens, noise.tolist())
        with _autocast(features.device, self.products):
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
            orders = _without_ties(self.loss.log_outcomes(first, second, self.free))
            found = torch.cat([orders, torch.stack([first.mean, second.mean], dim=1)], dim=1)
        return loss, found


def _single(scores: Scores) -> Scores:
    """The same in fp32."""
    return Scores(**{name: None if part is None else part.float() for name, part in vars(scores).items()})


def _without_ties(log_outcomes: Tensor) -> Tensor:
    """Log-probabilities (B, 2) of either order, from those (B, K) of the outcomes; a tie is half of each."""
    if log_outcomes.shape[1] == 2:
        return log_outcomes
    win, tie, lose = log_outcomes.unbind(1)
    half = tie - math.log(2)
    return torch.stack([torch.logaddexp(win, half), torch.logaddexp(lose, half)], dim=1)


@dataclass(frozen=True)
class _Reader:
    """Pictures, by number, as the tower reads them: (n, ...) in fp32 on the CPU."""

    model: RewardModel
    picture: Picture
    keys: Sequence[Key]

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        return self.model.pixels([self.picture(*self.keys[number]) for number in numbers])


def _all_features(read: _Reader, config: RewardTraining, should_stop: Callable[[], bool]) -> Tensor:
    """The features of every image, in main memory. Raises Stopped where `should_stop` says so."""
    numbers = range(len(read.keys))
    batches = [numbers[start : start + _ENCODED_AT_ONCE] for start in numbers[::_ENCODED_AT_ONCE]]
    parts = []
    for pixels in DataLoader(batches, batch_size=None, collate_fn=read, num_workers=config.workers):
        if _any_process(should_stop()):
            raise Stopped
        parts.append(_encoded(read.model, pixels, config.dtype).cpu())
    return torch.cat(parts)


@torch.no_grad()
def _encoded(model: RewardModel, pixels: Tensor, dtype: Dtype) -> Tensor:
    """What never changes of images (n, ...), on the model's device.

    It encodes a fixed number at once, so that they are the same to the bit whether cached or not.
    """
    parts = []
    with _autocast(model.device, dtype):
        for part in pixels.split(_ENCODED_AT_ONCE):
            features = model.encode(filled(part.to(model.device), _ENCODED_AT_ONCE))
            parts.append(features[: len(part)].float())
    return torch.cat(parts)


def _autocast(device: torch.device, dtype: Dtype) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@dataclass(frozen=True)
class _Collator:
    """Gathers a batch of B pairs, of which U images are different; each is read once.

    Attributes:
        shown: image numbers to features, or to pixels (n, ...).
        tokens: those of every prompt, (P, L, ...).
        seed: of the noise in which the model may be trained; both images of a pair have the same.
        noisy: whether it is, so that an image differs from pair to pair.
        bootstrap: what each prompt weighs for each head, (P, M); None where there is one head.
    """

    shown: Callable[[list[int]], Tensor]
    tokens: dict[str, Tensor]
    seed: int
    noisy: bool
    bootstrap: Tensor | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        noisy = self.noisy and "draw" in rows[0]
        keys = [sample_key(self.seed, "noise", row["draw"]) if noisy else 0 for row in rows]
        sides = [[(row[side], row["prompt"], key) for row, key in zip(rows, keys, strict=True)] for side in ("a", "b")]
        place = {one: number for number, one in enumerate(dict.fromkeys(sides[0] + sides[1]))}
        images, prompts, noise = zip(*place, strict=True)
        drawn = {"noise": torch.tensor(noise)} if noisy else {}  # (U,)
        if "draw" in rows[0]:
            drawn["key"] = torch.tensor([sample_key(self.seed, "loss", rows[0]["draw"])])
            if self.bootstrap is not None:
                drawn["bootstrap"] = self.bootstrap[[row["prompt"] for row in rows]]  # (B, M)
        return {
            "first": torch.tensor([place[one] for one in sides[0]]),  # (B,)
            "second": torch.tensor([place[one] for one in sides[1]]),  # (B,)
            "shown": self.shown(list(images)),  # (U, ...)
            "tokens": {name: value[list(prompts)] for name, value in self.tokens.items()},  # (U, L, ...)
            "label": torch.tensor([row["label"] for row in rows]),  # (B,)
            "margin": torch.tensor([row["margin"] for row in rows]),  # (B, 2)
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
        "margin": _margins(pairs),
    }
    return Dataset.from_dict(columns), list(keys), list(texts)


def _heldout_metrics(prediction: EvalPrediction) -> dict[str, float]:
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


def _any_process(flag: bool) -> bool:
    return bool(gather(torch.tensor([int(flag)], device=PartialState().device)).any())


def _is_spent(state: TrainerState, patience: int | None) -> bool:
    """Whether the last `patience` evaluations did not lower the held-out NLL."""
    found = [entry["eval_nll"] for entry in state.log_history if "eval_nll" in entry]
    return patience is not None and len(found) > patience and min(found[-patience:]) >= min(found[:-patience])


class _Conductor(TrainerCallback):
    """Reports, saves what was evaluated, and stops after a save."""

    def __init__(self, on_step: OnStep, should_stop: Callable[[], bool], patience: int | None):
        self.on_step = on_step
        self.should_stop = should_stop
        self.patience = patience
        self.stopping = False

    def on_step_end(self, args: RewardConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.stopping = _any_process(self.should_stop())
        control.should_save |= control.should_evaluate or self.stopping

    def on_save(self, args: RewardConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop |= _is_spent(state, self.patience)
        if self.stopping and state.global_step < state.max_steps and not control.should_training_stop:
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
