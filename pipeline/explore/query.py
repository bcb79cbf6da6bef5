"""The answer to a query, in the form that was asked for, a batch of rows at a time."""

import csv
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError
from pipeline.data import database

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
    answer = database.ask(data, sql, Path("manifests"), arrow=form == "parquet")
    try:
        {"table": _table, "csv": _csv, "json": _json, "parquet": _parquet}[form](answer)
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # of rows that are made only now
        if getattr(error, "errno", None):
            raise
        raise PipelineError(str(error).strip().splitlines()[0]) from None


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
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = "".join(c if c.isprintable() else " " for c in text)  # strangers' captions: no escapes
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def _csv(answer) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([column[0] for column in answer.description])
    writer.writerows([v.hex() if isinstance(v, bytes) else v for v in row] for row in _rows(answer))


def _json(answer) -> None:
    """One object a line, which any tool reads as a stream."""
    names = [column[0] for column in answer.description]
    for row in _rows(answer):
        values = map(_plain, row)
        print(json.dumps(dict(zip(names, values, strict=True)), default=str, ensure_ascii=False))


def _plain(value):
    """JSON has no bytes and no NaN."""
    if isinstance(value, list):
        return [_plain(element) for element in value]
    if isinstance(value, dict):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, bytes):
        return value.hex()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parquet(reader: pa.RecordBatchReader) -> None:
    with pq.ParquetWriter(pa.PythonFile(sys.stdout.buffer, "w"), reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
