"""What the benchmarks share: drawn photos, data/ folders made of them, a full-size teacher."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.data import shards
from pipeline.data.views import random_view
from pipeline.fetch.decoding import canonical_jpeg
from pipeline.models.card_writer import write_card
from pipeline.models.open_clip import open_clip

FULL_SIZE = "ViT-B-32-quickgelu"
AREA, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)  # of random crops


def photos(folder: Path | None, count: int, seed: int = 0) -> list[bytes]:
    """Stored JPEGs (shorter side at most 256 px) of a folder's images, or of drawn ones.

    The drawn ones are smooth colours with some grain, 341 x 256 px, about 20 kB each.
    """
    if folder:
        files = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".jpeg"))
        return [canonical_jpeg(path.read_bytes(), 256, 95, 10**8)[0] for path in files[:count]]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((341, 256))
        grain = rng.normal(0, 8, (256, 341, 3))
        out = io.BytesIO()
        Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(
            out, "JPEG"
        )
        found.append(out.getvalue())
    return found


def write_images(path: Path, jpgs: list[bytes], first: int = 0) -> list[dict]:
    """One image shard of these JPEGs; returns its rows without the bytes."""
    rows = []
    for i, jpg in enumerate(jpgs, first):
        width, height = Image.open(io.BytesIO(jpg)).size
        name = f"{i:032x}"
        rows.append(
            {"row_id": name, "image_id": name, "url": name, "status": "ok", "attempts": 1,
             "sha256": name * 2, "sha256_original": name * 2, "width": width, "height": height,
             "jpg": jpg}
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=shards.IMAGES)
    shards.write_shard(path, shards.IMAGES, shards.in_groups(table), {})
    return [{k: v for k, v in row.items() if k != "jpg"} for row in rows]


def write_data(
    data: Path, jpgs: list[bytes], embedding_size: int, per_shard: int, captions: int = 0
) -> None:
    """images, teacher (random vectors; view 0 is a random crop) and selection (all for training).

    captions: of each image, whose vectors are random too.
    """
    rng = np.random.default_rng(0)
    everything = []
    for shard, start in enumerate(range(0, len(jpgs), per_shard)):
        name = f"{shard:05}.parquet"
        rows = write_images(data / "images" / name, jpgs[start : start + per_shard], start)
        views = [
            random_view(row["sha256"], 1, row["width"], row["height"], AREA, RATIO, 0)
            for row in rows
        ]
        vectors = rng.normal(size=(len(rows), embedding_size)).astype(np.float32)
        table = pa.table(
            {
                "image_id": [row["image_id"] for row in rows],
                "view": pa.array([0] * len(rows), pa.int32()),
                **{
                    f: pa.array([getattr(v, f) for v in views], pa.float32())
                    for f in views[0]._fields[:4]
                },
                "flip": [view.flip for view in views],
                "sha256": [row["sha256"] for row in rows],
                "embedding": shards.embedding_column(shards.to_float16(vectors)),
            }
        )
        schema = shards.teacher_schema(embedding_size)
        (data / "teacher/images").mkdir(parents=True, exist_ok=True)
        shards.write_shard(data / "teacher/images" / name, schema, shards.in_groups(table), {})
        if captions:
            write_texts(data / "teacher/texts" / name, rows, embedding_size, captions)
        everything += [
            {"image_id": row["image_id"], "split": "train", "keep": True} for row in rows
        ]
    (data / "selection").mkdir()
    table = pa.Table.from_pylist(everything, schema=shards.SELECTION)
    shards.write_shard(data / "selection/selection.parquet", shards.SELECTION, [table], {})


def write_texts(path: Path, rows: list[dict], embedding_size: int, captions: int) -> None:
    """Captions of one image shard, a row group beside each of its own."""
    rng = np.random.default_rng(1)

    def groups() -> Iterator[pa.Table]:
        for start in range(0, len(rows), shards.ROWS_PER_GROUP):
            ids = [row["image_id"] for row in rows[start : start + shards.ROWS_PER_GROUP]]
            ids = [key for key in ids for _ in range(captions)]
            vectors = rng.normal(size=(len(ids), embedding_size)).astype(np.float32)
            names = [f"{n}{key}" for n, key in enumerate(ids)]
            embedding = shards.embedding_column(shards.to_float16(vectors))
            columns = {"text_id": names, "image_id": ids, "text": names, "embedding": embedding}
            yield pa.table(columns)

    path.parent.mkdir(parents=True, exist_ok=True)
    shards.write_shard(path, shards.texts_schema(embedding_size), groups(), {})


def full_size_card(folder: Path) -> Path:
    """The card of a ViT-B/32 with random weights, which cost what OpenAI's do."""
    torch.manual_seed(0)
    state = open_clip.create_model(FULL_SIZE, load_weights=False).state_dict()
    weights = folder / "teacher.safetensors"
    save_file({name: x.contiguous() for name, x in state.items()}, weights)
    write_card(FULL_SIZE, str(weights), folder / "card.yaml")
    return folder / "card.yaml"
