"""Crop boxes lie inside the image, have the asked area and shape and are a function of content alone;
through one, the teacher's own view is what CLIP's own transform sees.
"""

import hashlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from support import worlds

from pipeline.data.pixels import decode
from pipeline.data.views import canonical_view, random_view, view_pixels
from pipeline.fetch.decoding import canonical_jpeg

sides = st.integers(1, 5000)
contents = st.integers(0, 10**9).map(lambda i: hashlib.sha256(str(i).encode()).hexdigest())
AREA, RATIO = (0.3, 0.9), (0.75, 4 / 3)


def inside(view, width: int, height: int) -> bool:
    return 0 <= view.left < view.right <= width and 0 <= view.top < view.bottom <= height


def float32_exact(view) -> bool:
    return all(float(np.float32(value)) == value for value in view.box)


@given(contents, st.integers(1, 20), sides, sides, st.integers(0, 2**32 - 1))
def test_random_boxes_lie_inside_the_image_and_are_float32_values(content, view, w, h, seed):
    found = random_view(content, view, w, h, AREA, RATIO, seed)
    assert inside(found, w, h) and float32_exact(found)


@given(sides, sides, st.sampled_from([None, 32, 224, 336]))
def test_canonical_boxes_lie_inside_the_image_and_are_float32_values(w, h, image_size):
    for mode in ("shortest", "squash"):
        found = canonical_view(w, h, mode, image_size)
        assert inside(found, w, h) and float32_exact(found) and not found.flip


@given(sides, sides)
def test_the_canonical_view_is_the_largest_centred_square(w, h):
    left, top, right, bottom = canonical_view(w, h).box
    assert right - left == bottom - top == min(w, h)
    assert (left + right, top + bottom) == (w, h)


@given(sides, sides, st.sampled_from([32, 224]))
def test_clips_rounding_moves_the_view_by_less_than_a_pixel_of_the_resized_image(w, h, size):
    pixel = min(w, h) / size * max(1, max(w, h) / min(w, h) / size)
    exact, rounded = canonical_view(w, h), canonical_view(w, h, "shortest", size)
    assert (
        max(abs(a - b) for a, b in zip(exact.box, rounded.box, strict=True)) <= 1.5 * pixel + 0.01
    )


def test_squash_keeps_the_whole_image():
    assert canonical_view(30, 20, "squash").box == (0, 0, 30, 20)


def many(**changes) -> list:
    arguments = {"width": 300, "height": 200, "area": AREA, "ratio": RATIO, "seed": 0} | changes
    contents = [hashlib.sha256(bytes([i, j])).hexdigest() for i in range(20) for j in range(20)]
    return [random_view(content, 1, **arguments) for content in contents]


def test_area_and_ratio_lie_in_their_ranges_and_fill_them():
    boxes = np.array([view.box for view in many()])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = w * h / (300 * 200), w / h
    rounding = 0.5 * (1 / w + 1 / h).max()  # of either side to whole pixels, as a share
    assert AREA[0] * (1 - rounding) <= area.min() < 0.35
    assert 0.8 < area.max() <= AREA[1] * (1 + rounding)
    assert RATIO[0] * (1 - rounding) <= ratio.min() < 0.8
    assert 1.25 < ratio.max() <= RATIO[1] * (1 + rounding)


def test_flips_are_fair():
    flips = [view.flip for view in many()]
    assert 150 < sum(flips) < 250  # 400 fair coins leave this range once in a million times


def test_a_box_depends_on_content_and_number_of_the_view_and_on_nothing_else():
    assert many() == many()
    content = hashlib.sha256(b"a").hexdigest()
    views = [random_view(content, v, 300, 200, AREA, RATIO, 0) for v in (1, 2, 3)]
    again = [random_view(content, v, 300, 200, AREA, RATIO, 0) for v in (3, 1, 2)]
    assert views == [again[1], again[2], again[0]]
    assert len({view.box for view in [*views, *many()]}) == 403


def test_another_seed_gives_other_boxes():
    assert not {view.box for view in many()} & {view.box for view in many(seed=1)}


def test_boxes_never_change_between_versions_of_libraries():
    """Stored students depend on it: a change here must raise views.VERSION."""
    found = random_view("0123456789abcdef" * 4, 1, 300, 200, (0.3, 0.9), (0.75, 4 / 3), 7)
    assert found.box == (18.0, 7.0, 217.0, 177.0)
    assert not found.flip


def test_an_image_too_narrow_for_any_crop_gives_the_centred_square():
    for view in range(1, 20):
        found = random_view("ab" * 32, view, 1000, 10, (0.9, 1.0), (0.9, 1.1), 0)
        assert found.box == canonical_view(1000, 10).box


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


# What is seen through a box


def assert_clips_own_view(jpg: bytes, size: int) -> None:

    from pipeline.models.open_clip import open_clip

    plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bicubic"}
    transform = open_clip.transform.image_transform(
        size, is_train=False, resize_mode="shortest", **plain
    )
    expected = transform(Image.open(io.BytesIO(jpg))).permute(1, 2, 0).numpy() * 255
    pixels = decode(jpg)
    box = canonical_view(pixels.shape[1], pixels.shape[0], "shortest", size).box
    difference = np.abs(view_pixels(pixels, box, False, size) - expected)
    assert difference.max() <= 3


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize(
    "shape", [(256, 341), (341, 256), (455, 256), (256, 383), (100, 77), (64, 64), (257, 256)]
)
def test_the_canonical_view_is_clips_own_transform(shape, size):
    blots = Image.effect_noise(shape, 200).filter(ImageFilter.GaussianBlur(1.5)).convert("RGB")
    assert_clips_own_view(jpeg(blots), size)


def test_the_canonical_view_of_real_photos_is_clips_own_transform(shared):
    for file in sorted((shared / "photos/clothing").glob("*.jpg"))[:12]:
        jpg, *_ = canonical_jpeg(file.read_bytes(), 256, 95, 10**8)
        assert_clips_own_view(jpg, 224)
        assert_clips_own_view(jpg, 64)


def test_a_flip_mirrors_left_and_right_after_the_crop():
    pixels = decode(worlds.picture(1, 64, 32, "JPEG"))
    for box in (10.5, 3.25, 50.0, 30.0), (10.0, 3.0, 50.0, 30.0):
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
    assert np.abs(found.astype(int) - 127).max() <= 8


boxes = st.tuples(*[st.integers(0, 90)] * 2, *[st.integers(1, 80)] * 2)


@settings(deadline=None)
@given(boxes, st.sampled_from([8, 33, 64, 100]), st.sampled_from(["bicubic", "bilinear"]))
def test_a_box_of_whole_pixels_is_seen_as_pillow_crops_and_resizes(box, size, interpolation):
    left, top, width, height = box
    image = Image.effect_noise((170, 170), 120).filter(ImageFilter.GaussianBlur(1)).convert("RGB")
    box = (left, top, left + width, top + height)
    expected = image.crop(box).resize(
        (size, size), getattr(Image.Resampling, interpolation.upper())
    )
    found = view_pixels(np.array(image), tuple(map(float, box)), False, size, interpolation)
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 2


@given(contents, sides, sides)
def test_a_stored_view_lies_on_whole_pixels(content, width, height):
    view = random_view(content, 1, width, height, AREA, RATIO, 0)
    if view.box != canonical_view(width, height).box:
        assert all(value.is_integer() for value in view.box)


def test_a_box_between_pixels_is_seen_as_pillow_resizes_it():
    image = Image.effect_noise((170, 130), 120).convert("RGB")
    box = (10.3, 7.75, 120.6, 118.05)
    expected = image.resize((64, 64), Image.Resampling.BICUBIC, box=box)
    np.testing.assert_array_equal(view_pixels(np.asarray(image), box, False, 64), expected)
