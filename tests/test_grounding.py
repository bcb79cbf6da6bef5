"""Pointing from data/: which boxes count, and which can be reached."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import seeing, stored
from support.students import small_student

from pipeline.data import shards
from pipeline.evaluation.grounding import pointing_metrics

HELD_OUT = 0  # row 0 of `stored` is of split val: 48 x 40 px, seen from x = 4 to 44


@pytest.fixture
def data(tmp_path):
    stored.write_data(tmp_path, count=20)
    texts = [{"text_id": t, "text": t, "embedding": stored.vector(9, i)}
             for i, t in enumerate(["a", "b"])]  # fmt: skip
    seeing.write(tmp_path / "teacher/texts/prompts.parquet", shards.texts_schema(32), texts)
    return tmp_path


def with_boxes(data, *boxes: tuple):
    """Boxes (text, x0, y0, x1, y1) on the held-out row; the figures."""
    path = data / "images/00000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[HELD_OUT]["boxes"] = [dict(zip(shards.BOX.names, box, strict=True)) for box in boxes]
    stored._write(path, shards.IMAGES, [rows[k : k + 5] for k in range(0, len(rows), 5)])
    student = small_student(embedding_size=32, heads=4)
    return pointing_metrics(data, "val", student, 8, 1)


def test_boxes_of_one_text_count_as_one(data):
    """Each half of the image alone is right about half of the time; together they are certain."""
    halves = ("a", 0, 0, 24, 40), ("a", 24, 0, 48, 40)
    found = with_boxes(data, *halves)
    assert found.facts["pairs"] == 1
    assert found["pointing"].value == found["energy"].value == found["pointing"].floor == 1


def test_what_no_patch_can_reach_lowers_the_ceiling(data):
    """One box is cropped away, one lies between patch centres, one is in reach."""
    grid_step = 40 / 4
    between = ("b", 4 + 0.6 * grid_step, 6, 4 + 1.4 * grid_step, 34)
    assert with_boxes(data, ("a", 0, 0, 3, 40), between)["pointing"].ceiling == 0
    found = with_boxes(data, ("a", 0, 0, 3, 40), ("b", 4, 0, 44, 40))
    for name in ("pointing", "energy", "pointing_centred", "energy_centred"):
        assert found[name].ceiling == 0.5
        assert found[name].value <= 0.5 + 1e-9


def test_texts_of_an_image_share_its_luck(data):
    """Two texts of the only image with boxes: the interval is that of one image."""
    found = with_boxes(data, ("a", 4, 0, 44, 40), ("b", 4, 0, 44, 40))
    one = with_boxes(data, ("a", 4, 0, 44, 40))
    assert found.facts["pairs"] == 2
    np.testing.assert_allclose(found["pointing"].low, one["pointing"].low)
