"""data/images + data/teacher -> data/selection: what is trained on, held out and left out, and why.

Run:   pipeline select
Cost:  one DuckDB query over the shards, no pixels; near duplicates compare all pairs of embeddings.
"""

from collections import Counter
from functools import partial
from pathlib import Path

import duckdb
import pyarrow as pa

from pipeline.core.config import SelectConfig
from pipeline.core.errors import PipelineError
from pipeline.core.inputs import own_inputs
from pipeline.core.provenance import contents, libraries, lock, read_stamp, require_inputs
from pipeline.core.records import Recipe
from pipeline.core.terminal import say
from pipeline.core.work import Work
from pipeline.data import database, duplicates, shards
from pipeline.data.embeddings import caption_similarities

STAGE = "select"
VERSION = 1  # raise it when the query changes its answer
FILE = "selection.parquet"


def select(config: SelectConfig, data: Path, *, evaluated: str = "test") -> dict[str, int]:
    """Write data/selection; returns the number of images by split or by reason to leave them out.

    evaluated: the split that `evaluate` reads; `distill` reads train and val.
    Raises PipelineError: earlier stages missing or not of one run, a condition that is no SQL,
    nothing left to train on or to hold out.
    """
    with lock(data, STAGE):
        recipe = Recipe(
            parameters=config.model_dump(),
            versions={
                "select": VERSION,
                "duplicates": duplicates.VERSION,
                "shards": shards.VERSION,
            },
            inputs=contents(require_inputs(data, STAGE)),
        )
        work = Work(data, STAGE, data / "selection", recipe)
        if not work.published():
            work.begin()
            with own_inputs(data, STAGE) as inputs:
                table = _selected(config, inputs)
            # before it is published: an out that is of no use would be used
            counts = _require_splits(_counts(table), evaluated)
            made = {
                "stage": STAGE,
                **recipe.model_dump(),
                "libraries": libraries("duckdb", "pyarrow"),
            }
            work.commit(
                FILE,
                partial(
                    shards.write_shard,
                    schema=shards.SELECTION,
                    groups=shards.in_groups(table, shards.TABLE_ROWS_PER_GROUP),
                    provenance=made,
                ),
            )
            work.publish([FILE], counts)
        counts = _require_splits(read_stamp(work.out, STAGE).summary, evaluated)
        if note := _near_duplicates_note(counts, config.near_duplicates):
            say(note, err=True)
        return counts


def _near_duplicates_note(counts: dict[str, int], threshold: float) -> str | None:
    """What is said where most images are left out for their likeness: a teacher may see all alike."""
    near, total = counts.get("left out: near duplicate", 0), sum(counts.values())
    if near <= total / 2:
        return None
    return (
        f"note: {near} of {total} images count as near duplicates of others. Where they are not, "
        f"raise select.near_duplicates ({threshold})."
    )


def _require_splits(counts: dict[str, int], evaluated: str) -> dict[str, int]:
    """Raises PipelineError where a split that a later stage reads is empty."""
    read = dict.fromkeys(("train", "val", evaluated))
    if missing := [split for split in read if not counts.get(split)]:
        raise PipelineError(
            f"no image is left for {' and '.join(missing)}, which later stages read: {counts}. "
            "Loosen select.where, change select.val or select.test, or add images."
        )
    return counts


def _selected(config: SelectConfig, data: Path) -> pa.Table:
    groups = []
    if config.near_duplicates < 1:
        groups = duplicates.near_duplicate_groups(
            data / "teacher", config.near_duplicates, partial(say, err=True)
        )
    near = pa.table(
        {
            "image_id": pa.array([key for group in groups for key in group], pa.string()),
            "family": pa.array([group[0] for group in groups for _ in group], pa.string()),
        }
    )
    connection = database.connect(data)
    connection.register("near", near)
    connection.register("wanted", _wanted(config.where, data))
    return connection.sql(QUERY.format(val=config.val, test=config.test)).to_arrow_table()


def _wanted(where: str, data: Path) -> pa.Table:
    """row_id of the rows of images that meet the user's condition, which is one SQL expression.

    It runs on a connection without file access, over images and a similarity computed before.
    """
    named = "caption_similarity" in where.lower()  # it costs a read of all vectors
    similarity = caption_similarities(data) if named else NO_SIMILARITY
    try:
        condition = duckdb.SQLExpression(where)
        with database.confined(data) as connection:
            connection.register("similarity", similarity)
            return connection.sql(FACTS).filter(condition).select("row_id").to_arrow_table()
    except (duckdb.Error, pa.ArrowException) as error:
        raise PipelineError(
            f"select.where: {where!r} does not work as a condition over images: "
            f"{database.reason(error)}. It may name the columns of `images` and caption_similarity."
        ) from None


NO_SIMILARITY = pa.table(
    {"image_id": pa.array([], pa.string()), "caption_similarity": pa.array([], pa.float32())}
)
FACTS = "SELECT * EXCLUDE (jpg) FROM images LEFT JOIN similarity USING (image_id)"

# An exact duplicate shares its content's hash, a near duplicate its family: either way a group is
# one unit, its split follows from content alone, and one member that passes the filter is kept.
QUERY = """
WITH fetched AS (
    SELECT row_id, image_id, status, sha256_original FROM images
    QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY attempts DESC NULLS LAST, row_id) = 1
), embedded AS (
    SELECT image_id, true AS embedded FROM teacher WHERE view = 0
), families AS (
    SELECT fetched.*, embedded,
           coalesce(min(near.family) OVER (PARTITION BY sha256_original), sha256_original, image_id)
               AS family
    FROM fetched LEFT JOIN embedded USING (image_id)
    LEFT JOIN near USING (image_id)
), judged AS (
    SELECT *,
           CASE WHEN status <> 'ok' THEN status WHEN embedded IS NULL THEN 'no embedding'
                WHEN row_id NOT IN (SELECT row_id FROM wanted) THEN 'where' END AS flaw,
           min(sha256_original) OVER (PARTITION BY family) AS content
    FROM families
), hashed AS (
    SELECT *, CAST(('0x' || content[1:13])::UBIGINT AS DOUBLE) / power(16, 13) AS split_hash,
           first_value(CASE WHEN flaw IS NULL THEN image_id END) OVER (
               PARTITION BY family ORDER BY flaw NULLS FIRST, image_id
               ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING) AS kept,
           first_value(CASE WHEN flaw IS NULL THEN sha256_original END) OVER (
               PARTITION BY family ORDER BY flaw NULLS FIRST, image_id
               ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING) AS kept_content
    FROM judged
)
SELECT image_id,
       CASE WHEN split_hash < {test} THEN 'test'
            WHEN split_hash < {test} + {val} THEN 'val'
            WHEN split_hash IS NOT NULL THEN 'train' END AS split,
       flaw IS NULL AND image_id = kept AS keep,
       CASE WHEN flaw IS NOT NULL THEN flaw WHEN image_id = kept THEN NULL
            WHEN sha256_original = kept_content THEN 'duplicate' ELSE 'near duplicate' END AS reason,
       CASE WHEN flaw IS NULL AND image_id <> kept THEN kept END AS duplicate_of
FROM hashed ORDER BY image_id
"""


def _counts(table: pa.Table) -> dict[str, int]:
    counts: Counter[str] = Counter()
    kinds = table.group_by(["keep", "split", "reason"]).aggregate([([], "count_all")])
    for row in kinds.to_pylist():
        name = row["split"] if row["keep"] else f"left out: {row['reason']}"
        counts[name] += row["count_all"]
    return dict(sorted(counts.items()))
