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
    rows = [[side[place].image for place in places] for side in (base, tuned)]
    height, width = rows[0][0].shape[:2]
    sheet = np.full((2 * height + _GAP, len(places) * (width + _GAP) - _GAP, 3), 255, dtype=np.uint8)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            top, left = row * (height + _GAP), column * (width + _GAP)
            sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)
