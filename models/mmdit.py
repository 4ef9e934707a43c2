"""MM-DiT: text and image tokens in joint attention (SD3, 2403.03206, section 4), in two streams, in one, or in both.

In a block of two streams text and image have weights of their own (SD3, Qwen-Image), in one of a single stream they
share them (Z-Image, 2511.22699), and a network may have first the one and then the other kind (FLUX). In a block of a
single stream the MLP comes after the attention, or beside it (FLUX; ViT-22B, 2302.05442, section 2). With deep fusion
(2505.10046) there are image tokens alone; in each block they also attend to the keys and values of a frozen language
model's layer of the same number. The paper finds that such a network can do without being told the time; ours is told.

adaLN-Zero (DiT, 2212.09748, section 3.2) on the time plus the pooled text, RMS-normalised queries and keys, an axial 2D
RoPE, a squared ReLU: these are the defaults, see `models.layers` and `models.positions` for others. Padded text tokens
are attended to, as in SD3. What is left out: the second and third text encoders, and dual attention (SD3.5-M).

Shapes: B batch, N image tokens, L text tokens, W width, H heads, G heads of keys, D head dimension.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from models.layers import (
    Backbone,
    Shape,
    Stream,
    attend,
    cells_of,
    gated,
    modulate,
    patched,
    placed,
    time_features,
    zeroed,
)
from models.positions import Encoding


class Block(nn.Module):
    """One joint attention and one MLP for each of the two streams; the `last` block leaves the text as it is."""

    def __init__(self, shape: Shape, last: bool):
        super().__init__()
        self.last = last
        self.image = Stream(shape)
        self.text = Stream(shape, changes=2 if last else 6, heard=last)

    def forward(self, x: Tensor, y: Tensor, c: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
        """Image tokens `x` (B, N, W) and text tokens `y` (B, L, W) under `c` (B, W)."""
        mx, my = self.image.modulated(c), self.text.modulated(c)
        streams = zip(self.text.attention_in(y, *my[:2]), self.image.attention_in(x, *mx[:2]), strict=True)
        q, k, v = (torch.cat(both, 2) for both in streams)  # (B, H or G, L + N, D)
        heard = attend(self.image.shape.attention, q, k, v, encoding.turn)  # (B, L + N, W)
        heard_y, heard_x = heard.split([y.shape[1], x.shape[1]], 1)
        x = self.image.mlp(self.image.attention_out(x, heard_x, mx[2]), *mx[3:])
        if not self.last:
            y = self.text.mlp(self.text.attention_out(y, heard_y, my[2]), *my[3:])
        return x, y


class SingleBlock(nn.Module):
    """Attention and MLP with the same weights for text and image."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.both = Stream(shape)

    def forward(self, z: Tensor, c: Tensor, encoding: Encoding) -> Tensor:
        """Text and then image tokens `z` (B, L + N, W) under `c` (B, W)."""
        mods = self.both.modulated(c)
        return self.both.mlp(self.both.attention(z, mods, encoding), *mods[3:])


class ParallelBlock(nn.Module):
    """A block of one stream whose attention and MLP read the same normalised tokens, and share the layer out (FLUX)."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.both = Stream(shape, changes=3, heard=True)
        self.mlp_in = shape.mlp_in()
        self.out = nn.Linear(shape.width + shape.hidden, shape.width)

    def forward(self, z: Tensor, c: Tensor, encoding: Encoding) -> Tensor:
        """As `SingleBlock`."""
        shape, (shift, scale, gate) = self.both.shape, self.both.modulated(c)
        normal = modulate(self.both.norm_attention(z), shift, scale)
        heard = attend(shape.attention, *self.both.heads(normal), encoding.turn)
        return gated(z, self.out(torch.cat([heard, shape.activated(self.mlp_in(normal))], -1)), gate)


class FusedBlock(nn.Module):
    """Image tokens attend to themselves and to a language model's layer."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.image = Stream(shape)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, c: Tensor, encoding: Encoding) -> Tensor:
        """Image tokens `x` (B, N, W), `keys` and `values` (B, G, L, D) of the text, which know their own positions."""
        mods, length = self.image.modulated(c), keys.shape[2]
        q, k, v = self.image.attention_in(x, *mods[:2])

        def turn_keys(k: Tensor) -> Tensor:
            return torch.cat([k[:, :, :length], encoding.turn(k[:, :, length:])], 2)

        k, v = torch.cat([keys.to(k.dtype), k], 2), torch.cat([values.to(v.dtype), v], 2)
        heard = attend(self.image.shape.attention, q, k, v, encoding.turn, turn_keys)
        return self.image.mlp(self.image.attention_out(x, heard, mods[2]), *mods[3:])


class MMDiT(Backbone):
    """Predicts the velocity of latents (B, C, S, S) at times (B,) in [0, 1] under text tokens (B, L, W_text).

    Args:
        size: of the latents that are trained on; others may be asked for.
        depth: blocks, of which the last `single` have one stream; with `parallel`, as FLUX's have.
        fused: deep fusion; the text is then the keys and values of a language model of `depth` layers, with as many
            heads of keys of the same dimension, as `models.text.memory` puts them into a row.
        kv_heads: of keys and values; as many as of queries where it is None.
        positions: a kind of `models.positions`, with its `theta` and `scaling`.
        time_width: of the sinusoids of the time, as wide as the tokens where it is None; `time_endpoint` sets their
            frequencies, see `models.layers.time_features`.

    Raises:
        ValueError: beginning with the field's name.
    """

    lora_layers = ("modulation", "qkv", "out", "mlp_in", "mlp_out", "text_in", "pooled_in")

    @register_to_config
    def __init__(
        self,
        channels: int = 8,
        size: int = 8,
        patch: int = 2,
        width: int = 96,
        depth: int = 4,
        heads: int = 3,
        text_width: int = 96,
        mlp_ratio: float = 4.0,
        single: int = 0,
        parallel: bool = False,
        fused: bool = False,
        kv_heads: int | None = None,
        attention: str = "softmax",
        mlp: str = "relu2",
        qk_norm: bool = True,
        positions: str = "axial",
        theta: float = 100.0,
        scaling: str = "interpolate",
        time_width: int | None = None,
        time_endpoint: bool = True,
    ):
        shape = Shape(width, heads, kv_heads, mlp_ratio, mlp, attention, qk_norm)
        if depth < 1:
            raise ValueError(f"depth: {depth} is below 1")
        if not 0 <= single <= depth:
            raise ValueError(f"single: {single} of {depth} blocks")
        if parallel and not single:
            raise ValueError("parallel: it is of blocks of a single stream, and there is none; set single above 0")
        if fused and single:
            raise ValueError("single: with deep fusion there is no text stream to share weights with; set it to 0")
        if fused and text_width != (row := 2 * depth * shape.key_heads * shape.head_dim):
            raise ValueError(
                f"text_width: {text_width}, but {depth} layers of {shape.key_heads} keys and values of "
                f"{shape.head_dim} make {row}"
            )
        super().__init__()
        self.position_encoding = placed(positions, shape, cells_of(size, patch), depth, theta, scaling)
        self.patch_in = nn.Linear(channels * patch * patch, width)
        if not fused:
            self.text_in = nn.Linear(text_width, width)
            self.pooled_in = nn.Linear(text_width, width)
        self.time_in = TimestepEmbedding(time_width or width, width)
        double = depth - single
        if fused:
            blocks = [FusedBlock(shape) for _ in range(depth)]
        else:
            one = ParallelBlock if parallel else SingleBlock
            blocks = [Block(shape, i == depth - 1) for i in range(double)] + [one(shape) for _ in range(single)]
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, channels * patch * patch)
        self.gradient_checkpointing = False
        streams = [part for part in self.blocks.modules() if isinstance(part, Stream)]
        zeroed(self.modulation_out, self.patch_out, *(stream.modulation for stream in streams))

    @property
    def reads_language_model(self) -> bool:
        return self.config.fused

    def hidden(self, latents: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        features = time_features(t, self.config.time_width or self.config.width, self.config.time_endpoint)
        time = self.time_in(features.to(latents.dtype))
        x = self.patch_in(patched(latents, self.config.patch))  # (B, N, W)
        if self.config.fused:
            return self._fused(latents, x, F.silu(time), text)
        length = text.shape[1]
        encoding = self.encoding(latents, length)
        c = F.silu(time + self.pooled_in(text.mean(1)))  # (B, W)
        x, y = encoding.add(x), self.text_in(text)  # (B, N, W), (B, L, W)
        double = self.config.depth - self.config.single
        for index, block in enumerate(self.blocks[:double]):
            x, y = self.run(block, x, y, c, encoding.layer(index))
        if self.config.single:
            z = torch.cat([y, x], 1)
            for index, block in enumerate(self.blocks[double:], double):
                z = self.run(block, z, c, encoding.layer(index))
            x = z[:, length:]
        return x, c

    def _fused(self, latents: Tensor, x: Tensor, c: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        encoding = self.encoding(latents, 0)
        x = encoding.add(x)
        heads = self.config.kv_heads or self.config.heads
        layers = text.unflatten(2, (self.config.depth, 2, heads, -1)).permute(2, 3, 0, 4, 1, 5)  # (Y, 2, B, G, L, D)
        for index, (block, (keys, values)) in enumerate(zip(self.blocks, layers, strict=True)):
            x = self.run(block, x, keys, values, c, encoding.layer(index))
        return x, c
