"""What the teacher says of a split, its vectors and their mean, and what people say: the labels."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.core.errors import PipelineError
from pipeline.data import database

VECTORS = """
SELECT image_id, embedding FROM teacher JOIN selection USING (image_id)
WHERE view = 0 AND keep AND split = ? ORDER BY image_id
"""
LABELS = """
SELECT image_id, label FROM images JOIN (SELECT unnest(?::VARCHAR[]) AS image_id) USING (image_id)
WHERE status = 'ok' AND trim(label) <> ''
"""


def split_vectors(data: Path, split: str) -> tuple[list[str], np.ndarray]:
    """image_ids, sorted, and their (n, E) float32 unit teacher vectors at view 0.

    Raises PipelineError where the split keeps no image.
    """
    ids, matrices = [], []
    for batch in _batches(data, VECTORS, [split]):
        ids += batch["image_id"].to_pylist()
        matrices.append(unit_rows(batch["embedding"]))
    if not ids:
        raise PipelineError(
            f"data/selection keeps no image for {split}. Change select.{split} in params.yaml, or "
            "evaluate.split, and run `dvc repro`."
        )
    return ids, np.concatenate(matrices)


def training_vectors(data: Path) -> Iterator[np.ndarray]:
    """Blocks (b, E) float32 of the training split's unit vectors; memory does not grow with it.

    Raises PipelineError where there is none.
    """
    count = 0
    for batch in _batches(data, VECTORS, ["train"]):
        count += len(batch)
        yield unit_rows(batch["embedding"])
    if not count:
        raise PipelineError("data/selection keeps no image for train. Run `pipeline select`.")


def training_mean(data: Path) -> np.ndarray:
    """(E,) float32: mean of the training split's unit vectors."""
    total, count = 0.0, 0
    for vectors in training_vectors(data):
        total, count = total + vectors.sum(axis=0, dtype=np.float64), count + len(vectors)
    return (total / count).astype(np.float32)


def text_vectors(data: Path, where: str, arguments: list) -> tuple[list[str], list, np.ndarray]:
    """texts, their image_ids (None for prompts) and (n, E) unit vectors of stored texts.

    where: SQL condition over the table texts, with ? for the arguments.
    """
    sql = f"SELECT text, image_id, embedding FROM texts WHERE {where} ORDER BY image_id, text"
    texts, ids, matrices = [], [], [np.zeros((0, 1), np.float32)]
    for batch in _batches(data, sql, arguments):
        texts += batch["text"].to_pylist()
        ids += batch["image_id"].to_pylist()
        matrices.append(unit_rows(batch["embedding"]))
    return texts, ids, np.concatenate(matrices[1:]) if texts else matrices[0]


def labels_of(data: Path, ids: list[str]) -> dict[str, str]:
    """image_id -> label, of those among ids that have one."""
    return dict(database.connect(data).execute(LABELS, [ids]).fetchall())


def unit_rows(column: pa.Array) -> np.ndarray:
    """A column of equally long lists -> (n, E) float32, rows of unit length."""
    matrix = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    matrix = matrix.reshape(len(column), -1)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True).clip(1e-12)


def _batches(data: Path, sql: str, arguments: list) -> Iterator[pa.RecordBatch]:
    result = database.connect(data).sql(sql, params=arguments)
    for batch in result.to_arrow_reader(10_000):
        if batch.num_rows:
            yield batch
