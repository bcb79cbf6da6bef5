"""data/ as stage one and select leave it, written directly: many small row groups, two views."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.core.config import DistillConfig
from pipeline.data import shards
from pipeline.data.views import canonical_view
from support import worlds

SIZE, GROUP, PER_SHARD, VIEWS = 32, 5, 23, 2  # embedding size, rows a group, rows a shard


def write_data(data: Path, count: int = 60, damaged: tuple[int, ...] = ()) -> list[str]:
    """Good rows `{i:032x}`, i < count, but every seventh is held out and every eleventh left out.

    Pictures of the damaged rows do not decode. Target of row i and view v: a unit vector drawn
    from (i, v); every third row has two captions. Returns the image_ids of the training rows.
    """
    selection = []
    for start in range(0, count, PER_SHARD):
        numbers = range(start, min(start + PER_SHARD, count))
        name, rows = f"{start // PER_SHARD:05}.parquet", [image(i, i in damaged) for i in numbers]
        groups = [rows[k : k + GROUP] for k in range(0, len(rows), GROUP)]
        teacher = [[target(row, v) for row in group] for v in range(VIEWS) for group in groups]
        texts = [
            [text(row, t) for row in group for t in range(2 if row["attempts"] % 3 == 0 else 0)]
            for group in groups
        ]
        _write(data / "images" / name, shards.IMAGES, groups)
        _write(data / "teacher/images" / name, shards.teacher_schema(SIZE), teacher)
        _write(data / "teacher/texts" / name, shards.texts_schema(SIZE), texts)
        for i, row in zip(numbers, rows, strict=True):
            kept = {"split": "val" if i % 7 == 0 else "train", "keep": i % 11 != 10}
            selection.append({"image_id": row["image_id"]} | kept)
    _write(data / "selection/selection.parquet", shards.SELECTION, [selection])
    return [s["image_id"] for s in selection if s["keep"] and s["split"] == "train"]


def image(number: int, damaged: bool) -> dict:
    jpg = worlds.picture(number, 48, 40, "JPEG", quality=95)
    name = f"{number:032x}"
    return {
        "row_id": name, "image_id": name, "url": name, "status": "ok", "attempts": number,
        "sha256": name * 2, "sha256_original": name * 2, "width": 48, "height": 40,
        "jpg": b"no picture" if damaged else jpg,
    }  # fmt: skip


def vector(*key: int) -> np.ndarray:
    """(SIZE,) float16 of unit length, a function of key."""
    return shards.to_float16(np.random.default_rng(key).normal(size=(1, SIZE)))[0]


def target(row: dict, view: int) -> dict:
    """View 1 is the right half, mirrored."""
    box = canonical_view(row["width"], row["height"])
    if view:
        box = box._replace(left=24.0, right=48.0, flip=True)
    found = {"image_id": row["image_id"], "view": view, "sha256": row["sha256"]}
    return found | box._asdict() | {"embedding": vector(row["attempts"], view)}


def text(row: dict, number: int) -> dict:
    found = {"image_id": row["image_id"], "text": f"text {number}"}
    return found | {"embedding": vector(row["attempts"], 100 + number)}


def decoded(number: int) -> np.ndarray:
    """(40, 48, 3) uint8: the stored picture by another decoder."""
    return np.asarray(Image.open(io.BytesIO(image(number, False)["jpg"])))


def distill_config(**changes) -> DistillConfig:
    student = {
        "image_size": 32, "patch_size": 8, "embedding_size": SIZE, "heads": 4, "layers": 1,
        "neighbourhood_mask": True, "same_norm": True, "pool": "extra-head", "temperature": 1.0,
    }  # fmt: skip
    values = dict(
        student=student, init=None, loss={"l1": 1.0, "cosine": 0.0, "relational": 0.5, "caption": 0.1},
        image_sizes=[32], relational_scale=20.0, views=2, color_jitter=0.1, min_crop_area=1.0, mixup=0.0,
        fixed_stem_frequencies=0,
        steps=12, batch=8, learning_rate=0.003,
        schedule="cosine", warmup=2, weight_decay=0.05, max_grad_norm=1.0, ema=0.9, precision="float32",
        validate_every=5, max_skipped_steps=0, early_stopping=0, shuffle_row_groups=2, seed=0,
    )  # fmt: skip
    return DistillConfig.model_validate(values | changes)


def _write(path: Path, schema: pa.Schema, groups: list[list[dict]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = [pa.Table.from_pylist(rows, schema=schema) for rows in groups]
    shards.write_shard(path, schema, tables, {"stage": "test"})
