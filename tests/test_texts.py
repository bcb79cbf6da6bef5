"""Prompt files as people write them, and names for texts."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import PipelineError
from pipeline.data.texts import (
    box_texts,
    class_prompts,
    labels,
    read_prompts,
    read_templates,
    text_id,
)


def prompts(tmp_path, data: bytes) -> list[str]:
    (tmp_path / "prompts.txt").write_bytes(data)
    return read_prompts(tmp_path / "prompts.txt")


def test_prompts_are_the_distinct_lines_sorted_without_comments(tmp_path):
    data = b"# a comment\n b cat \n\na dog\nb cat\r\na #1 dog\n   \n"
    assert prompts(tmp_path, data) == ["a #1 dog", "a dog", "b cat"]


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    assert prompts(tmp_path, "\ufeffa dog\n".encode()) == ["a dog"]
    assert prompts(tmp_path, "\ufeff# comment\na dog\n".encode()) == ["a dog"]


def test_a_prompt_file_may_be_empty(tmp_path):
    assert prompts(tmp_path, b"") == []


@pytest.mark.parametrize("data", [None, b"\xff\xfe\x00", "folder"])
def test_a_prompt_file_that_cannot_be_read_is_named_with_its_key(tmp_path, data):
    path = tmp_path / "prompts.txt"
    if data == "folder":
        path.mkdir()
    elif data:
        path.write_bytes(data)
    with pytest.raises(PipelineError, match=r"prompts\.txt.*teacher_embed\.prompts"):
        read_prompts(path)


def test_templates_are_prompts_with_a_place_for_a_label(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("# of classes\na photo of a {}\n{}\n{}\n")
    assert read_templates(file) == ["a photo of a {}", "{}"]
    assert class_prompts(read_templates(file), "dog {or cat}") == [
        "a photo of a dog {or cat}", "dog {or cat}",
    ]  # fmt: skip


def test_a_template_without_a_place_for_a_label_is_named(tmp_path):
    (tmp_path / "templates.txt").write_text("a {}\na photo of {a}\n")
    with pytest.raises(PipelineError, match=r"templates\.txt: 'a photo of \{a\}' has no \{\}"):
        read_templates(tmp_path / "templates.txt")


def test_templates_that_cannot_be_read_are_named_with_their_keys(tmp_path):
    with pytest.raises(PipelineError, match=r"none\.txt.*teacher_embed\.templates"):
        read_templates(tmp_path / "none.txt")


def test_a_text_is_named_by_its_image_and_its_words():
    names = {text_id(i, t) for i in (None, "a", "b") for t in ("x", "y", "")}
    assert len(names) == 9 and all(len(name) == 32 for name in names)
    assert text_id("a", "x") == text_id("a", "x")


def test_labels_are_distinct_sorted_and_not_blank(tmp_path):
    for i, found in enumerate([["b", "a", " "], ["a", None, ""]]):
        pq.write_table(pa.table({"label": found}), tmp_path / f"{i}.parquet")
    assert labels(tmp_path) == ["a", "b"]


def test_box_texts_are_distinct_sorted_and_not_blank(tmp_path):
    folder = tmp_path / "images [1]"
    folder.mkdir()
    kind = pa.list_(pa.struct([("text", pa.string()), ("x0", pa.float32())]))
    for i, texts in enumerate([["b", "a", " "], ["a", None], []]):
        boxes = pa.array([[{"text": t, "x0": 0.0} for t in texts], None], kind)
        pq.write_table(pa.table({"boxes": boxes}), folder / f"{i}.parquet")
    assert box_texts(folder) == ["a", "b"]
