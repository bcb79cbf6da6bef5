"""Any file becomes an upright RGB JPEG or a reason; a view is what CLIP's own transform sees."""

import io
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from pipeline.data.pixels import NotAnImage, TooManyPixels, canonical_jpeg, decode, view_pixels
from pipeline.data.views import canonical_view

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


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
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
    data = encoded(turned, exif=exif, quality=95)
    assert_close(corners(stored(data)), [RED, BLUE, GREEN, YELLOW])
    assert canonical_jpeg(data, 256, 95, ALLOWED)[1:] == (64, 32, 64, 32)


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


# Views


def assert_clips_own_view(jpg: bytes, size: int) -> None:
    from pipeline.models import torchvision_guard  # noqa: F401

    import open_clip.transform  # isort: skip

    plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bicubic"}
    transform = open_clip.transform.image_transform(
        size, is_train=False, resize_mode="shortest", **plain
    )
    expected = transform(Image.open(io.BytesIO(jpg))).permute(1, 2, 0).numpy() * 255
    pixels = decode(jpg)
    box = canonical_view(pixels.shape[1], pixels.shape[0], "shortest", size).box
    difference = np.abs(view_pixels(pixels, box, False, size) - expected)
    assert np.quantile(difference, 0.999) <= 3 and difference.max() <= 12


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize(
    "shape", [(256, 341), (341, 256), (455, 256), (256, 383), (100, 77), (64, 64), (257, 256)]
)
def test_the_canonical_view_is_clips_own_transform(shape, size):
    blots = Image.effect_noise(shape, 200).filter(ImageFilter.GaussianBlur(1.5)).convert("RGB")
    assert_clips_own_view(encoded(blots, quality=95), size)


def test_the_canonical_view_of_real_photos_is_clips_own_transform(shared):
    for file in sorted((shared / "photos/clothing").glob("*.jpg"))[:12]:
        jpg, *_ = canonical_jpeg(file.read_bytes(), 256, 95, 10**8)
        assert_clips_own_view(jpg, 224)
        assert_clips_own_view(jpg, 64)


def test_a_flip_mirrors_left_and_right_after_the_crop():
    pixels = np.asarray(quarters())
    box = (10.5, 3.25, 50.0, 30.0)
    plain, flipped = (view_pixels(pixels, box, flip, 16) for flip in (False, True))
    np.testing.assert_array_equal(flipped, plain[:, ::-1])


def test_a_box_of_whole_pixels_at_its_own_size_is_a_plain_crop():
    pixels = decode(worlds.picture(2, 60, 50, "JPEG"))
    found = view_pixels(pixels, (10.0, 20.0, 34.0, 44.0), False, 24)
    np.testing.assert_array_equal(found, pixels[20:44, 10:34])


def test_half_a_pixel_matters():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = 200
    left, right = (view_pixels(pixels, (x, 0, x + 4, 4), False, 4) for x in (2.0, 2.5))
    assert (right.astype(int) - left).max() > 50


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_large_image_is_averaged_not_sampled(interpolation):
    checks = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = np.repeat(checks[..., None], 3, 2)
    found = view_pixels(pixels, (0, 0, 256, 256), False, 16, interpolation)
    assert_close(found, 127, tolerance=8)
