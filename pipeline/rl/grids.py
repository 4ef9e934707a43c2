"""Grids of pictures: prompts side by side, the base model's picture above the tuned one's, of the same noise."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.rl.looking import Sight

COLUMNS = 8
_GAP = 2  # pixels


def grid(base: Sequence[Sight], tuned: Sequence[Sight], columns: int = COLUMNS) -> Image.Image:
    """The first picture of each of the first `columns` held-out prompts; both must hold the same in the same order."""
    places = [place for place, one in enumerate(tuned) if one.wanted.held_out and one.wanted.sample == 0][:columns]
    return sheet([[side[place].image for place in places] for side in (base, tuned)])


def sheet(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Rows of as many pictures each, uint8 (H, W, 3) and all of one size."""
    height, width = rows[0][0].shape[:2]
    size = len(rows) * (height + _GAP) - _GAP, len(rows[0]) * (width + _GAP) - _GAP
    found = np.full((*size, 3), 255, dtype=np.uint8)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            top, left = row * (height + _GAP), column * (width + _GAP)
            found[top : top + height, left : left + width] = image
    return Image.fromarray(found)
