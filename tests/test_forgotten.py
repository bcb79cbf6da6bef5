"""A forgotten image is found wherever data/ still holds a part of it, and nowhere else."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import seeing, worlds

from pipeline.data import shards
from pipeline.fetch.forget import FORGOTTEN, Forgotten, image_id, read_forgotten
from pipeline.verify.forgotten import elsewhere, forgotten_findings
from stages.download import download
from stages.teacher_embed import teacher_embed

URL = "http://example.org/somebody.jpg"
KEY = image_id(URL)
JPG = worlds.picture(1, kind="JPEG")
DIGEST = "5a" * 32


def images(path: Path, gone: bool) -> Path:
    other = {"row_id": "r", "image_id": "other", "url": "http://b", "status": "ok", "jpg": JPG}
    mine = {"row_id": "s", "image_id": KEY, "status": "forgotten", "error": "named", "captions": []}
    if not gone:
        mine |= {"url": URL, "status": "ok", "jpg": JPG, "caption": "them", "captions": ["them"]}
        mine |= {"sha256_original": DIGEST, "error": None}
    seeing.write(path, shards.IMAGES, [other, mine])
    return path


@pytest.fixture
def forgotten(tmp_path) -> Forgotten:
    (tmp_path / "forget.txt").write_text(URL)
    return read_forgotten(tmp_path / "forget.txt")


def places(data: Path, forgotten: Forgotten) -> list[str]:
    return [finding.place for finding in forgotten_findings(data, forgotten)]


def test_a_forgotten_row_with_its_ids_alone_is_right(tmp_path, forgotten):
    data = tmp_path / "data"
    images(data / "images/00000.parquet", gone=True)
    seeing.write(data / "selection/selection.parquet", shards.SELECTION, [
        {"image_id": KEY, "keep": False, "reason": "forgotten"}
    ])  # fmt: skip
    assert places(data, forgotten) == []


def test_bytes_vectors_and_captions_are_found_in_outs_store_and_work_folders(tmp_path, forgotten):
    data, unit = tmp_path / "data", np.eye(4, dtype=np.float16)[0]
    images(data / "images/00000.parquet", gone=True)
    expected = ["images/.store/old.parquet", ".work/download/stamp/00000.parquet"]
    for place in expected:
        images(data / place, gone=False)
    row = {"image_id": KEY, "text_id": "t", "text": "them", "embedding": unit, "view": 0}
    for place, schema in (
        ("teacher/images/00000.parquet", shards.teacher_schema(4)),
        ("teacher/texts/00000.parquet", shards.texts_schema(4)),
        ("evaluation/index/00000.parquet", shards.index_schema(4)),
    ):
        seeing.write(data / place, schema, [row])
        expected.append(place)
    (data / "evaluation/report.html").write_text(f"<a href='{URL}'>")
    (data / ".work/download/img2dataset.log").write_text("x" * (1 << 22) + URL)
    whole = (data / "images/00000.parquet").with_name("whole.parquet")
    images(whole, gone=False)
    whole.with_name("00001.parquet.partial").write_bytes(b"PAR1" + whole.read_bytes()[4:-9])
    whole.unlink()
    expected += ["evaluation/report.html", ".work/download/img2dataset.log"]
    found = places(data, forgotten)
    assert set(expected) <= set(found)
    assert set(found) - set(expected) <= {
        "images/00001.parquet.partial"
    }  # its pages are compressed
    assert "images/00000.parquet" not in found


def test_bytes_named_by_their_digest_are_found_under_any_url(tmp_path):
    images(tmp_path / "images/00000.parquet", gone=False)
    assert places(tmp_path, Forgotten(sha256=frozenset({DIGEST}))) == ["images/00000.parquet"]
    assert places(tmp_path, Forgotten(sha256=frozenset({"00" * 32}))) == []


def test_what_was_forgotten_by_its_bytes_may_have_no_vector_either(tmp_path):
    """Its row has no digest any more, but its id."""
    images(tmp_path / "images/00000.parquet", gone=True)
    vector = {"image_id": KEY, "embedding": np.eye(4, dtype=np.float16)[0]}
    seeing.write(tmp_path / "evaluation/index/00000.parquet", shards.index_schema(4), [vector])
    assert places(tmp_path, Forgotten()) == ["evaluation/index/00000.parquet"]


def test_a_row_says_by_which_lines_its_bytes_are_forgotten_and_no_digest():
    first, second, third = ("1a" * 32, "2b" * 32, "3c" * 32)
    forgotten = Forgotten(sha256=frozenset({first, second, third}))
    error = forgotten.reason(second, first)
    assert error.endswith("by SHA-256 1a1a1a1a1a1a1a1a, 2b2b2b2b2b2b2b2b")
    assert forgotten.reason("4d" * 32, None) is None
    assert forgotten.unmatched([error, FORGOTTEN]) == [third]
    assert forgotten.unmatched([]) == [first, second, third]
    assert forgotten.still_names(error) and not forgotten.still_names(FORGOTTEN)
    assert not Forgotten(sha256=frozenset({third})).still_names(error)


def test_a_damaged_shard_is_passed_over(tmp_path, forgotten):
    """Damage is a finding of its own; its bytes are searched all the same."""
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "images/00000.parquet").write_bytes(b"PAR1" + URL.encode())
    assert places(data, forgotten) == ["images/00000.parquet"]
    assert places(data, Forgotten()) == []


def test_dvcs_cache_and_each_remote_are_named_with_their_commands(tmp_path):
    assert elsewhere(tmp_path) == []
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("['remote \"backup\"']\n    url = /tmp/x\n")
    said = elsewhere(tmp_path)
    assert "dvc gc --workspace" in said[0]
    assert said[1].endswith("dvc gc --workspace --cloud --remote backup")


def test_after_forgetting_no_file_of_data_holds_bytes_vector_or_caption(small_world, tmp_path):
    """Through download and teacher_embed, whose stores and outs lie in data/. Each secret is there
    before, so that the search can find it."""
    data = shutil.copytree(small_world.data, tmp_path / "data")
    url = "file:7.jpg"
    name = image_id(url)
    (image,) = rows_of(data / "images", name)
    views, texts = (rows_of(data / "teacher" / kind, name) for kind in ("images", "texts"))
    vectors = [np.array(row["embedding"], np.float16).tobytes() for row in [*views, *texts]]
    assert len(views) == 2 and len(texts) == 1
    secrets = [image["jpg"], *vectors, image["caption"].encode(), url.encode()]
    secrets += [image[digest].encode() for digest in ("sha256", "sha256_original")]
    before = [contents(path) for path in data.rglob("*") if path.is_file()]
    assert all(any(secret in held for held in before) for secret in secrets)
    forget = tmp_path / "forget.txt"
    forget.write_text(url)
    config = worlds.download_config(small_world.manifest, small_world.root, forget=str(forget))
    counts = download(config, data, processes=1, threads=2)
    assert counts["forgotten"] == 1
    teacher = worlds.teacher_config(small_world.card, small_world.prompts)
    teacher_embed(teacher, data, device="cpu", workers=1)
    after = [contents(path) for path in data.rglob("*") if path.is_file()]
    assert not any(secret in held for secret in secrets for held in after)
    assert forgotten_findings(data, read_forgotten(forget)) == []


def contents(path: Path) -> bytes:
    """A file's bytes, and of Parquet its cells as well: its texts are compressed."""
    raw = path.read_bytes()
    return raw + str(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else raw


def rows_of(folder: Path, key: str) -> list[dict]:
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist() if row["image_id"] == key]
