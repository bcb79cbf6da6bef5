"""Every row of a manifest ends in exactly one list, whatever people write into it."""

import csv
import hashlib
import json
import os
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import worlds

from pipeline.core.errors import PipelineError
from pipeline.fetch.manifest import image_id, list_digest, write_lists

ROWS_PER_SHARD = 2
SPACES = "".join(c for c in map(chr, range(sys.maxunicode)) if unicodedata.category(c) == "Zs")
BOX = {"text": "a cat", "x0": 1.0, "y0": 2.0, "x1": 30.0, "y1": 40.0}


def lists(
    manifest: Path, rows_per_shard: int = ROWS_PER_SHARD, root: Path | None = None
) -> list[Path]:
    folder = manifest.with_name("lists")
    return write_lists(manifest, root or manifest.parent, rows_per_shard, folder)


def rows_of(paths: list[Path]) -> list[dict]:
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def read(manifest: Path, **options) -> dict[str, dict]:
    return {row["url"]: row for row in rows_of(lists(manifest, **options))}


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "manifest.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(manifest: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        lists(manifest)
    assert str(manifest) in str(caught.value)
    return str(caught.value)


def bucket_of(image_id: str, number: int) -> int:
    """Litwin 1980: the hash modulo the next power of two above the number of buckets; what falls in
    a bucket that is not there yet still lies in the one that it will be split from."""
    power = next(2**k for k in range(20) if 2**k > number)
    bucket = int(image_id[:8], 16) % power
    return bucket if bucket < number else bucket - power // 2


# Every row once


text = st.text(
    st.one_of(
        st.sampled_from(list("\",;|\t'\\#\r\n[]{}: a\ufeff\u2028é")),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    max_size=10,
)
table = st.lists(st.tuples(text, text), min_size=1, max_size=8)


def listed(given_rows: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Every row with its captions: the first of a url has those of all its rows, each once."""
    found, first = [], {}
    for url, caption in given_rows:
        mine = [caption] if caption.strip(SPACES) else []
        if not url or url not in first:
            first[url] = mine
            found.append((url, mine))
        else:
            first[url].extend(text for text in mine if text not in first[url])
            found.append((url, []))
    return found


def assert_every_row_is_there_once(manifest: Path, given_rows: list[tuple[str, str]]) -> None:
    paths = lists(manifest)
    found = rows_of(paths)
    assert sorted((row["url"], row["captions"]) for row in found) == sorted(listed(given_rows))
    assert len({row["row_id"] for row in found}) == len(found)
    assert all(row["image_id"] == image_id(row["url"]) for row in found)
    for number, path in enumerate(paths):
        assert path.name == f"{number:05}.parquet"
        keys = [(r["image_id"], r["occurrence"]) for r in pq.read_table(path).to_pylist()]
        assert keys == sorted(keys)
        assert all(bucket_of(key, len(paths)) == number for key, _ in keys)


@settings(max_examples=40, deadline=None)
@given(rows=table, ending=st.sampled_from(["\n", "\r\n"]))
def test_a_csv_of_any_text_gives_every_row_once(rows, ending, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator=ending, quoting=csv.QUOTE_ALL)
        writer.writerow(["url", "caption"])
        writer.writerows(rows)
    assert_every_row_is_there_once(path, rows)


@settings(max_examples=40, deadline=None)
@given(rows=table)
def test_parquet_of_any_text_gives_every_row_once(rows, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    urls, captions = (list(column) for column in zip(*rows, strict=True))
    pq.write_table(pa.table({"url": urls, "caption": captions}), path)
    assert_every_row_is_there_once(path, rows)


@pytest.mark.parametrize(
    "line",
    ["#http://a/1.jpg", "http://a/1;b.jpg", "http://a/1|b.jpg", "http://a/1\tb.jpg", "'a", "a b"],
)
def test_a_single_column_of_urls_is_never_split_or_skipped(tmp_path, line):
    found = read(written(tmp_path, f"url\n{line}\nhttp://b/2.jpg\n#c\n"))
    assert set(found) == {line, "http://b/2.jpg", "#c"}


def test_odd_lines_after_many_plain_ones_are_read_alike(tmp_path):
    plain = "".join(f"http://a/{i},b\n" for i in range(30_000))
    manifest = written(tmp_path, f'url,caption\n{plain}#x,#y\nz,"q\nr, ""s"""\n')
    found = read(manifest, rows_per_shard=10_000)
    assert len(found) == 30_002
    assert found["#x"]["captions"] == ["#y"] and found["z"]["captions"] == ['q\nr, "s"']


def test_empty_urls_are_rows_of_their_own(tmp_path):
    found = rows_of(lists(written(tmp_path, 'url,caption\n,first\n"",second\nhttp://a,third\n')))
    empty = [row for row in found if row["url"] == ""]
    assert [row["caption"] for row in empty] == ["first", "second"]
    assert [row["occurrence"] for row in empty] == [0, 1]
    assert len({row["row_id"] for row in found}) == 3


def test_a_repeated_url_repeats_its_image_id_and_counts_its_occurrences_in_order(tmp_path):
    found = rows_of(lists(written(tmp_path, "url,caption\na,1\nb,2\na,3\na,4\n")))
    mine = [row for row in found if row["url"] == "a"]
    assert [(row["caption"], row["occurrence"]) for row in mine] == [("1", 0), ("3", 1), ("4", 2)]
    assert [row["captions"] for row in mine] == [["1", "3", "4"], [], []]
    assert {row["image_id"] for row in mine} == {hashlib.sha256(b"a").hexdigest()[:32]}


# What a change touches


def many(folder: Path, urls: list[str]) -> Path:
    return worlds.write_manifest(folder / "manifest.csv", [{"url": u, "caption": u} for u in urls])


URLS = [f"http://a/{i}.jpg" for i in range(50)]


def test_reordering_a_manifest_changes_no_list(tmp_path):
    first = [path.read_bytes() for path in lists(many(tmp_path, URLS))]
    assert [path.read_bytes() for path in lists(many(tmp_path, URLS[::-1]))] == first


def test_an_added_or_removed_row_touches_one_list_only(tmp_path):
    """As long as their number asks for no other number of lists."""
    before = [path.read_bytes() for path in lists(many(tmp_path, URLS), 12)]
    for urls in ([*URLS[:20], "http://a/new.jpg", *URLS[20:]], URLS[:-1]):
        after = [path.read_bytes() for path in lists(many(tmp_path, urls), 12)]
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_csv_and_parquet_of_the_same_rows_give_the_same_lists(tmp_path):
    as_csv = worlds.write_manifest(
        tmp_path / "a.csv",
        [
            {
                "url": "http://a",
                "caption": json.dumps(["one", 'two "quoted"']),
                "label": "x",
                "boxes": json.dumps([BOX]),
            },
            {"url": "http://b", "caption": "three", "label": "", "boxes": ""},
        ],
    )
    values = {
        "url": ["http://a", "http://b"],
        "caption": [["one", 'two "quoted"'], ["three"]],
        "label": ["x", None],
        "boxes": [[BOX], None],
    }
    pq.write_table(pa.table(values), tmp_path / "a.parquet")
    first = rows_of(lists(as_csv))
    assert first == rows_of(lists(tmp_path / "a.parquet"))
    by_url = {row["url"]: row for row in first}
    assert by_url["http://a"]["captions"] == ["one", 'two "quoted"']
    assert by_url["http://a"]["caption"] == "one" and by_url["http://a"]["boxes"] == [BOX]
    assert by_url["http://b"]["boxes"] is None and by_url["http://b"]["label"] is None


def many_urls(count: int) -> str:
    return "url\n" + "".join(f"http://a/{i}\n" for i in range(count))


def buckets(folder: Path, rows_per_shard: int, count: int = 600) -> dict[str, int]:
    """image_id -> the number of its list."""
    paths = lists(written(folder, many_urls(count)), rows_per_shard)
    assert [path.name for path in paths] == [f"{i:05}.parquet" for i in range(len(paths))]
    return {key: int(p.stem) for p in paths for key in pq.read_table(p)["image_id"].to_pylist()}


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (100, 1), (101, 2), (600, 6)])
def test_the_number_of_lists_is_that_of_the_rows_divided_by_the_target(tmp_path, rows, expected):
    assert len(lists(written(tmp_path, many_urls(rows)), 100)) == expected


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 8])
def test_an_image_lies_in_the_bucket_of_linear_hashing(tmp_path, number):
    found = buckets(tmp_path, -(-600 // number))
    assert found == {key: bucket_of(key, number) for key in found}


def test_one_list_more_splits_one_list_and_sizes_differ_about_twofold_at_most(tmp_path):
    before = buckets(tmp_path, 60)
    for number in range(11, 17):
        after = buckets(tmp_path, -(-600 // number))
        moved = {(before[key], after[key]) for key in after if before[key] != after[key]}
        assert len(moved) == 1 and {new for _, new in moved} == {number - 1}
        before = after
    sizes = Counter(buckets(tmp_path, 500, 6000).values()).values()
    assert max(sizes) < 3 * min(sizes)  # twofold, and the luck of 6000 hashes


def test_a_lists_digest_is_of_its_rows_and_not_of_the_file(tmp_path):
    path = lists(written(tmp_path, many_urls(5)), 10)[0]
    table = pq.read_table(path)
    pq.write_table(table, tmp_path / "other.parquet", compression="none", row_group_size=2)
    assert list_digest(tmp_path / "other.parquet") == list_digest(path)
    pq.write_table(table.slice(1), tmp_path / "shorter.parquet")
    assert list_digest(tmp_path / "shorter.parquet") != list_digest(path)


def test_what_a_killed_run_left_does_not_disturb_the_next(tmp_path):
    """A database, its write-ahead log and lists of another manifest."""
    folder = tmp_path / "lists"
    folder.mkdir()
    for name in ("rows.duckdb", "rows.duckdb.wal", "00000.parquet", "00009.parquet"):
        (folder / name).write_bytes(b"left behind")
    assert set(read(written(tmp_path, "url\nhttp://a\n"))) == {"http://a"}
    assert not (folder / "00009.parquet").exists()


def test_a_manifest_is_the_file_of_that_very_name(tmp_path):
    """To DuckDB `list[1].csv` is also a pattern, which matches list1.csv."""
    worlds.write_manifest(tmp_path / "list1.csv", [{"url": "wrong"}])
    for name in ("list[1].csv", "it's.csv", "a b.csv"):
        assert set(read(worlds.write_manifest(tmp_path / name, [{"url": "right"}]))) == {"right"}


# Captions, labels, boxes


def test_blank_captions_are_no_captions(tmp_path):
    pq.write_table(
        pa.table({"url": ["a", "b"], "caption": [["x", None, " ", ""], None]}),
        tmp_path / "m.parquet",
    )
    found = read(tmp_path / "m.parquet")
    assert found["a"]["captions"] == ["x"]
    assert found["b"]["captions"] == [] and found["b"]["caption"] is None


@pytest.mark.parametrize("caption", ['["hello', '["a" b]', "[1, 2]", "[]", "{}", "[sic] so"])
def test_a_caption_that_only_looks_like_a_list_is_a_caption(tmp_path, caption):
    manifest = worlds.write_manifest(tmp_path / "m.csv", [{"url": "a", "caption": caption}])
    assert read(manifest)["a"]["captions"] == [caption]


def test_labels_are_texts_whatever_they_were(tmp_path):
    pq.write_table(pa.table({"url": ["a", "b"], "label": [7, None]}), tmp_path / "m.parquet")
    found = read(tmp_path / "m.parquet")
    assert (found["a"]["label"], found["b"]["label"]) == ("7", None)


@pytest.mark.parametrize(
    "change",
    [{"x1": None}, {"x1": float("nan")}, {"text": None}, {"x1": 0.5}, {"y1": 2.0}],
    ids=str,
)
def test_a_box_without_text_or_area_is_refused_with_its_url(tmp_path, change):
    pq.write_table(pa.table({"url": ["here"], "boxes": [[BOX | change]]}), tmp_path / "m.parquet")
    message = refusal(tmp_path / "m.parquet")
    assert "'here'" in message and "x0 < x1" in message


@pytest.mark.parametrize("cell", ["nonsense", '[{"text": "a cat", "x0": 1}]'])
def test_boxes_that_are_no_boxes_are_refused(tmp_path, cell):
    assert refusal(worlds.write_manifest(tmp_path / "m.csv", [{"url": "a", "boxes": cell}]))


# Local files


def test_a_local_files_content_is_its_hash(tmp_path):
    (tmp_path / "a b.jpg").write_bytes(b"bytes")
    found = read(written(tmp_path, "url\nfile:a%20b.jpg\nFILE:a%20b.jpg\nhttp://a\n"))
    expected = hashlib.sha256(b"bytes").hexdigest()
    assert found["file:a%20b.jpg"]["content"] == found["FILE:a%20b.jpg"]["content"] == expected
    assert found["http://a"]["content"] is None


def test_files_that_cannot_be_read_are_rows_without_content(tmp_path):
    root = tmp_path / "root"
    (root / "folder.jpg").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "dangling.jpg").symlink_to(root / "nothing.jpg")
    os.mkfifo(root / "fifo.jpg")  # opening it would wait for ever
    names = ["missing.jpg", "folder.jpg", "link.jpg", "dangling.jpg", "fifo.jpg", "../secret.jpg"]
    manifest = many(tmp_path, [f"file:{name}" for name in [*names, "a%00b.jpg", "x" * 5000]])
    found = read(manifest, root=root)
    assert len(found) == 8 and all(row["content"] is None for row in found.values())


# Refusals


def test_a_missing_manifest_says_how_to_get_one(tmp_path):
    assert "pipeline import folder" in refusal(tmp_path / "none.csv")


@pytest.mark.parametrize("name", ["m.txt", "m.json", "m", "m.csv.zip"])
def test_a_manifest_of_another_kind_is_refused(tmp_path, name):
    (tmp_path / name).write_text("url\na\n")
    assert ".csv, .csv.gz, .tsv" in refusal(tmp_path / name)


@pytest.mark.parametrize("header", ["link,caption", "link", "url;caption", "address"])
def test_a_manifest_without_url_names_the_columns_found(tmp_path, header):
    message = refusal(written(tmp_path, f"{header}\n{header}\n"))
    assert "no column `url`" in message and header.split(",")[0] in message


@pytest.mark.parametrize("text", ["url\n", "url,caption\n", "url,caption\r\n"])
def test_a_manifest_without_rows_is_refused(tmp_path, text):
    assert "no rows" in refusal(written(tmp_path, text))


@pytest.mark.parametrize(
    "data",
    [
        b"url,caption\nhttp://a\nhttp://b,c,d\n",
        b"url,caption\nhttp://a,b\nhttp://b\n",
        b'url,caption\na,"never closed\nb,c\n',
        b"a title\nurl,caption\na,b\n",
        bytes(range(256)) * 20,
    ],
    ids=["ragged", "short", "quote", "title", "binary"],
)
def test_a_csv_that_cannot_be_read_surely_is_refused_with_what_is_expected(tmp_path, data):
    message = refusal(written(tmp_path, data))
    assert "UTF-8" in message or "no column `url`" in message


def test_a_damaged_parquet_manifest_is_refused(tmp_path):
    (tmp_path / "m.parquet").write_bytes(b"PAR1 no more")
    assert "cannot be read" in refusal(tmp_path / "m.parquet")


def test_captions_of_numbers_are_refused(tmp_path):
    pq.write_table(pa.table({"url": ["a"], "caption": [3]}), tmp_path / "m.parquet")
    assert "cannot be read as a manifest" in refusal(tmp_path / "m.parquet")


def test_an_image_id_in_python_is_the_one_in_sql():
    for url in ("http://a", "", "é\u2028", "file:a b.jpg"):
        ((found,),) = duckdb.execute("SELECT substr(sha256(?), 1, 32)", [url]).fetchall()
        assert image_id(url) == found


def test_a_local_file_beyond_the_limit_is_not_hashed(tmp_path):
    """A sparse file of a terabyte would be read for hours; its row says `too_large` later."""
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "small.jpg").write_bytes(b"image")
    (tmp_path / "m.csv").write_text("url\nfile:huge.jpg\nfile:small.jpg\n")
    found = {row["url"]: row["content"] for row in rows_of(lists(tmp_path / "m.csv"))}
    assert found["file:huge.jpg"] is None and found["file:small.jpg"]
