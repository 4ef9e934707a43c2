"""The gold standard of the embedded world: reads a picture back into objects, exactly.

Colour segmentation (the direction in which a pixel leaves the background), connected components, then the
shape whose rendering, crisp or soft, at the component's own centre and area overlaps it most. What it cannot read is an
object of unknown shape or colour, and a picture that holds one follows no prompt. It measures; training on it
takes an explicit `allow_gold: true`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from judges.shapes.grammar import COLOURS, SHAPES, Prompt, holds, parse
from judges.shapes.render import BACKGROUND, PALETTE_RGB, SIZE, coverage

MIN_AREA = 6.0  # square pixels: anything smaller is a speck and not an object
MIN_OVERLAP = 0.80  # soft intersection over union with the best shape
SOFTNESS = 0.5  # pixels: a shape is also compared blurred by this, because soft edges change no shape
MIN_PURITY = 0.80  # share of a component's area that has its main colour

_DIRECTIONS = PALETTE_RGB - BACKGROUND
_LENGTHS = np.linalg.norm(_DIRECTIONS, axis=1)
_UNITS = _DIRECTIONS / _LENGTHS[:, None]
_UNIT_AREA = {
    shape: float(coverage(shape, np.array(SIZE / 2), np.array(SIZE / 2), np.array(8.0)).sum()) / 64 for shape in SHAPES
}


@dataclass(frozen=True)
class Seen:
    """An object read from a picture: None for a shape or colour that cannot be told. Units are pixels."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    area: float
    overlap: float


def read(image: np.ndarray) -> tuple[Seen, ...]:
    """The objects in an image, uint8 (SIZE, SIZE, 3), largest first."""
    offset = image.astype(np.float64) / 255 - BACKGROUND  # (H, W, 3)
    along = offset @ _UNITS.T  # (H, W, colours)
    colour = along.argmax(-1)
    alpha = np.clip(along.max(-1) / _LENGTHS[colour], 0.0, 1.0)
    labels, count = ndimage.label(alpha > 0.35)
    if not count:
        return ()
    # The faint rim of an object belongs to it: each pixel goes to its nearest component within two pixels.
    distance, (rows, cols) = ndimage.distance_transform_edt(labels == 0, return_indices=True)
    grown = np.where(distance <= 2.0, labels[rows, cols], 0)
    parts = [np.where(grown == k, alpha, 0.0) for k in range(1, count + 1)]
    seen = [_identify(part, colour) for part in parts if part.sum() >= MIN_AREA]
    return tuple(sorted(seen, key=lambda s: -s.area))


def _identify(alpha: np.ndarray, colour: np.ndarray) -> Seen:
    area = float(alpha.sum())
    centres = np.arange(SIZE) + 0.5
    x, y = float((alpha.sum(0) * centres).sum() / area), float((alpha.sum(1) * centres).sum() / area)
    by_colour = np.bincount(colour.ravel(), alpha.ravel(), minlength=len(COLOURS))
    main = int(by_colour.argmax())
    overlaps = _overlaps(alpha, x, y, area)
    best = int(np.argmax(overlaps))
    return Seen(
        shape=SHAPES[best] if overlaps[best] >= MIN_OVERLAP else None,
        colour=COLOURS[main] if by_colour[main] >= MIN_PURITY * area else None,
        x=x,
        y=y,
        area=area,
        overlap=float(overlaps[best]),
    )


def _overlaps(alpha: np.ndarray, x: float, y: float, area: float) -> np.ndarray:
    """With each of SHAPES."""
    radii = {shape: np.sqrt(area / _UNIT_AREA[shape]) for shape in SHAPES}
    crisp = np.stack([coverage(shape, x, y - _DROP[shape] * radius, radius) for shape, radius in radii.items()])
    soft = ndimage.gaussian_filter(crisp, (0.0, SOFTNESS, SOFTNESS))
    alpha, templates = alpha.ravel(), np.stack([crisp, soft]).reshape(2, len(SHAPES), -1)
    return (np.minimum(alpha, templates).sum(-1) / np.maximum(alpha, templates).sum(-1)).max(0)


def _centroid_drop(shape: str) -> float:
    alpha = coverage(shape, np.array(SIZE / 2), np.array(SIZE / 2), np.array(8.0))
    return float((alpha.sum(1) * (np.arange(SIZE) + 0.5)).sum() / alpha.sum() - SIZE / 2) / 8


_DROP = {shape: _centroid_drop(shape) for shape in SHAPES}


def follows(image: np.ndarray, prompt: Prompt | str) -> bool:
    """Whether the picture holds exactly what the prompt asks for, and stands as it asks."""
    return holds(parse(prompt) if isinstance(prompt, str) else prompt, read(image))


def gold(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[bool]:
    """`follows` over a batch."""
    return [follows(np.asarray(image), prompt) for image, prompt in zip(images, prompts, strict=True)]
