"""DuckDB over data/: the tables images, teacher, texts, selection and runs, for reading only."""

from glob import escape
from pathlib import Path

import duckdb
import pyarrow as pa

from pipeline.core.errors import PipelineError

TABLES = {  # name -> (shards below data/, the command that makes them)
    "images": ("images/*.parquet", "download"),
    "teacher": ("teacher/images/*.parquet", "teacher-embed"),
    "texts": ("teacher/texts/*.parquet", "teacher-embed"),
    "selection": ("selection/*.parquet", "select"),
    "runs": ("runs/*.parquet", "evaluate"),
}


def connect(data: Path, *readable: Path) -> duckdb.DuckDBPyConnection:
    """A connection on which every table that exists so far is a view over its shards.

    It reads below data and the readable folders only, loads no extension, and its configuration
    is locked. Raises PipelineError for a damaged shard.
    """
    connection = duckdb.connect()
    for table, (shards, command) in TABLES.items():
        pattern = f"{escape(str(data.resolve()))}/{shards}"
        if any(data.glob(shards)):
            try:
                connection.execute(
                    f"CREATE VIEW {table} AS SELECT * FROM "
                    f"read_parquet({_quoted(pattern)}, union_by_name = {table == 'runs'})"
                )
            except duckdb.Error as error:
                raise PipelineError(
                    f"{pattern} cannot be read: {_reason(error)}. Delete the damaged folder and run "
                    f"`pipeline {command}` again."
                ) from None
    folders = [str(folder.resolve()) for folder in (data, *readable)]
    allowed = ", ".join(_quoted(f"{name}/") for name in [*folders, *map(escape, folders)])
    connection.execute(f"SET allowed_directories = [{allowed}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def ask(
    data: Path, sql: str, *readable: Path, arrow: bool = False
) -> duckdb.DuckDBPyConnection | pa.RecordBatchReader:
    """Run exactly one SELECT; what is returned has its rows, computed while they are fetched.

    Raises PipelineError: anything but one SELECT (COPY may write inside allowed folders), SQL
    that is wrong, a table whose stage has not run.
    """
    connection = connect(data, *readable)
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
    except duckdb.CatalogException as error:
        for table, (_, command) in TABLES.items():
            if f"table with name {table} " in str(error).lower():
                raise PipelineError(
                    f"there is no table {table} yet. Run `pipeline {command}` first."
                ) from None
        raise PipelineError(f"{_reason(error)} Tables: {', '.join(TABLES)}.") from None
    except duckdb.Error as error:
        raise PipelineError(_reason(error)) from None


def _quoted(value) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def _reason(error: Exception) -> str:
    """DuckDB's message without its stack of hints, but with the line that points at the fault."""
    return str(error).strip().split("\n\nLINE")[0].replace("\n", " ")
