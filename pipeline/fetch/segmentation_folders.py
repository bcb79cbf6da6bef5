"""Data sets with masks, in the folders in which they are published -> a manifest with masks.

Pascal VOC: JPEGImages, SegmentationClass (palette PNGs: 0 background, 1 to 20 classes, 255 borders)
and ImageSets/Segmentation. ADE20K, as ADEChallengeData2016: images and annotations (grey PNGs: 0
other, 1 to 150 classes), each with training and validation, and objectInfo150.txt.
"""

import csv
import io
from collections import Counter
from pathlib import Path
from urllib.parse import quote

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_file
from pipeline.fetch.folder import write_manifest


def write_voc_manifest(folder: Path, out: Path, split: str = "trainval") -> int:
    """The images of ImageSets/Segmentation/<split>.txt with their masks; returns how many.

    Raises PipelineError: another layout, an image or mask that is listed and missing.
    """
    names = _text(folder / f"ImageSets/Segmentation/{split}.txt", "Pascal VOC").split()
    pairs = [(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png") for name in names]
    return _write(folder, pairs, out)


def write_ade20k_manifest(folder: Path, out: Path, classes: Path) -> int:
    """All images with their masks, and the class file; returns how many images.

    A synonym that several classes have tells them not apart: only a class that begins with it keeps
    it. Raises PipelineError: another layout, an image without a mask.
    """
    table = _text(folder / "objectInfo150.txt", "ADE20K")
    rows = list(csv.DictReader(io.StringIO(table), delimiter="\t"))
    if not rows or "Name" not in rows[0] or "Idx" not in rows[0]:
        raise PipelineError(
            f"{folder / 'objectInfo150.txt'}: expected a table with tabs between Idx, ..., Name."
        )
    by_index = {int(row["Idx"]): [n.strip() for n in row["Name"].split(",")] for row in rows}
    if sorted(by_index) != list(range(1, len(by_index) + 1)):
        raise PipelineError(
            f"{folder / 'objectInfo150.txt'}: expected the indices 1 to {len(rows)}, each once."
        )
    names = _told_apart([by_index[index] for index in sorted(by_index)])
    text = "# ADE20K, values 1 to 150 of its masks.\n" + "".join(f"{', '.join(n)}\n" for n in names)
    images = sorted((folder / "images").glob("*/*.jpg"))
    if not images:
        raise PipelineError(f"{folder} holds no images/*/*.jpg, as ADE20K does.")
    inside = [path.relative_to(folder / "images") for path in images]
    pairs = [
        (f"images/{p.as_posix()}", f"annotations/{p.with_suffix('.png').as_posix()}")
        for p in inside
    ]
    count = _write(folder, pairs, out)
    write_file(classes, lambda partial: partial.write_text(text, encoding="utf-8"))
    return count


def _told_apart(classes: list[list[str]]) -> list[list[str]]:
    """Synonyms of each class without those of another one."""
    heads, held = (
        {names[0] for names in classes},
        Counter(n for names in classes for n in set(names)),
    )
    return [
        [names[0], *dict.fromkeys(n for n in names[1:] if held[n] == 1 and n not in heads)]
        for names in classes
    ]


def _write(folder: Path, pairs: list[tuple[str, str]], out: Path) -> int:
    missing = [name for pair in pairs for name in pair if not (folder / name).is_file()]
    if missing:
        raise PipelineError(
            f"{folder} lacks {len(missing)} files that should be there, such as {missing[0]}."
        )
    rows = [{"url": f"file:{quote(image)}", "mask": f"file:{quote(mask)}"} for image, mask in pairs]
    write_manifest(rows, out)
    return len(rows)


def _text(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(
            f"{path} cannot be read ({error}): name the folder in which {name} was unpacked, as it "
            "is published."
        ) from None
