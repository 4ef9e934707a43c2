"""What the native networks are built of: attention and MLP under adaptive normalisation, and the way in and out.

Attention is softmax by torch's SDPA, or linear as in SANA (2410.10629, with ReLU as the feature map) with RoPE as
RoFormer puts it there (2104.09864, equation 19: in the numerator alone); neither makes N x N scores. Queries and keys
may be normalised, each head by its root mean square (SD3, 2403.03206, section 5.3.2), and several heads of queries may
share one of keys and values (GQA, 2305.13245; with one head of keys MQA, 1911.02150). Normalisation of tokens is
adaptive (DiT, 2212.09748, section 3.2) or plain.

Shapes: B batch, N image tokens, L text tokens, M tokens that are listened to, W width, H heads, G heads of keys, D head
dimension.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from models.positions import Encoding, Place, Positions, positions_of

AttentionKind = Literal["softmax", "linear"]
MLPKind = Literal["relu2", "gelu", "swiglu"]
"""The squared ReLU of Primer (2109.08668), which costs a CPU far less than GELU; GELU by tanh, as in DiT and SD3; and
SwiGLU (2002.05202), of two thirds of the hidden width so that it has as many weights."""

_LEAST = 1e-6


@dataclass(frozen=True)
class Shape:
    """Of a block's attention and MLP.

    Raises:
        ValueError: beginning with the field's name.
    """

    width: int
    heads: int
    kv_heads: int | None = None
    mlp_ratio: float = 4.0
    mlp: MLPKind = "relu2"
    attention: AttentionKind = "softmax"
    qk_norm: bool = True

    def __post_init__(self) -> None:
        for field in ("width", "heads", "kv_heads"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}: {value} is below 1")
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is no multiple of the {self.heads} heads")
        if self.heads % self.key_heads:
            raise ValueError(f"kv_heads: {self.heads} heads cannot share {self.kv_heads} of keys evenly")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio: {self.mlp_ratio} is not above 0")
        for field, known in (("mlp", get_args(MLPKind)), ("attention", get_args(AttentionKind))):
            if (value := getattr(self, field)) not in known:
                raise ValueError(f"{field}: unknown {value}; known here: {', '.join(known)}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden(self) -> int:
        """Of the MLP."""
        return int(self.mlp_ratio * self.width * (2 / 3 if self.mlp == "swiglu" else 1))

    def mlp_in(self) -> nn.Linear:
        """The MLP's first layer; what follows it is `activated`."""
        return nn.Linear(self.width, self.hidden * (2 if self.mlp == "swiglu" else 1))

    def activated(self, x: Tensor) -> Tensor:
        return _ACTIVATIONS[self.mlp](x)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    return x if shift is None or scale is None else x * (1 + scale) + shift


def gated(x: Tensor, change: Tensor, gate: Tensor | None) -> Tensor:
    return x + (change if gate is None else gate * change)


def attend(
    kind: AttentionKind,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    turn: Callable[[Tensor], Tensor],
    turn_keys: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What queries (B, H, N, D) hear of keys and values (B, G, M, D), turned by their positions: (B, N, H D).

    Heads that share one of keys are asked as one longer sequence of queries, so that no key is copied.
    """
    turn_keys = turn_keys or turn
    shared = k.shape[1] < q.shape[1]

    def together(queries: Tensor) -> Tensor:
        return queries.unflatten(1, (k.shape[1], -1)).flatten(2, 3) if shared else queries  # (B, G, N H / G, D)

    if kind == "softmax":
        heard = F.scaled_dot_product_attention(together(turn(q)), turn_keys(k), v)
    else:
        q, k = F.relu(q), F.relu(k)
        heard = _linear(together(turn(q)), together(q), turn_keys(k), k, v)
    if shared:
        heard = heard.unflatten(2, (-1, q.shape[2])).flatten(1, 2)  # (B, H, N, D)
    return heard.transpose(1, 2).flatten(2)


def _linear(turned_q: Tensor, q: Tensor, turned_k: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sum_m (turned q . turned k_m) v_m / sum_m (q . k_m), summed over m first, in float32 as SANA does."""
    with _no_autocast(q.device.type):
        context = turned_k.float().mT @ v.float()  # (B, G, D, D)
        total = k.float().sum(2, keepdim=True).mT  # (B, G, D, 1)
        heard = turned_q.float() @ context / (q.float() @ total + _LEAST)
    return heard.to(v.dtype)


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Products in the precision of their factors; the meta device knows no other."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class Stream(nn.Module):
    """The weights that one kind of tokens has of its own in a block.

    Args:
        changes: to how much the condition is taken in `modulation`: 6 shifts, scales and gates of attention and MLP
            (adaLN-Zero), 4 without gates (adaLN), or 0, where the normalisations have weights of their own instead.
        heard: whether the tokens are only heard, and what comes of that is not this stream's; there is no MLP then, and
            of the changes a shift and a scale, or with a gate 3.
    """

    def __init__(self, shape: Shape, changes: int = 6, heard: bool = False):
        super().__init__()
        self.shape, self.changes = shape, changes
        width, plain = shape.width, changes == 0
        if not plain:
            self.modulation = nn.Linear(width, self.changes * width)
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=plain, eps=1e-6)
        self.qkv = nn.Linear(width, (shape.heads + 2 * shape.key_heads) * shape.head_dim)
        self.norm_q, self.norm_k = _norm(shape), _norm(shape)
        if heard:
            return
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=plain, eps=1e-6)
        self.mlp_in = shape.mlp_in()
        self.mlp_out = nn.Linear(shape.hidden, width)

    def modulated(self, c: Tensor) -> tuple[Tensor | None, ...]:
        """Shift, scale and gate of the attention, and of the MLP, by the condition `c` (B, W): (B, 1, W) each."""
        if not self.changes:
            return (None,) * 6
        found = self.modulation(c)[:, None].chunk(self.changes, -1)
        if self.changes == 4:
            return (*found[:2], None, *found[2:], None)
        return found

    def attention_in(self, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, N, D), keys and values (B, G, N, D)."""
        return self.heads(modulate(self.norm_attention(x), shift, scale))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of tokens that are normalised already."""
        keys = self.shape.key_heads * self.shape.head_dim
        parts = self.qkv(x).split([self.shape.width, keys, keys], -1)  # before the transposition, for the backward pass
        q, k, v = (part.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2) for part in parts)
        return self.norm_q(q), self.norm_k(k), v

    def attention_out(self, x: Tensor, heard: Tensor, gate: Tensor | None) -> Tensor:
        # Of a part of a joint sequence the product would be made first, and the bias added in a pass of its own.
        return gated(x, self.out(heard.contiguous()), gate)

    def mlp(self, x: Tensor, shift: Tensor | None, scale: Tensor | None, gate: Tensor | None) -> Tensor:
        hidden = self.mlp_in(modulate(self.norm_mlp(x), shift, scale))
        return gated(x, self.mlp_out(self.shape.activated(hidden)), gate)

    def attention(self, x: Tensor, mods: tuple[Tensor | None, ...], encoding: Encoding) -> Tensor:
        """Among the tokens of this stream alone."""
        heard = attend(self.shape.attention, *self.attention_in(x, *mods[:2]), encoding.turn)
        return self.attention_out(x, heard, mods[2])


class CrossAttention(nn.Module):
    """Tokens listen to those of the condition, (B, M, W)."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.query = nn.Linear(shape.width, shape.width)
        self.key_value = nn.Linear(shape.width, 2 * shape.key_heads * shape.head_dim)
        self.norm_q, self.norm_k = _norm(shape), _norm(shape)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        parts = self.query(self.norm(x)), *self.key_value(y).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2) for part in parts)
        heard = attend(self.shape.attention, self.norm_q(q), self.norm_k(k), v, lambda tokens: tokens)
        return x + self.out(heard)


def _norm(shape: Shape) -> nn.Module:
    return nn.RMSNorm(shape.head_dim, eps=1e-6) if shape.qk_norm else nn.Identity()


def _swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, -1)
    return F.silu(gate) * value


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda x: F.relu(x).square(),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "swiglu": _swiglu,
}


def time_features(t: Tensor, width: int, endpoint: bool) -> Tensor:
    """Sinusoids (B, width) of 1000 t; whether the slowest has exactly 10,000 for its wavelength over 2 pi."""
    return get_timestep_embedding(1000 * t, width, downscale_freq_shift=1 if endpoint else 0)


def patched(latents: Tensor, patch: int) -> Tensor:
    """Latents (B, C, h p, w p) as tokens (B, h w, C p p), row by row. Raises ValueError where `patch` does not fit."""
    for side in latents.shape[2:]:
        if side % patch:
            raise ValueError(f"latents: a side of {side} is no multiple of the patch, {patch}")
    x = latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (B, C, h, p, w, p)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatched(x: Tensor, patch: int, rows: int) -> Tensor:
    """The inverse of `patched`, for a grid of so many rows."""
    x = x.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, -1))  # (B, h, w, C, p, p)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Backbone(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """What the native networks have in common: latents in, blocks, a velocity out.

    A subclass makes `position_encoding`, `patch_in`, `time_in`, `blocks`, `norm_out`, `modulation_out` and `patch_out`;
    its `config` has `channels`, `size`, `patch`, `width` and `text_width`.
    """

    _supports_gradient_checkpointing = True
    lora_layers: tuple[str, ...] = ()
    reads_language_model = False
    """Whether the text is the keys and values of a language model, see `models.text`."""

    position_encoding: Positions
    blocks: nn.ModuleList

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Endings of the names of the layers that an adapter is put on."""
        names = {name.rpartition(".")[2] for name, _ in self.named_modules()}
        return tuple(layer for layer in self.lora_layers if layer in names)

    @property
    def stem(self) -> tuple[nn.Module, ...]:
        """What comes before the blocks."""
        after = (self.blocks, *(part for name, part in self.named_children() if name.endswith("_out")))
        return tuple(part for part in self.children() if part not in after)

    def hidden(self, latents: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens (B, N, W) after the last block, and what of time and text (B, W) modulates them."""
        raise NotImplementedError

    def head(self, x: Tensor, c: Tensor) -> Tensor:
        """From image tokens to patches (B, N, C p p)."""
        shift, scale = self.modulation_out(c)[:, None].chunk(2, -1)
        return self.patch_out(self.norm_out(x) * (1 + scale) + shift)

    def forward(self, latents: Tensor, t: Tensor, text: Tensor, features: bool = False) -> Tensor:
        """The prediction (B, C, H, W), or its `features` (B, 2, W) instead: the mean of the normalised image tokens
        after the last block, and what of time and text modulates them."""
        x, c = self.hidden(latents, t, text)
        if features:
            return torch.stack([self.norm_out(x).mean(1), c], 1)
        patch = self.config.patch
        return unpatched(self.head(x, c), patch, latents.shape[2] // patch)

    def encoding(self, latents: Tensor, text: int) -> Encoding:
        """Of `text` tokens and the patches of `latents`."""
        grid = [side // self.config.patch for side in latents.shape[2:]]
        return self.position_encoding(self.position_encoding.ids(grid, text, latents.device)).to(latents.dtype)

    def run(self, block: nn.Module, *asked: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *asked)
        return block(*asked)


def cells_of(size: int, patch: int) -> int:
    """On a side. Raises ValueError where `patch` does not fit."""
    if patch < 1 or size < 1 or size % patch:
        raise ValueError(f"size: latents of {size} x {size} cannot be cut into patches of {patch}")
    return size // patch


def placed(kind: str, shape: Shape, cells: int, layers: int, theta: float, scaling: str) -> Positions:
    """Positions of a square grid for networks of this shape; raises ValueError, see `positions_of`."""
    place = Place((cells, cells), shape.width, shape.key_heads, shape.head_dim, layers, theta, scaling)
    return positions_of(kind, place)


def zeroed(*layers: nn.Linear) -> None:
    """Start these layers from 0, as adaLN-Zero asks for."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
