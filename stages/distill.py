"""data/images + data/teacher + data/selection -> data/student: train, from Parquet alone.

Run:   pipeline distill [--device cuda] [--workers 8], or under torchrun for several GPUs
Cost:  the student's own training; no teacher is built. A killed run goes on from its checkpoint.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.core.config import DistillConfig
from pipeline.core.devices import own_device
from pipeline.core.errors import PipelineError
from pipeline.core.inputs import own_inputs
from pipeline.core.provenance import (
    contents,
    digest,
    file_digest,
    libraries,
    lock,
    read_stamp,
    require_inputs,
    teacher_summary,
    write_json,
)
from pipeline.core.records import Preprocessing, Recipe, TeacherSummary
from pipeline.core.work import Work
from pipeline.data import views
from pipeline.data.embeddings import training_mean
from pipeline.data.runs import append_run
from pipeline.models import student as students
from pipeline.models.student import Student
from pipeline.training import sampler, trainer
from pipeline.training.batches import Batch, held_out_batches, training_batches
from pipeline.training.dataset import Dataset
from pipeline.training.distributed import Ranks
from pipeline.training.log import write_log
from pipeline.training.sampler import Sampler
from pipeline.training.trainer import Trainer
from pipeline.training.warm_start import warm_student

STAGE = "distill"
CHECKPOINT, RECIPE = "checkpoint.pt", "recipe.json"  # of a run under way
LOG, METRICS = "training.csv", "training.json"
LAST = "last"  # folder of the student of the last step, beside the best one
WEIGHTS = [students.WEIGHTS, students.CONFIG]
FILES = [*WEIGHTS, *(f"{LAST}/{name}" for name in WEIGHTS), LOG, METRICS]
LOG_EVERY = 10  # steps, between which nothing waits for the device
VALIDATED = 1024  # images of the validation split that are looked at during training, at most


def distill(
    config: DistillConfig,
    data: Path,
    *,
    device: str = "auto",
    workers: int = 2,
    resume: bool = False,
) -> dict[str, float]:
    """Write data/student, the student of the best validation and below it that of the last step;
    returns the metrics of the last step and of the best validation.

    workers: threads, or processes where the device is a GPU, that read, decode and crop. A run that
    was interrupted goes on by itself; resume refuses to start another one instead. Raises
    PipelineError: an earlier stage is missing or was made from other inputs, a student that does
    not fit the teacher or that distill.init does not fit, fewer images than a batch, too many steps
    whose loss is not finite; with resume, no checkpoint of these very parameters and data.
    """
    ranks = Ranks(own_device(device))
    ranks.check_batch(config.batch)
    with ranks.together(), lock(data, STAGE) if ranks.first else nullcontext():
        ranks.wait()
        recipe, teacher = _recipe(config, data)
        work = Work(data, STAGE, data / "student", recipe)
        if not _published(work, ranks):
            if resume:
                _refuse_another_run(work)
            with own_inputs(data, STAGE) as inputs:
                _train(work, config, inputs, teacher, ranks, workers)
        return read_stamp(work.out, STAGE).summary


def _published(work: Work, ranks: Ranks) -> bool:
    """Whether there is nothing to do. Raises PipelineError where the ranks see different folders."""
    published, checkpoint = work.published(), work.folder / CHECKPOINT
    begun = file_digest(checkpoint) if checkpoint.is_file() else None
    ranks.require_same(parameters_and_inputs=work.stamp, data_student=published, checkpoint=begun)
    return published


def _recipe(config: DistillConfig, data: Path) -> tuple[Recipe, TeacherSummary]:
    """What determines the student, and what is known of its teacher."""
    inputs, teacher = require_inputs(data, STAGE), teacher_summary(data)
    size = teacher.embedding_size
    if size != config.student.embedding_size:
        raise PipelineError(
            f"the teacher's embeddings have {size} values, distill.student.embedding_size is "
            f"{config.student.embedding_size}. Set it to {size}."
        )
    versions = {"sampler": sampler.VERSION, "trainer": trainer.VERSION, "student": students.FORMAT}
    versions["views"] = views.VERSION
    parameters = config.model_dump()
    if config.init:
        parameters["content of init"] = _content_of_start(Path(config.init))
    recipe = Recipe(parameters=parameters, versions=versions, inputs=contents(inputs))
    return recipe, teacher


def _content_of_start(folder: Path) -> str:
    try:
        return digest([file_digest(folder / name) for name in WEIGHTS])
    except OSError as error:
        raise PipelineError(
            f"distill.init: {error.filename} cannot be read ({error.strerror}). Name a folder that "
            "`pipeline distill` or `pipeline import checkpoint` wrote, or set it to null."
        ) from None


def _refuse_another_run(work: Work) -> None:
    if (work.folder / CHECKPOINT).is_file():
        return
    for folder in work.earlier():
        if (folder / CHECKPOINT).is_file() and (folder / RECIPE).is_file():
            changed = _differences(
                json.loads((folder / RECIPE).read_text()), work.recipe.model_dump()
            )
            raise PipelineError(
                f"the run that could be resumed was begun with other values: {'; '.join(changed)}. "
                "Put them back to go on with it, or leave out --resume to start from step 0."
            )
    raise PipelineError(
        f"{work.stage_folder} holds no run to resume. Leave out --resume to start one."
    )


def _differences(then: dict, now: dict, prefix: str = "") -> list[str]:
    """What two recipes disagree about, as sentences."""
    differences = []
    for name in sorted({*then, *now}):
        old, new = then.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += _differences(
                old, new, prefix + ("" if name == "parameters" else f"{name}.")
            )
        elif old != new and prefix == "inputs.":
            differences.append(f"other files in data/{name}")
        elif old != new:
            differences.append(f"{prefix}{name} was {old!r}, is {new!r}")
    return differences


def _train(
    work: Work,
    config: DistillConfig,
    data: Path,
    teacher: TeacherSummary,
    ranks: Ranks,
    workers: int,
) -> None:
    if ranks.first:
        work.begin()
        write_json(work.folder / RECIPE, work.recipe.model_dump())
    ranks.wait()
    size_and_interpolation = config.student.image_size, teacher.preprocessing.interpolation
    lanes = config.shuffle_row_groups
    dataset = Dataset(
        data,
        "train",
        *size_and_interpolation,
        views=config.views,
        captions=config.loss.caption > 0,
        groups_in_use=lanes,
    )
    order = Sampler(dataset, config.seed, config.batch, lanes)
    held_out = Dataset(data, "val", *size_and_interpolation)
    torch.manual_seed(config.seed)
    trainer = Trainer(
        config, _first_student(config, teacher.preprocessing), training_mean(data), ranks
    )
    if (work.folder / CHECKPOINT).is_file():
        trainer.restore(work.folder / CHECKPOINT)
    began, first_step = time.monotonic(), trainer.step
    steps = training_batches(
        dataset,
        order,
        trainer.step,
        trainer.step if trainer.ended else config.steps,
        workers=workers,
        rank=ranks.rank,
        ranks=ranks.size,
        min_crop_area=config.min_crop_area,
        image_sizes=config.image_sizes,
        device=ranks.device,
    )
    with closing(steps):  # ty: ignore[invalid-argument-type]
        _take_steps(trainer, steps, held_out, work.folder / CHECKPOINT, workers)
    if ranks.first:
        _publish(work, trainer, teacher, began, (trainer.step - first_step) * config.batch)
    ranks.wait()


def _first_student(config: DistillConfig, preprocessing: Preprocessing) -> Student:
    if config.init:
        return warm_student(Path(config.init), config.student, preprocessing)
    return Student(config.student, preprocessing)


def _take_steps(
    trainer: Trainer, steps: Iterator[Batch], held_out: Dataset, checkpoint: Path, workers: int
) -> None:
    """Train, log, validate and write checkpoints, to the last step or until nothing gets better."""
    config, ranks = trainer.config, trainer.ranks
    with tqdm(
        total=config.steps * config.batch,
        initial=trainer.step * config.batch,
        unit="image",
        desc=STAGE,
        disable=not ranks.first,
        smoothing=0.05,
    ) as bar:
        for batch in steps:
            trainer.train_step(batch)
            bar.update(config.batch)
            validates = trainer.step % config.validate_every == 0 or trainer.step == config.steps
            if trainer.step % LOG_EVERY == 0 or validates:
                *before, last = trainer.read()
                trainer.log += [row for row in before if row["skipped"]] + [last]
                bar.set_postfix(loss=f"{last['loss']:.3f}")
            if validates:
                looked_at = range(min(len(held_out), VALIDATED))
                batches = held_out_batches(held_out, looked_at, config.batch, workers=workers)
                trainer.log[-1] |= trainer.validate(batches)
                if ranks.first:
                    trainer.save(checkpoint)
                if ranks.total(int(ranks.first and trainer.ended)):
                    return


def _publish(
    work: Work, trainer: Trainer, teacher: TeacherSummary, began: float, images: int
) -> None:
    made = {"stage": STAGE, "stamp": work.stamp, "recipe": work.recipe.model_dump()}
    made |= {"libraries": libraries("torch", "numpy", "pyarrow", "duckdb", "simplejpeg")}
    best, last, of = trainer.best, trainer.log[-1], teacher.model_dump(mode="json")
    students_of = {
        work.folder: (trainer.best_student(), "best", best.step, best.cosine),
        work.folder / LAST: (trainer.averaged_student(), "last", trainer.step, last["val_cosine"]),
    }
    for folder, (student, which, step, cosine) in students_of.items():
        checkpoint = {"which": which, "step": step, "val_cosine": cosine}
        student.save(
            folder,
            provenance=made | {"checkpoint": checkpoint},
            teacher=of,
        )
    work.commit(LOG, lambda partial: write_log(partial, trainer.log))
    metrics = {"steps": trainer.step, "undecodable_rows": trainer.undecodable}
    metrics |= {"skipped_steps": trainer.skipped, "best_step": best.step}
    metrics |= {"best_val_cosine": best.cosine}
    taken = next((row for row in reversed(trainer.log) if not row["skipped"]), last)
    metrics |= _finite(taken) | _finite(last)
    write_json(work.folder / METRICS, metrics)
    work.publish(FILES, metrics)
    device = str(trainer.ranks.device)
    append_run(work.data, STAGE, work.stamp, work.recipe, metrics, device, began, images)


def _finite(row: dict) -> dict[str, float]:
    """A row of the log without what is not finite, as of a skipped step, and without its number."""
    return {k: v for k, v in row.items() if k not in ("step", "skipped") and math.isfinite(v)}
