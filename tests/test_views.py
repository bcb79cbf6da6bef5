"""Crop boxes: inside the image, of the asked area and shape, and a function of content alone."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.views import canonical_view, random_view

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
    assert AREA[0] - 1e-4 <= area.min() < 0.35 and 0.8 < area.max() <= AREA[1] + 1e-4
    assert RATIO[0] - 1e-4 <= ratio.min() < 0.8 and 1.25 < ratio.max() <= RATIO[1] + 1e-4


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
    assert found.box == pytest.approx((18.3924, 7.1962, 216.9607, 177.0037), abs=1e-3)
    assert not found.flip


def test_an_image_too_narrow_for_any_crop_gives_the_centred_square():
    for view in range(1, 20):
        found = random_view("ab" * 32, view, 1000, 10, (0.9, 1.0), (0.9, 1.1), 0)
        assert found.box == canonical_view(1000, 10).box
