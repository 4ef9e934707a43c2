"""How much of a reward model is trained: all behind its tower, adapters, or everything; and what of it is kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rewards.backbones.base import RewardModel


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The tower is frozen, and with it the stem and the lowest `share` of the layers, where that is above 0."""

    type: Literal["frozen"] = "frozen"
    share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: {self.share} is not from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of `rank` on every linear layer of tower and layers (2106.09685), scaled by `alpha` / `rank`."""

    type: Literal["lora"] = "lora"
    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: {self.rank} is less than 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha: {self.alpha} is not a positive number")


@dataclass(frozen=True, kw_only=True)
class Full:
    """Everything is trained, the tower too."""

    type: Literal["full"] = "full"


Trained = Frozen | Lora | Full


def make_trainable(model: RewardModel, how: Trained, seed: int) -> None:
    """Let `model` be trained as `how` says, and nothing else of it; new adapters depend on `seed` alone."""
    model.requires_grad_(False)
    parts = model.parts()
    chosen = parts.top
    match how:
        case Frozen(share=share):
            first = round(share * len(parts.layers))
            chosen += parts.layers[first:] + (() if share else parts.stem)
        case Full():
            chosen += parts.tower + parts.stem + parts.layers
        case Lora(rank=rank, alpha=alpha):
            _attach(model, parts.tower + parts.layers, LoraConfig(r=rank, lora_alpha=alpha), seed)
    for part in chosen:
        part.requires_grad_(True)


@contextmanager
def checkpointed(model: RewardModel, enabled: bool = True) -> Iterator[None]:
    """In the block, each layer keeps its input alone and is computed again for its gradient (1604.06174).

    transformers' own switch does so only in training mode, in which layers would drop activations too.
    """
    layers = {id(layer): layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)}
    layers |= {id(layer): layer for layer in model.parts().layers}
    chosen = list(layers.values()) if enabled else []
    for layer in chosen:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in chosen:
            del layer.forward


def merge(model: RewardModel) -> None:
    """Add what adapters learned to the weights they adapt, in place, and drop them."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def _attach(model: RewardModel, where: tuple[nn.Module, ...], config: LoraConfig, seed: int) -> None:
    inside = {id(module) for part in where for module in part.modules()}
    config.target_modules = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    cast_adapter_dtype(model, "default")
