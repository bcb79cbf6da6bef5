"""A mask that a manifest names -> the PNG that stands beside the stored image, of its size.

A mask is a PNG of class indices, grey or with a palette, whose values are kept as they are: never
through RGB, never blended. 255 is for pixels that nobody judged.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.fetch.policy import FetchError, read_local

VERSION = 1  # raise it when another PNG is stored

MAX_BYTES = 1 << 25  # of a mask's file
MODES = ("L", "P", "1")


class MaskError(ValueError):
    """Why a mask is not stored; its image is good all the same."""


def stored_mask(url: str, root: Path, image: dict) -> bytes:
    """The mask at a `file:` path below root as a grey PNG of an image's stored size.

    image: width, height, original_width and original_height of the upright image, px. The mask has
    the original's size or the stored one's, upright; each stored pixel takes its nearest one.

    Raises MaskError: no such file, no PNG, colours in place of indices, another size.
    """
    if url[:5].lower() != "file:":
        raise MaskError(f"{url!r} is no `file:` path below the root")
    try:
        data = read_local(url, root, MAX_BYTES)
    except FetchError as error:
        raise MaskError(str(error)) from None
    stored = image["width"], image["height"]
    allowed = {stored, (image["original_width"], image["original_height"])}
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as mask:
            if mask.mode not in MODES:
                raise MaskError(f"mode {mask.mode} has no class indices; expected grey or palette")
            if mask.size not in allowed:  # judged by its header, before it is decoded
                sizes = " or ".join(f"{width} x {height}" for width, height in sorted(allowed))
                raise MaskError(f"{mask.width} x {mask.height} px, its image has {sizes}")
            indices = np.asarray(mask).astype(np.uint8)
    except MaskError:
        raise
    except Exception as error:  # PIL's decoders raise almost anything on damaged bytes
        raise MaskError(f"no PNG: {type(error).__name__}: {error}") from None
    out = io.BytesIO()
    grey = Image.fromarray(indices).resize(stored, Image.Resampling.NEAREST)
    grey.save(out, "PNG")
    return out.getvalue()


def png_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in px that a PNG's header says; None for what is no PNG."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as mask:
            return mask.size
    except Exception:  # whatever it is, it is no PNG
        return None
