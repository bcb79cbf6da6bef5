"""Images inside other files are listed, read without a request, and end as rows like any other."""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import server as web
from support import worlds

from pipeline.core.errors import PipelineError
from pipeline.data import shards
from pipeline.fetch import containers
from pipeline.fetch.manifest import write_lists
from pipeline.fetch.policy import FetchError, read_local
from stages.download import download
from stages.teacher_embed import teacher_embed

LIMIT = 1 << 20
PHOTOS = [worlds.picture(i, kind="JPEG") for i in range(5)]


def rows(manifest: Path, root: Path) -> list[dict]:
    paths = write_lists(manifest, root, 2, root / "lists", say=lambda note: None)
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def webdataset(folder: Path) -> Path:
    """Two tars; captions as text or in the record, a class, a member that belongs to nobody."""
    write_tar(folder / "00000.tar", {
        "a/000.jpg": PHOTOS[0], "a/000.txt": b"a cat", "a/000.json": b'{"caption": "not this"}',
        "a/001.png": PHOTOS[1], "a/001.json": b'{"caption": "a dog", "license": "CC0", "x": [1]}',
        "readme": b"nothing",
    })  # fmt: skip
    write_tar(folder / "00001.tar", {"b c.txt": "caf\xe9".encode("latin-1"), "b c.jpg": PHOTOS[2],
                                     "b c.cls": b"3"})  # fmt: skip
    return folder


def hugging_face(folder: Path) -> Path:
    """Parquet with {bytes, path} and the names of its classes; a row without bytes."""
    images = [{"bytes": photo, "path": None} for photo in PHOTOS[:2]]
    images += [{"bytes": None, "path": "x.jpg"}]
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    table = pa.table({"image": images, "text": ["one", "two", "three"], "label": [1, 0, -1]})
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=2)
    return folder


def img2dataset_output(folder: Path, host: str = "http://host") -> Path:
    """Its folders of files: records in Parquet, images beside them, one of which failed."""
    (folder / "00000").mkdir(parents=True)
    keys = ["000000000", "000000001", "000000002"]
    for key, photo in zip(keys[:2], PHOTOS, strict=False):
        (folder / f"00000/{key}.jpg").write_bytes(photo)
    table = {
        "url": [f"{host}/{key}.jpg" for key in keys], "caption": ["x", "y", "z"], "key": keys,
        "status": ["success", "success", "failed_to_download"], "sha256": ["ab" * 32] * 3,
    }  # fmt: skip
    pq.write_table(pa.table(table), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")
    return folder


# Listing


def test_a_tar_is_a_list_of_its_images_with_captions_labels_and_licences(tmp_path):
    webdataset(tmp_path / "shards")
    found = {row["url"].split("@")[0]: row for row in rows(tmp_path / "shards", tmp_path)}
    assert {url: (row["captions"], row["label"], row["license"]) for url, row in found.items()} == {
        "file:shards/00000.tar!/a/000.jpg": (["a cat"], None, None),
        "file:shards/00000.tar!/a/001.png": (["a dog"], None, "CC0"),
        "file:shards/00001.tar!/b%20c.jpg": ([], "3", None),
    }
    urls = [row["url"] for row in found.values()]
    contents = {read_local(url, tmp_path, LIMIT) for url in urls}
    assert contents == set(PHOTOS[:3])
    assert all(row["content"] for row in found.values())
    assert rows(tmp_path / "shards/*.tar", tmp_path) == rows(tmp_path / "shards", tmp_path)


def test_parquet_of_hugging_face_is_a_list_with_the_names_of_its_classes(tmp_path):
    hugging_face(tmp_path / "hf")
    found = {row["url"][-1]: row for row in rows(tmp_path / "hf", tmp_path)}
    assert [found[n]["captions"] for n in "012"] == [["one"], ["two"], ["three"]]
    assert [found[n]["label"] for n in "012"] == ["dog", "cat", None]
    assert [read_local(found[n]["url"], tmp_path, LIMIT) for n in "01"] == PHOTOS[:2]
    with pytest.raises(FetchError, match="not_found"):
        read_local(found["2"]["url"], tmp_path, LIMIT)


def test_parquet_of_img2dataset_is_a_list_of_its_images(tmp_path):
    table = {"key": ["0", "1"], "jpg": PHOTOS[:2], "caption": ["x", None], "url": ["http://a"] * 2}
    pq.write_table(pa.table(table), tmp_path / "00000.parquet")
    found = sorted(rows(tmp_path / "00000.parquet", tmp_path), key=lambda row: row["url"])
    assert [read_local(row["url"], tmp_path, LIMIT) for row in found] == PHOTOS[:2]
    assert [row["captions"] for row in found] == [["x"], []]


@pytest.mark.parametrize("make", [webdataset, hugging_face, img2dataset_output])
def test_images_that_somebody_has_are_stored_and_embedded_without_a_request(
    make, tiny_teacher, tmp_path
):
    """Every row accounted for: what has no bytes is a row that says so. The host that img2dataset's
    records name would answer, and is not asked."""
    data, prompts = tmp_path / "data", tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    good = 3 if make is webdataset else 2
    with web.serve({f"/{i:09}.jpg": photo for i, photo in enumerate(PHOTOS)}) as server:
        host = (server.url(""),) if make is img2dataset_output else ()
        make(tmp_path / "theirs", *host)
        config = worlds.download_config(tmp_path / "theirs", tmp_path)
        counts = download(config, data, processes=1, threads=2)
        teacher_embed(worlds.teacher_config(tiny_teacher, prompts), data, device="cpu", workers=1)
        assert server.requests == []
    assert counts == {"ok": 3} if good == 3 else counts == {"ok": 2, "not_found": 1}
    rows = shards.read_shard(data / "images/00000.parquet", "download").to_pylist()
    stored = {row["sha256_original"]: row for row in rows if row["status"] == "ok"}
    assert stored.keys() == {hashlib.sha256(photo).hexdigest() for photo in PHOTOS[:good]}
    vectors = shards.read_shard(data / "teacher/images/00000.parquet", "teacher_embed").to_pylist()
    assert Counter(row["image_id"] for row in vectors) == {
        row["image_id"]: 2 for row in stored.values()
    }


# Refusals


def test_a_tar_without_images_is_named(tmp_path):
    write_tar(tmp_path / "shards/1.tar", {"a.txt": b"x"})
    with pytest.raises(PipelineError, match=r"1\.tar holds no images"):
        rows(tmp_path / "shards", tmp_path)


def test_a_damaged_or_compressed_tar_is_named(tmp_path):
    (tmp_path / "1.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(PipelineError, match=r"1\.tar cannot be read as a tar"):
        rows(tmp_path / "1.tar", tmp_path)


def test_containers_outside_the_root_are_refused(tmp_path):
    webdataset(tmp_path / "shards")
    (tmp_path / "root").mkdir()
    with pytest.raises(PipelineError, match=r"does not lie below .*download\.root"):
        rows(tmp_path / "shards", tmp_path / "root")


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("file:../secret.tar!/a.jpg@0+10", "refused"),
        ("file:/etc/x.tar!/a.jpg@0+10", "refused"),
        ("file:1.tar!/a.jpg@0+99999999999", "too_large"),
        ("file:1.tar!/a.jpg@99999999999+10", "not_found"),
        ("file:none.tar!/a.jpg@0+10", "not_found"),
        ("file:1.parquet!/image@0", "unreachable"),
    ],
)
def test_a_url_that_leads_inside_a_file_is_confined_and_bounded(url, status, tmp_path):
    (tmp_path / "secret.tar").write_bytes(b"secret" * 100)
    root = tmp_path / "root"
    write_tar(root / "1.tar", {"a.jpg": PHOTOS[0]})
    (root / "1.parquet").write_bytes(np.arange(100, dtype=np.uint8).tobytes())
    with pytest.raises(FetchError) as caught:
        read_local(url, root, LIMIT)
    assert caught.value.status == status


def test_an_image_that_a_parquet_file_holds_once_for_many_rows_is_read_once(tmp_path):
    """764 bytes with 20 GB of images in them: each worker would have taken all."""
    big = pa.DictionaryArray.from_arrays(np.zeros(2000, np.int32), pa.array([b"\0" * 10_000_000]))
    paths = pa.array(["x.jpg"] * 2000)
    for name, column in {
        "image": pa.StructArray.from_arrays([big, paths], ["bytes", "path"]), "jpg": big,
    }.items():  # fmt: skip
        file = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({name: column}), file, store_schema=False, compression="zstd")
        assert file.stat().st_size < 2000
        output, errors = worlds.run_code(READ_LAST, file, name).communicate(timeout=120)
        assert output.split() == ["10000000"], errors


READ_LAST = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from pathlib import Path
from pipeline.fetch.policy import read_local
file = Path(sys.argv[1])
print(len(read_local(f"file:{file.name}!/{sys.argv[2]}@1999", file.parent, 20_000_000)))
"""


def test_a_row_group_of_more_images_than_are_read_at_once_is_refused(tmp_path, monkeypatch):
    hugging_face(tmp_path / "hf")
    (file,) = (tmp_path / "hf").iterdir()
    url = f"file:hf/{file.name}!/image@0"
    assert read_local(url, tmp_path, LIMIT) == PHOTOS[0]
    monkeypatch.setattr(containers, "MOST_OF_A_GROUP", 2 * len(PHOTOS[0]) - 1)
    os.utime(file, (1, 1))  # another file, as far as what is kept of it goes
    with pytest.raises(FetchError, match=r"unreachable: .*a row group of"):
        read_local(url, tmp_path, LIMIT)


def test_damaged_or_differing_parquet_with_images_is_named(tmp_path):
    hugging_face(tmp_path / "hf")
    image = {"bytes": PHOTOS[0], "path": None}
    pq.write_table(pa.table({"image": [image]}), tmp_path / "hf/train-00001.parquet")
    with pytest.raises(PipelineError, match=r"hf cannot be read as a collection.*columns differ"):
        rows(tmp_path / "hf", tmp_path)


def test_a_record_that_is_nested_without_end_costs_itself(tmp_path):
    write_tar(tmp_path / "1.tar", {"a.jpg": PHOTOS[0], "a.json": b"[" * 100_000})
    (row,) = rows(tmp_path / "1.tar", tmp_path)
    assert row["captions"] == []
