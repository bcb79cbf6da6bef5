"""Bytes of strangers -> one stored image: the one way an image is judged, shrunk and encoded.

Stored images are upright RGB JPEGs; `pipeline.data.pixels` decodes them.
"""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.data.pixels import NotAnImage, decode

VERSION = 2  # raise it when a change here changes what is stored

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # PIL decoders that untrusted bytes meet


class TooManyPixels(ValueError):
    """The image's header announces more pixels than allowed, or a shape that cannot be stored."""


def canonical_jpeg(
    data: bytes, image_size: int, quality: int, max_pixels: int
) -> tuple[bytes, int, int, int, int]:
    """Any image file -> (jpg, width, height, original width, original height), sizes in px.

    Upright (EXIF orientation applied), RGB, transparency over white, first frame only; shrunk
    until the shorter side is at most image_size, never enlarged. An upright RGB JPEG that is
    small enough keeps its bytes, unless they are slightly damaged: encoding it again would only lose
    quality. The returned original size is the upright one.

    Raises NotAnImage (unknown format, truncated, damaged) and TooManyPixels (from the header,
    before anything is decoded).
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _store(image, data, image_size, quality, max_pixels)
    except Image.DecompressionBombError as error:
        raise TooManyPixels(str(error)) from None
    except (TooManyPixels, MemoryError):
        raise
    except UnidentifiedImageError:
        raise NotAnImage(f"none of {', '.join(FORMATS)}: starts with {data[:8]!r}") from None
    except Exception as error:  # PIL's decoders raise almost anything on damaged bytes
        raise NotAnImage(f"{type(error).__name__}: {error}") from None


def _store(image: Image.Image, data: bytes, image_size: int, quality: int, max_pixels: int):
    width, height = image.size
    if width * height > max_pixels:
        raise TooManyPixels(f"{width} x {height} px is more than {max_pixels} px in all")
    upright = image.getexif().get(0x0112, 1) == 1
    as_it_is = image.format == "JPEG" and image.mode == "RGB" and upright
    if image.format != "TIFF" and image.getexif().get(0x0112) in (5, 6, 7, 8):
        width, height = height, width  # those of a TIFF are upright already
    scale = min(1.0, image_size / min(width, height))
    size = round(width * scale), round(height * scale)
    if max(size) > 65_500:  # JPEG holds 65,535
        raise TooManyPixels(f"{width} x {height} px is too long a strip to store as JPEG")
    if scale < 1:
        image.draft("RGB", (2 * image_size, 2 * image_size))  # JPEG: decode at a fraction
    elif as_it_is and _is_sound(data):
        return data, width, height, width, height
    rgb = _rgb(ImageOps.exif_transpose(image))
    if scale < 1:
        rgb = rgb.resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    rgb.save(out, "JPEG", quality=quality)
    return out.getvalue(), *size, width, height


def _is_sound(jpg: bytes) -> bool:
    """Whether `decode` takes these bytes: it is stricter than Pillow with slight damage."""
    try:
        decode(jpg)
    except NotAnImage:
        return False
    return True


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: keep the high byte
        values = np.asarray(image, dtype=np.float64)
        return Image.fromarray((values / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
