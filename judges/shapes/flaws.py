"""Pictures as half-trained generators make them, with what is still true of them.

Objects get lost, doubled or mistaken, shapes melt into each other, colours split, edges soften, specks stay behind. An
object beyond recognition keeps its place but loses its shape or colour (None), so no question is true of it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from judges.shapes.grammar import COLOURS, SHAPES
from judges.shapes.render import BACKGROUND, PALETTE, SIZE, Item, Scene, coverage

PATCH = 4
_CELLS = SIZE // PATCH
_INNER_OVERLAP = 0.87  # two shapes whose outlines overlap more than this cannot be told apart once melted


@dataclass(frozen=True)
class Painted:
    """One object as painted: `alpha` (SIZE, SIZE), `rgb` (SIZE, SIZE, 3); None where it cannot be told."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    alpha: np.ndarray
    rgb: np.ndarray


@dataclass(frozen=True)
class Example:
    """A picture (uint8) and the objects in it."""

    image: np.ndarray
    objects: tuple[Painted, ...]


def _paint(item: Item) -> Painted:
    alpha = coverage(item.shape, np.array(item.x), np.array(item.y), np.array(item.radius))
    rgb = np.broadcast_to(PALETTE[item.colour], (SIZE, SIZE, 3))
    return Painted(item.shape, item.colour, item.x, item.y, alpha, rgb)


def _melt(item: Item, rng: random.Random) -> Painted:
    """Halfway to another shape."""
    painted = _paint(item)
    other = coverage(rng.choice(SHAPES), np.array(item.x), np.array(item.y), np.array(item.radius))
    overlap = np.minimum(painted.alpha, other).sum() / np.maximum(painted.alpha, other).sum()
    if overlap > _INNER_OVERLAP:
        return painted
    share = rng.uniform(0.35, 0.65)
    return replace(painted, alpha=(1 - share) * painted.alpha + share * other, shape=None)


def _bite(item: Item, rng: random.Random) -> Painted:
    """A third or more of it is missing."""
    painted = _paint(item)
    angle = rng.uniform(0, 2 * np.pi)
    ys, xs = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    side = (xs - item.x) * np.cos(angle) + (ys - item.y) * np.sin(angle)
    kept = np.clip(0.5 - (side - rng.uniform(-0.3, 0.2) * item.radius), 0, 1)
    return replace(painted, alpha=painted.alpha * kept, shape=None)


def _split(item: Item, rng: random.Random) -> Painted:
    """Two colours in one object."""
    painted = _paint(item)
    other = rng.choice([c for c in COLOURS if c != item.colour])
    angle = rng.uniform(0, 2 * np.pi)
    ys, xs = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    side = (xs - item.x) * np.cos(angle) + (ys - item.y) * np.sin(angle) > 0
    return replace(painted, rgb=np.where(side[..., None], PALETTE[other], painted.rgb), colour=None)


def _fade(item: Item, rng: random.Random) -> Painted:
    painted = _paint(item)
    return replace(painted, alpha=painted.alpha * rng.uniform(0.4, 0.65), shape=None)


def _speck(rng: random.Random) -> Item:
    return Item(
        rng.choice(SHAPES),
        rng.choice(COLOURS),
        rng.uniform(3, SIZE - 3),
        rng.uniform(3, SIZE - 3),
        rng.uniform(1.8, 2.6),
    )


def _clear_of(item: Item, scene: Sequence[Item]) -> bool:
    return all(max(abs(item.x - o.x), abs(item.y - o.y)) >= item.radius + o.radius + 2.0 for o in scene)


def flawed(scene: Scene, rng: random.Random) -> Example:
    """A spoilt picture of `scene`."""
    items = list(scene)
    if rng.random() < 0.15 and len(items) > 1:
        items.pop(rng.randrange(len(items)))
    if rng.random() < 0.2:
        index = rng.randrange(len(items))
        wrong = rng.choice([{"shape": rng.choice(SHAPES)}, {"colour": rng.choice(COLOURS)}])
        items[index] = replace(items[index], **wrong)
    if rng.random() < 0.2:
        extra = replace(rng.choice(items), x=rng.uniform(6, SIZE - 6), y=rng.uniform(6, SIZE - 6))
        extra = replace(extra, shape=rng.choice([extra.shape, *SHAPES]), colour=rng.choice([extra.colour, *COLOURS]))
        if _clear_of(extra, items):
            items.append(extra)
    spoil = [(_melt, 0.10), (_bite, 0.05), (_split, 0.05), (_fade, 0.04)]
    objects = []
    for item in items:
        draw = rng.random()
        for how, share in spoil:
            if 0 <= draw < share:
                objects.append(how(item, rng))
                break
            draw -= share
        else:
            objects.append(_paint(item))
    if rng.random() < 0.1 and _clear_of(speck := _speck(rng), items):
        objects.append(replace(_paint(speck), shape=None, colour=None))
    return Example(_compose(objects, rng), tuple(objects))


def clean(scene: Scene) -> Example:
    """A picture as `render` makes it."""
    objects = tuple(_paint(item) for item in scene)
    return Example(_compose(objects), objects)


def _compose(objects: Sequence[Painted], rng: random.Random | None = None) -> np.ndarray:
    canvas = np.broadcast_to(BACKGROUND, (SIZE, SIZE, 3)).copy()
    for o in objects:
        canvas += o.alpha[..., None] * (o.rgb - canvas)
    if rng is not None:
        sigma = rng.uniform(0.0, 0.7)
        canvas = ndimage.gaussian_filter(canvas, (sigma, sigma, 0))
        noise = np.random.default_rng(rng.getrandbits(63))
        canvas += noise.normal(0, rng.uniform(0, 0.05), canvas.shape) + noise.normal(0, 0.02, 3)
    return np.round(canvas.clip(0, 1) * 255).astype(np.uint8)


@dataclass(frozen=True)
class PatchTargets:
    """What each patch shows, row by row: class ids (N,) for shape and colour, and the way to its object's centre.

    The last id of `shape` and `colour` means background, the one before it an object that cannot be told.
    `offset` (N, 2) is in units of 8 pixels, and NaN on the background.
    """

    shape: np.ndarray
    colour: np.ndarray
    offset: np.ndarray


SHAPE_CLASSES = len(SHAPES) + 2
COLOUR_CLASSES = len(COLOURS) + 2


def patch_targets(example: Example) -> PatchTargets:
    """Targets for a dense task on the patches of an example."""
    count = _CELLS * _CELLS
    shape = np.full(count, len(SHAPES) + 1)
    colour = np.full(count, len(COLOURS) + 1)
    offset = np.full((count, 2), np.nan, np.float32)
    if example.objects:
        alpha = np.stack([o.alpha for o in example.objects])  # (K, SIZE, SIZE)
        share = alpha.reshape(-1, _CELLS, PATCH, _CELLS, PATCH).mean((2, 4)).reshape(-1, count)  # (K, N)
        owner = share.argmax(0)
        rows, columns = np.divmod(np.arange(count), _CELLS)
        for index, o in enumerate(example.objects):
            mine = (owner == index) & (share[index] > 0.08)
            shape[mine] = SHAPES.index(o.shape) if o.shape else len(SHAPES)
            colour[mine] = COLOURS.index(o.colour) if o.colour else len(COLOURS)
            offset[mine, 0] = (o.x - (columns[mine] + 0.5) * PATCH) / 8
            offset[mine, 1] = (o.y - (rows[mine] + 0.5) * PATCH) / 8
    return PatchTargets(shape, colour, offset)
