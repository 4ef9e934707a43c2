"""Where tokens stand: ids -> encoding. Axial 2D rotary embedding (RoFormer, 2104.09864; axial as in FLUX)."""

import torch
from torch import Tensor


def grid_ids(height: int, width: int) -> Tensor:
    """(row, column) of every cell of a grid, row by row: (height * width, 2)."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns], -1).reshape(-1, 2).float()


def axial_rope(ids: Tensor, head_dim: int, theta: float = 100.0) -> Tensor:
    """Rotation angles (N, head_dim / 2) of ids (N, axes); each axis turns an equal share of the pairs.

    `theta` is the longest wavelength over 2 pi: 100 suits grids of tens of cells, 10,000 those of thousands.
    """
    axes = ids.shape[1]
    if head_dim % (2 * axes):
        raise ValueError(f"head_dim: {head_dim} is no multiple of {2 * axes}, two for each of {axes} axes")
    pairs = head_dim // (2 * axes)
    frequencies = theta ** (-torch.arange(pairs) / pairs)
    return (ids[:, :, None] * frequencies).flatten(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of x (..., N, D) by angles whose `cos` and `sin` are (N, D / 2)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
