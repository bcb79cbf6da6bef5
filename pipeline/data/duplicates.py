"""Near duplicates: images whose teacher embeddings are closer than a threshold are one group.

m distinct vectors, E embedding size. Up to EXACT of them all pairs are compared. Above it the vectors
are parted into cells by k-means (faiss), each lies in the cells of its two nearest centres, and pairs
are compared within a cell; how many pairs that misses is measured on a sample and said.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds

from pipeline.core.errors import PipelineError
from pipeline.data.embeddings import first_views
from pipeline.data.remote_shards import FILES, are_remote
from pipeline.data.scratch import scratch_array
from pipeline.data.shards import shard_paths, unit_rows

VERSION = 1  # raise it when the same vectors give other groups

EXACT = 100_000  # vectors up to which all pairs are compared: 2 minutes on two old cores
BLOCK = 1_024  # rows of a matrix product
CELL = 16_384  # members of a cell that are compared with each other; more are compared with these
CENTRES = 2  # cells that a vector lies in
SAMPLE = 256  # vectors on which recall is measured
EDGES = 4_000_000  # pairs that are held before they become a forest
_SEED = 0

Edges = Iterator[tuple[np.ndarray, np.ndarray]]  # rows (p,) and rows (p,): pairs that are close


def near_duplicate_groups(
    teacher: Path, threshold: float, say: Callable[[str], object] = print
) -> list[list[str]]:
    """Groups (two or more image_ids, sorted) of images joined by cosine >= threshold, at view 0.

    say: is told how an approximate answer was had, and its recall. Raises PipelineError where
    there are too many images for all pairs and faiss is not installed.
    """
    ids, vectors = _all_vectors(teacher)
    if not len(ids):
        return []
    first, of_row = _distinct(vectors)
    chosen = vectors if len(first) == len(ids) else _taken(vectors, first)
    if len(first) <= EXACT:
        labels = _components(len(first), _all_pairs(chosen, threshold))
    else:
        labels = _components(len(first), _pairs_in_cells(chosen, threshold))
        say(_recall(chosen, labels, threshold))
    return _groups(ids, labels[of_row])


def _all_vectors(teacher: Path) -> tuple[np.ndarray, np.ndarray]:
    """image_ids (n,) as bytes and (n, E) float16 stored vectors of view 0."""
    paths = shard_paths(teacher / "images", "teacher_embed")
    files = FILES if are_remote(paths) else None
    dataset = ds.dataset([str(path) for path in paths], filesystem=files)
    rows = dataset.count_rows(filter=ds.field("view") == 0)
    ids, vectors, done = [], None, 0
    for path in paths:
        for keys, stored in first_views(path):
            if vectors is None:
                vectors = scratch_array((rows, stored.shape[1]), np.float16)
            vectors[done : done + len(keys)] = stored
            ids.append(keys)
            done += len(keys)
    if vectors is None:
        return np.zeros(0, "S1"), np.zeros((0, 1), np.float16)
    return np.concatenate(ids), vectors[:done]


def _distinct(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (m,) that are the first of their bits, and for each of the n rows its place among them.

    A thousand copies of one picture are one vector, not half a million pairs.
    """
    weights = np.random.default_rng(_SEED).integers(1, 1 << 63, vectors.shape[1], np.uint64) | 1
    hashes = np.empty(len(vectors), np.uint64)
    for rows in _blocks(len(vectors), BLOCK * 16):
        bits = np.ascontiguousarray(vectors[rows]).view(np.uint16).astype(np.uint64)
        hashes[rows] = (bits * weights).sum(axis=1, dtype=np.uint64)  # modulo 2^64
    _, first, of_row = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # by row, not by hash
    return first[order], np.argsort(order)[of_row]


def _taken(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    taken = scratch_array((len(rows), vectors.shape[1]), vectors.dtype)
    for part in _blocks(len(rows), BLOCK * 16):
        taken[part] = vectors[rows[part]]
    return taken


def _blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _all_pairs(vectors: np.ndarray, threshold: float) -> Edges:
    everything = unit_rows(vectors)
    yield from _close(np.arange(len(vectors)), everything, everything, threshold)


def _close(rows: np.ndarray, some: np.ndarray, others: np.ndarray, threshold: float) -> Edges:
    """Pairs among some (s, E) and others (o, E), which begin with some; rows: names of others."""
    for part in _blocks(len(some), BLOCK):
        a, b = np.nonzero(some[part] @ others[part.start :].T >= threshold)
        yield rows[part.start + a], rows[part.start + b]


def _pairs_in_cells(vectors: np.ndarray, threshold: float) -> Edges:
    """Pairs that share a cell; in a cell of more than CELL each chunk meets itself and the first."""
    cells = _nearest_centres(vectors)  # (m, CENTRES)
    order = np.argsort(cells.reshape(-1), kind="stable")
    members = order // CENTRES
    edges = np.flatnonzero(np.diff(cells.reshape(-1)[order])) + 1
    for rows in np.split(members, edges):
        anchors = rows[:CELL]
        for part in _blocks(len(rows), CELL):
            chunk = rows[part]
            mine = unit_rows(vectors[chunk])
            yield from _close(chunk, mine, mine, threshold)
            if part.start:
                both = np.concatenate([chunk, anchors])
                yield from _close(
                    both, mine, np.concatenate([mine, unit_rows(vectors[anchors])]), threshold
                )


def _nearest_centres(vectors: np.ndarray) -> np.ndarray:
    """(m, CENTRES) numbers of the nearest of about 2 sqrt(m) centres."""
    try:
        import faiss
    except ImportError:
        raise PipelineError(
            f"{len(vectors)} images are too many to compare all pairs. Install faiss "
            "(pip install 'extrahead[scale]'), or set select.near_duplicates: 1.0."
        ) from None
    count = int(2 * len(vectors) ** 0.5)
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(vectors))[: 40 * count])
    kmeans = faiss.Kmeans(
        vectors.shape[1], count, niter=8, seed=_SEED + 1, spherical=True, max_points_per_centroid=40
    )
    kmeans.train(unit_rows(vectors[rows]))
    cells = np.empty((len(vectors), CENTRES), np.int32)
    for part in _blocks(len(vectors), BLOCK * 16):
        cells[part] = kmeans.index.search(unit_rows(vectors[part]), CENTRES)[1]
    return cells


def _components(count: int, edges: Edges) -> np.ndarray:
    """(count,) numbers of the connected components; at most EDGES pairs are held at a time."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    def labelled() -> np.ndarray:
        a, b = (np.concatenate(side) for side in zip(*held, strict=True))
        graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(count, count))
        return connected_components(graph, directed=False)[1]

    nothing = np.zeros(0, np.int64)
    held, size = [(nothing, nothing)], 0
    for a, b in edges:
        apart = a != b
        held.append((a[apart], b[apart]))
        size += int(apart.sum())
        if size > EDGES:  # a forest says the same with fewer pairs
            labels = labelled()
            representative = np.unique(labels, return_index=True)[1]
            held, size = [(np.arange(count), representative[labels])], 0
    return labelled()


def _recall(vectors: np.ndarray, labels: np.ndarray, threshold: float) -> str:
    """How many of the close pairs of some vectors, with all others, are in one group."""
    rows = np.sort(np.random.default_rng(_SEED).permutation(len(vectors))[:SAMPLE])
    some, pairs, joined = unit_rows(vectors[rows]), 0, 0
    for part in _blocks(len(vectors), BLOCK * 16):
        a, b = np.nonzero(some @ unit_rows(vectors[part]).T >= threshold)
        b += part.start
        apart = rows[a] != b
        pairs += int(apart.sum())
        joined += int((labels[rows[a[apart]]] == labels[b[apart]]).sum())
    share = f"{joined / pairs:.3f}" if pairs else "unknown, for the sample has none"
    return (
        f"near duplicates among {len(vectors)} distinct vectors, approximately: of {pairs} close "
        f"pairs of {len(rows)} sampled images {joined} are in one group (recall {share})."
    )


def _groups(ids: np.ndarray, labels: np.ndarray) -> list[list[str]]:
    """Sorted ids of each label that two or more rows have, by their first."""
    order = np.lexsort((ids, labels))
    parts = np.split(ids[order], np.flatnonzero(np.diff(labels[order])) + 1)
    return sorted([key.decode() for key in part.tolist()] for part in parts if len(part) > 1)
