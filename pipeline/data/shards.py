"""The Parquet contract: what every shard of data/ holds, and the only code that writes and reads it.

Plain Parquet for anyone: names explain themselves, embeddings are lists of float16 that DuckDB's
vector functions take as they are. A shard's footer says how it was made (`provenance`).
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError
from pipeline.core.layout import command
from pipeline.data.remote_shards import opened, shards_in

VERSION = 2  # raise it when a schema or the order of rows changes
ROWS_PER_GROUP = 256  # bounds a reader's memory: some megabytes of JPEGs
# Of tables without images: counts are fast, and Parquet takes 32,767 groups.
TABLE_ROWS_PER_GROUP = 65_536
REPEATED = {"status", "label", "license", "split", "reason"}  # columns of few values

BOX = pa.struct([("text", pa.string()), *[(c, pa.float32()) for c in ("x0", "y0", "x1", "y1")]])

IMAGES = pa.schema(
    [
        ("row_id", pa.string()),  # hash of url and its occurrence in the manifest: unique
        ("image_id", pa.string()),  # hash of url as written
        ("url", pa.string()),
        ("caption", pa.string()),  # the first one
        ("captions", pa.list_(pa.string())),
        ("label", pa.string()),
        ("license", pa.string()),
        ("boxes", pa.list_(BOX)),  # in px of the stored image
        ("mask", pa.binary()),  # PNG of class indices, of the stored image's size
        ("sha256_expected", pa.string()),  # the manifest's own, of the bytes at url
        ("status", pa.string()),  # ok, or why there is no image
        ("error", pa.string()),
        ("attempts", pa.int32()),  # fetches so far
        ("width", pa.int32()),  # of the stored image, px
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("original_bytes", pa.int64()),  # that were fetched
        ("sha256_original", pa.string()),  # of the fetched bytes
        ("sha256", pa.string()),  # of jpg
        ("jpg", pa.binary()),
    ]
)

SELECTION = pa.schema(
    [
        ("image_id", pa.string()),
        ("split", pa.string()),  # train, val or test: a function of content
        ("keep", pa.bool_()),
        ("reason", pa.string()),  # why not kept; null where kept
        ("duplicate_of", pa.string()),  # image_id of the one kept of its group
    ]
)


def teacher_schema(embedding_size: int) -> pa.Schema:
    """One row per good image and view; row groups never mix views."""
    return pa.schema(
        [
            ("image_id", pa.string()),
            ("view", pa.int32()),  # 0 is the teacher's own preprocessing
            ("left", pa.float32()),  # crop box in px of the stored image
            ("top", pa.float32()),
            ("right", pa.float32()),
            ("bottom", pa.float32()),
            ("flip", pa.bool_()),
            ("sha256", pa.string()),  # of the JPEG that was embedded
            ("embedding", pa.list_(pa.float16(), embedding_size)),  # unit length
        ]
    )


def texts_schema(embedding_size: int) -> pa.Schema:
    """One row per caption of an image, and one per prompt (image_id null).

    Row group g of texts/NNNNN.parquet holds the captions of row group g of images/NNNNN.parquet,
    in its order, so that both are read through one window.
    """
    return pa.schema(
        [
            ("text_id", pa.string()),
            ("image_id", pa.string()),
            ("text", pa.string()),
            ("embedding", pa.list_(pa.float16(), embedding_size)),  # unit length
        ]
    )


def index_schema(embedding_size: int) -> pa.Schema:
    """The student's own embeddings of all kept images, whatever their split."""
    return pa.schema(
        [("image_id", pa.string()), ("embedding", pa.list_(pa.float16(), embedding_size))]
    )


def to_float16(vectors: np.ndarray) -> np.ndarray:
    """(n, E) float32 -> (n, E) float16, scaled to unit length in float32 before the cast.

    Raises PipelineError on vectors that are zero or not finite: they can only be a fault upstream.
    """
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(length).all() or (length == 0).any():
        raise PipelineError(
            "an embedding is zero or not finite. Check the teacher's weights (or use "
            "`dtype: float32`) and run the stage again."
        )
    return (vectors / length).astype(np.float16)


def embedding_column(vectors: np.ndarray) -> pa.Array:
    """(n, E) float16 -> Arrow column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def stored_embeddings(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Arrow column, of a shard or a query -> (n, E) in its own type, bit for bit."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values = whole.flatten().to_numpy(zero_copy_only=False)
    if pa.types.is_fixed_size_list(whole.type):
        return values.reshape(-1, whole.type.list_size)
    return values.reshape(len(whole), -1)  # of DuckDB, whose lists do not say their length


def embedding_matrix(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Arrow column, of a shard or a query -> (n, E) float32, unit length restored."""
    return unit_rows(stored_embeddings(column))


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """(n, E) -> the same rows at unit length, float32 at least; a row of zeros stays one."""
    wide = vectors.astype(np.result_type(vectors, np.float32), copy=False)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True).clip(1e-12)


def write_shard(path: Path, schema: pa.Schema, groups: Iterable[pa.Table], provenance: dict) -> int:
    """Write tables as row groups, one each; returns the number of rows.

    Images and embeddings stay uncompressed: it buys nothing.
    """
    schema = schema.with_metadata({"provenance": json.dumps(provenance, sort_keys=True)})
    plain = {"jpg", "mask", "embedding"}
    leaves = [pq_path for field in schema for pq_path in _leaves(field)]
    codecs = {name: "none" if name.split(".")[0] in plain else "zstd" for name in leaves}
    dictionary = [name for name in leaves if name.split(".")[0] in REPEATED]
    rows = 0
    with pq.ParquetWriter(
        path, schema, compression=codecs, use_dictionary=dictionary, write_page_checksum=True
    ) as writer:
        for table in groups:
            writer.write_table(table.cast(schema), row_group_size=max(1, table.num_rows))
            rows += table.num_rows
    return rows


def _leaves(field: pa.Field, prefix: str = "") -> list[str]:
    """Parquet's names of the physical columns below a field."""
    name = prefix + field.name
    if pa.types.is_struct(field.type):
        return [leaf for child in field.type for leaf in _leaves(child, name + ".")]
    if pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type):
        element = field.type.value_field.with_name("element")
        return _leaves(element, name + ".list.")
    return [name]


def in_groups(table: pa.Table, rows: int = ROWS_PER_GROUP) -> Iterable[pa.Table]:
    """Slices of so many rows."""
    for start in range(0, table.num_rows, rows):
        yield table.slice(start, rows)


def shard_paths(folder: Path, stage: str) -> list[Path]:
    """The shards of a folder, sorted. Raises PipelineError where there is none."""
    if paths := shards_in(folder):
        return paths
    raise PipelineError(f"no *.parquet in {folder}. Run `pipeline {command(stage)}` first.")


def open_shard(path: Path, stage: str, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """A file whose pages are checked against their checksums when they are read; footer: its own,
    where it was read before.

    Raises PipelineError for a truncated or foreign file, with the command that mends it.
    """
    try:
        return pq.ParquetFile(opened(path), metadata=footer, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, stage, error) from None


def read_shard(path: Path, stage: str, columns: list[str] | None = None) -> pa.Table:
    """A whole shard, or some of its columns. Raises PipelineError where it is damaged or foreign."""
    try:
        with open_shard(path, stage) as file:
            table = file.read(columns=columns)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, stage, error) from None
    if missing := set(columns or ()) - set(table.column_names):
        if b"provenance" in (table.schema.metadata or {}):
            raise PipelineError(
                f"{path} was written by an earlier version (no column {', '.join(sorted(missing))}). "
                f"Run `pipeline {command(stage)}`: what it holds is reused, not paid for again."
            )
        raise _foreign(path, stage, f"no column {', '.join(sorted(missing))}")
    return table


def row_groups(path: Path, stage: str, columns: list[str]) -> Iterator[pa.Table]:
    """Columns of a shard, a row group at a time. Raises PipelineError where it is damaged."""
    try:
        with open_shard(path, stage) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, stage, error) from None


def provenance(path: Path, stage: str) -> dict:
    """What a shard's footer says of its making."""
    with open_shard(path, stage) as file:
        metadata = file.schema_arrow.metadata or {}
    try:
        return json.loads(metadata[b"provenance"])
    except (KeyError, ValueError):
        raise _foreign(path, stage, "no provenance in its footer") from None


def differences(made: dict, asked: dict, prefix: str = "") -> list[str]:
    """Dotted names of what a shard was made with and is now asked otherwise."""
    names = []
    for name, value in asked.items():
        if isinstance(value, dict) and isinstance(made.get(name), dict):
            names += differences(made[name], value, f"{prefix}{name}.")
        elif made.get(name) != value:
            names.append(prefix + name)
    return names


def _foreign(path: Path, stage: str, sign: str) -> PipelineError:
    return PipelineError(
        f"{path} was not written by this pipeline ({sign}). Move it away and run `pipeline {command(stage)}`."
    )


def _damaged(path: Path, stage: str, error: Exception) -> PipelineError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return PipelineError(
        f"{path} is damaged or no Parquet file ({reason}). "
        f"Delete the folder {path.parent} and run `pipeline {command(stage)}` again."
    )
