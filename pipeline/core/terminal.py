"""The one place where text leaves for a terminal: a terminal obeys control characters, and captions,
file names, column names and messages of libraries are written by others.

`say`, `fail` and `table` are for people and always plain; `output` is for programs: exact in a file
or a pipe, plain where it is a terminal that reads it. `guard` is the net below, for what libraries
write by themselves.
"""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from rich.cells import cell_len, set_cell_size

WIDTH = 60  # columns of a cell in a table
COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def printable(text: str) -> str:
    """Text whose control, bidirectional and other invisible characters are spelled out, as \\x1b.

    Line ends and tabs stay: a message has lines.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _spelled(c) for c in text)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()


def say(text: str, *, err: bool = False) -> None:
    """One line or more for people, to standard output or standard error."""
    print(printable(text), file=sys.stderr if err else sys.stdout)


def fail(message: str) -> None:
    """A message in red at a terminal, to standard error."""
    line = f"error: {printable(message)}"
    stream = sys.stderr
    print(f"\x1b[31m{line}\x1b[0m" if stream.isatty() else line, file=stream)


def output() -> Any:
    """Standard output for text that a program may read: csv, json."""
    return _Plain(sys.stdout, printable) if sys.stdout.isatty() else sys.stdout


def guard() -> None:
    """From now on what anything writes to a terminal can colour it, and nothing more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and stream.isatty():
            setattr(sys, name, _Plain(stream, _coloured))


def _coloured(text: str) -> str:
    """Keeps colours, and the carriage return of a progress line."""
    parts = COLOUR.split(text)
    parts[::2] = ["\r".join(map(printable, part.split("\r"))) for part in parts[::2]]
    return "".join(parts)


class _Plain:
    """A text stream whose text passes through a filter; everything else is the stream's own."""

    def __init__(self, stream: TextIO, plain: Callable[[str], str]):
        self._stream, self._plain = stream, plain

    def write(self, text: str) -> int:
        self._stream.write(self._plain(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def table(names: Sequence[str], rows: Iterable[Sequence[Any]], width: int = WIDTH) -> str:
    """Aligned columns below their names, a line a row; a cell has at most `width` columns.

    Numbers are rounded to six digits, bytes are counted, None is NULL. Characters that take two
    columns of a terminal are counted as two.
    """
    cells = [[_cell(value, width) for value in row] for row in (names, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    lines = [cells[0], ["-" * w for w in widths], *cells[1:]]
    return "\n".join(
        "  ".join(set_cell_size(c, w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(value: Any, width: int) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    text = printable(" ".join(text.splitlines()).replace("\t", " "))
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"
