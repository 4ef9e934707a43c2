"""Pictures from people: what can be judged comes out as it is meant, what cannot is refused for its reason."""

import io

import numpy as np
import pytest
from PIL import Image

from judges import images
from judges.images import open_image


def encoded(image, kind, **settings):
    with io.BytesIO() as file:
        image.save(file, kind, **settings)
        return file.getvalue()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize(("kind", "settings"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_pixels_are_kept(pixels, kind, settings, tmp_path):
    data = encoded(Image.fromarray(pixels), kind, **settings)
    (tmp_path / "picture").write_bytes(data)
    for source in (data, tmp_path / "picture"):
        opened = open_image(source)
        assert opened.dtype == np.uint8
        np.testing.assert_array_equal(opened, pixels)
        opened[0, 0] = 0  # the array belongs to the caller


def test_jpegs_are_nearly_kept():
    grey = np.full((16, 16, 3), 90, np.uint8)
    assert np.abs(open_image(encoded(Image.fromarray(grey), "JPEG")).astype(int) - 90).max() <= 2


def test_a_turned_camera_is_turned_back(pixels):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees: rows of the file are columns of the picture
    data = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    np.testing.assert_array_equal(open_image(data), np.rot90(pixels, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    settings = {}
    if mode == "P":
        image, settings = Image.new("P", (2, 1)), {"transparency": 1}
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
    found = open_image(encoded(image.convert(mode) if mode != "P" else image, "PNG", **settings))
    np.testing.assert_array_equal(found, [[[0, 0, 0], [255, 255, 255]]])


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("L", "JPEG")])
def test_other_colours_become_rgb(mode, kind):
    assert open_image(encoded(Image.new(mode, (8, 8)), kind)).shape == (8, 8, 3)


def test_a_phones_several_pictures_are_the_first(pixels):
    first, second = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (200, 20))
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert open_image(data).mean() == pytest.approx(200, abs=2)


def sixteen_bit_rgb():
    """A 1 x 1 PNG of 16 bits a channel, which Pillow cannot write: the depth of an 8-bit one raised."""
    data = bytearray(encoded(Image.new("RGB", (1, 1)), "PNG"))
    data[24] = 16
    return bytes(data)


def animation(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "image: is empty"),
        (b"hello, this is no picture", "image: is no picture in PNG, JPEG or WebP; convert"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "image: is no picture in PNG, JPEG or WebP; convert"),
        (encoded(Image.new("RGB", (4, 4)), "TIFF"), "image: is no picture in PNG, JPEG or WebP; convert"),
        (encoded(Image.new("I;16", (4, 4)), "PNG"), "image: has 16 bits a channel; save it with 8"),
        (sixteen_bit_rgb(), "image: has 16 bits a channel; save it with 8"),
        (animation("PNG"), "image: is animated, 2 frames; give each frame"),
        (animation("WEBP"), "image: is animated, 2 frames; give each frame"),
    ],
    ids=["empty", "text", "gif", "tiff", "grey 16", "rgb 16", "apng", "webp"],
)
def test_what_cannot_be_judged_is_refused_for_its_reason(data, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        open_image(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_off_anywhere_is_refused(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    for length in range(1, len(data) - 20, 37):
        with pytest.raises(ValueError, match=r"image: (is truncated or damaged|is no picture)"):
            open_image(data[:length])


def test_damage_never_leaks_another_error():
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)), "PNG")
    rng = np.random.default_rng(1)
    refused = 0
    for place in rng.integers(8, len(data), 200):
        broken = bytearray(data)
        broken[place] ^= 0xFF
        try:
            open_image(bytes(broken))
        except ValueError:
            refused += 1
    assert refused > 150


def test_too_many_pixels_are_refused_before_they_are_decoded(monkeypatch):
    data = encoded(Image.new("RGB", (40, 30)), "PNG")
    monkeypatch.setattr(images, "MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"image: is too large \(40 x 30, at most .* pixels\); make it smaller"):
        open_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="image: is too large"):
        open_image(data)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.png: cannot be read: No such file"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        open_image(tmp_path)
