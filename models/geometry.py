"""The networks of a checkpoint without their weights: on the meta device, where a tensor has a shape and no memory.

They are made of configs alone: those of a local folder, of the hub's cache, or of `geometries/`, which say what the
configs of the repositories that they name say. Nothing is downloaded.

Shapes: B rows, h w the size of a latent, L text tokens.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from models.codec import Codec, Identity, compression
from models.networks import NETWORKS

SHIPPED = Path(__file__).with_name("geometries")
_BERT_TOKENS = 512
"""What a BERT's config leaves out."""
_OURS: dict[str, Any] = {**NETWORKS, "Codec": Codec, "Identity": Identity}
_NETWORKS = ("transformer", "unet")
_CODECS = ("vae", "codec")


class Unknown(LookupError):
    """Nothing tells here what a checkpoint looks like; the message is one line, with what to do."""


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint: its class, its config, and the dtype that its weights are kept in, where known."""

    kind: str
    config: dict[str, Any]
    dtype: str | None = None

    def build(self) -> nn.Module:
        """On the meta device, frozen.

        Raises:
            Unknown: its class is not one that is installed.
        """
        kind = _OURS.get(self.kind) or getattr(diffusers, self.kind, None) or getattr(transformers, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise Unknown(f"{self.kind} is none of the networks of diffusers or transformers that are installed")
        with torch.device("meta"):
            if issubclass(kind, diffusers.ConfigMixin):
                network = kind.from_config(self.config)
            else:
                network = kind(kind.config_class.from_dict(self.config))
        return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class Geometry:
    """What a checkpoint consists of, by the names of its folders; a lone model is called `model`.

    Attributes:
        pipeline: the class of the diffusers pipeline that it is.
        text_tokens: how many one of our networks hears at most; for a pipeline's its adapter says so.
    """

    parts: dict[str, Part]
    pipeline: str | None = None
    text_tokens: int = 0

    @property
    def network_name(self) -> str:
        """Of what paints. Raises Unknown where nothing does."""
        return self._one_of(_NETWORKS)

    @property
    def network(self) -> Part:
        return self.parts[self.network_name]

    @property
    def codec(self) -> Part:
        return self.parts[self._one_of(_CODECS)]

    @property
    def encoders(self) -> tuple[Part, ...]:
        """What reads prompts."""
        return tuple(part for name, part in self.parts.items() if name.startswith("text_encoder"))

    def _one_of(self, names: tuple[str, ...]) -> str:
        found = [name for name in names if name in self.parts]
        if not found:
            raise Unknown(f"it holds {', '.join(self.parts)}, and no {' or '.join(names)}")
        return found[0]


@functools.cache
def geometry(checkpoint: str, revision: str | None = None) -> Geometry:
    """That of a local folder or a hub id: a pipeline of diffusers, a native generator, or a model of transformers.

    Raises:
        Unknown: neither the folder, nor the hub's cache, nor a shipped file tells.
    """

    def read(name: str) -> dict[str, Any] | None:
        path = Path(checkpoint) / name
        if not Path(checkpoint).exists():
            cached = try_to_load_from_cache(checkpoint, name, revision=revision) if checkpoint.count("/") == 1 else None
            path = Path(cached) if isinstance(cached, str) else None
        return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else None

    if index := read("model_index.json"):
        named = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and entry[1]}
        return Geometry(_read(read, named), index["_class_name"])
    if own := _read(read, dict.fromkeys(("transformer", "codec", "text_encoder"))):
        tokens = own["text_encoder"].config.get("max_position_embeddings", _BERT_TOKENS) if "text_encoder" in own else 0
        return Geometry(own, text_tokens=tokens)
    if lone := read("config.json"):
        return Geometry({"model": _part(lone)})
    for path in sorted(SHIPPED.glob("*.json")):
        shipped = json.loads(path.read_text(encoding="utf-8"))
        if checkpoint in shipped["repos"]:
            parts = {name: Part(**part) for name, part in shipped["parts"].items()}
            return Geometry(parts, shipped.get("pipeline"))
    remedy = f"`hf download {checkpoint} --include '*.json'` fetches them without weights"
    raise Unknown(f"{checkpoint}: its configs are not here; {remedy}")


def _read(read: Callable[[str], dict[str, Any] | None], named: Mapping[str, str | None]) -> dict[str, Part]:
    """The parts among `named` that have a config, which schedulers and tokenizers have under other names."""
    return {name: _part(config, kind) for name, kind in named.items() if (config := read(f"{name}/config.json"))}


def _part(config: dict[str, Any], kind: str | None = None) -> Part:
    kind = config.get("_class_name") or kind or (config.get("architectures") or ["a model without a name"])[0]
    return Part(kind, config, config.get("dtype") or config.get("torch_dtype"))


def cell(codec: nn.Module) -> int:
    """Pixels along a side of a latent cell."""
    match type(codec).__name__:
        case "Codec" | "Identity":
            return codec.cell
        case "AutoencoderKLQwenImage":
            return 2 ** len(codec.config.temperal_downsample)
    return compression(codec)


def latent(codec: nn.Module, rows: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """What `codec` decodes to pictures of `height` x `width` pixels: on the meta device (B, C, h, w)."""
    config, size = codec.config, cell(codec)
    match type(codec).__name__:
        case "Codec" | "Identity":
            channels = codec.channels
        case "AutoencoderKLQwenImage":
            return torch.empty(rows, config.z_dim, 1, height // size, width // size, dtype=dtype, device="meta")
        case _:
            channels = config.latent_channels
    return torch.empty(rows, channels, height // size, width // size, dtype=dtype, device="meta")


def asked(network: nn.Module, rows: int, size: tuple[int, int], tokens: int) -> dict[str, Any]:
    """What `network` is called with, on the meta device, for `rows` latents of `size` (h, w) under `tokens` of text.

    Raises:
        Unknown: a network of another kind than those whose inputs are written down here.
    """
    kind = type(network).__name__
    if kind not in _ASKED:
        raise Unknown(f"how a {kind} is called is not written down in models/geometry.py")
    with torch.device("meta"):
        return _ASKED[kind](network.config, _Shapes(rows, *size, tokens, next(network.parameters()).dtype))


@dataclass(frozen=True)
class _Shapes:
    rows: int
    height: int
    width: int
    tokens: int
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.empty(self.rows, *shape, dtype=self.dtype)

    @property
    def cells(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def patches(self) -> int:
        """Tokens of networks that take 2 x 2 cells as one."""
        return self.height * self.width // 4

    @property
    def times(self) -> Tensor:
        return torch.empty(self.rows)


def _ours(config: Any, of: _Shapes) -> dict[str, Any]:
    labels = torch.empty(of.rows, dtype=torch.long)
    told = labels if config.get("classes") else of(of.tokens, config.text_width)
    return {"latents": of(config.channels, *of.cells), "t": of.times, "text": told}


def _sd3(config: Any, of: _Shapes) -> dict[str, Any]:
    return {
        "hidden_states": of(config.in_channels, *of.cells),
        "encoder_hidden_states": of(of.tokens, config.joint_attention_dim),
        "pooled_projections": of(config.pooled_projection_dim),
        "timestep": of.times,
    }


def _flux(config: Any, of: _Shapes) -> dict[str, Any]:
    axes = len(config.axes_dims_rope)
    pooled = {"pooled_projections": of(config.pooled_projection_dim)} if "pooled_projection_dim" in config else {}
    return {
        "hidden_states": of(of.patches, config.in_channels),
        "encoder_hidden_states": of(of.tokens, config.joint_attention_dim),
        **pooled,
        "timestep": of.times,
        "img_ids": torch.empty(of.patches, axes),
        "txt_ids": torch.empty(of.tokens, axes),
        "guidance": of.times if config.guidance_embeds else None,
    }


def _qwen_image(config: Any, of: _Shapes) -> dict[str, Any]:
    return {
        "hidden_states": of(of.patches, config.in_channels),
        "encoder_hidden_states": of(of.tokens, config.joint_attention_dim),
        "timestep": of.times,
        "img_shapes": [[(1, of.height // 2, of.width // 2)]] * of.rows,
    }


def _z_image(config: Any, of: _Shapes) -> dict[str, Any]:
    return {
        "x": list(of(config.in_channels, 1, *of.cells).unbind()),
        "t": of.times,
        "cap_feats": list(of(of.tokens, config.cap_feat_dim).unbind()),
    }


def _sana(config: Any, of: _Shapes) -> dict[str, Any]:
    return {
        "hidden_states": of(config.in_channels, *of.cells),
        "encoder_hidden_states": of(of.tokens, config.caption_channels),
        "timestep": of.times,
        "guidance": of.times if config.guidance_embeds else None,
    }


def _pixart(config: Any, of: _Shapes) -> dict[str, Any]:
    return {
        "hidden_states": of(config.in_channels, *of.cells),
        "encoder_hidden_states": of(of.tokens, config.caption_channels),
        "timestep": of.times,
        "added_cond_kwargs": {"resolution": of(2), "aspect_ratio": of(1)},
    }


def _dit(config: Any, of: _Shapes) -> dict[str, Any]:
    labels = torch.empty(of.rows, dtype=torch.long)
    return {"hidden_states": of(config.in_channels, *of.cells), "timestep": of.times.long(), "class_labels": labels}


def _unet(config: Any, of: _Shapes) -> dict[str, Any]:
    found = {
        "sample": of(config.in_channels, *of.cells),
        "timestep": of.times,
        "encoder_hidden_states": of(of.tokens, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        found["added_cond_kwargs"] = {"text_embeds": of(width), "time_ids": of(6)}
    return found


_ASKED: dict[str, Callable[[Any, _Shapes], dict[str, Any]]] = {
    **dict.fromkeys(NETWORKS, _ours),
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
    "SanaTransformer2DModel": _sana,
    "PixArtTransformer2DModel": _pixart,
    "DiTTransformer2DModel": _dit,
    "UNet2DConditionModel": _unet,
}
