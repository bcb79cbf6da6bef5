"""data/ -> a folder for use without this project: both towers, tokenizer, vectors and a model card.

Run:   pipeline export FOLDER [--int8 | --fp16]
Cost:  half a minute for CLIP's text tower; the folder appears when everything in it was checked.

    visual/    model.onnx (input `image`, first output a unit vector), preprocess_cfg.json
    textual/   model.onnx (input `text`), tokenizer.json, tokenizer_config.json
    student/   config.json, model.safetensors: what `Student.load` reads
    index/     the collection: vectors.npy, images.jsonl; stored prompts: texts.npy, texts.json
    config.json, README.md

The layout is that of Immich's machine-learning service, which reads open_clip models so.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import require_inputs, write_file, write_json
from pipeline.data import database
from pipeline.data.embeddings import load_text_embeddings
from pipeline.data.shards import unit_rows
from pipeline.explore.licenses import licenses
from pipeline.explore.model_card import model_card
from pipeline.explore.nearest import Sides, load_sides, nearest
from pipeline.explore.query_vectors import Queries
from pipeline.models.card import read_card
from pipeline.models.export import (
    NEIGHBOURS,
    check_overlap,
    export_image_tower,
    overlap_text,
    shrink_image_tower,
    stored_pixels,
)
from pipeline.models.export_text import export_text_tower, shrink_text_tower
from pipeline.models.student import CONFIG, WEIGHTS, Student
from pipeline.models.text_tower import embed_texts

CHECKED = 16  # prompts, and as many captions, with which both ways of searching are compared
TIE = 2e-4  # stored vectors are float16: scores that are nearer than this may change places
FACTS = "SELECT image_id, url, caption, label FROM images WHERE status = 'ok' ORDER BY image_id"


@dataclass
class Exported:
    """What is known of an export while it grows; lines: what to tell the user."""

    weights: str  # float32, float16 or int8
    lines: list[str] = field(default_factory=list)
    text_cfg: dict | None = None  # of open_clip; None without a text tower
    no_text: str = ""  # why there is none


def export_folder(data: Path, out: Path, card: Path | None, weights: str = "float32") -> str:
    """Write the folder; returns a summary. card: the teacher's, whose weights the text side needs.

    weights: float32, float16 (half the bytes) or int8 (a quarter) in both towers' files. Raises
    PipelineError: out exists, a stage has not run, a package is missing, a file answers otherwise
    than PyTorch, or int8 ranks otherwise.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PipelineError(f"{out} exists. Remove it, or name another folder.")
    require_inputs(data, "evaluate")
    collection = load_sides(data, data / "evaluation/index")
    queries, made = Queries(data, card), Exported(weights)
    work = out.with_name(f"{out.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        _image_side(data, queries.student, work, made)
        _text_side(data, queries, collection, work, made)
        _index(data, collection, work / "index")
        _describe(data, queries, collection, work, made)
        if out.exists():
            out.rmdir()
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return "\n".join([*made.lines, f"{out} written; {out / 'README.md'} says how to use it"])


def _image_side(data: Path, student: Student, work: Path, made: Exported) -> None:
    (work / "student").mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(data / "student" / name, work / "student" / name)
    deviation = export_image_tower(student, work / "visual")
    line = f"visual: onnxruntime within {deviation:.0e} of PyTorch"
    if made.weights != "float32":
        pixels = stored_pixels(data / "images", student)
        cost = shrink_image_tower(work / "visual/model.onnx", made.weights, pixels)
        line += f"; as {made.weights} {cost}"
    made.lines.append(line)


def _text_side(data: Path, queries: Queries, collection: Sides, work: Path, made: Exported) -> None:
    if queries.teacher is None:
        made.no_text = queries.no_teacher
        made.lines.append(f"textual: left out, for the teacher is not here: {made.no_text}")
        return
    folder, texts = work / "textual", _some_texts(data)
    deviation, made.text_cfg = export_text_tower(queries.teacher, folder, texts)
    line = f"textual: onnxruntime within {deviation:.0e} of PyTorch"
    exact = embed_texts(folder, texts)
    if made.weights == "int8":
        cost = shrink_text_tower(folder, "int8", texts)
        overlap = _overlap(collection.student, exact, embed_texts(folder, texts))
        check_overlap(overlap, "the text tower in int8")
        made.lines.append(f"{line}; as int8 {cost}, {overlap_text(overlap)}")
        return
    if made.weights == "float16":
        line += f"; as float16 {shrink_text_tower(folder, 'float16', texts)}"
    made.lines.append(line)
    _check_search(queries, collection, folder, texts)
    made.lines.append(
        f"search: the same best {NEIGHBOURS} images as `pipeline search` for {len(texts)} texts"
    )


def _some_texts(data: Path) -> list[str]:
    """Some prompts and some captions, evenly spread over those that are stored."""
    chosen = []
    for where in ("image_id IS NULL", "image_id IS NOT NULL"):
        texts = sorted(set(load_text_embeddings(data, f"{where} AND trim(text) <> ''", [])[0]))
        chosen += texts[:: max(1, len(texts) // CHECKED)][:CHECKED]
    return list(dict.fromkeys(text.strip() for text in chosen))


def _check_search(queries: Queries, collection: Sides, folder: Path, texts: list[str]) -> None:
    """The written files find what `pipeline search` finds; raises PipelineError where not."""
    for text, vector in zip(texts, embed_texts(folder, texts), strict=True):
        expected = queries.text(text).student
        rows, _ = nearest(collection.student, vector, NEIGHBOURS)
        _, scores = nearest(collection.student, expected, NEIGHBOURS)
        if (unit_rows(collection.student[rows]) @ expected < scores[-1] - TIE).any():
            raise PipelineError(
                f"the written towers find other images for {text!r} than `pipeline search`. "
                "Nothing was written; run `pipeline verify --recompute 0.01`."
            )


def _overlap(images: np.ndarray, exact: np.ndarray, small: np.ndarray) -> float:
    """overlap@10 of the best images by two (n, E) matrices of the same texts."""
    common = 0
    for ours, theirs in zip(exact, small, strict=True):
        best = [set(nearest(images, vector, NEIGHBOURS)[0].tolist()) for vector in (ours, theirs)]
        common += len(best[0] & best[1])
    return common / (len(exact) * min(NEIGHBOURS, len(images)))


def _index(data: Path, collection: Sides, folder: Path) -> None:
    """The collection by the student: row i of vectors.npy is line i of images.jsonl."""
    folder.mkdir()
    np.save(folder / "vectors.npy", collection.student.astype(np.float16))
    facts = database.connect(data).execute(FACTS)
    names, written = [column[0] for column in facts.description], 0
    with (folder / "images.jsonl").open("w", encoding="utf-8") as file:
        while rows := facts.fetchmany(10_000):
            for row in rows:  # sorted as the collection is, which lacks some of them
                if written < len(collection.ids) and row[0].encode() == collection.ids[written]:
                    entry = {k: v for k, v in zip(names, row, strict=True) if v is not None}
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    written += 1
    if written != len(collection.ids):
        raise PipelineError("data/images lacks images of the index. Run `pipeline evaluate`.")
    texts, _, vectors = load_text_embeddings(data, "image_id IS NULL", [])
    np.save(folder / "texts.npy", vectors.astype(np.float16))
    write_json(folder / "texts.json", texts)


def _describe(data: Path, queries: Queries, collection: Sides, work: Path, made: Exported) -> None:
    student, counts = queries.student.config, licenses(data)
    config = {
        "embed_dim": student.embedding_size,
        "vision_cfg": {"image_size": student.image_size, "patch_size": student.patch_size},
        "extrahead": {"weights": made.weights, "training_images_by_license": counts},
    }
    if made.text_cfg:
        config["text_cfg"] = made.text_cfg
    write_json(work / "config.json", config)
    terms = read_card(queries.card).license if queries.card else None
    text = model_card(data, work, len(collection.ids), counts, terms, made.weights, made.no_text)
    write_file(work / "README.md", lambda partial: partial.write_text(text, encoding="utf-8"))
