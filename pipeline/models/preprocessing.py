"""An image as people have it -> the square of pixels that a tower sees."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.core.records import Preprocessing
from pipeline.data.pixels import FORMATS, upright_rgb
from pipeline.data.views import canonical_view, view_pixels

ImageLike = Image.Image | np.ndarray | str | Path


def square_pixels(image: ImageLike, preprocessing: Preprocessing) -> np.ndarray:
    """One image -> (S, S, 3) uint8 RGB in [0, 255], S = preprocessing.image_size.

    image: a file, a Pillow image of any mode, or (height, width, 3) uint8 RGB. Files and Pillow
    images are turned upright; transparency is laid over white. What is kept of the image is what
    the teacher's own preprocessing keeps: the centre square, or all of it squashed.

    Raises PipelineError: a file that is missing or no image, an array of another type or shape.
    """
    if isinstance(image, str | Path):
        image = _read(Path(image))
    elif isinstance(image, Image.Image):
        image = np.array(upright_rgb(image))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise PipelineError(
            f"found an array of {image.dtype} and shape {image.shape}; expected uint8 RGB of shape "
            "(height, width, 3)"
        )
    height, width, _ = image.shape
    view = canonical_view(width, height, preprocessing.resize_mode, preprocessing.image_size)
    return view_pixels(
        image, view.box, view.flip, preprocessing.image_size, preprocessing.interpolation
    )


def _read(file: Path) -> np.ndarray:
    try:
        with Image.open(file, formats=FORMATS) as image:
            return np.array(upright_rgb(image))
    except FileNotFoundError:
        raise PipelineError(f"no file {file}. Name an image file.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PipelineError(
            f"{file} is no image that can be used: {error}. Expected one of {', '.join(FORMATS)}."
        ) from None
