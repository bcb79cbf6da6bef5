"""Any file becomes an upright RGB JPEG, or a reason."""

import io
import zipfile
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import worlds

from pipeline.data.pixels import NotAnImage, decode
from pipeline.fetch.decoding import TooManyPixels, canonical_jpeg

RED, BLUE, GREEN, YELLOW = (230, 20, 20), (20, 20, 230), (20, 200, 20), (230, 230, 20)
ALLOWED = 10_000_000  # px


def quarters(width: int = 64, height: int = 32) -> Image.Image:
    """Red and blue above green and yellow."""
    image = Image.new("RGB", (2, 2))
    image.putdata([RED, BLUE, GREEN, YELLOW])
    return image.resize((width, height), Image.Resampling.NEAREST)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def stored(data: bytes, image_size: int = 256) -> np.ndarray:
    """Decoded pixels of the stored JPEG, whose reported size is checked on the way."""
    jpg, width, height, *_ = canonical_jpeg(data, image_size, 95, ALLOWED)
    pixels = decode(jpg)
    assert pixels.shape == (height, width, 3)
    return pixels


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """Upper left, upper right, lower left, lower right, a few px inside."""
    return [tuple(map(int, pixels[y, x])) for y in (5, -6) for x in (5, -6)]


def assert_close(found, expected, tolerance=12):
    assert np.abs(np.array(found, int) - np.array(expected, int)).max() <= tolerance, found


# Stored as they came


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}], ids=str
)
def test_a_small_upright_jpeg_keeps_its_bytes(options):
    data = encoded(quarters(), **options)
    assert canonical_jpeg(data, 32, 95, ALLOWED) == (data, 64, 32, 64, 32)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm():
    data = encoded(quarters()) + b"trailing rubbish"
    assert_close(corners(stored(data)), [RED, BLUE, GREEN, YELLOW])


def test_a_stored_jpeg_decodes_to_the_same_pixels_as_pillows():
    data = worlds.picture(3, 90, 70, "JPEG", quality=80)
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_whatever_is_stored_of_a_damaged_jpeg_can_be_decoded(place, bit):
    """Pillow forgives what `decode` does not: such a file must not stop the teacher later."""
    data = bytearray(worlds.picture(0, 60, 40, "JPEG"))
    data[int(place * len(data))] ^= 1 << bit
    with suppress(NotAnImage, TooManyPixels):
        stored(bytes(data))


def test_a_slightly_damaged_jpeg_is_kept_and_encoded_anew():
    data = encoded(quarters())
    cut = data.rindex(b"\xff\xd9")
    damaged = data[:cut] + b"\x00" * 20 + data[cut:]  # what libjpeg calls extraneous bytes
    with pytest.raises(NotAnImage, match="extraneous"):
        decode(damaged)
    assert_close(corners(stored(damaged)), [RED, BLUE, GREEN, YELLOW])


# Made upright, RGB, opaque


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = quarters()  # what a camera stores of the upright scene
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    if orientation > 1:
        turned = turned.transpose(undo[orientation])
    data = encoded(turned, kind, exif=exif, **{} if kind == "PNG" else {"quality": 95})
    assert_close(corners(stored(data)), [RED, BLUE, GREEN, YELLOW])
    assert canonical_jpeg(data, 256, 95, ALLOWED)[1:] == (64, 32, 64, 32)
    assert_close(corners(stored(data, 16)), [RED, BLUE, GREEN, YELLOW], tolerance=40)
    assert canonical_jpeg(data, 16, 95, ALLOWED)[1:] == (32, 16, 64, 32)


@pytest.mark.parametrize("exif", [b"Exif\0\0no tiff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
def test_broken_exif_does_not_lose_an_image(exif):
    assert_close(corners(stored(encoded(quarters(), exif=exif))), [RED, BLUE, GREEN, YELLOW])


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("P", "PNG"), ("RGB", "BMP")),
        *(("RGB", "WEBP"), ("RGB", "GIF"), ("RGBA", "PNG"), ("RGB", "TIFF")),
    ],
)
def test_colours_survive_whatever_mode_they_came_in(mode, kind):
    data = encoded(quarters().convert(mode), kind)
    assert_close(corners(stored(data)), [RED, BLUE, GREEN, YELLOW], tolerance=20)


def test_transparency_lies_over_white():
    layer = quarters().convert("RGBA")
    layer.putalpha(Image.new("L", layer.size, 0))
    assert_close(stored(encoded(layer, "PNG")), 255, tolerance=2)


def test_the_transparent_entry_of_a_palette_is_white_and_the_rest_keeps_its_colour():
    paletted = quarters().quantize(4)
    index = paletted.getpixel((0, 0))
    found = corners(stored(encoded(paletted, "PNG", transparency=index)))
    assert_close(found, [(255, 255, 255), BLUE, GREEN, YELLOW])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_the_high_byte(kind):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (32, 1))
    found = stored(encoded(Image.fromarray(ramp), kind))
    assert_close(found[..., 0], np.tile(np.linspace(0, 255, 64), (32, 1)), tolerance=4)


def test_an_animation_gives_its_first_frame():
    data = encoded(quarters(), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 32))])
    assert_close(corners(stored(data)), [RED, BLUE, GREEN, YELLOW])


def test_a_camera_file_with_several_pictures_gives_its_first():
    data = encoded(quarters(), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 32))])
    assert_close(corners(stored(data)), [RED, BLUE, GREEN, YELLOW], tolerance=20)


# Size


@pytest.mark.parametrize(
    ("before", "after"),
    [((640, 480), (341, 256)), ((480, 640), (256, 341)), ((300, 300), (256, 256)),
     ((4000, 257), (3984, 256)), ((256, 900), (256, 900)), ((20, 30), (20, 30)), ((1, 1), (1, 1))],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_shorter_side_is_shrunk_to_the_size_and_never_enlarged(before, after, kind):
    _, *sizes = canonical_jpeg(encoded(quarters(*before), kind), 256, 95, ALLOWED)
    assert tuple(sizes) == (*after, *before)


def test_shrinking_a_jpeg_by_draft_is_as_good_as_shrinking_all_of_it():
    picture = worlds.picture(1, 1600, 1200, "PNG")
    jpeg = encoded(Image.open(io.BytesIO(picture)), quality=98)
    difference = np.abs(stored(jpeg, 100).astype(int) - stored(picture, 100))
    assert difference.mean() < 2 and difference.max() < 20


# Refused


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        opened.writestr("picture.jpg", encoded(quarters()))
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>not found</html>",
        archive(),
        b"%!PS-Adobe-3.0 EPSF-3.0",
        encoded(quarters(), "ICO"),
        encoded(quarters(600, 400))[:1500],
        encoded(quarters(600, 400))[:-2],
        encoded(Image.effect_noise((60, 40), 50), "PNG")[:1000],
        encoded(quarters(600, 400), "GIF")[:-500],
    ],
    ids=["empty", "page", "archive", "postscript", "icon", "half", "no end", "png", "gif"],
)
def test_what_is_no_whole_image_of_a_known_format_is_refused(data):
    with pytest.raises(NotAnImage):
        canonical_jpeg(data, 256, 95, ALLOWED)


def test_a_bomb_is_refused_from_its_header_alone():
    """Ten million times more pixels than bytes were decoded if anything looked past the header."""
    bomb = bytearray(encoded(Image.new("1", (1, 1)), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2  # the header's width and height
    with pytest.raises((TooManyPixels, NotAnImage)):
        canonical_jpeg(bytes(bomb), 256, 95, 10**12)
    with pytest.raises(TooManyPixels):
        canonical_jpeg(encoded(Image.new("1", (4000, 4000)), "PNG"), 256, 95, 1000 * 1000)


def test_the_limit_of_pixels_is_inclusive():
    data = encoded(quarters(100, 50), "PNG")
    assert canonical_jpeg(data, 256, 95, 5000)
    with pytest.raises(TooManyPixels, match="100 x 50"):
        canonical_jpeg(data, 256, 95, 4999)


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000)])
def test_a_strip_too_long_for_jpeg_is_refused(size):
    with pytest.raises(TooManyPixels, match="strip"):
        canonical_jpeg(encoded(Image.new("L", size), "PNG"), 256, 95, ALLOWED)
