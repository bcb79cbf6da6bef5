"""SQL that wants more than rows: no statement of a user reads, writes or changes anything else."""

import os
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import worlds

from pipeline.core.errors import PipelineError
from pipeline.data.database import ask, confined

SECRET = "the secret"

# One or more of every kind of statement that DuckDB's grammar knows. {d} is data/, {o} a file
# outside of it that is not there yet, {s} the secret.
STATEMENTS = {
    "ALTER": ["ALTER TABLE images ADD COLUMN x INT", "ALTER VIEW images RENAME TO pictures"],
    "ANALYZE": ["ANALYZE", "ANALYZE images"],
    "ATTACH": ["ATTACH '{o}'", "ATTACH ':memory:' AS other", "ATTACH '{s}' AS s (TYPE sqlite)"],
    "CALL": [
        "CALL pragma_version()",
        "CALL enable_logging(storage = 'file', storage_path = '{o}')",
    ],
    "COPY": [
        "COPY (SELECT 1) TO '{d}/images/00000.parquet' (FORMAT parquet)",
        "COPY (SELECT 'hello') TO '{o}'",
        "COPY images TO '{o}' (FORMAT json)",
        "COPY (SELECT 1) TO '{d}/parts' (FORMAT csv, PER_THREAD_OUTPUT)",
        "COPY images FROM '{s}'",
        "copy (select 1) to 'relative.csv'",
        "COPY (SELECT 1) TO '.tmp/x.csv'",
        "COPY (SELECT 1) TO '/dev/stdout'",
    ],
    "COPY_DATABASE": ["COPY FROM DATABASE memory TO other"],
    "CREATE": [
        "CREATE TABLE t AS SELECT 1",
        "CREATE TABLE '{o}' AS SELECT 1",
        "CREATE TABLE t AS FROM read_csv('{s}')",
        "CREATE VIEW v AS FROM '{s}'",
        "CREATE PERSISTENT SECRET (TYPE s3)",
        "CREATE MACRO m() AS TABLE FROM read_text('{s}')",
    ],
    "DELETE": ["DELETE FROM images", "TRUNCATE images"],
    "DETACH": ["DETACH memory", "USE memory"],
    "DROP": ["DROP VIEW images", "DROP VIEW IF EXISTS images"],
    "EXECUTE": ["EXECUTE p"],
    "EXPLAIN": ["EXPLAIN ANALYZE COPY (SELECT 1) TO '{o}'", "EXPLAIN SELECT 1"],
    "EXPORT": ["EXPORT DATABASE '{o}'", "IMPORT DATABASE '{d}'"],
    "INSERT": ["INSERT INTO images SELECT * FROM images", "INSERT INTO images FROM '{s}'"],
    "LOAD": ["INSTALL httpfs", "LOAD httpfs", "LOAD '{o}'", "FORCE INSTALL httpfs FROM '{o}'"],
    "MERGE_INTO": [
        "MERGE INTO images USING images AS i ON images.image_id = i.image_id WHEN MATCHED THEN DELETE"
    ],
    "PRAGMA": ["PRAGMA version", "PRAGMA enable_profiling", "PRAGMA profiling_output = '{o}'"],
    "PREPARE": ["PREPARE p AS COPY (SELECT 1) TO '{o}'", "PREPARE p AS SELECT 1"],
    "SET": [
        "SET enable_external_access = true",
        "SET allowed_directories = ['/']",
        "SET log_query_path = '{o}'",
        "RESET allowed_directories",
        "SET GLOBAL temp_directory = '{o}'",
    ],
    "TRANSACTION": ["BEGIN", "COMMIT", "ROLLBACK"],
    "UPDATE": ["UPDATE images SET caption = 'x'"],
    "VACUUM": ["VACUUM", "CHECKPOINT", "FORCE CHECKPOINT"],
    "VARIABLE_SET": ["SET VARIABLE x = (SELECT content FROM read_text('{s}'))"],
    "EXTENSION": [".shell touch {o}", "SUMMARIZE read_csv('{s}')", "SHOW TABLES FROM '{s}'"],
}
NO_SYNTAX = {"CREATE_FUNC", "INVALID", "LOGICAL_PLAN", "MULTI", "RELATION", "SELECT"}
SMUGGLED = {  # ways to bring a statement in under a SELECT
    "as it is": "{x}",
    "first of two": "{x}; SELECT 1",
    "second of two": "SELECT 1; {x}",
    "in a comment's clothes": "/* SELECT */ {x};",
    "body of a CTE": "WITH x AS ({x}) SELECT count(*) FROM x",
    "materialised": "WITH x AS MATERIALIZED ({x}) FROM x",
    "recursive": "WITH RECURSIVE x AS ({x} UNION ALL FROM x) FROM x",
    "inner CTE": "FROM (WITH x AS ({x}) FROM x)",
    "subquery": "SELECT * FROM ({x})",
    "expression": "SELECT exists({x})",
    "query()": "FROM query('{q}')",
    "CTE in query()": "FROM query('WITH x AS ({q}) FROM x')",
    "serialized": "FROM json_execute_serialized_sql(json_serialize_sql('{q}'))",
    "serialized CTE": "FROM json_execute_serialized_sql("
    "json_serialize_sql('WITH x AS ({q}) SELECT 1 FROM x'))",
    "explained": "EXPLAIN ANALYZE WITH x AS ({x}) FROM x",
}
READS = [
    "SELECT * FROM read_text('{s}')",
    "SELECT * FROM read_blob('/proc/self/environ')",
    "SELECT * FROM read_csv('{s}')",
    "SELECT * FROM read_csv('{d}/*')",
    "SELECT * FROM '{s}'",
    "SELECT * FROM '{d}/images/00000.parquet'",
    "SELECT * FROM '{d}/images/../../secret.csv'",
    "SELECT * FROM '{d}/link.csv'",
    "SELECT * FROM '{d}/linked/secret.csv'",
    "SELECT * FROM read_csv('{d}/linked/*.csv')",
    "SELECT * FROM read_json('{s}')",
    "SELECT * FROM read_json_auto('{s}')",
    "SELECT * FROM read_ndjson_objects('{s}')",
    "SELECT * FROM read_parquet('{d}/images/*.parquet')",
    "SELECT * FROM read_duckdb('{s}')",
    "SELECT * FROM glob('{d}/../*')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM sniff_csv('{s}')",
    "SELECT * FROM parquet_metadata('{d}/images/00000.parquet')",
    "SELECT * FROM parquet_file_metadata('/etc/passwd')",
    "SELECT * FROM parquet_kv_metadata('/etc/passwd')",
    "SELECT * FROM parquet_schema('/etc/passwd')",
    "SELECT * FROM parquet_bloom_probe('/etc/passwd', 'a', 1)",
    "SELECT * FROM read_parquet('http://127.0.0.1:1/x.parquet')",
    "SELECT * FROM read_csv('https://127.0.0.1:1/x.csv')",
    "SELECT * FROM 's3://bucket/x.parquet'",
    "SELECT * FROM read_text(['{s}', '{s}'])",
    "SELECT (SELECT content FROM read_text('{s}'))",
    "SELECT * FROM query_table('{s}')",
    "SELECT * FROM query('FROM read_text(''{s}'')')",
    "FROM json_execute_serialized_sql(json_serialize_sql('SELECT * FROM read_text(''{s}'')'))",
    "SELECT * FROM read_csv('/dev/stdin')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM which_secret('s3://x', 's3')",
    "SELECT getenv('HOME')",
    "SELECT * FROM enable_logging(storage = 'file', storage_path = '{o}')",
    "SELECT * FROM enable_profiling(save_location := '{o}')",
    "SELECT * FROM register_external_resource('a', 'b')",
    "SELECT * FROM create_external_resource('a')",
    # Addresses in memory, and this process's variables
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM arrow_scan(1::POINTER, 2::POINTER, 3::POINTER)",
    "SELECT * FROM arrow_scan_dumb('1'::POINTER, 2, 3)",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM python_arrow_scan(1)",
    "SELECT * FROM python_map_function(1)",
    "SELECT * FROM connection",
    "SELECT * FROM statements",
    "SELECT * FROM planted",
]
planted = pa.table({"x": [SECRET]})  # a variable that DuckDB would take for a table


@pytest.fixture
def world(tmp_path, monkeypatch) -> dict[str, Path]:
    """data/ with two rows of images, a secret beside it, and links inside that lead to it."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rows = {"image_id": ["a", "b"], "caption": ["a cat", None], "jpg": [b"\xff\xd8", None]}
    pq.write_table(pa.table(rows), folder / "images/00000.parquet")
    (tmp_path / "secret.csv").write_text(f"x\n{SECRET}\n")
    (folder / "link.csv").symlink_to(tmp_path / "secret.csv")
    (folder / "linked").symlink_to(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/.tmp").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return {"d": folder, "o": tmp_path / "out.csv", "s": tmp_path / "secret.csv"}


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def attack(world: dict[str, Path], sql: str, connection=None) -> str:
    """What is said to it; nothing on disk differs afterwards, and the tables are as they were."""
    root, connection = world["d"].parent, connection or confined(world["d"])
    before = everything(root)
    try:
        said = repr(ask(connection, sql).fetchall())
    except (PipelineError, duckdb.Error) as error:
        said = f"refused: {error}"
    assert everything(root) == before
    assert SECRET not in said
    tables = connection.execute("SELECT image_id, caption FROM images ORDER BY 1").fetchall()
    assert tables == [("a", "a cat"), ("b", None)]
    return said


def test_every_kind_of_statement_is_among_the_attacks():
    kinds = {name for name in dir(duckdb.StatementType) if name.isupper()}
    assert kinds == STATEMENTS.keys() | NO_SYNTAX
    assert sum(map(len, STATEMENTS.values())) * len(SMUGGLED) + len(READS) > 700


@pytest.mark.parametrize("way", SMUGGLED)
@pytest.mark.parametrize("kind", STATEMENTS)
def test_no_statement_does_anything_however_it_comes_in(world, kind, way):
    connection = confined(world["d"])
    for statement in STATEMENTS[kind]:
        statement = statement.format(**world)
        sql = SMUGGLED[way].format(x=statement, q=statement.replace("'", "''"))
        assert attack(world, sql, connection).startswith("refused"), sql


@pytest.mark.parametrize("sql", READS)
def test_a_select_reads_nothing_but_the_tables(world, sql):
    assert attack(world, sql.format(**world)).startswith("refused")


CALLS = """
import sys
from pathlib import Path
import duckdb
from pipeline.data.database import confined, ask
data, secret = Path(sys.argv[1]), sys.argv[2]
VALUES = {"BIGINT": "1", "INTEGER": "1", "UBIGINT": "1", "BOOLEAN": "true", "POINTER": "1::POINTER",
          "VARCHAR[]": f"['{secret}']", "BLOB": "'a'::BLOB"}
functions = duckdb.sql("SELECT DISTINCT function_name, function_type, parameter_types FROM duckdb_functions()"
    " WHERE function_type IN ('table', 'table_macro', 'pragma', 'scalar', 'macro')").fetchall()
calls = set()
for name, kind, types in functions:
    fitting = ", ".join(VALUES.get(kind, f"'{secret}'") for kind in types or [])
    if name.isidentifier() and kind in ("scalar", "macro"):
        calls.add(f"SELECT {name}({fitting})")
    elif name.isidentifier():
        for given in (fitting, f"'{secret}'", "", "1", "1, 2, 3", "1::POINTER, 2::POINTER, 3::POINTER"):
            calls.add(f"SELECT * FROM {name}({given}) LIMIT 5")
connection = confined(data)
for sql in sorted(calls):
    try:
        print(repr(ask(connection, sql).fetchmany(50)))
    except Exception as error:
        print("refused", error)
print(len(calls))
"""


def test_no_function_of_duckdb_reads_or_writes_a_file_or_brings_the_process_down(world):
    """Every one that it knows, with a path, numbers, and addresses in memory for arguments."""
    before = everything(world["d"].parent)
    output, errors = worlds.run_code(CALLS, world["d"], world["s"]).communicate(timeout=300)
    assert int(output.splitlines()[-1]) > 1000, errors
    assert SECRET not in output and everything(world["d"].parent) == before


@pytest.mark.parametrize(
    "sql", ["", "  ; ", "-- only a comment", "SELECT 1; SELECT 2", "\x00", "("]
)
def test_what_is_not_one_statement_is_refused(world, sql):
    assert attack(world, sql).startswith("refused")


# Time and memory, through the command: it ends by itself whatever it is asked


GREEDY = [
    "SELECT levenshtein(repeat('a', 1000000), repeat('b', 1000000))",  # no interruption reaches it
    "SELECT format('{:>2000000000}', 'x')",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t) SELECT count(*) FROM t",
    "SELECT len(range(3000000000))",
    "SELECT count(*) FROM range(100000000000) a, range(100000000000) b",
    "SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b",
]


@pytest.mark.parametrize("sql", GREEDY)
def test_a_query_without_end_ends_with_one_message(world, sql):
    command = [sys.executable, "-m", "pipeline.cli", "query", sql, "--timeout", "1"]
    command += ["--data", str(world["d"])]
    started = time.monotonic()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert time.monotonic() - started < 30
    assert list(Path(".tmp").iterdir()) == []


def test_memory_is_refused_and_nothing_is_spilled(world):
    connection = confined(world["d"], "64MB")
    with pytest.raises((duckdb.Error, PipelineError), match=r"(?i)memory"):
        ask(connection, "SELECT list(range ORDER BY hash(range)) FROM range(50000000)").fetchall()
    assert list(Path(".tmp").iterdir()) == []
