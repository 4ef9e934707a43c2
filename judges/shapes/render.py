"""The pictures of the embedded world: flat shapes on grey, anti-aliased by their signed distance.

A scene is a list of objects; `SIZE` x `SIZE` RGB pixels. Units are pixels, y grows downwards, and the centre
of the pixel in row i, column j is (j + 0.5, i + 0.5).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from judges.shapes.grammar import COLOURS, SHAPES, Prompt, Thing, relation

SIZE = 32
BACKGROUND = np.array([0.50, 0.50, 0.50])
PALETTE = {
    "red": (0.90, 0.12, 0.14),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.98, 0.92, 0.15),
    "green": (0.10, 0.70, 0.22),
    "blue": (0.12, 0.32, 0.92),
    "purple": (0.62, 0.16, 0.78),
    "white": (1.00, 1.00, 1.00),
    "black": (0.03, 0.03, 0.03),
}
PALETTE_RGB = np.array([PALETTE[c] for c in COLOURS])

_GAP = 2.0  # pixels between the boxes of two objects, so that their edges never mix
BORDER = 1.0  # pixels between an object and the edge
_LEAD = 3.0  # how far one axis must lead the other for a relation to be beyond doubt

_LATTICE = (6.0, 10.0, 14.0, 18.0, 22.0, 26.0)
_LATTICE_RADII = (5.0, 4.2)  # of up to two objects, and of more


@dataclass(frozen=True)
class Item:
    """One object of a scene: centre and half-extent in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


Scene = tuple[Item, ...]


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """How much of each pixel (..., SIZE, SIZE) a shape of half-extent `radius` (...) at (`x`, `y`) covers, 0-1."""
    centres = np.arange(SIZE) + 0.5
    dx = centres[None, :] - np.asarray(x)[..., None, None]
    dy = centres[:, None] - np.asarray(y)[..., None, None]
    r = np.asarray(radius)[..., None, None]
    ax, ay = np.abs(dx), np.abs(dy)
    match shape:
        case "circle":
            distance = np.hypot(dx, dy) - r
        case "square":
            distance = np.maximum(ax, ay) - 0.92 * r
        case "diamond":
            distance = (ax + ay - 1.1 * r) / np.sqrt(2)
        case "triangle":
            distance = np.maximum(dy - 0.85 * r, (ax * 1.8 - dy - r) / np.hypot(1.8, 1.0))
        case "cross":
            arm = 0.34 * r
            distance = np.minimum(np.maximum(ax - r, ay - arm), np.maximum(ax - arm, ay - r))
        case "ring":
            distance = np.abs(np.hypot(dx, dy) - 0.74 * r) - 0.27 * r
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scenes: Sequence[Scene]) -> np.ndarray:
    """The pictures of `scenes`: uint8 (B, SIZE, SIZE, 3)."""
    canvas = np.broadcast_to(BACKGROUND, (len(scenes), SIZE, SIZE, 3)).copy()
    flat = [(index, item) for index, scene in enumerate(scenes) for item in scene]
    for shape in SHAPES:
        chosen = [(index, item) for index, item in flat if item.shape == shape]
        geometry = np.array([(item.x, item.y, item.radius) for _, item in chosen]).reshape(-1, 3)
        alpha = coverage(shape, geometry[:, 0], geometry[:, 1], geometry[:, 2])[..., None]
        for (index, item), a in zip(chosen, alpha, strict=True):
            canvas[index] += a * (np.array(PALETTE[item.colour]) - canvas[index])
    return np.round(canvas * 255).astype(np.uint8)


def scene_of(prompt: Prompt, rng: random.Random, lattice: bool = False) -> Scene:
    """A scene that follows `prompt`, with what the prompt leaves open drawn at random.

    On the `lattice` centres keep to a grid of 4 pixels and objects to two sizes, which a small generator learns
    more easily than objects anywhere.
    """
    things = [Thing(t.shape, t.colour or rng.choice(COLOURS)) for t in prompt.objects]
    least, most = (4.8, 7.2) if len(things) <= 2 else (4.0, 5.2)
    while True:
        radii = [_LATTICE_RADII[len(things) > 2] if lattice else rng.uniform(least, most) for _ in things]
        spots = [(_centre(r, rng, lattice), _centre(r, rng, lattice)) for r in radii]
        if apart(spots, radii) and related(prompt.relation, spots):
            return tuple(Item(t.shape, t.colour, x, y, r) for t, (x, y), r in zip(things, spots, radii, strict=True))


def _centre(radius: float, rng: random.Random, lattice: bool) -> float:
    return rng.choice(_LATTICE) if lattice else rng.uniform(radius + BORDER, SIZE - radius - BORDER)


def apart(spots: Sequence[tuple[float, float]], radii: Sequence[float]) -> bool:
    """Whether no two objects with these centres and half-extents come so close that they could be taken for one."""
    return all(
        max(abs(spots[i][0] - spots[j][0]), abs(spots[i][1] - spots[j][1])) >= radii[i] + radii[j] + _GAP
        for i in range(len(spots))
        for j in range(i)
    )


def related(wanted: str | None, spots: Sequence[tuple[float, float]]) -> bool:
    """Whether the first centre stands beyond doubt to the second as `wanted`; None asks for nothing."""
    if wanted is None:
        return True
    (xa, ya), (xb, yb) = spots
    return relation(spots[0], spots[1]) == wanted and abs(abs(xa - xb) - abs(ya - yb)) >= _LEAD
