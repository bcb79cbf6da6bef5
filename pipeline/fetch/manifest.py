"""A list of images that a person wrote -> one list per shard, every row exactly once.

A row has a `url` and optionally a `caption` (text, or a list of texts; in CSV a JSON list), `label`,
`license`, `boxes` (text, x0, y0, x1, y1 in px of the original image; in CSV a JSON list of such
objects), `mask` (a `file:` path below the root: a PNG of class indices) and `sha256` (64 hex digits:
of the bytes that were agreed on). An image's id is the hash of its url as written, so reordering a
manifest renames nothing, and its shard is a bucket of that id, so an added row touches one shard.
Several rows of one url are one image: the first has the captions and boxes of them all, the others
keep their own `caption`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import PARTIAL
from pipeline.fetch.containers import list_contained, split_inside
from pipeline.fetch.forget import Forgotten, image_id
from pipeline.fetch.manifest_files import (
    BAD,
    Source,
    identifier,
    is_encoding_error,
    open_manifest,
    unreadable,
)
from pipeline.fetch.policy import FetchError, open_local, read_local

__all__ = ["image_id", "list_digest", "write_lists"]

VERSION = 2  # raise it when ids, buckets or the reading of a manifest change
MOST = 1_000  # captions, and boxes, of one image
LONGEST_TEXT = 20_000  # characters of a caption, label or licence
MEMORY = "2GB"  # of DuckDB, which spills to the folder
BOXES = 'STRUCT("text" VARCHAR, x0 FLOAT, y0 FLOAT, x1 FLOAT, y1 FLOAT)[]'
Say = Callable[[str], object]


def write_lists(
    manifest: Path,
    root: Path,
    rows_per_shard: int,
    folder: Path,
    *,
    columns: Mapping[str, str | int | None] | None = None,
    forgotten: Forgotten | None = None,
    max_bytes: int = 1 << 25,
    say: Say = print,
) -> list[Path]:
    """Partition a manifest into folder/NNNNN.parquet, one list per bucket, empty ones too.

    There are as many buckets as rows / rows_per_shard, rounded up. Buckets differ at most twofold in
    the hashes that they take, and one bucket more splits one bucket (linear hashing, Litwin 1980).

    A list's columns: row_id, image_id, url, caption, captions, label, license, boxes, mask,
    sha256_expected, occurrence (0 for the first row with its url), content and mask_content
    (SHA-256 of a local file of at most max_bytes, else null), forgotten (such a row has nothing but
    its ids, and those SHA-256 by which it must be forgotten);
    sorted by image_id and occurrence. columns: see `open_manifest`. say: is told, in a sentence
    each, what a reader of the manifest may not expect. Memory stays flat: DuckDB spills to folder.

    Raises PipelineError: no manifest, an unknown format, no or two url columns, no rows, a column
    of another type, a box without text or area, texts that need more than MEMORY.
    """
    forgotten = forgotten or Forgotten()
    shutil.rmtree(folder, ignore_errors=True)  # a killed run leaves a database and its log
    folder.mkdir(parents=True)
    with _within_memory(manifest), duckdb.connect(str(folder / "rows.duckdb")) as connection:
        connection.execute(f"SET memory_limit = '{MEMORY}'; SET enable_progress_bar = false")
        connection.create_function(  # ty: ignore[no-matching-overload]
            "content",
            _content_of(root, max_bytes),
            ["VARCHAR"],
            "VARCHAR",
            null_handling="special",
            side_effects=False,
        )
        manifest = list_contained(manifest, root, folder / "contained.parquet")
        notes = _read(connection, manifest, dict(columns or {}), folder / "utf-8")
        ((rows,),) = connection.execute("SELECT count(*) FROM written").fetchall()
        buckets = -(-rows // rows_per_shard)
        half = 1 << buckets.bit_length() - 1  # the greatest power of two up to their number
        _refuse_bad_boxes(connection, manifest)
        connection.register("forgotten_ids", pa.table({"id": pa.array(forgotten.lines, "string")}))
        digests = pa.array(sorted(forgotten.sha256), "string")
        connection.register("forgotten_bytes", pa.table({"sha256": digests}))
        for sql in _TABLES:
            connection.execute(sql.format(buckets=buckets, half=half, most=MOST, no_url=_NO_URL))
        for note in [*notes, *_notes(connection, forgotten)]:
            say(f"{manifest}: {note}")
        return [_write_list(connection, bucket, folder) for bucket in range(buckets)]


@contextmanager
def _within_memory(manifest: Path) -> Iterator[None]:
    """A few kilobytes of Parquet can hold gigabytes of text: the same one in every row."""
    try:
        yield
    except duckdb.OutOfMemoryException:
        raise PipelineError(
            f"{manifest} holds texts that need more than {MEMORY} of memory at once. Shorten them: "
            f"of a caption {LONGEST_TEXT:,} characters are kept."
        ) from None


def _read(
    connection: duckdb.DuckDBPyConnection, manifest: Path, columns: dict, repaired: Path
) -> list[str]:
    """Make the table `written`: every row once, in order, under our names."""
    try:
        try:
            source = open_manifest(connection, manifest, columns)
            _take(connection, manifest, source)
        except duckdb.Error as error:
            if not is_encoding_error(error):
                raise
            source = open_manifest(connection, manifest, columns, repaired)
            _take(connection, manifest, source)
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise unreadable(manifest, error) from None
    ((rows,),) = connection.execute("SELECT count(*) FROM written").fetchall()
    if not rows:
        raise PipelineError(f"{manifest} has no rows. Add images to it, one a row.")
    return source.notes


def _take(connection: duckdb.DuckDBPyConnection, manifest: Path, source: Source) -> None:
    """Read a source into `written` and `urls`; cells with bytes that are no UTF-8 cost themselves."""
    name = {ours: theirs and identifier(theirs) for ours, theirs in source.columns.items()}
    kind = {ours: source.types.get(theirs or "", "") for ours, theirs in source.columns.items()}
    bad = BAD if source.repaired else None
    cells: dict[str, Any] = {
        ours: _text_cell(name[ours], bad) for ours in ("label", "license", "mask", "sha256")
    }
    captions = "CAST([] AS VARCHAR[])"
    if kind["caption"] == "VARCHAR[]":
        captions = name["caption"]
    elif kind["caption"] == "VARCHAR":  # a cell may hold one caption or a JSON list of them
        cell = name["caption"]
        captions = (
            f"CASE WHEN {cell} LIKE '[\"%' AND json_valid({cell}) "
            f"THEN from_json({cell}, '[\"VARCHAR\"]') ELSE [{cell}] END"
        )
    elif kind["caption"]:
        raise PipelineError(
            f"{manifest} cannot be read as a manifest: column {source.columns['caption']} holds "
            f"{kind['caption']}, a caption is a text or a list of texts."
        )
    boxes = f"CAST(NULL AS {BOXES})"
    if name["boxes"]:
        is_list = kind["boxes"].endswith("[]")
        cell = name["boxes"] if is_list else f"CAST({name['boxes']} AS JSON)"
        boxes = f"CAST({cell} AS {BOXES})"
    url = f"CAST({name['url']} AS VARCHAR)"
    if bad:
        url = f"replace({url}, '{bad}', chr(65533))"
    cells |= {"url": url, "captions": captions, "boxes": boxes, "source": source.sql}
    cells["longest"] = LONGEST_TEXT
    cells["damaged"] = f"contains(c, '{bad}')" if bad else "false"
    for sql in (_WRITTEN, _URLS):
        connection.execute(sql.format(**cells))


def _text_cell(name: str | None, bad: str | None) -> str:
    """A cell as text of bounded length, null where it is blank or damaged."""
    if name is None:
        return "CAST(NULL AS VARCHAR)"
    cell = f"nullif(left(CAST({name} AS VARCHAR), {LONGEST_TEXT}), '')"
    return f"CASE WHEN NOT contains({cell}, '{bad}') THEN {cell} END" if bad else cell


# A lambda's test must never be null: such a row would stay.
_WRITTEN = """
CREATE OR REPLACE TABLE written AS
SELECT row_number() OVER () AS position, substr(sha256(the_url), 1, 32) AS image_id,
       list_transform(
           list_filter(texts, lambda c: coalesce(trim(c) <> '' AND NOT {damaged}, false)),
           lambda c: left(c, {longest})) AS captions,
       len(list_filter(texts, lambda c: coalesce({damaged}, false))) AS damaged,
       len(list_filter(texts, lambda c: coalesce(length(c) > {longest}, false))) AS long,
       the_label AS label, the_license AS license, the_boxes AS boxes,
       nullif(trim(the_mask), '') AS mask, nullif(lower(trim(the_sha256)), '') AS sha256_expected
FROM (SELECT coalesce({url}, '') AS the_url, coalesce({captions}, []) AS texts,
             {label} AS the_label, {license} AS the_license, {boxes} AS the_boxes,
             {mask} AS the_mask, {sha256} AS the_sha256
      FROM {source})
"""

# Each url once, read a second time, so that a million equal ones weigh little.
_URLS = """
CREATE OR REPLACE TABLE urls AS
SELECT substr(sha256(url), 1, 32) AS image_id, any_value(url) AS url
FROM (SELECT coalesce({url}, '') AS url FROM {source}) GROUP BY image_id
"""
_NO_URL = image_id("")

_BAD_BOXES = """
SELECT url, CAST(boxes AS VARCHAR) FROM written JOIN urls USING (image_id)
WHERE len(list_filter(boxes, lambda b: NOT coalesce(
    b.text IS NOT NULL AND isfinite(b.x0 + b.y0 + b.x1 + b.y1) AND b.x0 < b.x1 AND b.y0 < b.y1,
    false))) > 0 ORDER BY url LIMIT 1
"""

_KEYS = """
CREATE TABLE keys AS
SELECT position, image_id,
       row_number() OVER (PARTITION BY image_id ORDER BY position) - 1 AS occurrence
FROM written
"""

# Captions and boxes of images that have several rows, each once, in the manifest's order.
_MERGED = """
CREATE TABLE merged AS
WITH mine AS (
    SELECT image_id, position, captions, boxes FROM written
    WHERE image_id IN (SELECT image_id FROM keys WHERE occurrence = 1) AND image_id <> '{no_url}'
), texts AS (
    SELECT image_id, text, row_number() OVER (PARTITION BY image_id ORDER BY min(source_position)) AS n
    FROM (SELECT image_id, unnest(captions) AS text,
                 position * 1000000 + generate_subscripts(captions, 1) AS source_position FROM mine)
    GROUP BY image_id, text
), areas AS (
    SELECT image_id, box, row_number() OVER (PARTITION BY image_id ORDER BY min(source_position)) AS n
    FROM (SELECT image_id, unnest(boxes) AS box,
                 position * 1000000 + generate_subscripts(boxes, 1) AS source_position FROM mine)
    GROUP BY image_id, box
)
SELECT image_id AS key, captions, boxes
FROM (SELECT DISTINCT image_id FROM mine)
LEFT JOIN (SELECT image_id, list(text ORDER BY n) FILTER (n <= {most} + 1) AS captions
           FROM texts GROUP BY image_id) USING (image_id)
LEFT JOIN (SELECT image_id, list(box ORDER BY n) FILTER (n <= {most} + 1) AS boxes
           FROM areas GROUP BY image_id) USING (image_id)
"""

_CONTENTS = """
CREATE TABLE contents AS
SELECT image_id, CASE WHEN url ILIKE 'file:%' THEN content(url) END AS content,
       CASE WHEN mask ILIKE 'file:%' THEN content(mask) END AS mask_content
FROM (SELECT image_id, url, mask FROM written JOIN keys USING (position, image_id)
      JOIN urls USING (image_id) WHERE occurrence = 0)
WHERE (url ILIKE 'file:%' OR mask ILIKE 'file:%')
"""

_FORGOTTEN = """
CREATE TABLE forgotten_images AS
SELECT id AS image_id FROM forgotten_ids
UNION SELECT image_id FROM contents WHERE content IN (SELECT sha256 FROM forgotten_bytes)
UNION SELECT image_id FROM written
      WHERE sha256_expected IN (SELECT sha256 FROM forgotten_bytes)
"""

_ROWS = """
CREATE TABLE rows AS
WITH listed AS (
    SELECT written.*, occurrence, url, ('0x' || image_id[1:8])::UBIGINT AS hash,
           image_id IN (SELECT image_id FROM forgotten_images) AS forgotten,
           CASE WHEN occurrence > 0 AND image_id <> '{no_url}' THEN []
                WHEN merged.key IS NULL THEN written.captions
                ELSE coalesce(merged.captions, []) END AS texts,
           CASE WHEN merged.key IS NULL THEN written.boxes ELSE merged.boxes END AS areas
    FROM written JOIN keys USING (position, image_id) JOIN urls USING (image_id)
    LEFT JOIN merged ON merged.key = image_id AND occurrence = 0
)
SELECT substr(sha256(url || chr(10) || occurrence), 1, 32) AS row_id, listed.image_id,
       CASE WHEN NOT forgotten AND occurrence = 0 THEN url END AS url,
       CASE WHEN NOT forgotten THEN coalesce(texts[1], captions[1]) END AS caption,
       CASE WHEN forgotten THEN [] ELSE texts[1:{most}] END AS captions,
       CASE WHEN NOT forgotten THEN label END AS label,
       CASE WHEN NOT forgotten THEN license END AS license,
       CASE WHEN NOT forgotten THEN areas[1:{most}] END AS boxes,
       CASE WHEN NOT forgotten THEN mask END AS mask,
       CASE WHEN NOT forgotten OR sha256_expected IN (SELECT sha256 FROM forgotten_bytes)
            THEN sha256_expected END AS sha256_expected, occurrence,
       CASE WHEN occurrence = 0 AND (NOT forgotten OR content IN (SELECT sha256 FROM forgotten_bytes))
            THEN content END AS content,
       CASE WHEN NOT forgotten AND occurrence = 0 THEN mask_content END AS mask_content, forgotten,
       len(texts) > {most} OR coalesce(len(areas), 0) > {most} AS cut,
       CAST(CASE WHEN hash % (2 * {half}) < {buckets} THEN hash % (2 * {half})
                 ELSE hash % {half} END AS INTEGER) AS bucket
FROM listed LEFT JOIN contents USING (image_id)
ORDER BY bucket, listed.image_id, occurrence
"""

_TABLES = (_KEYS, _MERGED, _CONTENTS, _FORGOTTEN, _ROWS)


def _refuse_bad_boxes(connection: duckdb.DuckDBPyConnection, manifest: Path) -> None:
    if bad := connection.execute(_BAD_BOXES).fetchone():
        raise PipelineError(
            f"{manifest}: url {bad[0]!r} has the boxes {bad[1]}. A box needs a text and numbers "
            "x0 < x1 and y0 < y1, its corners in px of the original image."
        )


def _notes(connection: duckdb.DuckDBPyConnection, forgotten: Forgotten) -> list[str]:
    """What became of rows otherwise than a reader of the manifest may expect."""
    notes = []

    def count(sql: str) -> int:
        ((number,),) = connection.execute(sql).fetchall()
        return number or 0

    if damaged := count("SELECT sum(damaged) FROM written"):
        notes.append(f"{damaged} captions are not UTF-8 and left out; their images are kept.")
    if long := count("SELECT sum(long) FROM written"):
        notes.append(f"{long} captions are cut to their first {LONGEST_TEXT:,} characters.")
    if repeated := count(
        f"SELECT count(*) FROM keys WHERE occurrence > 0 AND image_id <> '{_NO_URL}'"
    ):
        images = count("SELECT count(*) FROM merged")
        notes.append(
            f"{repeated} rows repeat a url: {images} images have the captions and boxes of several "
            "rows."
        )
    if cut := count("SELECT count(*) FROM rows WHERE cut"):
        notes.append(f"of {cut} images only the first {MOST:,} captions and boxes are kept.")
    known = connection.execute("SELECT id FROM forgotten_ids JOIN keys ON id = image_id").fetchall()
    for line in sorted(
        forgotten.lines[key] for key in forgotten.lines.keys() - {k for (k,) in known}
    ):
        notes.append(f"no row is {line!r}, which is to be forgotten.")
    return notes


def _write_list(connection: duckdb.DuckDBPyConnection, bucket: int, folder: Path) -> Path:
    """One list, batch by batch; a row that repeats a url gets it from the row before it."""
    path = folder / f"{bucket:05}.parquet"
    partial = path.with_name(path.name + PARTIAL)
    reader = connection.sql(_LIST, params=[bucket]).to_arrow_reader(10_000)
    last = pa.nulls(1, pa.string())
    with pq.ParquetWriter(partial, reader.schema) as writer:
        for batch in reader:
            repeats = pc.and_(pc.greater(batch["occurrence"], 0), pc.invert(batch["forgotten"]))
            forward = pc.fill_null_forward(pa.concat_arrays([last, batch["url"]]))[1:]
            urls = pc.if_else(repeats, forward, batch["url"])
            last = forward[len(forward) - 1 :] if len(forward) else last
            at = batch.schema.get_field_index("url")
            writer.write_batch(batch.set_column(at, "url", urls))
    return partial.replace(path)


_LIST = """
SELECT row_id, image_id, url, caption, captions, label, license, boxes, mask, sha256_expected,
       occurrence, content, mask_content, forgotten
FROM rows WHERE bucket = ? ORDER BY image_id, occurrence
"""


def list_digest(path: Path) -> str:
    """32 hex digits of the SHA-256 of a list's rows: the same whatever library wrote the file."""
    rows = hashlib.sha256()
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                rows.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return rows.hexdigest()[:32]


def _content_of(root: Path, max_bytes: int) -> Callable[[str], str | None]:
    """A local file's hash, so that a changed file is noticed; null where it may not be read."""
    root = root.resolve()

    def content(url: str) -> str | None:
        try:
            if split_inside(url):
                return hashlib.sha256(read_local(url, root, max_bytes)).hexdigest()
            with open_local(url, root) as file:
                if os.fstat(file.fileno()).st_size > max_bytes:
                    return None
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FetchError, OSError):  # the row will say why
            return None

    return content
