"""data/ -> findings: every promise of the pipeline, checked on what lies there. Writes nothing.

Cost: one read of every byte, one decode of every JPEG; `recompute` embeds some rows again.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import torch
from tqdm import tqdm

from pipeline.core.choices import FindingsFormat
from pipeline.core.errors import PipelineError
from pipeline.core.layout import command
from pipeline.core.provenance import evaluation_of, summary_of
from pipeline.core.records import Stamp
from pipeline.data.pixels import decode
from pipeline.data.views import view_pixels
from pipeline.fetch.forget import Forgotten
from pipeline.models.student import Student, read_card
from pipeline.verify import files
from pipeline.verify.files import IMPORTED, Finding, Stamps, remade
from pipeline.verify.forgotten import forgotten_findings
from pipeline.verify.freshness import changed_parameters
from pipeline.verify.tables import connection_over, set_findings

if TYPE_CHECKING:
    from pipeline.models.teacher import Teacher

FAITHFUL = 0.999  # least cosine of a stored vector to the one that is computed again
BLOCK = 16**8  # a row is in the sample if the first 8 digits of its id fall below a share of it


def verify(
    data: Path,
    *,
    recompute: float = 0.0,
    card: Path | None = None,
    device: str = "cpu",
    workers: int = 2,
    params: Path | None = None,
    forgotten: Forgotten | None = None,
) -> list[Finding]:
    """Everything in data/ that is not as promised; nothing where all is well.

    recompute: share of images and texts, in (0, 1], that the teacher of `card` embeds again (at
    least one of each); the same share means the same rows. workers: threads that decode. params: the
    parameter file by which data/ is to be made. forgotten: what must not be held below data/.
    Folders whose stage has not run are passed over; of a damaged folder only the damage is reported.

    Raises PipelineError: nothing there at all, and recomputing without the teacher that was used.
    """
    stamps, findings = files.read_stamps(data)
    if not stamps and not findings:
        raise PipelineError(f"{data} holds no finished stage. Run `dvc repro` first.")
    teacher = None
    if recompute and "teacher" in stamps:  # before the long work
        teacher = _teacher(stamps["teacher"], card, device)
    sizes = {folder: _bytes(stamp) for folder, stamp in stamps.items()}
    total = sum(sizes.values()) + sizes.get("images", 0)  # whose JPEGs are decoded, too
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as bar:
        findings += files.file_findings(data, stamps, bar.update)
        findings += files.chain_findings(data, stamps) + files.leftover_findings(data)
        findings += [*_outdated(params, data)] if params else []
        findings += forgotten_findings(data, forgotten or Forgotten())
        findings += files.summary_findings(data, _sound(stamps, findings))
        sound = _sound(stamps, findings)
        if "images" in sound:
            findings += files.image_findings(data, sound["images"], bar.update, workers)
    if "teacher" in sound:
        size = summary_of(sound["teacher"]).embedding_size
        for folder in sound.keys() & {"teacher", "evaluation"}:
            findings += files.vector_findings(data, folder, sound[folder], size)
        if "images" in sound:
            findings += files.provenance_findings(data, sound)
    findings += [*_student(data, sound), *_metrics(data, sound)]
    sound = _sound(sound, findings)
    connection = connection_over(data, sound)
    findings += set_findings(data, sound, connection)
    if teacher and {"images", "teacher"} <= sound.keys():
        findings += _recomputed(data, sound["teacher"], connection, recompute, teacher)
    return findings


def findings_text(findings: list[Finding], form: FindingsFormat) -> str:
    """What `pipeline verify` prints; json is a list of objects."""
    if form == "json":
        return json.dumps([finding._asdict() for finding in findings], indent=2)
    if not findings:
        return "every promise is kept"
    blocks = [f"{f.place}: {f.promise}\n  found: {f.found}\n  run:   {f.run}" for f in findings]
    return "\n".join([*blocks, f"{len(findings)} broken promise{'s' * (len(findings) > 1)}"])


def _bytes(stamp: Stamp) -> int:
    return sum(file.bytes for file in stamp.files.values())


def _sound(stamps: Stamps, findings: list[Finding]) -> Stamps:
    """Folders with no finding inside a file: of the others SQL would only repeat the damage."""
    inside = {f.place.split("/")[0] for f in findings if "/" in f.place}
    return {folder: stamp for folder, stamp in stamps.items() if folder not in inside}


def _outdated(params: Path, data: Path) -> Iterator[Finding]:
    """Folders that were made with other parameters than the file holds now."""
    for found in changed_parameters(params, data):
        promise = f"data/ is what {params} asks for"
        run = f"pipeline {command(found.stage)}"
        yield Finding(promise, found.folder, "; ".join(found.changes), run)


def _student(data: Path, stamps: Stamps) -> Iterator[Finding]:
    """The student loads, is finite, and is the one that its recipe describes."""
    if "student" not in stamps:
        return
    promise, folder = "the student loads, is finite and fits its recipe", data / "student"
    try:
        student, card = Student.load(folder), read_card(folder)
    except PipelineError as error:
        yield Finding(promise, "student", str(error), remade(data, "student"))
        return
    faults = [
        f"{name} is not finite"
        for name, x in student.state_dict().items()
        if not x.isfinite().all()
    ]
    if student.config.model_dump() != stamps["student"].recipe.parameters["student"]:
        faults.append("its config.json describes another student than its recipe")
    if card.provenance.get("stamp") != stamps["student"].stamp:
        faults.append("its config.json names another run than its stamp")
    for fault in faults[:1]:
        yield Finding(promise, "student", fault, remade(data, "student"))


def _metrics(data: Path, stamps: Stamps) -> Iterator[Finding]:
    """Metrics of fidelity stand beside floor and ceiling."""
    if "evaluation" not in stamps:
        return
    promise = "every metric of fidelity stands beside its floor and its ceiling"
    try:
        fidelity = evaluation_of(data).fidelity
    except PipelineError as error:
        yield Finding(promise, "evaluation", str(error), remade(data, "evaluation"))
        return
    for name, metric in fidelity.metrics.items():
        if metric.floor is None or metric.ceiling is None:
            found = f"{name} has floor {metric.floor}, ceiling {metric.ceiling}"
            yield Finding(promise, "evaluation", found, remade(data, "evaluation"))


IMAGES = """
SELECT image_id, embedding, jpg, "left", top, "right", bottom, flip FROM teacher
JOIN images USING (image_id) WHERE status = 'ok' AND {sampled}
"""
TEXTS = "SELECT text_id, embedding, text FROM texts WHERE {sampled}"


def _recomputed(
    data: Path,
    stamp: Stamp,
    connection: duckdb.DuckDBPyConnection,
    share: float,
    teacher: "Teacher",
) -> Iterator[Finding]:
    """Stored vectors against the teacher's own, with the batch size and dtype of the run."""

    def embed_images(rows: list[tuple]) -> np.ndarray:
        size, interpolation = teacher.image_size, teacher.preprocessing.interpolation
        pixels = np.zeros((batch, size, size, 3), np.uint8)
        for i, (jpg, *box, flip) in enumerate(row[2:] for row in rows):
            pixels[i] = view_pixels(decode(jpg), tuple(box), flip, size, interpolation)
        return teacher.embed_images(pixels)

    def embed_texts(rows: list[tuple]) -> np.ndarray:
        return teacher.embed_texts([*(row[2] for row in rows), *[""] * (batch - len(rows))])

    summary = summary_of(stamp)
    batch = summary.batch or 1  # of an imported teacher there is none, and nothing to recompute
    teacher = teacher.cast(getattr(torch, summary.dtype))
    for table, key, sql, embed in (
        ("teacher", "image_id", IMAGES, embed_images),
        ("texts", "text_id", TEXTS, embed_texts),
    ):
        sampled = f"({key} < $end OR {key} = (SELECT min({key}) FROM {table}))"
        end = f"{int(share * BLOCK):08x}" if share < 1 else "g"  # ids are hexadecimal
        result = connection.cursor().execute(sql.format(sampled=sampled), {"end": end})
        cosines: list[tuple[str, float]] = []
        while rows := result.fetchmany(batch):
            stored = np.array([row[1] for row in rows], np.float32)
            stored /= np.linalg.norm(stored, axis=1, keepdims=True)
            found = (embed(rows)[: len(rows)] * stored).sum(axis=1)
            cosines += [(row[0], float(x)) for row, x in zip(rows, found, strict=True)]
        if wrong := [(cosine, name) for name, cosine in cosines if not cosine > FAITHFUL]:
            promise = "a stored vector is what the teacher says of its pixels or text"
            found = f"{len(wrong)} of {len(cosines)} rows of {table} differ, such as "
            cosine, name = min(wrong)
            found += f"{name}: cosine {cosine:.4f}"
            yield Finding(promise, "teacher", found, remade(data, "teacher"))


def _teacher(stamp: Stamp, card: Path | None, device: str) -> "Teacher":
    """The teacher that the stamp names. Raises PipelineError for any other."""
    from pipeline.core.devices import pick_device
    from pipeline.models.card import read_card as read_teacher_card
    from pipeline.models.teacher import Teacher, teacher_identity

    if stamp.stage == IMPORTED:
        raise PipelineError(
            "data/teacher was imported: batch size and dtype of its vectors are not known, so they "
            "cannot be computed again. Run `pipeline verify` without --recompute."
        )
    if card is None:
        raise PipelineError("--recompute needs the teacher: name its card with --card.")
    stored = summary_of(stamp).teacher
    if teacher_identity(read_teacher_card(card), card) != stored:
        raise PipelineError(
            f"{card} names another teacher than data/teacher was made with "
            f"({stored.card.name}). Name that one's card with --card."
        )
    return Teacher(card, pick_device(device))
