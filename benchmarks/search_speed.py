"""How fast a search is once it has started: under a second for 100,000 images, and how many times
two bare matrix-vector products.

Run:   python benchmarks/search_speed.py [--images 100000] [--size 512] [--k 10] [--rounds 31]
Cost:  about a minute on two CPU cores, and 8 bytes per image and value of memory.

The reference is what no search by inner product can avoid: `vectors @ query` for the student's and
for the teacher's vectors, with numpy, float32. Against it stand picking the k best of both sides,
and the whole search with captions, URLs and JPEGs read from the shards. Rounds alternate; the
median of the rounds' ratios is printed, with the median and the longest time.
"""

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from by_turns import median_ratio, seconds_by_turns
from PIL import Image

from pipeline.data import shards
from pipeline.explore.nearest import nearest
from pipeline.explore.search import Collection, Query

SHARDS = 10


def write_collection(data: Path, images: int, size: int) -> Path:
    """Random unit vectors and one small JPEG for all; returns the index folder."""
    random, jpg = np.random.default_rng(0), io.BytesIO()
    noise = random.integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).resize((256, 256)).save(jpg, "JPEG", quality=90)
    for shard, numbers in enumerate(np.array_split(np.arange(images), SHARDS)):
        n, name = len(numbers), f"{shard:05}.parquet"
        ids = pa.array([f"{number:032x}" for number in numbers])
        facts = {"image_id": ids, "url": ids, "caption": ids}
        facts |= {"status": pa.array(["ok"] * n), "jpg": pa.array([jpg.getvalue()] * n)}
        _write(data / "images" / name, shards.IMAGES, facts)
        for folder, schema in (
            ("teacher/images", shards.teacher_schema(size)),
            ("index", shards.index_schema(size)),
        ):
            vectors = shards.to_float16(random.standard_normal((n, size), np.float32))
            columns = {"image_id": ids, "embedding": shards.embedding_column(vectors)}
            columns["view"] = pa.array(np.zeros(n, np.int32))
            _write(data / folder / name, schema, columns)
    return data / "index"


def _write(path: Path, schema: pa.Schema, columns: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    n = len(columns["image_id"])
    table = pa.table({f.name: columns.get(f.name, pa.nulls(n, f.type)) for f in schema})
    shards.write_shard(path, schema, shards.in_groups(table), {})


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("images", 100_000), ("size", 512), ("k", 10), ("rounds", 31)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        index = write_collection(Path(folder), asked.images, asked.size)
        began = time.perf_counter()
        found = Collection(Path(folder), index)
        print(f"start-up: {time.perf_counter() - began:.2f} s for {len(found)} images")
        vector = found.student[len(found) // 3]
        query = Query("one of the images", vector, vector)
        contestants = {
            "bare products": lambda: (found.student @ vector, found.teacher @ vector),
            "best of both": lambda: [
                nearest(side, vector, asked.k) for side in (found.student, found.teacher)
            ],
            "whole search": lambda: found.search(query, asked.k),
        }
        times = seconds_by_turns(contestants, asked.rounds)
    reference = times.pop("bare products")
    print(f"bare products: {1000 * statistics.median(reference):.1f} ms")
    for name, taken in times.items():
        ratio = median_ratio(taken, reference)
        milliseconds = 1000 * statistics.median(taken), 1000 * max(taken)
        print(
            f"{name}: {ratio:.2f} times the bare products, {milliseconds[0]:.0f} ms "
            f"(the longest {milliseconds[1]:.0f})"
        )


if __name__ == "__main__":
    main()
