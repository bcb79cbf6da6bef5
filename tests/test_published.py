"""Published checkpoints: recognised and converted, never executed."""

import enum
import io
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from support.published import checkpoint_of, small_student

from pipeline.core.errors import PipelineError
from pipeline.models.published import import_checkpoint
from pipeline.models.student import Student, read_card


@pytest.fixture
def teacher_enum(monkeypatch):
    """A member of an enum of a module `_types`, which is importable only while it is pickled."""
    module = types.ModuleType("_types")
    kind = enum.Enum("TeacherModelArgs", {"VIT_B_32": "ViT-B/32"}, module="_types")
    module.TeacherModelArgs = kind
    monkeypatch.setitem(sys.modules, "_types", module)
    return kind.VIT_B_32


@pytest.mark.parametrize("variant", [True, False])
def test_published_file_becomes_a_student_of_the_same_outputs(
    tmp_path, monkeypatch, teacher_enum, variant
):
    student, file = small_student(variant), tmp_path / "published.pt"
    torch.save(checkpoint_of(student, teacher_enum), file)
    monkeypatch.delitem(sys.modules, "_types")
    import_checkpoint(file, tmp_path / "out")
    imported, pixels = Student.load(tmp_path / "out"), torch.randn(2, 3, 56, 56)
    assert imported.config == student.config
    how = imported.preprocessing  # the published training code squashed whole images, bilinear
    assert (how.image_size, how.resize_mode, how.interpolation) == (56, "squash", "bilinear")
    for ours, theirs in zip(imported.outputs(pixels), student.outputs(pixels), strict=True):
        assert torch.equal(ours, theirs)
    card = read_card(tmp_path / "out")
    assert card.provenance["epoch"] == 19 and card.provenance["loss_y_val"] == 1.5781
    assert card.provenance["loss_y_train"] == 1.6
    assert card.provenance["imported_from"] == "published.pt"
    assert "ViT-B/32" in str(card.teacher)
    assert "_types" not in sys.modules


class Hostile:
    def __init__(self, target: Path, function=os.mkdir):
        self.target, self.function = target, function

    def __reduce__(self):
        return self.function, (str(self.target),)


def refused(file: Path, out: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        import_checkpoint(file, out)
    assert not out.exists()
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_hostile_checkpoint_is_refused_and_not_executed(tmp_path):
    checkpoint = checkpoint_of(small_student(True), Hostile(tmp_path / "touched"))
    torch.save(checkpoint, tmp_path / "hostile.pt")
    assert "asks for code" in refused(tmp_path / "hostile.pt", tmp_path / "out")
    assert not (tmp_path / "touched").exists()


def test_hostile_plain_pickle_is_refused_and_not_executed(tmp_path):
    (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "touched")))
    refused(tmp_path / "hostile.pt", tmp_path / "out")
    assert not (tmp_path / "touched").exists()


def test_code_that_hides_behind_the_name_of_the_enum_module_is_not_executed(
    tmp_path, monkeypatch, teacher_enum
):
    def touch(target):
        Path(target).touch()

    touch.__module__, touch.__qualname__ = "_types", "touch"
    sys.modules["_types"].touch = touch
    checkpoint = checkpoint_of(small_student(True), Hostile(tmp_path / "touched", touch))
    torch.save(checkpoint, tmp_path / "hidden.pt")
    import_checkpoint(tmp_path / "hidden.pt", tmp_path / "out")
    assert not (tmp_path / "touched").exists()


def test_missing_file_is_refused(tmp_path):
    refused(tmp_path / "none.pt", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_foreign_bytes_are_refused(tmp_path, content):
    (tmp_path / "foreign.pt").write_bytes(content)
    refused(tmp_path / "foreign.pt", tmp_path / "out")


def test_truncated_checkpoint_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save(checkpoint_of(small_student(True), None), buffer)
    (tmp_path / "half.pt").write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    refused(tmp_path / "half.pt", tmp_path / "out")


def without(name: str):
    return lambda state: state.pop(name)


def replaced(name: str, tensor: torch.Tensor):
    return lambda state: state.update({name: tensor})


@pytest.mark.parametrize(
    "change",
    [
        without("ln_post.weight"),
        without("conv1.weight"),
        without("transformer.resblocks.1.ln_2.bias"),
        replaced("positional_embedding", torch.zeros(15, 36)),
        replaced("conv1.weight", torch.zeros(36, 4, 14, 14)),
        replaced("conv1.weight", torch.full((36, 3, 14, 14), float("nan"))),
        replaced("ln_post.weight", torch.ones(36)),
        replaced("transformer.resblocks.0.ln_1.bias", torch.zeros(7)),
        replaced("stranger", torch.zeros(7)),
        replaced("conv1.weight", "text"),
        replaced("transformer.resblocks", torch.zeros(1)),
    ],
)
def test_state_of_another_network_is_refused(tmp_path, change):
    checkpoint = checkpoint_of(small_student(True), None)
    checkpoint["model_state_dict"] = dict(checkpoint["model_state_dict"])
    change(checkpoint["model_state_dict"])
    torch.save(checkpoint, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", tmp_path / "out")


@pytest.mark.parametrize("content", [[1, 2], {"weights": 1}, {"model_state_dict": [1]}])
def test_file_without_a_state_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    assert "model_state_dict" in refused(tmp_path / "other.pt", tmp_path / "out")
