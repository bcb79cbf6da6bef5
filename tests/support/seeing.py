"""A world to search and look at that is written by hand, so that its answers are known."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.data import shards
from support import worlds

SIZE = 4  # embedding size of the world written by hand
NAMES = ["apple", "bread", "cloud", "door"]  # image i's teacher vector is the i-th unit vector


def handmade(data: Path, named_by: str = "caption") -> Path:
    """Four images and their vectors in data; the student takes the apple for bread and vice versa.

    Returns the folder of the student's index. Prompts: the names; captions (or what named_by is):
    "a picture of NAME".
    """
    teacher = np.eye(SIZE, dtype=np.float16)
    images = [
        {
            "row_id": f"r{i}",
            "image_id": name,
            "url": f"file:{name}.jpg",
            named_by: f"a picture of {name}",
            "status": "ok",
            "jpg": worlds.picture(i, kind="JPEG"),
        }
        for i, name in enumerate(NAMES)
    ]
    lost = {"row_id": "r9", "image_id": "apple", "url": "file:apple.jpg", "status": "duplicate_url"}
    write(data / "images/00000.parquet", shards.IMAGES, [*images, lost])
    views = [{"image_id": n, "view": 0, "embedding": teacher[i]} for i, n in enumerate(NAMES)]
    views += [{"image_id": n, "view": 1, "embedding": teacher[3]} for n in NAMES]
    schema = shards.teacher_schema(SIZE)  # whose row groups never mix views
    write(data / "teacher/images/00000.parquet", schema, views[: len(NAMES)], views[len(NAMES) :])
    texts = [{"text_id": n, "text": n, "embedding": teacher[i]} for i, n in enumerate(NAMES)]
    write(data / "teacher/texts/prompts.parquet", shards.texts_schema(SIZE), texts)
    student = teacher[[1, 0, 2, 3]]
    index = [{"image_id": n, "embedding": student[i]} for i, n in enumerate(NAMES)]
    write(data / "index/00000.parquet", shards.index_schema(SIZE), index)
    return data / "index"


def write(path: Path, schema: pa.Schema, *groups: list[dict]) -> None:
    """A shard of these row groups; what a row leaves out is null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shards.write_shard(path, schema, [_table(schema, rows) for rows in groups], {})


def _table(schema: pa.Schema, rows: list[dict]) -> pa.Table:
    columns = {}
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if field.name == "embedding":
            columns[field.name] = shards.embedding_column(np.stack(values).astype(np.float16))
        else:
            columns[field.name] = pa.array(values, field.type)
    return pa.table(columns)
