"""What flow families have in common: even noise levels, and texts of different lengths.

Shapes: B batch, L text tokens, W_text their width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.generator import Conditioning

_MASK = "mask"


def even(steps: int, mu: float) -> dict[str, Any]:
    """What pipelines tell a `FlowMatchEulerDiscreteScheduler`: noise levels i / `steps`, which it shifts by `mu`."""
    return {"sigmas": np.linspace(1, 1 / steps, steps), "mu": mu}


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
