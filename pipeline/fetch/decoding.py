"""Untrusted bytes -> one stored image: the one way an image is judged, shrunk and encoded.

Stored images are upright RGB JPEGs; `pipeline.data.pixels` decodes them. `pipeline.fetch.decoding_process`
runs this where it can be stopped: what is checked here is what a header gives away, so that the
usual bomb costs nothing.
"""

import io
import re

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.data.pixels import NotAnImage, decode

VERSION = 3  # raise it when a change here changes what is stored

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow plugins that untrusted bytes meet
CODECS = {  # what those may call to decode pixels; WebP names none, libwebp is all it can call
    "JPEG": {"jpeg"},
    "MPO": {"jpeg"},  # what Pillow makes of a JPEG that holds several pictures
    "PNG": {"zip"},
    "GIF": {"gif"},
    "BMP": {"raw"},  # not bmp_rle, which is Python
    "TIFF": {"raw", "libtiff"},
    "WEBP": set(),
}
TIFF_COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32773: "packbits", 32946: "deflate"}
MOST_SCANS = 64  # of a JPEG; a camera writes 1, a progressive encoder about 10
LARGEST_TILE = 1 << 20  # px of a TIFF's tile, where the image itself is smaller
ROOM_BYTES = 1 << 16  # of a kept JPEG beyond 3 a pixel: profile, EXIF and its thumbnail
_BAND_PX = 1 << 22  # of 16 bits or more that are cast to 8 at once
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class TooManyPixels(ValueError):
    """The image's header announces more pixels than allowed, or a shape that cannot be stored."""


class Undecodable(NotAnImage):
    """Decoding would cost, or has cost, more time or memory than an image is given."""


def canonical_jpeg(
    data: bytes, image_size: int, quality: int, max_pixels: int
) -> tuple[bytes, int, int, int, int]:
    """Any image file -> (jpg, width, height, original width, original height), sizes in px.

    Upright (EXIF orientation applied), RGB, transparency over white, first frame only; shrunk
    until the shorter side is at most image_size, never enlarged. An upright RGB JPEG that is
    small enough keeps its bytes, unless they are slightly damaged or far more than its pixels
    need: encoding it again would only lose quality. The returned original size is the upright one.

    Raises NotAnImage (unknown format or compression, truncated, damaged), its kind Undecodable
    (too many scans, too large a tile, memory at its end) and TooManyPixels (from the header,
    before anything is decoded).
    """
    try:
        _require_few_pixels(*_webp_canvas(data), max_pixels)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return _store(image, data, image_size, quality, max_pixels)
    except Image.DecompressionBombError as error:
        raise TooManyPixels(str(error)) from None
    except (TooManyPixels, Undecodable):
        raise
    except MemoryError:
        raise Undecodable("decoding took more memory than an image is given") from None
    except UnidentifiedImageError:
        raise NotAnImage(f"none of {', '.join(FORMATS)}: starts with {data[:8]!r}") from None
    except Exception as error:  # PIL's decoders raise almost anything on damaged bytes
        raise NotAnImage(f"{type(error).__name__}: {error}") from None


def _store(
    image: ImageFile, data: bytes, image_size: int, quality: int, max_pixels: int
) -> tuple[bytes, int, int, int, int]:
    width, height = image.size
    _require_few_pixels(width, height, max_pixels)
    _require_allowed_decoder(image, data)
    # Pillow turns a TIFF by itself
    orientation = 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
    as_it_is = image.format == "JPEG" and image.mode == "RGB" and orientation == 1
    scale = min(1.0, image_size / min(width, height))
    size = round(width * scale), round(height * scale)
    if max(size) > 65_500:  # JPEG holds 65,535
        raise TooManyPixels(f"{width} x {height} px is too long a strip to store as JPEG")
    if scale < 1:
        image.draft("RGB", (2 * image_size, 2 * image_size))  # JPEG: decode at a fraction
    elif as_it_is and len(data) <= 3 * width * height + ROOM_BYTES and _is_sound(data):
        return data, width, height, width, height
    rgb = _rgb(_reduced(_eight_bits(image), 2 * image_size))
    if scale < 1:
        rgb = rgb.resize(size, Image.Resampling.BICUBIC)
    if orientation in _TURNS:
        rgb = rgb.transpose(_TURNS[orientation])
    out = io.BytesIO()
    rgb.save(out, "JPEG", quality=quality, comment=b"")  # Pillow would pass on the file's own
    upright = (width, height) if orientation not in (5, 6, 7, 8) else (height, width)
    return out.getvalue(), *rgb.size, *upright


def _is_sound(jpg: bytes) -> bool:
    """Whether `decode` takes these bytes: it is stricter than Pillow with slight damage."""
    try:
        decode(jpg)
    except NotAnImage:
        return False
    return True


# Judged by the header


def _require_few_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooManyPixels(f"{width} x {height} px is more than {max_pixels} px in all")


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """Size in px that a WebP announces, (0, 0) for other files: Pillow allocates it on opening."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return 0, 0
    match data[12:16]:
        case b"VP8X":
            side = [int.from_bytes(data[i : i + 3], "little") + 1 for i in (24, 27)]
        case b"VP8L":
            bits = int.from_bytes(data[21:25], "little")
            side = [(bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1]
        case _:
            side = [int.from_bytes(data[i : i + 2], "little") & 0x3FFF for i in (26, 28)]
    return side[0], side[1]


def _require_allowed_decoder(image: ImageFile, data: bytes) -> None:
    codecs, allowed = {tile[0] for tile in image.tile}, CODECS[image.format or ""]
    if other := codecs - allowed:
        raise NotAnImage(f"{image.format} with {', '.join(sorted(other))}, which is not decoded")
    if allowed == {"jpeg"} and (scans := count_scans(data)) > MOST_SCANS:
        raise Undecodable(f"a JPEG of {scans} scans; at most {MOST_SCANS} are decoded")
    if isinstance(image, TiffImageFile):
        _require_plain_tiff(image)


def _require_plain_tiff(image: TiffImageFile) -> None:
    """libtiff allocates a whole tile or strip, whatever the size of the image."""
    tags = image.tag_v2
    if (compression := tags.get(259, 1)) not in TIFF_COMPRESSIONS:
        allowed = ", ".join(sorted(set(TIFF_COMPRESSIONS.values())))
        raise NotAnImage(f"TIFF of compression {compression}; decoded are {allowed}")
    width, height = image.size
    tile = tags.get(322, 1) * tags.get(323, 1)
    if tile > max(LARGEST_TILE, width * height):
        raise Undecodable(f"a TIFF of {width} x {height} px with tiles of {tile} px")


_MARKER = re.compile(rb"\xff+[^\xff\x00]")


def count_scans(data: bytes) -> int:
    """Scans (SOS segments) of a JPEG's first picture, at least as many as libjpeg meets.

    As libjpeg does, whatever lies between segments is skipped, and so are restart markers and
    markers that have no length.
    """
    scans, at = 0, 0
    while marker := _MARKER.search(data, at):
        code, at = data[marker.end() - 1], marker.end()
        if code == 0xD9:  # end of image
            break
        scans += code == 0xDA
        if code >= 0xC0 and not 0xD0 <= code <= 0xD8:
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return scans


# Pixels


def _eight_bits(image: Image.Image) -> Image.Image:
    """16 bits and more: the high byte, a band at a time; other images as they are."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    width, height = image.size
    grey, rows = Image.new("L", image.size), max(1, _BAND_PX // width)
    for top in range(0, height, rows):
        band = np.asarray(image.crop((0, top, width, min(top + rows, height))), dtype=np.float32)
        values = (band / 257).clip(0, 255).round().astype(np.uint8)
        grey.paste(Image.fromarray(values), (0, top))
    return grey


def _reduced(image: Image.Image, side: int) -> Image.Image:
    """Means of n x n px, n the largest that leaves the shorter side at least this long."""
    factor = min(image.size) // side
    if factor < 2:
        return image
    if "transparency" in image.info:  # a colour, which means would mix with others
        image = image.convert("RGBA")
    elif image.mode in ("1", "P"):
        image = image.convert("RGB")
    return image.reduce(factor)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
