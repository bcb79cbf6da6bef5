"""Stored JPEG -> pixels: the one way a stored image is decoded. They are upright and RGB.

`pipeline.fetch.decoding` writes them, with the colours that `upright_rgb` gives an image of any mode.
"""

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # PIL decoders that untrusted bytes meet
VERSION = 2  # raise it when a change here changes what is decoded


class NotAnImage(ValueError):
    """The bytes are not a complete image of a known format."""


def decode(jpg: bytes) -> np.ndarray:
    """Stored JPEG -> (height, width, 3) uint8 RGB. Raises NotAnImage for any damage at all."""
    try:
        return simplejpeg.decode_jpeg(jpg, "RGB")
    except ValueError as error:
        raise NotAnImage(str(error)) from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: EXIF orientation applied, transparency laid over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: keep the high byte
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray((values / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
