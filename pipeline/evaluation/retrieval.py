"""Does a vector find its own image among all? And do student and teacher rank images alike?

n images, q queries, E embedding size. Images are the unit of every interval: captions of one image
succeed and fail together.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.core.records import Metric, MetricGroup
from pipeline.data.embeddings import load_text_embeddings, training_vectors
from pipeline.data.shards import unit_rows
from pipeline.evaluation.metrics import cosine, mean_interval, share_interval

DEPTHS = (1, 5, 10)
TIE = 1e-6  # of cosines: the product of equal rows differs in its last bits from place to place
RANKED = 1024  # texts, at most, for which all images are put in order: what takes longest
GALLERY = 10_000  # images, at most, among which one is looked for: each is compared with each
NEAR = (0.9, 0.95, 0.99)  # cosines of teacher vectors: alike, nearly the same, the same picture
COMPARED = 4096  # held-out images, at most, that are compared with all training images


class Ranks(NamedTuple):
    """Where each query's own image stands in the gallery."""

    above: np.ndarray  # (q,) how many images score higher
    tied: np.ndarray  # (q,) how many score the same, itself included


def ranks_of_own(queries: np.ndarray, gallery: np.ndarray, own: np.ndarray) -> Ranks:
    """Ranks of gallery row own[i] for query i by cosine.

    queries (q, E); gallery (n, E); own (q,) row numbers. Blocks of queries bound the memory.
    """
    gallery = unit_rows(gallery)
    above, tied = np.empty((2, len(queries)), np.int64)
    for start in range(0, len(queries), 1024):
        block = slice(start, start + 1024)
        scores = queries[block] @ gallery.T
        mine = scores[np.arange(len(scores)), own[block]][:, None]
        tie = np.abs(scores - mine) <= TIE
        above[block] = ((scores > mine) & ~tie).sum(axis=1)
        tied[block] = tie.sum(axis=1)
    return Ranks(above, tied)


def hits_at(k: int, ranks: Ranks) -> np.ndarray:
    """(q,) chance in [0, 1] that the own image is among the best k, ties drawn fairly."""
    return ((k - ranks.above) / ranks.tied).clip(0, 1)


def recall(ranks: Ranks, gallery_size: int, owners: np.ndarray | None = None) -> dict[str, Metric]:
    """R@1, R@5, R@10 with chance as the floor; owners (q,): the image of each query."""
    return {
        f"R@{k}": share_interval(hits_at(k, ranks), owners).beside(floor=min(1.0, k / gallery_size))
        for k in DEPTHS
    }


def gallery(images: int) -> np.ndarray:
    """Row numbers of the images that are searched, evenly spaced: all up to GALLERY of them."""
    return np.linspace(0, images - 1, min(images, GALLERY)).round().astype(int)


def image_retrieval(student: np.ndarray, teacher: np.ndarray) -> MetricGroup:
    """The student's vector of an image among the teacher's vectors of all images, (n, E) both."""
    own = np.arange(len(teacher))
    metrics = _with_ceiling(
        recall(ranks_of_own(student, teacher, own), len(teacher)),
        recall(ranks_of_own(teacher, teacher, own), len(teacher)),
    )
    return MetricGroup(metrics=metrics)


def text_retrieval(
    data: Path, ids: list[str], student: np.ndarray, teacher: np.ndarray
) -> MetricGroup | None:
    """A caption among the images, or None where no image of these has one.

    ids: of n images; student, teacher: (n, E) unit vectors. The ceiling is the teacher.
    """
    row_of = {key: i for i, key in enumerate(ids)}
    where = "image_id IN (SELECT unnest(?::VARCHAR[]))"  # the captions of others are not held
    texts, text_ids, vectors = load_text_embeddings(data, where, [ids])
    if not texts:
        return None
    own = np.array([row_of[key] for key in text_ids])
    by_student, by_teacher = (
        recall(ranks_of_own(vectors, side, own), len(ids), own) for side in (student, teacher)
    )
    metrics = _with_ceiling(by_student, by_teacher) | {
        "overlap@10": _overlap(vectors, student, teacher, own),
        "rank_correlation": _rank_correlation(vectors, student, teacher, own),
    }
    counts = {"queries": len(texts), "distinct_texts": len(set(texts))}
    return MetricGroup(metrics=metrics, facts=counts)


def near_training_images(data: Path, vectors: np.ndarray) -> MetricGroup:
    """Share of held-out images whose nearest training image is above each cosine of NEAR.

    vectors (n, E): the teacher's, of the held-out images. What is above .95 is in training almost
    as it is, so a high share makes every other figure too good. At most COMPARED images, evenly
    spaced.
    """
    some = np.linspace(0, len(vectors) - 1, min(len(vectors), COMPARED)).round().astype(int)
    nearest = np.full(len(some), -1.0, np.float32)
    for block in training_vectors(data):
        np.maximum(nearest, (vectors[some] @ block.T).max(axis=1), out=nearest)
    shares = {f"above_{limit:.2f}": share_interval(nearest > limit) for limit in NEAR}
    counts = {"images": len(some), "median_cosine": float(np.median(nearest))}
    return MetricGroup(metrics=shares, facts=counts)


def overlap_at(k: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(q,) share of the best k that two (q, n) score matrices have in common."""
    k = min(k, a.shape[1])
    best_a, best_b = (np.argpartition(-scores, k - 1, axis=1)[:, :k] for scores in (a, b))
    pairs = zip(best_a, best_b, strict=True)
    return np.array([len(np.intersect1d(x, y)) / k for x, y in pairs])


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(q,) Spearman's correlation in [-1, 1] of each two rows of (q, n) score matrices.

    Equal scores share the mean of their ranks; a row of equal scores says nothing: 0.
    """
    a, b = (np.stack([_mean_ranks(row) for row in scores]) for scores in (a, b))
    return cosine(a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True))


def _mean_ranks(scores: np.ndarray) -> np.ndarray:
    """(n,) how many scores are less, plus half of those that are equal."""
    ordered = np.sort(scores)
    below, up_to = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
    return (below + up_to) / 2


def _with_ceiling(student: dict[str, Metric], teacher: dict[str, Metric]) -> dict[str, Metric]:
    return {k: metric.beside(ceiling=teacher[k].value) for k, metric in student.items()}


def _overlap(
    texts: np.ndarray, student: np.ndarray, teacher: np.ndarray, own: np.ndarray
) -> Metric:
    """Agreement of the ten best images of a text, by student and by teacher."""
    shares = _per_text(partial(overlap_at, 10), texts, student, teacher)
    return mean_interval(shares, own).beside(floor=min(1.0, 10 / len(student)), ceiling=1.0)


def _rank_correlation(
    texts: np.ndarray, student: np.ndarray, teacher: np.ndarray, own: np.ndarray
) -> Metric:
    """Agreement on the order of all images for a text; of RANKED texts, evenly spaced, at most."""
    some = np.linspace(0, len(texts) - 1, min(len(texts), RANKED)).round().astype(int)
    agreement = _per_text(rank_correlation, texts[some], student, teacher)
    return mean_interval(agreement, own[some]).beside(floor=0.0, ceiling=1.0)


def _per_text(
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    texts: np.ndarray,
    student: np.ndarray,
    teacher: np.ndarray,
) -> np.ndarray:
    """A measure of two score matrices for all texts; blocks of them bound the memory."""
    blocks = np.array_split(texts, -(-len(texts) // 256))
    return np.concatenate([measure(block @ student.T, block @ teacher.T) for block in blocks])
