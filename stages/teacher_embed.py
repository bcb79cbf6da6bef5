"""data/images -> data/teacher: every image and text embedded once by the frozen teacher.

Run:   pipeline teacher-embed [--device cuda] [--part 3/16 | --ray]
Cost:  the teacher's forward pass, once per image and view; a killed run loses at most a shard.
       More views, more images or edited captions cost only what is new.
"""

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from pipeline.cluster.parts import Share
from pipeline.cluster.ray import OnRay, Tasks
from pipeline.core.config import TeacherEmbedConfig
from pipeline.core.devices import own_device
from pipeline.core.errors import PipelineError
from pipeline.core.inputs import own_inputs
from pipeline.core.outs import recipe_digest, refuse_unexpected
from pipeline.core.plans import carry_out, publish, store_of
from pipeline.core.provenance import lock, require_inputs, teacher_summary
from pipeline.core.records import Entry, Preprocessing, TeacherIdentity, TeacherSummary
from pipeline.core.store import Store
from pipeline.data import shards
from pipeline.data.remote_shards import of_each
from pipeline.data.runs import append_run
from pipeline.data.texts import all_prompts
from pipeline.models.card import read_card
from pipeline.models.teacher import Teacher, teacher_identity
from pipeline.models.vector_shards import PROMPTS, VectorShards, plan_vectors

STAGE = "teacher_embed"


def teacher_embed(
    config: TeacherEmbedConfig,
    data: Path,
    *,
    device: str = "auto",
    workers: int = 2,
    accept_other_vectors: bool = False,
    share: Share | None = None,
    tasks: Tasks | None = None,
) -> TeacherSummary | None:
    """Write data/teacher/images and data/teacher/texts; returns what it says of the teacher.

    workers: threads that decode and crop. accept_other_vectors: also of a teacher that does not
    answer as its card's golden vectors say. share: embed only this share of the shards, into the
    store, beside other processes and without the lock, and return None; the plain command then
    finds them and publishes. tasks: embed on a Ray cluster, in tasks that ask for so much.

    Raises PipelineError: no images, no or a wrong teacher, embeddings of another teacher already
    there, a prompt file that is missing.
    """
    store, out = store_of(data, STAGE, config.store), data / "teacher"
    with lock(data, STAGE) if share is None else nullcontext():
        images = require_inputs(data, STAGE)["images"]
        target = device if tasks else str(own_device(device))  # a node's own is looked at there
        identity = teacher_identity(read_card(Path(config.card)), Path(config.card))
        prompts = all_prompts(Path(config.prompts), Path(config.templates), data / "images")
        plan, origins = plan_vectors(config, identity, images, prompts)
        if share is None and store.has_published(out, STAGE, plan.recipe):
            return teacher_summary(data)
        _refuse_other_teacher(data, identity, config.dtype)
        refuse_unexpected(out, STAGE)
        began = time.monotonic()
        load = partial(_teacher, Path(config.card), target, accept_other_vectors)
        with own_inputs(data, STAGE) as inputs:
            maker = VectorShards(
                config, plan, origins, store, inputs / "images", prompts, load, workers
            )
            engine = OnRay(maker, tasks) if tasks else maker
            entries = carry_out(plan, engine, store, data, share and share.of)
        if share is not None:
            return None
        summary = _summary(store, entries, identity, config)
        publish(plan, store, data, entries, summary.model_dump(mode="json"))
        counts = summary.model_dump(include={"images", "texts", "views"})
        counts["embedded"] = maker.tally["embedded"]  # the rest was reused
        append_run(
            data,
            STAGE,
            recipe_digest(plan.recipe),
            plan.recipe,
            counts,
            target,
            began,
            maker.tally["embedded"],
            maker.tally["seconds"],
        )
    return summary


def _teacher(card: Path, device: str, accept: bool) -> Teacher:
    return Teacher(card, own_device(device), accept_other_vectors=accept)


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


def _summary(
    store: Store, entries: dict[str, Entry], identity: TeacherIdentity, config: TeacherEmbedConfig
) -> TeacherSummary:
    """Counts, and what later stages need to know of the teacher without loading it."""
    counts, least = {"images": 0, "texts": 0}, {}

    def drift_of(entry: Entry) -> dict[str, float]:
        return shards.provenance(store.path(entry), STAGE)["least_cosine_to_float32"]

    drifts = of_each(entries.values(), drift_of)
    for (name, entry), drift in zip(entries.items(), drifts, strict=True):
        counts[name.split("/")[0]] += entry.good
        least |= {tower: min(cosine, least.get(tower, 1.0)) for tower, cosine in drift.items()}
    prompts = store.path(entries[PROMPTS])
    with shards.open_shard(prompts, STAGE) as file:
        size = file.schema_arrow.field("embedding").type.list_size
    return TeacherSummary(
        teacher=identity,
        embedding_size=size,
        preprocessing=Preprocessing(**shards.provenance(prompts, STAGE)["preprocessing"]),
        dtype=config.dtype,
        batch=config.batch,
        least_cosine_to_float32=least or None,
        views=config.views,
        images=counts["images"],
        texts=counts["texts"],
    )
