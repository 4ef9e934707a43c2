"""Checks of an update: whatever the batch, on every process, and across a checkpoint it is the same."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from pipeline.doctoring.check import Check
from pipeline.doctoring.subject import Subject, flat, gradients, nudged
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state

ACCUMULATION, RANKS, RESUME = "accumulation", "gradients over processes", "save, load, go on"


def accumulation(subject: Subject) -> Check:
    """Eight pictures at once and eight times one give the same gradient."""
    found = []
    for batch in (subject.settings.groups * subject.settings.group_size, 1):
        trainer = subject.trainer(batch=batch)
        nudged(trainer)
        found.append(flat(gradients(trainer, subject.prompts)[0]))
    whole, summed = found
    return Check.at_most(
        ACCUMULATION,
        float((whole - summed).norm() / whole.norm()),
        1e-3,
        "the gradient depends on finetune.batch: weigh each input by its share of all, not of its batch",
        "difference of the gradient between one batch and batches of one",
    )


def same_on_all_processes(subject: Subject) -> Check:
    """After the exchange every process holds the same gradient, to the bit."""
    if (ranks := process_state().num_processes) == 1:
        return Check.skipped(RANKS, "one process: nothing to compare")
    found = flat(gradients(subject.trainer(), subject.prompts)[0])
    digests = gather_object([hashlib.sha256(found.numpy().tobytes()).hexdigest()])
    return Check.at_most(
        RANKS,
        len(set(digests)),
        1,
        "gradients are not exchanged: the last backward of an update must run on the wrapped module, out of no_sync",
        f"different gradients on {ranks} processes",
    )


def save_load_continue(subject: Subject) -> Check:
    """What goes on from a checkpoint, written and read elsewhere, is what would have gone on without it."""
    whole = subject.trainer()
    whole.iterate(subject.prompts)
    with tempfile.TemporaryDirectory(prefix="doctor-") as own:
        place = [own]
        broadcast_object_list(place)
        if whole.accelerator.is_main_process:
            whole.save(Path(place[0]) / "state")
        whole.accelerator.wait_for_everyone()
        again = subject.trainer()
        again.load(Path(place[0]) / "state")
        whole.accelerator.wait_for_everyone()
    for trainer in (whole, again):
        trainer.iterate(subject.prompts)
    pairs = list(zip(_state(whole), _state(again), strict=True))
    differ = sum(not torch.equal(a, b) for a, b in pairs)
    return Check.at_most(
        RESUME,
        differ + (_counted(whole) != _counted(again)),
        0,
        "Trainer.save or Trainer.load leaves something out: weights, moving average, optimiser or counters",
        f"of {len(pairs)} tensors that differ an iteration after a resume",
    )


def _counted(trainer: Trainer) -> list[Any]:
    """Its numbers that are no tensors."""
    return [trainer.done, *(one and one.state() for one in (trainer.normaliser, trainer.scaler))]


def _state(trainer: Trainer) -> list[Tensor]:
    """All that learns, its moving average, and what the optimiser knows."""
    groups = trainer.optimizer.param_groups
    weights = [weight for group in groups for weight in group["params"]]
    state = trainer.optimizer.state
    known = [torch.as_tensor(state[weight][name]) for weight in weights for name in sorted(state[weight])]
    return [*weights, *trainer.average.shadow, *known]
