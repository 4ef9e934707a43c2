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

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import (
    PrinterCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from trl import RewardConfig

from models.keys import sample_key
from rewards.backbones import Frozen, RewardModel, Trained, checkpointed, make_trainable, merge
from rewards.batches import Collator, Dtype, Picture, Reader, all_features, margins, numbered
from rewards.heads import LEVELLED, bootstrap_weights, level
from rewards.losses import BradleyTerry, PairLoss
from rewards.pair_trainer import (
    Conductor,
    Learner,
    OnStep,
    PairTrainer,
    Stopped,
    any_process,
    heldout_metrics,
    is_spent,
)

_COLUMNS = ("prompt_id", "prompt", "sample_a", "sample_b", "label", "weight", "split")
_FROZEN, _BRADLEY_TERRY = Frozen(), BradleyTerry()


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
    table, keys, texts = numbered(pairs)
    read = Reader(model, images, keys)
    cached = config.cache_features and model.caches

    def check_stop() -> None:
        if any_process(should_stop()):
            raise Stopped

    shown = all_features(read, config.dtype, config.workers, check_stop).__getitem__ if cached else read
    arguments.dataloader_num_workers = 0 if cached else config.workers
    groups = list(pairs["prompt_id"]) if config.grouped else None
    order = training_order(rows["train"], steps * config.batch, config.seed, groups)
    told = model.tokens(texts)
    bootstrap = bootstrap_weights(texts, model.head_count, config.seed) if model.head_count > 1 else None
    learner = Learner(model, config.loss, config.dtype, cached)
    trainer = PairTrainer(
        learner,
        arguments,
        data_collator=Collator(shown, told, config.seed, model.noisy, bootstrap),
        train_dataset=Dataset.from_dict({**table[order], "draw": range(len(order))}),
        eval_dataset=table.select(rows["heldout"]),
        processing_class=model.tokenizer,
        compute_metrics=heldout_metrics,
        callbacks=[Conductor(on_step, should_stop, config.patience)],
    )
    trainer.remove_callback(PrinterCallback)
    # It would write the tokenizer's special tokens into the config of a language model that is not there.
    trainer.processing_class = None
    last = get_last_checkpoint(folder) if folder.is_dir() else None
    stood = TrainerState.load_from_json(str(Path(last) / TRAINER_STATE_NAME)) if last else None
    if stood and is_spent(stood, config.patience):
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
    if loss.of_margins and not np.isfinite(margins(pairs)).all():
        raise ValueError(f"loss: {loss.type} learns the judge's margins, and not every picture has one")
    return rows


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
