"""Are patches comparable with text? Measured where the boxes of named things are known."""

from pathlib import Path

import numpy as np
import torch

from pipeline.core.records import Metric, MetricGroup
from pipeline.data import database
from pipeline.data.embeddings import load_text_embeddings
from pipeline.evaluation import metrics
from pipeline.models.student import Student
from pipeline.training.batches import held_out_batches
from pipeline.training.dataset import Dataset

BOXES = """
SELECT image_id, list_filter(boxes, lambda b: trim(b.text) <> '') AS boxes FROM images
WHERE status = 'ok' AND len(boxes) > 0
"""
VIEWS = 'SELECT image_id, "left", top, "right", bottom FROM teacher WHERE view = 0'


def pointing_metrics(
    data: Path, split: str, student: Student, batch: int, workers: int
) -> MetricGroup | None:
    """Pointing accuracy and energy in the box over a split, or None where it has no boxes.

    Twice: by the plain cosine of patch and text, and centred, by what tells the text apart from the
    mean of all stored texts that belong to no single image. All texts of a teacher share most of
    their direction, which says nothing of where a thing is.

    Boxes of one text in one image count as one: the text cannot say which is meant. Each beside the
    boxes' area share (what a random patch gets) as floor; the ceiling is the share of texts with a
    patch centre in a box: small boxes may hold none, and others are cropped away. Pointing also
    stands beside always answering the centre. The boxes' texts were embedded by the teacher's text
    tower.
    """
    connection = database.connect(data)
    boxes = dict(connection.execute(BOXES).fetchall())
    if not boxes:
        return None
    views = {key: box for key, *box in connection.execute(VIEWS).fetchall()}
    texts, _, vectors = load_text_embeddings(data, "image_id IS NULL", [])
    vector_of = dict(zip(texts, vectors, strict=True))
    dataset = Dataset(data, split, student.config.image_size, student.preprocessing.interpolation)
    mean, owners = vectors.mean(axis=0), []
    rates_by_metric: dict[str, list[dict]] = {"pointing": [], "pointing_centred": []}
    for batch_seen in held_out_batches(dataset, range(len(dataset)), batch, workers=workers):
        patches = _patches(student, batch_seen.pixels)  # (b, N, E)
        for key, image_patches in zip(batch_seen.ids, patches, strict=True):
            named = _corners_by_text(boxes.get(key, []), vector_of)
            if named:
                prompts = np.stack([vector_of[text] for text in named])  # (r, E)
                centres, middle = patch_centres(student.config.grid, views[key])
                inside = np.stack([in_boxes(centres, corners) for corners in named.values()])
                centre = np.array([in_boxes(middle, corners)[0] for corners in named.values()])
                owners += [key] * len(named)
                for name, asked in (("pointing", prompts), ("pointing_centred", prompts - mean)):
                    activation = asked @ image_patches.T  # (r, N)
                    rates = metrics.pointing(activation, inside)
                    rates_by_metric[name].append(rates | {"centre": centre})
    return _metrics(rates_by_metric, np.array(owners)) if owners else None


def _metrics(rates_by_metric: dict[str, list[dict]], owners: np.ndarray) -> MetricGroup:
    """Rates text by text -> metrics; owners (r,): the image of each text."""
    group: dict[str, Metric] = {}
    for name, parts in rates_by_metric.items():
        rates = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        ends = {"floor": float(rates["area"].mean()), "ceiling": float(rates["reachable"].mean())}
        hits = metrics.share_interval(rates["hit"], owners)
        group[name] = hits.beside(**ends, centre=float(rates["centre"].mean()))
        energy = metrics.mean_interval(rates["energy"], owners)
        group[name.replace("pointing", "energy")] = energy.beside(**ends)
    return MetricGroup(metrics=group, facts={"pairs": len(owners)})


def _corners_by_text(boxes: list[dict], stored: dict) -> dict[str, np.ndarray]:
    """text -> (b, 4) corners of all its boxes, of the texts that are stored."""
    corners: dict[str, list] = {}
    for box in boxes:
        if box["text"] in stored:
            corners.setdefault(box["text"], []).append([box[c] for c in ("x0", "y0", "x1", "y1")])
    return {text: np.array(boxes) for text, boxes in corners.items()}


def in_boxes(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N,) whether each of (N, 2) points x, y lies in any of (b, 4) boxes x0, y0, x1, y1."""
    x, y = points[:, :1], points[:, 1:]
    x0, y0, x1, y1 = boxes.T
    return ((x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)).any(axis=1)


def patch_centres(grid: int, view: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) x, y of the patches' centres, and (1, 2) of the view's, in px of the stored image.

    view: its crop box.
    """
    left, top, right, bottom = view
    steps = (np.arange(grid) + 0.5) / grid
    y, x = np.meshgrid(top + steps * (bottom - top), left + steps * (right - left), indexing="ij")
    middle = np.array([[(left + right) / 2, (top + bottom) / 2]])
    return np.stack([x.ravel(), y.ravel()], axis=1), middle


@torch.inference_mode()
def _patches(student: Student, pixels: np.ndarray | torch.Tensor) -> np.ndarray:
    """(b, S, S, 3) uint8 -> (b, N, E) float32, unit length."""
    patches = student.patch_embeddings(student.as_input(np.asarray(pixels)))
    return torch.nn.functional.normalize(patches.float(), dim=-1).cpu().numpy()
