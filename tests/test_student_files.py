"""A student's folder: complete, self-describing, equal after loading, refused where damaged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.students import SMALL, small_student, some_pixels

from pipeline.core.config import StudentConfig
from pipeline.core.errors import PipelineError
from pipeline.core.records import Preprocessing
from pipeline.models.student import CONFIG, WEIGHTS, Student

FRESH = """
import sys, torch
from pipeline.models.student import Student
student = Student.load(sys.argv[1])
pixels = torch.load(sys.argv[2])
torch.save(list(student.outputs(pixels)), sys.argv[3])
"""


@pytest.mark.parametrize("pool", ["extra-head", "cls-distill"])
def test_saved_student_is_bit_equal_in_a_fresh_process(tmp_path, pool):
    how = Preprocessing(mean=[0.5, 0.5, 0.5], std=[0.3, 0.3, 0.3], interpolation="bilinear")
    student = Student(small_student(pool=pool).config, how).eval()
    pixels = some_pixels()
    student.save(tmp_path / "s", provenance={"steps": 7}, teacher={"name": "t"}, license="CC0-1.0")
    torch.save(pixels, tmp_path / "pixels.pt")
    threads = torch.get_num_threads()
    code = f"import torch; torch.set_num_threads({threads})\n{FRESH}"
    arguments = [tmp_path / "s", tmp_path / "pixels.pt", tmp_path / "out.pt"]
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, cwd=root)
    for ours, fresh in zip(student.outputs(pixels), torch.load(tmp_path / "out.pt"), strict=True):
        assert torch.equal(ours, fresh)
    card = json.loads((tmp_path / "s" / CONFIG).read_text())
    assert card["provenance"] == {"steps": 7} and card["teacher"] == {"name": "t"}
    assert card["license"] == "CC0-1.0" and card["preprocessing"] == how.at(32).model_dump(
        mode="json"
    )
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [CONFIG, WEIGHTS]


@pytest.fixture
def saved(tmp_path) -> Path:
    small_student().save(tmp_path, provenance={})
    return tmp_path


def test_loading_from_an_empty_folder_says_what_to_run(tmp_path):
    with pytest.raises(PipelineError, match="Run `pipeline distill` first"):
        Student.load(tmp_path)


def test_missing_weights_are_named(saved):
    (saved / WEIGHTS).unlink()
    with pytest.raises(PipelineError, match=WEIGHTS):
        Student.load(saved)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 99}'])
def test_damaged_config_is_refused(saved, text):
    (saved / CONFIG).write_text(text)
    with pytest.raises(PipelineError, match=CONFIG):
        Student.load(saved)


def test_config_with_an_ill_typed_value_names_the_key(saved):
    card = json.loads((saved / CONFIG).read_text())
    card["student"]["heads"] = "3"
    (saved / CONFIG).write_text(json.dumps(card))
    with pytest.raises(PipelineError, match="heads"):
        Student.load(saved)


def test_truncated_weights_are_refused(saved):
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(PipelineError, match="no whole safetensors file"):
        Student.load(saved)


def test_weights_of_another_shape_are_refused(saved, tmp_path):
    small_student(layers=1, embedding_size=27).save(tmp_path / "other", provenance={})
    (tmp_path / "other" / WEIGHTS).replace(saved / WEIGHTS)
    with pytest.raises(PipelineError, match="does not fit its configuration"):
        Student.load(saved)


def test_weights_of_another_run_are_refused(saved, tmp_path):
    torch.manual_seed(5)
    Student(StudentConfig(**SMALL)).save(tmp_path / "other", provenance={})
    (tmp_path / "other" / WEIGHTS).replace(saved / WEIGHTS)
    with pytest.raises(PipelineError, match="are not the weights"):
        Student.load(saved)
