"""The whole pipeline with its shards in an S3 store: the same bytes and numbers, paid for once."""

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import finished, object_store, worlds
from support.plans import Maker, plan_of, put
from typer.testing import CliRunner

from pipeline import cli
from pipeline.core import remote
from pipeline.core.errors import PipelineError
from pipeline.core.layout import ADDRESS, CACHE, STAMP_FILE, STORE, WORK
from pipeline.core.plans import carry_out, publish, store_of, unneeded
from pipeline.core.provenance import read_stamp, stamp_of
from pipeline.core.records import Stamp
from pipeline.core.remote_store import cached
from pipeline.data import database, remote_shards, shards
from pipeline.explore.query_vectors import Queries, stored_image
from pipeline.explore.search import Collection
from pipeline.fetch.forget import Forgotten
from pipeline.training.batches import READ_AHEAD, TrainingOrder
from pipeline.training.dataset import BOX, Dataset
from pipeline.training.sampler import Sampler
from pipeline.training.trainer import Trainer
from pipeline.verify.forgotten import forgotten_findings
from pipeline.verify.verify import verify
from stages.distill import distill
from stages.download import download
from stages.evaluate import evaluate
from stages.select import select
from stages.teacher_embed import teacher_embed


@pytest.fixture(scope="module")
def s3():
    with object_store.server() as port:
        yield port


@pytest.fixture(scope="module")
def proxy(s3):
    with (
        object_store.proxied(s3, "team/images") as (store, proxy),
        pytest.MonkeyPatch.context() as patch,
    ):
        object_store.named(patch, store)
        yield proxy


@pytest.fixture
def asked(proxy):
    """What is asked of the store; after a test it does again as it is told."""
    proxy.store.requests.clear()
    yield proxy.store
    proxy.fault = lambda method, path: None


def stage_one(world: worlds.World, data: Path, manifest: Path | None = None, **changes) -> None:
    config = worlds.download_config(
        manifest or world.manifest, world.root, store="remote", **changes
    )
    download(config, data, processes=1, threads=8)
    config = worlds.teacher_config(world.card, world.prompts, store="remote")
    teacher_embed(config, data, device="cpu", workers=1)


def train(data: Path, **options) -> dict:
    return distill(finished.distill_config(), data, device="cpu", workers=2, **options)


@pytest.fixture(scope="module")
def finished_remotely(proxy, small_world, tmp_path_factory) -> Path:
    """data/ of the small world after every stage, its shards in the store."""
    data = tmp_path_factory.mktemp("remote") / "data"
    stage_one(small_world, data)
    select(worlds.select_config(), data)
    train(data)
    evaluate(finished.evaluate_config(), data, device="cpu", workers=1)
    return data


@pytest.fixture
def clone(finished_remotely, asked, tmp_path) -> Path:
    """What `dvc pull` brings: outs alone."""
    ignored = shutil.ignore_patterns(WORK, STORE)
    asked.requests.clear()
    return shutil.copytree(finished_remotely, tmp_path / "clone/data", ignore=ignored)


def test_every_stage_makes_what_it_makes_of_shards_on_this_disk(finished_remotely, finished_world):
    for folder in ("images", "teacher"):
        assert [path.name for path in (finished_remotely / folder).iterdir()] == [STAMP_FILE]
    for name in ("images", "teacher", "selection", "student", "evaluation"):
        ours, theirs = (stamp_of(data, name) for data in (finished_remotely, finished_world))
        assert ours == theirs, name


def test_readers_of_a_clone_need_the_stamps_alone(clone, finished_world):
    sql = "SELECT status, count(*), sum(octet_length(jpg)) FROM images GROUP BY ALL ORDER BY ALL"
    vectors = "SELECT sum(list_dot_product(embedding, embedding)) FROM teacher"
    for asked in (sql, vectors, "SELECT count(*) FROM texts"):
        here, there = (database.confined(data) for data in (clone, finished_world))
        assert database.ask(here, asked).fetchall() == database.ask(there, asked).fetchall()
    queries = Queries(clone)
    for k in (1, 5):
        hits, local = (
            Collection(data).search(queries.text("a red circle"), k)
            for data in (clone, finished_world)
        )
        assert hits.student == local.student and hits.teacher == local.teacher
    image = hits.student[0].image_id
    assert (stored_image(clone, image) == stored_image(finished_world, image)).all()
    assert verify(clone) == []


def test_a_run_that_was_interrupted_goes_on(clone, finished_world, monkeypatch):
    shutil.rmtree(clone / "student")
    real, every = Trainer.train_step, finished.distill_config().validate_every

    def ends(trainer, batch):
        if trainer.step == every:
            raise KeyboardInterrupt
        return real(trainer, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", ends)
        train(clone)
    train(clone, resume=True)
    assert stamp_of(clone, "student").files == stamp_of(finished_world, "student").files


def test_a_clone_pays_for_the_difference_alone(clone, asked, small_world, tmp_path, capfd):
    shutil.rmtree(clone / "runs")
    (small_world.root / "one more.jpg").write_bytes(worlds.picture(99, kind="JPEG"))
    row = {"url": "file:one more.jpg", "caption": "one more", "label": "wide"}
    manifest = worlds.write_manifest(tmp_path / "manifest.csv", [*small_world.rows, row])
    stage_one(small_world, clone, manifest, retries=0)
    assert "download: 1 images to fetch" in capfd.readouterr().err
    (record,) = [pq.read_table(path) for path in (clone / "runs").glob("teacher_embed-*")]
    assert json.loads(record["metrics"][0].as_py())["embedded"] == 2  # views
    sent = [path for method, path, _ in asked.requests if method == "PUT" and "_stamps" not in path]
    assert len(sent) == 2 * 3  # one shard split: images, vectors and captions of both halves
    first = read_stamp(small_world.data / "images", "download").files.values()
    assert {file.stored for file in first} <= {
        e.stored for e in store_of(clone, "download", "remote").entries()
    }


def test_a_finished_stage_asks_for_one_listing(clone, asked, small_world):
    config = worlds.teacher_config(small_world.card, small_world.prompts, store="remote")
    teacher_embed(config, clone, device="cpu", workers=1)
    assert [method for method, path, _ in asked.requests if "teacher" in path] == ["GET"]


# What may go wrong


def said(*command: str) -> str:
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 1 and result.exception
    message = cli.message_of(result.exception)
    assert message, result.exception
    assert object_store.SECRET not in message and "127.0.0.1" not in message
    return message


QUERY = ("query", "SELECT count(*) FROM images WHERE octet_length(jpg) > 0", "--data")


def test_a_shard_that_the_store_lost_is_named_and_made_again(clone, small_world, asked):
    stamp = stamp_of(clone, "teacher")
    name, file = next(iter(stamp.files.items()))
    key = f"teacher/{file.stored}"
    whole = remote.read(key)
    remote.remove(key)
    found = verify(clone)
    assert found[0].place == f"teacher/{name}" and f"lacks {key}" in found[0].found
    message = said("query", "SELECT sum(embedding[1]) FROM teacher", "--data", str(clone))
    assert f"lacks {key}" in message and "`pipeline teacher-embed` makes" in message
    config = worlds.teacher_config(small_world.card, small_world.prompts, store="remote")
    teacher_embed(config, clone, device="cpu", workers=1)
    assert remote.read(key) == whole and stamp_of(clone, "teacher") == stamp


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (None, f"set {ADDRESS}"),
        ("bucket/folder", "is no address of a store"),
        ("s3://nobody-has-this/x", "Is it another store"),
        ("nothing://x", "no store of the kind nothing://"),
        (f"s3://user:{object_store.SECRET}@nobody/x", "the remote store"),
    ],
)
def test_a_wrong_address_is_said_without_it(clone, monkeypatch, address, expected):
    monkeypatch.setenv(ADDRESS, address) if address else monkeypatch.delenv(ADDRESS)
    assert expected in said(*QUERY, str(clone))


def test_a_store_that_nobody_answers_for_is_said_soon(clone, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    remote._open.cache_clear()
    assert "cannot be used (EndpointConnectionError" in said(*QUERY, str(clone))
    remote._open.cache_clear()


@pytest.mark.parametrize(
    ("fault", "expected"), [("403", "may be read-only"), ("507", "space that is left")]
)
def test_a_store_that_takes_nothing_is_said_and_nothing_is_left(
    asked, proxy, tmp_path, monkeypatch, fault, expected
):
    monkeypatch.setenv(ADDRESS, f"s3://{object_store.BUCKET}/full-{fault}")
    store, part = store_of(tmp_path, "download", "remote"), plan_of(1).parts[0]
    proxy.fault = lambda method, path: fault if method == "PUT" else None
    with pytest.raises(PipelineError, match=expected):
        put(store, part)
    proxy.fault = lambda method, path: None
    assert not store.entries() and not list(tmp_path.rglob("*.parquet*"))
    entry = put(store, part)
    assert store.entries() == [entry]


def test_a_store_that_fails_now_and_then_loses_nothing(
    asked, proxy, small_world, finished_world, tmp_path
):
    """500 after it was stored, a connection that is dropped, half an answer, a slow one, in turn."""
    faults = iter(range(1_000_000))
    kinds = (None, "error", None, "drop", "half", None, "slow")
    proxy.fault = lambda method, path: kinds[next(faults) % len(kinds)]
    data = tmp_path / "data"
    stage_one(small_world, data)
    select(worlds.select_config(), data)
    for name in ("images", "teacher", "selection"):
        assert stamp_of(data, name).files == stamp_of(finished_world, name).files
    assert verify(data) == []


# A store by itself


def plan_and_store(data: Path, value: int):
    plan, store = plan_of(value), store_of(data, "download", "remote")
    return plan, store, Maker(plan, store)


def published(data: Path, value: int) -> Stamp:
    plan, store, maker = plan_and_store(data, value)
    return publish(plan, store, data, carry_out(plan, maker, store, data), {})


def test_two_writers_of_a_shard_leave_one_entry_in_every_stamp(asked, tmp_path):
    part = plan_of(7).parts[0]
    made = [
        put(store_of(tmp_path / folder, "download", "remote"), part, good=good, text=f"{good}")
        for folder, good in (("a", 1), ("b", 2))
    ]
    stamps = [published(tmp_path / folder, 7) for folder in ("a", "b")]
    assert stamps[0] == stamps[1] and stamps[0].files[part.name].stored == made[1].stored
    stored = {entry.stored for entry in store_of(tmp_path, "download", "remote").entries()}
    assert {entry.stored for entry in made} <= stored


def test_gc_keeps_what_any_clones_stamp_names_and_what_is_young(asked, tmp_path, monkeypatch):
    monkeypatch.setenv(ADDRESS, f"s3://{object_store.BUCKET}/collected")
    stamps = [published(tmp_path / clone, value) for clone, value in (("a", 1), ("b", 2))]
    store = store_of(tmp_path, "download", "remote")
    alone = put(store, plan_of(3).parts[0])
    assert unneeded(tmp_path, 14) == []
    assert [entry for _, entry in unneeded(tmp_path, 0)] == [alone]
    command = ["store", "gc", "--days", "0", "--delete", "--data", str(tmp_path)]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    left = {entry.stored for entry in store.entries()}
    assert left == {file.stored for stamp in stamps for file in stamp.files.values()}


def test_shards_go_into_the_store_and_come_back_without_being_made(asked, tmp_path, monkeypatch):
    monkeypatch.setenv(ADDRESS, f"s3://{object_store.BUCKET}/moved")
    local, plan = store_of(tmp_path, "download"), plan_of(1)
    first = publish(plan, local, tmp_path, carry_out(plan, Maker(plan, local), local, tmp_path), {})
    plan, store, maker = plan_and_store(tmp_path, 1)
    assert not store.has_published(tmp_path / "images", "download", plan.recipe)
    assert publish(plan, store, tmp_path, carry_out(plan, maker, store, tmp_path), {}) == first
    assert not maker.made and not list((tmp_path / "images").glob("*.parquet"))
    shutil.rmtree(tmp_path / STORE)
    maker = Maker(plan, local)
    assert not local.has_published(tmp_path / "images", "download", plan.recipe)
    assert publish(plan, local, tmp_path, carry_out(plan, maker, local, tmp_path), {}) == first
    assert not maker.made and len(list((tmp_path / "images").glob("*.parquet"))) == 2


def test_what_was_read_of_a_shard_goes_with_it(asked, tmp_path, monkeypatch):
    """It may hold an image that must be forgotten."""
    monkeypatch.setenv(ADDRESS, f"s3://{object_store.BUCKET}/forgotten")
    published(tmp_path, 1)
    for path in remote_shards.shards_in(tmp_path / "images"):
        with remote_shards.opened(path) as shard:
            assert shard.read(8)
    cache = tmp_path / WORK / CACHE
    shutil.copytree(cache, tmp_path / "kept")
    assert len(cached(tmp_path)) == 2
    published(tmp_path, 2)
    assert not cached(tmp_path)
    forgotten = Forgotten({"0" * 32: "0" * 32}, frozenset())
    assert forgotten_findings(tmp_path, forgotten) == []
    shutil.copytree(tmp_path / "kept", cache, dirs_exist_ok=True)
    findings = forgotten_findings(tmp_path, forgotten)
    assert {finding.run for finding in findings} == {f"rm -r {cache}"} and len(findings) == 2


# Bytes

ROWS, GROUPS = 64, 3  # of a row group, of a shard


def write_large(data: Path) -> tuple[int, int]:
    """Two shards, in the store, of images that are noise; returns (rows, bytes that an epoch uses)."""
    rng, used = np.random.default_rng(0), 0
    ids = [[f"{s:08}{g:08}{i:016}" for g in range(GROUPS) for i in range(ROWS)] for s in range(2)]
    for stage, kinds in (("download", [""]), ("teacher_embed", ["images/", "texts/"])):
        store, entries = store_of(data, stage, "remote"), {}
        for kind in kinds:
            for number, keys in enumerate(ids):
                groups = [keys[i : i + ROWS] for i in range(0, len(keys), ROWS)]
                tables = [rows_of(kind, group, rng) for group in groups]
                name = f"{kind}{number:05}.parquet"
                entries[name] = store.commit(name, "b" * 32, 0, partial(written, tables))
                used += sum(map(column_bytes, tables)) if kind != "texts/" else 0
        publish(plan_of(5).model_copy(update={"stage": stage}), store, data, entries, {})
    every = [key for keys in ids for key in keys]
    table = pa.table(
        {"image_id": every, "split": ["train"] * len(every), "keep": [True] * len(every)}
    )
    (data / "selection").mkdir()
    pq.write_table(table, data / "selection/selection.parquet")
    return len(every), used


def rows_of(kind: str, ids: list[str], rng) -> pa.Table:
    if not kind:
        rows = [
            {"image_id": key, "row_id": key, "url": key, "status": "ok", "jpg": rng.bytes(20_000)}
            for key in ids
        ]
        return pa.Table.from_pylist(rows, schema=shards.IMAGES)
    vectors = shards.to_float16(rng.normal(size=(len(ids), 512)).astype(np.float32))
    if kind == "texts/":
        rows = [
            {"image_id": key, "text": "a", "embedding": x}
            for key, x in zip(ids, vectors, strict=True)
        ]
        return pa.Table.from_pylist(rows, schema=shards.texts_schema(512))
    rows = [
        {"image_id": key, "view": 0, "flip": False, "embedding": x, "sha256": rng.bytes(32).hex()}
        | dict.fromkeys(("left", "top"), 0.0) | dict.fromkeys(("right", "bottom"), 8.0)
        for key, x in zip(ids, vectors, strict=True)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=shards.teacher_schema(512))


def column_bytes(table: pa.Table) -> int:
    """Of what training needs of a row group: ids, pictures, boxes and vectors."""
    names = {"image_id", "jpg", *BOX, "flip", "embedding"} & set(table.column_names)
    return table.select(sorted(names)).nbytes


def written(tables: list[pa.Table], path: Path) -> int:
    return shards.write_shard(path, tables[0].schema, tables, {"stage": "test"})


def epoch(dataset: Dataset, number: int) -> int:
    sampler = Sampler(dataset, 0, 32, 4)
    steps = range(number * sampler.steps, (number + 1) * sampler.steps)
    order, seen = TrainingOrder(sampler, 1.0, [32]), set()
    for step in steps:
        dataset.read_ahead(*order.rows(min(step + READ_AHEAD, steps[-1]), 0, 32))
        seen.update(sample.image_id for sample in order.samples(dataset, step, 0, 32))
    return len(seen)


def test_an_epoch_reads_at_most_a_tenth_more_than_it_uses_and_the_next_one_nothing(
    asked, tmp_path, monkeypatch
):
    monkeypatch.setenv(ADDRESS, f"s3://{object_store.BUCKET}/large")
    data = tmp_path / "data"
    count, used = write_large(data)
    dataset = Dataset(data, "train", 32, "bicubic", groups_in_use=2)
    asked.requests.clear()
    assert epoch(dataset, 0) == count
    assert 0.9 * used < asked.got("/large/") < 1.1 * used
    asked.requests.clear()
    fresh = Dataset(data, "train", 32, "bicubic", groups_in_use=2)
    assert epoch(fresh, 1) == count and asked.got("/large/") == 0

    monkeypatch.setattr(remote_shards, "LIMIT", used // 2)  # too small to help
    monkeypatch.setattr(remote_shards, "_BETWEEN_SWEEPS", used // 10)
    shutil.rmtree(data / WORK)
    epoch(Dataset(data, "train", 32, "bicubic", groups_in_use=2), 0)
    kept = sum(path.stat().st_size for path in (data / WORK).rglob("*") if path.is_file())
    assert used // 4 < kept < 0.7 * used
