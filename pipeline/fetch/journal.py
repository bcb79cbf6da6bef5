"""Rows of one shard as they are finished, readable however the process that wrote them ended."""

import errno
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIX = ".rows"
SPACE = "space"  # a file beside the journals, deleted by whoever finds the disk full
RAW = pa.schema(
    [
        *((name, pa.string()) for name in ("image_id", "url", "status", "error_message")),
        *((name, pa.string()) for name in ("sha256", "exif")),
        *((name, pa.int32()) for name in ("width", "height", "original_width", "original_height")),
        ("jpg", pa.binary()),
    ]
)
_LENGTHS = struct.Struct(">IQ")  # of a row's JSON and of its JPEG
_ROWS_AT_ONCE = 64


class JournalWriter:
    """Stands for img2dataset's writers: a row is in the file as soon as it is written."""

    def __init__(
        self,
        shard_id: int,
        output_folder: str,
        save_caption: bool,
        oom_shard_count: int,
        schema: pa.Schema,
        encode_format: str,
    ):
        self.folder = Path(output_folder)
        path = self.folder / f"{shard_id:0{oom_shard_count}d}{SUFFIX}"
        self.file = path.open("ab", buffering=0)
        self.failure: OSError | None = None

    def write(self, jpg: bytes | None, key: str, caption: str | None, meta: dict) -> None:
        text = json.dumps({name: meta.get(name) for name in RAW.names if name != "jpg"}).encode()
        jpg = jpg or b""
        end, left = self.file.seek(0, os.SEEK_END), _LENGTHS.pack(len(text), len(jpg)) + text + jpg
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:  # img2dataset prints it and goes on to the next row
            self.file.truncate(end)  # half a row would hide those behind it
            self.failure = error
            tell_if_full(self.folder, error)
            raise

    def close(self) -> None:
        """Raises what made a row fail: its shard is not complete."""
        self.file.close()
        if self.failure:
            raise self.failure


def tell_if_full(folder: Path, error: OSError) -> None:
    """Where the disk is full, tell the process that watches the folder: deleting needs no space."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        (folder / SPACE).unlink(missing_ok=True)


def read_journal(path: Path) -> Iterator[dict]:
    """The complete rows of a journal, without what it was cut off in."""
    with path.open("rb") as file:
        while len(head := file.read(_LENGTHS.size)) == _LENGTHS.size:
            lengths = _LENGTHS.unpack(head)
            text, jpg = (file.read(length) for length in lengths)
            if (len(text), len(jpg)) != lengths:
                return
            yield json.loads(text) | {"jpg": jpg or None}


def write_rows(journals: list[Path], path: Path) -> int:
    """All rows of some journals as one Parquet file, one per image_id; returns how many."""
    seen: set[str] = set()
    batch: list[dict] = []
    with pq.ParquetWriter(path, RAW, compression="none", use_dictionary=False) as writer:
        for row in (row for journal in journals for row in read_journal(journal)):
            if row["image_id"] not in seen:
                seen.add(row["image_id"])
                batch.append(row | {"error_message": _printable(row["error_message"])})
            if len(batch) == _ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(batch, RAW))
                batch.clear()
        writer.write_table(pa.Table.from_pylist(batch, RAW))
    return len(seen)


def _printable(text: str | None) -> str | None:
    """Without halves of surrogates, which Arrow does not store."""
    return text and text.encode(errors="replace").decode()
