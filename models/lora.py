"""LoRA on a generator's network (2106.09685), by peft through diffusers: attach, set aside, merge, save, load.

`prefix` is what the names in a file begin with: that of the network's part in its diffusers pipeline, so that
`load_lora_weights` of the pipeline reads it, or None.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import kohya

WEIGHTS = "pytorch_lora_weights.safetensors"
_CONFIG = "lora_adapter_metadata"


def attach(transformer: PeftAdapterMixin, targets: Sequence[str], rank: int, alpha: float, seed: int) -> None:
    """Add an adapter that changes nothing yet (B = 0); it alone is trainable, and A depends on `seed` alone.

    It is float32 whatever the base weights are. Raises ValueError where a target is none of the network's.
    """
    if unknown := set(targets).difference(known_targets(transformer, targets)):
        raise ValueError(f"{', '.join(sorted(unknown))} ends the name of no layer of {type(transformer).__name__}")
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=list(targets))
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(config)
    for weight in transformer.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def known_targets(transformer: nn.Module, targets: Sequence[str]) -> list[str]:
    """Those of `targets` that are the name of a layer, or its ending."""
    names = [f".{name}" for name, _ in transformer.named_modules()]
    return [target for target in targets if any(name.endswith(f".{target}") for name in names)]


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

    A separate twin, rather than merging in place and taking it back, keeps the base weights exact. Theirs should be
    float32: rounded to bfloat16, what an adapter adds in its first steps is mostly lost.
    """
    modules = dict(plain.named_modules())
    for name, layer in tuned.named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            modules[name].weight.copy_(weight + delta)


def save(transformer: PeftAdapterMixin, folder: str | Path, prefix: str | None = None) -> None:
    """Write the adapter in the diffusers format, which `merge` reads, to the same bytes each time."""
    transformer.save_lora_adapter(folder, weight_name=WEIGHTS)
    path = Path(folder) / WEIGHTS
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    # Two orders differ from process to process: of the targets, which peft keeps in a set, and of metadata keys in a
    # safetensors header, of which only one is kept.
    config = json.loads(metadata[_CONFIG])
    config["target_modules"] = sorted(config["target_modules"])
    ordered = json.dumps(_named(config, prefix), sort_keys=True)
    save_file(_named(load_file(path), prefix), path, {_CONFIG: ordered})


def _named(values: Mapping[str, Any], prefix: str | None) -> dict[str, Any]:
    return {f"{prefix}.{name}" if prefix else name: value for name, value in values.items()}


def merge(transformer: PeftAdapterMixin, folder: str | Path, prefix: str | None = None) -> None:
    """Merge the adapter in `folder` into the weights; its names may be kohya's.

    Raises:
        ValueError: it is one of another network.
    """
    path = Path(folder) / WEIGHTS
    tensors = load_file(path)
    if kohya.is_flat(tensors):
        tensors = kohya.dotted(tensors, transformer)
        _check(transformer, tensors, path, None)
        transformer.load_lora_adapter(tensors, prefix=None)
    else:
        _check(transformer, tensors, path, prefix)
        transformer.load_lora_adapter(folder, weight_name=WEIGHTS, prefix=prefix)
    transformer.fuse_lora()
    transformer.unload_lora()


def _check(transformer: nn.Module, tensors: Mapping[str, Tensor], path: Path, prefix: str | None) -> None:
    layers = _named(dict(transformer.named_modules()), prefix)
    for key, value in tensors.items():
        name, _, side = key.removesuffix(".weight").rpartition(".lora_")
        if not _fits(layers.get(name), side, value.shape):
            raise ValueError(
                f"lora: {path} is one of another network: {key} fits no layer of {type(transformer).__name__}"
            )


def _fits(layer: nn.Module | None, side: str, shape: Sequence[int]) -> bool:
    """Whether an adapter's A (rank, inputs, ...) or B (outputs, rank, ...) is one of `layer`."""
    weight = getattr(layer, "weight", None)
    if weight is None or side not in ("A", "B"):
        return False
    return weight.shape[1] == shape[1] if side == "A" else weight.shape[0] == shape[0]
