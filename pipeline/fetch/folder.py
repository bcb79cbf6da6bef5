"""A folder of images -> a manifest of `file:` paths."""

import csv
import io
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_file
from pipeline.fetch.policy import FetchError, read_local

MOST_BYTES = 1 << 20  # of a caption
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}


COLUMNS = ("caption", "label", "license")  # of a file of labels, beside `file`


def write_folder_manifest(
    folder: Path, out: Path, labels: Path | None = None, *, force: bool = False
) -> list[dict]:
    """One row per image file below folder, sorted by path; returns the rows.

    A file's label is the subfolder it lies in (null at the top), its caption the text file of the
    same name beside it, where there is one. labels: a CSV whose column `file` names files below
    folder, and whose other columns (COLUMNS) say what they show instead. Raises PipelineError: no
    folder, no images, a name or caption that is not UTF-8, a caption that is a link out of the
    folder or longer than MOST_BYTES, labels of files that are not there, a manifest of another
    kind, or one in the way without force.
    """
    if not folder.is_dir():
        raise PipelineError(f"{folder} is no folder.")
    _check(out, force)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise PipelineError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}).")
    given = _given(labels, files, folder) if labels else {}
    rows = [
        _row(path, folder) | given.get(path.relative_to(folder).as_posix(), {}) for path in files
    ]
    if labels:
        names = dict.fromkeys(name for row in rows for name in row)
        rows = [{name: row.get(name) for name in names} for row in rows]
    write_manifest(rows, out, force=force)
    return rows


def write_manifest(rows: list[dict], out: Path, *, force: bool = False) -> None:
    """Rows of texts, of which the first names all columns, as CSV or Parquet.

    Raises PipelineError for another kind, and where a file is in the way.
    """
    _check(out, force)
    write_file(out, lambda partial: _write(rows, out.suffix, partial))


def _check(out: Path, force: bool) -> None:
    if out.suffix not in (".csv", ".parquet"):
        raise PipelineError(f"{out}: name a manifest .csv or .parquet.")
    if out.exists() and not force:
        raise PipelineError(f"{out} exists. Remove it, add --force, or name another --out.")


def _given(labels: Path, files: list[Path], folder: Path) -> dict[str, dict]:
    """File below the folder -> what the file of labels says of it."""
    try:
        with labels.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PipelineError(f"{labels} cannot be read: {error}. Expected a CSV file.") from None
    columns = rows[0].keys() if rows else []
    if "file" not in columns or not set(columns) & set(COLUMNS):
        raise PipelineError(
            f"{labels} has the columns {', '.join(map(str, columns)) or 'none'}; expected `file` "
            f"and {', '.join(COLUMNS)}: one of these at least."
        )
    given = {
        row["file"]: {name: row[name] or None for name in COLUMNS if name in columns}
        for row in rows
    }
    known = {path.relative_to(folder).as_posix() for path in files}
    if absent := [name for name in given if name not in known]:
        raise PipelineError(
            f"{labels} names {len(absent)} of {len(given)} files that are not in {folder}, such as "
            f"{absent[0]}. Paths are relative to that folder."
        )
    return given


def _row(path: Path, folder: Path) -> dict:
    inside = path.relative_to(folder)
    try:
        return {
            "url": f"file:{quote(inside.as_posix())}",
            "caption": _caption(path.with_suffix(".txt"), folder),
            "label": inside.parent.as_posix() if inside.parent.parts else None,
        }
    except UnicodeError as error:
        raise PipelineError(f"{path}: its name or caption is not UTF-8 ({error}).") from None


def _caption(path: Path, folder: Path) -> str | None:
    """A text below the folder; a link that leads out of it would let its author read our files."""
    if not path.is_file():
        return None
    try:
        text = read_local(f"file:{quote(path.relative_to(folder).as_posix())}", folder, MOST_BYTES)
    except FetchError as error:
        raise PipelineError(f"{path} is not taken as a caption: {error}. Remove it.") from None
    return text.decode("utf-8").strip()


def _write(rows: list[dict], suffix: str, path: Path) -> None:
    if suffix == ".parquet":
        schema = pa.schema([(name, pa.string()) for name in rows[0]])
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")
