"""One file of data/teacher: the vectors of a shard's views, of its captions, or of the prompts.

Nothing here takes a lock or knows of other files, so that any number of processes may make files
of one plan at once. A vector that an earlier run of the same teacher computed for the same pixels
or the same text is not computed again, in whatever shard it lies.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from pipeline.core.config import TeacherEmbedConfig
from pipeline.core.provenance import content, digest
from pipeline.core.records import Entry, Part, Plan, Recipe, Stamp, TeacherIdentity
from pipeline.core.store import Store
from pipeline.data import pixels, shards, views
from pipeline.data.earlier import EarlierRows
from pipeline.data.texts import text_id
from pipeline.models.teacher import TEXTS_VERSION, Teacher, teacher_libraries
from pipeline.models.teacher_shards import Known, embed_texts, good_shas, view_tables

STAGE = "teacher_embed"
PROMPTS = "texts/prompts.parquet"
PROBE = 32  # images and texts of a shard on which bfloat16 is checked against float32
SAME_VECTORS = ("teacher", "dtype", "batch", "versions")


def plan_vectors(
    config: TeacherEmbedConfig, identity: TeacherIdentity, images: Stamp, prompts: list[str]
) -> tuple[Plan, dict[str, dict]]:
    """The files that data/images and the prompts ask for; and of each, all that determines it."""
    vectors = {  # what determines the vector of given pixels or of a text
        "teacher": identity.model_dump(),
        "dtype": config.dtype,
        "batch": config.batch,
        "versions": {"pixels": pixels.VERSION, "views": views.VERSION},
    }
    crops = config.model_dump(include={"crop_area", "crop_ratio", "seed"})
    of_views = {"crops": crops, "views": config.views}
    of_texts = {"texts_version": TEXTS_VERSION}
    origins = {}
    for name, file in images.files.items():
        made = vectors | {"input": file.sha256, "shards": shards.VERSION}
        origins[f"images/{name}"] = made | of_views
        origins[f"texts/{name}"] = made | of_texts
    made = vectors | {"input": digest(prompts), "shards": shards.VERSION}
    origins[PROMPTS] = made | of_texts
    recipe = Recipe(
        parameters={name: vectors[name] for name in ("teacher", "dtype", "batch")} | of_views,
        versions=vectors["versions"] | {"texts": TEXTS_VERSION, "shards": shards.VERSION},
        inputs={"images": content(images), "prompts": digest(prompts)},
    )
    parts = tuple(Part(name=name, origin=digest(origins[name])) for name in sorted(origins))
    return Plan(stage=STAGE, recipe=recipe, parts=parts), origins


class VectorShards:
    """How the files of a plan are made in a store.

    origins: as of `plan_vectors`; images: folder of the image shards; load: gives the teacher, at
    float32; workers: threads that decode.
    """

    def __init__(
        self,
        config: TeacherEmbedConfig,
        plan: Plan,
        origins: dict[str, dict],
        store: Store,
        images: Path,
        prompts: list[str],
        load: Callable[[], Teacher],
        workers: int,
    ):
        self.config, self.plan, self.origins, self.store = config, plan, origins, store
        self.images, self.prompts, self.load, self.workers = images, prompts, load, workers
        self.digests = {part.name: part.origin for part in plan.parts}
        self.tally: Any = Counter()  # "embedded": views that the teacher saw; "seconds" of that

    def is_settled(self, entry: Entry) -> bool:
        return True  # there are no rounds of embedding

    def differences(self, entry: Entry) -> list[str]:
        asked = self.origins.get(entry.name, {})
        return shards.differences(shards.provenance(self.store.path(entry), STAGE), asked)

    def make(self, names: Iterable[str]) -> Iterator[Entry]:
        """Each file as soon as it is in the store. The teacher is loaded for the first one."""
        names = list(names)
        of_images = [name for name in names if name.startswith("images/")]
        total = sum(len(good_shas(self._source(name))) for name in of_images) * self.config.views
        with tqdm(total=total, unit="image", desc=STAGE, disable=not names) as bar:
            for name in names:
                yield self._views(name, bar) if name in of_images else self._texts(name)

    def _views(self, name: str, bar: tqdm) -> Entry:
        source = self._source(name)
        known = self._known_views(good_shas(source), self.origins[name])
        before, began = len(known), time.monotonic()
        tables = view_tables(self.teacher, source, self.config, known, self.workers, bar.update)
        self.tally["seconds"] += time.monotonic() - began
        self.tally["embedded"] += len(known) - before
        rows = sum(table.num_rows for table in tables)
        bar.update(rows - (len(known) - before))
        schema = shards.teacher_schema(self.teacher.embedding_size)
        return self._commit(name, schema, tables, self._drift_of_images(source))

    def _texts(self, name: str) -> Entry:
        groups = _in_groups(self.prompts) if name == PROMPTS else _captions(self._source(name))
        texts = list(dict.fromkeys(text for rows in groups for _, text in rows))
        known = self._known_texts(texts)
        vector_of = embed_texts(self.teacher, texts, self.config.batch, known)
        size = self.teacher.embedding_size
        tables = [_text_table(rows, vector_of, size) for rows in groups]
        drift = self._drift("text", texts[:PROBE])
        return self._commit(name, shards.texts_schema(size), tables, drift)

    def _source(self, name: str) -> Path:
        return self.images / Path(name).name

    def _commit(
        self, name: str, schema: pa.Schema, tables: Iterable[pa.Table], drift: dict
    ) -> Entry:
        made = self.origins[name] | {
            "preprocessing": self.teacher.preprocessing.model_dump(mode="json"),
            "libraries": teacher_libraries(),
            "least_cosine_to_float32": drift,
        }
        write = partial(shards.write_shard, schema=schema, groups=tables, provenance=made)
        return self.store.commit(name, self.digests[name], 0, write)

    @cached_property
    def teacher(self) -> Teacher:
        return self._exact.cast(getattr(torch, self.config.dtype))

    @cached_property
    def _exact(self) -> Teacher:
        return self.load()

    def _drift_of_images(self, shard: Path) -> dict:
        """As `_drift`, of the shard's first good images."""
        if self.config.dtype == "float32":
            return {}
        teacher, inputs = self.teacher, []
        for table in shards.row_groups(shard, "download", ["status", "jpg", "width", "height"]):
            for row in table.to_pylist():
                if row["status"] == "ok" and len(inputs) < PROBE:
                    size = row["width"], row["height"]
                    resize_mode = teacher.preprocessing.resize_mode
                    box = views.canonical_view(*size, resize_mode, teacher.image_size).box
                    image = pixels.decode(row["jpg"])
                    inputs.append(views.view_pixels(image, box, False, teacher.image_size))
            if len(inputs) == PROBE:
                break
        return self._drift("image", np.stack(inputs) if inputs else [])

    def _drift(self, tower: str, inputs: Any) -> dict:
        """The least cosine of a tower's vectors of these inputs to float32's; nothing in float32.

        Raises PipelineError where it is too small.
        """
        if self.config.dtype == "float32" or not len(inputs):
            return {}
        return {tower: self.teacher.least_cosine(self._exact, tower, inputs)}

    # What earlier runs hold

    @cached_property
    def _sources(self) -> dict[str, dict[Path, dict]]:
        """images and texts -> the files that hold vectors of this teacher, newest first."""
        sources: dict[str, dict[Path, dict]] = {"images": {}, "texts": {}}
        newest_first = sorted(self.store.entries(), key=lambda e: -self.store.time(e))
        for entry in filter(self.store.sound, newest_first):
            path = self.store.path(entry)
            made = shards.provenance(path, STAGE)
            if all(made.get(key) == self.origins[PROMPTS][key] for key in SAME_VECTORS):
                sources[entry.name.split("/")[0]][path] = made
        return sources

    @cached_property
    def _earlier_views(self) -> EarlierRows:
        schema = shards.teacher_schema(1)
        return EarlierRows(self._sources["images"], "sha256", STAGE, schema)

    @cached_property
    def _earlier_texts(self) -> EarlierRows:
        return EarlierRows(self._sources["texts"], "text", STAGE, shards.texts_schema(1))

    def _known_views(self, shas: set[str], origin: dict) -> Known:
        """Vectors of these JPEGs that an earlier run of the same teacher holds, by view."""
        known: Known = {}
        for made, table in self._earlier_views.find(shas, ["view", "embedding"]):
            same_crops = made["crops"] == origin["crops"]
            vectors = shards.stored_embeddings(table["embedding"])
            keys = zip(table["sha256"].to_pylist(), table["view"].to_pylist(), strict=True)
            for (sha256, view), vector in zip(keys, vectors, strict=True):
                if view < origin["views"] and (view == 0 or same_crops):
                    known.setdefault((sha256, view), vector)
        return known

    def _known_texts(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Vectors that an earlier run of the same teacher holds, but for texts it cut short."""
        known: dict[str, np.ndarray] = {}
        for made, table in self._earlier_texts.find(texts, ["embedding"]):
            names, vectors = table["text"].to_pylist(), shards.stored_embeddings(table["embedding"])
            wrong = [False] * len(names)
            if made["texts_version"] < TEXTS_VERSION and names:
                wrong = self.teacher.was_cut_short(names)
            rows = zip(names, vectors, wrong, strict=True)
            known |= {text: vector for text, vector, cut in rows if not cut}
        return known


def _captions(shard: Path) -> list[list[tuple[str, str]]]:
    """(image_id, caption), each once, of each row group of a shard; captions of lost images too."""
    groups: list[list[tuple[str, str]]] = []
    seen: set[tuple[str, str]] = set()
    for table in shards.row_groups(shard, "download", ["image_id", "captions"]):
        rows = zip(table["image_id"].to_pylist(), table["captions"].to_pylist(), strict=True)
        pairs = dict.fromkeys((key, text) for key, texts in rows for text in texts or [])
        groups.append([pair for pair in pairs if pair not in seen])
        seen.update(pairs)
    return groups


def _in_groups(prompts: list[str]) -> list[list[tuple[None, str]]]:
    rows, size = [(None, text) for text in prompts], shards.ROWS_PER_GROUP
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _text_table(rows: list[tuple], vector_of: dict[str, np.ndarray], size: int) -> pa.Table:
    matrix = np.array([vector_of[text] for _, text in rows], np.float16).reshape(len(rows), size)
    return pa.table(
        {
            "text_id": pa.array([text_id(*row) for row in rows], pa.string()),
            "image_id": pa.array([key for key, _ in rows], pa.string()),
            "text": pa.array([text for _, text in rows], pa.string()),
            "embedding": shards.embedding_column(matrix),
        }
    )
