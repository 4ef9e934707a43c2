"""LoRA on a generator's transformer (2106.09685), by peft through diffusers: attach, set aside, merge, save."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS = "pytorch_lora_weights.safetensors"
_CONFIG = "lora_adapter_metadata"


def attach(transformer: PeftAdapterMixin, targets: Sequence[str], rank: int, alpha: float, seed: int) -> None:
    """Add an adapter that changes nothing yet (B = 0); it alone is trainable, and A depends on `seed` alone."""
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)


@contextlib.contextmanager
def reference(transformer: PeftAdapterMixin) -> Iterator[None]:
    """Within the block the adapter is off: the transformer is the one that fine-tuning started from."""
    transformer.disable_lora()
    try:
        yield
    finally:
        transformer.enable_lora()


@torch.no_grad()
def merge_into(plain: nn.Module, tuned: nn.Module) -> None:
    """Write base weight + scale * B A of `tuned` into `plain`, its twin without adapter.

    A separate twin, rather than merging in place and taking it back, keeps the base weights exact.
    """
    modules = dict(plain.named_modules())
    for name, layer in tuned.named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            modules[name].weight.copy_(weight + delta)


def save(transformer: PeftAdapterMixin, folder: str | Path) -> None:
    """Write the adapter in the diffusers format, which `load_lora_adapter` reads, to the same bytes each time."""
    transformer.save_lora_adapter(folder, weight_name=WEIGHTS)
    path = Path(folder) / WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    # Two orders differ from process to process: of the targets, which peft keeps in a set, and of metadata keys in a
    # safetensors header, of which only one is kept.
    config = json.loads(metadata[_CONFIG])
    ordered = json.dumps({**config, "target_modules": sorted(config["target_modules"])}, sort_keys=True)
    save_file(load_file(path), path, {_CONFIG: ordered})
