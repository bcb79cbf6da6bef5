"""How good a student is: every figure beside its floor and its ceiling, with a 95 % interval.

The floor of fidelity is the mean training embedding, given for every image: a student that learned
nothing but the mean. The ceiling is the teacher itself. n images, E embedding size.
"""

import numpy as np

RANKS = (1, 5, 10)
TIE = 1e-6  # of cosines: the product of equal rows differs in its last bits from place to place


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """Mean and its 95 % interval, by the normal approximation; one value has no width."""
    values = np.asarray(values, np.float64)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    mean = values.mean()
    return {"value": float(mean), "low": float(mean - half), "high": float(mean + half)}


def share_interval(hits: np.ndarray) -> dict[str, float]:
    """Share of true values and its 95 % interval, by Wilson's score (1927)."""
    n, z = len(hits), 1.96
    share = float(np.mean(hits))
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return {"value": share, "low": float(centre - half), "high": float(centre + half)}


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) cosines of the rows of two (n, E) arrays; a zero row has cosine 0."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / np.maximum(lengths, 1e-12)


def fidelity(student: np.ndarray, teacher: np.ndarray, mean: np.ndarray) -> dict[str, dict]:
    """Distance of student to teacher vectors, (n, E) each; mean (E,) of the training targets.

    cosine; l1_norm100: mean absolute difference of unit vectors times 100, the published loss;
    centred_cosine: both sides minus the mean, where predicting the mean is worth 0.
    """
    unit = student / np.linalg.norm(student, axis=1, keepdims=True).clip(1e-12)
    constant = np.broadcast_to(mean / np.linalg.norm(mean), teacher.shape)
    centred = cosine(unit - mean, teacher - mean)
    return {
        "cosine": mean_interval(cosine(unit, teacher))
        | {"floor": float(cosine(constant, teacher).mean()), "ceiling": 1.0},
        "l1_norm100": mean_interval(100 * np.abs(unit - teacher).mean(axis=1))
        | {"floor": float(100 * np.abs(constant - teacher).mean()), "ceiling": 0.0},
        "centred_cosine": mean_interval(centred) | {"floor": 0.0, "ceiling": 1.0},
    }


def ranks_of_own(queries: np.ndarray, gallery: np.ndarray, own: np.ndarray) -> np.ndarray:
    """(q,) rank, from 0, of gallery row own[i] for query i by cosine; a tie counts half.

    queries (q, E); gallery (n, E); own (q,) row numbers. Blocks of queries bound the memory.
    """
    gallery = gallery / np.linalg.norm(gallery, axis=1, keepdims=True).clip(1e-12)
    ranks = np.empty(len(queries))
    for start in range(0, len(queries), 1024):
        block = slice(start, start + 1024)
        scores = queries[block] @ gallery.T
        mine = scores[np.arange(len(scores)), own[block]][:, None]
        tie = np.abs(scores - mine) <= TIE
        ranks[block] = ((scores > mine) & ~tie).sum(axis=1) + (tie.sum(axis=1) - 1) / 2
    return ranks


def recall(ranks: np.ndarray, gallery_size: int) -> dict[str, dict]:
    """R@1, R@5, R@10 with chance as the floor."""
    return {
        f"R@{k}": share_interval(ranks < k) | {"floor": min(1.0, k / gallery_size)} for k in RANKS
    }


def pointing(
    activation: np.ndarray, centres: np.ndarray, boxes: np.ndarray
) -> dict[str, np.ndarray]:
    """Where does a text light up: per row, for r (image, text) pairs over N patches.

    activation (r, N): cosine of patches and text; centres (r, N, 2): patch centres x, y in px;
    boxes (r, 4): x0, y0, x1, y1 in the same px. Returns (r,) arrays:
    hit: the strongest patch's centre lies in the box (the pointing game, Zhang et al. 2018);
    energy: share of the positive activation that lies in the box (Wang et al. 2020, Score-CAM);
    area: share of the patches in the box, what a random patch hits; centre: the middle of all
    patches lies in the box.
    """
    x, y = centres[..., 0], centres[..., 1]
    x0, y0, x1, y1 = (boxes[:, i : i + 1] for i in range(4))
    inside = (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)  # (r, N)
    positive = activation.clip(0)
    middle_x, middle_y = x.mean(axis=1, keepdims=True), y.mean(axis=1, keepdims=True)
    in_middle = (x0 <= middle_x) & (middle_x <= x1) & (y0 <= middle_y) & (middle_y <= y1)
    return {
        "hit": inside[np.arange(len(inside)), activation.argmax(axis=1)],
        "energy": (positive * inside).sum(axis=1) / positive.sum(axis=1).clip(1e-12),
        "area": inside.mean(axis=1),
        "centre": in_middle[:, 0],
    }


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


def zero_shot(images: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(n,) true where the nearest of (c, E) class vectors to an (n, E) image is its label's."""
    return (images @ classes.T).argmax(axis=1) == labels
