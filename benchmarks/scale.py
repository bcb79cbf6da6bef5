"""What stages cost at a number of images: seconds and peak memory of each, in a process of its own.

Run:   python benchmarks/scale.py [--images 100000] [--folder /tmp/scale] [--keep]
Cost:  about 3 kB of disk an image; minutes at 100,000, an hour at a million on two cores.

Synthetic data/ by the project's own writers: a manifest, images of a few bytes, one view and one
caption an image. Vectors are drawn around a centre of their own for every eight images, so that near
duplicates exist. Nothing is fetched, and no pixel decoded.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data import shards

E, PER_SHARD, HELD_OUT = 512, 50_000, 0.01
THRESHOLD = 0.95


def image_ids(start: int, stop: int) -> list[str]:
    return [f"{i:032x}" for i in range(start, stop)]


def drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, E) float16 unit vectors; one in eight lies close to the one before it."""
    vectors = rng.standard_normal((count, E), np.float32)
    vectors[1::8] = vectors[0::8][: len(vectors[1::8])]
    vectors[1::8] += 0.01 * rng.standard_normal(vectors[1::8].shape, np.float32)
    return shards.to_float16(vectors)


def write_data(data: Path, images: int) -> None:
    """data/ as the first stages leave it, and a student's index of all images."""
    for folder in ("images", "teacher/images", "teacher/texts", "selection", "evaluation/index"):
        (data / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, start in enumerate(range(0, images, PER_SHARD)):
        ids = image_ids(start, min(start + PER_SHARD, images))
        name, n = f"{number:05}.parquet", len(ids)
        texts = [f"a caption of image {i}" for i in range(start, start + n)]
        digests = [key[::-1] + key for key in ids]  # spread, as hashes are
        table = {
            "row_id": ids, "image_id": ids, "url": [f"http://example.org/{key}.jpg" for key in ids],
            "caption": texts, "captions": [[text] for text in texts], "status": ["ok"] * n,
            "attempts": [1] * n, "width": [256] * n, "height": [256] * n,
            "sha256_original": digests, "sha256": digests, "jpg": [b"pixels"] * n,
        }  # fmt: skip
        _write(data / "images" / name, shards.IMAGES, table)
        vectors = drawn(rng, n)
        crop = {"left": 0.0, "top": 0.0, "right": 256.0, "bottom": 256.0, "flip": False, "view": 0}
        table = {"image_id": ids, "sha256": digests, "embedding": vectors}
        table |= {key: [value] * n for key, value in crop.items()}
        _write(data / "teacher/images" / name, shards.teacher_schema(E), table)
        table = {"text_id": ids, "image_id": ids, "text": texts, "embedding": drawn(rng, n)}
        _write(data / "teacher/texts" / name, shards.texts_schema(E), table)
        table = {"image_id": ids, "embedding": vectors}
        _write(data / "evaluation/index" / name, shards.index_schema(E), table)
    write_selection(data, images)


def write_selection(data: Path, images: int) -> None:
    ids = image_ids(0, images)
    held_out = np.random.default_rng(1).random(images) < HELD_OUT
    table = {"image_id": ids, "split": np.where(held_out, "test", "train"), "keep": [True] * images}
    schema, path = shards.SELECTION, data / "selection/selection.parquet"
    shards.write_shard(
        path, schema, shards.in_groups(_table(schema, table), shards.TABLE_ROWS_PER_GROUP), {}
    )


def _table(schema: pa.Schema, columns: dict) -> pa.Table:
    count = len(columns["image_id"])
    made = {}
    for field in schema:
        if field.name == "embedding":
            made[field.name] = shards.embedding_column(columns[field.name])
        else:
            made[field.name] = pa.array(columns.get(field.name, [None] * count), field.type)
    return pa.table(made)


def _write(path: Path, schema: pa.Schema, columns: dict) -> None:
    shards.write_shard(path, schema, shards.in_groups(_table(schema, columns)), {})


# What is measured; each runs alone in a process, and says what it found


def manifest_to_lists(folder: Path, images: int) -> str:
    from pipeline.fetch.manifest import write_lists

    manifest = folder / "manifest.parquet"
    with pq.ParquetWriter(
        manifest, pa.schema([("URL", pa.string()), ("TEXT", pa.string())])
    ) as out:
        for start in range(0, images, PER_SHARD):
            numbers = range(start, min(start + PER_SHARD, images))
            urls = [f"http://example.org/{i}.jpg" for i in numbers]
            out.write_table(
                pa.table({"URL": urls, "TEXT": [f"a caption of image {i}" for i in numbers]})
            )
    lists = write_lists(manifest, folder, PER_SHARD, folder / "lists", say=lambda note: None)
    shutil.rmtree(folder / "lists")
    return f"{len(lists)} lists"


def near_duplicates(folder: Path, images: int) -> str:
    from pipeline.data.duplicates import near_duplicate_groups

    said: list[str] = []
    groups = near_duplicate_groups(folder / "data/teacher", THRESHOLD, said.append)
    return " ".join([f"{len(groups)} groups;", *said])


def select_query(folder: Path, images: int) -> str:
    from pipeline.core.config import SelectConfig
    from stages.select import _selected

    where = "caption_similarity > -1 AND width > 100"
    config = SelectConfig(where=where, val=0.01, test=0.01, near_duplicates=1.0)
    return f"{len(_selected(config, folder / 'data'))} rows"


def mean_of_training(folder: Path, images: int) -> str:
    from pipeline.data.embeddings import training_mean

    return f"length {np.linalg.norm(training_mean(folder / 'data')):.4f}"


def held_out_vectors(folder: Path, images: int) -> str:
    from pipeline.data.embeddings import split_vectors

    return f"{len(split_vectors(folder / 'data', 'test')[0])} rows"


def search(folder: Path, images: int) -> str:
    """The first answer, then the median of ten more."""
    from pipeline.explore.search import Collection, Query

    data = folder / "data"
    collection = Collection(data, data / "evaluation/index")
    queries = drawn(np.random.default_rng(2), 11).astype(np.float32)
    spent = []
    for vector in queries:
        began = time.perf_counter()
        collection.search(Query("q", vector, vector), 10)
        spent.append(time.perf_counter() - began)
    return f"then {1000 * np.median(spent[1:]):.0f} ms a search"


def query(folder: Path, images: int) -> str:
    from pipeline.data import database

    sql = "SELECT split, count(*) FROM selection JOIN images USING (image_id) GROUP BY split"
    return str(database.ask(database.confined(folder / "data"), sql).fetchall())


STEPS: dict[str, Callable[[Path, int], str]] = {
    "manifest to lists": manifest_to_lists,
    "near duplicates": near_duplicates,
    "select with caption similarity": select_query,
    "mean of the training split": mean_of_training,
    "held-out vectors": held_out_vectors,
    "search": search,
    "query": query,
}


def measured(name: str, folder: Path, images: int) -> dict:
    """Seconds, peak memory in MiB and what it said, of one step in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--step",
        name,
        "--images",
        str(images),
        "--folder",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"seconds": None, "MiB": None, "said": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def run_step(name: str, folder: Path, images: int) -> None:
    began = time.perf_counter()
    said = STEPS[name](folder, images)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": time.perf_counter() - began, "MiB": peak, "said": said}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/extrahead-scale"))
    parser.add_argument("--keep", action="store_true", help="leave the folder for another run")
    parser.add_argument("--step", choices=STEPS, help="one step, in this process")
    options = parser.parse_args()
    if options.step:
        return run_step(options.step, options.folder, options.images)
    if not (options.folder / "data").exists():
        write_data(options.folder / "data", options.images)
    print(f"| {options.images:,} images | seconds | peak MiB | |\n| --- | --- | --- | --- |")
    for name in STEPS:
        found = measured(name, options.folder, options.images)
        cells = ["-" if found[key] is None else f"{found[key]:.1f}" for key in ("seconds", "MiB")]
        print(f"| {name} | {' | '.join(cells)} | {found['said']} |", flush=True)
    if not options.keep:
        shutil.rmtree(options.folder)
    return None


if __name__ == "__main__":
    main()
