"""DiT: a transformer on latent patches under a class label or a text (Peebles & Xie, 2212.09748).

Four ways to condition it (section 3.2):

- `adaln`: shifts and scales of every normalisation are made from the time plus the label;
- `adaln-zero`: gates on attention and MLP as well, all of them zero at first;
- `cross-attention`: time and label are tokens that every block listens to, between attention and MLP;
- `in-context`: they are further tokens of the sequence.

A text takes the label's place: its tokens with the latter two, their mean with the former two. The network of the paper
predicts a variance beside the noise, which is left out. Sizes go by name, DiT-S/8 to DiT-XL/2 (table 1).

Shapes: B batch, N image tokens, L text tokens, W width, M tokens of the condition.
"""

import re
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from models.layers import Backbone, CrossAttention, Shape, Stream, cells_of, patched, placed, time_features, zeroed
from models.positions import Encoding

ConditioningKind = Literal["adaln-zero", "adaln", "cross-attention", "in-context"]

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
"""Depth, width and heads by the size's letter."""
PATCHES = (2, 4, 8)


def size_of(name: str) -> dict[str, int]:
    """Depth, width, heads and patch of a size such as DiT-XL/2. Raises ValueError naming the sizes there are."""
    found = re.fullmatch(r"DiT-([A-Z]+)/(\d+)", name)
    if not found or found[1] not in SIZES or int(found[2]) not in PATCHES:
        raise ValueError(
            f"name: unknown size {name}; known here: DiT-{{{','.join(SIZES)}}}/{{{','.join(map(str, PATCHES))}}}"
        )
    return dict(zip(("depth", "width", "heads"), SIZES[found[1]], strict=True)) | {"patch": int(found[2])}


class DiTBlock(nn.Module):
    """Attention and MLP, and between them cross-attention where the conditioning is by it."""

    def __init__(self, shape: Shape, conditioning: ConditioningKind):
        super().__init__()
        self.image = Stream(shape, {"adaln-zero": 6, "adaln": 4}.get(conditioning, 0))
        self.cross = CrossAttention(shape) if conditioning == "cross-attention" else None

    def forward(self, x: Tensor, y: Tensor | None, c: Tensor, encoding: Encoding) -> Tensor:
        """Tokens `x` (B, N, W) under `c` (B, W), listening to `y` (B, M, W)."""
        mods = self.image.modulated(c)
        x = self.image.attention(x, mods, encoding)
        if self.cross is not None:
            x = self.cross(x, y)
        return self.image.mlp(x, *mods[3:])


class DiT(Backbone):
    """Predicts the velocity of latents (B, C, S, S) at times (B,) in [0, 1].

    The condition is text tokens (B, L, W_text); or with `classes` it is labels (B,), and number `classes` means none.

    Args:
        size: of the latents that are trained on; others may be asked for.
        classes: how many labels; 0 where it is a text, of `text_width`.
        kv_heads, positions, theta, scaling, time_width, time_endpoint: as of `models.mmdit.MMDiT`.

    Raises:
        ValueError: beginning with the field's name.
    """

    lora_layers = (
        "modulation", "qkv", "query", "key_value", "out", "mlp_in", "mlp_out", "text_in", "pooled_in",
    )  # fmt: skip

    @register_to_config
    def __init__(
        self,
        channels: int = 4,
        size: int = 32,
        patch: int = 2,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        conditioning: str = "adaln-zero",
        classes: int = 0,
        text_width: int = 0,
        mlp_ratio: float = 4.0,
        kv_heads: int | None = None,
        attention: str = "softmax",
        mlp: str = "gelu",
        qk_norm: bool = False,
        positions: str = "sincos",
        theta: float = 100.0,
        scaling: str = "interpolate",
        time_width: int | None = 256,
        time_endpoint: bool = False,
    ):
        shape = Shape(width, heads, kv_heads, mlp_ratio, mlp, attention, qk_norm)
        if depth < 1:
            raise ValueError(f"depth: {depth} is below 1")
        if conditioning not in get_args(ConditioningKind):
            known = ", ".join(get_args(ConditioningKind))
            raise ValueError(f"conditioning: unknown {conditioning}; known here: {known}")
        if (classes > 0) == (text_width > 0):
            raise ValueError(f"classes: {classes}, and text_width: {text_width}; just one of them must be above 0")
        super().__init__()
        self.position_encoding = placed(positions, shape, cells_of(size, patch), depth, theta, scaling)
        self.patch_in = nn.Linear(channels * patch * patch, width)
        self.time_in = TimestepEmbedding(time_width or width, width)
        adaptive = conditioning.startswith("adaln")
        if classes:
            self.label_in = nn.Embedding(classes + 1, width)
        elif adaptive:
            self.pooled_in = nn.Linear(text_width, width)
        else:
            self.text_in = nn.Linear(text_width, width)
        self.blocks = nn.ModuleList(DiTBlock(shape, conditioning) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=not adaptive, eps=1e-6)
        if adaptive:
            self.modulation_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, channels * patch * patch)
        self.gradient_checkpointing = False
        self._initialise()

    def _initialise(self) -> None:
        """As the paper's: Xavier's, smaller where time and label come in, and zeros where adaLN-Zero asks for them."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
        for layer in (self.time_in.linear_1, self.time_in.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        adaptive = self.config.conditioning.startswith("adaln")
        modulations = [self.modulation_out, *(block.image.modulation for block in self.blocks)] if adaptive else []
        zeroed(self.patch_out, *modulations)

    def hidden(self, latents: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """See `Backbone`; what is given for `text` may be labels (B,)."""
        features = time_features(t, self.config.time_width or self.config.width, self.config.time_endpoint)
        time = self.time_in(features.to(latents.dtype))  # (B, W)
        told = self._told(text)  # (B, M - 1, W)
        c = F.silu(time + told.mean(1))
        y = torch.cat([time[:, None], told], 1)  # (B, M, W)
        inside = y.shape[1] if self.config.conditioning == "in-context" else 0
        encoding = self.encoding(latents, inside)
        x = encoding.add(self.patch_in(patched(latents, self.config.patch)))  # (B, N, W)
        if inside:
            x = torch.cat([y, x], 1)
        for index, block in enumerate(self.blocks):
            x = self.run(block, x, y, c, encoding.layer(index))
        return x[:, inside:], c

    def head(self, x: Tensor, c: Tensor) -> Tensor:
        adaptive = self.config.conditioning.startswith("adaln")
        return super().head(x, c) if adaptive else self.patch_out(self.norm_out(x))

    def _told(self, text: Tensor) -> Tensor:
        """The label, the text's mean, or its tokens, as tokens."""
        if self.config.classes:
            return self.label_in(text)[:, None]
        if self.config.conditioning.startswith("adaln"):
            return self.pooled_in(text.mean(1))[:, None]
        return self.text_in(text)
