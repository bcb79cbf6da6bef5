"""Precision of searches for things that boxes name, against a plain count."""

import numpy as np
import pyarrow.parquet as pq
from support import seeing, stored

from pipeline.data import shards
from pipeline.evaluation.box_search import Best, box_search_metrics


def test_the_best_of_blocks_are_the_best_of_all():
    rng = np.random.default_rng(0)
    scores, right = rng.random((5, 100), np.float32), rng.random((5, 100)) < 0.3
    best = Best(5, 8)
    for start in range(0, 100, 7):
        best.add(scores[:, start : start + 7], right[:, start : start + 7])
    by_hand = [right[i][np.argsort(-scores[i])[:8]].mean() for i in range(5)]
    np.testing.assert_array_equal(best.precision(), by_hand)


def collection(tmp_path, named: list[bool]):
    """`stored` images whose teacher vectors are the student's too; `named`: which hold the thing."""
    stored.write_data(tmp_path, count=len(named))
    path = tmp_path / "images/00000.parquet"
    rows = pq.read_table(path).to_pylist()
    for row, holds in zip(rows, named, strict=True):
        row["boxes"] = [dict(text="a thing", x0=0, y0=0, x1=9, y1=9)] if holds else None
    stored._write(path, shards.IMAGES, [rows[k : k + 5] for k in range(0, len(rows), 5)])
    teacher = pq.read_table(tmp_path / "teacher/images/00000.parquet").to_pylist()
    index = [{k: r[k] for k in ("image_id", "embedding")} for r in teacher if r["view"] == 0]
    seeing.write(tmp_path / "index/00000.parquet", shards.index_schema(32), index)
    vector = stored.vector(9, 0)
    prompt = [{"text_id": "a", "text": "a thing", "embedding": vector}]
    seeing.write(tmp_path / "teacher/texts/prompts.parquet", shards.texts_schema(32), prompt)
    vectors = np.array([row["embedding"] for row in index], np.float32)
    return np.argsort(-(vectors @ np.asarray(vector, np.float32)), kind="stable")


def test_precision_is_the_share_of_right_images_among_the_best_eight(tmp_path):
    order = collection(tmp_path / "first", [False] * 20)
    named = np.zeros(20, bool)
    named[order[[0, 1, 2, 5, 9, 10, 15, 19]]] = True  # four of the best eight
    collection(tmp_path / "second", named.tolist())
    found = box_search_metrics(tmp_path / "second", tmp_path / "second/index")
    assert found.facts["texts"] == 1
    assert found["precision@8"].value == found["precision@8"].ceiling == 0.5
    assert found["precision@8"].floor == 8 / 20
    assert found["worst_precision@8"].value == 0.5 and found.facts["worst_text"] == "a thing"


def test_a_thing_in_fewer_images_than_are_shown_is_left_out(tmp_path):
    collection(tmp_path, [True] * 7 + [False] * 13)
    assert box_search_metrics(tmp_path, tmp_path / "index") is None
