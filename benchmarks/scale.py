"""What stages cost at a number of images: seconds and peak memory of each, in a process of its own.

Run:   python benchmarks/scale.py [--images 100000] [--folder /tmp/scale] [--keep]
Cost:  about 3 kB of disk an image; minutes at 100,000, an hour at a million on two cores.

Synthetic data/ by the project's own writers: a manifest, images of 16 px, one view and one caption an
image; one vector in eight is nearly the one before it, so that near duplicates exist. Nothing is
fetched. Seconds as a clock shows them, and of all threads on a processor, which a busy machine does
not stretch. Memory: the most that a process held of its own, and with the pages of files that it
maps, which the system takes back when others need them.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data import shards

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.memory import held

PRESET = Path(__file__).parents[1] / "pipeline/core/presets/clip-vit-b32.yaml"
E, PER_SHARD, HELD_OUT = 512, 50_000, 0.01
THRESHOLD = 0.95
COMMITTED, STORED_BYTES = 20_000, 20_000  # images of the shard that is committed, and of each JPEG
BATCH, LANES, STEPS = 256, 16, 200


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
    rng, out = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(out, "JPEG")
    for number, start in enumerate(range(0, images, PER_SHARD)):
        ids = image_ids(start, min(start + PER_SHARD, images))
        name, n = f"{number:05}.parquet", len(ids)
        texts = [f"a caption of image {i}" for i in range(start, start + n)]
        digests = [key[::-1] * 2 for key in ids]  # spread, as hashes are
        table = {
            "row_id": ids, "image_id": ids, "url": [f"http://example.org/{key}.jpg" for key in ids],
            "caption": texts, "captions": [[text] for text in texts], "status": ["ok"] * n,
            "attempts": [1] * n, "width": [256] * n, "height": [256] * n,
            "sha256_original": digests, "sha256": digests, "jpg": [out.getvalue()] * n,
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


def lists_and_plan(folder: Path, images: int) -> str:
    """A manifest of columns as LAION's, to the lists of what to fetch and the plan of shards."""
    from pipeline.core.config import load_section
    from pipeline.fetch.forget import Forgotten
    from pipeline.fetch.image_shards import plan_images
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
    plan = plan_images(load_section(PRESET, "download"), lists, Forgotten())
    shutil.rmtree(folder / "lists")
    return f"{len(plan.parts)} shards"


def commit_of_a_shard(folder: Path, images: int) -> str:
    """One shard of COMMITTED images, as fetched, whatever the number of images."""
    from pipeline.core.config import load_section
    from pipeline.core.store import Store
    from pipeline.fetch.forget import Forgotten
    from pipeline.fetch.image_shards import ImageShards, plan_images
    from pipeline.fetch.img2dataset import SIZE
    from pipeline.fetch.journal import FetchedRow
    from pipeline.fetch.manifest import write_lists

    urls = [f"http://example.org/{i}.jpg" for i in range(COMMITTED)]
    own = folder / "commit"
    own.mkdir()
    pq.write_table(pa.table({"url": urls}), own / "manifest.parquet")
    lists = write_lists(own / "manifest.parquet", own, COMMITTED, own / "lists", say=print)
    config, store = load_section(PRESET, "download"), Store(own / "store")
    plan = plan_images(config, lists, Forgotten())
    maker = ImageShards(config, plan, store, own / "lists", own, 1, 1, Forgotten())
    rng, size = np.random.default_rng(0), {"width": 256, "height": 256}
    size |= {f"original_{side}": 512 for side in size}

    def fetched(image_id: str) -> FetchedRow:
        return FetchedRow(
            image_id, "", "success", sha256="0" * 64, exif=json.dumps({SIZE: 40_000}), **size,
            jpg=rng.bytes(STORED_BYTES),
        )  # fmt: skip

    nothing = SimpleNamespace(facts=lambda *_: {}, attempts=lambda *_: {})
    rows, came = maker._rows(lists[0].name), SimpleNamespace(get=fetched)
    entry = maker._commit(lists[0].name, rows, nothing, came)
    shutil.rmtree(own)
    return f"{COMMITTED} images, {entry.bytes / 2**20:.0f} MiB"


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

    data, start = folder / "data", time.perf_counter()
    collection = Collection(data, data / "evaluation/index")
    queries = drawn(np.random.default_rng(2), 11).astype(np.float32)
    spent, first = [], 0.0
    for vector in queries:
        began = time.perf_counter()
        collection.search(Query("q", vector, vector), 10)
        spent.append(time.perf_counter() - began)
        first = first or time.perf_counter() - start
    return f"first answer {first:.1f} s, then {1000 * np.median(spent[1:]):.0f} ms a search"


def query(folder: Path, images: int) -> str:
    from pipeline.data import database

    sql = "SELECT split, count(*) FROM selection JOIN images USING (image_id) GROUP BY split"
    return str(database.ask(database.confined(folder / "data"), sql).fetchall())


def training_rows(folder: Path, images: int) -> str:
    """Start of distill, then its loader with captions."""
    from pipeline.training.batches import training_batches
    from pipeline.training.dataset import Dataset
    from pipeline.training.sampler import Sampler

    began = time.perf_counter()
    data, size = folder / "data", (16, "bicubic")
    dataset = Dataset(data, "train", *size, captions=True, groups_in_use=LANES)
    sampler = Sampler(dataset, 0, BATCH, LANES)
    held_out = Dataset(data, "test", *size)
    start, rows = time.perf_counter() - began, 0
    for batch in training_batches(dataset, sampler, 0, min(STEPS, sampler.steps), workers=2):
        rows += len(batch.ids)
        assert batch.texts is not None and batch.texts.any(axis=1).all()
    rate = rows / (time.perf_counter() - began - start)
    return f"start {start:.1f} s with {len(held_out)} to validate, then {rate:.0f} rows/s"


def metrics_of_held_out(folder: Path, images: int) -> str:
    """evaluate, from the moment when the student's index is written."""
    from pipeline.core.config import load_section
    from pipeline.core.records import Recipe
    from pipeline.models.student import Student
    from stages.evaluate import _measured

    data = folder / "data"
    distill = load_section(PRESET, "distill")
    student = Student(distill.student)
    student.save(data / "student", provenance={}, teacher={})
    work = SimpleNamespace(folder=data / "evaluation", recipe=Recipe(parameters={"templates": []}))
    config = load_section(PRESET, "evaluate").model_copy(update={"split": "test"})
    found = _measured(work, config, data, student, workers=1)
    return f"{found.images} images, {found.text_to_image.facts['queries']} captions"


def verify_sets(folder: Path, images: int) -> str:
    """What verify asks of all rows at once; the rest of it is a shard at a time."""
    from pipeline.core.records import Recipe, Stamp, StoredFile, TeacherSummary
    from pipeline.verify.tables import connection_over, set_findings

    data, no_digest = folder / "data", "0" * 32
    ((kept,),) = _ask(data, "SELECT count(*) FROM selection WHERE split = 'train'")
    counts = {"train": kept, "test": images - kept}
    card = {"name": "t", "model": "m", "pretrained": None, "sha256": None, "activation": "gelu"}
    teacher = TeacherSummary.model_validate(
        {"teacher": {"card": card}, "embedding_size": E, "preprocessing": {}, "dtype": "float32",
         "batch": 1, "least_cosine_to_float32": None, "views": 1, "images": images, "texts": images}
    )  # fmt: skip
    summaries = {"images": {}, "teacher": teacher.model_dump(), "selection": counts}
    stages = {"images": "download", "teacher": "teacher_embed", "selection": "select"}
    stages |= {"evaluation": "evaluate"}
    stamps = {}
    for name, stage in stages.items():
        paths = sorted((data / name).rglob("*.parquet"))
        file = StoredFile(sha256=no_digest, bytes=0)
        stamps[name] = Stamp(
            stage=stage, stamp=no_digest, recipe=Recipe(), summary=summaries.get(name, {}),
            files={str(path.relative_to(data / name)): file for path in paths}, digest=no_digest,
        )  # fmt: skip
    findings = list(set_findings(data, stamps, connection_over(data, stamps)))
    return f"{len(findings)} findings {findings[:1] or ''}"


def _ask(data: Path, sql: str) -> list:
    from pipeline.data import database

    return database.connect(data).execute(sql).fetchall()


MEASURED = {  # name -> digits, in the order of the table
    "seconds": 1,
    "of processor": 1,
    "MiB of its own": 0,
    "with mapped files": 0,
}
STEPS_OF: dict[str, Callable[[Path, int], str]] = {
    "download: lists and plan": lists_and_plan,
    "commit of a shard": commit_of_a_shard,
    "mean of the training split": mean_of_training,
    "held-out vectors": held_out_vectors,
    "query": query,
    "distill: start and 200 steps of its loader": training_rows,
    "search": search,
    "evaluate: metrics of held-out rows": metrics_of_held_out,
    "select with caption similarity": select_query,
    "verify: sets of rows": verify_sets,
    "near duplicates": near_duplicates,
}


def measured(name: str, folder: Path, images: int) -> dict:
    """Seconds, MiB and what it said, of one step in a process of its own."""
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
        last = [f"ended ({done.returncode})", *done.stderr.strip().splitlines()][-1]
        return dict.fromkeys(MEASURED) | {"said": last}
    return json.loads(done.stdout.splitlines()[-1])


def run_step(name: str, folder: Path, images: int) -> None:
    peak, ended = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, held("RssAnon") / 2**20)

    watching = threading.Thread(target=watch)
    watching.start()
    began, used = time.perf_counter(), time.process_time()
    try:
        said = STEPS_OF[name](folder, images)
    finally:
        spent = time.perf_counter() - began
        ended.set()
        watching.join()
    values = spent, time.process_time() - used, peak, held("VmHWM") / 2**20
    print(json.dumps(dict(zip(MEASURED, values, strict=True)) | {"said": said}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/extrahead-scale"))
    parser.add_argument("--keep", action="store_true", help="leave the folder for another run")
    parser.add_argument("--step", choices=STEPS_OF, help="one step, in this process")
    parser.add_argument("--only", nargs="+", choices=STEPS_OF, help="these, each in its process")
    options = parser.parse_args()
    if options.step:
        return run_step(options.step, options.folder, options.images)
    if not (options.folder / "data").exists():
        write_data(options.folder / "data", options.images)
    print(f"| {options.images:,} images | {' | '.join(MEASURED)} | |")
    print(f"| --- |{' --- |' * len(MEASURED)} --- |", flush=True)
    for name in options.only or STEPS_OF:
        found = measured(name, options.folder, options.images)
        cells = ["-" if found[k] is None else f"{found[k]:.{n}f}" for k, n in MEASURED.items()]
        print(f"| {name} | {' | '.join(cells)} | {found['said']} |", flush=True)
    if not options.keep:
        shutil.rmtree(options.folder)
    return None


if __name__ == "__main__":
    main()
