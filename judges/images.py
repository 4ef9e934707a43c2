"""Pictures from people: whatever cannot be judged as it is, is refused with its reason."""

import contextlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MOST_PIXELS = 64_000_000

_FORMATS = ("PNG", "JPEG", "WEBP")
_PNG = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH = 24  # its place in a PNG: signature 8, length and type of IHDR 8, width and height 8
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error)
"""What Pillow raises for files that are cut off or damaged."""


def open_image(data: bytes | Path) -> np.ndarray:
    """The picture in a file or in its bytes: uint8 (H, W, 3).

    EXIF orientation is applied. Transparent parts are laid on white. Grey, palette and CMYK pictures become RGB, and
    colour profiles are ignored. Of a JPEG that holds several pictures (MPO, as phones write them) it is the first.

    Raises:
        ValueError: neither PNG, JPEG nor WebP; truncated or damaged; animated; 16 bits a channel; more than
            `MOST_PIXELS`. The message starts with the path, where there is one.
    """
    name = str(data) if isinstance(data, Path) else "image"
    try:
        with _opened(data) as file:
            return _read(file)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@contextlib.contextmanager
def _opened(data: bytes | Path) -> Iterator[BinaryIO]:
    if isinstance(data, bytes):
        yield io.BytesIO(data)
        return
    try:
        file = data.open("rb")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    with file:
        yield file


def _read(file: BinaryIO) -> np.ndarray:
    head = file.read(_BIT_DEPTH + 1)
    file.seek(0)
    if not head:
        raise ValueError("is empty")
    if head.startswith(_PNG) and head[_BIT_DEPTH:] == b"\x10":  # Pillow would drop the lower 8 bits silently
        raise ValueError("has 16 bits a channel; save it with 8")
    try:
        image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError("is no picture in PNG, JPEG or WebP; convert it to one of them") from None
    except Image.DecompressionBombError:
        raise ValueError(_too_large()) from None
    except _BROKEN as error:
        raise ValueError(_damaged(error)) from None
    with image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(_too_large(f"{image.width} x {image.height}, "))
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"is animated, {image.n_frames} frames; give each frame as a picture of its own")
        try:
            return _pixels(image)
        except _BROKEN as error:
            raise ValueError(_damaged(error)) from None


def _pixels(image: Image.Image) -> np.ndarray:
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(upright.convert("RGB"))


def _too_large(size: str = "") -> str:
    return f"is too large ({size}at most {MOST_PIXELS // 1_000_000} million pixels); make it smaller"


def _damaged(error: Exception) -> str:
    return f"is truncated or damaged ({' '.join(str(error).split()) or type(error).__name__}); save it again"
