"""What a running stage reads stays, whatever happens to the outs beside it."""

import os
import shutil
from pathlib import Path

import pytest
import test_store

from pipeline.core.errors import PipelineError
from pipeline.core.inputs import own_inputs

READER = "teacher_embed"  # which reads data/images


@pytest.fixture
def data(tmp_path) -> Path:
    test_store.run(tmp_path / "data", test_store.plan_of(1))
    return tmp_path / "data"


def test_inputs_stay_while_dvc_deletes_and_replaces_the_out(data):
    expected = test_store.texts(data)
    with own_inputs(data, READER) as inputs:
        shutil.rmtree(data / "images")
        assert test_store.texts(inputs) == expected
        test_store.run(data, test_store.plan_of(2))
        assert test_store.texts(inputs) == expected
        assert (inputs / "images/_stamp.json").is_file()
    assert not inputs.exists()
    assert test_store.texts(data) == test_store.origins(test_store.plan_of(2))


def test_an_out_of_symbolic_links_is_read_as_files(data, tmp_path):
    """As DVC makes it where its cache type is symlink."""
    expected, cache = test_store.texts(data), tmp_path / "cache"
    shutil.move(data / "images", cache)
    (data / "images").mkdir()
    for path in cache.iterdir():
        (data / "images" / path.name).symlink_to(path)
    with own_inputs(data, READER) as inputs:
        assert test_store.texts(inputs) == expected
        assert not any(path.is_symlink() for path in inputs.rglob("*"))


def test_inputs_on_another_file_system_are_linked_symbolically(data, monkeypatch):
    def other_file_system(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_file_system)
    with own_inputs(data, READER) as inputs:
        assert test_store.texts(inputs) == test_store.texts(data)


def test_an_input_that_goes_while_it_is_linked_is_named(data):
    (data / "images/00001.parquet").unlink()
    said = r"00001\.parquet is not there any more.*Run this one"
    with pytest.raises(PipelineError, match=said), own_inputs(data, READER):
        pass
    assert not list((data / ".work" / READER).iterdir())
