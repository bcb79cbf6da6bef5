"""Worlds to search and look at: one written by hand, whose answers are known, and one that went
through every stage.
"""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.core.config import DistillConfig, EvaluateConfig
from pipeline.data import shards
from support import worlds

SIZE = 4  # embedding size of the world written by hand
NAMES = ["apple", "bread", "cloud", "door"]  # image i's teacher vector is the i-th unit vector


def handmade(data: Path) -> Path:
    """Four images and their vectors in data; the student takes the apple for bread and vice versa.

    Returns the folder of the student's index. Prompts: the names; captions: "a picture of NAME".
    """
    teacher = np.eye(SIZE, dtype=np.float16)
    images = [
        {
            "row_id": f"r{i}",
            "image_id": name,
            "url": f"file:{name}.jpg",
            "caption": f"a picture of {name}",
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


_finished: dict[Path, Path] = {}


def finished(small_world: worlds.World, folder: Path) -> Path:
    """data/ of the small world after all five stages; made once a session, not to be changed."""
    if small_world.data not in _finished:
        from stages.distill import distill
        from stages.evaluate import evaluate
        from stages.select import select

        data = folder / "data"
        shutil.copytree(small_world.data, data)
        select(worlds.select_config(val=0.2, test=0.4), data)
        distill(distill_config(), data, device="cpu", workers=1)
        evaluate(evaluate_config(), data, device="cpu", workers=1)
        _finished[small_world.data] = data
    return _finished[small_world.data]


def distill_config() -> DistillConfig:
    student = {
        "image_size": worlds.IMAGE_SIZE, "patch_size": 8, "embedding_size": worlds.EMBEDDING_SIZE,
        "heads": 4, "layers": 2, "neighbourhood_mask": False, "same_norm": True,
        "pool": "extra-head", "temperature": 1.0,
    }  # fmt: skip
    loss = {"l1": 1.0, "cosine": 0.0, "relational": 0.0, "caption": 0.0}
    return DistillConfig(
        student=student, image_sizes=[worlds.IMAGE_SIZE],
        loss=loss, relational_scale=20.0, views=1, color_jitter=0.0,
        min_crop_area=1.0, mixup=0.0, fixed_stem_frequencies=0, steps=4, batch=8,
        learning_rate=0.01, schedule="cosine", warmup=0, weight_decay=0.0, max_grad_norm=1.0, ema=0.0,
        precision="float32", validate_every=2, shuffle_row_groups=4, seed=0, init=None,
        max_skipped_steps=0, early_stopping=0,
    )  # fmt: skip


def evaluate_config(**changes) -> EvaluateConfig:
    values = {"split": "test", "batch": 8, "prompts": ["a red circle", "never embedded"]}
    values |= {"templates": str(worlds.TEMPLATES), "segmentation": worlds.segmentation()}
    return EvaluateConfig(**values | changes)
