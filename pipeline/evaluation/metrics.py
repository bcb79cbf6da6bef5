"""How good a student is: every figure beside its floor and its ceiling, with a 95 % interval.

The floor of fidelity is the mean training embedding, given for every image: a student that learned
nothing but the mean. The ceiling is the teacher itself. n images, E embedding size.
"""

import numpy as np

from pipeline.core.records import Metric, MetricGroup
from pipeline.data.shards import unit_rows


def mean_interval(values: np.ndarray, owners: np.ndarray | None = None) -> Metric:
    """Mean and its 95 % interval, by the normal approximation; one owner has no width.

    owners (n,): the image that each value belongs to; None: each to one of its own. Images are
    drawn, not their captions or boxes, so values of one image vary together (Liang & Zeger 1986:
    the sums of the residuals by image, as if they were the values).
    """
    values = np.asarray(values, np.float64)
    sums, mean = _residual_sums(values, owners), values.mean()
    n = len(sums)
    half = 1.96 * np.sqrt(n / (n - 1) * (sums**2).sum()) / len(values) if n > 1 else 0.0
    return Metric(value=float(mean), low=float(mean - half), high=float(mean + half))


def share_interval(hits: np.ndarray, owners: np.ndarray | None = None) -> Metric:
    """Share of hits, each in [0, 1], and its 95 % interval, by Wilson's score (1927).

    owners (n,): the image that each hit belongs to, as in `mean_interval`: the interval is that of
    as many independent hits as vary as much, and of one an image where all hits are alike.
    """
    hits, z = np.asarray(hits, np.float64), 1.96
    share = float(hits.mean())
    n = _independent(hits, owners)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Metric(value=share, low=float(centre - half), high=float(centre + half))


def _independent(hits: np.ndarray, owners: np.ndarray | None) -> float:
    """How many independent hits are worth these: their number over the design effect (Kish 1965)."""
    sums, squares = _residual_sums(hits, owners), ((hits - hits.mean()) ** 2).sum()
    n, clusters = len(hits), len(sums)
    if clusters == n:
        return n
    if clusters == 1 or squares == 0:
        return clusters
    effect = clusters / (clusters - 1) * (sums**2).sum() / (n / (n - 1) * squares)
    return n / max(effect, 1.0)


def _residual_sums(values: np.ndarray, owners: np.ndarray | None) -> np.ndarray:
    """(images,) what the values of each image have above the mean of all, added up."""
    residuals = values - values.mean()
    if owners is None:
        return residuals
    _, cluster = np.unique(owners, return_inverse=True)
    return np.bincount(cluster, weights=residuals)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) cosines of the rows of two (n, E) arrays; a zero row has cosine 0."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / np.maximum(lengths, 1e-12)


def fidelity(student: np.ndarray, teacher: np.ndarray, mean: np.ndarray) -> MetricGroup:
    """Distance of student to teacher vectors, (n, E) each; mean (E,) of the training targets.

    cosine; l1_norm100: mean absolute difference of unit vectors times 100, the published loss;
    centred_cosine: both sides minus the mean, where predicting the mean is worth 0.
    """
    unit = unit_rows(student)
    constant = np.broadcast_to(mean / np.linalg.norm(mean), teacher.shape)
    centred = cosine(unit - mean, teacher - mean)
    l1 = mean_interval(100 * np.abs(unit - teacher).mean(axis=1))
    metrics = {
        "cosine": mean_interval(cosine(unit, teacher)).beside(
            floor=float(cosine(constant, teacher).mean()), ceiling=1.0
        ),
        "l1_norm100": l1.beside(floor=float(100 * np.abs(constant - teacher).mean()), ceiling=0.0),
        "centred_cosine": mean_interval(centred).beside(floor=0.0, ceiling=1.0),
    }
    return MetricGroup(metrics=metrics)


def pointing(activation: np.ndarray, inside: np.ndarray) -> dict[str, np.ndarray]:
    """Where does a text light up: per row, for r (image, text) pairs over N patches.

    activation (r, N): cosine of patches and text; inside (r, N): whether a patch's centre lies in
    a box of that text. Returns (r,) arrays:
    hit: the strongest patch lies in a box (the pointing game, Zhang et al. 2018);
    energy: share of the positive activation that lies in a box (Wang et al. 2020, Score-CAM);
    area: share of the patches in a box, what a random patch hits;
    reachable: some patch lies in a box; the others no map can hit.
    """
    positive = activation.clip(0)
    return {
        "hit": np.take_along_axis(inside, activation.argmax(axis=1)[:, None], axis=1)[:, 0],
        "energy": (positive * inside).sum(axis=1) / positive.sum(axis=1).clip(1e-12),
        "area": np.asarray(inside.mean(axis=1)),
        "reachable": np.asarray(inside.any(axis=1)),
    }


def zero_shot(images: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) true where the nearest of (c, E) class vectors to an (n, E) image is its label's."""
    return (images @ classes.T).argmax(axis=1) == labels
