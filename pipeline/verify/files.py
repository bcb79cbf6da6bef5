"""What stamps, files and rows of data/ say of themselves, a row group at a time; writes nothing.

`pipeline.verify.tables` asks what needs several files at once, `pipeline.verify.verify` what
needs a model.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError
from pipeline.core.layout import BY_FOLDER, CACHE, FOLDERS, STAGES, STAMP_FILE, command
from pipeline.core.provenance import digest, outdated_inputs, stamp_of, summary_of
from pipeline.core.records import Stamp
from pipeline.core.threads import ahead
from pipeline.data import shards
from pipeline.data.pixels import NotAnImage, decode
from pipeline.data.remote_shards import exists, opened, shard_digest
from pipeline.fetch.forget import JUDGED, image_id
from pipeline.fetch.policy import STATUSES
from pipeline.fetch.segmentation_masks import png_size

IMPORTED = "import_embeddings"  # the other stage that may have made data/teacher
FAR_FROM_UNIT = 1e-3  # of the length of a stored embedding
KNOWN_STATUSES = {"ok", "duplicate_url", "empty_url"} | STATUSES | JUDGED
BROKEN = (pa.ArrowException, OSError, ValueError, PipelineError)  # what a damaged shard raises


class Finding(NamedTuple):
    """A promise that is not kept."""

    promise: str
    place: str  # path below data/
    found: str
    run: str  # the command that mends it


Stamps = dict[str, Stamp]  # by folder
Progress = Callable[[int], object]  # is told bytes that were read


def remade(data: Path, folder: str) -> str:
    """The command that makes a folder anew; without the `rm` a stage may believe it is done."""
    return f"rm -r {data / folder} && pipeline {command(_maker(data, folder))}"


def _maker(data: Path, folder: str) -> str:
    """The stage that made a folder, where its stamp still says so."""
    with contextlib.suppress(PipelineError):
        stage = stamp_of(data, folder).stage
        if stage in STAGES and STAGES[stage].folder == folder:
            return stage
    return BY_FOLDER[folder].name


def read_stamps(data: Path) -> tuple[Stamps, list[Finding]]:
    """The stamps of all finished folders, and what is wrong with them."""
    stamps, findings = {}, []
    for folder in FOLDERS:
        if not (data / folder).exists():
            continue
        try:
            stamp = stamp_of(data, folder)
            if stamp.stage not in STAGES or STAGES[stamp.stage].folder != folder:
                raise PipelineError("its stage makes another folder")
            if stamp.stamp != digest(stamp.recipe.model_dump()):
                raise PipelineError("its stamp is not that of its recipe")
            if (data / folder / STAMP_FILE).read_text() != canonical(stamp.model_dump()):
                raise PipelineError("it was edited: write_json writes it in another way")
        except (PipelineError, OSError, ValueError) as error:
            promise = "a finished stage says how it was made"
            place = f"{folder}/{STAMP_FILE}"
            findings.append(Finding(promise, place, str(error), remade(data, folder)))
        else:
            stamps[folder] = stamp
    return stamps, findings


def canonical(value: Any) -> str:
    """The text in which records are written."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def summary_findings(data: Path, stamps: Stamps) -> list[Finding]:
    """What later stages read in a stamp's summary is what the files say."""
    findings, claims = [], {}
    promise = "a stamp's summary is what its files say"
    for folder, name in (("student", "training.json"), ("evaluation", "metrics.json")):
        if folder in stamps:
            claims[folder] = json.loads((data / folder / name).read_text())
    if "teacher" in stamps:
        claims["teacher"] = _teacher_claims(data, stamps["teacher"])
    for folder, claim in claims.items():
        summary = stamps[folder].summary
        if wrong := [key for key in claim if summary.get(key) != claim[key]]:
            found = f"another {', '.join(wrong)}"
            place = f"{folder}/{STAMP_FILE}"
            findings.append(Finding(promise, place, found, remade(data, folder)))
        elif folder == "teacher":
            try:
                summary_of(stamps[folder])
            except PipelineError as error:
                place = f"{folder}/{STAMP_FILE}"
                findings.append(Finding(promise, place, str(error), remade(data, folder)))
    return findings


def _teacher_claims(data: Path, stamp: Stamp) -> dict[str, Any]:
    """What the summary of data/teacher must say, as its files and its recipe say it."""
    rows = {"images": 0, "texts": 0}
    for name in stamp.files:
        rows[name.split("/")[0]] += pq.read_metadata(opened(data / "teacher" / name)).num_rows
    parameters = stamp.recipe.parameters
    if stamp.stage == IMPORTED:
        names = ("teacher", "preprocessing")
        return rows | {name: parameters[name] for name in names} | {"dtype": "imported"}
    made = _made(data / "teacher/texts/prompts.parquet")
    named = {name: parameters[name] for name in ("teacher", "dtype", "batch", "views")}
    return rows | named | {"preprocessing": made.get("preprocessing")}


def file_findings(data: Path, stamps: Stamps, progress: Progress) -> list[Finding]:
    """Every file of a stamp is there with its bytes, is readable, and there is no other."""
    findings = []
    for folder, stamp in stamps.items():
        for name, file in stamp.files.items():
            if found := _damage(data / folder / name, file.sha256):
                promise = "every file has the bytes of its stamp"
                findings.append(Finding(promise, f"{folder}/{name}", found, remade(data, folder)))
            progress(file.bytes)
        files = {
            str(p.relative_to(data / folder)) for p in (data / folder).rglob("*") if p.is_file()
        }
        for name in sorted(files - {STAMP_FILE, *stamp.files}):
            promise = "a folder holds its stage's files and no others"
            run = f"mv {data / folder / name} elsewhere"
            findings.append(Finding(promise, f"{folder}/{name}", "no stage wrote it", run))
    for path in sorted(data.glob("runs/*.parquet")):
        if found := _damage(path, None):
            promise = "every finished run is on record"
            findings.append(Finding(promise, f"runs/{path.name}", found, f"rm {path}"))
    return findings


def _damage(path: Path, sha256: str | None) -> str | None:
    """What is wrong with a file's bytes; None for a sound one. sha256 None: only that it reads."""
    if not exists(path):
        return "missing"
    try:
        if sha256 and (actual := shard_digest(path)) != sha256:
            return f"SHA-256 {actual}, its stamp says {sha256}"
        if path.suffix == ".parquet":
            for _ in _groups(path):
                pass
    except BROKEN as error:
        return f"unreadable: {str(error).splitlines()[0]}"
    return None


def _groups(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    with pq.ParquetFile(opened(path), page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns)


def chain_findings(data: Path, stamps: Stamps) -> list[Finding]:
    """Each folder was made from what its input folders hold now."""
    promise, findings = "each stage was made from what lies there now", []
    for folder, stamp in stamps.items():
        for source in outdated_inputs(stamp, stamps):
            found = f"made from other {source} than data/ holds"
            findings.append(Finding(promise, folder, found, f"pipeline {command(stamp.stage)}"))
        for source in STAGES[stamp.stage].inputs:
            if not (data / source).exists():
                run = f"pipeline {BY_FOLDER[source].command}"
                findings.append(Finding(promise, folder, f"made from {source}, not here", run))
    return findings


def leftover_findings(data: Path) -> list[Finding]:
    """Work folders belong to stages."""
    known = {*STAGES, "lock", CACHE}
    return [
        Finding("work under way belongs to a stage", f".work/{p.name}", "of no stage", f"rm -r {p}")
        for p in sorted(data.glob(".work/*"))
        if p.name not in known
    ]


def image_findings(data: Path, stamp: Stamp, progress: Progress, workers: int) -> list[Finding]:
    """Rows of data/images: as many as the manifest had, of a known status, JPEGs that decode."""
    findings, counts = [], {}
    lists = stamp.recipe.inputs.get("lists", {})
    for name, file in stamp.files.items():
        path, faults = data / "images" / name, {}
        if _made(path).get("list") != lists.get(name):
            faults["it was made from another list"] = [name]
        for table in _groups(path) if _has_schema(path, shards.IMAGES, faults) else ():
            for status in table["status"].to_pylist():
                counts[status] = counts.get(status, 0) + 1
            for key, fault in ahead(_image_fault, table.to_pylist(), workers, 64):
                if fault:
                    faults.setdefault(fault, []).append(key)
        findings += _of_file(data, "images", name, "a row is an image or says why not", faults)
        progress(file.bytes)
    if not findings and counts != stamp.summary.get("rows"):
        found = f"{counts}, when finished {stamp.summary.get('rows')}"
        promise = "as many rows as the manifest has"
        place = f"images/{STAMP_FILE}"
        findings.append(Finding(promise, place, found, remade(data, "images")))
    return findings


def _made(path: Path) -> dict:
    """What a shard's footer says of its making; nothing where it is silent."""
    try:
        return shards.provenance(path, "download")
    except PipelineError:
        return {}


def _has_schema(path: Path, schema: pa.Schema, faults: dict) -> bool:
    """Note a file of other columns under faults."""
    found = pq.read_schema(opened(path))
    if not found.equals(schema, check_metadata=False):
        faults[f"its columns are {', '.join(found.names)}"] = [path.name]
        return False
    return True


def _image_fault(row: dict) -> tuple[str, str | None]:
    """(row_id, what is wrong with a row of data/images)."""
    return row["row_id"], _wrong_with(row)


def _wrong_with(row: dict) -> str | None:
    if row["status"] not in KNOWN_STATUSES:
        return f"status {row['status']!r}"
    if row["status"] == "forgotten":
        kept = {name for name, value in row.items() if value not in (None, [])}
        more = kept - {"row_id", "image_id", "status", "error"}
        return f"a forgotten row holds {', '.join(sorted(more))}" if more else None
    if row["image_id"] != image_id(row["url"]):
        return "the image_id is not the url's hash"
    if row["status"] != "ok":
        good = row["jpg"] is None and row["error"]
        return None if good else "a failed row has bytes, or no reason"
    if row["jpg"] is None or hashlib.sha256(row["jpg"]).hexdigest() != row["sha256"]:
        return "the JPEG has not the SHA-256 of its row"
    try:
        height, width, _ = decode(row["jpg"]).shape
    except NotAnImage as error:
        return f"the JPEG does not decode: {error}"
    if (width, height) != (row["width"], row["height"]):
        return f"the JPEG is {width} x {height} px, its row says {row['width']} x {row['height']}"
    if row["mask"] is not None and (found := png_size(row["mask"])) != (width, height):
        return f"the mask is {found or 'no PNG'}, its image {width} x {height} px"
    return None


def vector_findings(data: Path, folder: str, stamp: Stamp, size: int) -> list[Finding]:
    """Embeddings of data/teacher or of the student's index: finite and of unit length."""
    findings = []
    schemas = {
        "images": shards.teacher_schema(size),
        "texts": shards.texts_schema(size),
        "index": shards.index_schema(size),
    }
    for name in stamp.files:
        kind, path, faults = name.split("/")[0], data / folder / name, {}
        if not name.endswith(".parquet"):
            continue
        for table in _groups(path) if _has_schema(path, schemas[kind], faults) else ():
            if table["embedding"].null_count:
                faults["there is no vector"] = [table["embedding"].null_count]
                continue
            stored = shards.stored_embeddings(table["embedding"]).astype(np.float32)
            length = np.linalg.norm(stored, axis=1)
            names = table[table.column_names[0]].to_pylist()
            for fault, rows in (
                ("not finite", ~np.isfinite(length)),
                ("zero", length == 0),
                ("not of unit length", (length != 0) & (abs(length - 1) > FAR_FROM_UNIT)),
            ):
                if rows.any():
                    faults[fault] = [names[i] for i in np.flatnonzero(rows)]
        findings += _of_file(data, folder, name, "embeddings are finite, of unit length", faults)
    return findings


def provenance_findings(data: Path, stamps: Stamps) -> list[Finding]:
    """Each shard of data/teacher was made from the shard of data/images of its name."""
    findings = []
    files, teacher = stamps["images"].files, stamps["teacher"]
    for name in teacher.files if teacher.stage != IMPORTED else ():
        source = Path(name).name
        made = _made(data / "teacher" / name)
        if source in files and made.get("input") != files[source].sha256:
            promise = "each stage was made from what lies there now"
            found = f"made from another images/{source}"
            findings.append(Finding(promise, f"teacher/{name}", found, remade(data, "teacher")))
    return findings


def _of_file(data: Path, folder: str, name: str, promise: str, faults: dict) -> list[Finding]:
    """One finding per kind of fault, with how many rows and an example."""
    return [
        Finding(promise, f"{folder}/{name}", f"{fault} ({_some(rows)})", remade(data, folder))
        for fault, rows in faults.items()
    ]


def _some(rows: list) -> str:
    return f"{len(rows)} {'row' if len(rows) == 1 else 'rows'}, such as {rows[0]}"
