"""params.yaml is taken exactly as written, or refused in a sentence that says how to mend it."""

from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml

from pipeline.core.choices import Preset
from pipeline.core.config import SECTIONS, LossWeights, load_section
from pipeline.core.errors import PipelineError
from pipeline.core.presets import write_preset


@pytest.fixture
def params(tmp_path) -> Path:
    write_preset("demo", tmp_path / "params.yaml", force=False)
    return tmp_path / "params.yaml"


def change(params: Path, key: str, value=None, remove: bool = False) -> None:
    """Set or remove a dotted key."""
    values = yaml.safe_load(params.read_text())
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section[parent]
    if remove:
        del section[last]
    else:
        section[last] = value
    params.write_text(yaml.safe_dump(values))


def refusal(params: Path, section: str) -> str:
    with pytest.raises(PipelineError) as caught:
        load_section(params, section)
    return str(caught.value)


@pytest.mark.parametrize("preset", get_args(Preset))
@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_of_every_preset_loads(preset, section, tmp_path):
    write_preset(preset, tmp_path / "params.yaml", force=False)
    assert load_section(tmp_path / "params.yaml", section)


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_the_dtypes_of_real_work_are_written_down_by_the_hardware_and_the_demos_never(
    tmp_path, monkeypatch, fast
):
    monkeypatch.setattr("pipeline.core.devices.fast_dtype", lambda device: fast)
    path, named = tmp_path / "params.yaml", str(fast).removeprefix("torch.")
    for preset, expected in (("clip-vit-b32", named), ("demo", "float32")):
        write_preset(preset, path, force=True)
        assert load_section(path, "teacher_embed").dtype == expected
        assert load_section(path, "distill").precision == expected
    assert "precision: float32 # of matrix" in path.read_text()


def test_an_unknown_key_is_named_with_file_section_value_and_the_keys_allowed(params):
    change(params, "select.wher", "true")
    message = refusal(params, "select")
    assert str(params) in message
    assert "select.wher: unknown (found 'true')" in message
    assert "where, val, test, near_duplicates" in message


def test_an_unknown_key_of_the_student_is_answered_with_the_students_keys(params):
    change(params, "distill.student.pach_size", 8)
    message = refusal(params, "distill")
    assert "distill.student.pach_size: unknown (found 8)" in message
    assert "patch_size" in message and "learning_rate" not in message


@pytest.mark.parametrize(
    "key", ["download.rows_per_shard", "distill.student.heads", "distill.loss.l1"]
)
def test_a_missing_key_is_named_with_its_place(params, key):
    change(params, key, remove=True)
    assert f"{key}: missing" in refusal(params, key.split(".")[0])


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("download.rows_per_shard", "4", "integer"),
        ("download.rows_per_shard", 4.0, "integer"),
        ("download.rows_per_shard", True, "integer"),
        ("download.rows_per_shard", 0, "greater than 0"),
        ("download.robots", "yes", "boolean"),
        ("download.timeout", float("inf"), "finite"),
        ("download.quality", 101, "less than or equal to 100"),
        ("download.allow", "localhost", "list"),
        ("teacher_embed.dtype", "float16", "'bfloat16' or 'float32'"),
        ("teacher_embed.crop_area", [0.5], "at least 2"),
        ("teacher_embed.crop_area", [0.9, 0.5], "[smallest, largest]"),
        ("teacher_embed.crop_area", [0.5, 1.5], "whole image"),
        ("select.val", float("nan"), "less than or equal to 1"),
        ("select.val", 0.9, "leave nothing to train on"),
        ("distill.seed", -1, "greater than or equal to 0"),
        ("distill.seed", 2**32, "less than 4294967296"),
        ("distill.student", [1], "dictionary"),
        ("distill.student.patch_size", 7, "not a multiple of patch_size 7"),
        ("distill.student.heads", 7, "not a multiple of heads 7"),
        ("distill.student.pool", "max", "'extra-head', 'mean', 'cls' or 'cls-distill'"),
        ("distill.loss", dict.fromkeys(LossWeights.model_fields, 0.0), "every weight is 0"),
        ("evaluate.prompts", "a red circle", "list"),
    ],
)
def test_a_value_of_another_kind_is_named_with_what_is_allowed(params, key, value, allowed):
    change(params, key, value)
    message = refusal(params, key.split(".")[0])
    assert str(params) in message and key.split(".")[0] in message
    assert key.split(".")[-1] in message or key.split(".")[-2] in message
    assert allowed in message


def test_every_finding_of_a_section_is_told_at_once(params):
    change(params, "download.rows_per_shard", "4")
    change(params, "download.speed", 9)
    message = refusal(params, "download")
    assert "download.rows_per_shard" in message and "download.speed" in message


def test_a_section_is_judged_without_the_others(params):
    change(params, "distill.steps", "many")
    assert load_section(params, "download").rows_per_shard == 1200


def test_a_missing_section_is_named(params):
    change(params, "select", remove=True)
    assert "section select is missing" in refusal(params, "select")


def test_an_unknown_section_is_named_with_those_allowed(params):
    change(params, "distil", {})
    message = refusal(params, "download")
    assert "unknown section distil" in message and ", ".join(SECTIONS) in message


@pytest.mark.parametrize("value", [None, 3, "text", []])
def test_a_section_that_holds_no_keys_is_refused(params, value):
    change(params, "select", value)
    assert "select: found" in refusal(params, "select")


@pytest.mark.parametrize(
    "data", [b"download: [", b"\xff\xfe\x00", b"", b"- a list\n", b"just text", b"a: *nowhere"]
)
def test_a_file_that_is_no_yaml_of_sections_is_named(params, data):
    params.write_bytes(data)
    assert str(params) in refusal(params, "download")


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    assert "pipeline init" in refusal(tmp_path / "none.yaml", "download")
    assert str(tmp_path) in refusal(tmp_path, "download")


@pytest.mark.parametrize("written", ["1e-05", "1e-5", "5.e-3", "2.5E-4", ".5e-2", "1e+1"])
def test_numbers_as_dvc_writes_them_are_numbers(params, written):
    """`dvc exp run -S distill.learning_rate=0.00001` writes 1e-05, a text to YAML 1.1."""
    text = params.read_text().replace("learning_rate: 0.002", f"learning_rate: {written}")
    params.write_text(text)
    assert load_section(params, "distill").learning_rate == float(written)


def test_a_url_and_a_version_stay_texts(params):
    for text in ("1e-5x", "e5", "1.2.3"):
        change(params, "select.where", text)
        assert load_section(params, "select").where == text


def test_parameters_cannot_be_changed_after_loading(params):
    config = load_section(params, "download")
    with pytest.raises(ValueError, match="frozen"):
        config.rows_per_shard = 8


def test_a_preset_never_replaces_a_file_unless_told_to(params):
    params.write_text("mine")
    with pytest.raises(PipelineError, match="--force"):
        write_preset("demo", params, force=False)
    assert params.read_text() == "mine"
    write_preset("demo", params, force=True)
    assert load_section(params, "download")
