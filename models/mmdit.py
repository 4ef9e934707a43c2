"""MM-DiT: text and image tokens, each with weights of its own, in joint attention (SD3, 2403.03206, section 4).

adaLN-Zero (DiT, 2212.09748, section 3.2) on the time plus the pooled text, RMS-normalised queries and keys, an
axial 2D RoPE on the image tokens, a squared ReLU (Primer, 2109.08668), which costs a CPU far less than GELU.
Padded text tokens are attended to, as in SD3. What is left out: the second and third text encoders, and dual
attention (SD3.5-M).

Shapes: B batch, N image tokens, L text tokens, W width, H heads, D head dimension.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import Tensor, nn

from models.positions import axial_rope, grid_ids, rotate


class Stream(nn.Module):
    """The weights that one modality has of its own in a block; one that is only `heard` is not changed by it."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, heard: bool = False):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, (2 if heard else 6) * width)
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        if heard:
            return
        hidden = int(mlp_ratio * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def attention_in(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.norm_attention(x) * (1 + scale) + shift  # (B, N, W)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D) each
        return self.norm_q(q), self.norm_k(k), v

    def attention_out(self, x: Tensor, heard: Tensor, gate: Tensor) -> Tensor:
        return x + gate * self.out(heard)

    def mlp(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        hidden = self.mlp_in(self.norm_mlp(x) * (1 + scale) + shift)
        return x + gate * self.mlp_out(F.relu(hidden).square())


class Block(nn.Module):
    """One joint attention and one MLP for each of the two streams; the `last` block leaves the text as it is."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, last: bool):
        super().__init__()
        self.last = last
        self.image = Stream(width, heads, mlp_ratio)
        self.text = Stream(width, heads, mlp_ratio, heard=last)

    def forward(self, x: Tensor, y: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens `x` (B, N, W) and text tokens `y` (B, L, W) under `c` (B, W)."""
        mx = self.image.modulation(c)[:, None].chunk(6, -1)  # 6 x (B, 1, W)
        my = self.text.modulation(c)[:, None].chunk(2 if self.last else 6, -1)
        qx, kx, vx = self.image.attention_in(x, mx[0], mx[1])  # (B, H, N, D)
        qy, ky, vy = self.text.attention_in(y, my[0], my[1])  # (B, H, L, D)
        q = torch.cat([qy, rotate(qx, cos, sin)], 2)  # (B, H, L + N, D)
        k = torch.cat([ky, rotate(kx, cos, sin)], 2)
        v = torch.cat([vy, vx], 2)
        heard = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L + N, W)
        heard_y, heard_x = heard.split([y.shape[1], x.shape[1]], 1)
        x = self.image.mlp(self.image.attention_out(x, heard_x, mx[2]), *mx[3:])
        if not self.last:
            y = self.text.mlp(self.text.attention_out(y, heard_y, my[2]), *my[3:])
        return x, y


class MMDiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts the velocity of latents (B, C, S, S) at times (B,) in [0, 1] under text tokens (B, L, W_text)."""

    _supports_gradient_checkpointing = True

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
    ):
        super().__init__()
        cells = size // patch
        self.patch_in = nn.Linear(channels * patch * patch, width)
        self.text_in = nn.Linear(text_width, width)
        self.pooled_in = nn.Linear(text_width, width)
        self.time_in = TimestepEmbedding(width, width)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, i == depth - 1) for i in range(depth))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patch_out = nn.Linear(width, channels * patch * patch)
        angles = axial_rope(grid_ids(cells, cells), width // heads)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.gradient_checkpointing = False
        self._zero_init()

    def _zero_init(self) -> None:
        last = [self.modulation_out, self.patch_out]
        for layer in last + [s.modulation for b in self.blocks for s in (b.image, b.text)]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def hidden(self, latents: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens (B, N, W) after the last block, and the time and text (B, W) that modulated it."""
        p, cells = self.config.patch, self.config.size // self.config.patch
        x = latents.unflatten(3, (cells, p)).unflatten(2, (cells, p))  # (B, C, h, p, w, p)
        x = self.patch_in(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))  # (B, N, W)
        time = self.time_in(get_timestep_embedding(1000 * t, self.config.width).to(x.dtype))
        c = F.silu(time + self.pooled_in(text.mean(1)))  # (B, W)
        y = self.text_in(text)  # (B, L, W)
        for block in self.blocks:
            asked = (x, y, c, self.cos, self.sin)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, y = self._gradient_checkpointing_func(block, *asked)
            else:
                x, y = block(*asked)
        return x, c

    def forward(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        p, cells = self.config.patch, self.config.size // self.config.patch
        x, c = self.hidden(latents, t, text)
        shift, scale = self.modulation_out(c)[:, None].chunk(2, -1)
        x = self.patch_out(self.norm_out(x) * (1 + scale) + shift)  # (B, N, C p p)
        x = x.unflatten(2, (-1, p, p)).unflatten(1, (cells, cells))  # (B, h, w, C, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # (B, C, S, S)
