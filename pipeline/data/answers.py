"""The answer to a query, in the form that was asked for, a batch of rows at a time."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError
from pipeline.data import ledger

FORMATS = ("table", "csv", "json", "parquet")
SHOWN = 100  # rows of a table
WIDTH = 60  # characters of a cell in a table


def print_answer(data: Path, sql: str, form: str) -> None:
    """Run one SELECT and write its rows to standard output.

    Raises PipelineError: an unknown format, SQL that is wrong or not one SELECT, Parquet to a
    terminal.
    """
    if form not in FORMATS:
        raise PipelineError(f"--format {form}: there are {', '.join(FORMATS)}.")
    if form == "parquet" and sys.stdout.isatty():
        raise PipelineError(
            "Parquet is binary: redirect it, `... --format parquet > answer.parquet`."
        )
    answer = ledger.ask(data, sql, Path("manifests"))
    try:
        {"table": _table, "csv": _csv, "json": _json, "parquet": _parquet}[form](answer)
    except duckdb.Error as error:  # some faults show only while rows are made
        raise PipelineError(str(error).strip().splitlines()[0]) from None
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()


def _rows(answer) -> Iterator[tuple]:
    while rows := answer.fetchmany(1000):
        yield from rows


def _table(answer) -> None:
    names = [column[0] for column in answer.description]
    rows = [[_cell(value) for value in row] for row in answer.fetchmany(SHOWN)]
    more = len(answer.fetchmany(1)) > 0
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in [names, ["-" * width for width in widths], *rows]:
        print("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip())
    print(f"({len(rows)} rows{', more follow: use LIMIT or --format csv' if more else ''})")


def _cell(value) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    text = f"{value:.6g}" if isinstance(value, float) else str(value).replace("\n", " ")
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def _csv(answer) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([column[0] for column in answer.description])
    writer.writerows([v.hex() if isinstance(v, bytes) else v for v in row] for row in _rows(answer))


def _json(answer) -> None:
    """One object a line, which any tool reads as a stream."""
    names = [column[0] for column in answer.description]
    for row in _rows(answer):
        print(json.dumps(dict(zip(names, row, strict=True)), default=_plain, ensure_ascii=False))


def _plain(value):
    return value.hex() if isinstance(value, bytes) else str(value)


def _parquet(answer) -> None:
    reader = answer.to_arrow_reader(10_000)
    with pq.ParquetWriter(pa.PythonFile(sys.stdout.buffer, "w"), reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
