"""The finished shards of a stage in a remote store; see `pipeline.core.remote` for what that is."""

import shutil
import time
from functools import partial
from pathlib import Path

from pipeline.core import remote
from pipeline.core.errors import PipelineError
from pipeline.core.layout import ADDRESS, CACHE, STAMP_FILE, WORK
from pipeline.core.outs import recipe_digest
from pipeline.core.provenance import file_digest, read_stamp, write_json
from pipeline.core.records import Entry, Recipe, Stamp, StoredFile
from pipeline.core.store import STAMPS, Store, entry_of, is_stored_name, stored_names
from pipeline.core.terminal import say


class RemoteStore(Store):
    """The interface of `Store`. A shard is written and hashed in the folder on this disk, sent, and
    removed there; its path below the folder is then the name by which readers find it.

    Many clones may use one remote store, so publishing removes nothing from it: `store gc` does.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._times: dict[str, float] = {}

    def entries(self) -> list[Entry]:
        entries = []
        for key, said in sorted(remote.listed(self.folder.name).items()):
            stored = key.removeprefix(f"{self.folder.name}/")
            if is_stored_name(stored):
                entries.append(entry_of(stored, said.bytes))
                self._times[stored] = said.time
        return entries

    def _key(self, name: str) -> str:
        return f"{self.folder.name}/{name}"

    def _place(self, hidden: Path, entry: Entry) -> None:
        remote.put(hidden, self._key(entry.stored))

    def reuse(self, source: Path, entry: Entry) -> bool:
        if entry.stored in self._times:  # of the listing with which a run begins
            return True
        if file_digest(source) != entry.sha256:
            return False
        self._place(source, entry)
        return True

    def sound(self, entry: Entry) -> bool:
        return True  # an object is whole; `pipeline verify` reads them all

    def time(self, entry: Entry) -> float:
        return self._times.get(entry.stored, time.time())

    def remove(self, entry: Entry) -> None:
        remote.remove(self._key(entry.stored))

    def of_the_out(self, entries: dict[str, Entry]) -> dict[str, Path]:
        return {}  # its stamp names them

    def has_published(self, out: Path, stage: str, recipe: Recipe) -> bool:
        try:
            stamp = read_stamp(out, stage)
        except PipelineError:
            return False
        stored = {file.stored for file in stamp.files.values()}
        alone = [path.name for path in out.iterdir()] == [STAMP_FILE]
        if stamp.stamp != recipe_digest(recipe) or not alone:
            return False
        return stored <= {entry.stored for entry in self.entries()}

    def note(self, stamp: Stamp) -> Path:
        """By the stamp's own digest: another clone's run of the same recipe may have other shards."""
        path = self.folder / STAMPS / f"{stamp.digest}.json"
        write_json(path, stamp.model_dump())
        remote.put(path, self._key(f"{STAMPS}/{path.name}"))
        return path

    def published(self) -> set[str]:
        keys = remote.listed(self._key(STAMPS))
        return set().union(*(stored_names(remote.read(key).decode()) for key in keys))

    def supersede(self, stamp: Stamp) -> None:
        """Remove from this disk what was read of other shards: an image in them may be forgotten."""
        (self.folder / STAMPS / f"{stamp.digest}.json").unlink(missing_ok=True)  # it was sent
        named = keys_of(self.folder.name, stamp)
        for key, folder in cached(self.folder.parents[1]).items():
            if key not in named and key.startswith(self._key("")):
                shutil.rmtree(folder, ignore_errors=True)


def keys_of(folder: str, stamp: Stamp) -> dict[str, StoredFile]:
    """Key of an object -> what the stamp of a folder of data/ says of it."""
    files = stamp.files.values()
    return {f"{folder}/{file.stored}": file for file in files if file.stored}


def cached(data: Path) -> dict[str, Path]:
    """Key of an object -> the folder of what was read of it."""
    cache = data / WORK / CACHE
    return {str(folder.relative_to(cache)): folder for folder in cache.rglob("*.parquet")}


def bring_back(store: Store, stamp: Stamp) -> None:
    """Copy to a store on this disk what a stamp names in the remote one.

    Raises PipelineError where that one cannot be asked.
    """
    if isinstance(store, RemoteStore):
        return
    if not remote.has_address():
        say(
            f"note: data/{store.folder.name} names shards of a remote store. Without its address "
            f"(--store, or {ADDRESS}) they are not reused, but made again.",
            err=True,
        )
        return
    there = remote.listed(store.folder.name)
    for key, file in keys_of(store.folder.name, stamp).items():
        if file.stored and key in there:
            entry = entry_of(file.stored, file.bytes)
            if not store.sound(entry):
                fetch = partial(_fetched, key, entry.good)
                store.commit(entry.name, entry.origin, entry.round, fetch)


def _fetched(key: str, good: int, path: Path) -> int:
    remote.get(key, path)
    return good
