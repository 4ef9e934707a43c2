"""The native networks by name: made from settings, or loaded from a folder that diffusers wrote."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from models.dit import DiT
from models.layers import Backbone
from models.mmdit import MMDiT

NETWORKS: dict[str, type[Backbone]] = {"DiT": DiT, "MMDiT": MMDiT}

_CONFIG = "config.json"
_SHOWN = 4
"""Keys that an error line names."""


def network_of(name: str) -> type[Backbone]:
    """Raises ValueError naming those there are."""
    if name not in NETWORKS:
        raise ValueError(f"network: unknown {name}; known here: {', '.join(NETWORKS)}")
    return NETWORKS[name]


def load_network(folder: str | Path) -> Backbone:
    """The network in a folder, frozen; which one it is stands in the `_class_name` of its config.json.

    Raises:
        FileNotFoundError: there is no config.json or no weights.
        ValueError: it is none of ours, or its weights are not those that its settings ask for; the line says which.
    """
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no network (no {_CONFIG} in it)")
    kind = network_of(json.loads(path.read_text()).get("_class_name", "a network without a name"))
    _check_weights(kind, Path(folder))
    return kind.from_pretrained(folder).eval().requires_grad_(False)


def _check_weights(kind: type[Backbone], folder: Path) -> None:
    """Compare names and shapes in the headers with those of the network on the meta device."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: holds no weights (no .safetensors in it)")
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    with torch.device("meta"):
        network = kind.from_config(kind.load_config(folder))
    asked = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if missing := sorted(asked.keys() - found.keys()):
        raise ValueError(f"transformer: {folder} is no {kind.__name__} of its settings; it lacks {_told(missing)}")
    if surplus := sorted(found.keys() - asked.keys()):
        raise ValueError(f"transformer: {folder} is no {kind.__name__} of its settings; it also has {_told(surplus)}")
    for name in sorted(asked):
        if asked[name] != found[name]:
            raise ValueError(
                f"transformer: {folder}: {name} is {found[name]}, and {asked[name]} by the settings beside it"
            )


def _told(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
