"""What must be forgotten is nowhere below data/: outs, store, work folders, whoever wrote the file.

Parquet is asked row by row for ids and digests, every other file is searched for the urls and ids as
they are written. Pictures that are drawn (a report's thumbnails) can only be made anew.
"""

import configparser
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError
from pipeline.core.layout import CACHE, SHARDED, STAGES, WORK
from pipeline.core.provenance import stamp_of
from pipeline.core.remote import has_address
from pipeline.core.remote_store import cached, keys_of
from pipeline.data.database import TABLES
from pipeline.data.remote_shards import opened, shards_in
from pipeline.data.shards import read_shard
from pipeline.fetch.forget import Forgotten
from pipeline.verify.files import Finding

PROMISE = "what must be forgotten is not held"
MEND = "dvc repro (and rm -r {folder} where that leaves it)"
LEFT = {"row_id", "image_id", "status", "error"}  # all that a forgotten row of data/images has
MARKS = {"image_id", "split", "keep", "reason", "duplicate_of"}  # a selection says why it is out
CHUNK = 1 << 22


def forgotten_findings(data: Path, forgotten: Forgotten) -> list[Finding]:
    """Every file below data/ that still holds something of a forgotten image."""
    ids = {*forgotten.lines, *_forgotten_rows(data)}
    if not ids and not forgotten.sha256:
        return []
    words = sorted({*ids, *forgotten.lines.values(), *forgotten.sha256})
    findings = []
    shards = [p for folder, _ in TABLES.values() for p in shards_in(data / folder)]  # also remote
    for path in sorted({*shards, *(p for p in data.rglob("*") if p.is_file())}):
        held = set(_held_in(path, ids, forgotten, words))
        if held:
            place = str(path.relative_to(data))
            folder = data / place.split("/")[0]
            found = f"{', '.join(sorted(held)[:3])}{' ...' if len(held) > 3 else ''}"
            findings.append(Finding(PROMISE, place, found, MEND.format(folder=folder)))
    return findings + _unnamed_ranges(data)


def _unnamed_ranges(data: Path) -> list[Finding]:
    """What was read of shards in a remote store that data/ does not name any more."""
    named: set[str] = set()
    for folder in (STAGES[stage].folder for stage in SHARDED):
        with suppress(PipelineError):
            named |= keys_of(folder, stamp_of(data, folder)).keys()
    cache = data / WORK / CACHE
    return [
        Finding(PROMISE, str(folder.relative_to(data)), "of a superseded shard", f"rm -r {cache}")
        for key, folder in sorted(cached(data).items())
        if key not in named
    ]


def _forgotten_rows(data: Path) -> set[str]:
    """image_ids of rows that are forgotten already: some were named by their bytes."""
    ids: set[str] = set()
    for path in shards_in(data / "images"):
        try:
            table = read_shard(path, "download", ["image_id", "status"])
        except PipelineError:
            continue  # damaged or foreign, which is a finding of its own
        gone = table.filter(pc.equal(table["status"], "forgotten"))
        ids.update(gone["image_id"].to_pylist())
    return ids


def _held_in(path: Path, ids: set[str], forgotten: Forgotten, words: list[str]) -> Iterator[str]:
    if path.suffix == ".parquet":
        try:
            yield from _held_in_parquet(path, ids, forgotten)
            return
        except (pa.ArrowException, OSError):
            pass  # half written or damaged: its bytes may hold something all the same
    if path.is_file():  # a damaged object of a remote store is found by its digest
        yield from _held_in_bytes(path, words)


def _held_in_parquet(path: Path, ids: set[str], forgotten: Forgotten) -> Iterator[str]:
    with pq.ParquetFile(opened(path)) as file:
        names = set(file.schema_arrow.names)
        keys = [name for name in ("image_id", "sha256_original", "sha256") if name in names]
        rest = sorted(names - LEFT - MARKS)
        for group in range(file.num_row_groups) if keys else ():
            table = file.read_row_group(group, columns=keys)
            held = pc.is_in(table["image_id"], pa.array(sorted(ids), pa.string()))
            for name in set(keys) - {"image_id"}:
                digests = pa.array(sorted(forgotten.sha256), pa.string())
                held = pc.or_(held, pc.is_in(table[name], digests))
            rows = pc.indices_nonzero(held)
            if len(rows):
                table = file.read_row_group(group, columns=["image_id", *rest]).take(rows)
                for row in table.to_pylist():
                    key = row.pop("image_id")
                    if any(value not in (None, [], 0) for value in row.values()):
                        yield f"image {key}"


def _held_in_bytes(path: Path, words: list[str]) -> Iterator[str]:
    """The words that a file's bytes contain; read piece by piece, each with the end of the last."""
    wanted = {word: word.encode() for word in words}
    longest = max(map(len, wanted.values()))
    tail = b""
    with path.open("rb") as file:
        while wanted and (piece := file.read(CHUNK)):
            text = tail + piece
            for word in [word for word, data in wanted.items() if data in text]:
                del wanted[word]
                yield repr(word)
            tail = text[-longest:]


def elsewhere(project: Path) -> list[str]:
    """What else may hold forgotten images, and the command that empties it: none of it is data/."""
    if not (project / ".dvc").is_dir():
        return []
    held = [
        "DVC's cache holds earlier outs: dvc gc --workspace (what other branches need goes too)"
    ]
    config = configparser.ConfigParser()
    config.read([project / ".dvc/config", project / ".dvc/config.local"])
    for section in config.sections():
        if remote := re.fullmatch(r"'?remote \"(.+)\"'?", section):
            name = remote[1]
            held.append(f"DVC's remote {name}: dvc gc --workspace --cloud --remote {name}")
    if has_address():
        held.append("the remote store holds what older stamps name: docs/store.md, Deleting")
    return [
        *held,
        "other clones, exports, and stores of other machines: run the same there",
        "students that were trained with it before: their weights are not searched",
    ]
