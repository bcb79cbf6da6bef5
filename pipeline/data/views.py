"""What part of an image is seen: explicit crop boxes and flips, not seeds of a library's RNG.

Storing the boxes is what lets a student see later exactly what the teacher saw ("Knowledge
distillation: a good teacher is patient and consistent", Beyer et al. 2022; stored views as in
MobileCLIP's reinforced data sets, Vasu et al. 2024).
"""

from typing import NamedTuple

import numpy as np

VERSION = 1  # raise it when a change here moves a box


class View(NamedTuple):
    """A crop box in stored pixels (float32 values) and a left-right flip."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom)."""
        return self[:4]


def canonical_view(
    width: int, height: int, resize_mode: str = "shortest", image_size: int | None = None
) -> View:
    """What the teacher's own preprocessing keeps of an image.

    resize_mode "shortest", as CLIP: the shorter side is resized and the centre cropped; "squash",
    as SigLIP: the whole image. image_size (px): the teacher's. CLIP rounds the longer side and the
    crop's corner to its pixels; None: without that rounding, the exact centred square.
    """
    if resize_mode == "squash":
        return View(0.0, 0.0, float(width), float(height), False)
    short, long = sorted((width, height))
    start, end = (long - short) / 2, (long + short) / 2
    if image_size:
        resized = int(image_size * long / short)
        corner = round((resized - image_size) / 2)
        start, end = (min(p * long / resized, long) for p in (corner, corner + image_size))
    start, end = map(float, np.float32([start, end]))
    if width > height:
        return View(start, 0.0, end, float(height), False)
    return View(0.0, start, float(width), end, False)


def random_view(
    sha256: str,
    view: int,
    width: int,
    height: int,
    area: tuple[float, float],
    ratio: tuple[float, float],
    seed: int,
) -> View:
    """View 1, 2, ... of an image: a random resized crop (Szegedy et al. 2015) and a fair flip.

    A pure function of its arguments: the image's content hash, not its place, picks the box.
    area: range of the crop's share of the image; ratio: range of its width / height, drawn
    log-uniformly. Ten draws, then the centred square, as is customary.
    """
    key = int(sha256[:16], 16)
    rng = np.random.default_rng([seed & 0xFFFFFFFF, view, key >> 32, key & 0xFFFFFFFF])
    flip = bool(rng.random() < 0.5)
    for _ in range(10):
        share = rng.uniform(*area) * width * height
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = np.sqrt(share * aspect), np.sqrt(share / aspect)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = np.array([left, top, left + w, top + h], dtype=np.float32)
            box = box.clip(0, np.array([width, height, width, height], dtype=np.float32))
            return View(*map(float, box), flip)
    return canonical_view(width, height)._replace(flip=flip)
