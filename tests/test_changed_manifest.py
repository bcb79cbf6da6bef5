"""A changed manifest costs its difference, and ends in the very files of a run from scratch."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from support import worlds

from pipeline.models import golden
from pipeline.models.teacher import Teacher
from stages.download import download
from stages.teacher_embed import teacher_embed

ADDED = ["new 0.jpg", "new 1.jpg"]


def changed_rows(rows: list[dict]) -> list[dict]:
    """Rows removed, added, edited, and all of them in another order."""
    kept = [dict(row) for row in rows if row["url"] not in ("file:3.jpg", "file:40.jpg")]
    for row in kept:
        if row["url"] == "file:7.jpg":
            row["caption"] = "edited"
    added = [{"url": f"file:{name}", "caption": name, "label": "wide"} for name in ADDED]
    return [*added, *kept[::-1]]


def run(world: worlds.World, manifest: Path, root: Path, data: Path) -> None:
    download(worlds.download_config(manifest, root), data, processes=1, threads=4)
    config = worlds.teacher_config(world.card, world.prompts)
    teacher_embed(config, data, device="cpu", workers=1)


def shards(data: Path) -> dict[str, bytes]:
    stage_folders = data / "images", data / "teacher"
    found = [
        path for stage_folder in stage_folders for path in sorted(stage_folder.rglob("*.parquet"))
    ]
    return {str(path.relative_to(data)): path.read_bytes() for path in found}


def test_only_new_images_and_new_texts_are_embedded_and_the_files_are_those_of_a_fresh_run(
    small_world, tmp_path, monkeypatch
):
    root = shutil.copytree(small_world.root, tmp_path / "pictures")
    for seed, name in enumerate(ADDED):
        (root / name).write_bytes(worlds.picture(1000 + seed, 48, 40, "JPEG"))
    manifest = worlds.write_manifest(tmp_path / "manifest.csv", changed_rows(small_world.rows))
    changed = shutil.copytree(small_world.data, tmp_path / "changed")
    before, images, texts = shards(changed), [], set()
    embed_images, embed_texts = Teacher.embed_images, Teacher.embed_texts

    def counted_images(self, pixels: np.ndarray) -> np.ndarray:
        images.append(int((pixels.reshape(len(pixels), -1) > 0).any(axis=1).sum()))
        return embed_images(self, pixels)

    def noted_texts(self, asked: list[str]) -> np.ndarray:
        texts.update(asked)
        return embed_texts(self, asked)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "embed_images", counted_images)
        patch.setattr(Teacher, "embed_texts", noted_texts)
        run(small_world, manifest, root, changed)
    views = worlds.teacher_config(small_world.card, small_world.prompts).views
    assert sum(images) == views * len(ADDED)
    assert texts - {"", *golden.TEXTS} == {"edited", *ADDED}
    run(small_world, manifest, root, tmp_path / "fresh")
    assert shards(changed) == shards(tmp_path / "fresh")
    assert shards(changed) != before
    urls = pq.read_table(tmp_path / "fresh/images")["url"].to_pylist()
    assert sorted(urls) == sorted(row["url"] for row in changed_rows(small_world.rows))
