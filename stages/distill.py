"""data/images + data/teacher + data/selection -> data/student: train, from Parquet alone.

Run:   pipeline distill [--device cuda] [--workers 8], or under torchrun for several GPUs
Cost:  the student's own training; no teacher is built. A killed run goes on from its checkpoint.
"""

import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from pipeline.core.config import DistillConfig
from pipeline.core.devices import pick_device
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import (
    Work,
    contents,
    libraries,
    lock,
    read_stamp,
    require_inputs,
    teacher_summary,
    write_json,
)
from pipeline.core.records import Recipe, TeacherSummary
from pipeline.data import views
from pipeline.data.embeddings import training_mean
from pipeline.data.runs import append_run
from pipeline.models import student as students
from pipeline.models.student import Student
from pipeline.training import batches, trainer
from pipeline.training.batches import Epochs, Rows, batches_of, training_batches
from pipeline.training.distributed import Ranks
from pipeline.training.trainer import Trainer, write_log

STAGE = "distill"
CHECKPOINT, RECIPE = "checkpoint.pt", "recipe.json"  # of a run under way
LOG, METRICS = "training.csv", "training.json"
FILES = [students.WEIGHTS, students.CONFIG, LOG, METRICS]
LOG_EVERY = 10  # steps
VALIDATED = 1024  # images of the validation split that are looked at during training, at most


def distill(
    config: DistillConfig,
    data: Path,
    *,
    device: str = "auto",
    workers: int = 2,
    resume: bool = False,
) -> dict[str, float]:
    """Write data/student; returns the last validation figures.

    workers: threads that decode and crop. A run that was interrupted goes on by itself; resume
    refuses to start another one instead. Raises PipelineError: an earlier stage is missing or was
    made from other inputs, a student that does not fit the teacher, fewer images than a batch, a
    loss that is not finite; with resume, no checkpoint of these very parameters and data.
    """
    ranks = Ranks(pick_device(device))
    ranks.check_batch(config.batch)
    try:
        with lock(data, STAGE) if ranks.first else nullcontext():
            ranks.wait()
            recipe, teacher = _recipe(config, data)
            work = Work(data, STAGE, data / "student", recipe)
            if not work.published():
                if resume:
                    _refuse_another_run(work)
                _train(work, config, data, teacher, ranks, workers)
            return read_stamp(work.out, STAGE).summary
    finally:
        ranks.end()


def _recipe(config: DistillConfig, data: Path) -> tuple[Recipe, TeacherSummary]:
    """What determines the student, and what is known of its teacher."""
    inputs, teacher = require_inputs(data, STAGE), teacher_summary(data)
    size = teacher.embedding_size
    if size != config.student.embedding_size:
        raise PipelineError(
            f"the teacher's embeddings have {size} values, distill.student.embedding_size is "
            f"{config.student.embedding_size}. Set it to {size}."
        )
    versions = {"batches": batches.VERSION, "loop": trainer.VERSION, "student": students.FORMAT}
    versions["views"] = views.VERSION
    recipe = Recipe(parameters=config.model_dump(), versions=versions, inputs=contents(inputs))
    return recipe, teacher


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
    raise PipelineError(f"{work.room} holds no run to resume. Leave out --resume to start one.")


def _differences(then: dict, now: dict, prefix: str = "") -> list[str]:
    """What two recipes disagree about, as sentences."""
    found = []
    for name in sorted({*then, *now}):
        old, new = then.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, prefix + ("" if name == "parameters" else f"{name}."))
        elif old != new and prefix == "inputs.":
            found.append(f"other files in data/{name}")
        elif old != new:
            found.append(f"{prefix}{name} was {old!r}, is {new!r}")
    return found


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
    seen = config.student.image_size, teacher.preprocessing.interpolation
    rows = Rows(
        data, "train", *seen, views=config.views, captions=config.loss.caption > 0,
        window=config.shuffle_row_groups,
    )  # fmt: skip
    epochs = Epochs(rows, config.seed, config.batch, config.shuffle_row_groups)
    held_out = Rows(data, "val", *seen)
    torch.manual_seed(config.seed)
    trainer = Trainer(
        config, Student(config.student, teacher.preprocessing), training_mean(data), ranks
    )
    if (work.folder / CHECKPOINT).is_file():
        trainer.restore(work.folder / CHECKPOINT)
    began, first_step = time.monotonic(), trainer.step
    steps = training_batches(
        epochs, trainer.step, config.steps, workers=workers, rank=ranks.rank, ranks=ranks.size,
        min_crop_area=config.min_crop_area,
    )  # fmt: skip
    with tqdm(
        total=config.steps * config.batch, initial=trainer.step * config.batch, unit="image",
        desc=STAGE, disable=not ranks.first, smoothing=0.05,
    ) as bar:  # fmt: skip
        for batch in steps:
            values = trainer.train_step(batch)
            bar.update(config.batch)
            ends = trainer.step % config.validate_every == 0 or trainer.step == config.steps
            if trainer.step % LOG_EVERY == 0 or ends:
                trainer.log.append({"step": trainer.step} | values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
            if ends:
                looked_at = range(min(len(held_out), VALIDATED))
                found = batches_of(held_out, looked_at, config.batch, workers=workers)
                trainer.log[-1] |= trainer.validate(found)
                if ranks.first:
                    trainer.save(work.folder / CHECKPOINT)
    if ranks.first:
        _publish(work, trainer, teacher, data, began, (config.steps - first_step) * config.batch)
    ranks.wait()


def _publish(
    work: Work, trainer: Trainer, teacher: TeacherSummary, data: Path, began: float, images: int
) -> None:
    made = {"stage": STAGE, "stamp": work.stamp, "recipe": work.recipe.model_dump()}
    made |= {"libraries": libraries("torch", "numpy", "pyarrow", "duckdb", "simplejpeg")}
    student = trainer.averaged_student()
    student.save(work.folder, provenance=made, teacher=teacher.model_dump(mode="json"))
    work.commit(LOG, lambda partial: write_log(partial, trainer.log))
    figures = {"steps": trainer.step, "undecodable_rows": trainer.lost} | trainer.log[-1]
    write_json(work.folder / METRICS, figures)
    work.publish(FILES, figures)
    device = str(trainer.ranks.device)
    append_run(data, STAGE, work.stamp, work.recipe, figures, device, began, images)
