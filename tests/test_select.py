"""What is trained on and what is held out follows from content, and every omission has a reason."""

import hashlib
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from support import worlds

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import read_stamp
from pipeline.data import database, shards
from stages.select import QUERY, _near_duplicates_note, select

GOOD = 60


@pytest.fixture
def data(small_world, tmp_path) -> Path:
    return shutil.copytree(small_world.data, tmp_path / "data")


def run(data: Path, **changes) -> dict[str, dict]:
    """Rows of the selection by the name of the image's file."""
    select(worlds.select_config(**changes), data)
    names = dict(
        database.ask(database.confined(data), "SELECT image_id, url FROM images").fetchall()
    )
    rows = pq.read_table(data / "selection/selection.parquet").to_pylist()
    assert len(rows) == len({row["image_id"] for row in rows}) == len(set(names))
    assert [row["image_id"] for row in rows] == sorted(names)
    return {names[row["image_id"]].removeprefix("file:"): row for row in rows}


def contents(world) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in world.root.iterdir()}


def test_every_image_is_kept_or_has_a_reason(data):
    for row in run(data, where="label = 'wide'").values():
        assert row["keep"] == (row["reason"] is None)
        assert not row["keep"] or row["split"] in ("train", "val", "test")
    counts = select(worlds.select_config(where="label = 'wide'"), data)
    assert sum(counts.values()) == GOOD + 2  # a row of a repeated url is no image of its own


def test_failures_keep_their_status_as_the_reason(data):
    found = run(data)
    assert found["missing.jpg"]["reason"] == "not_found" and not found["missing.jpg"]["keep"]
    assert found[""]["reason"] == "empty_url"


def test_exactly_one_of_each_exact_duplicate_is_kept_and_named_by_the_others(data, small_world):
    found = run(data)
    for first, second in ((f"{i}.jpg", f"{i + 50}.jpg") for i in range(5)):
        assert contents(small_world)[first] == contents(small_world)[second]
        pair = found[first], found[second]
        assert pair[0]["split"] == pair[1]["split"]
        (kept,), (left,) = ([r for r in pair if r["keep"] == keep] for keep in (True, False))
        assert left["reason"] == "duplicate" and left["duplicate_of"] == kept["image_id"]
        assert kept["duplicate_of"] is None
    assert sum(row["reason"] == "duplicate" for row in found.values()) == 5


def test_a_repeated_url_takes_no_image_away(data):
    assert any(row["keep"] for name, row in run(data).items() if name in ("0.jpg", "50.jpg"))


def test_the_split_follows_from_the_content_alone(data, small_world):
    """A number in [0, 1) by the hash of the original bytes: first test, then val, then train."""
    found, hashes = run(data, val=0.25, test=0.25), contents(small_world)
    for i in range(GOOD):
        split_hash = int(hashes[f"{i}.jpg"][:13], 16) / 16**13
        expected = "test" if split_hash < 0.25 else "val" if split_hash < 0.5 else "train"
        assert found[f"{i}.jpg"]["split"] == expected


def test_shares_are_kept_on_average_over_thousands_of_contents():
    """The stage's own query, over tables that hold nothing but what it looks at."""
    connection = duckdb.connect()
    connection.execute(
        "CREATE TABLE images AS SELECT 'i' || range AS image_id, 'r' || range AS row_id, 1 AS "
        "attempts, 'ok' AS status, sha256('c' || range) AS sha256_original, NULL AS jpg "
        "FROM range(5000)"
    )
    connection.execute("CREATE TABLE teacher AS SELECT image_id, 0 AS view, [1.0] AS embedding "
                       "FROM images")  # fmt: skip
    connection.execute("CREATE TABLE texts AS SELECT * EXCLUDE (view) FROM teacher WHERE false")
    connection.execute("CREATE TABLE near AS SELECT image_id, image_id AS family FROM texts")
    connection.execute("CREATE TABLE wanted AS SELECT row_id FROM images")
    query = QUERY.format(val=0.1, test=0.25)
    shares = dict(
        connection.sql(f"SELECT split, count(*) / 5000 FROM ({query}) GROUP BY 1").fetchall()
    )
    for split, share in {"test": 0.25, "val": 0.1, "train": 0.65}.items():
        assert abs(shares[split] - share) < 4 * (share * (1 - share) / 5000) ** 0.5


def test_a_larger_validation_share_moves_no_test_image(data):
    before = {name: row["split"] for name, row in run(data, val=0.1).items()}
    after = {name: row["split"] for name, row in run(data, val=0.4).items()}
    for name, split in before.items():
        assert split != "test" or after[name] == "test"
        assert split != "val" or after[name] == "val"


def vectors(data: Path) -> tuple[list[str], np.ndarray]:
    ids, matrices = [], []
    for path in shards.shard_paths(data / "teacher/images", "teacher-embed"):
        table = pq.read_table(path)
        table = table.filter(np.array(table["view"]) == 0)
        ids += table["image_id"].to_pylist()
        matrices.append(shards.embedding_matrix(table["embedding"]))
    return ids, np.concatenate(matrices)


def test_near_duplicates_share_a_split_and_one_of_them_is_kept(data):
    """The threshold lies between the pictures that were compressed twice and all other pairs."""
    ids, matrix = vectors(data)
    names = dict(
        database.ask(database.confined(data), "SELECT image_id, url FROM images").fetchall()
    )
    number = [int(names[key][5:-4]) for key in ids]
    cosines = matrix @ matrix.T
    pairs = {(a, b): cosines[i, j] for i, a in enumerate(number) for j, b in enumerate(number)}
    twice = {(i, i + 50) for i in range(10)}
    others = max(c for (a, b), c in pairs.items() if a < b and (a, b) not in twice)
    threshold = (min(pairs[pair] for pair in twice) + others) / 2
    assert others < threshold
    found = run(data, near_duplicates=float(threshold))
    for a, b in twice:
        pair = found[f"{a}.jpg"], found[f"{b}.jpg"]
        assert pair[0]["split"] == pair[1]["split"]
        assert sorted(row["keep"] for row in pair) == [False, True]
        reason = "duplicate" if a < 5 else "near duplicate"
        assert {row["reason"] for row in pair} == {None, reason}
    assert sum(row["keep"] for row in found.values()) == GOOD - 10


def test_a_threshold_that_leaves_most_images_out_is_named():
    counts = {"left out: near duplicate": 213, "test": 6, "train": 20, "val": 1}
    assert "213 of 240 images" in _near_duplicates_note(counts, 0.96)
    assert "(0.96)" in _near_duplicates_note(counts, 0.96)
    assert _near_duplicates_note({"left out: near duplicate": 13, "train": 20}, 0.96) is None


def test_one_group_of_everything_is_one_image(data):
    with pytest.raises(PipelineError, match="no image is left for"):
        run(data, near_duplicates=0.0)


# The filter


def test_where_is_sql_over_the_columns_of_images(data, small_world):
    labels = {row["url"][5:]: row["label"] for row in small_world.rows[:GOOD]}
    found = run(data, where="label = 'wide' AND width > height")
    assert all(row["reason"] == "where" for n, row in found.items() if labels.get(n) == "high")
    assert {labels[n] for n, row in found.items() if row["keep"]} == {"wide"}


def test_where_may_ask_how_well_caption_and_image_agree(data):
    sql = """
        SELECT url, max(list_cosine_similarity(teacher.embedding, texts.embedding)) FROM images
        JOIN teacher USING (image_id) JOIN texts USING (image_id)
        WHERE view = 0 AND status = 'ok' GROUP BY url
    """
    agreement = {
        url[5:]: value for url, value in database.ask(database.confined(data), sql).fetchall()
    }
    median = float(np.median(list(agreement.values())))
    found = run(data, where=f"caption_similarity > {median!r}")
    kept_out = {name for name, row in found.items() if row["reason"] == "where"}
    assert kept_out == {name for name, value in agreement.items() if value <= median}
    assert 20 < len(kept_out) < 40


def test_an_image_that_the_filter_leaves_out_does_not_take_its_duplicate_with_it(data):
    found = run(data, where="url <> 'file:0.jpg'")
    assert found["0.jpg"]["reason"] == "where" and found["50.jpg"]["keep"]
    found = run(data, where="url <> 'file:50.jpg'")
    assert found["50.jpg"]["reason"] == "where" and found["0.jpg"]["keep"]


def test_a_condition_that_is_null_is_not_met(data):
    assert {row["reason"] for row in run(data, where="label = 'wide' OR NULL").values()} > {"where"}


@pytest.mark.parametrize(
    "where",
    [
        "nonsense",
        "wdth > 3",
        "label =",
        "",
        "true; SELECT 1",
        "true, true",
        "true) OR (true",
        "label::INT > 3",
    ],
)
def test_a_condition_that_is_no_sql_is_refused_with_its_text(data, where):
    with pytest.raises(PipelineError, match=r"select\.where"):
        run(data, where=where)
    assert not (data / "selection").exists()


@pytest.mark.parametrize(
    "where",
    [
        "exists(SELECT * FROM read_text('{secret}'))",
        "exists(FROM '{secret}')",
        "exists(WITH x AS (COPY (SELECT 1) TO '{out}') FROM x)",
        "exists(FROM json_execute_serialized_sql(json_serialize_sql("
        "'WITH x AS (COPY (SELECT 1) TO ''{out}'') SELECT 1 FROM x')))",
        "true) TO '{out}'; COPY (SELECT true",
    ],
)
def test_a_condition_reaches_no_file(data, tmp_path, where):
    (tmp_path / "secret.csv").write_text("x\n1\n")
    with pytest.raises(PipelineError, match=r"select\.where"):
        run(data, where=where.format(secret=tmp_path / "secret.csv", out=tmp_path / "out.csv"))
    assert not (tmp_path / "out.csv").exists()


def test_a_filter_that_leaves_nothing_to_train_on_is_an_error_with_counts(data):
    for _ in range(2):
        with pytest.raises(PipelineError, match=r"no image is left for train and val and test.*60"):
            run(data, where="false")
    assert not (data / "selection").exists()  # distill would use it


def test_a_failed_selection_leaves_the_earlier_one(data):
    run(data)
    before = (data / "selection/_stamp.json").read_bytes()
    with pytest.raises(PipelineError, match="no image is left"):
        run(data, where="false")
    assert (data / "selection/_stamp.json").read_bytes() == before


def test_the_splits_that_later_stages_read_must_have_images(data):
    """distill reads train and val, evaluate the split that it is told; no other is asked for."""
    with pytest.raises(PipelineError, match="no image is left for val"):
        run(data, val=0.0)
    with pytest.raises(PipelineError, match="no image is left for test"):
        run(data, test=0.0)
    counts = select(worlds.select_config(test=0.0), data, evaluated="val")
    assert counts["val"] and "test" not in counts


# Runs


def test_a_second_run_writes_nothing_and_the_same_answer_comes_back(data):
    first = select(worlds.select_config(), data)
    path = data / "selection/selection.parquet"
    before = path.stat().st_mtime_ns
    assert select(worlds.select_config(), data) == first
    assert path.stat().st_mtime_ns == before
    assert read_stamp(data / "selection", "select").summary == first


def test_the_same_data_give_the_same_bytes(small_world, tmp_path):
    found = []
    for name in ("a", "b"):
        data = shutil.copytree(small_world.data, tmp_path / name)
        select(worlds.select_config(near_duplicates=0.999), data)
        found.append((data / "selection/selection.parquet").read_bytes())
    assert found[0] == found[1]


def test_a_teacher_of_other_images_is_refused(data):
    worlds.forge_stamp(
        data / "teacher", lambda stamp: stamp["recipe"]["inputs"].update(images="other")
    )
    with pytest.raises(PipelineError, match="Run `pipeline teacher-embed` first"):
        run(data)


def test_missing_stages_are_named_in_order(data):
    shutil.rmtree(data / "teacher")
    with pytest.raises(PipelineError, match="pipeline teacher-embed"):
        run(data)
    shutil.rmtree(data / "images")
    with pytest.raises(PipelineError, match="pipeline download"):
        run(data)
