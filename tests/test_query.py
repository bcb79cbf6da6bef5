"""`pipeline query` answers one SELECT over data/, and nothing that it is asked can do more."""

import csv
import io
import json
import re
import shutil
import stat
from pathlib import Path
from typing import get_args

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.choices import AnswerFormat
from pipeline.core.errors import PipelineError
from pipeline.data import database
from pipeline.data.database import TABLES, connect
from pipeline.explore.query import print_answer


@pytest.fixture
def data(tmp_path) -> Path:
    """Two rows of images."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rows = {"image_id": ["a", "b"], "caption": ["a cat", None], "jpg": [b"\xff\xd8", None]}
    pq.write_table(pa.table(rows), folder / "images/00000.parquet")
    return folder


def ask(data: Path, sql: str):
    return database.ask(database.confined(data), sql)


def refusal(data: Path, sql: str) -> str:
    with pytest.raises(PipelineError) as caught:
        ask(data, sql).fetchall()
    return str(caught.value)


# Reading


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM images",
        "select count(*) from images;",
        "-- why\nSELECT 2 /* ; */;",
        "FROM images SELECT count(*)",
        "WITH x AS (FROM images) SELECT count(*) FROM x",
        "VALUES (2)",
    ],
)
def test_one_select_is_answered_however_it_is_written(data, sql):
    assert ask(data, sql).fetchall() == [(2,)]


def test_every_table_is_a_view_over_its_shards(tmp_path):
    for number, (name, _) in enumerate(TABLES.values()):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for shard in range(2):
            table = pa.table({"number": [number], "shard": [shard]})
            pq.write_table(table, folder / f"{shard:05}.parquet")
    for number, table in enumerate(TABLES):
        sql = f"SELECT number, shard FROM {table} ORDER BY shard"
        assert ask(tmp_path, sql).fetchall() == [(number, 0), (number, 1)]


def test_runs_of_different_columns_are_one_table(tmp_path):
    (tmp_path / "runs").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "runs/1.parquet")
    pq.write_table(pa.table({"b": [2]}), tmp_path / "runs/2.parquet")
    assert set(ask(tmp_path, "SELECT a, b FROM runs").fetchall()) == {(1, None), (None, 2)}


@pytest.mark.parametrize("name", ["photos [2019]", "it's", "a*b?", "é ü"])
def test_a_project_may_lie_in_a_folder_of_any_name(data, tmp_path, name):
    moved = tmp_path / name / "data"
    moved.parent.mkdir()
    data.rename(moved)
    assert ask(moved, "SELECT count(*) FROM images").fetchall() == [(2,)]


def test_embeddings_are_lists_that_vector_functions_take(small_world):
    """DuckDB's own reader of Parquet is the reference; it knows half floats, Arrow's scan does not."""
    sql = """SELECT a.image_id, typeof(a.embedding), a.embedding, list_cosine_similarity(
             a.embedding, b.embedding), array_inner_product(a.embedding::FLOAT[32],
             b.embedding::FLOAT[32]) FROM teacher a, teacher b WHERE a.view = 0 AND b.view = 1
             ORDER BY ALL"""
    rows = connect(small_world.data).execute(sql).fetchall()
    assert len(rows) > 1000 and ask(small_world.data, sql).fetchall() == rows


def test_shards_behind_links_are_read(data, tmp_path):
    """As DVC leaves them with cache.type symlink."""
    (tmp_path / "cache").mkdir()
    (data / "images/00000.parquet").rename(tmp_path / "cache/ab")
    (data / "images/00000.parquet").symlink_to(tmp_path / "cache/ab")
    assert ask(data, "SELECT count(*) FROM images").fetchall() == [(2,)]


def test_a_flipped_bit_is_an_error_and_no_answer(small_world, tmp_path):
    shutil.copytree(small_world.data / "images", tmp_path / "images")
    shard = next((tmp_path / "images").glob("*.parquet"))
    with pq.ParquetFile(shard) as file:
        group = file.metadata.row_group(0)
        [column] = [
            c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "jpg"
        ]
        middle = column.data_page_offset + column.total_compressed_size // 2
    content = bytearray(shard.read_bytes())
    content[middle] ^= 1
    shard.write_bytes(content)
    assert ask(tmp_path, "SELECT count(caption) FROM images").fetchall()
    assert "CRC" in refusal(tmp_path, "SELECT max(jpg) FROM images")


@pytest.mark.parametrize("kind", [connect, database.confined])
def test_the_configuration_of_a_connection_is_locked(data, kind):
    for setting in (
        "enable_external_access = true",
        "memory_limit = '1TB'",
        "temp_directory = '/tmp'",
    ):
        with pytest.raises(duckdb.Error, match="locked"):
            kind(data).execute(f"SET {setting}")


def test_this_projects_own_queries_spill_into_a_private_folder(data):
    sql = "SELECT current_setting('temp_directory')"
    [(folder,)] = connect(data).execute(sql).fetchall()
    assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700
    assert database.confined(data).execute(sql).fetchall() == [("",)]


# Messages


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("change", [str.lower, str.title])
def test_a_table_whose_stage_has_not_run_names_the_command(tmp_path, table, change):
    message = refusal(tmp_path / "data", f"SELECT * FROM {change(table)}")
    assert message == f"there is no table {table} yet. Run `pipeline {TABLES[table][1]}` first."


def test_an_unknown_table_names_those_there_are(data):
    assert all(table in refusal(data, "SELECT * FROM pictures") for table in TABLES)


def test_an_unknown_column_names_those_there_are(data):
    message = refusal(data, "SELECT captoin FROM images")
    assert "captoin" in message and "caption" in message and "\n" not in message


def test_wrong_sql_says_where(data):
    assert 'syntax error at or near "SELEC"' in refusal(data, "SELEC 1")


def test_a_damaged_shard_names_the_folder_and_the_command(data):
    (data / "images/00000.parquet").write_bytes(b"PAR1 no more")
    message = refusal(data, "SELECT 1")
    assert "data/images" in message and "pipeline download" in message


# Answers


def answer(data: Path, sql: str, form: str, capfdbinary) -> bytes:
    print_answer(data, sql, form)
    return capfdbinary.readouterr().out


ROWS = "SELECT * FROM (VALUES (1, 'one', [1.5, 'nan'::FLOAT]), (2, NULL, NULL)) AS t(n, word, list)"


def test_csv_has_a_header_and_every_row(data, capfdbinary):
    text = answer(data, ROWS, "csv", capfdbinary).decode()
    assert list(csv.reader(io.StringIO(text))) == [
        ["n", "word", "list"],
        ["1", "one", "[1.5, nan]"],
        ["2", "", ""],
    ]


def test_json_is_an_object_a_line_that_strict_parsers_take(data, capfdbinary):
    def no_constant(name):
        raise ValueError(name)

    lines = answer(data, ROWS, "json", capfdbinary).decode().splitlines()
    assert [json.loads(line, parse_constant=no_constant) for line in lines] == [
        {"n": 1, "word": "one", "list": [1.5, None]},
        {"n": 2, "word": None, "list": None},
    ]


def test_parquet_holds_the_same_rows_and_types(data, capfdbinary):
    table = pq.read_table(io.BytesIO(answer(data, ROWS, "parquet", capfdbinary)))
    assert table["n"].to_pylist() == [1, 2] and table["word"].to_pylist() == ["one", None]
    assert table.schema.field("list").type == pa.list_(pa.float32())


def test_a_table_aligns_its_columns_and_counts_its_rows(data, capfdbinary):
    lines = answer(data, "SELECT image_id, caption, jpg FROM images", "table", capfdbinary)
    assert lines.decode().splitlines() == [
        "image_id  caption  jpg",
        "--------  -------  ---------",
        "a         a cat    <2 bytes>",
        "b         NULL     NULL",
        "(2 rows)",
    ]


def test_a_long_table_says_that_more_follows(data, capfdbinary):
    out = answer(data, "FROM range(101)", "table", capfdbinary).decode()
    assert "(100 rows, more follow" in out and len(out.splitlines()) == 103
    assert "(100 rows)" in answer(data, "FROM range(100)", "table", capfdbinary).decode()


def test_strangers_captions_cannot_command_the_terminal(data, capfdbinary):
    sql = "SELECT chr(27) || '[2J' || chr(13) || chr(10) || 'caption é 猫' AS text"
    out = answer(data, sql, "table", capfdbinary).decode()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out) and "caption é 猫" in out


def test_bytes_are_hexadecimal_where_there_are_no_bytes(data, capfdbinary):
    sql = "SELECT jpg FROM images WHERE image_id = 'a'"
    assert answer(data, sql, "csv", capfdbinary) == b"jpg\nffd8\n"
    assert json.loads(answer(data, sql, "json", capfdbinary)) == {"jpg": "ffd8"}


@pytest.mark.parametrize("form", get_args(AnswerFormat))
@pytest.mark.filterwarnings("error")
def test_no_rows_are_an_answer_too(data, form, capfdbinary):
    out = answer(data, "SELECT image_id FROM images WHERE false", form, capfdbinary)
    assert {"table": b"(0 rows)", "csv": b"image_id\n", "json": b"", "parquet": b"PAR1"}[
        form
    ] in out


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_a_fault_that_shows_after_many_rows_is_one_message(data, form, capfdbinary):
    sql = "SELECT CAST(CASE WHEN range = 150000 THEN 'x' ELSE '1' END AS INT) FROM range(160000)"
    with pytest.raises(PipelineError, match="Could not convert string 'x'"):
        print_answer(data, sql, form)


def test_what_parquet_cannot_hold_is_one_message(data, capfdbinary):
    with pytest.raises(PipelineError, match="interval"):
        print_answer(data, "SELECT INTERVAL 1 DAY", "parquet")
