"""DuckDB over data/: the tables images, teacher, texts, selection and runs, for reading only.

Two kinds of connection. `connect` is for SQL that this project wrote: DuckDB reads the shards itself,
and nothing else. `confined` is for SQL that a user wrote: it has no file access at all, because a
SELECT can write (`WITH x AS (COPY ... TO ...) SELECT ...`) and counting kinds of statements does not
tell. There the shards are pyarrow datasets, which Python opened and which DuckDB only scans.
"""

import tempfile
from functools import cache
from glob import escape
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from pipeline.core.errors import PipelineError
from pipeline.data.remote_shards import FILES, PROTOCOL, are_remote, shards_in, url
from pipeline.data.shards import open_shard

TABLES = {  # name -> (folder of its shards below data/, the command that makes them)
    "images": ("images", "download"),
    "teacher": ("teacher/images", "teacher-embed"),
    "texts": ("teacher/texts", "teacher-embed"),
    "selection": ("selection", "select"),
    "runs": ("runs", "evaluate"),
}
MEMORY = "50%"  # of the machine's, for SQL that a user wrote; it spills nowhere


def connect(data: Path, *readable: Path) -> duckdb.DuckDBPyConnection:
    """A connection on which every table that exists so far is a view over its shards.

    It reads below data and the readable folders only, loads no extension, spills into a private
    folder, and its configuration is locked. For this project's own SQL. Raises PipelineError for a
    damaged shard.
    """
    connection = duckdb.connect(config={"temp_directory": _spill_folder().name})
    elsewhere = set()  # of shards that are links, as some of DVC's cache types make them
    for table, (shards, command) in TABLES.items():
        if paths := shards_in(data / shards):
            names = parquet_files(connection, data / shards)
            try:
                connection.execute(
                    f"CREATE VIEW {table} AS SELECT * FROM "
                    f"read_parquet({_list(names)}, union_by_name = {table == 'runs'})"
                )
            except duckdb.Error as error:
                raise PipelineError(
                    f"{data / shards} cannot be read: {reason(error)}. Delete the damaged folder and "
                    f"run `pipeline {command}` again."
                ) from None
            elsewhere |= {path.resolve().parent for path in paths}
    folders = [str(folder.resolve()) for folder in (data, *sorted(elsewhere), *readable)]
    allowed = [f"{name}/" for name in [*folders, *map(escape, folders)]]
    connection.execute(f"SET allowed_directories = {_list([*allowed, url(Path('/'))])}")
    _lock(connection)
    return connection


def parquet_files(connection: duckdb.DuckDBPyConnection, folder: Path) -> list[str]:
    """What read_parquet takes for a folder of shards, on a connection that is then able to."""
    folder = folder.resolve()
    if any(folder.glob("*.parquet")):
        return [f"{escape(str(folder))}/*.parquet"]
    if not connection.filesystem_is_registered(PROTOCOL):
        connection.register_filesystem(FILES)
    return [url(path) for path in shards_in(folder)]


@cache
def _spill_folder() -> tempfile.TemporaryDirectory:
    """One per process, for its user alone (mode 0700), removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="extrahead-")


def confined(data: Path, memory: str = MEMORY) -> duckdb.DuckDBPyConnection:
    """A connection for SQL that is not trusted: the same tables, and no file access of any kind.

    memory: what DuckDB may take, as it writes sizes; beyond it a query ends with an error, for
    there is no folder to spill into. Embeddings, float16 in the shards, are lists of float32.
    Raises PipelineError for a damaged shard.
    """
    connection = duckdb.connect(
        config={
            "temp_directory": "",
            "memory_limit": memory,
            "python_enable_replacements": "false",
        }
    )
    for table, (shards, command) in TABLES.items():
        if paths := shards_in(data / shards):
            connection.register(
                table, _dataset(paths if table == "runs" else paths[:1], paths, command)
            )
    _lock(connection)
    return connection


def _lock(connection: duckdb.DuckDBPyConnection) -> None:
    for setting in ("autoload_known_extensions", "autoinstall_known_extensions"):
        connection.execute(f"SET {setting} = false")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _dataset(described: list[Path], paths: list[Path], command: str) -> ds.Dataset:
    """The shards as one table with the columns of the described ones; pages are checked as they are read."""
    schemas = []
    for path in described:
        with open_shard(path, command) as file:
            schemas.append(file.schema_arrow.remove_metadata())
    schema = pa.unify_schemas(schemas)
    declared = pa.schema([field.with_type(_readable(field.type)) for field in schema])
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    form = ds.ParquetFileFormat(default_fragment_scan_options=options)
    return ds.dataset(
        [str(path) for path in paths],
        schema=declared,
        format=form,
        filesystem=FILES if are_remote(paths) else None,
    )


def _readable(kind: pa.DataType) -> pa.DataType:
    """DuckDB knows no half floats of Arrow, and takes embeddings as lists."""
    if pa.types.is_float16(kind):
        return pa.float32()
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_readable(kind.value_type))
    return kind


def ask(
    connection: duckdb.DuckDBPyConnection, sql: str, *, arrow: bool = False
) -> duckdb.DuckDBPyConnection | pa.RecordBatchReader:
    """Run exactly one SELECT; what is returned has its rows, computed while they are fetched.

    connection: a confined one. Raises PipelineError: anything but one SELECT, SQL that is wrong or
    reaches for a file, a table whose stage has not run.
    """
    try:
        statements = connection.extract_statements(sql)
        kinds = [statement.type.name for statement in statements]
        if kinds != ["SELECT"]:
            raise PipelineError(
                f"expected exactly one SELECT, found {', '.join(kinds) or 'nothing'}: "
                "`pipeline query` only reads."
            )
        if arrow:
            return connection.sql(statements[0]).to_arrow_reader(10_000)
        return connection.execute(statements[0])
    except duckdb.InterruptException:  # the caller's doing, and its message
        raise
    except duckdb.CatalogException as error:
        for table, (_, command) in TABLES.items():
            if f"table with name {table} " in str(error).lower():
                raise PipelineError(
                    f"there is no table {table} yet. Run `pipeline {command}` first."
                ) from None
        raise PipelineError(f"{reason(error)} Tables: {', '.join(TABLES)}.") from None
    except (duckdb.Error, pa.ArrowException, MemoryError) as error:
        raise PipelineError(reason(error)) from None


def _list(values: list[str]) -> str:
    return f"[{', '.join(map(_quoted, values))}]"


def _quoted(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def reason(error: Exception) -> str:
    """DuckDB's message without its stack of hints, but with the line that points at the fault."""
    return str(error).strip().split("\n\nLINE")[0].replace("\n", " ")
