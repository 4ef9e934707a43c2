"""Image bytes as pictures that live inside the page."""

import base64
import io
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import datasets
from PIL import Image

from pipeline.store import Artifact, read_rows

_TINY = 64
_JPEG_QUALITY = 90


@dataclass(frozen=True)
class Picture:
    """An image for an `<img>`: data URI and size in pixels; a tiny one is to be magnified in blocks."""

    uri: str
    width: int
    height: int
    tiny: bool


def read_pictures(
    artifact: Artifact,
    columns: Sequence[str],
    wanted: Set[tuple[Any, ...]],
    side: int,
    pattern: str = "shard-*.parquet",
) -> dict[tuple[Any, ...], Picture]:
    """The pictures of the rows whose values in `columns` are `wanted`; one file of `pattern` is in memory at a time."""
    found = {}
    for name in artifact.names(pattern):
        keys = read_rows(artifact, name, columns)[:]
        rows = enumerate(zip(*(keys[column] for column in columns), strict=True))
        places = {key: place for place, key in rows if key in wanted}
        if places:
            images = read_rows(artifact, name, ["image"]).cast_column("image", datasets.Image(decode=False))
            for key, row in zip(places, images.select(places.values()), strict=True):
                found[key] = picture(row["image"]["bytes"], side)
    return found


def picture(data: bytes, side: int) -> Picture:
    """The encoded image `data`; one with an edge of more than `side` pixels is shrunk to a JPEG."""
    image = Image.open(io.BytesIO(data))
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        shrunk = io.BytesIO()
        image.convert("RGB").save(shrunk, "JPEG", quality=_JPEG_QUALITY)
        return picture(shrunk.getvalue(), side)
    uri = f"data:{image.get_format_mimetype()};base64,{base64.b64encode(data).decode()}"
    return Picture(uri, *image.size, tiny=max(image.size) <= _TINY)
