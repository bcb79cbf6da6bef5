"""Figures against brute force, published values and students whose worth is known beforehand."""

import numpy as np
import pytest
from support.vectors import unit

from pipeline.evaluation import metrics
from pipeline.evaluation.grounding import in_boxes

# Fidelity


def test_the_teacher_itself_reaches_every_ceiling():
    teacher = unit(200, around=5)
    for scale in (1.0, 7.0):  # only the direction counts
        figures = metrics.fidelity(scale * teacher, teacher, teacher.mean(axis=0))
        for name, figure in figures.metrics.items():
            assert figure.value == pytest.approx(figure.ceiling, abs=1e-5), name


def test_a_student_that_answers_the_mean_scores_every_floor():
    teacher = unit(200, around=5)
    mean = teacher.mean(axis=0)
    figures = metrics.fidelity(np.tile(mean, (200, 1)), teacher, mean)
    for name in ("cosine", "l1_norm100"):
        assert figures[name].value == pytest.approx(figures[name].floor, abs=1e-5), name
    assert abs(figures["centred_cosine"].value) < 0.1


def test_a_constant_student_is_far_above_zero_in_cosine_and_at_zero_once_centred():
    """Why the floor stands there: any vector near the mean looks like a good student."""
    teacher = unit(500, around=20)
    constant = np.tile(unit(1, around=20, seed=9), (500, 1))
    figures = metrics.fidelity(constant, teacher, teacher.mean(axis=0))
    assert figures["cosine"].value > 0.85
    assert figures["cosine"].value <= figures["cosine"].floor
    assert abs(figures["centred_cosine"].value) < 0.1


def test_an_opposite_student_has_cosine_minus_one():
    teacher = unit(20)
    assert metrics.fidelity(-teacher, teacher, teacher.mean(axis=0))["cosine"].value == (
        pytest.approx(-1, abs=1e-6)
    )


def test_l1_norm100_is_the_published_loss():
    """Mean absolute difference over all values of unit vectors, times 100, written out."""
    student, teacher = unit(6, 4, seed=1), unit(6, 4, seed=2)
    expected = sum(abs(s - t) for s, t in zip(student.flat, teacher.flat, strict=True)) / 24 * 100
    found = metrics.fidelity(3 * student, teacher, teacher.mean(axis=0))["l1_norm100"].value
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_zero_vector_has_cosine_zero_and_no_figure_is_lost():
    student, teacher = unit(4), unit(4)
    student[0] = 0
    assert metrics.cosine(student, teacher)[0] == 0
    figures = metrics.fidelity(student, teacher, teacher.mean(axis=0))
    assert all(np.isfinite(figure.value) for figure in figures.metrics.values())


# Intervals


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        *((0, 10, 0.0, 0.2775), (1, 10, 0.0179, 0.4042), (5, 10, 0.2366, 0.7634)),
        *((10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)),
        *((15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)),
    ],
)
def test_wilsons_interval_has_its_published_values(hits, n, low, high):
    """The last three: Newcombe 1998, table I."""
    figure = metrics.share_interval(np.arange(n) < hits)
    assert figure.value == hits / n
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=1e-4)


def captioned(rng, images: int = 68, captions: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Hits of captions whose images differ in how easy they are, and the images: truth 0.5."""
    owners = np.repeat(np.arange(images), captions)
    return rng.random(images * captions) < rng.beta(0.5, 0.5, images)[owners], owners


@pytest.mark.parametrize("interval", [metrics.share_interval, metrics.mean_interval])
def test_intervals_take_images_as_the_unit(interval):
    """They cover the truth 19 times in 20, where captions as the unit cover it far less often."""
    rng = np.random.default_rng(0)
    drawn = [captioned(rng) for _ in range(1000)]
    by_image = [interval(hits, owners) for hits, owners in drawn]
    by_caption = [interval(hits) for hits, _ in drawn]
    assert 920 < sum(f.low <= 0.5 <= f.high for f in by_image) < 975
    assert sum(f.low <= 0.5 <= f.high for f in by_caption) < 850


@pytest.mark.parametrize("interval", [metrics.share_interval, metrics.mean_interval])
def test_an_interval_by_images_is_as_wide_as_a_bootstrap_of_images(interval):
    rng = np.random.default_rng(1)
    hits, owners = captioned(rng)
    by_image = hits.reshape(68, 5)
    means = [by_image[rng.integers(0, 68, 68)].mean() for _ in range(4000)]
    found = interval(hits, owners)
    width = np.diff(np.percentile(means, [2.5, 97.5])).item()
    assert found.high - found.low == pytest.approx(width, rel=0.06)
    assert found.value == hits.mean()


@pytest.mark.parametrize("interval", [metrics.share_interval, metrics.mean_interval])
def test_one_value_an_image_needs_no_owners(interval):
    hits = np.random.default_rng(2).random(50) < 0.3
    assert interval(hits, np.arange(50)) == pytest.approx(interval(hits))


def test_captions_that_all_succeed_are_worth_one_hit_an_image():
    alike = metrics.share_interval(np.ones(50), np.repeat(np.arange(10), 5))
    assert alike == pytest.approx(metrics.share_interval(np.ones(10)))


def test_an_interval_of_a_mean_covers_the_truth_about_19_times_in_20():
    rng = np.random.default_rng(0)
    found = [metrics.mean_interval(rng.normal(3, 2, 50)) for _ in range(1000)]
    assert 920 < sum(f.low <= 3 <= f.high for f in found) < 970


# Pointing


GRID = 4
CENTRES = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), axis=-1).reshape(-1, 2) + 0.5
CORNER = np.array([[0.0, 0.0, 1.9, 1.9]])  # holds the 4 upper left of 16 patches
INSIDE = in_boxes(CENTRES, CORNER)[None]


def test_a_map_of_the_box_itself_points_perfectly():
    found = metrics.pointing(INSIDE.astype(float), INSIDE)
    assert found["hit"].all() and found["energy"] == 1 and found["area"] == 0.25
    assert found["reachable"].all()


def test_a_map_of_everything_else_never_points():
    found = metrics.pointing(1.0 - INSIDE, INSIDE)
    assert not found["hit"].any() and found["energy"] == 0


def test_an_even_map_has_the_boxs_share_of_energy():
    found = metrics.pointing(np.full((1, 16), 0.3), INSIDE)
    assert found["energy"] == pytest.approx(found["area"])


def test_random_maps_hit_as_often_as_the_box_is_large():
    maps = np.random.default_rng(0).normal(size=(4000, 16))
    hits = metrics.pointing(maps, np.repeat(INSIDE, 4000, axis=0))["hit"]
    found = metrics.share_interval(hits)
    assert found.low < 0.25 < found.high


def test_negative_answers_are_no_energy():
    mixed = np.where(INSIDE, 1.0, -5.0)
    assert metrics.pointing(mixed, INSIDE)["energy"] == 1
    assert metrics.pointing(np.full((1, 16), -1.0), INSIDE)["energy"] == 0


def test_a_point_lies_in_any_of_several_boxes():
    both = in_boxes(CENTRES, np.vstack([CORNER, [[3.0, 3.0, 4.0, 4.0]]]))
    assert both.sum() == 5 and both[15]


def test_a_box_that_holds_no_patch_centre_cannot_be_reached():
    inside = in_boxes(CENTRES, np.array([[0.6, 0.6, 1.4, 1.4]]))[None]
    assert not metrics.pointing(np.ones((1, 16)), inside)["reachable"].any()


# Zero-shot


def test_zero_shot_takes_the_nearest_class():
    classes = np.eye(3)
    images = np.array([[0.9, 0.1, 0], [0.1, 0.2, 0.9], [0, 0.6, 0.5]])
    assert metrics.zero_shot(images, classes, np.array([0, 2, 2])).tolist() == [True, True, False]
