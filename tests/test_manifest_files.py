"""Manifests as people have them: each format and each usual list is read, each row accounted for."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import worlds

from pipeline.core.errors import PipelineError
from pipeline.fetch.forget import read_forgotten
from pipeline.fetch.manifest import image_id, write_lists

BOX = {"text": "a cat", "x0": 1.0, "y0": 2.0, "x1": 30.0, "y1": 40.0}


def rows(manifest: Path, tmp_path: Path, **options) -> list[dict]:
    said = options.pop("said", [])
    paths = write_lists(
        manifest, tmp_path, 1_000_000, tmp_path / "lists", say=said.append, **options
    )
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def read(manifest: Path, tmp_path: Path, **options) -> dict[str, dict]:
    return {row["url"]: row for row in rows(manifest, tmp_path, **options)}


def captions(manifest: Path, tmp_path: Path, **options) -> dict[str, list[str]]:
    return {url: row["captions"] for url, row in read(manifest, tmp_path, **options).items()}


def refusal(manifest: Path, tmp_path: Path, **options) -> str:
    with pytest.raises(PipelineError) as caught:
        rows(manifest, tmp_path, **options)
    return str(caught.value)


def parquet(path: Path, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


# Lists that are known by name


def test_laion(tmp_path):
    """Parquet parts; capitals, and columns that nobody asked for."""
    for part, urls in enumerate((["http://a", "http://b"], ["http://c", "http://a"])):
        parquet(
            tmp_path / f"laion/part-{part:05}.snappy.parquet",
            SAMPLE_ID=[float(part), 2.0],
            URL=urls,
            TEXT=["first of all the words", None] if part == 0 else ["a cat", "a dog & a cat"],
            HEIGHT=[300, 400],
            WIDTH=[300, 400],
            LICENSE=["?", "cc0"],
            NSFW=["UNLIKELY", "UNSURE"],
            similarity=[0.3, 0.31],
        )
    (tmp_path / "laion/_SUCCESS").write_text("")
    said = []
    found = rows(tmp_path / "laion", tmp_path, said=said)
    assert sorted((row["url"], row["occurrence"]) for row in found) == [
        ("http://a", 0), ("http://a", 1), ("http://b", 0), ("http://c", 0),
    ]  # fmt: skip
    first = {row["url"]: row for row in found if row["occurrence"] == 0}
    assert first["http://a"]["captions"] == ["first of all the words", "a dog & a cat"]
    assert first["http://b"]["captions"] == [] and first["http://b"]["license"] == "cc0"
    assert len(said) == 1 and "1 rows repeat a url: 1 images" in said[0]


def test_cc3m(tmp_path):
    """TSV without a header, quotes that quote nothing; the columns are named by number."""
    path = tmp_path / "Train_GCC-training.tsv"
    path.write_text('a "nice" day\thttp://a\n"unbalanced\thttp://b\nit\'s, fine\thttp://c?x="1"\n')
    message = refusal(path, tmp_path)
    assert "begins with a row of data" in message and "url: 2" in message
    found = captions(path, tmp_path, columns={"url": 2, "caption": 1})
    assert found == {
        "http://a": ['a "nice" day'],
        "http://b": ['"unbalanced'],
        'http://c?x="1"': ["it's, fine"],
    }
    gzipped = tmp_path / "cc3m.tsv.gz"
    gzipped.write_bytes(gzip.compress(b"caption\turl\n" + path.read_bytes()))
    assert captions(gzipped, tmp_path) == found


def test_datacomp(tmp_path):
    digest = "AB" * 32
    path = parquet(
        tmp_path / "metadata/0a1b.parquet",
        uid=["u1", "u2"],
        url=["http://a", "http://b"],
        text=["one two three four", "five"],
        original_width=[640, 640],
        original_height=[480, 480],
        clip_b32_similarity_score=[0.3, 0.2],
        face_bboxes=[[[0.1, 0.2, 0.3, 0.4]], None],
        sha256=[digest, ""],
    )
    found = read(path.parent, tmp_path)
    assert found["http://a"]["sha256_expected"] == digest.lower()
    assert found["http://b"]["sha256_expected"] is None
    assert found["http://a"]["captions"] == ["one two three four"]


def test_coco(tmp_path):
    """A row per box and a row per caption: one image with all of them, in order, each once."""
    table = [
        {"coco_url": "http://a", "caption": "one", "boxes": [BOX]},
        {"coco_url": "http://b", "caption": "other", "boxes": None},
        {"coco_url": "http://a", "caption": "two", "boxes": [BOX | {"text": "a dog"}]},
        {"coco_url": "http://a", "caption": "one", "boxes": [BOX, BOX | {"x0": 3.0}]},
    ]
    as_parquet = tmp_path / "coco.parquet"
    pq.write_table(pa.Table.from_pylist(table), as_parquet)
    as_lines = tmp_path / "coco.jsonl"
    as_lines.write_text("".join(json.dumps(row) + "\n" for row in table))
    found = rows(as_parquet, tmp_path)
    assert found == rows(as_lines, tmp_path) and len(found) == 4
    first = next(row for row in found if row["url"] == "http://a" and row["occurrence"] == 0)
    assert first["captions"] == ["one", "two"] and first["caption"] == "one"
    assert [box["text"] for box in first["boxes"]] == ["a cat", "a dog", "a cat"]
    assert [box["x0"] for box in first["boxes"]] == [1.0, 1.0, 3.0]


# Formats


def test_every_format_of_the_same_rows_gives_the_same_lists(tmp_path):
    table = [
        {"url": "http://a,b", "caption": 'say "x"', "label": "l"},
        {"url": "http://c", "caption": None, "label": None},
    ]
    csv_path = worlds.write_manifest(tmp_path / "1/m.csv", table)
    as_text = csv_path.read_bytes()
    manifests = [
        csv_path,
        tmp_path / "2/m.csv.gz",
        tmp_path / "3/m.tsv",
        tmp_path / "4/m.jsonl",
        tmp_path / "5/m.parquet",
        tmp_path / "6",
        tmp_path / "7/part-*.csv",
    ]
    for path in manifests[1:]:
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
    manifests[1].write_bytes(gzip.compress(as_text))
    manifests[2].write_text('url\tcaption\tlabel\nhttp://a,b\t"say ""x"""\tl\nhttp://c\t\t\n')
    manifests[3].write_text("".join(json.dumps(row) + "\n" for row in table))
    pq.write_table(pa.Table.from_pylist(table), manifests[4])
    for folder, name in ((tmp_path / "6", "a"), (tmp_path / "7", "part-")):
        header, first, second = as_text.decode().splitlines(keepends=True)
        (folder / f"{name}0.csv").write_text(header + first)
        (folder / f"{name}1.csv").write_text(header + second)
    (tmp_path / "7/other.txt").write_text("not a manifest")
    found = [rows(manifest, tmp_path) for manifest in manifests]
    assert len(found[0]) == 2 and all(other == found[0] for other in found)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_folder_whose_files_disagree_is_refused_with_both(kind, tmp_path):
    for number, column in enumerate(("caption", "alt")):
        name = tmp_path / f"m/{number}.{kind}"
        if kind == "csv":
            worlds.write_manifest(name, [{"url": "a", column: "b"}])
        else:
            parquet(name, **{"url": ["a"], column: ["b"]})
    message = refusal(tmp_path / "m", tmp_path)
    assert f"0.{kind}" in message and f"1.{kind}" in message and "alt" in message


def test_a_folder_of_several_formats_asks_for_a_pattern(tmp_path):
    worlds.write_manifest(tmp_path / "m/a.csv", [{"url": "a"}])
    parquet(tmp_path / "m/b.parquet", url=["a"])
    message = refusal(tmp_path / "m", tmp_path)
    assert ".csv, .parquet" in message and "pattern" in message
    assert set(read(tmp_path / "m/*.csv", tmp_path)) == {"a"}


# Columns


@pytest.mark.parametrize("names", [("url", "image_url"), ("URL", "coco_url")])
def test_two_columns_that_could_be_the_url_are_named(names, tmp_path):
    path = parquet(tmp_path / "m.parquet", **{name: [name] for name in names})
    message = refusal(path, tmp_path)
    assert " and ".join(names) in message and f"{{url: {names[0]}}}" in message
    assert set(read(path, tmp_path, columns={"url": names[1]})) == {names[1]}


def test_two_columns_of_captions_are_refused_until_one_or_none_is_named(tmp_path):
    path = parquet(tmp_path / "m.parquet", url=["a"], TEXT=["x"], top_caption=["y"])
    assert "TEXT and top_caption" in refusal(path, tmp_path)
    assert captions(path, tmp_path, columns={"caption": "top_caption"}) == {"a": ["y"]}
    assert captions(path, tmp_path, columns={"caption": None}) == {"a": []}


def test_a_mapped_column_that_is_missing_is_named(tmp_path):
    path = worlds.write_manifest(tmp_path / "m.csv", [{"url": "a", "alt": "b"}])
    message = refusal(path, tmp_path, columns={"caption": "title"})
    assert "no column 'title'" in message and "found url, alt" in message


def test_a_column_of_texts_that_is_not_used_is_pointed_out(tmp_path):
    path = worlds.write_manifest(
        tmp_path / "m.csv", [{"url": "a", "alt": "a red cat on a mat", "source": "web"}]
    )
    said = []
    rows(path, tmp_path, said=said)
    assert len(said) == 1 and "column alt (no caption is read" in said[0]
    said = []
    rows(path, tmp_path, said=said, columns={"caption": "alt"})
    assert said == []


# What costs itself


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "list"])
def test_a_caption_that_is_not_utf_8_costs_itself(kind, tmp_path):
    """And a box of bytes beside it stays whole."""
    path = tmp_path / f"m.{'parquet' if kind == 'list' else kind}"
    if kind == "csv":
        path.write_bytes("url,caption\na,caf\xe9\nb,good\n".encode("latin-1"))
    elif kind == "jsonl":
        lines = '{"url": "a", "caption": "caf\xe9"}\n{"url": "b", "caption": "good"}\n'
        path.write_bytes(lines.encode("latin-1"))
    else:
        cells = pa.array([b"caf\xe9", b"good"], pa.binary())
        cells = pa.Array.from_buffers(pa.string(), 2, cells.buffers())
        if kind == "list":
            cells = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), cells)
        pq.write_table(pa.table({"url": ["a", "b"], "caption": cells}), path)
    said = []
    assert captions(path, tmp_path, said=said) == {"a": [], "b": ["good"]}
    assert len(said) == 1 and "1 captions are not UTF-8" in said[0]


def test_more_than_a_thousand_captions_or_boxes_of_one_image_are_cut_and_said(tmp_path):
    many = [
        {"url": "a", "caption": f"c{i}", "boxes": [BOX | {"x0": i / 100}]} for i in range(1_200)
    ]
    pq.write_table(pa.Table.from_pylist(many), tmp_path / "m.parquet")
    said = []
    found = rows(tmp_path / "m.parquet", tmp_path, said=said)
    first = next(row for row in found if row["occurrence"] == 0)
    assert len(found) == 1_200 and len(first["captions"]) == len(first["boxes"]) == 1_000
    assert first["captions"][::999] == ["c0", "c999"]
    assert "of 1 images only the first 1,000" in said[-1]


def test_a_manifest_of_a_million_equal_urls_stays_small_in_memory(tmp_path):
    """A few KB of Parquet, for equal cells are stored once."""
    column = pa.array(["http://a/" + 200 * "x"]).dictionary_encode()
    million = pa.DictionaryArray.from_arrays(pa.array([0] * 10**6, pa.int32()), column.dictionary)
    pq.write_table(pa.table({"url": million}), tmp_path / "m.parquet", write_statistics=False)
    assert (tmp_path / "m.parquet").stat().st_size < 10_000
    code = """
        import sys
        from pathlib import Path
        from pipeline.fetch.manifest import write_lists
        folder = Path(sys.argv[1])
        write_lists(folder / "m.parquet", folder, 2_000_000, folder / "lists")
        print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    """
    process = worlds.run_code(code, tmp_path)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert int(out.splitlines()[-1]) < 1_000_000  # KB
    assert (
        sum(pq.read_metadata(p).num_rows for p in (tmp_path / "lists").glob("*.parquet")) == 10**6
    )


# Forgetting


def test_forgotten_rows_keep_their_ids_and_the_digests_that_name_them(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"bytes")
    table = [
        {"url": url, "caption": f"of {url}", "label": "l", "license": "x", "sha256": digest}
        for url, digest in [
            ("http://a", ""), ("http://b", ""), ("http://c", "ab" * 32), ("http://a", ""),
            ("file:a.jpg", ""), ("http://stays", ""),
        ]
    ]  # fmt: skip
    manifest = worlds.write_manifest(tmp_path / "m.csv", table)
    bytes_hash = "277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9"
    forget = tmp_path / "forget.txt"
    lines = ["# a comment", "http://a", image_id("http://b").upper(), "AB" * 32, bytes_hash]
    forget.write_text("\n".join([*lines, "", "http://nobody"]))
    said = []
    found = rows(manifest, tmp_path, forgotten=read_forgotten(forget), said=said)
    kept = {"row_id", "image_id", "occurrence", "forgotten"}
    gone = [row for row in found if row["forgotten"]]
    assert len(found) == 6 and len(gone) == 5
    marks = {}
    for row in gone:
        left = {name for name, value in row.items() if value not in (None, [])}
        marks |= {value: name for name in left - kept if (value := row[name])}
        assert left - set(marks.values()) == kept
    assert marks == {"ab" * 32: "sha256_expected", bytes_hash: "content"}  # by which lines
    assert [row["url"] for row in found if not row["forgotten"]] == ["http://stays"]
    assert sum("'http://nobody'" in note for note in said) == 1


def test_a_list_of_what_to_forget_that_is_missing_is_named(tmp_path):
    with pytest.raises(PipelineError, match=r"none\.txt.*download\.forget"):
        read_forgotten(tmp_path / "none.txt")
