"""Held-out images painted by class: the truth, what a grid could say, student and teacher."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline.core.config import EvaluateConfig
from pipeline.core.errors import PipelineError
from pipeline.data.classes import read_classes
from pipeline.evaluation import segmentation as seg
from pipeline.evaluation.segmented_split import (
    Asked,
    DenseTeacher,
    Source,
    by_student,
    by_teacher,
    masks_of,
)
from pipeline.explore import plots
from pipeline.explore.panels import Tile
from pipeline.explore.query_vectors import Queries
from pipeline.models.student import Student
from pipeline.training.batches import held_out_batches
from pipeline.training.dataset import Dataset

SHOWN = 192  # px of a tile
NAMED = 4  # classes that a tile's caption names


def dense_teacher(queries: Queries, grid: int) -> DenseTeacher | str:
    """The teacher on a grid no coarser than the student's, or why it is left out."""
    try:
        if (teacher := queries.teacher) is None:
            return queries.no_teacher
        from pipeline.models.teacher_patches import dense_patches, dense_sizes

        return DenseTeacher(dense_sizes(teacher, grid), partial(dense_patches, teacher))
    except PipelineError as error:
        return str(error)


def painted_scenes(
    data: Path, config: EvaluateConfig, student: Student, metrics: dict, count: int
) -> list[dict]:
    """Groups of tiles, [{title, tiles}], of the first images that have masks.

    metrics: what `segmentation_metrics` says, whose thresholds are used; [] where nothing was judged.
    """
    if "mIoU" not in metrics:
        return []
    settings, queries = config.segmentation, Queries(data, Path(config.segmentation.card))
    labels = read_classes(Path(settings.classes), settings.background)
    masks = masks_of(data, config.split, settings, len(labels))[0][config.split]
    masks = dict(list(masks.items())[:count])
    asked = Asked.of(data, labels, lambda text: queries.text(text).teacher)
    source = Source(data, student.preprocessing.interpolation, config.batch, 1)
    grid = settings.image_size // student.config.patch_size
    sides = {
        "student": (by_student(source, config.split, masks, asked, settings, student), "threshold")
    }
    teacher = dense_teacher(queries, grid)
    if isinstance(teacher, DenseTeacher) and "image_size_teacher" in metrics:
        size = metrics["image_size_teacher"]
        dense = by_teacher(source, config.split, masks, asked, teacher, size)
        sides["teacher, dense features"] = dense, "threshold_teacher"
    pixels = _pixels(data, config, student, masks)
    groups = []
    for i, (key, mask) in enumerate(masks.items()):
        truth = torch.from_numpy(mask.astype(np.int64))
        maps = {
            "truth": truth,
            f"the best that {grid} x {grid} patches can say": seg.covered(truth, grid, len(labels)),
        }
        for name, (cosines, limit) in sides.items():
            one = cosines.patches[i : i + 1], cosines.images[i : i + 1]
            threshold = metrics.get(limit)
            maps[name] = seg.segment(*one, asked.groups, mask.shape, threshold=threshold)[0]
        tiles = [
            _tile(pixels[key], name, each.cpu().numpy(), labels) for name, each in maps.items()
        ]
        groups.append({"title": f"Scene {i + 1}", "tiles": tiles})
    return groups


def _pixels(
    data: Path, config: EvaluateConfig, student: Student, masks: dict
) -> dict[str, np.ndarray]:
    """image_id -> (SHOWN, SHOWN, 3) uint8 of the images of these masks."""
    dataset = Dataset(data, config.split, SHOWN, student.preprocessing.interpolation)
    images = {}
    for some in held_out_batches(dataset, range(len(dataset)), 16, workers=1):
        images |= {
            key: image
            for key, image in zip(some.ids, np.asarray(some.pixels), strict=True)
            if key in masks
        }
        if len(images) == len(masks):
            break
    return images


def _tile(image: np.ndarray, name: str, labels: np.ndarray, classes: list[list[str]]) -> Tile:
    rows = np.arange(SHOWN) * labels.shape[0] // SHOWN
    columns = np.arange(SHOWN) * labels.shape[1] // SHOWN
    shown = np.where(labels == seg.IGNORED, 0, labels)[rows[:, None], columns[None]]
    values, counts = np.unique(labels[labels != seg.IGNORED], return_counts=True)
    most = sorted(zip(-counts, values, strict=True))
    named = [f"{classes[v][0]} {-n / labels.size:.0%}" for n, v in most if v][:NAMED]
    text = ", ".join(named) or "background only"
    return Tile(
        plots.data_uri(plots.tile(plots.painted(image, shown))),
        f"{name}: {text}.",
        f"{name}: {text}",
    )
