"""ONNX files answer as the student does, for any batch, and say how to make their pixels."""

import json
import sys
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
import torch
from support import students

from pipeline.core.errors import PipelineError
from pipeline.core.records import Preprocessing
from pipeline.models.export import (
    export_onnx,
    export_student,
    neighbour_overlap,
    quantise_onnx,
    stored_pixels,
)
from pipeline.models.onnx_files import run_onnx
from pipeline.models.student import Outputs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

HOW = Preprocessing(
    mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.2], interpolation="bilinear", resize_mode="squash"
)
small_student = partial(students.small_student, HOW)


@pytest.mark.parametrize("pool,masked", [("extra-head", True), ("cls-distill", False)])
def test_exported_student_answers_alike_for_any_batch(tmp_path, pool, masked):
    student = small_student(pool=pool, neighbourhood_mask=masked)
    assert export_onnx(student, tmp_path / "s.onnx") <= 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["s.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx")
    for count in (1, 2, 7):
        pixels = torch.randn(count, 3, 32, 32)
        found = session.run(list(Outputs._fields), {"pixels": pixels.numpy()})
        with torch.no_grad():
            expected = student.outputs(pixels)
        for ours, theirs in zip(expected, found, strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-4, rtol=0)


def test_metadata_say_how_to_make_the_pixels(tmp_path):
    export_onnx(small_student(), tmp_path / "s.onnx")
    found = {entry.key: entry.value for entry in onnx.load(tmp_path / "s.onnx").metadata_props}
    assert json.loads(found["mean"]) == [0.5, 0.4, 0.3]
    assert json.loads(found["std"]) == [0.2, 0.2, 0.2]
    assert int(found["image_size"]) == 32 and found["interpolation"] == "bilinear"
    assert found["resize_mode"] == "squash"


def test_export_leaves_the_student_as_it_was(tmp_path):
    student = small_student().train()
    export_onnx(student, tmp_path / "s.onnx")
    assert student.training


def test_a_file_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.models.export.TOLERANCE", -1.0)
    with pytest.raises(PipelineError, match="was not written"):
        export_onnx(small_student(), tmp_path / "s.onnx")
    assert list(tmp_path.iterdir()) == []


def test_without_the_optional_packages_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # importing it fails now
    with pytest.raises(PipelineError, match=r"extrahead\[export\]"):
        export_onnx(small_student(), tmp_path / "s.onnx")


def test_quantised_student_is_smaller_and_close(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.models.export.LEAST_OVERLAP", 0.0)  # noise has no neighbours
    student = small_student(embedding_size=96, heads=6)
    export_onnx(student, tmp_path / "s.onnx")
    pixels = torch.randn(14, 3, 32, 32).numpy()
    overlap = quantise_onnx(tmp_path / "s.onnx", tmp_path / "q.onnx", pixels)
    exact, small = (run_onnx(tmp_path / name, pixels)[0] for name in ("s.onnx", "q.onnx"))
    assert overlap == neighbour_overlap(exact, small)
    cosine = torch.nn.functional.cosine_similarity(torch.tensor(exact), torch.tensor(small))
    assert 0.98 < cosine.mean() <= 1 + 1e-6
    assert (tmp_path / "q.onnx").stat().st_size < 0.5 * (tmp_path / "s.onnx").stat().st_size


def test_a_quantised_student_that_ranks_otherwise_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.models.export.LEAST_OVERLAP", 1.01)
    export_onnx(small_student(), tmp_path / "s.onnx")
    with pytest.raises(PipelineError, match="ranks otherwise"):
        quantise_onnx(tmp_path / "s.onnx", tmp_path / "q.onnx", np.zeros((2, 3, 32, 32), "f"))
    assert [path.name for path in tmp_path.iterdir()] == ["s.onnx"]


def test_quantising_something_else_is_refused(tmp_path):
    (tmp_path / "s.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(PipelineError, match="was not quantised"):
        quantise_onnx(tmp_path / "s.onnx", tmp_path / "q.onnx", np.zeros((1, 3, 32, 32)))
    assert not (tmp_path / "q.onnx").exists()


def write_images(folder, jpgs: list[bytes | None]) -> None:
    folder.mkdir()
    pq.write_table(pa.table({"jpg": pa.array(jpgs, pa.binary())}), folder / "00000.parquet")


def test_command_writes_both_files_and_reports_both_figures(tmp_path):
    small_student().save(tmp_path / "student", provenance={})
    grey = simplejpeg.encode_jpeg(np.full((40, 60, 3), 90, np.uint8), colorspace="RGB")
    write_images(tmp_path / "images", [grey, None, b"damaged"])
    report = export_student(tmp_path / "student", tmp_path / "s.onnx", int8=True)
    assert (tmp_path / "s.onnx").is_file() and (tmp_path / "s.int8.onnx").is_file()
    assert "within" in report and "overlap@10" in report


def test_stored_pixels_are_the_good_images_as_the_student_wants_them(tmp_path):
    grey = simplejpeg.encode_jpeg(np.full((40, 60, 3), 102, np.uint8), colorspace="RGB")
    write_images(tmp_path / "images", [grey, None, b"damaged"])
    pixels = stored_pixels(tmp_path / "images", small_student())
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0, :, 5, 5], [-0.5, 0.0, 0.5], atol=0.03)


def test_quantising_without_good_images_says_what_to_run(tmp_path):
    write_images(tmp_path / "images", [None, b"damaged"])
    with pytest.raises(PipelineError, match="pipeline download"):
        stored_pixels(tmp_path / "images", small_student())
