"""Rows of one list as they are fetched, readable however the process that wrote them ended."""

import errno
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

SUFFIX = ".rows"
SPACE = "space"  # a file beside the journals, deleted by whoever finds the disk full
_LENGTHS = struct.Struct(">IQ")  # of a row's JSON and of its JPEG


@dataclass(frozen=True)
class FetchedRow:
    """What img2dataset says of an image; sizes in px, exif: its column for a text of our own."""

    image_id: str
    url: str
    status: str | None = None  # success, or what failed
    error_message: str | None = None
    sha256: str | None = None  # of the fetched bytes
    exif: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    jpg: bytes | None = None


_TEXT = [field.name for field in fields(FetchedRow) if field.name != "jpg"]


class JournalWriter:
    """Stands for img2dataset's writers: a row is in the file as soon as it is written."""

    def __init__(
        self,
        shard_id: int,
        output_folder: str,
        save_caption: bool,
        oom_shard_count: int,
        schema: object,
        encode_format: str,
    ) -> None:
        self.folder = Path(output_folder)
        path = self.folder / f"{shard_id:0{oom_shard_count}d}{SUFFIX}"
        self.file = path.open("ab", buffering=0)
        self.failure: OSError | None = None

    def write(self, jpg: bytes | None, key: object, caption: object, meta: dict) -> None:
        text = json.dumps({name: meta.get(name) for name in _TEXT}).encode()
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


class FetchedRows:
    """The complete rows of some journals by image_id, each read from disk when it is asked for.

    Memory: an address a row. Of rows that occur twice the first one counts.
    """

    def __init__(self, journals: list[Path]) -> None:
        self.journals = journals
        self.addresses: dict[str, tuple[Path, int]] = {}
        for path in journals:
            for at, row in _rows(path, jpgs=False):
                self.addresses.setdefault(row.image_id, (path, at))

    def __len__(self) -> int:
        return len(self.addresses)

    def __iter__(self) -> Iterator[str]:
        return iter(self.addresses)

    def __contains__(self, image_id: object) -> bool:
        return image_id in self.addresses

    def get(self, image_id: str) -> FetchedRow | None:
        if image_id not in self.addresses:
            return None
        path, at = self.addresses[image_id]
        return next(row for _, row in _rows(path, at))

    def delete(self) -> None:
        for path in self.journals:
            path.unlink()


def _rows(path: Path, at: int = 0, jpgs: bool = True) -> Iterator[tuple[int, FetchedRow]]:
    """(byte where it starts, row) of the complete rows from byte `at` on: what a journal was cut off
    in is left out. jpgs: whether they are read."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(at)
        while len(head := file.read(_LENGTHS.size)) == _LENGTHS.size:
            text, jpg = _LENGTHS.unpack(head)
            end = at + _LENGTHS.size + text + jpg
            if end > size:
                return
            said = json.loads(file.read(text))
            said["error_message"] = _printable(said["error_message"])
            yield at, FetchedRow(**said, jpg=(file.read(jpg) or None) if jpgs else None)
            at = file.seek(end)


def _printable(text: str | None) -> str | None:
    """Without halves of surrogates, which Arrow does not store."""
    return text and text.encode(errors="replace").decode()
