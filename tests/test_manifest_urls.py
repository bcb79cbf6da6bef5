"""What cannot be meant in a manifest is said before any work, with what to set."""

import pytest
from support import worlds

from pipeline.core.errors import PipelineError
from stages.download import download


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(worlds.picture(i, kind="JPEG"))
    return folder


def refused(tmp_path, root, urls) -> str:
    """What download says of a manifest with these urls; it makes nothing."""
    rows = [{"url": url} for url in urls]
    manifest = worlds.write_manifest(tmp_path / "m.csv", rows)
    config = worlds.download_config(manifest, root)
    with pytest.raises(PipelineError) as caught:
        download(config, tmp_path / "data", processes=1, threads=2)
    assert not (tmp_path / "data/images").exists()
    return str(caught.value)


def test_a_root_that_is_not_there_is_named_with_the_key(photos, tmp_path):
    said = refused(tmp_path, tmp_path / "fotos", ["file:0.jpg", "file:1.jpg"])
    assert "download.root" in said and str(tmp_path / "fotos") in said and "'file:0.jpg'" in said


def test_a_root_with_none_of_the_images_is_named_with_the_reason(photos, tmp_path):
    said = refused(tmp_path, tmp_path, ["file:0.jpg", "file:1.jpg"])
    assert "not one of the 2 images" in said and "download.root" in said and "not_found" in said


def test_a_forgotten_scheme_is_named_with_the_word_that_is_missing(photos, tmp_path):
    said = refused(tmp_path, photos, ["0.jpg", "1.jpg"])
    assert "write `file:0.jpg`" in said and "That file is there" in said


def test_one_forgotten_scheme_is_a_note_and_the_others_are_fetched(photos, tmp_path, capsys):
    rows = [{"url": url} for url in ("file:0.jpg", "file:1.jpg", "2.jpg")]
    config = worlds.download_config(worlds.write_manifest(tmp_path / "m.csv", rows), photos)
    statuses = download(config, tmp_path / "data", processes=1, threads=2)
    assert statuses["ok"] == 2
    said = capsys.readouterr().err
    assert "1 urls name no scheme" in said and "`file:2.jpg`" in said
    lines = said.splitlines()  # long work says at once what it does
    assert any(line.startswith("download: 3 images to fetch; img2dataset starts") for line in lines)


def test_an_absolute_root_and_a_relative_one_give_the_same_bytes(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"url": f"file:{i}.jpg"} for i in range(3)]
    manifest = worlds.write_manifest(tmp_path / "m.csv", rows)
    for name, root in (("a", photos), ("b", photos.relative_to(tmp_path))):
        download(worlds.download_config(manifest, root), tmp_path / name, processes=1, threads=2)
    files = [sorted((tmp_path / name / "images").iterdir()) for name in ("a", "b")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
