"""Segmentation from data/: which masks count, what is chosen where, what stands beside it."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import seeing, stored, worlds
from support.students import small_student

from pipeline.core.config import SegmentationConfig
from pipeline.core.errors import PipelineError
from pipeline.data import shards
from pipeline.data.classes import read_classes
from pipeline.evaluation.segmented_split import DenseTeacher, has_masks, segmentation_metrics

PROMPTS = ["a cat", "a kitten", "a dog"]


def png(mask: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def drawn_mask(number: int) -> np.ndarray:
    """40 x 48: background, a band of class 1 or 2, some pixels that nobody judged."""
    mask = np.zeros((40, 48), np.uint8)
    mask[10:30, 10 + number % 9 : 40] = 1 + number % 2
    mask[:3] = 255
    return mask


@pytest.fixture
def data(tmp_path):
    """Rows of `stored` whose val is split into val and test, all held-out rows with masks."""
    stored.write_data(tmp_path, count=60)
    for path in sorted((tmp_path / "images").glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            row["mask"] = png(drawn_mask(int(row["image_id"], 16)))
        write_images(path, rows)
    path = tmp_path / "selection/selection.parquet"
    rows = pq.read_table(path).to_pylist()
    held_out = [row for row in rows if row["split"] == "val" and row["keep"]]
    for row in held_out[::2]:
        row["split"] = "test"
    stored._write(path, shards.SELECTION, [rows])
    texts = [{"text_id": t, "text": t, "embedding": stored.vector(9, i)}
             for i, t in enumerate(PROMPTS)]  # fmt: skip
    seeing.write(tmp_path / "teacher/texts/prompts.parquet", shards.texts_schema(32), texts)
    return tmp_path


def write_images(path: Path, rows: list[dict]) -> None:
    stored._write(path, shards.IMAGES, [rows[k : k + 5] for k in range(0, len(rows), 5)])


def change_rows(data: Path, change) -> None:
    for path in sorted((data / "images").glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            change(row)
        write_images(path, rows)


def nowhere(prompt: str):
    raise PipelineError(f"{prompt!r} is stored nowhere.")


def figures(data: Path, classes: str = "a cat, a kitten\na dog\n", teacher="none", **changes):
    file = data / "classes.txt"
    file.write_text(classes)
    config = SegmentationConfig(**worlds.segmentation(classes=str(file)) | changes)
    student = small_student(embedding_size=32, heads=4)
    return segmentation_metrics(data, "test", config, student, nowhere, teacher, 4, 1)


def test_masks_are_judged_in_what_the_student_sees_of_them(data):
    """Held-out images are 48 x 40 px and seen from x = 4 to 44; all background is exact."""
    found = figures(data)
    held_out = pq.read_table(data / "selection/selection.parquet").to_pylist()
    test = [int(r["image_id"], 16) for r in held_out if r["split"] == "test" and r["keep"]]
    seen = np.stack([drawn_mask(number)[:, 4:44] for number in test])
    known = seen[seen != 255]
    assert found["images"] == len(test) and found["classes"] == 2 and found["without_mask"] == 0
    labels = len(np.unique(known))
    assert found["mIoU"]["floor"] == pytest.approx((known == 0).mean() / labels)
    for name in ("mIoU", "mIoU_with_image", "mIoU_image_level"):
        figure = found[name]
        assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
        assert figure["floor"] < figure["ceiling"] < 1
    assert found["teacher_left_out"] == "none"


def test_an_image_without_mask_is_left_out_and_counted(data):
    before = figures(data)["images"]

    def without(row):
        if int(row["image_id"], 16) in (7, 14):
            row["mask"] = None

    change_rows(data, without)
    after = figures(data)
    assert after["images"] + after["without_mask"] == before and after["without_mask"] >= 1


def test_without_any_mask_there_is_nothing_to_judge(data):
    assert has_masks(data)
    change_rows(data, lambda row: row.update(mask=None))
    assert not has_masks(data)
    assert "no image of the split val has a mask" in figures(data)["left_out"]


def test_dense_features_of_a_teacher_that_knows_every_patch(data):
    """The class's own vector where a patch shows the class, nothing where it shows none."""
    bands = np.pad(np.repeat([[0, 1, 2, 0]], 40, axis=0).repeat(10, axis=1), ((0, 0), (4, 4)))
    change_rows(data, lambda row: row.update(mask=png(bands)))
    vectors = np.stack([stored.vector(9, i) for i in (0, 2)]).astype(np.float32)
    columns = np.stack([0 * vectors[0], *vectors, 0 * vectors[0]])
    patches = np.broadcast_to(columns, (1, 4, 4, 32))
    teacher = DenseTeacher([32, 64], lambda pixels: np.repeat(patches, len(pixels), axis=0))
    found = figures(data, "a cat\na dog\n", teacher)
    assert found["mIoU_teacher"]["value"] > 0.6 > 2 * found["mIoU_teacher"]["floor"]
    assert found["image_size_teacher"] == 32  # both sizes are as good
    assert found["mIoU_teacher"]["ceiling"] == 1


def test_a_value_without_a_class_is_named(data):
    with pytest.raises(
        PipelineError, match=r"the value 2, and .*classes\.txt names values up to 1"
    ):
        figures(data, "a cat\n")


def test_zero_may_be_ignored_and_the_floor_is_then_the_most_frequent_class(data):
    found = figures(data, background="none", zero_is="ignore")
    assert "threshold" not in found
    assert 0.2 < found["mIoU"]["floor"] <= 0.5  # one of two classes everywhere


def test_background_may_be_a_class_with_prompts_of_its_own(data):
    found = figures(data, "a kitten\na cat\na dog\n", background="class")
    assert "threshold" not in found and found["classes"] == 2


def test_windows_give_a_finer_map_at_a_larger_size(data):
    plain, windows = figures(data), figures(data, image_size=64, window=32, stride=16)
    assert windows["mIoU"]["ceiling"] > plain["mIoU"]["ceiling"]


def test_a_prompt_without_a_vector_leaves_it_out_and_says_so(data):
    found = figures(data, "a cat\na zebra\n")
    assert "'a zebra' is stored nowhere" in found["left_out"]


@pytest.mark.parametrize(("text", "message"), [
    ("a cat, a dog\na dog\n", "holds 'a dog' 2 times"),
    ("a cat,\n", "a comma with no synonym"),
    ("# nothing\n", "names 0 classes"),
    ("\n".join(map(str, range(300))), "names 300 classes"),
])  # fmt: skip
def test_class_files_that_are_wrong(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(PipelineError, match=message):
        read_classes(tmp_path / "classes.txt", "threshold")


def test_a_class_file_that_is_not_there(tmp_path):
    with pytest.raises(PipelineError, match=r"cannot be read.*evaluate\.segmentation\.classes"):
        read_classes(tmp_path / "no.txt", "threshold")


def test_zero_cannot_be_both():
    with pytest.raises(ValueError, match="set background: none"):
        SegmentationConfig(**worlds.segmentation(zero_is="ignore"))
