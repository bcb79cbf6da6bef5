"""A folder of pictures becomes a manifest that the manifest reader and the fetcher take."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support import worlds

from pipeline.core.errors import PipelineError
from pipeline.fetch.folder import MOST_BYTES, write_folder_manifest
from pipeline.fetch.manifest import write_lists
from pipeline.fetch.policy import local_path

NAMES = ["a.jpg", "b.PNG", "cats/c d.jpeg", "cats/old/ü#?%41.webp", 'cats/it\'s "x", y.gif']


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "photos"
    for name in NAMES:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(worlds.picture(0))
    (root / "a.txt").write_text('["a caption, with \n"everything"\n', encoding="utf-8")
    (root / "notes.txt").write_text("no caption of any picture")
    (root / "data.bin").write_bytes(b"")
    (root / "album.jpg").mkdir()  # a folder in spite of its name
    return root


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_every_picture_is_a_row_whose_path_leads_back_to_it(folder, tmp_path, suffix):
    out = tmp_path / f"m{suffix}"
    assert len(write_folder_manifest(folder, out)) == len(NAMES)
    lists = write_lists(out, folder, 2, tmp_path / "lists")
    rows = [row for path in lists for row in pq.read_table(path).to_pylist()]
    found = {local_path(row["url"], folder): row for row in rows}
    assert set(found) == {folder / name for name in NAMES}
    assert all(row["content"] for row in rows)
    assert found[folder / "a.jpg"]["captions"] == ['["a caption, with \n"everything"']
    assert found[folder / "b.PNG"]["captions"] == []
    labels = {name: found[folder / name]["label"] for name in NAMES}
    assert list(labels.values()) == [None, None, "cats", "cats/old", "cats"]


def test_a_manifest_is_the_same_whenever_it_is_written(folder, tmp_path):
    for name in ("1.csv", "2.csv"):
        write_folder_manifest(folder, tmp_path / name)
    assert (tmp_path / "1.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()


def test_a_caption_that_is_no_utf8_is_named(folder, tmp_path):
    (folder / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(PipelineError, match=r"a\.jpg: its name or caption is not UTF-8"):
        write_folder_manifest(folder, tmp_path / "m.csv")
    assert not (tmp_path / "m.csv").exists()


def test_a_file_name_that_is_no_utf8_is_named(folder, tmp_path):
    (Path(str(folder)) / "caf\udce9.jpg").write_bytes(worlds.picture(0))
    with pytest.raises(PipelineError, match=r"caf.*UTF-8"):
        write_folder_manifest(folder, tmp_path / "m.csv")


@pytest.mark.parametrize(
    ("source", "out", "reason"),
    [
        ("nowhere", "m.csv", "is no folder"),
        ("photos/a.jpg", "m.csv", "is no folder"),
        ("photos/album.jpg", "m.csv", "holds no image"),
        ("photos", "m.txt", "name a manifest .csv or .parquet"),
        ("photos", "photos/a.txt", "name a manifest .csv or .parquet"),
        ("photos", "there.csv", "exists"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(folder, tmp_path, source, out, reason):
    (tmp_path / "there.csv").write_text("mine")
    with pytest.raises(PipelineError, match=reason):
        write_folder_manifest(tmp_path / source, tmp_path / out)
    assert not (tmp_path / "m.csv").exists() and (tmp_path / "there.csv").read_text() == "mine"


def test_a_caption_that_is_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    """An unpacked archive may hold a link to a file of ours, whose text would be published."""
    (tmp_path / "secret.txt").write_text("our password")
    (folder / "b.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(PipelineError, match=r"b\.txt is not taken as a caption: refused: .*out of"):
        write_folder_manifest(folder, tmp_path / "m.csv")
    assert not (tmp_path / "m.csv").exists()


def test_a_caption_that_is_a_link_within_the_folder_is_read(folder, tmp_path):
    (folder / "b.txt").symlink_to(folder / "notes.txt")
    write_folder_manifest(folder, tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_text().count("no caption of any picture") == 1


def test_a_caption_of_megabytes_is_refused(folder, tmp_path):
    (folder / "b.txt").write_text("x" * (MOST_BYTES + 1))
    with pytest.raises(PipelineError, match=r"b\.txt .*more than 1048576 bytes"):
        write_folder_manifest(folder, tmp_path / "m.csv")
