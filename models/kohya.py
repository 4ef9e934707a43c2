"""LoRA under the names by which ComfyUI and kohya's scripts know layers, and back.

An adapter of ours is scaled by alpha / rank, which stands in its file's metadata, where those programs do not look:
they take alpha from a tensor, or the rank where there is none. So B is scaled here once and for all, and alpha is the
rank: a reader that heeds alpha and one that does not paint the same.

ComfyUI knows the layers of some networks by `transformer.` and diffusers' names, and those of any other by kohya's:
`lora_unet_` and the name with underscores for dots.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

DOTTED = (
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "ZImageTransformer2DModel",
)
"""The networks that ComfyUI knows by diffusers' names."""

_FLAT = "lora_unet_"
_DOWN, _UP, _ALPHA = "lora_down.weight", "lora_up.weight", "alpha"


def folded(path: str | Path, prefix: str | None) -> dict[str, tuple[Tensor, Tensor]]:
    """A (rank, ...) and B (..., rank) by the name of their layer, of a file that `models.lora.save` wrote.

    B has taken in the scale alpha / rank.
    """
    head = f"{prefix}." if prefix else ""
    with safe_open(path, "pt") as file:
        [config] = map(json.loads, file.metadata().values())
        tensors = {key.removeprefix(head): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no mapping
    scale = config[f"{head}lora_alpha"] / config[f"{head}r"]
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {name: (tensors[f"{name}.lora_A.weight"], scale * tensors[f"{name}.lora_B.weight"]) for name in names}


def named(layers: Mapping[str, tuple[Tensor, Tensor]], network: str) -> dict[str, Tensor]:
    """What `folded` gave, under the names that ComfyUI reads for a network of the class `network`."""
    found = {}
    for name, (a, b) in layers.items():
        if network in DOTTED:
            found |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
        else:
            flat = f"{_FLAT}{name.replace('.', '_')}"
            rank = torch.tensor(float(len(a)))
            found |= {f"{flat}.{_DOWN}": a, f"{flat}.{_UP}": b, f"{flat}.{_ALPHA}": rank}
    return found


def is_flat(keys: Iterable[str]) -> bool:
    """Whether a file with such `keys` has kohya's names."""
    return any(key.startswith(_FLAT) for key in keys)


def dotted(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The inverse of `named` for kohya's names: those of peft, B scaled, for `network`.

    Raises:
        ValueError: a name is that of no layer, or a layer has another adapter than A, B and perhaps alpha.
    """
    names = {f"{_FLAT}{name.replace('.', '_')}": name for name, _ in network.named_modules()}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        flat, _, what = key.partition(".")
        if flat not in names:
            raise ValueError(f"lora: {key} fits no layer of {type(network).__name__}; it is one of another network")
        layers.setdefault(flat, {})[what] = value
    found = {}
    for flat, parts in layers.items():
        if parts.keys() - {_ALPHA} != {_DOWN, _UP}:
            raise ValueError(f"lora: {flat} has {', '.join(sorted(parts))}, which is no plain LoRA; export it as one")
        a, b = parts[_DOWN], parts[_UP]
        scale = parts.get(_ALPHA, torch.tensor(float(len(a)))) / len(a)
        found |= {f"{names[flat]}.lora_A.weight": a, f"{names[flat]}.lora_B.weight": scale * b}
    return found
