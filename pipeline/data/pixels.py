"""Stored JPEG -> pixels: the one way a stored image is decoded. They are upright and RGB.

`pipeline.fetch.decoding` writes them.
"""

import numpy as np
import simplejpeg

VERSION = 2  # raise it when a change here changes what is decoded


class NotAnImage(ValueError):
    """The bytes are not a complete image of a known format."""


def decode(jpg: bytes) -> np.ndarray:
    """Stored JPEG -> (height, width, 3) uint8 RGB. Raises NotAnImage for any damage at all."""
    try:
        return simplejpeg.decode_jpeg(jpg, "RGB")
    except ValueError as error:
        raise NotAnImage(str(error)) from None
