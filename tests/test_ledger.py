"""`pipeline query` answers one SELECT over data/, and nothing that it is asked can do more."""

import csv
import io
import json
import re
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import PipelineError
from pipeline.data.database import TABLES, ask, connect
from pipeline.explore.query import FORMATS, print_answer

SECRET = "the secret"


@pytest.fixture
def data(tmp_path) -> Path:
    """Two rows of images beside a secret that a link inside data/ leads to."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rows = {"image_id": ["a", "b"], "caption": ["a cat", None], "jpg": [b"\xff\xd8", None]}
    pq.write_table(pa.table(rows), folder / "images/00000.parquet")
    (tmp_path / "secret.csv").write_text(f"x\n{SECRET}\n")
    (folder / "link.csv").symlink_to(tmp_path / "secret.csv")
    (folder / "linked").symlink_to(tmp_path)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def refusal(data: Path, sql: str) -> str:
    before = files(data.parent)
    with pytest.raises(PipelineError) as caught:
        ask(data, sql).fetchall()
    assert files(data.parent) == before
    assert SECRET not in str(caught.value)
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
    for number, (pattern, _) in enumerate(TABLES.values()):
        folder = (tmp_path / pattern).parent
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


def test_files_of_a_folder_named_readable_can_be_joined(data, tmp_path):
    (tmp_path / "manifests").mkdir()
    pq.write_table(pa.table({"n": [7]}), tmp_path / "manifests/m.parquet")
    sql = f"SELECT n FROM '{tmp_path}/manifests/m.parquet'"
    assert ask(data, sql, tmp_path / "manifests").fetchall() == [(7,)]
    assert "Permission" in refusal(data, sql)


# Nothing but reading


WRITES = "(SELECT 1) TO '{data}/images/00000.parquet' (FORMAT parquet)"


@pytest.mark.parametrize(
    "sql",
    [
        f"COPY {WRITES}",
        f"copy {WRITES}",
        f"  /* SELECT */ COPY {WRITES};",
        f"EXPLAIN ANALYZE COPY {WRITES}",
        f"EXPLAIN COPY {WRITES}",
        f"SELECT 1; COPY {WRITES}",
        f"COPY {WRITES}; SELECT 1",
        f"PREPARE p AS COPY {WRITES}",
        f"BEGIN; COPY {WRITES}; COMMIT",
        "COPY images TO '{data}/out.csv'",
        "COPY images FROM '{data}/link.csv'",
        "EXPORT DATABASE '{data}/export'",
        "IMPORT DATABASE '{data}'",
        "ATTACH '{data}/new.db'",
        "ATTACH ':memory:' AS other",
        "CREATE TABLE t AS SELECT 1",
        "CREATE TABLE '{data}/x' AS SELECT 1",
        "CREATE SECRET (TYPE s3)",
        "INSERT INTO images SELECT * FROM images",
        "DROP VIEW images",
        "DELETE FROM images",
        "UPDATE images SET caption = 'x'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "PRAGMA version",
        "PRAGMA enable_profiling",
        "SET enable_external_access = true",
        "SET VARIABLE x = 1",
        "RESET allowed_directories",
        "CALL pragma_version()",
        "CHECKPOINT",
        "VACUUM",
        "USE memory",
        "SELECT 1; SELECT 2",
        "EXPLAIN SELECT 1",
        "",
        "  ; ",
        "-- only a comment",
    ],
)
def test_what_is_not_one_select_is_refused(data, sql):
    assert "expected exactly one SELECT" in refusal(data, sql.format(data=data))


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_blob('/proc/self/environ')",
        "SELECT * FROM read_csv('{data}/../secret.csv')",
        "SELECT * FROM '{data}/images/../../secret.csv'",
        "SELECT * FROM '{data}/link.csv'",
        "SELECT * FROM '{data}/linked/secret.csv'",
        "SELECT * FROM read_csv('{data}/linked/*.csv')",
        "SELECT * FROM read_json('/etc/passwd')",
        "SELECT * FROM glob('{data}/../*')",
        "SELECT * FROM sniff_csv('/etc/passwd')",
        "SELECT * FROM parquet_metadata('/etc/passwd')",
        "SELECT * FROM read_parquet('http://127.0.0.1/x.parquet')",
        "SELECT * FROM query('COPY (SELECT 1) TO ''{data}/out.csv''')",
        "SELECT * FROM enable_logging(storage = 'file', storage_path = '{data}/log')",
        "SELECT * FROM enable_profiling(save_location := '{data}/profile.json')",
        "SELECT getenv('HOME')",
        "SELECT * FROM connection",
        "SELECT * FROM statements",
    ],
)
def test_a_select_reads_nothing_outside_data_and_writes_nothing(data, sql):
    assert refusal(data, sql.format(data=data.resolve()))


def test_the_configuration_of_a_connection_is_locked(data):
    with pytest.raises(duckdb.Error, match="locked"):
        connect(data).execute("SET enable_external_access = true")


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


@pytest.mark.parametrize("form", FORMATS)
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


def test_an_unknown_format_names_those_there_are(data):
    with pytest.raises(PipelineError, match="table, csv, json, parquet"):
        print_answer(data, "SELECT 1", "xml")
