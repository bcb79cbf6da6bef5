"""The collection's vectors, student beside teacher, and the nearest of them to a query.

n images, E embedding size. A small collection is in memory as float32. A large one stays float16, as
it is stored, in mapped files without a name; a float16 product then chooses candidates, which are
compared again in float32, so that the answer is that of float32.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.data.embeddings import as_bytes, first_views
from pipeline.data.scratch import scratch_array
from pipeline.data.shards import open_shard, shard_paths, stored_embeddings, unit_rows

SMALL = 50_000  # images up to which float32 in memory is faster than importing torch
MARGIN = 4e-3  # no float16 product of two unit vectors is further from the true one
BLOCK = 16_384  # rows that are looked at in float32 at a time


class Sides(NamedTuple):
    """ids (n,) sorted, as bytes; the student's and the teacher's vectors (n, E) of these images."""

    ids: np.ndarray
    student: np.ndarray
    teacher: np.ndarray


def load_sides(data: Path, index: Path) -> Sides:
    """Every image of a student's index that has a teacher vector at view 0.

    Raises PipelineError where there is none, or a shard is damaged.
    """
    paths = shard_paths(index, "evaluate")
    ids = _index_ids(paths)
    order = np.argsort(ids, kind="stable")
    ids, rank = ids[order], np.argsort(order)  # rank: of each row of the index
    student = teacher = np.zeros((len(ids), 0), np.float16)
    done = 0
    for path in paths:
        with open_shard(path, "evaluate") as file:
            for batch in file.iter_batches(BLOCK, columns=["embedding"]):
                stored = stored_embeddings(batch["embedding"])
                if not student.shape[1]:
                    student = scratch_array((len(ids), stored.shape[1]), np.float16)
                student[rank[done : done + len(stored)]] = stored
                done += len(stored)
    known = np.zeros(len(ids), bool)
    for path in shard_paths(data / "teacher/images", "teacher_embed") if len(ids) else ():
        for keys, stored in first_views(path):
            if not teacher.shape[1]:
                teacher = scratch_array((len(ids), stored.shape[1]), np.float16)
            at = np.searchsorted(ids, keys).clip(max=len(ids) - 1)
            mine = ids[at] == keys
            teacher[at[mine]] = stored[mine]
            known[at[mine]] = True
    if not known.any():
        raise PipelineError(
            "the index holds no image that has a teacher vector. Run `pipeline evaluate`."
        )
    if not known.all():
        ids, student, teacher = ids[known], student[known], teacher[known]
    if len(ids) <= SMALL:
        student, teacher = unit_rows(student), unit_rows(teacher)
    return Sides(ids, student, teacher)


def _index_ids(paths: list[Path]) -> np.ndarray:
    parts = [np.zeros(0, "S1")]
    for path in paths:
        with open_shard(path, "evaluate") as file:
            for batch in file.iter_batches(BLOCK, columns=["image_id"]):
                parts.append(as_bytes(batch["image_id"]))
    return np.concatenate(parts)


def nearest(vectors: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and scores of the k largest inner products, best first; ties by row number.

    vectors (n, E) float32, or float16 of unit length up to rounding; query (E,) float32 -> two
    (min(k, n),) arrays.
    """
    k = min(k, len(vectors))
    if vectors.dtype != np.float16:
        return _largest(np.arange(len(vectors)), vectors @ query, k)
    import torch

    half = torch.from_numpy(vectors) @ torch.from_numpy(query.astype(np.float16))
    rough = half.float().numpy()  # (n,)
    least = np.partition(rough, -k)[-k] - 2 * MARGIN * np.linalg.norm(query)
    rows = np.flatnonzero(rough >= least)
    parts = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    return _largest(rows, np.concatenate([unit_rows(vectors[part]) @ query for part in parts]), k)


def _largest(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the largest scores, best first; ties by row number (rows are sorted)."""
    least = np.partition(scores, -k)[-k]
    best = np.flatnonzero(scores >= least)
    best = best[np.argsort(-scores[best], kind="stable")][:k]
    return rows[best], scores[best]
