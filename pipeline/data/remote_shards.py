"""Shards that a folder of data/ names and does not hold: read from the remote store by ranges.

A shard is always called by its path in data/ (or in data/.store). Where no such file is on this disk,
the stamp beside it says which object of the store it is. `opened` is what pyarrow opens, `FILES` the
same as a file system, for DuckDB and for datasets; both read only.

What was read is kept in data/.work/cache/<object>, range by range as it was asked for, up to LIMIT
bytes, the least recently used going first: the next epoch, and a second reader of a footer, ask the store for
nothing. Objects never change, so what is kept is never out of date.
"""

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fsspec.spec import AbstractFileSystem

from pipeline.core import remote
from pipeline.core.errors import PipelineError
from pipeline.core.layout import CACHE, STAMP_FILE, STORE, WORK
from pipeline.core.provenance import file_digest, read_stamp
from pipeline.core.records import Stamp
from pipeline.core.store import is_stored_name, process_name

LIMIT = int(float(os.environ.get("EXTRAHEAD_CACHE_GB", "8")) * 1e9)  # bytes of data/.work/cache
PROTOCOL = "shards"  # of the paths by which DuckDB knows them
PIECE = 1 << 24  # bytes that are read at a time where a whole shard is
READERS = 8  # threads that ask the store at once
_BETWEEN_SWEEPS = 1 << 26  # bytes that a process adds to the cache before it looks at its size

_Of = TypeVar("_Of")
_Answer = TypeVar("_Answer")


class Shard(NamedTuple):
    """An object of the remote store."""

    key: str
    bytes: int
    cache: Path  # folder


def shards_in(folder: Path) -> list[Path]:
    """The shards of a folder such as data/teacher/images, sorted: those on this disk, or, where there
    is none, those that the stamp names."""
    if paths := sorted(folder.glob("*.parquet")):
        return paths
    for above in (folder, folder.parent):  # data/teacher has folders
        if stamp := _stamp(above):
            named = [above / name for name, file in stamp.files.items() if file.stored]
            return sorted(path for path in named if path.parent == folder)
    return []


def are_remote(paths: list[Path]) -> bool:
    """Whether shards of a folder lie in the store: a folder holds all that its stamp names, or none."""
    return not paths[0].exists()


def located(path: Path) -> Shard | None:
    """Which object a path is; None for a file of this disk, and for what is nowhere."""
    if path.exists():
        return None
    path = Path(os.path.abspath(path))
    if STORE in path.parts and is_stored_name(path.name):
        data = Path(*path.parts[: path.parts.index(STORE)])
        key = str(path.relative_to(data / STORE))
        return Shard(key, _size(key), _cache(data))
    if any(path.parent.glob("*.parquet")):  # a folder that lost one of its shards
        return None
    for folder in (path.parent, path.parent.parent):
        stamp = _stamp(folder)
        file = stamp.files.get(str(path.relative_to(folder))) if stamp else None
        if file and file.stored:
            return Shard(f"{folder.name}/{file.stored}", file.bytes, _cache(folder.parent))
    return None


def of_each(shards: Iterable[_Of], ask: Callable[[_Of], _Answer]) -> list[_Answer]:
    """What is asked of each shard, in their order; of several at once, for a store answers slowly."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(ask, shards))


def exists(path: Path) -> bool:
    """Whether a shard is on this disk, or named by the stamp of a folder that holds no more."""
    return path.exists() or located(path) is not None


def opened(path: Path) -> "Path | RangeFile":
    """What pyarrow opens for a shard."""
    shard = located(path)
    return path if shard is None else RangeFile(shard)


def shard_digest(path: Path) -> str:
    """32 hex digits of the SHA-256 of a shard's bytes, wherever they lie; none of them is kept."""
    shard = located(path)
    if shard is None:
        return file_digest(path)
    read = hashlib.sha256()
    for start in range(0, shard.bytes, PIECE):
        read.update(remote.read(shard.key, start, min(start + PIECE, shard.bytes)))
    return read.hexdigest()[:32]


def _stamp(folder: Path) -> Stamp | None:
    """The stamp of a folder of data/, or of a copy of one; None where there is none that reads."""
    with suppress(OSError, PipelineError):
        status = (folder / STAMP_FILE).stat()
        return _read(folder, status.st_mtime_ns, status.st_ino)
    return None


@lru_cache(maxsize=16)
def _read(folder: Path, time: int, inode: int) -> Stamp:
    return read_stamp(folder, folder.name)


@lru_cache(maxsize=1 << 16)
def _size(key: str) -> int:
    return remote.size(key)


def _cache(folder: Path) -> Path:
    """Of data/, or of a work folder in it that has links to it."""
    parts = folder.parts
    data = Path(*parts[: parts.index(WORK)]) if WORK in parts else folder
    return data / WORK / CACHE


class RangeFile:
    """A shard of the remote store as a file: seek and read, each thread from where it has sought."""

    mode, closed = "rb", False

    def __init__(self, shard: Shard):
        self.shard, self.size, self._at = shard, shard.bytes, threading.local()

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at.position = offset + (0, self.tell() if whence == 1 else 0, self.size)[whence]
        return self._at.position

    def tell(self) -> int:
        return getattr(self._at, "position", 0)

    def read(self, count: int | None = -1) -> bytes:
        start = min(self.tell(), self.size)
        left = self.size - start
        stop = start + (left if count is None or count < 0 else min(count, left))
        self._at.position = stop
        return _kept(self.shard, start, stop) if stop > start else b""

    def readable(self) -> bool:
        return True

    seekable = readable

    def writable(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> "RangeFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardFiles(AbstractFileSystem):
    """Shards of the remote store under their paths in data/, for reading only."""

    protocol = PROTOCOL
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix(f"{PROTOCOL}://")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        shard = located(Path(self._strip_protocol(path)))
        if shard is None:
            raise FileNotFoundError(path)
        return {"name": path, "size": shard.bytes, "type": "file"}

    def glob(self, path: str, maxdepth: int | None = None, **options: Any) -> list[str]:
        return [path]

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(0, UTC)  # never

    def open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        cache_options: dict | None = None,
        compression: str | None = None,
        **options: Any,
    ) -> RangeFile:
        shard = located(Path(self._strip_protocol(path)))
        if mode not in ("r", "rb") or shard is None:
            raise PermissionError("shards are read only")
        return RangeFile(shard)


FILES = ShardFiles()


def url(path: Path) -> str:
    """How DuckDB names a shard of FILES."""
    return f"{PROTOCOL}://{os.path.abspath(path)}"


def _kept(shard: Shard, start: int, stop: int) -> bytes:
    """A range of a shard: from the cache, or from the store into the cache."""
    path = shard.cache / shard.key / f"{start}-{stop}"
    with suppress(OSError):
        data, check = (kept := path.read_bytes())[:-4], kept[-4:]
        if len(data) == stop - start and check == _check(data):
            os.utime(path)
            return data
    data = remote.read(shard.key, start, stop)
    with suppress(OSError):  # a full disk: nothing is kept then
        _keep(shard.cache, path, data)
    return data


def _check(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


_lock = threading.Lock()
_added = _BETWEEN_SWEEPS  # by this process since it last looked; at once the first time


def _keep(cache: Path, path: Path, data: bytes) -> None:
    global _added
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{process_name()}-{threading.get_ident()}")
    try:
        aside.write_bytes(data + _check(data))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    with _lock:
        _added += len(data)
        if _added < _BETWEEN_SWEEPS:
            return
        _added = 0
    _sweep(cache)


def _sweep(cache: Path) -> None:
    """Remove what was not used for longest, until the cache is below its limit."""
    ranges = []
    for path in cache.rglob("*-*"):
        with suppress(FileNotFoundError):  # another process sweeps too
            if path.is_file():
                status = path.stat()
                ranges.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in ranges)
    for _, size, path in sorted(ranges):
        if total <= LIMIT:
            return
        path.unlink(missing_ok=True)
        total -= size
