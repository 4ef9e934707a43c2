"""What learns: an adapter on the generator's transformer, or the whole of it; and the base model it started from.

Whatever of the two it is, `network` has the parameters that are trained, `reference` makes it the base model for a
while, `merge_into` brings a twin of the base model up to it, and `save` writes what `models.load_generator` reads.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from models import lora
from models.generator import Generator
from pipeline.rl.settings import LoraSettings, TrainerSettings
from pipeline.settings import UserError


class Policy(Protocol):
    network: nn.Module

    def reference(self) -> contextlib.AbstractContextManager[None]: ...

    def merge_into(self, plain: nn.Module) -> None: ...

    def save(self, folder: Path) -> None: ...


class AdapterPolicy:
    """A LoRA (2106.09685); the base model is the transformer with the adapter switched off."""

    def __init__(self, generator: Generator, settings: LoraSettings, seed: int):
        """Raises UserError where a target is none of the network's."""
        self.network, self.prefix = generator.transformer, generator.lora_prefix
        targets = settings.targets or generator.lora_targets
        try:
            lora.attach(self.network, targets, settings.rank, settings.alpha, seed)
        except ValueError as error:
            raise UserError(f"finetune.lora.targets: {error}") from None

    def reference(self) -> contextlib.AbstractContextManager[None]:
        return lora.reference(self.network)

    def merge_into(self, plain: nn.Module) -> None:
        lora.merge_into(plain, self.network)

    def save(self, folder: Path) -> None:
        lora.save(self.network, folder, self.prefix)


class WholePolicy:
    """Every weight of the transformer; the base model is a frozen copy, where one is kept."""

    def __init__(self, generator: Generator, keep_base: bool):
        self.network = generator.transformer.requires_grad_(True)
        self.base = [p.detach().clone() for p in self.network.parameters()] if keep_base else None

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Raises UserError where no copy was kept."""
        if self.base is None:
            raise UserError(
                "finetune.keep_base: the base model is asked for, and no copy of it was kept; set it to true"
            )
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Trade places with the base model; nothing is copied."""
        for place, (weight, base) in enumerate(zip(self.network.parameters(), self.base, strict=True)):
            self.base[place], weight.data = weight.data, base

    @torch.no_grad()
    def merge_into(self, plain: nn.Module) -> None:
        for twin, weight in zip(plain.parameters(), self.network.parameters(), strict=True):
            twin.copy_(weight)

    def save(self, folder: Path) -> None:
        self.network.save_pretrained(folder)


def policy_of(generator: Generator, settings: TrainerSettings, needs_base: bool, seed: int) -> Policy:
    """What `settings` train on `generator`, whose transformer becomes the policy's network."""
    if settings.lora is None:
        return WholePolicy(generator, needs_base and settings.keep_base)
    return AdapterPolicy(generator, settings.lora, seed)
