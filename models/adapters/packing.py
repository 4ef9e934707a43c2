"""Latents as the tokens of networks that take patches of 2 x 2 cells, and back.

Shapes: B batch, C channels, H W cells, N = H W / 4 tokens, each with the channels of its 4 cells.
"""

from torch import Tensor

PATCH = 2


def packed(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, 4 C), channels first within a token."""
    cells = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # (B, C, h, 2, w, 2)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpacked(tokens: Tensor, height: int) -> Tensor:
    """The inverse of `packed`, for latents of `height` cells."""
    cells = tokens.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (height // PATCH, -1))  # (B, h, w, C, 2, 2)
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
