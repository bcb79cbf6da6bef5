"""Are patches comparable with text? Measured where the boxes of named things are known."""

from pathlib import Path

import numpy as np
import torch

from pipeline.data import database
from pipeline.data.embeddings import text_vectors
from pipeline.evaluation import metrics
from pipeline.models.student import Student
from pipeline.training.batches import Rows, batches_of

BOXES = """
SELECT image_id, list_filter(boxes, lambda b: trim(b.text) <> '') AS boxes FROM images
WHERE status = 'ok' AND len(boxes) > 0
"""
VIEWS = 'SELECT image_id, "left", top, "right", bottom FROM teacher WHERE view = 0'


def pointing_figures(
    data: Path, split: str, student: Student, batch: int, workers: int
) -> dict[str, dict]:
    """Pointing accuracy and energy in the box over a split, or {} where it has no boxes.

    Twice: by the plain cosine of patch and text, and centred, by what tells the text apart from the
    mean of all stored texts that belong to no single image. All texts of a teacher share most of
    their direction, which says nothing of where a thing is.

    Each beside the boxes' area share (what a random patch gets) as floor, and pointing beside
    always answering the centre. The boxes' texts were embedded by the teacher's text tower.
    """
    connection = database.connect(data)
    boxes = dict(connection.execute(BOXES).fetchall())
    if not boxes:
        return {}
    views = {key: box for key, *box in connection.execute(VIEWS).fetchall()}
    texts, _, vectors = text_vectors(data, "image_id IS NULL", [])
    vector_of = dict(zip(texts, vectors, strict=True))
    rows = Rows(data, split, student.config.image_size, student.preprocessing.interpolation)
    found: dict[str, list[dict]] = {"pointing": [], "pointing_centred": []}
    mean = vectors.mean(axis=0)
    for seen in batches_of(rows, range(len(rows)), batch, workers=workers):
        patches = _patches(student, seen.pixels)  # (b, N, E)
        for key, image_patches in zip(seen.ids, patches, strict=True):
            named = [box for box in boxes.get(key, []) if box["text"] in vector_of]
            if named:
                prompts = np.stack([vector_of[box["text"]] for box in named])  # (r, E)
                centres = patch_centres(student.config.grid, views[key])
                corners = np.array([[box[c] for c in ("x0", "y0", "x1", "y1")] for box in named])
                centres = np.broadcast_to(centres, (len(named), *centres.shape))
                for name, asked in (("pointing", prompts), ("pointing_centred", prompts - mean)):
                    activation = asked @ image_patches.T  # (r, N)
                    found[name].append(metrics.pointing(activation, centres, corners))
    if not found["pointing"]:
        return {}
    figures: dict = {}
    for name, parts in found.items():
        rates = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        area, centre = float(rates["area"].mean()), float(rates["centre"].mean())
        ends = {"floor": area, "ceiling": 1.0}
        figures["pairs"] = len(rates["hit"])
        figures[name] = metrics.share_interval(rates["hit"]) | ends | {"centre": centre}
        energy = name.replace("pointing", "energy")
        figures[energy] = metrics.mean_interval(rates["energy"]) | ends
    return figures


def patch_centres(grid: int, view: list[float]) -> np.ndarray:
    """(N, 2) x, y of the patches' centres, in px of the stored image; view: its crop box."""
    left, top, right, bottom = view
    steps = (np.arange(grid) + 0.5) / grid
    y, x = np.meshgrid(top + steps * (bottom - top), left + steps * (right - left), indexing="ij")
    return np.stack([x.ravel(), y.ravel()], axis=1)


@torch.inference_mode()
def _patches(student: Student, pixels: np.ndarray) -> np.ndarray:
    """(b, S, S, 3) uint8 -> (b, N, E) float32, unit length."""
    tensor = torch.from_numpy(pixels).to(student.mean.device).permute(0, 3, 1, 2)
    patches = student.patch_embeddings(student.normalise(tensor))
    return torch.nn.functional.normalize(patches.float(), dim=-1).cpu().numpy()
