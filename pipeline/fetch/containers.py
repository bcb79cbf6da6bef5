"""Images that somebody has already, inside other files: a manifest of them, and their bytes.

WebDataset tars, Parquet with images in it (Hugging Face's `{bytes, path}`, img2dataset's `jpg`) and
the folders of files that img2dataset writes. An image inside a file has a url of its own,
`file:FOLDER/00000.tar!/NAME@OFFSET+SIZE` or `file:FOLDER/00000.parquet!/COLUMN@ROW`, below the root
as every `file:` path. Such a url is read without a request, by seeking: nothing is unpacked.
"""

import json
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from glob import glob, has_magic
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError

IMAGES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
SIDE_FILE = 1 << 20  # bytes of a caption or record beside an image, at most
DETAILS = ("caption", "label", "license")  # what is taken of the records beside the images of a tar
OURS = {"url", "sha256", "boxes", "mask"}  # columns that mean something else inside a container
ROWS = 10_000  # listed at a time
_INSIDE = re.compile(
    r"(?P<file>.+\.(?:tar|parquet))!/(?P<name>.*)@(?P<at>\d+)(?:\+(?P<size>\d+))?", re.S
)
_GROUPS = 4  # row groups of images that a process keeps
# Bytes of images in a row group, unpacked; a value that repeats counts once.
MOST_OF_A_GROUP = 1 << 30


def list_contained(manifest: Path, root: Path, out: Path) -> Path:
    """The manifest itself, or, where its files hold images, a list of these, written to out.

    Raises PipelineError: files that lie outside root, a tar that is damaged, compressed or without
    images.
    """
    files = contained_files(manifest)
    if files and all(path.suffix == ".tar" for path in files):
        tables = _tables_of_tars(files, root)
    elif files and all(path.suffix == ".parquet" for path in files):
        images = _image_column(files[0])
        if images is None:
            return manifest
        tables = (table for path in files for table in _tables_of_parquet(path, images, root))
    else:
        return manifest
    try:
        _write(tables, out)
    except (pa.ArrowException, IndexError, KeyError) as error:
        raise PipelineError(
            f"{manifest} cannot be read as a collection of images: {error}. Its Parquet files are "
            "damaged, or their columns differ."
        ) from None
    return out


def contained_files(manifest: Path) -> list[Path]:
    """Tars, or Parquet files where there is none, of a folder or a pattern; or the file itself."""
    if manifest.is_dir():
        kinds = {".tar", ".parquet"}
        paths = sorted(path for path in manifest.rglob("*") if path.suffix in kinds)
        paths = [path for path in paths if path.is_file() and not path.name.startswith((".", "_"))]
        tars = [path for path in paths if path.suffix == ".tar"]
        return tars or paths  # img2dataset leaves Parquet of its records beside its tars
    if has_magic(str(manifest)) and not manifest.exists():
        return sorted(Path(path) for path in glob(str(manifest), recursive=True))
    return [manifest] if manifest.is_file() else []


def _write(tables: Iterable[pa.Table], out: Path) -> None:
    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(out, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table.select(first.column_names).cast(first.schema))


def _below(path: Path, root: Path) -> str:
    """The `file:` url of a path. Raises PipelineError where it does not lie below root."""
    try:
        relative = path.resolve().relative_to(root.resolve())
    except ValueError:
        raise PipelineError(
            f"{path} does not lie below {root}. Set download.root to a folder that holds it."
        ) from None
    return "file:" + quote(str(relative))


# Tars


def _tables_of_tars(files: list[Path], root: Path) -> Iterator[pa.Table]:
    schema = pa.schema([(name, pa.string()) for name in ("url", *DETAILS)])
    for path in files:
        rows, images = [], 0
        for row in _samples(path, _below(path, root)):
            rows.append(row)
            images += 1
            if len(rows) == ROWS:
                yield pa.Table.from_pylist(rows, schema)
                rows = []
        if not images:
            raise PipelineError(
                f"{path} holds no images. Expected members such as 000001.jpg, with 000001.txt "
                "beside them for captions."
            )
        yield pa.Table.from_pylist(rows, schema)


def _samples(path: Path, url: str) -> Iterator[dict]:
    """A row per image of a tar; members with one name up to the first dot belong together."""
    sample, key = {}, None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                if not (member.isreg() and not member.issparse() and kind):
                    continue
                if (folder, stem) != key:
                    yield from _finished(sample)
                    sample, key = {}, (folder, stem)
                kind = kind.lower()
                if kind in IMAGES and "url" not in sample:
                    extent = f"@{member.offset_data}+{member.size}"
                    sample["url"] = f"{url}!/{quote(member.name)}{extent}"
                elif kind in ("txt", "json", "cls") and member.size <= SIDE_FILE:
                    sample[kind] = tar.extractfile(member).read()  # ty: ignore[missing-union-attribute]
            yield from _finished(sample)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise PipelineError(
            f"{path} cannot be read as a tar: {error}. Expected an uncompressed one, as WebDataset "
            "and img2dataset write it."
        ) from None


def _finished(sample: dict) -> Iterator[dict]:
    if "url" not in sample:
        return
    row: dict[str, str | None] = {"url": sample["url"]}
    try:
        record = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):  # such a record costs itself
        record = {}
    record = record if isinstance(record, dict) else {}
    for name in DETAILS:
        value = record.get(name)
        row[name] = value if isinstance(value, str) else None
    row["caption"] = _text(sample.get("txt")) or row["caption"]
    row["label"] = _text(sample.get("cls")) or row["label"]
    yield row


def _text(data: bytes | None) -> str | None:
    """None for what is no UTF-8: such a caption costs itself."""
    try:
        return (data or b"").decode().strip("\r\n") or None
    except UnicodeDecodeError:
        return None


# Parquet


def _image_column(path: Path) -> str | None:
    """The column that holds images; `` for img2dataset's records of files; None for a manifest."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):
        return None  # the reader of manifests says what is wrong
    for field in schema:
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return field.name
    if "jpg" in schema.names and pa.types.is_binary(schema.field("jpg").type):
        return "jpg"
    records = {"key", "status", "url"} <= set(schema.names)
    return "" if records and path.with_suffix("").is_dir() else None


def _tables_of_parquet(path: Path, images: str, root: Path) -> Iterator[pa.Table]:
    """A row per row: its image's url, and its other columns; labels by their names."""
    url, row = _below(path, root), 0
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        others = [
            field.name
            for field in schema
            if field.name not in {images, *OURS} and not _holds_bytes(field.type)
        ]
        labels = _class_names(schema, "label")
        for batch in file.iter_batches(ROWS, columns=others):
            table = pa.Table.from_batches([batch])
            if images:
                numbers = range(row, row + len(table))
                urls = [f"{url}!/{quote(images)}@{number}" for number in numbers]
            else:
                folder = url.removesuffix(".parquet")
                urls = [f"{folder}/{quote(key)}.jpg" for key in table["key"].to_pylist()]
            row += len(table)
            if labels:
                at = table.column_names.index("label")
                named = [
                    None if n is None or n < 0 else labels[n] for n in table["label"].to_pylist()
                ]
                table = table.set_column(at, "label", pa.array(named, pa.string()))
            yield table.add_column(0, "url", pa.array(urls, pa.string()))


def _holds_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    """Names of the numbers of a Hugging Face ClassLabel."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return (
        names if column in schema.names and pa.types.is_integer(schema.field(column).type) else None
    )


# Reading


def split_inside(path: str) -> tuple[str, str, int, int | None] | None:
    """(file, name, offset or row, size) of a path that leads inside a file; None for another."""
    match = _INSIDE.fullmatch(path)
    if match is None:
        return None
    size = match["size"]
    return match["file"], match["name"], int(match["at"]), None if size is None else int(size)


def read_inside(file: Path, name: str, at: int, size: int | None) -> bytes | None:
    """Bytes at an offset of a tar, or of a row of a Parquet column; None where there are none.

    Raises OSError, and pa.ArrowException for a damaged file.
    """
    if size is not None:
        with file.open("rb") as source:
            source.seek(at)
            data = source.read(size)
        return data if len(data) == size else None
    return _groups.read(file, name, at)


class _RowGroups:
    """The row groups of images that were read last, for threads that read rows in order."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, column: str, row: int) -> bytes | None:
        with self._lock, pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row < rows:
                    value = self._group(file, path, column, group)[row].as_py()
                    return value.get("bytes") if isinstance(value, dict) else value
                row -= rows
        return None

    def _group(self, file: pq.ParquetFile, path: Path, column: str, group: int) -> pa.ChunkedArray:
        key = path, path.stat().st_mtime_ns, column, group
        if key not in self._held:
            self._held[key] = _read_group(file, path, column, group)
            if len(self._held) > _GROUPS:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]


def _read_group(file: pq.ParquetFile, path: Path, column: str, group: int) -> pa.ChunkedArray:
    """A column of a row group. Values that repeat are kept once: 764 bytes can hold 20 GB of them.

    Raises ValueError for more than MOST_OF_A_GROUP.
    """
    metadata = file.metadata.row_group(group)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    if size > MOST_OF_A_GROUP:
        raise ValueError(f"a row group of {size} bytes; {MOST_OF_A_GROUP} are read at once")
    leaves = [chunk.path_in_schema for chunk in chunks]
    with pq.ParquetFile(path, metadata=file.metadata, read_dictionary=leaves) as folded:
        return folded.read_row_group(group, columns=[column])[column]


_groups = _RowGroups()
