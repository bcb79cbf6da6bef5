"""A list of images that a person wrote -> one list per shard, every row exactly once.

CSV or Parquet with `url` and optional `caption` (text, or a list of texts; in CSV a JSON list),
`label`, `license`, `boxes` (text, x0, y0, x1, y1 in px of the original image; in CSV a JSON list of
such objects), `mask` (a `file:` path below the root: a PNG of class indices) and `sha256` (64 hex
digits: of the bytes that were agreed on). An image's id is the hash of its url as written, so
reordering a manifest renames nothing, and its shard is a bucket of that id, so an added row
touches one shard.
"""

import hashlib
import json
import shutil
from glob import escape
from pathlib import Path

import duckdb
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import PARTIAL
from pipeline.fetch.policy import FetchError, local_path

VERSION = 2  # raise it when ids, buckets or the reading of a manifest change

COLUMNS = {"url", "caption", "label", "license", "boxes", "mask", "sha256"}
PLAIN = ("label", "license", "mask", "sha256")  # texts that are taken as they are
# One dialect and no sniffing, which takes `#` for a comment and `;` in a url for a separator.
CSV = "header = true, all_varchar = true, delim = ',', quote = '\"', escape = '\"', comment = '', skip = 0"
BOXES = 'STRUCT("text" VARCHAR, x0 FLOAT, y0 FLOAT, x1 FLOAT, y1 FLOAT)[]'


def image_id(url: str) -> str:
    """32 hex digits that name an image: the hash of its url exactly as written."""
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def write_lists(manifest: Path, root: Path, rows_per_shard: int, folder: Path) -> list[Path]:
    """Partition a manifest into folder/NNNNN.parquet, one list per bucket, empty ones too.

    There are as many buckets as rows / rows_per_shard, rounded up. Buckets differ at most twofold in
    the hashes that they take, and one bucket more splits one bucket (linear hashing, Litwin 1980).

    A list's columns: row_id, image_id, url, caption, captions, label, license, boxes, mask,
    sha256_expected, occurrence (0 for the first row with its url), content and mask_content
    (SHA-256 of a local file's bytes, else null); sorted by image_id and occurrence.
    Memory stays flat: DuckDB spills to folder.

    Raises PipelineError: no manifest, not CSV or Parquet, no url column, no rows, a column of
    another type, a box without text or area.
    """
    shutil.rmtree(folder, ignore_errors=True)  # a killed run leaves a database and its log
    folder.mkdir(parents=True)
    with duckdb.connect(str(folder / "rows.duckdb")) as connection:
        connection.create_function(
            "content",
            _content_of(root),
            ["VARCHAR"],
            "VARCHAR",
            null_handling="special",
            side_effects=False,
        )
        columns = _columns(connection, manifest)
        try:
            connection.execute(_ROWS.format(**columns))
        except duckdb.Error as error:
            raise PipelineError(
                f"{manifest} cannot be read as a manifest: {_line(error)}"
            ) from None
        buckets = -(-_check(connection, manifest) // rows_per_shard)
        half = 1 << buckets.bit_length() - 1  # the greatest power of two up to their number
        connection.execute(_PLACED.format(buckets=buckets, half=half))
        return [_write_list(connection, bucket, folder) for bucket in range(buckets)]


def _columns(connection, manifest: Path) -> dict[str, str]:
    """SQL expressions for the source and its optional columns, whatever their form."""
    if not manifest.is_file():
        raise PipelineError(
            f"no manifest {manifest}. Write one (CSV or Parquet with a `url` column), make one of a "
            "folder with `pipeline import folder`, or name another in params.yaml (download.manifest)."
        )
    reader = {
        ".csv": f"read_csv({{}}, {CSV})",
        ".parquet": "read_parquet({})",
    }.get(manifest.suffix)
    if reader is None:
        raise PipelineError(f"{manifest}: expected a manifest named .csv or .parquet.")
    source = reader.format("'" + escape(str(manifest)).replace("'", "''") + "'")
    try:
        described = connection.execute(f"DESCRIBE SELECT * FROM {source}").fetchall()
    except duckdb.Error as error:
        raise PipelineError(
            f"{manifest} cannot be read: {_line(error)} Expected Parquet, or CSV in UTF-8: commas, "
            "as many cells in every row, quotes doubled inside quotes."
        ) from None
    types = {name: kind for name, kind, *_ in described}
    if "url" not in types:
        raise PipelineError(
            f"{manifest} has no column `url`; found {', '.join(types)}. Expected url and optionally "
            f"{', '.join(sorted(COLUMNS - {'url'}))}."
        )
    caption_type = types.get("caption", "")
    captions = "CAST([] AS VARCHAR[])"
    if caption_type.endswith("[]"):
        captions = "caption"
    elif caption_type:  # a CSV cell may hold one caption or a JSON list of them
        captions = (
            "CASE WHEN caption LIKE '[\"%' AND json_valid(caption) "
            "THEN from_json(caption, '[\"VARCHAR\"]') "
            "WHEN caption IS NULL OR trim(caption) = '' THEN [] ELSE [caption] END"
        )
    boxes = f"CAST(NULL AS {BOXES})"
    if "boxes" in types:
        as_list = "boxes" if types["boxes"].endswith("[]") else "CAST(boxes AS JSON)"
        boxes = f"CAST({as_list} AS {BOXES})"
    plain = {name: name if name in types else "NULL" for name in PLAIN}
    return {"source": source, "captions": captions, "boxes": boxes, **plain}


def _check(connection, manifest: Path) -> int:
    """How many rows there are, whatever the file says of itself. Raises PipelineError as above."""
    (rows,) = connection.execute("SELECT count(*) FROM rows").fetchone()
    if not rows:
        raise PipelineError(f"{manifest} has no rows. Add images to it, one a row.")
    if bad := connection.execute(_BAD_BOXES).fetchone():
        raise PipelineError(
            f"{manifest}: url {bad[0]!r} has the boxes {bad[1]}. A box needs a text and numbers "
            "x0 < x1 and y0 < y1, its corners in px of the original image."
        )
    return rows


_BAD_BOXES = """
SELECT url, CAST(boxes AS VARCHAR) FROM rows WHERE len(list_filter(boxes, lambda b: NOT coalesce(
    b.text IS NOT NULL AND isfinite(b.x0 + b.y0 + b.x1 + b.y1) AND b.x0 < b.x1 AND b.y0 < b.y1,
    false))) > 0 ORDER BY url LIMIT 1
"""

_ROWS = """
CREATE TABLE rows AS
WITH written AS (
    SELECT coalesce(CAST(url AS VARCHAR), '') AS url, {captions} AS captions,
           CAST({label} AS VARCHAR) AS label, CAST({license} AS VARCHAR) AS license,
           {boxes} AS boxes, nullif(trim(CAST({mask} AS VARCHAR)), '') AS mask,
           nullif(lower(trim(CAST({sha256} AS VARCHAR))), '') AS sha256_expected,
           row_number() OVER () AS place
    FROM {source}
), numbered AS (
    SELECT *, row_number() OVER (PARTITION BY url ORDER BY place) - 1 AS occurrence,
           substr(sha256(url), 1, 32) AS image_id
    FROM written
)
SELECT substr(sha256(url || chr(10) || occurrence), 1, 32) AS row_id, image_id, url,
       list_filter(coalesce(captions, []), lambda c: c IS NOT NULL AND trim(c) <> '') AS captions,
       label, license, boxes, mask, sha256_expected, occurrence,
       CASE WHEN url ILIKE 'file:%' AND occurrence = 0 THEN content(url) END AS content,
       CASE WHEN mask ILIKE 'file:%' AND occurrence = 0 THEN content(mask) END AS mask_content,
       ('0x' || image_id[1:8])::UBIGINT AS hash
FROM numbered
"""

_PLACED = """
CREATE TABLE placed AS
SELECT *, CAST(CASE WHEN hash % (2 * {half}) < {buckets} THEN hash % (2 * {half})
                    ELSE hash % {half} END AS INTEGER) AS bucket
FROM rows ORDER BY bucket, image_id, occurrence;
DROP TABLE rows
"""


def _write_list(connection, bucket: int, folder: Path) -> Path:
    path = folder / f"{bucket:05}.parquet"
    partial = path.with_name(path.name + PARTIAL)
    connection.execute(
        "COPY (SELECT row_id, image_id, url, captions[1] AS caption, captions, label, license, "
        "boxes, mask, sha256_expected, occurrence, content, mask_content FROM placed "
        f"WHERE bucket = {bucket} ORDER BY image_id, occurrence) "
        f"TO '{str(partial).replace(chr(39), chr(39) * 2)}' (FORMAT parquet)"
    )
    return partial.replace(path)


def list_digest(path: Path) -> str:
    """32 hex digits of the SHA-256 of a list's rows: the same whatever library wrote the file."""
    found = hashlib.sha256()
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                found.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return found.hexdigest()[:32]


def _content_of(root: Path):
    """A local file's hash, so that a changed file is noticed; null where it may not be read."""
    root = root.resolve()

    def content(url: str) -> str | None:
        try:
            path = local_path(url, root)
            if not path.is_file():
                return None
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FetchError, OSError):  # the row will say why
            return None

    return content


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
