"""Drawn copies of published folders, imported, downloaded and their masks read."""

import io
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import worlds
from support.finished import distill_config, evaluate_config

from pipeline.core.errors import PipelineError
from pipeline.data import shards
from pipeline.data.classes import read_classes
from pipeline.fetch.segmentation_folders import write_ade20k_manifest, write_voc_manifest
from stages.distill import distill
from stages.download import download
from stages.evaluate import evaluate
from stages.select import select
from stages.teacher_embed import teacher_embed

HEADER = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"


def palette_mask(path: Path, values: np.ndarray) -> None:
    """As VOC's: a palette whose colours are not the values, 255 at the borders."""
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def values(number: int) -> np.ndarray:
    mask = np.zeros((40, 48), np.uint8)
    mask[8:24, 8:32] = 1 + number
    mask[8, 8:32] = 255
    return mask


@pytest.fixture
def voc(tmp_path) -> Path:
    folder = tmp_path / "VOC2012"
    for i in range(3):
        photo = folder / f"JPEGImages/2007_{i:06}.jpg"
        photo.parent.mkdir(parents=True, exist_ok=True)
        photo.write_bytes(worlds.picture(i, 48, 40, "JPEG"))
        if i < 2:
            palette_mask(folder / f"SegmentationClass/2007_{i:06}.png", values(i))
    lists = folder / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_text("2007_000000\n2007_000001\n")
    (lists / "train.txt").write_text("2007_000002\n")
    return folder


@pytest.fixture
def ade(tmp_path) -> Path:
    folder = tmp_path / "ADEChallengeData2016"
    for i, part in enumerate(("training", "training", "validation")):
        photo = folder / f"images/{part}/ADE_{part}_{i:08}.jpg"
        mask = folder / f"annotations/{part}/ADE_{part}_{i:08}.png"
        for path in (photo, mask):
            path.parent.mkdir(parents=True, exist_ok=True)
        photo.write_bytes(worlds.picture(i, 48, 40, "JPEG"))
        Image.fromarray(values(i)).save(mask)
    names = ["wall", "screen door, screen", "screen, silver screen", "stall, stand", "base, stand"]
    rows = [f"{i}\t0.1\t9\t1\t0\t{name}\n" for i, name in enumerate(names, 1)]
    (folder / "objectInfo150.txt").write_text(HEADER + "".join(rows))
    return folder


def masks_of(manifest: Path, root: Path, data: Path) -> dict[str, np.ndarray]:
    """url -> the stored mask, after the download stage."""
    config = worlds.download_config(manifest, root, image_size=40, rows_per_shard=1000)
    download(config, data, processes=1, threads=2)
    rows = shards.read_shard(data / "images/00000.parquet", "download").to_pylist()
    assert all(row["status"] == "ok" and row["error"] is None for row in rows)
    return {row["url"]: np.asarray(Image.open(io.BytesIO(row["mask"]))) for row in rows}


def test_vocs_palette_masks_arrive_as_indices(voc, tmp_path):
    manifest = tmp_path / "voc.csv"
    assert write_voc_manifest(voc, manifest) == 2
    found = masks_of(manifest, voc, tmp_path / "data")
    for i in range(2):
        np.testing.assert_array_equal(found[f"file:JPEGImages/2007_{i:06}.jpg"], values(i))


def test_a_listed_image_without_a_mask_is_named(voc, tmp_path):
    with pytest.raises(PipelineError, match=r"such as SegmentationClass/2007_000002\.png"):
        write_voc_manifest(voc, tmp_path / "voc.csv", "train")
    assert not (tmp_path / "voc.csv").exists()


def test_ade20ks_masks_and_classes(ade, tmp_path):
    manifest, classes = tmp_path / "ade.parquet", tmp_path / "classes.txt"
    assert write_ade20k_manifest(ade, manifest, classes) == 3
    assert len(pq.read_table(manifest)) == 3
    found = masks_of(manifest, ade, tmp_path / "data")
    np.testing.assert_array_equal(
        found["file:images/validation/ADE_validation_00000002.jpg"], values(2)
    )
    labels = read_classes(classes, "none")
    assert labels == [
        [],
        ["wall"],
        ["screen door"],
        ["screen", "silver screen"],
        ["stall"],
        ["base"],
    ]


@pytest.mark.parametrize("write", [
    lambda folder, out: write_voc_manifest(folder, out),
    lambda folder, out: write_ade20k_manifest(folder, out, out.with_suffix(".txt")),
])  # fmt: skip
def test_another_folder_is_refused_with_what_was_expected(write, tmp_path):
    with pytest.raises(PipelineError, match="as it is published"):
        write(tmp_path, tmp_path / "out.csv")


# Imported and scored


def scored(folder: Path, manifest: Path, card: Path, tmp_path: Path, **how) -> tuple[dict, str]:
    """metrics.json's segmentation and the report, after every stage."""
    prompts = tmp_path / "prompts.txt"
    texts = [s for group in read_classes(Path(how["classes"]), "none") for s in group]
    prompts.write_text("\n".join(texts[:-1]))  # one is left to the teacher's own text tower
    data = tmp_path / "data"
    download(
        worlds.download_config(manifest, folder, rows_per_shard=1000), data, processes=1, threads=4
    )
    teacher_embed(worlds.teacher_config(card, prompts, views=1), data, device="cpu", workers=1)
    select(worlds.select_config(val=0.3, test=0.3, near_duplicates=1.0), data)
    distill(distill_config(batch=8), data, device="cpu", workers=1)
    config = evaluate_config(segmentation=worlds.segmentation(card, **how))
    found = evaluate(config, data, device="cpu", workers=1)
    return found.segmentation.model_dump(), (data / "evaluation/report.html").read_text()


def many(folder: Path, count: int, image: str, mask: str, write) -> None:
    for i in range(count):
        photo = folder / image.format(i)
        photo.parent.mkdir(parents=True, exist_ok=True)
        photo.write_bytes(worlds.picture(100 + i, 48, 40, "JPEG"))
        write(folder / mask.format(i), values(i % 2))


@pytest.mark.parametrize("kind", ["voc", "ade20k"])
def test_a_published_folder_is_imported_and_scored(kind, tmp_path, tiny_teacher):
    folder, manifest, classes = tmp_path / "set", tmp_path / "m.csv", tmp_path / "classes.txt"
    if kind == "voc":
        many(folder, 24, "JPEGImages/{}.jpg", "SegmentationClass/{}.png", palette_mask)
        lists = folder / "ImageSets/Segmentation/trainval.txt"
        lists.parent.mkdir(parents=True)
        lists.write_text("\n".join(map(str, range(24))))
        classes.write_text("aeroplane, plane\nbicycle\n")
        assert write_voc_manifest(folder, manifest) == 24
        how = {}
    else:
        names = "images/training/{}.jpg", "annotations/training/{}.png"
        many(folder, 24, *names, palette_mask)
        (folder / "objectInfo150.txt").write_text(
            HEADER + "1\t1\t1\t1\t0\twall\n2\t1\t1\t1\t0\tsky\n"
        )
        assert write_ade20k_manifest(folder, manifest, classes) == 24
        how = {"background": "none", "zero_is": "ignore"}
    found, report = scored(folder, manifest, tiny_teacher, tmp_path, classes=str(classes), **how)
    assert found["classes"] == 2 and found["images"] >= 3 and found["without_mask"] == 0
    for name in ("mIoU", "mIoU_with_image", "mIoU_image_level", "mIoU_teacher"):
        assert 0 <= found[name]["low"] <= found[name]["value"] <= found[name]["high"] <= 1
    assert found["mIoU"]["floor"] < found["mIoU"]["ceiling"] <= 1
    assert ("threshold" not in found) == (kind == "ade20k")
    assert "teacher_left_out" not in found
    assert report.count("truth: ") >= 3 and "teacher, dense features: " in report
    row = re.search(r"segmentation mIoU <small>.*?</tr>", report, re.DOTALL)[0]
    assert f"{found['mIoU']['floor']:.3f}" in row and f"{found['mIoU']['ceiling']:.3f}" in row
