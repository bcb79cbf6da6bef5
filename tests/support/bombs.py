"""Image files that cost far more to decode than to send: a few kilobytes each, most of them."""

import io
import struct
import zipfile
import zlib
from functools import cache

from PIL import Image

DEFLATE, LZMA, ZSTD, JBIG, LERC, GROUP_3, GROUP_4, JPEG = 8, 34925, 50000, 34661, 34887, 3, 4, 7


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def of_mode(mode: str, kind: str, side: int, **options) -> bytes:
    """An image of one colour."""
    return encoded(Image.new(mode, (side, side)), kind, **options)


def jpeg_of_scans(side: int, further: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = of_mode("L", "JPEG", side, progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * further + data[end:]


def jpeg_with_comments(size: int) -> bytes:
    """64 x 64 px and so many bytes of comments."""
    data = of_mode("RGB", "JPEG", 64)
    comment = b"\xff\xfe" + struct.pack(">H", 65_535) + b"\0" * 65_533
    return data[:2] + comment * (size // len(comment)) + data[2:]


def jpeg_with_archive(size: int) -> bytes:
    """64 x 64 px and an archive behind them, which any unpacker opens."""
    file = io.BytesIO(of_mode("RGB", "JPEG", 64))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("hidden", b"x" * size)
    return file.getvalue()


def tiff(compression: int, data: bytes, **tags: int) -> bytes:
    """64 x 64 grey px in one strip or tile; tags: `_322=16` and so on."""
    entries = {256: 64, 257: 64, 258: 8, 259: compression, 262: 1, 277: 1}
    entries |= {int(name[1:]): value for name, value in tags.items()}
    tiled = 322 in entries
    entries |= {324 if tiled else 273: 8, 325 if tiled else 279: len(data)}
    body = data + b"\0" * (len(data) % 2)
    directory = struct.pack("<H", len(entries))
    for tag, value in sorted(entries.items()):
        directory += struct.pack("<HHII", tag, 4, 1, value)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory + struct.pack("<I", 0)


def packed_zeros(count: int) -> bytes:
    """What zlib.compress makes of so many zeros, without making them: a block that comes again."""
    block, packer = 1 << 16, zlib.compressobj(9)
    first, again = (
        packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)
    )
    rest = packer.compress(bytes(count % block)) + packer.flush()
    checksum = struct.pack(">I", count % 65_521 << 16 | 1)
    return first + again * (count // block - 1) + rest[:-4] + checksum


def tiff_of_tile(side: int) -> bytes:
    """64 x 64 px in one tile of side x side."""
    return tiff(DEFLATE, packed_zeros(side * side), _322=side, _323=side)


def tiff_of_strip(rows: int) -> bytes:
    """64 x 64 px in one strip of so many rows."""
    return tiff(DEFLATE, packed_zeros(64 * rows), _278=rows)


def bmp_of_runs(side: int) -> bytes:
    """A run-length encoded BMP, which Pillow decodes in Python."""
    rows = (b"\xff\0" * (side // 255) + bytes([side % 255, 0]) + b"\0\0") * side + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(rows), 0, 0, 256, 0)
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    start = 14 + len(header) + len(palette)
    file = struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start)
    return file + header + palette + rows


def png_of_deep_exif(side: int, size: int) -> bytes:
    """A PNG whose EXIF directory names the same bytes under some thousand tags."""
    count = 4000
    directory = b"MM\0*\0\0\0\x08" + struct.pack(">H", count)
    for tag in range(count):
        directory += struct.pack(">HHII", 0x9000 + tag, 7, size, 0)
    exif = directory + b"\0" * size
    data = of_mode("L", "PNG", side)
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif
    return data[:33] + chunk + struct.pack(">I", zlib.crc32(b"eXIf" + exif)) + data[33:]


@cache
def bombs(side: int) -> dict[str, bytes]:
    """By name; side x side px are just allowed where nothing else is wrong."""
    return {
        "JPEG, 64 x 64 px in 30 MB of comments": jpeg_with_comments(30_000_000),
        "JPEG, 64 x 64 px and an archive": jpeg_with_archive(10_000_000),
        "JPEG, progressive, 30 scans": jpeg_of_scans(side, 24),
        "JPEG, progressive, 5,000 scans": jpeg_of_scans(side, 5000),
        "JPEG, progressive, CMYK": of_mode("CMYK", "JPEG", side, progressive=True),
        "PNG, 16 bits of grey": of_mode("I;16", "PNG", side),
        "PNG, RGBA": of_mode("RGBA", "PNG", side),
        "PNG, palette and transparency": of_mode("P", "PNG", side, transparency=0),
        "PNG, EXIF of 4,000 tags over the same 1 MB": png_of_deep_exif(64, 1 << 20),
        "WebP, lossless": of_mode("RGBA", "WEBP", min(side, 16_383), lossless=True),
        "WebP, lossy": of_mode("RGB", "WEBP", min(side, 16_383)),
        "GIF": of_mode("P", "GIF", side, transparency=0),
        "BMP, raw, 1 bit": of_mode("1", "BMP", side),
        "BMP, run lengths": bmp_of_runs(min(side, 4000)),
        "TIFF, 64 x 64 px in a tile of 30,000 x 30,000": tiff_of_tile(30_000),
        "TIFF, 64 x 64 px in a strip of 10 M rows": tiff_of_strip(10_000_000),
        "TIFF, float": of_mode("F", "TIFF", side, compression="tiff_lzw"),
        "TIFF, LZMA": tiff(LZMA, b"\xfd7zXZ\0" + bytes(60)),
        "TIFF, zstd": tiff(ZSTD, b"\x28\xb5\x2f\xfd" + bytes(60)),
        "TIFF, JBIG": tiff(JBIG, bytes(60)),
        "TIFF, LERC": tiff(LERC, bytes(60)),
        "TIFF, fax group 3": tiff(GROUP_3, bytes(60), _258=1),
        "TIFF, fax group 4": tiff(GROUP_4, bytes(60), _258=1),
        "TIFF, JPEG": tiff(JPEG, of_mode("L", "JPEG", 64)),
    }
