"""What a running stage reads stays, whatever happens to the outs beside it."""

import os
import shutil
from pathlib import Path

import pytest
from support import plans

from pipeline.core.errors import PipelineError
from pipeline.core.inputs import own_inputs

READER = "teacher_embed"  # which reads data/images


@pytest.fixture
def data(tmp_path) -> Path:
    plans.run(tmp_path / "data", plans.plan_of(1))
    return tmp_path / "data"


def test_inputs_stay_while_dvc_deletes_and_replaces_the_out(data):
    expected = plans.texts(data)
    with own_inputs(data, READER) as inputs:
        shutil.rmtree(data / "images")
        assert plans.texts(inputs) == expected
        plans.run(data, plans.plan_of(2))
        assert plans.texts(inputs) == expected
        assert (inputs / "images/_stamp.json").is_file()
    assert not inputs.exists()
    assert plans.texts(data) == plans.origins(plans.plan_of(2))


def test_an_out_of_symbolic_links_is_read_as_files(data, tmp_path):
    """As DVC makes it where its cache type is symlink."""
    expected, cache = plans.texts(data), tmp_path / "cache"
    shutil.move(data / "images", cache)
    (data / "images").mkdir()
    for path in cache.iterdir():
        (data / "images" / path.name).symlink_to(path)
    with own_inputs(data, READER) as inputs:
        assert plans.texts(inputs) == expected
        assert not any(path.is_symlink() for path in inputs.rglob("*"))


def test_inputs_on_another_file_system_are_linked_symbolically(data, monkeypatch):
    def other_file_system(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_file_system)
    with own_inputs(data, READER) as inputs:
        assert plans.texts(inputs) == plans.texts(data)


def test_an_input_that_goes_while_it_is_linked_is_named(data):
    (data / "images/00001.parquet").unlink()
    said = r"00001\.parquet is not there any more.*Run this one"
    with pytest.raises(PipelineError, match=said), own_inputs(data, READER):
        pass
    assert not list((data / ".work" / READER).iterdir())
