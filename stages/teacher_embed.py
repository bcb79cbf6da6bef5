"""data/images -> data/teacher: every image and text embedded once by the frozen teacher.

Run:   pipeline teacher-embed [--device cuda]
Cost:  the teacher's forward pass, once per image and view; a killed run loses at most a shard.
       More views, more images or edited captions cost only what is new.
"""

import json
import time
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from pipeline.core.config import TeacherEmbedConfig
from pipeline.core.devices import pick_device
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import (
    Work,
    contents,
    digest,
    lock,
    require_inputs,
    teacher_summary,
    write_json,
)
from pipeline.core.records import Preprocessing, Recipe, Stamp, TeacherIdentity, TeacherSummary
from pipeline.data import pixels, shards, views
from pipeline.data.runs import append_run
from pipeline.data.texts import (
    box_texts,
    class_prompts,
    labels,
    read_prompts,
    read_templates,
    text_id,
)
from pipeline.models.card import read_card
from pipeline.models.teacher import TEXTS_VERSION, Teacher, teacher_identity, teacher_libraries
from pipeline.models.teacher_shards import Known, text_vectors, view_tables

STAGE = "teacher_embed"
PROBE = 32  # images and texts on which bfloat16 is held against float32
PROBE_FILE = "fidelity.json"
PROMPTS = "texts/prompts.parquet"


def teacher_embed(
    config: TeacherEmbedConfig,
    data: Path,
    *,
    device: str = "auto",
    workers: int = 2,
    accept_other_vectors: bool = False,
) -> TeacherSummary:
    """Write data/teacher/images and data/teacher/texts; returns what it says of the teacher.

    workers: threads that decode and crop. accept_other_vectors: also of a teacher that does not
    answer as its card's golden vectors say. Raises PipelineError: no images, no or a wrong teacher,
    embeddings of another teacher already there, a prompt file that is missing.
    """
    with lock(data, STAGE):
        inputs = require_inputs(data, STAGE)
        card_path, target = Path(config.card), pick_device(device)
        dtype = getattr(torch, config.dtype)
        identity = teacher_identity(read_card(card_path), card_path)
        vectors = {  # what determines the vector of given pixels or of a text
            "teacher": identity.model_dump(),
            "dtype": config.dtype,
            "batch": config.batch,
            "versions": {"pixels": pixels.VERSION, "views": views.VERSION},
        }
        crops = config.model_dump(include={"crop_area", "crop_ratio", "seed"})
        prompts = _prompts(config, data / "images")
        parameters = {name: vectors[name] for name in ("teacher", "dtype", "batch")}
        recipe = Recipe(
            parameters=parameters | {"crops": crops, "views": config.views},
            versions=vectors["versions"] | {"shards": shards.VERSION, "texts": TEXTS_VERSION},
            inputs=contents(inputs) | {"prompts": digest(prompts)},
        )
        work = Work(data, STAGE, data / "teacher", recipe)
        if not work.published():
            _refuse_other_teacher(data, identity, config.dtype)
            work.begin()
            began, embedded = time.monotonic(), (0, 0.0)
            origins = _origins(inputs["images"], vectors, crops, config.views, prompts)
            missing = [name for name in origins if not _settled(work, name, origins[name])]
            if missing:
                teacher = Teacher(card_path, target, accept_other_vectors=accept_other_vectors)
                _lower(teacher, dtype, work, data / "images")
                embedded = _embed(
                    teacher, work, config, data / "images", missing, origins, prompts, workers
                )
            summary = _summary(work, list(origins), identity, config)
            work.publish(list(origins), summary.model_dump(mode="json"))
            counts = summary.model_dump(include={"images", "texts", "views"})
            append_run(data, STAGE, work.stamp, recipe, counts, str(target), began, *embedded)
        return teacher_summary(data)


def _prompts(config: TeacherEmbedConfig, images: Path) -> list[str]:
    """All texts that belong to no single image, sorted: prompts, texts of boxes, class prompts."""
    templates = read_templates(Path(config.templates))
    classes = chain.from_iterable(class_prompts(templates, label) for label in labels(images))
    return sorted({*read_prompts(Path(config.prompts)), *box_texts(images), *classes})


def _refuse_other_teacher(data: Path, identity: TeacherIdentity, dtype: str) -> None:
    """A teacher's run may have cost days: a direct command never replaces it by another's."""
    try:
        stored = teacher_summary(data)
    except PipelineError:
        return
    if stored.dtype == "imported":  # which is of another stage, and refused as such
        return
    if stored.dtype != dtype:
        raise PipelineError(
            f"{data / 'teacher'} holds embeddings in {stored.dtype}, params.yaml asks for {dtype}. "
            f"Set `teacher_embed.dtype: {stored.dtype}`, move {data / 'teacher'} away to embed "
            "anew, or run `dvc repro`, which keeps the old ones in its cache."
        )
    if stored.teacher != identity:
        raise PipelineError(
            f"{data / 'teacher'} holds embeddings of another teacher ({stored.teacher.card.name}) "
            f"than params.yaml names ({identity.card.name}). Move {data / 'teacher'} away to embed "
            "with this one, or run `dvc repro`, which keeps the old ones in its cache."
        )


def _origins(images: Stamp, vectors: dict, crops: dict, count: int, prompts: list[str]) -> dict:
    """Every file of the out, with all that determines its bytes."""
    origins = {}
    for name, file in images.files.items():
        made = vectors | {"input": file.sha256, "shards": shards.VERSION}
        origins[f"texts/{name}"] = made | {"texts_version": TEXTS_VERSION}
        origins[f"images/{name}"] = made | {"crops": crops, "views": count}
    made = vectors | {"input": digest(prompts), "shards": shards.VERSION}
    return origins | {PROMPTS: made | {"texts_version": TEXTS_VERSION}}


def _settled(work: Work, name: str, origin: dict) -> bool:
    """True once the work folder holds the file, taken over from an earlier run where it can be."""
    if work.has(name):
        return True
    for folder in work.earlier():
        if (folder / name).is_file():
            made = shards.provenance(folder / name, STAGE)
            if origin.items() <= made.items():
                work.adopt(name, folder / name)
                return True
    return False


def _lower(teacher: Teacher, dtype, work: Work, images: Path) -> None:
    """Go over to dtype, with the difference from float32 measured on some rows and recorded."""
    found, texts = [], []
    for path in shards.shard_paths(images, "download"):
        table = shards.read_shard(
            path, "download", ["status", "jpg", "width", "height", "captions"]
        )
        for row in table.slice(0, 4 * PROBE).to_pylist():
            if row["status"] == "ok" and len(found) < PROBE:
                size = row["width"], row["height"]
                how = teacher.preprocessing.resize_mode
                box = views.canonical_view(*size, how, teacher.image_size).box
                image = pixels.decode(row["jpg"])
                found.append(views.view_pixels(image, box, False, teacher.image_size))
                texts += row["captions"][:1]
        if len(found) == PROBE:
            break
    if not found:
        raise PipelineError(f"{images} holds no image to embed. `pipeline download --retry`?")
    cosine = teacher.use(dtype, np.stack(found), texts or ["a photo"])
    write_json(work.folder / PROBE_FILE, cosine)


def _embed(teacher, work, config, images, missing, origins, prompts, workers) -> tuple[int, float]:
    """Compute and commit what is missing, a shard at a time; returns how many views the teacher
    saw, and the seconds that took.
    """
    seen = teacher.preprocessing.model_dump(mode="json")
    extra = {"preprocessing": seen, "libraries": teacher_libraries()}
    size, embedded, spent = teacher.embedding_size, 0, 0.0
    todo = [name for name in missing if name.startswith("images/")]
    with tqdm(total=_views_in(images, todo) * config.views, unit="image", desc=STAGE) as bar:
        for name in missing:
            source, schema = images / Path(name).name, shards.texts_schema(size)
            if name.startswith("images/"):
                known = _known_views(work, name, origins[name])
                before, began = len(known), time.monotonic()
                tables = view_tables(teacher, source, config, known, workers, bar.update)
                spent += time.monotonic() - began
                embedded += len(known) - before
                bar.update(sum(table.num_rows for table in tables) - (len(known) - before))
                schema = shards.teacher_schema(size)
            else:
                groups = _in_groups(prompts) if name == PROMPTS else _captions(source)
                known = _known_texts(work, name, origins[name], teacher)
                texts = [text for rows in groups for _, text in rows]
                found = text_vectors(teacher, texts, config.batch, known)
                tables = [_text_table(rows, found, size) for rows in groups]
            made = origins[name] | extra
            write = partial(shards.write_shard, schema=schema, groups=tables, provenance=made)
            work.commit(name, write)
    return embedded, spent


def _views_in(images: Path, names: list[str]) -> int:
    """Good images in these shards."""
    statuses = (
        shards.read_shard(images / Path(name).name, "download", ["status"])["status"].to_pylist()
        for name in names
    )
    return sum(found.count("ok") for found in statuses)


def _earlier_shards(work: Work, name: str, origin: dict, keys: tuple[str, ...]):
    """(provenance, table) of each earlier file of this name made alike in keys."""
    for folder in work.earlier():
        if (folder / name).is_file():
            made = shards.provenance(folder / name, STAGE)
            made.get("versions", {}).pop("shards", None)  # decides columns, and no vector
            if all(made.get(key) == origin[key] for key in keys):
                yield made, shards.read_shard(folder / name, STAGE)


SAME_VECTORS = ("teacher", "dtype", "batch", "versions")


def _known_views(work: Work, name: str, origin: dict) -> Known:
    """Vectors that an earlier run of the same teacher holds for the same pixels."""
    known: Known = {}
    for made, table in _earlier_shards(work, name, origin, SAME_VECTORS):
        same_crops = made["crops"] == origin["crops"]
        vectors = shards.stored_embeddings(table["embedding"])
        keys = zip(table["sha256"].to_pylist(), table["view"].to_pylist(), strict=True)
        for (content_hash, view), vector in zip(keys, vectors, strict=True):
            if view < origin["views"] and (view == 0 or same_crops):
                known[content_hash, view] = vector
    return known


def _known_texts(work: Work, name: str, origin: dict, teacher: Teacher) -> dict[str, np.ndarray]:
    """Vectors that an earlier run of the same teacher holds, but for texts it cut short."""
    known = {}
    for made, table in _earlier_shards(work, name, origin, SAME_VECTORS):
        texts, vectors = table["text"].to_pylist(), shards.stored_embeddings(table["embedding"])
        wrong = [False] * len(texts)
        if made.get("texts_version", 1) < TEXTS_VERSION and texts:
            wrong = teacher.was_cut_short(texts)
        rows = zip(texts, vectors, wrong, strict=True)
        known |= {text: vector for text, vector, cut in rows if not cut}
    return known


def _captions(shard: Path) -> list[list[tuple[str, str]]]:
    """(image_id, caption), each once, of each row group of a shard; captions of lost images too."""
    groups: list[list[tuple[str, str]]] = []
    seen: set[tuple[str, str]] = set()
    with shards.open_shard(shard, "download") as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=["image_id", "captions"])
            rows = zip(table["image_id"].to_pylist(), table["captions"].to_pylist(), strict=True)
            pairs = dict.fromkeys((key, text) for key, texts in rows for text in texts or [])
            groups.append([pair for pair in pairs if pair not in seen])
            seen.update(pairs)
    return groups


def _in_groups(prompts: list[str]) -> list[list[tuple[None, str]]]:
    rows, size = [(None, text) for text in prompts], shards.ROWS_PER_GROUP
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _text_table(rows: list[tuple], found: dict[str, np.ndarray], size: int) -> pa.Table:
    matrix = np.array([found[text] for _, text in rows], np.float16).reshape(len(rows), size)
    return pa.table(
        {
            "text_id": pa.array([text_id(*row) for row in rows], pa.string()),
            "image_id": pa.array([key for key, _ in rows], pa.string()),
            "text": pa.array([text for _, text in rows], pa.string()),
            "embedding": shards.embedding_column(matrix),
        }
    )


def _summary(
    work: Work, names: list[str], identity: TeacherIdentity, config: TeacherEmbedConfig
) -> TeacherSummary:
    """Counts, and what later stages need to know of the teacher without loading it."""
    counts = {"images": 0, "texts": 0}
    for name in names:
        with shards.open_shard(work.folder / name, STAGE) as file:
            counts[name.split("/")[0]] += file.metadata.num_rows
    made = shards.provenance(work.folder / PROMPTS, STAGE)
    with shards.open_shard(work.folder / PROMPTS, STAGE) as file:
        size = file.schema_arrow.field("embedding").type.list_size
    probe = work.folder / PROBE_FILE
    return TeacherSummary(
        teacher=identity,
        embedding_size=size,
        preprocessing=Preprocessing(**made["preprocessing"]),
        dtype=made["dtype"],
        batch=config.batch,
        least_cosine_to_float32=json.loads(probe.read_text()) if probe.is_file() else None,
        views=config.views,
        **counts,
    )
