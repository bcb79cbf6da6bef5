"""Manifests as people have them: which files, in which format, and which of their columns is which.

CSV, TSV (also gzipped), JSON lines and Parquet; one file, a folder of them, or a pattern. What comes
out is one SQL source for `pipeline.fetch.manifest`.
"""

import codecs
import gzip
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from glob import escape, glob, has_magic
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError

# What each of our columns is usually called, in lower case.
NAMES = {
    "url": ("url", "image_url", "img_url", "coco_url"),
    "caption": ("caption", "captions", "text", "top_caption"),
    "label": ("label",),
    "license": ("license", "licence"),
    "boxes": ("boxes",),
    "mask": ("mask",),
    "sha256": ("sha256",),
}
# One dialect and no sniffing, which takes `#` for a comment and `;` in a url for a separator.
_TEXT = "all_varchar = true, comment = '', skip = 0, delim = {}, quote = {}, escape = {}"
_CSV = _TEXT.format("','", "'\"'", "'\"'")
_TSV = _TEXT.format("'\t'", "''", "''")  # has no quotes, only cells
READERS = {
    **dict.fromkeys((".csv", ".csv.gz"), f"read_csv({{}}, header = {{}}, {_CSV})"),
    **dict.fromkeys((".tsv", ".tsv.gz"), f"read_csv({{}}, header = {{}}, {_TSV})"),
    **dict.fromkeys((".jsonl", ".jsonl.gz"), "read_ndjson_objects({})"),
    ".parquet": "read_parquet({}, binary_as_string = true)",
}
BAD = "\U0010ffff"  # stands for bytes that are no UTF-8 until the cell that holds them is dropped
SAMPLE = 1_000  # rows that are looked at for texts that nobody uses
WORDS = 2.5  # words a cell, on average, from which a column looks like captions
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """A manifest as SQL: FROM `sql`; types of its columns; our name -> theirs, None where absent.

    repaired: BAD stands for bytes that are no UTF-8 (elsewhere it is a character like any other).
    """

    sql: str
    types: dict[str, str]
    columns: dict[str, str | None]
    notes: list[str]
    repaired: bool


def open_manifest(
    connection: duckdb.DuckDBPyConnection,
    manifest: Path,
    columns: Mapping[str, str | int | None],
    repaired: Path | None = None,
) -> Source:
    """Find the files and columns of a manifest; nothing but names and a sample is read.

    columns: our name -> theirs, its number (from 1, in a CSV or TSV without a header), or None for
    a column that is not to be used; the rest is found by `NAMES`. repaired: a folder for copies of
    the files in which each byte that is no UTF-8 is `BAD`, which are then the source.

    Raises PipelineError: no such file, several formats or forms in one folder, a column that is
    missing, two that could be meant. Raises duckdb.Error for a file that cannot be read: where
    `is_encoding_error` says so, repairing helps.
    """
    files = manifest_files(manifest)
    kind = _kind(files[0]) or ""
    _require_one_form(files, kind)
    header = not any(isinstance(name, int) for name in columns.values())
    if repaired:
        files = _repaired(files, kind, repaired)
    sql, types = _described(connection, manifest, files, kind, header)
    used = _columns(manifest, list(types), columns)
    notes = _unused_texts(connection, sql, types, used)
    return Source(sql, types, used, notes, repaired is not None)


def is_encoding_error(error: duckdb.Error) -> bool:
    """Whether DuckDB complains of bytes that are no UTF-8."""
    return bool(re.search("unicode|utf-?8|string encoding", str(error), re.IGNORECASE))


def unreadable(manifest: Path, error: Exception) -> PipelineError:
    """What a person is told of a manifest that cannot be read."""
    return PipelineError(
        f"{manifest} cannot be read: {str(error).strip().splitlines()[0]} Expected Parquet, JSON "
        "lines, or CSV in UTF-8: commas, as many cells in every row, quotes doubled inside quotes."
    )


def manifest_files(manifest: Path) -> list[Path]:
    """The files of a manifest, sorted: itself, those of a folder, or those a pattern matches."""
    if manifest.is_file():
        files = [manifest]
    elif manifest.is_dir():
        files = sorted(path for path in manifest.rglob("*") if path.is_file() and _kind(path))
    elif has_magic(str(manifest)):
        files = sorted(Path(path) for path in glob(str(manifest), recursive=True))
    else:
        raise PipelineError(
            f"no manifest {manifest}. Write one (CSV or Parquet with a `url` column), make one of a "
            "folder with `pipeline import folder`, or name another in params.yaml (download.manifest)."
        )
    if not files or not all(map(_kind, files)):
        raise PipelineError(
            f"{manifest}: expected a manifest named {', '.join(READERS)}, a folder of such files, "
            f"or a pattern that matches some; found {files[0].name if files else 'none'}."
        )
    kinds = {_kind(path) or "" for path in files}
    if len(kinds) > 1:
        raise PipelineError(
            f"{manifest} holds files of several formats ({', '.join(sorted(kinds))}). Name those "
            f"that are the manifest by a pattern, such as {manifest}/*{min(kinds)}."
        )
    return files


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    if name.startswith((".", "_")):  # what Spark and macOS leave in a folder
        return None
    return next((kind for kind in READERS if name.endswith(kind)), None)


def _require_one_form(files: list[Path], kind: str) -> None:
    """Raises PipelineError where the files of one manifest have different columns."""

    def form(path: Path) -> object:
        if kind == ".parquet":
            try:
                return {field.name: str(field.type) for field in pq.read_schema(path)}
            except (pa.ArrowException, OSError) as error:
                raise unreadable(path, error) from None
        if "jsonl" in kind:
            return None
        with _opened(path) as file:
            return file.readline(_CHUNK).rstrip(b"\r\n")

    first = form(files[0]) if len(files) > 1 else None
    for path in files[1:]:
        if (other := form(path)) != first:
            raise PipelineError(
                f"the files of one manifest have one form: {files[0]} has the columns "
                f"{_shown(first)}, {path} has {_shown(other)}. Mend it, or name the files that "
                "belong together by a pattern."
            )


def _shown(form: Any) -> str:
    if isinstance(form, dict):
        return ", ".join(f"{name} ({kind})" for name, kind in form.items())
    return form.decode(errors="replace")[:200]


def _opened(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _described(
    connection: duckdb.DuckDBPyConnection,
    manifest: Path,
    files: list[Path],
    kind: str,
    header: bool,
) -> tuple[str, dict[str, str]]:
    """The SQL source of some files and its columns' types."""
    names = ", ".join("'" + escape(str(path)).replace("'", "''") + "'" for path in files)
    sql = READERS[kind].format(f"[{names}]", str(header).lower())
    if "jsonl" in kind:
        keys = connection.execute(
            f"SELECT DISTINCT unnest(json_keys(json)) AS key FROM {sql} ORDER BY key"
        ).fetchall()
        cells = [f"json->>{_text(_path(key))} AS {identifier(key)}" for (key,) in keys]
        sql = f"(SELECT {', '.join(cells) or 'NULL AS empty'} FROM {sql})"
    rows = connection.execute(f"DESCRIBE SELECT * FROM {sql}").fetchall()
    types = {name: kind for name, kind, *_ in rows}
    if ".csv" in kind or ".tsv" in kind:
        _refuse_headless(manifest, header, list(types))
        if ".tsv" in kind:  # cells that a writer of CSV quoted all the same
            cells = [_unquoted(identifier(name)) for name in types]
            sql = f"(SELECT {', '.join(cells)} FROM {sql})"
    return sql, types


def _unquoted(cell: str) -> str:
    inner = f"replace(substr({cell}, 2, len({cell}) - 2), '\"\"', '\"')"
    return (
        f"CASE WHEN len({cell}) > 1 AND {cell} LIKE '\"%\"' THEN {inner} ELSE {cell} END AS {cell}"
    )


def _refuse_headless(manifest: Path, header: bool, names: list[str]) -> None:
    if header and any(re.match(r"(https?|file):", name) for name in names):
        url = next(i for i, name in enumerate(names, 1) if re.match(r"(https?|file):", name))
        raise PipelineError(
            f"{manifest} begins with a row of data, not with the names of its columns. Say which "
            f"column is which by number (download.columns: {{url: {url}, caption: ...}}), or add a "
            "line of names."
        )


def _path(key: str) -> str:
    return '$."' + key.replace('"', '\\"') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """A column's name as SQL."""
    return '"' + name.replace('"', '""') + '"'


def _columns(
    manifest: Path, names: list[str], columns: Mapping[str, str | int | None]
) -> dict[str, str | None]:
    """Our name -> theirs. Raises PipelineError where one is missing or two could be meant."""
    used: dict[str, str | None] = {}
    for ours, usual in NAMES.items():
        if ours in columns:
            used[ours] = _named(manifest, names, ours, columns[ours])
            continue
        candidates = [name for name in names if name.lower() in usual]
        if len(candidates) > 1:
            raise PipelineError(
                f"{manifest}: {' and '.join(candidates)} could each be the {ours}. Say which in "
                f"params.yaml, such as download.columns: {{{ours}: {candidates[0]}}} (null for none)."
            )
        used[ours] = candidates[0] if candidates else None
    if used["url"] is None:
        raise PipelineError(
            f"{manifest} has no column `url`; found {', '.join(names)}. Say which column holds the "
            "address of the image in params.yaml: download.columns: {url: NAME}. Others that are "
            f"read: {', '.join(name for name in NAMES if name != 'url')}."
        )
    return used


def _named(manifest: Path, names: list[str], ours: str, theirs: str | int | None) -> str | None:
    if isinstance(theirs, int) and 1 <= theirs <= len(names):
        return names[theirs - 1]
    if theirs is None or theirs in names:
        return theirs
    raise PipelineError(
        f"{manifest} has no column {theirs!r}, which download.columns names as {ours}; "
        f"found {', '.join(names)}."
    )


def _unused_texts(
    connection: duckdb.DuckDBPyConnection, sql: str, types: dict, used: dict
) -> list[str]:
    """A sentence about each column that looks like captions and is not used."""
    free = [n for n, kind in types.items() if kind == "VARCHAR" and n not in used.values()]
    if not free:
        return []
    cells = ", ".join(f"avg(len(string_split({identifier(name)}, ' ')))" for name in free)
    some = f"(SELECT * FROM {sql} LIMIT {SAMPLE})"
    (means,) = connection.execute(f"SELECT {cells} FROM {some}").fetchall()
    likely = [name for name, mean in zip(free, means, strict=True) if mean and mean > WORDS]
    if not likely:
        return []
    caption = (
        f"captions are read from {used['caption']}" if used["caption"] else "no caption is read"
    )
    return [
        f"not used, though it looks like text: column {', '.join(likely)} ({caption}; "
        "download.columns may name another)."
    ]


def _repaired(files: list[Path], kind: str, scratch: Path) -> list[Path]:
    """Copies in UTF-8, with BAD for each byte that is none."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    copies = []
    for number, path in enumerate(files):
        copy = scratch / f"{number:05}{kind.removesuffix('.gz')}"
        (_repair_parquet if kind == ".parquet" else _repair_text)(path, copy)
        copies.append(copy)
    return copies


def _repair_text(path: Path, copy: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")("extrahead-bad")
    with _opened(path) as source, copy.open("w", encoding="utf-8", newline="") as target:
        while chunk := source.read(_CHUNK):
            target.write(decoder.decode(chunk))
        target.write(decoder.decode(b"", final=True))


def _repair_parquet(path: Path, copy: Path) -> None:
    with pq.ParquetFile(path) as file, pq.ParquetWriter(copy, file.schema_arrow) as writer:
        for batch in file.iter_batches(batch_size=10_000):
            columns = [_repaired_array(column) for column in batch.columns]
            writer.write_batch(pa.record_batch(columns, schema=file.schema_arrow))


def _repaired_array(array: pa.Array) -> pa.Array:
    if pa.types.is_list(array.type):
        values = _repaired_array(array.values)
        return pa.ListArray.from_arrays(array.offsets, values, array.type, mask=array.is_null())
    if not pa.types.is_string(array.type):
        return array
    cells = array.cast(pa.binary()).to_pylist()
    return pa.array([cell and cell.decode("utf-8", "extrahead-bad") for cell in cells], pa.string())


codecs.register_error("extrahead-bad", lambda error: (BAD, error.end))
