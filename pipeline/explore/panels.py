"""The report's pictures of a student at work: patches of held-out images, and its inside."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from pipeline.core.records import Sample
from pipeline.data import database
from pipeline.data.embeddings import load_text_embeddings
from pipeline.data.pixels import decode
from pipeline.data.views import view_pixels
from pipeline.explore import plots, report_charts
from pipeline.models import inside
from pipeline.models.patches import PatchView, agreement, entropy, in_shares, student_view
from pipeline.models.student import Student
from pipeline.training.batches import held_out_batches
from pipeline.training.dataset import Dataset

SIDE = 192  # px of a tile
TEXTS = 2  # per image
PASSED = 64  # images that are looked inside with
OUTLIER = 2.0  # times the median length
FILTERS = 28


@dataclass(frozen=True)
class Tile:
    """A picture, what it says in words and numbers, and the line below it."""

    uri: str
    alt: str
    caption: str


def patch_groups(
    data: Path,
    dataset: Dataset,
    count: int,
    student: Student,
    prompts: list[str],
    by_teacher: Callable[[Sample], PatchView] | None,
) -> list[dict]:
    """Tiles of the first held-out images, [{title, tiles}]: weights and a map per text.

    prompts: stored texts that are drawn where an image has no boxes.
    by_teacher: a sample of the dataset -> what the teacher makes of it, for its attention beside them.
    """
    interpolation, groups = student.preprocessing.interpolation, []
    for number in range(min(count, len(dataset))):
        sample = dataset.sample(number)
        pixels = dataset.pixels(sample)
        if pixels is None:  # it does not decode
            continue
        image = view_pixels(decode(sample.jpg), sample.box, sample.flip, SIDE, interpolation)
        view = student_view(student, pixels)
        caption, texts = _texts_of(data, sample.image_id, prompts)
        tiles = [
            Tile(
                plots.data_uri(plots.thumbnail(image, SIDE)),
                f"Held-out image {number + 1}: {caption or 'no caption'}",
                "image",
            ),
            _weights_tile(image, view.weights, "patch weights"),
        ]
        if by_teacher is not None:
            tiles.append(_teacher_tile(by_teacher(sample).weights, image, view.weights))
        for text, vector, box in texts:
            tiles.append(_text_tile(image, view.patches @ vector, text, box, sample.box))
        groups.append({"title": caption or sample.image_id, "tiles": tiles})
    return groups


def _texts_of(data: Path, image_id: str, prompts: list[str]) -> tuple[str | None, list[tuple]]:
    """An image's caption or label, and the texts of its boxes, else the prompts, else its captions,
    as (text, vector, box or None)."""
    ((caption, boxes),) = database.connect(data).execute(BOXES, [image_id]).fetchall()
    boxes = {box["text"]: box for box in boxes or []}
    names = list(boxes) or [prompt.strip() for prompt in prompts]
    texts, _, vectors = load_text_embeddings(
        data, "image_id IS NULL AND list_contains(?::VARCHAR[], trim(text))", [names]
    )
    if not texts:
        texts, _, vectors = load_text_embeddings(data, "image_id = ?", [image_id])
    named = [(t, v, boxes.get(t)) for t, v in zip(texts, vectors, strict=True)]
    return caption, named[:TEXTS]


def _weights_tile(image: np.ndarray, weights: np.ndarray, name: str) -> Tile:
    shares = in_shares(weights)
    numbers = f"entropy {entropy(weights):.2f} of {np.log2(weights.size):.2f} bits"
    y, x = np.unravel_index(weights.argmax(), weights.shape)
    return Tile(
        plots.data_uri(plots.tile(plots.overlay(image, shares, 0, max(2, shares.max())))),
        f"{name.capitalize()} over the image: {numbers}; the largest, in row {y + 1}, column "
        f"{x + 1}, is {shares.max():.2f} times the equal share.",
        f"{name}, {numbers}",
    )


def _text_tile(
    image: np.ndarray, cosines: np.ndarray, text: str, box: dict | None, view: tuple
) -> Tile:
    low, high = cosines.min(), cosines.max()
    drawn = _boxed(plots.overlay(image, cosines, low, high), box, view)
    y, x = np.unravel_index(cosines.argmax(), cosines.shape)
    return Tile(
        plots.data_uri(plots.tile(drawn)),
        f"Cosine of each patch to the text {text!r}: {low:.3f} to {high:.3f}, highest in row "
        f"{y + 1}, column {x + 1} of {len(cosines)}.",
        f"{text}: {low:.2f} to {high:.2f}",
    )


def _teacher_tile(attention: np.ndarray, image: np.ndarray, weights: np.ndarray) -> Tile:
    tile = _weights_tile(image, attention, "teacher's attention")
    more = f"correlation with the student's weights {agreement(weights, attention):.2f}"
    return Tile(tile.uri, f"{tile.alt} {more.capitalize()}.", f"{tile.caption}, {more}")


def _boxed(image: np.ndarray, box: dict | None, view: tuple) -> np.ndarray:
    """The image with a box outlined, where there is one; views for evaluation are not flipped."""
    if box is None:
        return image
    left, top, right, bottom = view
    drawn = Image.fromarray(image)
    x0, x1 = (SIDE * (box[c] - left) / (right - left) for c in ("x0", "x1"))
    y0, y1 = (SIDE * (box[c] - top) / (bottom - top) for c in ("y0", "y1"))
    ImageDraw.Draw(drawn).rectangle([x0, y0, x1, y1], outline="white", width=2)
    return np.asarray(drawn)


def inside_views(student: Student, dataset: Dataset) -> tuple[list[dict], list[dict]]:
    """Charts and tiles of what the student has learned: ([{title, text, alt, light, dark}],
    [{title, text, tiles}]), measured on the first PASSED held-out images.
    """
    batch = next(held_out_batches(dataset, range(min(PASSED, len(dataset))), PASSED, workers=1))
    pixels = student.as_input(np.asarray(batch.pixels))
    views = inside.look_inside(student, pixels)
    with torch.inference_mode():
        weights = student.outputs(pixels).patch_weights
    parts = [_distances(student, views), _norms(student, views)]
    groups = [
        _rollout(student, views, weights, np.asarray(batch.pixels)),
        _positions(student),
        _filters(student),
    ]
    return parts, groups


def _distances(student: Student, views: inside.Inside) -> dict:
    distances = inside.mean_attention_distance(views.attention, student.config.patch_size)
    layers = distances.cpu().numpy()  # (L, H)
    means = ", ".join(f"{value:.0f}" for value in layers.mean(axis=1))
    return {
        "title": "How far attention reaches",
        "text": "Distance in px between a patch and what it attends to, a dot per head"
        + (", within the 3 x 3 neighbourhood." if student.config.neighbourhood_mask else "."),
        "alt": f"Mean attention distance by layer, in px: {means}.",
    } | report_charts.in_both_lights(partial(report_charts.distance_chart, layers))


def _norms(student: Student, views: inside.Inside) -> dict:
    norms = inside.patch_norms(student, views.tokens[-1]).cpu()
    share = inside.outlier_share(norms, OUTLIER)
    values, limit = norms.flatten().numpy(), float(OUTLIER * norms.median())
    return {
        "title": "Patches that are too long",
        "text": f"Length of the patch embeddings before they are brought to one length. Beyond "
        f"{OUTLIER:g} times the median (dashed) a patch counts as an artefact: {share:.2%} are.",
        "alt": f"Histogram of patch lengths: median {norms.median():.2f}, longest "
        f"{norms.max():.2f}, {share:.2%} beyond {OUTLIER:g} times the median.",
    } | report_charts.in_both_lights(partial(report_charts.histogram, values, "length", limit))


def _rollout(
    student: Student, views: inside.Inside, weights: torch.Tensor, pixels: np.ndarray
) -> dict:
    """Where the embedding stems from: the pooled patches' attention, followed to the first layer."""
    rollout, count = inside.attention_rollout(views.attention), student.class_tokens
    pooled = weights[:, None] @ rollout[:, count:, count:]  # (B, 1, N)
    if count:
        pooled = rollout[:, :count, count:].mean(dim=1, keepdim=True)
    pooled = (pooled / pooled.sum(dim=2, keepdim=True))[:, 0].cpu().numpy()
    grid = student.config.grid
    tiles = []
    for image, flat in zip(pixels[:4], pooled, strict=False):
        shown = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        tiles.append(_weights_tile(shown, flat.reshape(grid, grid), "attention rollout"))
    return {
        "title": "Where the embedding comes from",
        "text": "Attention followed through all layers (rollout), weighted by the patch weights.",
        "tiles": tiles,
    }


def _positions(student: Student) -> dict:
    similar = inside.position_similarity(student).cpu().numpy()  # (g, g, g, g)
    grid = len(similar)
    flat = similar.reshape(grid * grid, grid * grid)
    others = flat[~np.eye(len(flat), dtype=bool)]
    low, high = (float(others.min()), float(others.max())) if others.size else (0.0, 1.0)
    tiles = report_charts.coloured(flat.reshape(-1, grid, grid), low, high)
    beside = similar[np.arange(grid - 1), 0, np.arange(1, grid), 0].mean() if grid > 1 else 1.0
    sheet = report_charts.mosaic(tiles, grid)
    numbers = f"cosines {low:.2f} to {high:.2f}, of places next to each other {beside:.2f}"
    return {
        "title": "Positions",
        "text": "Cosine of each place's position embedding to all others: a small map per place.",
        "tiles": [
            Tile(
                plots.data_uri(plots.tile(sheet, 2 * SIDE)),
                f"Similarity of position embeddings on a grid of {grid} by {grid}: {numbers}.",
                numbers,
            )
        ],
    }


def _filters(student: Student) -> dict:
    count = min(FILTERS, *student.conv1.weight.flatten(1).shape)
    components, shares = inside.filter_components(student, count)
    filters = components.cpu().numpy().transpose(0, 2, 3, 1)  # (count, p, p, 3)
    most = np.abs(filters).max(axis=(1, 2, 3), keepdims=True).clip(1e-12)
    tiles = (127.5 + 127.5 * filters / most).round().astype(np.uint8)
    sheet = Image.fromarray(report_charts.mosaic(tiles, 7))
    scale = max(1, round(2 * SIDE / sheet.width))
    sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    numbers = f"the first {count} components hold {float(shares.sum()):.1%} of the variance"
    return {
        "title": "Patch filters",
        "text": "Principal components of the patch projection, in the order of their share.",
        "tiles": [
            Tile(
                plots.data_uri(plots.tile(np.asarray(sheet))),
                f"Patch filters: {numbers}, the first one {float(shares[0]):.1%}.",
                numbers,
            )
        ],
    }


BOXES = """
SELECT coalesce(nullif(trim(caption), ''), label),
       list_filter(boxes, lambda b: trim(b.text) <> '') AS boxes FROM images
WHERE status = 'ok' AND image_id = ?
"""
