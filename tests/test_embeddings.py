"""Stored vectors read a shard at a time say what one query over all of them says."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import seeing, stored

from pipeline.data import database, shards
from pipeline.data.embeddings import (
    caption_similarities,
    indexed_vectors,
    split_vectors,
    training_mean,
)

SIMILARITY = """
SELECT image_id, max(list_cosine_similarity(teacher.embedding, texts.embedding))
FROM texts JOIN teacher USING (image_id) WHERE view = 0 GROUP BY image_id
"""
KEPT = """
SELECT image_id, embedding FROM teacher JOIN selection USING (image_id)
WHERE view = 0 AND keep AND split = ? ORDER BY image_id
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    stored.write_data(folder)
    return folder


def test_a_captions_similarity_is_the_best_cosine_of_an_image_and_its_captions(data):
    expected = dict(database.connect(data).sql(SIMILARITY).fetchall())
    found = caption_similarities(data)
    got = dict(zip(*(found[name].to_pylist() for name in found.column_names), strict=True))
    assert len(expected) == 20 and got.keys() == expected.keys()
    assert got == pytest.approx(expected, abs=1e-6)


def test_a_splits_vectors_and_the_mean_are_those_of_one_sorted_query(data):
    for split in ("train", "val"):
        rows = database.connect(data).sql(KEPT, params=[split]).fetchall()
        ids, vectors = split_vectors(data, split)
        assert ids == [key for key, _ in rows]
        expected = np.array([vector for _, vector in rows], np.float32)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
        if split == "train":
            np.testing.assert_allclose(training_mean(data), expected.mean(axis=0), atol=1e-6)


def test_of_an_index_only_the_vectors_that_are_asked_for_are_taken(tmp_path):
    """Whatever its shards and row groups; what it does not hold is said."""
    vectors = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float16)
    rows = [{"image_id": f"{i:032x}", "embedding": v} for i, v in enumerate(vectors)]
    for shard, groups in enumerate([[rows[6:], rows[:2]], [rows[2:6]], []]):
        seeing.write(tmp_path / f"{shard:05}.parquet", shards.index_schema(4), *groups)
    ids = [f"{i:032x}" for i in (1, 4, 7, 10, 12)]
    found, known = indexed_vectors(tmp_path, ids)
    assert known.tolist() == [True, True, True, False, False]
    expected = vectors[[1, 4, 7]].astype(np.float32)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found[:3], expected, atol=1e-6)
    assert not indexed_vectors(tmp_path, ids[3:])[1].any()


def test_captions_lie_in_row_groups_beside_their_images(data):
    """What training reads with one window."""
    for path in sorted((data / "images").glob("*.parquet")):
        images, texts = pq.ParquetFile(path), pq.ParquetFile(data / "teacher/texts" / path.name)
        assert images.num_row_groups == texts.num_row_groups
        for group in range(images.num_row_groups):
            owners = set(texts.read_row_group(group)["image_id"].to_pylist())
            assert owners <= set(images.read_row_group(group)["image_id"].to_pylist())
