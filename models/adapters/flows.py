"""What flow families have in common: layers, tokens, even noise levels, normalised latents, texts of any length.

Shapes: B batch, L text tokens, W_text their width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.generator import Conditioning

PATCH = 2
"""Latent cells along a side of a token, where the network is handed tokens."""

JOINT_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""All projections of the image and of the text in an attention of both."""

_MASK = "mask"


def even(steps: int, mu: float) -> dict[str, Any]:
    """What pipelines tell a `FlowMatchEulerDiscreteScheduler`: noise levels i / `steps`, which it shifts by `mu`."""
    return {"sigmas": np.linspace(1, 1 / steps, steps), "mu": mu}


def normalised(z: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """Latents (B, C, H, W) of a codec, by the mean and standard deviation (C,) of its channels."""
    return (z - _each(mean, z)) / _each(std, z)


def restored(latents: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """The inverse of `normalised`."""
    return latents * _each(std, latents) + _each(mean, latents)


def _each(values: Sequence[float] | Tensor, z: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=z.dtype, device=z.device)[:, None, None]


def padded(rows: Sequence[Tensor], length: int) -> Conditioning:
    """Texts (L_i, W_text), filled up to (B, `length`, W_text), with a mask (B, `length`) of what is text."""
    tokens = torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    return Conditioning(tokens, {_MASK: torch.arange(length, device=tokens.device) < lengths[:, None]})


def trimmed(cond: Conditioning) -> tuple[Tensor, Tensor | None]:
    """What `padded` made, cut to the longest text: tokens (B, L, W_text) and mask, or None where all is text."""
    lengths = _lengths(cond)
    longest = max(lengths)
    return cond.tokens[:, :longest], None if min(lengths) == longest else cond.more[_MASK][:, :longest]


def ragged(cond: Conditioning) -> list[Tensor]:
    """The inverse of `padded`."""
    return [row[:length] for row, length in zip(cond.tokens, _lengths(cond), strict=True)]


def _lengths(cond: Conditioning) -> list[int]:
    return cond.more[_MASK].sum(1).tolist()
