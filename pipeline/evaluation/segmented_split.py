"""mIoU of the held-out images that have masks, beside what it must be compared with.

`pipeline.evaluation.segmentation` says how it is measured. Letters as there.
"""

import io
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from pipeline.core.config import SegmentationConfig
from pipeline.core.errors import PipelineError
from pipeline.data import database
from pipeline.data.classes import read_classes
from pipeline.data.embeddings import load_text_embeddings
from pipeline.evaluation import segmentation as seg
from pipeline.evaluation.dense import sliding_cosines
from pipeline.models.student import Student
from pipeline.training.batches import held_out_batches
from pipeline.training.dataset import Dataset

MASKS = """
SELECT image_id, split, mask, "left", top, "right", bottom
FROM images JOIN selection USING (image_id) JOIN teacher USING (image_id)
WHERE status = 'ok' AND keep AND view = 0 AND split IN ('val', ?) ORDER BY image_id
"""


@dataclass(frozen=True)
class DenseTeacher:
    """The teacher as something to compare patches with.

    sizes: px of the pixels that it may take, of which the best on val is reported; patches:
    (b, size, size, 3) uint8 -> (b, g, g, E) unit.
    """

    sizes: list[int]
    patches: Callable[[np.ndarray], np.ndarray]


def has_masks(data: Path) -> bool:
    """Whether any image that is kept has a mask; shards of earlier versions have no such column."""
    connection = database.connect(data)
    if "mask" not in {name for name, *_ in connection.execute("DESCRIBE images").fetchall()}:
        return False
    asked = "SELECT count(*) FROM images JOIN selection USING (image_id) WHERE keep AND mask IS NOT NULL"
    ((count,),) = connection.execute(asked).fetchall()
    return bool(count)


def segmentation_metrics(
    data: Path,
    split: str,
    config: SegmentationConfig,
    student: Student,
    vector_of: Callable[[str], np.ndarray],
    teacher: DenseTeacher | str,
    batch: int,
    workers: int,
) -> dict:
    """mIoU of a split's masks, or {"left_out": why}.

    vector_of: a prompt that is not stored -> its unit vector (E,), or PipelineError; teacher: its
    dense features, or why they are left out. The floor is one label everywhere (background, or the
    most frequent class), the ceiling the coverage of the grid.

    Raises PipelineError: a class file that is wrong, a mask with a value that names no class.
    """
    labels = read_classes(Path(config.classes), config.background)
    masks, without = masks_of(data, split, config, len(labels))
    if missing := [name for name in ("val", split) if not masks[name]]:
        return {"left_out": f"no image of the split {missing[0]} has a mask."}
    try:
        asked = Asked.of(data, labels, vector_of)
    except PipelineError as error:
        return {"left_out": f"a prompt of {config.classes} has no vector: {error}"}
    judge = _Judge(masks, split, asked.groups, config)
    source = Source(data, student.preprocessing.interpolation, batch, workers)
    grid = config.image_size // student.config.patch_size
    metrics = judge.student(
        {name: by_student(source, name, masks[name], asked, config, student) for name in masks},
        grid,
    )
    if isinstance(teacher, str):
        metrics["teacher_left_out"] = teacher
    else:
        metrics |= judge.teacher(
            teacher.sizes,
            lambda name, size: by_teacher(source, name, masks[name], asked, teacher, size),
        )
    counts = {"images": len(masks[split]), "without_mask": without, "classes": len(labels) - 1}
    return counts | metrics


@dataclass(frozen=True)
class Asked:
    """What patches are compared with."""

    labels: list[list[str]]  # the prompts of each label, from 0
    groups: list[list[int]]  # their numbers
    vectors: np.ndarray  # (P, E), unit length

    @classmethod
    def of(
        cls, data: Path, labels: list[list[str]], vector_of: Callable[[str], np.ndarray]
    ) -> "Asked":
        """Stored vectors, and what vector_of makes of the prompts that are not stored."""
        prompts = [prompt for group in labels for prompt in group]
        where = "image_id IS NULL AND text IN (SELECT unnest(?::VARCHAR[]))"
        texts, _, vectors = load_text_embeddings(data, where, [prompts])
        stored = dict(zip(texts, vectors, strict=True))
        vectors = np.stack([stored[p] if p in stored else vector_of(p) for p in prompts])
        ends = np.cumsum([0, *map(len, labels)]).tolist()
        return cls(labels, [list(range(a, b)) for a, b in pairwise(ends)], vectors)


class Source(NamedTuple):
    """Where pixels come from, and how."""

    data: Path
    interpolation: str
    batch: int
    workers: int


def by_student(
    source: Source,
    split: str,
    masks: dict,
    asked: Asked,
    config: SegmentationConfig,
    student: Student,
) -> seg.Cosines:
    """What a student says of the images of these masks, in their order."""
    sized, vectors = student.resized(config.window), torch.from_numpy(asked.vectors)

    def cosines(pixels: np.ndarray) -> seg.Cosines:
        planes = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return sliding_cosines(sized, planes, vectors, config.stride)

    return _cosines(source, split, config.image_size, masks, cosines)


def by_teacher(
    source: Source, split: str, masks: dict, asked: Asked, teacher: DenseTeacher, size: int
) -> seg.Cosines:
    """The same of a teacher's patches; what it says of whole images is asked nowhere: 0."""

    def cosines(pixels: np.ndarray) -> seg.Cosines:
        dense = torch.from_numpy(teacher.patches(pixels) @ asked.vectors.T).permute(0, 3, 1, 2)
        return seg.Cosines(dense.contiguous(), dense.new_zeros(dense.shape[:2]))

    return _cosines(source, split, size, masks, cosines)


class _Judge:
    """The masks of val and of the split that is reported, and how cosines are judged by them."""

    def __init__(
        self, masks: dict, split: str, groups: list[list[int]], config: SegmentationConfig
    ):
        self.masks = {name: list(by_id.values()) for name, by_id in masks.items()}
        self.split, self.groups = split, groups
        self.by_threshold = config.background == "threshold"
        self.ends: dict[str, float] = {}

    def student(self, cosines: dict[str, seg.Cosines], grid: int) -> dict:
        """Its metrics, and those that need no more than its embedding or its grid."""
        own, count = self.masks[self.split], len(self.groups)
        frequent = np.sum([np.bincount(m[m != seg.IGNORED], minlength=count) for m in own], axis=0)
        everywhere = np.full(len(own), 0 if frequent[0] else frequent.argmax())
        covered = seg.mean_iou(seg.coverage(own, grid, count).sum(axis=0))
        floor = seg.mean_iou(seg.painted(everywhere, own, count).sum(axis=0))
        self.ends |= {"floor": float(floor), "ceiling": float(covered)}
        plain, choice = self.measured(cosines, (0.0,))
        weighted, chosen = self.measured(cosines, seg.WEIGHTS)
        answered = seg.image_labels(cosines[self.split].images, self.groups)
        painted = seg.miou_interval(seg.painted(answered, own, count))
        return {
            "mIoU": plain | self.ends,
            "mIoU_with_image": weighted | self.ends,
            "mIoU_image_level": painted | self.ends,
            "image_weight": chosen.weight,
        } | _limits(threshold=choice, threshold_with_image=chosen)

    def teacher(self, sizes: list[int], cosines_of: Callable[[str, int], seg.Cosines]) -> dict:
        """Its dense features at the size that is best on val."""
        best: tuple = ()
        for size in sizes:
            choice = self.choice(cosines_of("val", size), (0.0,))
            if not best or choice.miou > best[0].miou:
                best = choice, size
        counts = seg.scored(
            cosines_of(self.split, best[1]), self.masks[self.split], self.groups, best[0]
        )
        miou = seg.miou_interval(counts) | self.ends
        facts = {"mIoU_teacher": miou, "image_size_teacher": best[1]}
        return facts | _limits(threshold_teacher=best[0])

    def choice(self, val: seg.Cosines, weights: tuple[float, ...]) -> seg.Choice:
        return seg.choose(val, self.masks["val"], self.groups, weights, self.by_threshold)

    def measured(
        self, cosines: dict[str, seg.Cosines], weights: tuple[float, ...]
    ) -> tuple[dict, seg.Choice]:
        choice = self.choice(cosines["val"], weights)
        counts = seg.scored(cosines[self.split], self.masks[self.split], self.groups, choice)
        return seg.miou_interval(counts), choice


def _limits(**choices: seg.Choice) -> dict[str, float]:
    """The thresholds by name, where background is found by one."""
    return {name: c.threshold for name, c in choices.items() if c.threshold is not None}


def masks_of(
    data: Path, split: str, config: SegmentationConfig, count: int
) -> tuple[dict[str, dict], int]:
    """{split: {image_id: (h, w) labels}} of val and the split, and how many of it have no mask.

    count: of labels. Raises PipelineError for a mask with a value that names no class.
    """
    masks, without = {"val": {}, split: {}}, 0
    for key, name, png, *box in database.connect(data).execute(MASKS, [split]).fetchall():
        if png is not None:
            masks[name][key] = _labels(key, png, box, config, count)
        elif name == split:
            without += 1
    return masks, without


def _labels(
    key: str, png: bytes, box: list[float], config: SegmentationConfig, count: int
) -> np.ndarray:
    """The part of a stored mask that view 0 shows: the pixels whose centres lie in its box."""
    left, top, right, bottom = (max(0, round(edge)) for edge in box)
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        mask = np.asarray(image)[top:bottom, left:right]
    if config.zero_is == "ignore":
        mask = np.where(mask == 0, seg.IGNORED, mask)
    if (wrong := mask[(mask >= count) & (mask != seg.IGNORED)]).size:
        raise PipelineError(
            f"the mask of image {key} holds the value {wrong[0]}, and {config.classes} names values "
            f"up to {count - 1} (255 is left out). Name the class file of these masks in params.yaml "
            "(evaluate.segmentation.classes)."
        )
    return mask


def _cosines(
    source: Source,
    split: str,
    size: int,
    masks: dict,
    cosines_of: Callable[[np.ndarray], seg.Cosines],
) -> seg.Cosines:
    """What cosines_of makes of the images with masks, seen at size px, in the masks' order."""
    dataset, cosines_by_id = Dataset(source.data, split, size, source.interpolation), {}
    numbers = range(len(dataset))
    loaded: Any = held_out_batches(dataset, numbers, source.batch, workers=source.workers)
    with closing(loaded) as batches:
        for some in batches:
            asked = [i for i, key in enumerate(some.ids) if key in masks]
            if asked:
                parts = cosines_of(np.asarray(some.pixels)[asked])
                for i, patches, image in zip(asked, *parts, strict=True):
                    cosines_by_id[some.ids[i]] = patches, image
            if len(cosines_by_id) == len(masks):
                break
    if lost := masks.keys() - cosines_by_id.keys():
        raise PipelineError(
            f"image {min(lost)} cannot be decoded. Delete data/images and run `pipeline download`."
        )
    return seg.Cosines(*map(torch.stack, zip(*(cosines_by_id[key] for key in masks), strict=True)))
