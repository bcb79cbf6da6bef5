"""The Parquet contract: float16 unit vectors that DuckDB takes, and damage that never passes."""

import json
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import PipelineError
from pipeline.data import shards

ROWS, E = 600, 64


def vectors(rows: int = ROWS, size: int = E) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, size)).astype(np.float32)


def texts(rows: int = ROWS) -> pa.Table:
    return pa.table(
        {
            "text_id": [f"{i:032x}" for i in range(rows)],
            "image_id": [None if i % 7 == 0 else f"image {i}" for i in range(rows)],
            "text": [f"caption é {i}" for i in range(rows)],
            "embedding": shards.embedding_column(shards.to_float16(vectors(rows))),
        }
    )


def write(path: Path, table: pa.Table | None = None) -> Path:
    table = texts() if table is None else table
    shards.write_shard(path, shards.texts_schema(E), shards.in_groups(table), {"stage": "test"})
    return path


# Vectors


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_float16_costs_less_than_3e_7_of_the_cosine(scale):
    exact = vectors(500, 512).astype(np.float64)
    stored = shards.to_float16((exact * scale).astype(np.float32)).astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(stored, axis=1)
    assert (1 - (exact * stored).sum(axis=1) / lengths).max() <= 3e-7
    assert np.abs(np.linalg.norm(stored, axis=1) - 1).max() < 1e-3


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf, 1e30])
def test_a_vector_without_a_direction_is_refused(bad):
    """1e30 is finite, but its square is not: divided by its length it would become zero."""
    matrix = vectors(3)
    matrix[1] = bad
    with pytest.raises(PipelineError, match="zero or not finite"):
        shards.to_float16(matrix)


def test_embeddings_come_back_bit_by_bit_and_at_unit_length(tmp_path):
    given_ = shards.to_float16(vectors())
    column = shards.read_shard(write(tmp_path / "t.parquet"), "test")["embedding"]
    np.testing.assert_array_equal(shards.stored_embeddings(column), given_)
    found = shards.embedding_matrix(column)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_a_slice_of_a_column_gives_its_own_rows():
    column = shards.embedding_column(shards.to_float16(vectors()))
    np.testing.assert_array_equal(
        shards.stored_embeddings(column.slice(100, 5)), shards.stored_embeddings(column)[100:105]
    )


def test_no_rows_are_a_matrix_of_no_rows(tmp_path):
    column = shards.read_shard(write(tmp_path / "t.parquet", texts(0)), "test")["embedding"]
    assert shards.stored_embeddings(column).shape == (0, E)
    assert shards.embedding_matrix(column).shape == (0, E)


def test_duckdb_reads_embeddings_and_its_vector_functions_take_them(tmp_path):
    path = write(tmp_path / "t.parquet")
    expected = shards.to_float16(vectors()).astype(np.float32)
    cosines = (
        expected @ expected[0] / np.linalg.norm(expected, axis=1) / np.linalg.norm(expected[0])
    )
    one = f"(SELECT embedding FROM '{path}' WHERE text_id = '{0:032x}')"
    by_list, by_array = duckdb.sql(
        f"SELECT list(list_cosine_similarity(embedding, {one}) ORDER BY text_id), "
        f"list(array_cosine_similarity(embedding::FLOAT[{E}], {one}::FLOAT[{E}]) ORDER BY text_id) "
        f"FROM '{path}'"
    ).fetchall()[0]
    np.testing.assert_allclose(by_list, cosines, atol=1e-6)
    np.testing.assert_allclose(by_array, cosines, atol=1e-6)


# Files


def test_row_groups_are_those_of_the_tables(tmp_path):
    metadata = pq.read_metadata(write(tmp_path / "t.parquet"))
    rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert rows == [256, 256, 88] and max(rows) == shards.ROWS_PER_GROUP


def test_a_table_without_rows_is_a_row_group_without_rows(tmp_path):
    """Row group v * G + g holds view v of group g: an empty one keeps its place."""
    path, schema = tmp_path / "t.parquet", shards.texts_schema(E)
    shards.write_shard(path, schema, [texts(2), texts(0), texts(3)], {})
    with shards.open_shard(path, "test") as file:
        assert [file.metadata.row_group(i).num_rows for i in range(3)] == [2, 0, 3]


@pytest.mark.parametrize("schema", [shards.IMAGES, shards.SELECTION, shards.teacher_schema(E)])
def test_images_and_embeddings_are_plain_and_the_rest_is_compressed(schema, tmp_path):
    shards.write_shard(tmp_path / "t.parquet", schema, [schema.empty_table()], {})
    group = pq.read_metadata(tmp_path / "t.parquet").row_group(0)
    for i in range(group.num_columns):
        column = group.column(i)
        plain = column.path_in_schema.split(".")[0] in ("jpg", "mask", "embedding")
        assert column.compression == ("UNCOMPRESSED" if plain else "ZSTD"), column.path_in_schema
    assert pq.read_schema(tmp_path / "t.parquet").remove_metadata().equals(schema)


def test_the_footer_says_how_a_shard_was_made(tmp_path):
    path = write(tmp_path / "t.parquet")
    assert shards.provenance(path, "test") == {"stage": "test"}
    assert json.loads(pq.read_schema(path).metadata[b"provenance"]) == {"stage": "test"}


def test_the_same_rows_give_the_same_bytes(tmp_path):
    first, second = write(tmp_path / "a.parquet"), write(tmp_path / "b.parquet")
    assert first.read_bytes() == second.read_bytes()


def test_a_table_that_does_not_fit_the_schema_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="schema"):
        write(tmp_path / "t.parquet", texts().drop_columns("text"))


# Damage


def refusal(path: Path, columns=None) -> str:
    with pytest.raises(PipelineError) as caught:
        shards.read_shard(path, "teacher-embed", columns)
    return str(caught.value)


def test_no_shards_names_the_folder_and_the_command(tmp_path):
    with pytest.raises(PipelineError, match=rf"{tmp_path}.*pipeline download"):
        shards.shard_paths(tmp_path, "download")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" * 100, b"no Parquet at all"])
def test_what_is_no_parquet_is_named_with_the_command_that_mends_it(data, tmp_path):
    (tmp_path / "t.parquet").write_bytes(data)
    message = refusal(tmp_path / "t.parquet")
    assert str(tmp_path / "t.parquet") in message and "`pipeline teacher-embed` again" in message


def test_a_missing_shard_is_named(tmp_path):
    assert "t.parquet" in refusal(tmp_path / "t.parquet")


def test_anothers_parquet_is_refused_not_guessed_at(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"url": ["a"], "embedding": [[1.0]]}), path)
    assert "was not written by this pipeline" in refusal(path, ["text", "embedding"])
    with pytest.raises(PipelineError, match="was not written by this pipeline"):
        shards.provenance(path, "teacher-embed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "t.parquet")


def pages_end(data: bytes) -> int:
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


@settings(max_examples=150, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_shard_is_always_refused(whole, share):
    data = whole.read_bytes()
    cut = whole.with_name("cut.parquet")
    cut.write_bytes(data[: int(share * len(data))])
    assert "damaged" in refusal(cut)


@settings(max_examples=300, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_data_never_passes_for_data(whole, share, bit):
    """Embeddings are uncompressed: without checksums such a bit is another vector, silently."""
    data, expected = bytearray(whole.read_bytes()), shards.read_shard(whole, "test")
    data[4 + int(share * (pages_end(data) - 4))] ^= 1 << bit
    flipped = whole.with_name("flipped.parquet")
    flipped.write_bytes(data)
    try:
        assert shards.read_shard(flipped, "test").equals(expected)
    except PipelineError as error:
        assert "damaged" in str(error)


@settings(max_examples=150, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_footer_is_refused_or_read_but_never_a_crash(whole, share, bit):
    data = bytearray(whole.read_bytes())
    start = pages_end(data)
    data[start + int(share * (len(data) - start))] ^= 1 << bit
    flipped = whole.with_name("flipped.parquet")
    flipped.write_bytes(data)
    for read in (shards.read_shard, shards.provenance):
        try:
            read(flipped, "test")
        except PipelineError as error:
            assert str(flipped) in str(error)


def test_a_message_names_a_command_that_exists(tmp_path):
    """The stage's name has an underscore or two words, its command a hyphen or a blank."""
    for stage, said in (
        ("teacher_embed", "teacher-embed"),
        ("import_embeddings", "import embeddings"),
    ):
        with pytest.raises(PipelineError, match=f"`pipeline {said}`"):
            shards.shard_paths(tmp_path, stage)
        (tmp_path / "x.parquet").write_bytes(b"no Parquet")
        with pytest.raises(PipelineError, match=f"`pipeline {said}`"):
            shards.read_shard(tmp_path / "x.parquet", stage)
        (tmp_path / "x.parquet").unlink()
