"""A plan carried out in a store: which of its shards are there, what earlier runs left to reuse, and
how finished shards become a stage's out.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from typing import Any, Protocol

from pipeline.core.dvc_cache import locked_out, locks_other_images
from pipeline.core.errors import PipelineError
from pipeline.core.layout import SHARDED, STAGES, STAMP_FILE, STORE, WORK
from pipeline.core.outs import make_stamp, place_out
from pipeline.core.provenance import read_stamp, sealed
from pipeline.core.records import Entry, Plan, Stamp, StoredFile
from pipeline.core.remote import has_address
from pipeline.core.remote_store import RemoteStore, bring_back
from pipeline.core.store import Store, entry_of, may_live, process_name
from pipeline.core.terminal import say


class Maker(Protocol):
    """What knows how the shards of a plan are made.

    It pickles, and `make` may be called again and again. tally: what `make` did, for the record.
    """

    plan: Plan
    tally: Counter

    def make(self, names: Iterable[str]) -> Iterator[Entry]:
        """Each of these shards, as soon as it is in the store. Any number of processes may do so at
        once, on any machine, without a lock."""

    def is_settled(self, entry: Entry) -> bool:
        """Whether an entry of an earlier round needs nothing in the plan's round."""

    def differences(self, entry: Entry) -> list[str]:
        """What an entry of another plan was made with that this plan asks otherwise."""


def store_of(data: Path, stage: str, kind: str = "local") -> Store:
    """The store of a stage: on this disk, or the remote one."""
    store = {"local": Store, "remote": RemoteStore}[kind]
    return store(data / STORE / STAGES[stage].folder)


def carry_out(
    plan: Plan,
    maker: Maker,
    store: Store,
    data: Path,
    share: Callable[[list[str]], list[str]] | None = None,
) -> dict[str, Entry]:
    """Make what is missing of a plan; its finished shards by name.

    share: all names, sorted -> those that are this process's to make, where it is one of many.
    """
    entries = finished(plan, store, maker)
    if len(entries) < len(plan.parts):
        bring_in(data, plan.stage, store)
        entries = finished(plan, store, maker)
        _name_other_plans(entries, store, maker)
    names = sorted(part.name for part in plan.parts)
    mine = share(names) if share else names
    for entry in maker.make([name for name in mine if name not in entries]):
        entries[entry.name] = entry
    return entries


def _name_other_plans(entries: dict[str, Entry], store: Store, maker: Maker) -> None:
    """Say which shards in the store were finished for another plan and never published: of a run that
    was ended, or of a part that was started with other parameters."""
    known = store.published() | {entry.stored for entry in entries.values()}
    others = [e for e in store.entries() if e.stored not in known and store.sound(e)]
    if others:
        differences = sorted({name for entry in others for name in maker.differences(entry)})
        say(
            f"note: {len(others)} shards in the store of {store.folder.name} belong to another plan, whose "
            f"{', '.join(differences) or 'shards'} differ: what fits of their rows is reused, and they stay.",
            err=True,
        )


def finished(plan: Plan, store: Store, maker: Maker) -> dict[str, Entry]:
    """Shard name -> the entry that a plan takes for it: the newest round, then the most good rows,
    then the smaller digest. A shard that is missing, or not settled in the plan's round, has none.
    """
    wanted = {(part.name, part.origin) for part in plan.parts}
    made = defaultdict(list)
    for entry in store.entries():
        if (entry.name, entry.origin) in wanted:
            made[entry.name].append(entry)
    found = {}
    for name, entries in made.items():
        entries.sort(key=lambda entry: (-entry.round, -entry.good, entry.sha256))
        best = next(filter(store.sound, entries), None)
        if best is not None and (best.round >= plan.round or maker.is_settled(best)):
            found[name] = best
    return found


def bring_in(data: Path, stage: str, store: Store) -> None:
    """Link into the store what an earlier run published: the out, and the out that dvc.lock names in
    DVC's cache, for DVC deletes outs before it runs a stage. Says what dvc.lock names in vain.
    """
    folder = STAGES[stage].folder
    out, stamp = data / folder, None
    with suppress(PipelineError):
        stamp = read_stamp(out, stage)
    if stamp:
        _reuse(store, stamp, {name: out / name for name in stamp.files})
    locked = locked_out(data, folder)
    if locked is None:
        return
    digest, files = locked
    lost = [name for name, path in files.items() if not path.is_file()]
    if (lost or not files) and not locks_other_images(data):
        what = f"{len(lost)} of its {len(files)} files" if files else "the list of its files"
        say(
            f"note: dvc.lock names data/{folder} ({digest[:8]}), but DVC's cache lacks {what}. "
            f"`dvc fetch {stage}` brings them back where a remote has them; what is nowhere here "
            "is made again.",
            err=True,
        )
    with suppress(OSError, KeyError, ValueError):
        values = json.loads(files[STAMP_FILE].read_text())
        if sealed(values) == values:
            _reuse(store, Stamp.model_validate(values), files)


def _reuse(store: Store, stamp: Stamp, files: dict[str, Path]) -> None:
    """Link a published stage's shards into the store, or bring them there."""
    shards = [(name, file) for name, file in stamp.files.items() if file.stored]
    for name, file in shards:
        if file.stored and name in files and files[name].is_file():
            store.reuse(files[name], entry_of(file.stored, file.bytes))
    if shards and not any(files[name].is_file() for name, _ in shards if name in files):
        bring_back(store, stamp)
    if shards:
        store.note(stamp)


def publish(
    plan: Plan, store: Store, data: Path, entries: dict[str, Entry], summary: dict[str, Any]
) -> Stamp:
    """Make the out exactly the plan's shards and their stamp, by links; nothing is hashed again.

    What earlier published stamps named and this one does not is removed from the store, and what
    lost against a shard of this one; what was never published stays.
    """
    files = {
        name: StoredFile(sha256=entry.sha256, bytes=entry.bytes, stored=entry.stored)
        for name, entry in entries.items()
    }
    stamp = make_stamp(plan.stage, plan.recipe, files, summary)
    noted = store.note(stamp)
    out = data / STAGES[plan.stage].folder
    place_out(data, plan.stage, out, store.of_the_out(entries) | {STAMP_FILE: noted})
    store.supersede(stamp)
    store.sweep()
    return stamp


def unneeded(data: Path, days: float) -> list[tuple[Store, Entry]]:
    """Shards of all stores, the remote one too where its address is known, that no published stamp
    names and that are older than so many days."""
    found, young = [], time.time() - days * 24 * 3600
    for stage in SHARDED:
        for kind in ("local", "remote") if has_address() else ("local",):
            store = store_of(data, stage, kind)
            entries = store.entries()  # before the stamps: what is published meanwhile is kept
            named = store.published()
            found += [
                (store, entry)
                for entry in entries
                if entry.stored not in named
                and int(store.time(entry)) <= young  # the rest is a mark
            ]
    return found


@contextmanager
def scratch_folder(data: Path, stage: str) -> Iterator[Path]:
    """A folder of this process alone below data/.work. It goes when the work has ended; those of
    processes that were killed go now.
    """
    work_folder = data / WORK / stage
    folder = work_folder / f"run-{process_name()}"
    for other in work_folder.glob("run-*"):
        with suppress(FileNotFoundError):
            if not may_live(other.name, time.time() - other.stat().st_mtime):
                rmtree(other, ignore_errors=True)
    rmtree(folder, ignore_errors=True)  # of an earlier process with our number
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        rmtree(folder, ignore_errors=True)
