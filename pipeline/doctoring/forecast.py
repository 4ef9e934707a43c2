"""What the run will take: memory and seconds, from one measured iteration on a few whole groups."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.geometry import Unknown
from pipeline.doctoring.check import Check
from pipeline.doctoring.subject import Recorded, Subject
from pipeline.forecast import GIB, device_memory, needs, refusal, remedy
from pipeline.progress import duration
from pipeline.rl.policy import WholePolicy
from pipeline.rl.trainer import Trainer
from rewards.reward import ModelReward

STAGES, MEMORY, TIME = "memory of all stages", "memory", "time"


class Saved:
    """While entered, counts the bytes that are kept for a backward pass, those of `others` left out; `most` at once."""

    def __init__(self, others: Iterable[Tensor] = ()) -> None:
        self.now = self.most = 0
        self._others = {_place(tensor) for tensor in others}
        self._held: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Kept(tensor, self), lambda kept: kept.tensor
        )

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def count(self, tensor: Tensor, change: int) -> None:
        """One more (1) or one less (-1) place where `tensor` is kept; its memory counts once."""
        if (place := _place(tensor)) in self._others:
            return
        before = self._held[place] > 0
        self._held[place] += change
        self.now += ((self._held[place] > 0) - before) * tensor.untyped_storage().nbytes()
        self.most = max(self.most, self.now)


class _Kept:
    """A tensor that counts until the graph lets go of it."""

    def __init__(self, tensor: Tensor, saved: Saved):
        self.tensor, self.saved = tensor, saved
        saved.count(tensor, 1)

    def __del__(self) -> None:
        self.saved.count(self.tensor, -1)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class Measured:
    """An iteration on `groups` groups of the run's size: its seconds, the most bytes of activations of a batch, with
    how many inputs, and the bytes of weights and of what belongs to those that are trained."""

    groups: int
    seconds: float
    activations: int
    inputs: int
    weights: int
    trained: int


def measured(subject: Subject) -> Measured:
    """One iteration as the run does it, after one that warms up."""
    settings = subject.config.finetune.trained
    recorded = Recorded(subject.made())
    changes = {"group_size": settings.group_size, "dtype": settings.dtype}
    trainer = subject.trainer(subject.reward, recorded, own=True, **changes)
    trainer.iterate(subject.prompts)
    recorded.asked.clear()
    weights = [p for module in _modules(subject, trainer) for p in module.parameters()]
    with Saved([] if trainer.sharded else weights) as saved:
        started = time.monotonic()
        trainer.iterate(subject.prompts)
        seconds = time.monotonic() - started
    base = trainer.policy.base if isinstance(trainer.policy, WholePolicy) else None
    return Measured(
        groups=len(subject.prompts),
        seconds=seconds,
        activations=saved.most,
        inputs=max(len(examples) for examples, _ in recorded.asked),
        weights=sum(p.nbytes for p in (*weights, *(base or ()))),
        trained=4 * sum(p.nbytes for group in trainer.optimizer.param_groups for p in group["params"]),
    )


def _modules(subject: Subject, trainer: Trainer) -> list[nn.Module]:
    """All whose weights are in memory, but for a judge's."""
    generator = trainer.generator
    models = [term.reward.model for term in subject.reward.terms if isinstance(term.reward, ModelReward)]
    return list(dict.fromkeys([trainer.plain, trainer.tuned, *generator.frozen, *models]))


def memory(subject: Subject, found: Measured) -> Check:
    """Weights, and for each that is trained its gradient, two moments of AdamW and an average; and the activations of
    the largest batch."""
    settings = subject.config.finetune
    if subject.sharded:
        return Check.skipped(MEMORY, f"weights come and go where they are sharded; see {STAGES}")
    most = found.inputs * settings.helpings / found.groups
    activations = found.activations * max(1.0, min(settings.batch, most) / found.inputs)
    parts = {"weights": found.weights, "gradients, optimiser and average": found.trained, "activations": activations}
    split = ", ".join(f"{name} {value / 2**20:,.0f} MiB" for name, value in parts.items())
    room = device_memory(subject.processes)
    return Check.at_most(
        MEMORY,
        sum(parts.values()) / GIB,
        room / GIB,
        _smaller(subject.config, room, subject.processes),
        f"GiB a process at least: {split}",
    )


def _smaller(config: Any, room: int, processes: int) -> str:
    """The settings that make fine-tuning smaller."""
    try:
        found = remedy(config, "finetune", room, processes).settings
    except Unknown:
        found = ()
    return f"set {' '.join(found)}" if found else "lower finetune.batch and finetune.lora.rank, or take a larger device"


def stages(config: Any, processes: int) -> Check:
    """What the stage that takes most takes, by the geometry of its models alone."""
    room = device_memory(processes)
    try:
        found = needs(config, processes, room)
    except Unknown as error:
        return Check.skipped(STAGES, str(error))
    most = max(found, key=lambda need: need.total)
    split = ", ".join(f"{need.stage} {need.total / 2**20:,.0f} MiB" for need in found)
    line = refusal(config, most, room, processes) if most.total > room else ""
    return Check.at_most(STAGES, most.total / GIB, room / GIB, line, f"GiB a process at least: {split}")


def seconds(subject: Subject, found: Measured) -> Check:
    """Of all iterations, one like another; the checks of the watch come on top."""
    settings = subject.config.finetune
    each = found.seconds * settings.helpings / found.groups
    whole = each * settings.iterations
    line = f"seconds: {duration(whole)} for {settings.iterations} iterations of {each:.3g} s"
    return Check(TIME, True, whole, None, "", line + (", not compiled" if settings.compile else ""))
