"""data/student + stored teacher vectors -> data/evaluation: metrics, index, plots, report.

Run:   pipeline evaluate
Cost:  the student's forward pass over all kept images, once; the teacher's weights are not needed
       (where images have masks and the weights are here, its dense features are judged too).
"""

import csv
import io
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from pipeline.core.config import EvaluateConfig
from pipeline.core.devices import pick_device
from pipeline.core.errors import PipelineError
from pipeline.core.inputs import own_inputs
from pipeline.core.provenance import (
    contents,
    evaluation_of,
    libraries,
    lock,
    require_inputs,
    write_json,
)
from pipeline.core.records import Evaluation, MeasuredCheckpoint, MetricGroup, Recipe
from pipeline.core.work import Work
from pipeline.data import shards
from pipeline.data.embeddings import indexed_vectors, split_vectors, training_mean
from pipeline.data.runs import append_run
from pipeline.data.texts import read_templates
from pipeline.evaluation import metrics
from pipeline.evaluation.box_search import box_search_metrics
from pipeline.evaluation.grounding import pointing_metrics
from pipeline.evaluation.retrieval import (
    DEPTHS,
    gallery,
    image_retrieval,
    near_training_images,
    text_retrieval,
)
from pipeline.evaluation.segmented_split import has_masks, segmentation_metrics
from pipeline.evaluation.zero_shot import zero_shot_metrics
from pipeline.explore.query_vectors import Queries
from pipeline.explore.report import NAME as REPORT
from pipeline.explore.report import write_report
from pipeline.explore.segmented_scenes import dense_teacher
from pipeline.models.student import Student, read_card
from pipeline.training.batches import held_out_batches
from pipeline.training.dataset import Dataset

STAGE = "evaluate"
VERSION = 6  # raise it when a figure is computed in another way
METRICS, RETRIEVAL = "metrics.json", "retrieval.csv"


def evaluate(
    config: EvaluateConfig, data: Path, *, device: str = "auto", workers: int = 2
) -> Evaluation:
    """Write data/evaluation; returns the metrics, each beside floor and ceiling.

    Raises PipelineError: no student, or one trained on other data than lies here.
    """
    with lock(data, STAGE):
        recipe = _recipe(config, data)
        work = Work(data, STAGE, data / "evaluation", recipe)
        if not work.published():
            work.begin()
            began, target = time.monotonic(), pick_device(device)
            with own_inputs(data, STAGE) as inputs:
                student = Student.load(inputs / "student").to(target)
                loaded = time.monotonic()
                embedded = _write_index(work, config, inputs, student, workers)
                spent = time.monotonic() - loaded
                measured = _measured(work, config, inputs, student, workers)
                write_json(work.folder / METRICS, measured.to_json())
                work.commit(RETRIEVAL, lambda partial: partial.write_text(_retrieval_csv(measured)))
                report = partial(
                    write_report,
                    data=inputs,
                    student=student,
                    index=work.folder / "index",
                    measured=measured,
                    config=config,
                )
                work.commit(REPORT, report)
            index = [f"index/{path.name}" for path in sorted((work.folder / "index").glob("*"))]
            work.publish([METRICS, RETRIEVAL, REPORT, *index], measured.to_json())
            values = measured.values() | _facts(student)
            append_run(data, STAGE, work.stamp, recipe, values, str(target), began, embedded, spent)
        return evaluation_of(data)


def _recipe(config: EvaluateConfig, data: Path) -> Recipe:
    inputs = contents(require_inputs(data, STAGE))
    classes = Path(config.segmentation.classes)
    named = {"templates": read_templates(Path(config.templates))}
    named["classes"] = classes.read_text() if classes.is_file() else None  # asked for with masks
    return Recipe(
        parameters=config.model_dump() | named,
        versions={"evaluate": VERSION, "shards": shards.VERSION},
        inputs=inputs,
    )


def _write_index(
    work: Work, config: EvaluateConfig, data: Path, student: Student, workers: int
) -> int:
    """The student's embedding of every kept image, a shard at a time; returns how many."""
    interpolation = student.preprocessing.interpolation
    dataset = Dataset(data, None, student.config.image_size, interpolation)
    numbers = np.arange(len(dataset))
    done = 0
    with tqdm(total=len(dataset), unit="image", desc=STAGE) as bar:
        for shard in np.unique(dataset.addresses[:, 0]):
            name, mine = f"index/{shard:05}.parquet", numbers[dataset.addresses[:, 0] == shard]
            if not work.has(name):
                ids, vectors = [], [np.zeros((0, student.config.embedding_size), np.float32)]
                for batch in held_out_batches(dataset, mine, config.batch, workers=workers):
                    ids += batch.ids
                    if batch.ids:  # else none of the images decodes
                        vectors.append(_embedded(student, batch.pixels))
                    bar.update(len(batch.ids))
                done += len(ids)
                table = pa.table(
                    {
                        "image_id": pa.array(ids, pa.string()),
                        "embedding": shards.embedding_column(
                            shards.to_float16(np.concatenate(vectors))
                        ),
                    }
                )
                schema = shards.index_schema(student.config.embedding_size)
                made = {"stage": STAGE, "student": work.recipe.inputs["student"]}
                made["libraries"] = libraries("torch", "pyarrow")
                work.commit(
                    name,
                    partial(
                        shards.write_shard,
                        schema=schema,
                        groups=shards.in_groups(table, shards.TABLE_ROWS_PER_GROUP),
                        provenance=made,
                    ),
                )
    return done


@torch.inference_mode()
def _embedded(student: Student, pixels: np.ndarray | torch.Tensor) -> np.ndarray:
    """(b, S, S, 3) uint8 -> (b, E) float32."""
    return student.encode_image(student.as_input(np.asarray(pixels)), normalize=False).cpu().numpy()


def _measured(
    work: Work, config: EvaluateConfig, data: Path, student: Student, workers: int
) -> Evaluation:
    ids, teacher = split_vectors(data, config.split)
    embeddings, known = indexed_vectors(work.folder / "index", ids)
    if not known.any():
        raise PipelineError(
            f"none of the {len(ids)} images of the split {config.split} decodes: data/images is "
            "damaged. Delete it and run `pipeline download`."
        )
    ids = [key for key, decoded in zip(ids, known, strict=True) if decoded]
    embeddings, teacher = embeddings[known], teacher[known]
    some = gallery(len(ids))
    templates = work.recipe.parameters["templates"]
    checkpoint = read_card(data / "student").provenance.get("checkpoint")
    return Evaluation(
        checkpoint=MeasuredCheckpoint.model_validate(checkpoint) if checkpoint else None,
        split=config.split,
        images=len(ids),
        undecodable=int((~known).sum()),
        near_training=near_training_images(data, teacher),
        fidelity=metrics.fidelity(embeddings, teacher, training_mean(data)),
        student_to_teacher=image_retrieval(embeddings[some], teacher[some]),
        text_to_image=text_retrieval(data, [ids[i] for i in some], embeddings[some], teacher[some]),
        box_search=box_search_metrics(data, work.folder / "index"),
        pointing=pointing_metrics(data, config.split, student, config.batch, workers),
        zero_shot=zero_shot_metrics(data, ids, embeddings, teacher, templates),
        segmentation=_segmentation(config, data, student, workers),
    )


def _segmentation(
    config: EvaluateConfig, data: Path, student: Student, workers: int
) -> MetricGroup | None:
    """mIoU where images have masks."""
    if not has_masks(data):
        return None
    queries = Queries(data, Path(config.segmentation.card))
    grid = config.segmentation.image_size // student.config.patch_size
    return MetricGroup.model_validate(
        segmentation_metrics(
            data,
            config.split,
            config.segmentation,
            student,
            lambda text: queries.text(text).teacher,
            dense_teacher(queries, grid),
            config.batch,
            workers,
        )
    )


def _retrieval_csv(measured: Evaluation) -> str:
    """R@k as a table that `dvc plots` renders."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "k", "who", "recall"])
    for task in ("student_to_teacher", "text_to_image"):
        group = measured.groups().get(task, MetricGroup())
        for k in DEPTHS if group.metrics else ():
            metric = group[f"R@{k}"]
            writer.writerow([task, k, "student", metric.value])
            writer.writerow([task, k, "chance", metric.floor])
            writer.writerow([task, k, "teacher", metric.ceiling])
    return text.getvalue()


def _facts(student: Student) -> dict:
    """What tells runs of different students apart."""
    return {
        "student.pool": student.config.pool,
        "student.image_size": student.config.image_size,
        "student.parameters": sum(parameter.numel() for parameter in student.parameters()),
    }
