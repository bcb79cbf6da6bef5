"""Promises about sets of rows, asked of DuckDB: rows in = rows out, one split per content, ...

Each check selects what breaks a promise, so that the right answer is no rows. DuckDB spills to
disk, so memory stays bounded however many shards there are.
"""

import tempfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np

from pipeline.core.layout import STAGES, STAMP_FILE
from pipeline.core.provenance import digest, summary_of
from pipeline.core.records import Preprocessing
from pipeline.data.database import parquet_files
from pipeline.data.pixels import decode
from pipeline.data.remote_shards import are_remote
from pipeline.data.views import view_pixels
from pipeline.verify.files import IMPORTED, Finding, Stamps, remade

TABLES = {  # table -> (folder, pattern of its files below it)
    table: (stage.folder, pattern)
    for stage in STAGES.values()
    for table, pattern in stage.tables.items()
}
SAME_PIXELS = 1.0  # mean difference, of 255, below which two crops show the same
GROUPS = 100  # of equal embeddings that are looked at


class Check(NamedTuple):
    """sql selects one name per row that breaks the promise."""

    promise: str
    folder: str  # to be made anew
    tables: tuple[str, ...]
    sql: str


ALWAYS = [
    Check(
        "row_id is unique",
        "images",
        ("images",),
        "SELECT row_id FROM images GROUP BY row_id HAVING count(*) > 1",
    ),
    Check(
        "an image is fetched once",
        "images",
        ("images",),
        "SELECT image_id FROM images WHERE status = 'ok' GROUP BY image_id HAVING count(*) > 1",
    ),
    Check(
        "a view is embedded once",
        "teacher",
        ("teacher",),
        "SELECT image_id FROM teacher GROUP BY image_id, view HAVING count(*) > 1",
    ),
    Check(
        "a teacher row is of a good image's very JPEG",
        "teacher",
        ("images", "teacher"),
        "SELECT image_id FROM teacher ANTI JOIN (FROM images WHERE status = 'ok') "
        "USING (image_id, sha256)",
    ),
    Check(
        "crop boxes lie inside their images",
        "teacher",
        ("images", "teacher"),
        "SELECT image_id FROM teacher JOIN images USING (image_id) WHERE status = 'ok' AND NOT "
        'coalesce(0 <= "left" AND "left" < "right" AND "right" <= width '
        "AND 0 <= top AND top < bottom AND bottom <= height, false)",
    ),
    Check(
        "a text is embedded once",
        "teacher",
        ("texts",),
        "SELECT text FROM texts GROUP BY text_id, text HAVING count(*) > 1",
    ),
    Check(
        "every image is selected or left out, once",
        "selection",
        ("images", "selection"),
        "SELECT image_id FROM (SELECT DISTINCT image_id, 1 AS n FROM images) a "
        "FULL JOIN (SELECT image_id, count(*) AS n FROM selection GROUP BY image_id) b "
        "USING (image_id) WHERE a.n IS DISTINCT FROM b.n",
    ),
    Check(
        "what is left out has a reason, what is kept a split",
        "selection",
        ("selection",),
        "SELECT image_id FROM selection WHERE keep IS NULL OR keep <> (reason IS NULL) "
        "OR (keep AND coalesce(split NOT IN ('train', 'val', 'test'), true))",
    ),
    Check(
        "a duplicate names the image that is kept for it",
        "selection",
        ("selection",),
        "SELECT image_id FROM selection a WHERE duplicate_of IS NOT NULL AND NOT EXISTS "
        "(FROM selection b WHERE b.image_id = a.duplicate_of AND b.keep)",
    ),
    Check(
        "a content is in one split",
        "selection",
        ("images", "selection"),
        "SELECT min(image_id) FROM images JOIN selection USING (image_id) WHERE status = 'ok' "
        "GROUP BY sha256_original HAVING count(DISTINCT split) > 1",
    ),
    Check(
        "a content is kept once",
        "selection",
        ("images", "selection"),
        "SELECT min(image_id) FROM images JOIN selection USING (image_id) "
        "WHERE status = 'ok' AND keep GROUP BY sha256_original HAVING count(DISTINCT image_id) > 1",
    ),
    Check(
        "every kept image is good and has a vector",
        "selection",
        ("images", "teacher", "selection"),
        "SELECT image_id FROM selection ANTI JOIN (SELECT image_id FROM images JOIN teacher "
        "USING (image_id) WHERE status = 'ok' AND view = 0) USING (image_id) WHERE keep",
    ),
    Check(
        "the index holds exactly the kept images",
        "evaluation",
        ("selection", "student_index"),
        "SELECT image_id FROM (SELECT image_id, 1 AS n FROM selection WHERE keep) a FULL JOIN "
        "(SELECT image_id, count(*) AS n FROM student_index GROUP BY image_id) b "
        "USING (image_id) WHERE a.n IS DISTINCT FROM b.n",
    ),
]

EMBEDDED = [  # of a teacher that ran here
    Check(
        "every good image has every view",
        "teacher",
        ("images", "teacher"),
        "SELECT image_id FROM (SELECT image_id, unnest(range($views))::INT AS view FROM images "
        "WHERE status = 'ok') ANTI JOIN teacher USING (image_id, view)",
    ),
    Check(
        "every caption is embedded",
        "teacher",
        ("images", "texts"),
        "SELECT text FROM (SELECT image_id, unnest(captions) AS text FROM images) "
        "ANTI JOIN texts USING (image_id, text)",
    ),
    Check(
        "every text of a box is embedded",
        "teacher",
        ("images", "texts"),
        "SELECT DISTINCT text FROM (SELECT unnest(boxes).text AS text FROM images) ANTI JOIN "
        "(FROM texts WHERE image_id IS NULL) USING (text) WHERE trim(text) <> ''",
    ),
]

OF_OTHERS = [  # of imported embeddings
    Check(
        "a good image without a vector is left out as `no embedding`",
        "selection",
        ("images", "teacher", "selection"),
        "SELECT image_id FROM images ANTI JOIN teacher USING (image_id) ANTI JOIN "
        "(FROM selection WHERE reason = 'no embedding') USING (image_id) WHERE status = 'ok'",
    ),
]


def connection_over(data: Path, stamps: Stamps) -> duckdb.DuckDBPyConnection:
    """A connection with a view over exactly the Parquet files that the stamps name, per table."""
    connection = duckdb.connect(config={"temp_directory": tempfile.gettempdir()})
    for table, (folder, pattern) in TABLES.items():
        names = stamps[folder].files if folder in stamps else ()
        paths = [data / folder / name for name in names if fnmatch(name, pattern)]
        if paths:
            files = [str(path) for path in paths]
            if are_remote(paths):
                files = parquet_files(connection, paths[0].parent)
            connection.read_parquet(files).create_view(table)
    return connection


def set_findings(
    data: Path, stamps: Stamps, connection: duckdb.DuckDBPyConnection
) -> Iterator[Finding]:
    """One finding per check whose answer is not empty. stamps: of sound folders only."""
    checks = list(ALWAYS)
    if "teacher" in stamps:
        checks += OF_OTHERS if stamps["teacher"].stage == IMPORTED else EMBEDDED
        parameters = {"views": stamps["teacher"].summary["views"]}
    for check in checks:
        if not all(TABLES[table][0] in stamps for table in check.tables):
            continue
        mine = parameters if "$views" in check.sql else None
        sql = f"SELECT count(*), min(name) FROM ({check.sql}) AS broken(name)"
        try:
            ((count, example),) = connection.execute(sql, mine).fetchall()
            found = f"not so for {count}, such as {example}"
        except duckdb.Error as error:
            count, found = 1, str(error).strip().splitlines()[0]
        if count:
            yield Finding(check.promise, check.folder, found, remade(data, check.folder))
    if "selection" in stamps:
        yield from _counts(data, stamps, connection)
    if {"images", "teacher"} <= stamps.keys():
        yield from _repeated(data, stamps, connection)
        yield from _prompts(data, stamps, connection)


def _prompts(
    data: Path, stamps: Stamps, connection: duckdb.DuckDBPyConnection
) -> Iterator[Finding]:
    """The embedded prompts are those that the recipe names by their digest."""
    expected = stamps["teacher"].recipe.inputs.get("prompts")
    sql = "SELECT text FROM texts WHERE image_id IS NULL"
    found = sorted(text for (text,) in connection.execute(sql).fetchall())
    if expected and digest(found) != expected:
        found = f"{len(found)} prompts that are not those of the recipe"
        yield Finding("every prompt is embedded", "teacher", found, remade(data, "teacher"))


def _counts(data: Path, stamps: Stamps, connection: duckdb.DuckDBPyConnection) -> Iterator[Finding]:
    """The selection's summary counts its rows."""
    sql = (
        "SELECT CASE WHEN keep THEN split ELSE 'left out: ' || reason END, count(*) FROM selection"
    )
    counts = dict(connection.execute(f"{sql} GROUP BY 1").fetchall())
    if None not in counts and counts != (summary := stamps["selection"].summary):
        found = f"{counts}, the stamp says {summary}"
        promise = "a stamp's summary is what its files say"
        yield Finding(promise, f"selection/{STAMP_FILE}", found, remade(data, "selection"))


REPEATED = """
SELECT list(struct_pack(image_id, "left", top, "right", bottom, flip) ORDER BY sha256)[:8]
FROM teacher GROUP BY hash(embedding) HAVING min(sha256) <> max(sha256) LIMIT $groups
"""


def _repeated(
    data: Path, stamps: Stamps, connection: duckdb.DuckDBPyConnection
) -> Iterator[Finding]:
    """One vector for two images means that one was not embedded, unless they look the same."""
    preprocessing = summary_of(stamps["teacher"]).preprocessing
    wrong = []
    for (rows,) in connection.execute(REPEATED, {"groups": GROUPS}).fetchall():
        first, *others = (_seen(connection, row, preprocessing) for row in rows)
        if any(np.abs(first - other).mean() > SAME_PIXELS for other in others):
            wrong.append(f"{rows[0]['image_id']} and {rows[-1]['image_id']}")
    if wrong:
        found = f"{len(wrong)} vectors belong to several contents, such as {wrong[0]}"
        promise = "different images have different vectors"
        yield Finding(promise, "teacher", found, remade(data, "teacher"))


def _seen(
    connection: duckdb.DuckDBPyConnection, row: dict, preprocessing: Preprocessing
) -> np.ndarray:
    """(S, S, 3) float32 in [0, 255]: what the teacher saw."""
    sql = "SELECT jpg FROM images WHERE image_id = ? AND status = 'ok'"
    ((jpg,), *_) = connection.execute(sql, [row["image_id"]]).fetchall()
    image = decode(jpg)
    box = row["left"], row["top"], row["right"], row["bottom"]
    pixels = view_pixels(
        image, box, row["flip"], preprocessing.image_size, preprocessing.interpolation
    )
    return pixels.astype(np.float32)
