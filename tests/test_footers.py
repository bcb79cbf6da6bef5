"""Footers: parsed once a shard, whatever is read of it, and not kept without end."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import stored

from pipeline.core.errors import PipelineError
from pipeline.data import footers, shards
from pipeline.training.dataset import Dataset


@pytest.fixture
def data(tmp_path):
    stored.write_data(tmp_path)
    return tmp_path


@pytest.fixture
def parsed(monkeypatch) -> list[Path]:
    """Files whose footer was parsed, each time."""
    real, paths = pq.ParquetFile, []

    def noted(path, metadata=None, **options):
        if metadata is None:
            paths.append(path)
        return real(path, metadata=metadata, **options)

    monkeypatch.setattr(shards.pq, "ParquetFile", noted)
    return paths


def test_an_epoch_parses_each_footer_once(data, parsed):
    rows = Dataset(data, "train", 32, "bicubic", captions=True, groups_in_use=1)
    for _ in range(2):  # more row groups than stay in memory
        for row in range(len(rows)):
            rows.sample(row)
    files = [*data.glob("images/*.parquet"), *data.glob("teacher/*/*.parquet")]
    assert len(rows.edges) > len(files) == 9
    assert sorted(parsed) == sorted(files)


def test_footers_are_kept_up_to_a_number_of_bytes(data, parsed, monkeypatch):
    first, second, third = sorted(data.glob("images/*.parquet"))
    sizes = [pq.read_metadata(path).serialized_size for path in (first, second, third)]
    monkeypatch.setattr(footers, "LIMIT", 2 * max(sizes))
    kept = footers.Footers()
    for path in (first, second, first, third):  # the second is the oldest then, and goes
        kept.open(path, "download").close()
    assert parsed == [first, second, third]
    for path in (first, third, second):
        kept.open(path, "download").close()
    assert parsed == [first, second, third, second]


def test_a_known_footer_reads_the_same_rows(data):
    path, kept = data / "teacher/images/00000.parquet", footers.Footers()
    for _ in range(2):
        with kept.open(path, "teacher-embed") as file:
            assert file.read().equals(pq.read_table(path))


def test_captions_in_other_row_groups_than_their_images_are_refused(data):
    path = data / "teacher/texts/00000.parquet"
    whole = pq.read_table(path)
    shards.write_shard(path, shards.texts_schema(stored.SIZE), [whole], {})
    rows = Dataset(data, "train", 32, "bicubic", captions=True)
    with pytest.raises(PipelineError, match=r"1 row groups where .* has 5.*pipeline teacher-embed"):
        rows.sample(0)
