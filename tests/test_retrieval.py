"""Retrieval against brute force, textbook values and students whose worth is known beforehand."""

import numpy as np
import pytest
from support import stored
from support.vectors import unit

from pipeline.data import database
from pipeline.data.embeddings import split_vectors, training_vectors
from pipeline.evaluation.metrics import mean_interval
from pipeline.evaluation.retrieval import (
    DEPTHS,
    GALLERY,
    NEAR,
    Ranks,
    gallery,
    hits_at,
    near_training_images,
    overlap_at,
    rank_correlation,
    ranks_of_own,
    recall,
    text_retrieval,
)

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
    found = ranks_of_own(queries, gallery, own)
    np.testing.assert_array_equal(found.above, brute_ranks(queries, gallery, own))
    assert (found.tied == 1).all()


@pytest.mark.parametrize("copies", [2, 3])
def test_ties_earn_the_expected_rank_of_a_fair_draw(copies):
    """Each image several times in the gallery: the right one comes first once in so many draws."""
    images = unit(40)
    gallery = np.tile(images, (copies, 1))
    ranks = ranks_of_own(images, gallery, np.arange(40))
    assert recall(ranks, len(gallery))["R@1"].value == pytest.approx(1 / copies)


def test_a_fair_draw_is_the_mean_of_many_shuffles():
    """Against ranks where ties are broken at random, at every depth."""
    rng = np.random.default_rng(0)
    gallery = np.eye(6)[rng.integers(0, 6, 30)]
    queries, own = np.eye(6)[rng.integers(0, 6, 8)], rng.integers(0, 30, 8)
    shuffled = np.zeros((3, 8))
    for _ in range(4000):
        scores = queries @ gallery.T + 1e-3 * rng.random((8, 30))
        drawn = (scores > scores[np.arange(8), own][:, None]).sum(axis=1)
        shuffled += [drawn < k for k in DEPTHS]
    expected = [hits_at(k, ranks_of_own(queries, gallery, own)) for k in DEPTHS]
    np.testing.assert_allclose(shuffled / 4000, expected, atol=0.04)


def test_the_teacher_retrieves_every_image_of_its_own_first():
    teacher = unit(100)
    ranks = ranks_of_own(teacher, teacher, np.arange(100))
    assert all(figure.value == 1 for figure in recall(ranks, 100).values())


def test_a_random_student_retrieves_at_chance():
    n = 2000
    ranks = ranks_of_own(unit(n, seed=1), unit(n, seed=2), np.arange(n))
    for k, figure in zip(DEPTHS, recall(ranks, n).values(), strict=True):
        assert figure.floor == k / n
        assert figure.low <= figure.floor <= figure.high


@pytest.mark.parametrize("n", [7, 300])
def test_a_constant_student_is_at_chance(n):
    """Equal scores must not count as hits: all images answer alike."""
    constant = np.tile(unit(1), (n, 1))
    ranks = ranks_of_own(unit(n, seed=1), constant, np.arange(n))
    for k, figure in zip(DEPTHS, recall(ranks, n).values(), strict=True):
        assert figure.value == pytest.approx(min(1, k / n))


def test_chance_is_no_more_than_certainty():
    assert recall(Ranks(np.zeros(3), np.ones(3)), 3)["R@10"].floor == 1


def test_overlap_is_the_common_share_of_the_best_k():
    a = np.array([[5, 4, 3, 2, 1], [5, 4, 3, 2, 1]])
    b = np.array([[5, 4, 3, 2, 1], [1, 2, 3, 4, 5]])
    np.testing.assert_allclose(overlap_at(3, a, b), [1, 1 / 3])
    np.testing.assert_allclose(overlap_at(10, a, b), [1, 1])


# Rank correlation


def test_spearmans_correlation_has_its_textbook_value():
    """The worked example of Wikipedia, "Spearman's rank correlation coefficient": -29/165."""
    iq = np.array([[106, 100, 86, 101, 99, 103, 97, 113, 112, 110]])
    hours = np.array([[7, 27, 2, 50, 28, 29, 20, 12, 6, 17]])
    assert rank_correlation(iq, hours) == pytest.approx([-29 / 165])


def test_rank_correlation_is_scipys_with_ties_and_without():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 30)), rng.integers(0, 4, (40, 30))
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(rank_correlation(a, b), expected, atol=1e-12)


def test_tied_scores_share_their_ranks():
    """By hand: ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3 leave 4.5 / sqrt(4.5 * 5)."""
    tied, apart = np.array([[1, 2, 2, 9]]), np.array([[1, 2, 3, 4]])
    assert rank_correlation(tied, apart) == pytest.approx([4.5 / np.sqrt(4.5 * 5)])


def test_only_the_order_counts():
    scores = unit(5, 40).astype(float)
    np.testing.assert_allclose(rank_correlation(scores, np.exp(9 * scores)), 1)
    np.testing.assert_allclose(rank_correlation(scores, -scores), -1)


def test_a_student_that_says_one_thing_of_all_images_agrees_with_nothing():
    assert rank_correlation(np.full((2, 9), 0.7), unit(2, 9)).tolist() == [0, 0]


def test_unrelated_rankings_agree_at_the_floor():
    found = mean_interval(rank_correlation(unit(500, 30, 1), unit(500, 30, 2)))
    assert found.low < 0 < found.high


def test_a_gallery_is_all_images_up_to_a_bound_and_evenly_spaced_above_it():
    np.testing.assert_array_equal(gallery(5), range(5))
    np.testing.assert_array_equal(gallery(GALLERY), range(GALLERY))
    rows = gallery(3 * GALLERY)
    assert len(rows) == GALLERY and rows[0] == 0 and rows[-1] == 3 * GALLERY - 1
    assert set(np.diff(rows)) <= {3, 4}


def test_captions_of_other_images_are_not_asked_and_change_nothing(tmp_path):
    """Held out are a few of many: memory must not grow with the rest."""
    stored.write_data(tmp_path)
    ids, teacher = split_vectors(tmp_path, "val")
    found = text_retrieval(tmp_path, ids, teacher, teacher)
    ((captions,),) = database.connect(tmp_path).execute(
        "SELECT count(*) FROM texts WHERE list_contains(?, image_id)", [ids]
    ).fetchall()  # fmt: skip
    assert found.facts["queries"] == captions > 0
    fewer = text_retrieval(tmp_path, ids[:1], teacher[:1], teacher[:1])
    assert fewer is None or fewer.facts["queries"] < captions
    assert text_retrieval(tmp_path, ["nobody"], teacher[:1], teacher[:1]) is None


# Near duplicates


def test_held_out_images_whose_copy_is_in_training_are_counted(tmp_path):
    stored.write_data(tmp_path)
    _, held_out = split_vectors(tmp_path, "val")
    training = np.concatenate(list(training_vectors(tmp_path)))
    assert near_training_images(tmp_path, held_out)["above_0.90"].value == 0
    held_out[:3] = training[5:8]
    held_out[3] = training[0] + 0.4 * np.eye(len(training[0]))[0]  # near, but no copy
    held_out[3] /= np.linalg.norm(held_out[3])
    nearest = (held_out @ training.T).max(axis=1)
    assert NEAR[0] < nearest[3] < NEAR[-1]
    found = near_training_images(tmp_path, held_out)
    assert found.facts["images"] == len(held_out)
    for limit in NEAR:
        share = found[f"above_{limit:.2f}"].value
        assert share == (nearest > limit).mean() and share >= 3 / len(held_out)
