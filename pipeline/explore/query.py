"""The answer to a user's query, in the form that was asked for, a batch of rows at a time.

The SQL is not trusted: its connection has no file access (`database.confined`), and its process has
limits on memory and time that hold also where DuckDB cannot be interrupted.
"""

import csv
import json
import math
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import terminal
from pipeline.core.choices import AnswerFormat
from pipeline.core.errors import PipelineError
from pipeline.data import database

SHOWN = 100  # rows of a table
SECONDS = 600.0  # that a query may take
GRACE = 3.0  # s from the interruption to the end of the process
HEADROOM = 4 << 30  # bytes of addresses beside a query's: buffers of Arrow, stacks of threads


def print_answer(data: Path, sql: str, form: AnswerFormat, seconds: float = SECONDS) -> None:
    """Run one SELECT and write its rows to standard output, within half of the machine's memory.

    A query that runs for longer than `seconds` is interrupted; where it does not stop, the process
    ends. Raises PipelineError: SQL that is wrong, not one SELECT, or asks for too
    much, Parquet to a terminal.
    """
    if form == "parquet" and sys.stdout.isatty():
        raise PipelineError(
            "Parquet is binary: redirect it, `... --format parquet > answer.parquet`."
        )
    write = {"table": _table, "csv": _csv, "json": _json, "parquet": _parquet}[form]
    try:
        # Closed before Python ends: a thread that still scans a dataset would bring the process down.
        with database.confined(data) as connection, _limited(connection, seconds):
            write(database.ask(connection, sql, arrow=form == "parquet"))
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
    except MemoryError:
        raise PipelineError("the query asks for more memory than it may have.") from None
    except (duckdb.Error, pa.ArrowException, OSError) as error:  # of rows that are made only now
        if getattr(error, "errno", None):
            raise
        raise PipelineError(str(error).strip().splitlines()[0]) from None


@contextmanager
def _limited(connection: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    """DuckDB's own limit of memory does not count what one function builds, and its interruption
    waits for that function: so the process has limits as well, for as long as this lasts.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    resource.setrlimit(resource.RLIMIT_AS, (_addresses() + half + HEADROOM, before[1]))
    timers = [
        threading.Timer(seconds, connection.interrupt),
        threading.Timer(seconds + GRACE, _end, [seconds]),
    ]
    try:
        for timer in timers:
            timer.daemon = True
            timer.start()
        yield
    except duckdb.InterruptException:
        raise PipelineError(_late(seconds)) from None
    finally:
        for timer in timers:
            timer.cancel()
        resource.setrlimit(resource.RLIMIT_AS, before)


def _addresses() -> int:
    """Bytes of addresses that this process has taken so far."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _late(seconds: float) -> str:
    return f"the query ran for {seconds:g} s without an end. Narrow it, or give it more --timeout."


def _end(seconds: float) -> None:
    """In a thread of its own: nothing is written by a query, so nothing is lost."""
    terminal.fail(_late(seconds))
    os._exit(1)


def _rows(answer: duckdb.DuckDBPyConnection) -> Iterator[tuple]:
    while rows := answer.fetchmany(1000):
        yield from rows


def _table(answer: duckdb.DuckDBPyConnection) -> None:
    rows = answer.fetchmany(SHOWN)
    more = len(answer.fetchmany(1)) > 0
    terminal.say(terminal.table([column[0] for column in answer.description], rows))
    end = ", more follow: use LIMIT or --format csv" if more else ""
    terminal.say(f"({len(rows)} rows{end})")


def _csv(answer: duckdb.DuckDBPyConnection) -> None:
    writer = csv.writer(terminal.output(), lineterminator="\n")
    writer.writerow([column[0] for column in answer.description])
    writer.writerows([v.hex() if isinstance(v, bytes) else v for v in row] for row in _rows(answer))


def _json(answer: duckdb.DuckDBPyConnection) -> None:
    """One object a line, which any tool reads as a stream."""
    names, out = [column[0] for column in answer.description], terminal.output()
    for row in _rows(answer):
        record = dict(zip(names, map(_plain, row), strict=True))
        out.write(json.dumps(record, default=str, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
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
