"""A teacher over a shard: views and texts -> float16 vectors, each batch full so that no row's
bits depend on how many rows there are.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.config import TeacherEmbedConfig
from pipeline.core.errors import PipelineError
from pipeline.core.threads import ahead
from pipeline.data.pixels import NotAnImage, decode
from pipeline.data.shards import embedding_column, open_shard, read_shard, to_float16
from pipeline.data.views import View, canonical_view, random_view, view_pixels
from pipeline.models.teacher import Teacher

FACTS = ["image_id", "status", "sha256", "width", "height"]
Known = dict[tuple[str, int], np.ndarray]  # (sha256 of the JPEG, view) -> (E,) float16


def view_tables(
    teacher: Teacher,
    shard: Path,
    config: TeacherEmbedConfig,
    known: Known,
    workers: int,
    on_images: Callable[[int], None],
) -> list[pa.Table]:
    """All views of a shard's good images, one table per (view, row group of the shard).

    Row group v * G + g of the result holds view v of the good rows of the shard's group g, in
    their order, so that one view's targets are read without the others'. A view whose vector is
    known is not computed. on_images is told how many views each batch finished.
    """
    with open_shard(shard, "download") as file:
        groups = [_good_rows(rows, config, teacher) for rows in _facts(file)]
        jobs = _jobs(file, groups, known)
        prepared = chain.from_iterable(ahead(_preparer(teacher), jobs, workers, config.batch))
        for batch in _batched(prepared, config.batch):
            pixels = np.zeros((config.batch, *batch[0][1].shape), np.uint8)  # the rest stays 0
            for i, (_, view) in enumerate(batch):
                pixels[i] = view
            vectors = to_float16(teacher.embed_images(pixels)[: len(batch)])
            known.update({key: vector for (key, _), vector in zip(batch, vectors, strict=True)})
            on_images(len(batch))
    size = teacher.embedding_size
    return [_table(rows, v, known, size) for v in range(config.views) for rows in groups]


def good_shas(shard: Path) -> set[str]:
    """SHA-256 of the JPEG of each good image of a shard."""
    table = read_shard(shard, "download", ["status", "sha256"])
    return {
        sha256
        for status, sha256 in zip(*(column.to_pylist() for column in table.columns), strict=True)
        if status == "ok"
    }


def embed_texts(
    teacher: Teacher, texts: Iterable[str], batch: int, known: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Each distinct text -> (E,) float16."""
    distinct = sorted(set(texts))
    missing = [text for text in distinct if text not in known]
    by_length = defaultdict(list)
    for chunk in _batched(missing, 4096):
        for text, length in zip(chunk, teacher.context_lengths(chunk), strict=True):
            by_length[length].append(text)
    for alike in by_length.values():
        for chunk in _batched(alike, batch):
            padded = [*chunk, *[""] * (batch - len(chunk))]
            vectors = to_float16(teacher.embed_texts(padded)[: len(chunk)])
            known.update(zip(chunk, vectors, strict=True))
    return {text: known[text] for text in distinct}


def _facts(file: pq.ParquetFile) -> Iterator[list[dict]]:
    """Of the rows of each row group; read at once, since a remote store takes long to answer."""
    facts, start = file.read(columns=FACTS), 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        yield facts.slice(start, count).to_pylist()
        start += count


def _good_rows(rows: list[dict], config: TeacherEmbedConfig, teacher: Teacher) -> list[dict]:
    """Facts and all views' boxes of the good images of one row group."""
    good: list[dict[str, Any]] = [
        row | {"row": i} for i, row in enumerate(rows) if row["status"] == "ok"
    ]
    for row in good:
        size = row["width"], row["height"]
        own = canonical_view(*size, teacher.preprocessing.resize_mode, teacher.image_size)
        row["views"] = [own] + [
            random_view(
                row["sha256"],
                v,
                *size,
                (config.crop_area[0], config.crop_area[1]),
                (config.crop_ratio[0], config.crop_ratio[1]),
                config.seed,
            )
            for v in range(1, config.views)
        ]
    return good


def _jobs(
    file: pq.ParquetFile, groups: list[list[dict]], known: Known
) -> Iterator[tuple[list, list[View], bytes]]:
    """(keys, views, jpg) of each image with unknown views, reading one row group ahead."""
    queued, wanted = set(known), []
    for g, rows in enumerate(groups):
        jobs = []
        for row in rows:
            keys = [(row["sha256"], v) for v in range(len(row["views"]))]
            missing = [key for key in keys if key not in queued]
            if missing:
                queued.update(missing)
                jobs.append((missing, [row["views"][v] for _, v in missing], row["row"]))
        if jobs:
            wanted.append((g, jobs))

    def read(of_group: tuple[int, list]) -> tuple[list, pa.ChunkedArray]:
        group, jobs = of_group
        return jobs, file.read_row_group(group, columns=["jpg"])["jpg"]

    for jobs, jpgs in ahead(read, wanted, 1, 2):
        for missing, views, at in jobs:
            yield missing, views, jpgs[at].as_py()


def _preparer(teacher: Teacher) -> Callable:
    """(keys, views, jpg) -> [(key, (S, S, 3) uint8)]: decoded once, cropped per view."""

    def prepare(job: tuple[list, list[View], bytes]) -> list[tuple[tuple, np.ndarray]]:
        keys, views, jpg = job
        try:
            image = decode(jpg)
        except NotAnImage as error:
            raise PipelineError(
                f"the stored JPEG {keys[0][0]} cannot be decoded ({error}): data/images is damaged. "
                "Delete it and run `pipeline download` again."
            ) from None
        size, interpolation = teacher.image_size, teacher.preprocessing.interpolation
        return [
            (key, view_pixels(image, view.box, view.flip, size, interpolation))
            for key, view in zip(keys, views, strict=True)
        ]

    return prepare


def _batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of size items; the last may be shorter (itertools.batched needs Python 3.12)."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _table(rows: list[dict], view: int, known: Known, embedding_size: int) -> pa.Table:
    """One view of one row group, in the columns of teacher_schema."""
    vectors = [known[row["sha256"], view] for row in rows]
    boxes = [row["views"][view] for row in rows]
    matrix = np.array(vectors, np.float16).reshape(len(rows), embedding_size)
    columns = {"image_id": pa.array([row["image_id"] for row in rows], pa.string())}
    columns["view"] = pa.array([view] * len(rows), pa.int32())
    for field in View._fields[:4]:
        columns[field] = pa.array([getattr(box, field) for box in boxes], pa.float32())
    columns["flip"] = pa.array([box.flip for box in boxes], pa.bool_())
    columns["sha256"] = pa.array([row["sha256"] for row in rows], pa.string())
    return pa.table(columns | {"embedding": embedding_column(matrix)})
