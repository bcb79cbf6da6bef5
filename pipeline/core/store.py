"""Where finished shards lie: one folder a stage, nothing in it ever overwritten.

A shard's stored name says which origin it has (all that decides its bytes), in which round it was
fetched, how many good rows it holds and what its bytes are, so that one listing tells all about a
store and two who made the same shard at once leave two files, or the same one. Outs are hard links
into the store under plain names: DVC deletes an out before it runs its stage, the store stays.

A store's file is trusted as long as nobody has touched it since it was hashed: the nanoseconds of
its modification time are taken from its digest, and a write through any of its links changes them.
What was touched, or was copied by a tool that keeps no times, is hashed again before it is used.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path

from pipeline.core.outs import is_published, link
from pipeline.core.provenance import PARTIAL, file_digest, write_file, write_json
from pipeline.core.records import Entry, Recipe, Stamp

_STORED = re.compile(
    r"(?P<stem>.+)-(?P<origin>[0-9a-f]{32})-(?P<round>\d+)-(?P<good>\d+)-(?P<sha256>[0-9a-f]{32})"
    r"(?P<suffix>\.\w+)"
)
_LEFTOVER_S = 24 * 3600.0  # age from which a half-written file is nobody's: no shard takes a day
STAMPS = "_stamps"  # folder of the stamps that were published from here
_numbers = count()


class Store:
    """The finished shards of one stage. folder: data/.store/<the stage's folder>; see `store_of`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def entries(self) -> list[Entry]:
        """All that lies here, whoever made it for whichever plan, by one listing."""
        entries = []
        for folder, _, files in os.walk(self.folder):
            for path in (Path(folder, file) for file in files):
                stored = str(path.relative_to(self.folder))
                if is_stored_name(stored):
                    with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                        entries.append(entry_of(stored, path.stat().st_size))
        return sorted(entries, key=lambda entry: entry.stored)

    def path(self, entry: Entry) -> Path:
        return self.folder / entry.stored

    def commit(self, name: str, origin: str, round: int, write: Callable[[Path], int]) -> Entry:
        """Write a shard, hash it, give it its name.

        write: gets a path of this process alone, and returns how many of its rows are good. Any
        number of processes may do so at once, for the same shard too; none sees half a file.
        """
        hidden = self._hidden(name)
        try:
            good = write_file(hidden, write)
            entry = Entry(
                name=name,
                origin=origin,
                round=round,
                good=good,
                sha256=file_digest(hidden),
                bytes=hidden.stat().st_size,
            )
            self._place(hidden, entry)
            return entry
        finally:
            hidden.unlink(missing_ok=True)

    def reuse(self, source: Path, entry: Entry) -> bool:
        """Link a file from elsewhere into the store; whether its bytes are the entry's.

        Where the store has the same bytes already, they are given up for the link, so that no
        second copy stays.
        """
        source, target = Path(os.path.realpath(source)), self.path(entry)
        with contextlib.suppress(FileNotFoundError):
            other_disk = source.stat().st_dev != self.folder.stat().st_dev
            if os.path.samefile(source, target) or (other_disk and self.sound(entry)):
                return self.sound(entry)
        if file_digest(source) != entry.sha256:
            return False
        hidden = self._hidden(entry.name)
        hidden.parent.mkdir(parents=True, exist_ok=True)
        try:
            link(source, hidden)
            self._place(hidden, entry)
        finally:
            hidden.unlink(missing_ok=True)
        return True

    def _hidden(self, name: str) -> Path:
        """A name that no other process and no other call writes to."""
        return self.folder / f"{name}.{process_name()}-{next(_numbers)}{PARTIAL}"

    def _place(self, hidden: Path, entry: Entry) -> None:
        """Give a hashed file its stored name, and the time that says it was hashed."""
        status = hidden.stat()
        marked = status.st_mtime_ns // 10**9 * 10**9 + _mark(entry)
        if status.st_mtime_ns != marked:
            with contextlib.suppress(PermissionError):  # another user's file: hashed when used
                os.utime(hidden, ns=(status.st_atime_ns, marked))
        hidden.replace(self.path(entry))

    def sound(self, entry: Entry) -> bool:
        """Whether an entry has the bytes of its name; what was damaged is removed."""
        path = self.path(entry)
        try:
            if path.stat().st_mtime_ns % 10**9 == _mark(entry):
                return True
            if file_digest(path) == entry.sha256:
                return True
        except FileNotFoundError:
            return False
        path.unlink(missing_ok=True)
        return False

    def time(self, entry: Entry) -> float:
        """When an entry was made, or brought in."""
        return self.path(entry).stat().st_mtime

    def remove(self, entry: Entry) -> None:
        self.path(entry).unlink(missing_ok=True)

    def of_the_out(self, entries: dict[str, Entry]) -> dict[str, Path]:
        """The files that a published out holds beside its stamp, by name."""
        return {name: self.path(entry) for name, entry in entries.items()}

    def has_published(self, out: Path, stage: str, recipe: Recipe) -> bool:
        """Whether an out already holds this very run, complete, and nothing else."""
        return is_published(out, stage, recipe)

    def note(self, stamp: Stamp) -> Path:
        """Keep a stamp that is published: from now on its shards may be superseded."""
        path = self.folder / STAMPS / f"{stamp.stamp}.json"
        write_json(path, stamp.model_dump())
        return path

    def published(self) -> set[str]:
        """The stored names that noted stamps name; one that is damaged names nothing."""
        paths = (self.folder / STAMPS).glob("*.json")
        return set().union(*(stored_names(path.read_text(errors="replace")) for path in paths))

    def supersede(self, stamp: Stamp) -> None:
        """Remove what other published stamps name and this one does not, and what lost against a
        shard of this one."""
        kept, published = {file.stored for file in stamp.files.values()}, self.published()
        for path in (self.folder / STAMPS).glob("*.json"):
            if path.stem != stamp.stamp:
                path.unlink()
        won = {(e.name, e.origin): e.round for e in self.entries() if e.stored in kept}
        for entry in self.entries():
            lost = entry.round <= won.get((entry.name, entry.origin), -1)
            if entry.stored not in kept and (lost or entry.stored in published):
                self.remove(entry)

    def sweep(self) -> None:
        """Remove what killed processes left half-written."""
        for path in list(self.folder.rglob("*" + PARTIAL + "*")):
            with contextlib.suppress(FileNotFoundError):
                writer = path.name.split(PARTIAL)[0].rsplit("-", 1)[0]  # without the number
                if not may_live(writer, time.time() - path.stat().st_mtime):
                    path.unlink()


def stored_names(stamp: str) -> set[str]:
    """What a noted stamp names; one that is damaged names nothing."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        return {file["stored"] for file in json.loads(stamp)["files"].values()}
    return set()


def is_stored_name(name: str) -> bool:
    return _STORED.fullmatch(name) is not None


def entry_of(stored: str, size: int) -> Entry:
    """What a stored name says of a file of so many bytes."""
    match = _STORED.fullmatch(stored)
    assert match, stored
    return Entry(
        name=match["stem"] + match["suffix"],
        origin=match["origin"],
        round=int(match["round"]),
        good=int(match["good"]),
        sha256=match["sha256"],
        bytes=size,
    )


@cache
def _machine() -> str:
    """Names the process numbers that mean something here: this machine since it was started, and
    this container on it."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):  # not on every system
            parts.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def process_name() -> str:
    """A name for what belongs to this process alone, which says later whether it still lives."""
    return f"{_machine()}-{os.getpid()}"


def may_live(name: str, age_s: float) -> bool:
    """Whether the process of a `process_name` (the end of name) may still run.

    Of a process elsewhere nothing is known but the age of what it left.
    """
    match = re.search(r"([0-9a-f]{12})-(\d+)$", name)
    if match is None or match[1] != _machine():
        return age_s < _LEFTOVER_S
    try:
        os.kill(int(match[2]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _mark(entry: Entry) -> int:
    """Nanoseconds, below a second, of the time of a file that was hashed: a function of its digest."""
    return int(entry.sha256[:15], 16) % 10**9
