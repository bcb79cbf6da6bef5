"""Throw mutated bytes at what reads untrusted files.

`python tests/fuzz.py image|manifest SECONDS`

Guided by the coverage of Pillow's and our own Python code (needs `pip install atheris`). An input
is at fault if it raises anything but the documented errors, gives a JPEG that cannot be decoded,
takes over 20 s or 2 GB, or ends the process; libFuzzer then saves it and this script ends with 77.
"""

import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL", "pipeline"]):
    from pipeline.core.errors import PipelineError
    from pipeline.data.pixels import NotAnImage, decode
    from pipeline.fetch.decoding import FORMATS, TooManyPixels, canonical_jpeg
    from pipeline.fetch.manifest import write_lists

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from support import worlds

MOST_PIXELS = 1_000_000
SCRATCH = Path(tempfile.mkdtemp())


def image(data: bytes) -> None:
    try:
        jpg, width, height, *_ = canonical_jpeg(data, 64, 90, MOST_PIXELS)
    except (NotAnImage, TooManyPixels):
        return
    assert decode(jpg).shape == (height, width, 3)


def manifest(data: bytes) -> None:
    """The first byte says whether the rest is CSV or Parquet."""
    path = SCRATCH / ("m.csv" if data[:1] < b"\x80" else "m.parquet")
    path.write_bytes(data[1:])
    try:
        lists = write_lists(path, SCRATCH, 2, SCRATCH / "lists")
    except PipelineError:
        return
    assert sum(pq.read_metadata(path).num_rows for path in lists)


def image_seeds():
    for kind in FORMATS:
        for i, options in enumerate([{}, {"width": 200, "height": 30}]):
            yield worlds.picture(i, kind=kind, **options)
    yield worlds.picture(3, kind="JPEG", progressive=True)
    lying = Image.Exif()
    lying[0x0112] = 6  # on its side
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        yield worlds.picture(4, kind=kind, exif=lying)


def manifest_seeds():
    yield b'\0url,caption,label\nfile:a.jpg,a cat,x\nhttp://x/b.jpg,"a, b",\n'
    boxes = '[{""text"":""a"",""x0"":0,""y0"":0,""x1"":1,""y1"":2}]'
    yield f'\0url,caption,boxes\na,"[""x"",""y""]","{boxes}"\n'.encode()
    box = {"text": "a", "x0": 0.0, "y0": 0.0, "x1": 1.0, "y1": 2.0}
    for columns in (
        {"url": ["a", "b", None]},
        {"url": ["a"], "caption": ["x"], "label": [3]},
        {"url": ["a"], "caption": [["x", "y"]], "boxes": [[box]]},
    ):
        file = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), file)
        yield b"\xff" + file.getvalue().to_pybytes()


def main(target: str, seconds: int) -> None:
    run, seeds = {"image": (image, image_seeds), "manifest": (manifest, manifest_seeds)}[target]
    corpus = SCRATCH / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(seeds()):
        (corpus / str(i)).write_bytes(seed)
    limits = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=8192"]
    print_only = ["-print_final_stats=1", f"-artifact_prefix={SCRATCH}/fault-"]
    atheris.Setup([sys.argv[0], *limits, *print_only, str(corpus)], run)
    atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(sys.argv[1], int(sys.argv[2]))
