"""Where tokens stand: ids -> encoding, in one interface for every native network.

A kind of positions gives every token an id, a point of as many axes as the grid has, and makes of the ids an
`Encoding`: something to add to the tokens, or a turn of queries and keys. A turn by `turn(q) . turn(k)` depends on the
offset of two ids alone. The kinds:

- `none`; `sincos` (1706.03762; in two axes as in MAE, 2111.06377) and `learned` (ViT, 2010.11929) are added;
- `axial`: RoPE (RoFormer, 2104.09864), each axis turns pairs of its own (as in FLUX);
- `mixed`: each pair is turned by all axes, with learned frequencies (RoPE for ViT, 2403.13298);
- `string`: mixed in a learned basis, the general turn that is separable and translation-invariant (Cayley-STRING,
  2502.02562); the circulant variant is left out;
- `quaternion`: four channels are a quaternion, multiplied from both sides by learned unit quaternions to the power of
  the id (quaternion rotary attention, 2403.11626; for images). Periods and phases that depend on the tokens, which
  break the invariance, are left out;
- `msrope`: axial, and the text stands on the diagonal beyond the image's corner (Qwen-Image, 2508.02324; its grids of
  one even and one odd side stand half a cell away from where theirs do).

What is learned is learned for every layer and every head of keys. On another grid than the trained one, ids are scaled
to it about its centre. Grids may have three axes, as those of videos, though the networks here have pictures' two.
Shapes: N tokens, A axes, W width, H heads, D head dimension, P = D / 2 pairs, Y layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["none", "sincos", "learned", "axial", "mixed", "string", "quaternion", "msrope"]
Scaling = Literal["interpolate", "extrapolate"]
"""On a larger grid, cells come closer together, so that it covers what the trained one did; or it covers more."""


def canonical_ids(
    grid: Sequence[int],
    trained: Sequence[int],
    scaling: Scaling = "interpolate",
    device: torch.device | str | None = None,
) -> Tensor:
    """Where the cells of `grid` stand on the `trained` grid, row by row: (N, A).

    The centre stays the centre. Interpolated cells are as much closer on all axes as makes the two grids equal in area,
    so that shapes keep their proportions. On the trained grid itself, cell i stands at i.
    """
    apart = spacing(grid, trained, scaling)
    axes = [
        (torch.arange(cells, device=device) + (1 - cells) / 2) * apart + (before - 1) / 2
        for cells, before in zip(grid, trained, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


def spacing(grid: Sequence[int], trained: Sequence[int], scaling: Scaling) -> float:
    """How far apart the cells of `grid` stand, in cells of the `trained` one."""
    return (math.prod(trained) / math.prod(grid)) ** (1 / len(grid)) if scaling == "interpolate" else 1.0


def axial_rope(ids: Tensor, head_dim: int, theta: float = 100.0) -> Tensor:
    """Rotation angles (N, head_dim / 2) of ids (N, axes); each axis turns an equal share of the pairs.

    `theta` is the longest wavelength over 2 pi: 100 suits grids of tens of cells, 10,000 those of thousands.
    """
    pairs = _pairs(head_dim, ids.shape[1])
    frequencies = theta ** (-torch.arange(pairs, device=ids.device) / pairs)
    return (ids[:, :, None] * frequencies).flatten(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of x (..., N, D) by angles whose `cos` and `sin` are (..., N, D / 2)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def sincos(ids: Tensor, width: int, theta: float = 10000.0) -> Tensor:
    """Sines and cosines (N, width) of ids (N, axes), the last axis first."""
    axes = ids.shape[1]
    if width % (2 * axes):
        raise ValueError(f"width: {width} is no multiple of {2 * axes}, two for each of {axes} axes")
    pairs = width // (2 * axes)
    angles = ids.flip(-1)[:, :, None] * theta ** (-torch.arange(pairs, device=ids.device) / pairs)  # (N, A, pairs)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)


@dataclass(frozen=True)
class Encoding:
    """What positions do to N tokens, of which the image's are the last.

    Attributes:
        added: to the tokens, (N, W).
        cos, sin: of the angles that queries and keys are turned by, (N, P) or (Y, H, N, P).
        basis: in which they are turned, (Y, H, D, D).
    """

    added: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    basis: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Encoding":
        values = (self.added, self.cos, self.sin, self.basis)
        return Encoding(*(None if value is None else value.to(dtype) for value in values))

    def add(self, x: Tensor) -> Tensor:
        """Image tokens (B, N, W) that know where they stand."""
        return x if self.added is None else x + self.added[-x.shape[1] :]

    def layer(self, index: int) -> "Encoding":
        """As the layer of this number turns its queries and keys."""
        if self.cos is None or self.cos.ndim == 2:
            return self
        basis = None if self.basis is None else self.basis[index]
        return replace(self, cos=self.cos[index], sin=self.sin[index], basis=basis)

    def turn(self, x: Tensor) -> Tensor:
        """Queries or keys (B, H, N, D) of one layer; several heads of queries may share one of keys."""
        if self.cos is None:
            return x
        if self.cos.ndim == 2:
            return rotate(x, self.cos, self.sin)
        x = x.unflatten(1, (len(self.cos), -1))  # (B, H of keys, H / H of keys, N, D)
        if self.basis is not None:
            x = x @ self.basis[:, None].mT
        return rotate(x, self.cos[:, None], self.sin[:, None]).flatten(1, 2)


@dataclass(frozen=True)
class Place:
    """Where positions are used.

    Attributes:
        grid: cells of the grid that is trained on, an axis each.
        width: of the tokens.
        heads, head_dim: of the keys.
        layers: that turn queries and keys.
        theta: longest wavelength of a turn over 2 pi, see `axial_rope`.
        scaling: what becomes of another grid.
    """

    grid: tuple[int, ...]
    width: int
    heads: int
    head_dim: int
    layers: int
    theta: float = 100.0
    scaling: Scaling = "interpolate"

    def __post_init__(self) -> None:
        if self.scaling not in get_args(Scaling):
            raise ValueError(f"scaling: unknown {self.scaling}; known here: {', '.join(get_args(Scaling))}")
        if self.theta <= 0:
            raise ValueError(f"theta: {self.theta} is not above 0")

    @property
    def axes(self) -> int:
        return len(self.grid)


class Positions(nn.Module):
    """No positions, and what the kinds have in common: text, where it has none of its own, stands at the origin."""

    def __init__(self, place: Place):
        super().__init__()
        self.place = place

    def ids(self, grid: Sequence[int], text: int = 0, device: torch.device | str | None = None) -> Tensor:
        """Of `text` tokens and then the cells of `grid`: (text + N, A)."""
        cells = canonical_ids(grid, self.place.grid, self.place.scaling, device)
        return torch.cat([cells.new_zeros(text, cells.shape[1]), cells])

    def forward(self, ids: Tensor) -> Encoding:
        return Encoding()


class SinCos(Positions):
    """Sines and cosines of each axis, added to the tokens."""

    def __init__(self, place: Place):
        sincos(torch.zeros(1, place.axes), place.width)
        super().__init__(place)

    def forward(self, ids: Tensor) -> Encoding:
        return Encoding(sincos(ids, self.place.width))


class Learned(Positions):
    """A vector for each cell of the trained grid, added to the tokens; between cells it is interpolated linearly."""

    def __init__(self, place: Place):
        if place.axes not in (2, 3):
            raise ValueError(f"positions: learned takes grids of 2 or 3 axes, not of {place.axes}")
        super().__init__(place)
        self.table = nn.Parameter(0.02 * torch.randn(place.width, *place.grid))

    def forward(self, ids: Tensor) -> Encoding:
        most = ids.new_tensor([max(1, cells - 1) for cells in self.place.grid])
        places = (2 * ids / most - 1).flip(-1)  # the last axis first, -1 at the first cell and 1 at the last
        places = places.reshape(1, *[1] * (self.place.axes - 1), *places.shape)  # (1, 1, N, 2) or (1, 1, 1, N, 3)
        found = F.grid_sample(self.table.float()[None], places, padding_mode="border", align_corners=True)
        return Encoding(found.flatten(1)[0].unflatten(0, (self.place.width, -1)).mT)


class Axial(Positions):
    """RoPE, each axis on an equal share of the pairs."""

    def __init__(self, place: Place):
        _pairs(place.head_dim, place.axes)
        super().__init__(place)

    def forward(self, ids: Tensor) -> Encoding:
        angles = axial_rope(ids, self.place.head_dim, self.place.theta)
        return Encoding(cos=angles.cos(), sin=angles.sin())


class MSRoPE(Axial):
    """Axial RoPE about the image's centre, with the text along the diagonal beyond its corner."""

    def ids(self, grid: Sequence[int], text: int = 0, device: torch.device | str | None = None) -> Tensor:
        trained, scaling = self.place.grid, self.place.scaling
        cells = canonical_ids(grid, trained, scaling, device)
        corner = max(grid) * spacing(grid, trained, scaling) / 2
        diagonal = torch.arange(text, device=device) + corner
        return torch.cat([diagonal[:, None].expand(-1, self.place.axes), cells - cells.new_tensor(trained) / 2])


class Mixed(Positions):
    """RoPE whose pairs are turned by all axes, with learned frequencies (Y, H, P, A).

    They start as axial ones whose axes are turned at random, a turn for each head.
    """

    def __init__(self, place: Place, turned: bool = True):
        pairs = _pairs(place.head_dim, place.axes)
        super().__init__(place)
        axial = torch.block_diag(*[place.theta ** (-torch.arange(pairs) / pairs)[:, None]] * place.axes)  # (P, A)
        frequencies = axial.expand(place.layers, place.heads, -1, -1)
        if turned:
            frequencies = frequencies @ torch.linalg.qr(torch.randn(place.layers, place.heads, *[place.axes] * 2)).Q
        self.frequencies = nn.Parameter(frequencies.clone())

    def forward(self, ids: Tensor) -> Encoding:
        angles = _angles(ids, self.frequencies)
        return Encoding(cos=angles.cos(), sin=angles.sin())


class String(Mixed):
    """Mixed RoPE in a learned basis, which starts as axial RoPE in the basis that there is.

    The basis is the Cayley transform of `skew` (Y, H, D, D); as it is orthogonal, and the same for queries and keys,
    turning back out of it would change no score.
    """

    def __init__(self, place: Place):
        super().__init__(place, turned=False)
        self.skew = nn.Parameter(torch.zeros(place.layers, place.heads, place.head_dim, place.head_dim))

    def forward(self, ids: Tensor) -> Encoding:
        return replace(super().forward(ids), basis=cayley(self.skew.float()))


class Quaternion(Positions):
    """Each four channels are a quaternion q, and q becomes exp(a u) q exp(b v) at angles a, b linear in the id.

    The unit imaginary u = g i g* and v = h i h*, and what the angles are per axis, are learned: `bases` (Y, H, 2, Q, 4)
    are the quaternions g and h, and `frequencies` (Y, H, 2, Q, A) start such that the axes take turns on the two sides.
    With q' = g* q h = z + w j this is a turn of z by a + b and of w by a - b, which is how it is computed.
    """

    def __init__(self, place: Place):
        if place.head_dim % 4:
            raise ValueError(f"head_dim: {place.head_dim} is no multiple of 4, a quaternion's parts")
        super().__init__(place)
        count = place.head_dim // 4
        sides = torch.arange(2)[:, None] + 2 * torch.arange(count)  # (2, Q)
        chosen = torch.eye(place.axes)[sides % place.axes]  # (2, Q, A)
        slower = place.theta ** (-torch.arange(count) / count)
        start = (chosen * slower[:, None]).expand(place.layers, place.heads, -1, -1, -1)
        self.frequencies = nn.Parameter(start.clone())
        one = torch.tensor([1.0, 0.0, 0.0, 0.0])
        self.bases = nn.Parameter(one.expand(place.layers, place.heads, 2, count, 4).clone())

    def forward(self, ids: Tensor) -> Encoding:
        a, b = _angles(ids, self.frequencies.flatten(2, 3)).unflatten(-1, (2, -1)).unbind(-2)  # (Y, H, N, Q) each
        angles = torch.cat([a + b, a - b], -1)
        g, h = F.normalize(self.bases.float(), dim=-1).unbind(2)  # (Y, H, Q, 4) each
        conjugate = g * g.new_tensor([1.0, -1.0, -1.0, -1.0])
        parts = hamilton(hamilton(conjugate[..., None, :], torch.eye(4, device=g.device)), h[..., None, :])
        # Of q' the real part and that of i are turned, and those of j and k; `rotate` pairs the halves.
        parts = parts[..., [0, 2, 1, 3]].mT[..., [0, 2, 1, 3]]  # (Y, H, Q, 4 of q', 4 of q)
        basis = torch.diag_embed(parts.movedim(-3, -1)).transpose(-3, -2).flatten(-4, -3).flatten(-2)
        return Encoding(cos=angles.cos(), sin=angles.sin(), basis=basis)


def hamilton(p: Tensor, q: Tensor) -> Tensor:
    """The product of quaternions (..., 4), real part first."""
    a, b, c, d = p.unbind(-1)
    e, f, g, h = q.unbind(-1)
    return torch.stack(
        [
            a * e - b * f - c * g - d * h,
            a * f + b * e + c * h - d * g,
            a * g - b * h + c * e + d * f,
            a * h + b * g - c * f + d * e,
        ],
        -1,
    )


def cayley(x: Tensor) -> Tensor:
    """Orthogonal matrices of any x (..., D, D): (1 - S) / (1 + S) with S = x - x^T; of 0 it is the identity."""
    skew = x - x.mT
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(one + skew, one - skew)


KINDS: dict[Kind, Callable[[Place], Positions]] = {
    "none": Positions,
    "sincos": SinCos,
    "learned": Learned,
    "axial": Axial,
    "mixed": Mixed,
    "string": String,
    "quaternion": Quaternion,
    "msrope": MSRoPE,
}


def positions_of(kind: str, place: Place) -> Positions:
    """Raises ValueError, which names the field: the kind is not known, or the width does not suit it."""
    if kind not in KINDS:
        raise ValueError(f"positions: unknown {kind}; known here: {', '.join(KINDS)}")
    return KINDS[kind](place)


def _pairs(head_dim: int, axes: int) -> int:
    """How many pairs of a head are each axis' own."""
    if head_dim % (2 * axes):
        raise ValueError(f"head_dim: {head_dim} is no multiple of {2 * axes}, two for each of {axes} axes")
    return head_dim // (2 * axes)


def _angles(ids: Tensor, frequencies: Tensor) -> Tensor:
    """(Y, H, N, P) of ids (N, A) and frequencies (Y, H, P, A); no matrix product, which autocast would coarsen."""
    return (ids[:, None] * frequencies.float()[:, :, None]).sum(-1)
