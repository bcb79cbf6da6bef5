"""`pipeline verify` finds each broken promise, and nothing in a world that keeps them all."""

# a fixture's name is also an argument's

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import worlds

from pipeline.core.errors import PipelineError
from pipeline.core.layout import FOLDERS, STAGES, STAMP_FILE
from pipeline.core.provenance import content, digest, file_digest, stamp_of
from pipeline.core.records import NamedTeacher
from pipeline.data import shards
from pipeline.verify import files
from pipeline.verify.verify import findings_text, verify


@pytest.fixture
def data(finished_world, tmp_path) -> Path:
    return shutil.copytree(finished_world, tmp_path / "data")


def promises(data: Path, **how) -> list[str]:
    return sorted({finding.promise for finding in verify(data, **how)})


def test_a_world_that_keeps_every_promise_has_no_finding(finished_world, tiny_teacher):
    found = verify(finished_world, recompute=1.0, card=tiny_teacher)
    assert found == []
    assert findings_text(found, "table") == "every promise is kept"
    assert json.loads(findings_text(found, "json")) == []


def test_verify_writes_nothing(finished_world, tiny_teacher):
    before = {p: p.stat().st_mtime_ns for p in finished_world.rglob("*")}
    verify(finished_world, recompute=0.1, card=tiny_teacher)
    assert {p: p.stat().st_mtime_ns for p in finished_world.rglob("*")} == before


def test_an_empty_folder_is_an_error_and_unfinished_stages_are_none(finished_world, tmp_path):
    with pytest.raises(PipelineError, match="no finished stage"):
        verify(tmp_path)
    shutil.copytree(finished_world / "images", tmp_path / "images")
    assert verify(tmp_path) == []


# Damage: the bytes are not those of the stamp


def flip_a_bit(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.unlink()  # the work folder shares its bytes
    path.write_bytes(whole)


def halve(path: Path) -> None:
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("damage", [flip_a_bit, halve, Path.unlink], ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    "name",
    ["images/00001.parquet", "teacher/images/00001.parquet", "teacher/texts/prompts.parquet",
     "selection/selection.parquet", "student/model.safetensors", "student/config.json",
     "evaluation/metrics.json", "evaluation/index/00001.parquet"],
)  # fmt: skip
def test_a_damaged_file_is_one_finding_that_names_it(data, name, damage):
    damage(data / name)
    (finding,) = verify(data)
    stage_folder = name.split("/")[0]
    assert (finding.promise, finding.place) == ("every file has the bytes of its stamp", name)
    assert finding.run.startswith(f"rm -r {data / stage_folder} && pipeline ")


def test_what_the_finding_says_to_run_mends_the_damage(data):
    flip_a_bit(data / "selection/selection.parquet")
    (finding,) = verify(data)
    assert finding.run == f"rm -r {data}/selection && pipeline select"
    shutil.rmtree(data / "selection")
    from stages.select import select

    select(worlds.select_config(), data)
    assert verify(data) == []


FILES = '{"stage": "teacher_embed", "stamp": "x", "recipe": {}, "files": {"a": 1}, "summary": {}}'


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"stage": 1}', "no json", FILES])
def test_a_damaged_stamp_is_a_finding_not_a_traceback(data, text):
    (data / "teacher" / STAMP_FILE).write_text(text)
    assert "a finished stage says how it was made" in promises(data)


def test_an_edited_recipe_is_noticed(data):
    worlds.forge_stamp(
        data / "teacher", lambda stamp: stamp["recipe"]["parameters"].update(batch=9)
    )
    assert promises(data) == ["a finished stage says how it was made"]


@pytest.mark.parametrize(
    ("stage_folder", "key"),
    [("teacher", "dtype"), ("selection", "train"), ("student", "steps"), ("evaluation", "split")],
)
def test_an_edited_summary_is_noticed(data, stage_folder, key):
    worlds.forge_stamp(data / stage_folder, lambda stamp: stamp["summary"].update({key: 77}))
    assert promises(data) == ["a stamp's summary is what its files say"]


def test_an_edit_that_no_file_contradicts_is_noticed(data):
    """What was only measured stands nowhere else: the stamp's own digest is all there is."""
    path = data / "teacher" / STAMP_FILE
    stamp = json.loads(path.read_text())
    stamp["summary"]["measured"] = 0.99
    path.unlink()
    path.write_text(files.canonical(stamp))
    (finding,) = (f for f in verify(data) if f.place == f"teacher/{STAMP_FILE}")
    assert "its own digest" in finding.found


def test_a_strangers_file_is_named(data):
    (data / "images/notes.txt").write_text("mine")
    (finding,) = verify(data)
    assert finding.place == "images/notes.txt" and "no others" in finding.promise


def test_an_unreadable_run_is_named_and_hides_nothing_else(data):
    (data / "runs/broken.parquet").write_bytes(b"PAR1")
    (data / "images/notes.txt").write_text("mine")
    assert [f.place for f in verify(data)] == ["images/notes.txt", "runs/broken.parquet"]


def test_a_leftover_of_no_stage_is_named(data):
    (data / ".work/mystery").mkdir()
    assert [f.place for f in verify(data)] == [".work/mystery"]


def test_another_run_of_an_earlier_stage_breaks_the_chain(data):
    from stages.select import select

    select(worlds.select_config(test=0.5), data)
    found = verify(data)
    assert {f.promise for f in found} >= {"each stage was made from what lies there now"}
    assert {f.place for f in found if "made from" in f.promise} == {"student", "evaluation"}


def test_a_missing_input_is_noticed(data):
    shutil.rmtree(data / "selection")
    found = {f.place: f.run for f in verify(data)}
    assert found == {"student": "pipeline select", "evaluation": "pipeline select"}


# Wrong contents under right digests: what a faulty stage, or a forger, would leave


def forge(data: Path, name: str, change) -> None:
    """Rewrite a shard (change: table -> table) and all stamps, so that only contents are wrong."""
    path = data / name
    file = pq.ParquetFile(path)
    schema = file.schema_arrow
    groups = [file.read_row_group(i) for i in range(file.num_row_groups)]
    made = json.loads(schema.metadata[b"provenance"])
    table = change(pa.concat_tables(groups))
    path.unlink()
    shards.write_shard(path, schema.remove_metadata(), [table], made)
    restamp(data)


def restamp(data: Path) -> None:
    stamps = {}
    for stage_folder in FOLDERS:
        stamp = json.loads((data / stage_folder / STAMP_FILE).read_text())
        for name in stamp["files"]:
            path = data / stage_folder / name
            if stage_folder == "teacher" and not name.endswith("prompts.parquet"):
                source = data / "images" / path.name
                rebase(path, "input", file_digest(source))
            stamp["files"][name] |= {"sha256": file_digest(path), "bytes": path.stat().st_size}
        for source in STAGES[stamp["stage"]].inputs:
            stamp["recipe"]["inputs"][source] = content(stamps[source])
        stamp["stamp"] = digest(stamp["recipe"])
        recount(data, stage_folder, stamp["summary"])
        if stage_folder == "student":
            restamp_student(data, stamp)
        worlds.forge_stamp(data / stage_folder, lambda old, new=stamp: old.update(new))
        stamps[stage_folder] = stamp_of(data, stage_folder)


def recount(data: Path, stage_folder: str, summary: dict) -> None:
    """Let the summary follow the files, where stages would have counted them."""
    if stage_folder == "teacher":
        for kind in ("images", "texts"):
            paths = (data / stage_folder / kind).glob("*.parquet")
            summary[kind] = sum(pq.read_metadata(path).num_rows for path in paths)
    if stage_folder == "evaluation":
        summary.clear()
        summary |= json.loads((data / "evaluation/metrics.json").read_text())
    if stage_folder == "selection":
        summary.clear()
        for row in pq.read_table(data / SELECTION).to_pylist():
            key = row["split"] if row["keep"] else f"left out: {row['reason']}"
            summary[key] = summary.get(key, 0) + 1


def rebase(path: Path, key: str, value: str) -> None:
    """Change one value of a shard's provenance."""
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(i) for i in range(file.num_row_groups)]
        schema = file.schema_arrow
    made = json.loads(schema.metadata[b"provenance"]) | {key: value}
    path.unlink()
    shards.write_shard(path, schema.remove_metadata(), groups, made)


def restamp_student(data: Path, stamp: dict) -> None:
    path = data / "student/config.json"
    card = json.loads(path.read_text())
    card["provenance"]["stamp"] = stamp["stamp"]
    card["weights_digest"] = file_digest(data / "student/model.safetensors")
    path.unlink()
    path.write_text(json.dumps(card))
    for name in ("config.json", "model.safetensors"):
        file = data / "student" / name
        stamp["files"][name] |= {"sha256": file_digest(file), "bytes": file.stat().st_size}


def put(column: str, value, where=0):
    """Put a value (or a function of the old one and the row) into one row of a column."""

    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        at = where if isinstance(where, int) else next(i for i, r in enumerate(rows) if where(r))
        rows[at][column] = value(rows[at]) if callable(value) else value
        return pa.Table.from_pylist(rows, schema=table.schema)

    return change


def without(where):
    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        del rows[next(i for i, row in enumerate(rows) if where(row))]
        return pa.Table.from_pylist(rows, schema=table.schema)

    return change


def repeated(where):
    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows.append(next(row for row in rows if where(row)))
        return pa.Table.from_pylist(rows, schema=table.schema)

    return change


def good(row: dict) -> bool:
    return row["status"] == "ok"


def anything(row: dict) -> bool:
    return True


def kept(row: dict) -> bool:
    return bool(row["keep"])


def other_jpg(row: dict) -> bytes:
    return worlds.picture(99, row["width"], row["height"], "JPEG")


def other_split(row: dict) -> str:
    return "train" if row["split"] != "train" else "test"


SHARD, VECTORS, TEXTS = (
    f"{stage_folder}/00001.parquet"
    for stage_folder in ("images", "teacher/images", "teacher/texts")
)
SELECTION = "selection/selection.parquet"
ROW = "a row is an image or says why not"
UNIT = "embeddings are finite, of unit length"

FORGERIES = {
    "unknown status": (SHARD, put("status", "mystery"), ROW),
    "image_id of another url": (SHARD, put("image_id", "0" * 32), ROW),
    "failure without reason": ("images/*", put("error", None, lambda r: not good(r)), ROW),
    "another JPEG": (SHARD, put("jpg", other_jpg, good), ROW),
    "half a JPEG": (SHARD, put("jpg", lambda r: r["jpg"][:200], good), ROW),
    "wrong size": (SHARD, put("width", 7, good), ROW),
    "lost row": (SHARD, without(good), "as many rows as the manifest has"),
    "row_id twice": (SHARD, repeated(good), "as many rows as the manifest has"),
    "vector with NaN": (VECTORS, put("embedding", [float("nan")] * 32), UNIT),
    "zero vector": (VECTORS, put("embedding", [0.0] * 32), UNIT),
    "long vector": (VECTORS, put("embedding", [1.0] * 32), UNIT),
    "no vector": (VECTORS, put("embedding", None), UNIT),
    "long text vector": (TEXTS, put("embedding", [1.0] * 32), UNIT),
    "lost view": (VECTORS, without(lambda r: r["view"] == 1), "every good image has every view"),
    "view twice": (VECTORS, repeated(lambda r: r["view"] == 1), "a view is embedded once"),
    "vector of another JPEG": (
        VECTORS, put("sha256", "0" * 64, lambda r: r["view"] == 1),
        "a teacher row is of a good image's very JPEG",
    ),
    "box outside": (VECTORS, put("right", 1e4), "crop boxes lie inside their images"),
    "box of NaN": (VECTORS, put("top", float("nan")), "crop boxes lie inside their images"),
    "empty box": (VECTORS, put("left", lambda r: r["right"]), "crop boxes lie inside their images"),
    "lost caption": (TEXTS, without(anything), "every caption is embedded"),
    "caption twice": (TEXTS, repeated(anything), "a text is embedded once"),
    "lost prompt": (
        "teacher/texts/prompts.parquet", without(anything), "every prompt is embedded",
    ),
    "image not judged": (
        SELECTION, without(lambda r: not kept(r) and r["reason"] == "not_found"),
        "every image is selected or left out, once",
    ),
    "image judged twice": (
        SELECTION, repeated(lambda r: r["reason"] == "not_found"),
        "every image is selected or left out, once",
    ),
    "left out without reason": (
        SELECTION, put("reason", None, lambda r: r["reason"] == "not_found"),
        "what is left out has a reason, what is kept a split",
    ),
    "kept without split": (
        SELECTION, put("split", "somewhere", kept),
        "what is left out has a reason, what is kept a split",
    ),
    "duplicate of nothing": (
        SELECTION, put("duplicate_of", "0" * 32, lambda r: r["reason"] == "duplicate"),
        "a duplicate names the image that is kept for it",
    ),
    "content in two splits": (
        SELECTION, put("split", other_split, lambda r: r["reason"] == "duplicate"),
        "a content is in one split",
    ),
    "lost index row": (
        "evaluation/index/00001.parquet", without(anything),
        "the index holds exactly the kept images",
    ),
    "index row twice": (
        "evaluation/index/00001.parquet", repeated(anything),
        "the index holds exactly the kept images",
    ),
    "long index vector": (
        "evaluation/index/00001.parquet", put("embedding", [1.0] * 32), UNIT,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGERIES)
def test_each_broken_promise_is_exactly_the_finding(data, name):
    shard, change, promise = FORGERIES[name]
    if "*" in shard:  # the shard that has such a row
        missing = hashlib.sha256(b"file:missing.jpg").hexdigest()
        shard = f"images/{int(missing[:8], 16) % 3:05}.parquet"
    forge(data, shard, change)
    assert promises(data) == [promise]


def counted(data: Path) -> None:
    """Bring the number of rows that data/images' stamp names up to date."""
    counts = {}
    for path in (data / "images").glob("*.parquet"):
        for status in pq.read_table(path)["status"].to_pylist():
            counts[status] = counts.get(status, 0) + 1
    worlds.forge_stamp(data / "images", lambda stamp: stamp.update(summary={"rows": counts}))


def test_a_repeated_row_is_found_even_where_the_stamp_counts_it(data):
    forge(data, SHARD, repeated(good))
    counted(data)
    assert promises(data) == ["an image is fetched once", "row_id is unique"]


def test_two_kept_copies_of_a_content_are_found(data):
    def keep_the_copy(table):
        rows = table.to_pylist()
        row = next(row for row in rows if row["reason"] == "duplicate")
        row |= {"keep": True, "reason": None, "duplicate_of": None}
        return pa.Table.from_pylist(rows, schema=table.schema)

    forge(data, SELECTION, keep_the_copy)
    assert promises(data) == ["a content is kept once", "the index holds exactly the kept images"]


def test_a_kept_image_that_failed_is_found(data):
    def keep_the_missing(table):
        rows = table.to_pylist()
        row = next(row for row in rows if row["reason"] == "not_found")
        row |= {"keep": True, "reason": None, "split": "train"}
        return pa.Table.from_pylist(rows, schema=table.schema)

    forge(data, SELECTION, keep_the_missing)
    assert "every kept image is good and has a vector" in promises(data)


def test_one_vector_for_two_different_pictures_is_found(data):
    """What a generator that reuses its buffer would leave."""

    def reuse(table):
        rows = table.to_pylist()
        rows[1]["embedding"] = rows[0]["embedding"]
        return pa.Table.from_pylist(rows, schema=table.schema)

    forge(data, VECTORS, reuse)
    assert promises(data) == ["different images have different vectors"]


def test_one_vector_for_two_files_that_look_the_same_is_no_finding(data):
    """White pictures of two widths differ in bytes and agree in what the teacher saw."""
    white = {}

    def whiten(table):
        rows = table.to_pylist()
        for row, width in zip([row for row in rows if row["jpg"]], (40, 48), strict=False):
            jpg = blank(width)
            facts = {"jpg": jpg, "width": width, "height": 32}
            facts["sha256"] = facts["sha256_original"] = hashlib.sha256(jpg).hexdigest()
            white[row["image_id"]] = facts["sha256"]
            row |= facts
        return pa.Table.from_pylist(rows, schema=table.schema)

    def share_a_vector(table):
        rows = table.to_pylist()
        box = {"left": 2.0, "top": 0.0, "right": 34.0, "bottom": 32.0}
        for row in rows:
            if row["image_id"] in white:
                row |= box | {"sha256": white[row["image_id"]], "embedding": [1.0] + [0.0] * 31}
        return pa.Table.from_pylist(rows, schema=table.schema)

    forge(data, SHARD, whiten)
    forge(data, VECTORS, share_a_vector)
    assert len(set(white.values())) == 2
    assert not [f for f in verify(data) if f.place == "teacher"]


def blank(width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 32), "white").save(file, "JPEG")
    return file.getvalue()


def test_a_shard_of_other_columns_is_a_finding(data):
    path = data / SHARD
    made = json.loads(pq.read_schema(path).metadata[b"provenance"])
    path.unlink()
    shards.write_shard(path, pa.schema([("a", pa.int32())]), [pa.table({"a": [1]})], made)
    restamp(data)
    assert promises(data) == [ROW]


def test_a_shard_of_another_list_is_a_finding(data):
    rebase(data / SHARD, "list", "0" * 32)
    restamp(data)
    assert promises(data) == [ROW]


def test_a_teacher_shard_of_another_image_shard_is_a_finding(data):
    restamp(data)
    assert verify(data) == []
    path = data / VECTORS
    rebase(path, "input", "0" * 32)
    entry = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    worlds.forge_stamp(
        data / "teacher", lambda stamp: stamp["files"]["images/00001.parquet"].update(entry)
    )
    assert "made from another images/00001.parquet" in {f.found for f in verify(data)}


@pytest.mark.parametrize("fault", ["NaN", "another shape", "no safetensors"])
def test_a_student_that_cannot_be_used_is_a_finding(data, fault):
    path = data / "student/model.safetensors"
    state = load_file(path)
    path.unlink()
    if fault == "NaN":
        state["ln_pre.bias"] = torch.full_like(state["ln_pre.bias"], float("nan"))
    if fault == "another shape":
        state["ln_pre.bias"] = torch.zeros(7)
    if fault == "no safetensors":
        path.write_bytes(b"\xff" * 100)
    else:
        save_file(state, path)
    restamp(data)
    assert promises(data) == ["the student loads, is finite and fits its recipe"]


def test_a_figure_without_its_floor_is_a_finding(data):
    path = data / "evaluation/metrics.json"
    figures = json.loads(path.read_text())
    del figures["fidelity"]["cosine"]["floor"]
    path.unlink()
    path.write_text(json.dumps(figures))
    restamp(data)
    (promise,) = promises(data)
    assert "its floor and its ceiling" in promise


# Computed again


@pytest.mark.parametrize("share", [1e-9, 0.3, 1.0])
def test_recomputing_reads_at_least_one_row_and_agrees(finished_world, tiny_teacher, share):
    assert verify(finished_world, recompute=share, card=tiny_teacher) == []


@pytest.mark.parametrize("shard", [VECTORS, TEXTS])
def test_a_vector_that_the_teacher_never_said_is_found_only_by_asking_it(data, tiny_teacher, shard):
    wrong = np.random.default_rng(0).normal(size=32)
    wrong = (wrong / np.linalg.norm(wrong)).astype(np.float16).tolist()
    forge(data, shard, put("embedding", wrong))
    assert verify(data) == []
    found = verify(data, recompute=1.0, card=tiny_teacher)
    assert [f.promise for f in found] == [
        "a stored vector is what the teacher says of its pixels or text"
    ]
    assert "cosine" in found[0].found


def test_recomputing_needs_the_very_teacher(finished_world, tmp_path):
    with pytest.raises(PipelineError, match="--card"):
        verify(finished_world, recompute=0.1)
    other = worlds.write_teacher(tmp_path, seed=1)
    with pytest.raises(PipelineError, match="another teacher"):
        verify(finished_world, recompute=0.1, card=other)


def test_imported_embeddings_without_some_images_keep_their_own_promise(small_world, tmp_path):
    from stages.import_embeddings import import_embeddings
    from stages.select import select

    data = tmp_path / "data"
    shutil.copytree(small_world.data / "images", data / "images")
    vectors = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    np.savez(tmp_path / "v.npz", embedding=vectors, url=[f"file:{i}.jpg" for i in range(40)])
    theirs = NamedTeacher(
        name="theirs", model="ViT-B-32", pretrained=None, sha256=None, activation="gelu"
    )
    import_embeddings(data, tmp_path / "v.npz", teacher=theirs)
    select(worlds.select_config(), data)
    assert verify(data) == []
    change = put("reason", "where", lambda row: row["reason"] == "no embedding")
    path = data / SELECTION
    table = change(pq.read_table(path))
    path.unlink()
    shards.write_shard(path, shards.SELECTION, [table], {})

    def recounted(stamp: dict) -> None:
        found = {"sha256": file_digest(path), "bytes": path.stat().st_size}
        stamp["files"][path.name].update(found)
        recount(data, "selection", stamp["summary"])

    worlds.forge_stamp(data / "selection", recounted)
    assert promises(data) == ["a good image without a vector is left out as `no embedding`"]
    with pytest.raises(PipelineError, match="imported"):
        verify(data, recompute=0.1)


# As text


def test_findings_say_what_to_run_as_table_and_as_json(data):
    (data / ".work/mystery").mkdir()
    found = verify(data)
    text = findings_text(found, "table")
    assert f"run:   rm -r {data}/.work/mystery" in text and "1 broken promise" in text
    assert json.loads(findings_text(found, "json"))[0]["place"] == ".work/mystery"
