"""What the teacher says of a split, its vectors and their mean, and what people say: the labels."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.core.errors import PipelineError
from pipeline.data import database
from pipeline.data.remote_shards import exists
from pipeline.data.shards import (
    embedding_matrix,
    open_shard,
    row_groups,
    shard_paths,
    stored_embeddings,
    unit_rows,
)

KEPT = "SELECT image_id FROM selection WHERE keep AND split = ?"
LABELS = """
SELECT image_id, label FROM images JOIN (SELECT unnest(?::VARCHAR[]) AS image_id) USING (image_id)
WHERE status = 'ok' AND trim(label) <> ''
"""


def split_vectors(data: Path, split: str) -> tuple[list[str], np.ndarray]:
    """image_ids, sorted, and their (n, E) float32 unit teacher vectors at view 0.

    Raises PipelineError where the split keeps no image.
    """
    parts = list(_kept_vectors(data, split))
    if not parts:
        raise PipelineError(
            f"data/selection keeps no image for {split}. Change select.{split} in params.yaml, or "
            "evaluate.split, and run `dvc repro`."
        )
    ids = np.concatenate([part for part, _ in parts])
    order = np.argsort(ids)
    vectors = np.concatenate([vectors for _, vectors in parts])
    return [key.decode() for key in ids[order].tolist()], vectors[order]


def training_vectors(data: Path) -> Iterator[np.ndarray]:
    """Blocks (b, E) float32 of the training split's unit vectors; memory does not grow with it.

    Raises PipelineError where there is none.
    """
    empty = True
    for _, vectors in _kept_vectors(data, "train"):
        empty = False
        yield vectors
    if empty:
        raise PipelineError("data/selection keeps no image for train. Run `pipeline select`.")


def _kept_vectors(data: Path, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """image_ids (b,) as bytes and unit vectors (b, E) float32 that a split keeps.

    A row group at a time, in the shards' order: nothing is sorted, and no vector is held twice.
    """
    selected = database.connect(data).sql(KEPT, params=[split]).to_arrow_table()
    kept = np.sort(as_bytes(selected["image_id"]))
    for path in shard_paths(data / "teacher/images", "teacher_embed") if len(kept) else ():
        for ids, vectors in first_views(path):
            at = np.searchsorted(kept, ids).clip(max=len(kept) - 1)
            if (mine := kept[at] == ids).any():
                yield ids[mine], unit_rows(vectors[mine])


def first_views(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """image_ids (b,) as bytes and (b, E) float16 vectors of view 0, which comes first in a shard.

    A row group at a time. Raises PipelineError for a damaged shard.
    """
    with open_shard(path, "teacher_embed") as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["image_id", "view", "embedding"])
            if table.num_rows and table["view"][0].as_py() > 0:
                return
            if table.num_rows:
                yield as_bytes(table["image_id"]), stored_embeddings(table["embedding"])


def as_bytes(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """A column of ids -> (n,) fixed-width bytes: a tenth of the memory of Python strings."""
    return np.array(column.to_pylist(), dtype=bytes)


def indexed_vectors(index: Path, ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(n, E) float32 unit vectors of a student's index for these ids, sorted, and whether it has
    each of them (n,). A row group at a time: memory grows with n, not with the index."""
    keys = np.array(ids, dtype=bytes)
    vectors, known = np.zeros((len(keys), 0), np.float32), np.zeros(len(keys), bool)
    for path in sorted(index.glob("*.parquet")) if ids else ():
        for table in row_groups(path, "evaluate", ["image_id", "embedding"]):
            found = as_bytes(table["image_id"])
            at = np.searchsorted(keys, found).clip(max=len(keys) - 1)
            mine = np.flatnonzero(keys[at] == found)
            if len(mine):
                stored = embedding_matrix(table["embedding"].take(pa.array(mine)))
                if not vectors.shape[1]:
                    vectors = np.zeros((len(keys), stored.shape[1]), np.float32)
                vectors[at[mine]], known[at[mine]] = stored, True
    return vectors, known


def training_mean(data: Path) -> np.ndarray:
    """(E,) float32: mean of the training split's unit vectors."""
    total, count = 0.0, 0
    for vectors in training_vectors(data):
        total, count = total + vectors.sum(axis=0, dtype=np.float64), count + len(vectors)
    return np.asarray(total / count, np.float32)


def load_text_embeddings(
    data: Path, where: str, arguments: list
) -> tuple[list[str], list, np.ndarray]:
    """texts, their image_ids (None for prompts) and (n, E) unit vectors of stored texts.

    where: SQL condition over the table texts, with ? for the arguments.
    """
    sql = f"SELECT text, image_id, embedding FROM texts WHERE {where} ORDER BY image_id, text"
    texts, ids, matrices = [], [], [np.zeros((0, 1), np.float32)]
    for batch in _batches(data, sql, arguments):
        texts += batch["text"].to_pylist()
        ids += batch["image_id"].to_pylist()
        matrices.append(embedding_matrix(batch["embedding"]))
    return texts, ids, np.concatenate(matrices[1:]) if texts else matrices[0]


def caption_similarities(data: Path) -> pa.Table:
    """image_id and caption_similarity: the best cosine between an image and one of its captions.

    A shard at a time: the captions of a shard's images lie in the shard of the same name.
    """
    ids, best = [np.zeros(0, "S1")], [np.zeros(0, np.float32)]
    for path in shard_paths(data / "teacher/images", "teacher-embed"):
        views, captions = list(first_views(path)), data / "teacher/texts" / path.name
        if not views or not exists(captions):
            continue
        keys = np.concatenate([part for part, _ in views])
        order = np.argsort(keys)
        keys, vectors = keys[order], np.concatenate([part for _, part in views])[order]
        similarities = np.full(len(keys), -np.inf, np.float32)
        with open_shard(captions, "teacher-embed") as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["image_id", "embedding"])
                owners = as_bytes(table["image_id"])
                at = np.searchsorted(keys, owners).clip(max=len(keys) - 1)
                mine = np.flatnonzero(keys[at] == owners)
                texts = embedding_matrix(table["embedding"])[mine]
                images = unit_rows(vectors[at[mine]])
                np.maximum.at(similarities, at[mine], (images * texts).sum(axis=1))
        ids.append(keys[np.isfinite(similarities)])
        best.append(similarities[np.isfinite(similarities)])
    names = pa.array(np.concatenate(ids), pa.binary()).cast(pa.string())
    return pa.table({"image_id": names, "caption_similarity": pa.array(np.concatenate(best))})


def labels_of(data: Path, ids: list[str]) -> dict[str, str]:
    """image_id -> label, of those among ids that have one."""
    return dict(database.connect(data).execute(LABELS, [ids]).fetchall())


def _batches(data: Path, sql: str, arguments: list) -> Iterator[pa.RecordBatch]:
    result = database.connect(data).sql(sql, params=arguments)
    for batch in result.to_arrow_reader(10_000):
        if batch.num_rows:
            yield batch
