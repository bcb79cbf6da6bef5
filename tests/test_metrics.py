"""Figures against brute force, published values and students whose worth is known beforehand."""

import numpy as np
import pytest

from pipeline.evaluation import metrics


def unit(rows: int, size: int = 32, seed: int = 0, around: float = 0.0) -> np.ndarray:
    """Random unit vectors, in a cone around the first axis as CLIP's are."""
    vectors = np.random.default_rng(seed).normal(size=(rows, size))
    vectors[:, 0] += around
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


# Fidelity


def test_the_teacher_itself_reaches_every_ceiling():
    teacher = unit(200, around=5)
    for scale in (1.0, 7.0):  # only the direction counts
        figures = metrics.fidelity(scale * teacher, teacher, teacher.mean(axis=0))
        for name, figure in figures.items():
            assert figure["value"] == pytest.approx(figure["ceiling"], abs=1e-5), name


def test_a_student_that_answers_the_mean_scores_every_floor():
    teacher = unit(200, around=5)
    mean = teacher.mean(axis=0)
    figures = metrics.fidelity(np.tile(mean, (200, 1)), teacher, mean)
    for name in ("cosine", "l1_norm100"):
        assert figures[name]["value"] == pytest.approx(figures[name]["floor"], abs=1e-5), name
    assert abs(figures["centred_cosine"]["value"]) < 0.1


def test_a_constant_student_is_far_above_zero_in_cosine_and_at_zero_once_centred():
    """Why the floor stands there: any vector near the mean looks like a good student."""
    teacher = unit(500, around=20)
    constant = np.tile(unit(1, around=20, seed=9), (500, 1))
    figures = metrics.fidelity(constant, teacher, teacher.mean(axis=0))
    assert figures["cosine"]["value"] > 0.85
    assert figures["cosine"]["value"] <= figures["cosine"]["floor"]
    assert abs(figures["centred_cosine"]["value"]) < 0.1


def test_an_opposite_student_has_cosine_minus_one():
    teacher = unit(20)
    assert metrics.fidelity(-teacher, teacher, teacher.mean(axis=0))["cosine"]["value"] == (
        pytest.approx(-1, abs=1e-6)
    )


def test_l1_norm100_is_the_published_loss():
    """Mean absolute difference over all values of unit vectors, times 100, written out."""
    student, teacher = unit(6, 4, seed=1), unit(6, 4, seed=2)
    expected = sum(abs(s - t) for s, t in zip(student.flat, teacher.flat, strict=True)) / 24 * 100
    found = metrics.fidelity(3 * student, teacher, teacher.mean(axis=0))["l1_norm100"]["value"]
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_zero_vector_has_cosine_zero_and_no_figure_is_lost():
    student, teacher = unit(4), unit(4)
    student[0] = 0
    assert metrics.cosine(student, teacher)[0] == 0
    figures = metrics.fidelity(student, teacher, teacher.mean(axis=0))
    assert all(np.isfinite(figure["value"]) for figure in figures.values())


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
    assert figure["value"] == hits / n
    assert (figure["low"], figure["high"]) == pytest.approx((low, high), abs=1e-4)


def test_an_interval_of_a_mean_covers_the_truth_about_19_times_in_20():
    rng = np.random.default_rng(0)
    found = [metrics.mean_interval(rng.normal(3, 2, 50)) for _ in range(1000)]
    assert 920 < sum(f["low"] <= 3 <= f["high"] for f in found) < 970


# Ranks


def brute_ranks(queries: np.ndarray, gallery: np.ndarray, own: np.ndarray) -> list[int]:
    ranks = []
    for query, mine in zip(queries, own, strict=True):
        scores = [query @ row / np.linalg.norm(row) for row in gallery]
        ranks.append(sum(score > scores[mine] for score in scores))  # no two are alike
    return ranks


def test_ranks_are_those_of_brute_force_across_blocks():
    queries, gallery = unit(1500, 8, 1).astype(float), unit(40, 8, 2).astype(float)
    own = np.random.default_rng(0).integers(0, 40, 1500)
    gallery *= np.linspace(0.1, 9, 40)[:, None]  # lengths do not matter
    found = metrics.ranks_of_own(queries, gallery, own)
    np.testing.assert_array_equal(found, brute_ranks(queries, gallery, own))


def test_ties_count_half():
    same = np.eye(4)[[0, 0, 0, 1]]
    ranks = metrics.ranks_of_own(np.eye(4)[[0, 1]], same, np.array([0, 3]))
    np.testing.assert_array_equal(ranks, [1.0, 0.0])


def test_the_teacher_retrieves_every_image_of_its_own_first():
    teacher = unit(100)
    ranks = metrics.ranks_of_own(teacher, teacher, np.arange(100))
    assert all(figure["value"] == 1 for figure in metrics.recall(ranks, 100).values())


def test_a_random_student_retrieves_at_chance():
    n = 2000
    ranks = metrics.ranks_of_own(unit(n, seed=1), unit(n, seed=2), np.arange(n))
    for k, figure in zip(metrics.RANKS, metrics.recall(ranks, n).values(), strict=True):
        assert figure["floor"] == k / n
        assert figure["low"] <= figure["floor"] <= figure["high"]


@pytest.mark.parametrize("n", [7, 300])
def test_a_constant_student_is_never_above_chance(n):
    """Equal scores must not count as hits: all images answer alike."""
    constant = np.tile(unit(1), (n, 1))
    ranks = metrics.ranks_of_own(unit(n, seed=1), constant, np.arange(n))
    assert np.mean(ranks) == pytest.approx((n - 1) / 2)
    assert metrics.recall(ranks, n)["R@1"]["value"] <= 1 / n


def test_chance_is_no_more_than_certainty():
    assert metrics.recall(np.zeros(3), 3)["R@10"]["floor"] == 1


def test_overlap_is_the_common_share_of_the_best_k():
    a = np.array([[5, 4, 3, 2, 1], [5, 4, 3, 2, 1]])
    b = np.array([[5, 4, 3, 2, 1], [1, 2, 3, 4, 5]])
    np.testing.assert_allclose(metrics.overlap_at(3, a, b), [1, 1 / 3])
    np.testing.assert_allclose(metrics.overlap_at(10, a, b), [1, 1])


# Rank correlation


def test_spearmans_correlation_has_its_textbook_value():
    """The worked example of Wikipedia, "Spearman's rank correlation coefficient": -29/165."""
    iq = np.array([[106, 100, 86, 101, 99, 103, 97, 113, 112, 110]])
    hours = np.array([[7, 27, 2, 50, 28, 29, 20, 12, 6, 17]])
    assert metrics.rank_correlation(iq, hours) == pytest.approx([-29 / 165])


def test_rank_correlation_is_scipys_with_ties_and_without():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 30)), rng.integers(0, 4, (40, 30))
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(metrics.rank_correlation(a, b), expected, atol=1e-12)


def test_tied_scores_share_their_ranks():
    """By hand: ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3 leave 4.5 / sqrt(4.5 * 5)."""
    tied, apart = np.array([[1, 2, 2, 9]]), np.array([[1, 2, 3, 4]])
    assert metrics.rank_correlation(tied, apart) == pytest.approx([4.5 / np.sqrt(4.5 * 5)])


def test_only_the_order_counts():
    scores = unit(5, 40).astype(float)
    np.testing.assert_allclose(metrics.rank_correlation(scores, np.exp(9 * scores)), 1)
    np.testing.assert_allclose(metrics.rank_correlation(scores, -scores), -1)


def test_a_student_that_says_one_thing_of_all_images_agrees_with_nothing():
    assert metrics.rank_correlation(np.full((2, 9), 0.7), unit(2, 9)).tolist() == [0, 0]


def test_unrelated_rankings_agree_at_the_floor():
    found = metrics.mean_interval(metrics.rank_correlation(unit(500, 30, 1), unit(500, 30, 2)))
    assert found["low"] < 0 < found["high"]


# Pointing


GRID = 4
CENTRES = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), axis=-1).reshape(1, -1, 2) + 0.5
CORNER = np.array([[0.0, 0.0, 1.9, 1.9]])  # holds the 4 upper left of 16 patches


def test_a_map_of_the_box_itself_points_perfectly():
    inside = ((CENTRES < 2).all(axis=2)).astype(float)
    found = metrics.pointing(inside, CENTRES, CORNER)
    assert found["hit"].all() and found["energy"] == 1 and found["area"] == 0.25
    assert not found["centre"].any()


def test_a_map_of_everything_else_never_points():
    outside = 1.0 - (CENTRES < 2).all(axis=2)
    found = metrics.pointing(outside, CENTRES, CORNER)
    assert not found["hit"].any() and found["energy"] == 0


def test_an_even_map_has_the_boxs_share_of_energy():
    found = metrics.pointing(np.full((1, 16), 0.3), CENTRES, CORNER)
    assert found["energy"] == pytest.approx(found["area"])


def test_random_maps_hit_as_often_as_the_box_is_large():
    rng = np.random.default_rng(0)
    n = 4000
    maps, centres = rng.normal(size=(n, 16)), np.repeat(CENTRES, n, axis=0)
    found = metrics.share_interval(metrics.pointing(maps, centres, np.tile(CORNER, (n, 1)))["hit"])
    assert found["low"] < 0.25 < found["high"]


def test_negative_answers_are_no_energy():
    mixed = np.where((CENTRES < 2).all(axis=2), 1.0, -5.0)
    assert metrics.pointing(mixed, CENTRES, CORNER)["energy"] == 1
    assert metrics.pointing(np.full((1, 16), -1.0), CENTRES, CORNER)["energy"] == 0


def test_the_centre_baseline_asks_for_the_middle_of_all_patches():
    middle = np.array([[1.9, 1.9, 2.1, 2.1]])
    assert metrics.pointing(np.zeros((1, 16)), CENTRES, middle)["centre"].all()


# Zero-shot


def test_zero_shot_takes_the_nearest_class():
    classes = np.eye(3)
    images = np.array([[0.9, 0.1, 0], [0.1, 0.2, 0.9], [0, 0.6, 0.5]])
    assert metrics.zero_shot(images, classes, np.array([0, 2, 2])).tolist() == [True, True, False]
