"""Near duplicates: images whose teacher embeddings are closer than a threshold are one group."""

from pathlib import Path

import numpy as np

from pipeline.data.shards import embedding_matrix, open_shard, shard_paths


def near_duplicate_groups(teacher: Path, threshold: float) -> list[list[str]]:
    """Groups (two or more image_ids, sorted) of images joined by cosine >= threshold, at view 0.

    Exact: every pair is compared, as blocks of matrix products, two shards in memory at a time.
    The time is quadratic in the number of images (about 1e6 pairs a millisecond and core).
    """
    shards = shard_paths(teacher / "images", "teacher-embed")
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for i, path in enumerate(shards):
        ids, vectors = _canonical(path)
        for j in range(i, len(shards)):
            others, other_vectors = (ids, vectors) if j == i else _canonical(shards[j])
            for start in range(0, len(ids), 1024):
                close = vectors[start : start + 1024] @ other_vectors.T >= threshold
                for a, b in np.argwhere(close):
                    if (first := ids[start + a]) != (second := others[b]):
                        low, high = sorted((root(first), root(second)))
                        parent[high] = low
    groups: dict[str, list[str]] = {}
    for key in sorted(parent):
        groups.setdefault(root(key), []).append(key)
    return [group for group in groups.values() if len(group) > 1]


def _canonical(path: Path) -> tuple[list[str], np.ndarray]:
    """image_ids and (n, E) unit embeddings of view 0, which comes first in a shard."""
    ids = []
    with open_shard(path, "teacher-embed") as file:
        size = file.schema_arrow.field("embedding").type.list_size
        matrices = [np.zeros((0, size), np.float32)]  # of a shard without a good image
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["image_id", "view", "embedding"])
            if table.num_rows and table["view"][0].as_py() > 0:
                break
            if table.num_rows:
                ids += table["image_id"].to_pylist()
                matrices.append(embedding_matrix(table["embedding"]))
    return ids, np.concatenate(matrices)
