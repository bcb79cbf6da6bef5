"""Does a search for a thing find images that hold it? Measured where boxes name what images hold.

t texts, n images of a block, k best ones, E embedding size. The collection is that of `pipeline
search`: every indexed image, training images too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np

from pipeline.core.records import Metric, MetricGroup
from pipeline.data import database
from pipeline.data.embeddings import load_text_embeddings
from pipeline.data.shards import embedding_matrix
from pipeline.evaluation.metrics import mean_interval

DEPTH = 8  # images that a search shows
MOST_TEXTS = 1000  # the most frequent texts of boxes


class Block(NamedTuple):
    """Some images of the collection."""

    student: np.ndarray  # (n, E) unit vectors
    teacher: np.ndarray  # (n, E)
    right: np.ndarray  # (t, n) bool: the image has a box of the text


def box_search_metrics(data: Path, index: Path) -> MetricGroup | None:
    """precision@8 over the texts of boxes, and of the worst text; None where no text has 8 images.

    Beside each the share of images that hold the thing (floor) and the teacher's own precision
    (ceiling). index: folder of the student's vectors. Memory is that of a block of images.
    """
    stored, _, vectors = load_text_embeddings(data, "image_id IS NULL", [])
    connection = database.connect(data, index)
    frequent = connection.execute(FREQUENT, [stored, DEPTH, MOST_TEXTS]).fetchall()
    if not frequent:
        return None
    texts = sorted(text for text, _ in frequent)
    row_of = {text: row for row, text in enumerate(stored)}
    queries = vectors[[row_of[text] for text in texts]]  # (t, E)
    images, right = 0, np.zeros(len(texts))
    by_student, by_teacher = Best(len(texts), DEPTH), Best(len(texts), DEPTH)
    for block in _blocks(connection, index, texts):
        by_student.add(queries @ block.student.T, block.right)
        by_teacher.add(queries @ block.teacher.T, block.right)
        images, right = images + block.right.shape[1], right + block.right.sum(axis=1)
    student, teacher = by_student.precision(), by_teacher.precision()
    worst = int(student.argmin())
    mean, least = mean_interval(student), float(student[worst])
    metrics = {
        f"precision@{DEPTH}": mean.beside(
            floor=float((right / images).mean()), ceiling=float(teacher.mean())
        ),
        f"worst_precision@{DEPTH}": Metric(
            value=least,
            low=least,  # one search: there is nothing to draw again
            high=least,
            floor=float(right[worst] / images),
            ceiling=float(teacher.min()),
        ),
    }
    facts = {
        "texts": len(texts),
        "worst_text": texts[worst],
        "worst_text_of_the_teacher": texts[int(teacher.argmin())],
    }
    return MetricGroup(metrics=metrics, facts=facts)


class Best:
    """The k best images of each of t texts, of all blocks so far, and which of them are right."""

    def __init__(self, texts: int, k: int) -> None:
        self.scores = np.full((texts, k), -np.inf, np.float32)
        self.right = np.zeros((texts, k), bool)

    def add(self, scores: np.ndarray, right: np.ndarray) -> None:
        """(t, n) scores and whether each image is right; earlier images win ties."""
        scores = np.concatenate([self.scores, scores], axis=1)
        right = np.concatenate([self.right, right], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self.scores.shape[1]]
        self.scores = np.take_along_axis(scores, best, axis=1)
        self.right = np.take_along_axis(right, best, axis=1)

    def precision(self) -> np.ndarray:
        """(t,) share of right images among the best."""
        return self.right.mean(axis=1)


def _blocks(
    connection: duckdb.DuckDBPyConnection, index: Path, texts: list[str]
) -> Iterator[Block]:
    number = {text: i for i, text in enumerate(texts)}
    pairs = connection.sql(PAIRS, params=[str(index.resolve() / "*.parquet")])
    for batch in pairs.to_arrow_reader(10_000):
        right = np.zeros((len(texts), batch.num_rows), bool)
        for image, named in enumerate(batch["texts"].to_pylist()):
            right[[number[text] for text in named or () if text in number], image] = True
        if batch.num_rows:
            yield Block(
                embedding_matrix(batch["student"]), embedding_matrix(batch["teacher"]), right
            )


# Texts that are stored and named by boxes of at least so many images, the most frequent first.
FREQUENT = """
SELECT text, count(DISTINCT image_id) AS images FROM (
    SELECT image_id, unnest(boxes).text AS text FROM images JOIN selection USING (image_id)
    WHERE status = 'ok' AND keep
) WHERE list_contains(?::VARCHAR[], text)
GROUP BY text HAVING images >= ? ORDER BY images DESC, text LIMIT ?
"""
PAIRS = """
SELECT index.embedding AS student, teacher.embedding AS teacher,
       list_transform(boxes, lambda b: b.text) AS texts
FROM read_parquet(?) AS index JOIN teacher USING (image_id) JOIN images USING (image_id)
WHERE view = 0 AND status = 'ok' ORDER BY image_id
"""
