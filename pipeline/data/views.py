"""What is seen of an image: explicit crop boxes and flips, not seeds of a library's RNG.

Teacher and student both look through `view_pixels`, so a stored box means the same pixels to both.
Storing the boxes is what lets a student see later exactly what the teacher saw ("Knowledge
distillation: a good teacher is patient and consistent", Beyer et al. 2022; stored views as in
MobileCLIP's reinforced data sets, Vasu et al. 2024).
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2  # raise it when a change here moves a box or changes what is seen through it
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
NEAR = 1e-3  # px: what float32 leaves of a whole number
STRIP = 4  # times the size: the longest side that is worth resizing whole


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
        return self.left, self.top, self.right, self.bottom


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
    start, end = float(np.float32(start)), float(np.float32(end))
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

    A pure function of its arguments: the image's content hash, not its place, picks the box, which
    lies on whole pixels. area: range of the crop's share of the image; ratio: range of its
    width / height, drawn log-uniformly. Ten draws, then the centred square, as is customary.
    """
    key = int(sha256[:16], 16)
    rng = np.random.default_rng([seed & 0xFFFFFFFF, view, key >> 32, key & 0xFFFFFFFF])
    flip = bool(rng.random() < 0.5)
    for _ in range(10):
        share = rng.uniform(*area) * width * height
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(share * aspect)), round(np.sqrt(share / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.uniform(0, width - w + 1)), int(rng.uniform(0, height - h + 1))
            return View(*map(float, (left, top, left + w, top + h)), flip)
    return canonical_view(width, height)._replace(flip=flip)


def view_pixels(
    image: np.ndarray,
    box: tuple[float, float, float, float],
    flip: bool,
    size: int,
    interpolation: str = "bicubic",
) -> np.ndarray:
    """(height, width, 3) uint8 and a crop box in its pixels -> (size, size, 3) uint8.

    box = (left, top, right, bottom), fractions of a pixel allowed; flip mirrors left and right
    after the crop. Antialiased, as Pillow and CLIP's own preprocessing resize.

    A box on whole pixels is cut out and resized, and one that lies on the pixels of the resized
    image, as CLIP's does, is cut out of that: both by torch, whose resize agrees with Pillow's to
    2/255 and takes a sixth of the time. Pillow resizes what lies between pixels.
    """
    from torch import from_numpy  # slow to import, and most who read boxes never look through them

    left, top, right, bottom = box
    across = _cut(left, right, image.shape[1], size)
    down = _cut(top, bottom, image.shape[0], size)
    if across and down:
        source = np.ascontiguousarray(image[down.source, across.source])
        resized = _resized(from_numpy(source), down, across, interpolation)[down.seen, across.seen]
    else:
        small = Image.fromarray(image).resize((size, size), RESAMPLING[interpolation], box=box)
        resized = from_numpy(np.array(small))
    return (resized.flip(1) if flip else resized.contiguous()).numpy()


class _Cut(NamedTuple):
    """One axis: which source pixels are resized to how many, and which of these are seen."""

    source: slice
    outputs: int
    seen: slice


def _cut(start: float, end: float, length: int, size: int) -> _Cut | None:
    """None where the box starts or ends between pixels, of the image and of the resized one."""
    if start == int(start) and end == int(end):
        return _Cut(slice(int(start), int(end)), size, slice(size))
    step = (end - start) / size  # px of the image
    outputs, skipped = round(length / step), round(start / step)
    on_pixels = abs(outputs * step - length) < NEAR and abs(skipped * step - start) < NEAR
    if on_pixels and outputs <= STRIP * size:
        return _Cut(slice(length), outputs, slice(skipped, skipped + size))
    return None


def _resized(image: "Tensor", down: _Cut, across: _Cut, interpolation: str) -> "Tensor":
    """(h, w, 3) uint8 -> (down.outputs, across.outputs, 3) uint8."""
    from torch.nn.functional import interpolate

    size = down.outputs, across.outputs
    if image.shape[:2] == size:
        return image
    planes = image.unsqueeze(0).permute(0, 3, 1, 2)  # a view: channels stay the innermost
    planes = interpolate(planes, size=size, mode=interpolation, antialias=True)
    return planes.permute(0, 2, 3, 1)[0]
