"""Groups of near duplicates are the connected components of the pairs above the threshold."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import PipelineError
from pipeline.data import duplicates, shards
from pipeline.data.duplicates import near_duplicate_groups

E = 8


def write_teacher(folder: Path, ids: list[list[str]], vectors: list[np.ndarray], views: int = 1):
    """One shard per list of ids; views after the first hold one vector that all images share."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, (names, matrix) in enumerate(zip(ids, vectors, strict=True)):
        groups = []
        for view in range(views):
            same = np.tile(np.eye(E, dtype=np.float32)[:1], (len(names), 1))
            stored = shards.to_float16(matrix if view == 0 else same)
            columns = {"image_id": pa.array(names, pa.string())}
            columns |= {"view": pa.array([view] * len(names), pa.int32())}
            for side in ("left", "top", "right", "bottom"):
                columns[side] = pa.array([0.0] * len(names), pa.float32())
            columns |= {"flip": pa.array([False] * len(names)), "sha256": columns["image_id"]}
            table = pa.table(columns | {"embedding": shards.embedding_column(stored)})
            groups += [table.slice(i, 3) for i in range(0, len(table), 3)] or [table]
        path = folder / f"images/{number:05}.parquet"
        shards.write_shard(path, shards.teacher_schema(E), groups, {})


def brute_groups(ids: list[str], vectors: np.ndarray, threshold: float) -> list[list[str]]:
    """By repeatedly joining sets, pair by pair."""
    sets = [{name} for name in ids]
    stored = shards.to_float16(vectors).astype(np.float64)
    stored /= np.linalg.norm(stored, axis=1, keepdims=True)
    for i in range(len(ids)):
        for j in range(i):
            if stored[i] @ stored[j] >= threshold:
                a, b = (next(s for s in sets if ids[k] in s) for k in (i, j))
                if a is not b:
                    sets.remove(b)
                    a |= b
    return sorted(sorted(s) for s in sets if len(s) > 1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 40), spread=st.floats(0.05, 1.0))
def test_groups_are_those_of_brute_force_however_images_are_sharded(
    seed, count, spread, tmp_path_factory
):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(1 + count // 4, E))
    vectors = centres[rng.integers(0, len(centres), count)] + spread * rng.normal(size=(count, E))
    vectors = vectors.astype(np.float32)
    ids = [f"{i:03}" for i in rng.permutation(count)]
    expected = brute_groups(ids, vectors, 0.9)
    for shards_ in (1, 3):
        folder = tmp_path_factory.mktemp("teacher")
        parts = np.array_split(np.arange(count), shards_)
        write_teacher(folder, [[ids[i] for i in p] for p in parts], [vectors[p] for p in parts])
        assert sorted(near_duplicate_groups(folder, 0.9)) == expected


def test_a_chain_of_near_duplicates_is_one_group_across_shards(tmp_path):
    """First and last are far apart, each is close to the next."""
    angles = np.linspace(0, np.pi / 2, 10)
    vectors = np.zeros((10, E), np.float32)
    vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
    ids = [f"{i}" for i in range(10)]
    write_teacher(tmp_path, [ids[::2], ids[1::2]], [vectors[::2], vectors[1::2]])
    assert near_duplicate_groups(tmp_path, 0.98) == [ids]
    assert near_duplicate_groups(tmp_path, 0.99) == []


def test_only_view_0_is_compared(tmp_path):
    write_teacher(tmp_path, [["a", "b", "c", "d"]], [np.eye(E, dtype=np.float32)[1:5]], views=3)
    assert near_duplicate_groups(tmp_path, 0.5) == []


def test_images_without_a_pair_and_empty_shards_are_no_groups(tmp_path):
    vectors = np.eye(E, dtype=np.float32)
    write_teacher(tmp_path, [[], ["a"], ["b", "c"]], [vectors[:0], vectors[:1], vectors[[1, 1]]])
    assert near_duplicate_groups(tmp_path, 0.999) == [["b", "c"]]


def test_no_teacher_names_the_command(tmp_path):
    with pytest.raises(PipelineError, match="pipeline teacher-embed"):
        near_duplicate_groups(tmp_path, 0.9)


# Too many for all pairs


def clustered(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Pairs of close vectors around `count` far ones: 2 * count vectors."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count, size))
    near = centres + 0.02 * rng.normal(size=(count, size))
    return np.concatenate([centres, near]).astype(np.float32)


def write_wide(folder: Path, vectors: np.ndarray, parts: int) -> list[str]:
    (folder / "images").mkdir(parents=True)
    names = [f"{i:06}" for i in range(len(vectors))]
    for number, rows in enumerate(np.array_split(np.arange(len(vectors)), parts)):
        columns = {"image_id": [names[i] for i in rows], "view": [0] * len(rows)}
        columns |= dict.fromkeys(("left", "top", "right", "bottom"), [0.0] * len(rows))
        columns |= {"flip": [False] * len(rows), "sha256": columns["image_id"]}
        table = pa.table(columns).append_column(
            "embedding", shards.embedding_column(shards.to_float16(vectors[rows]))
        )
        path, schema = folder / f"images/{number:05}.parquet", shards.teacher_schema(E_WIDE)
        shards.write_shard(path, schema, shards.in_groups(table), {})
    return names


E_WIDE = 32


def test_above_the_limit_cells_find_the_pairs_and_say_their_recall(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(duplicates, "EXACT", 100)
    names = write_wide(tmp_path, clustered(600, E_WIDE), 3)
    said = []
    found = near_duplicate_groups(tmp_path, 0.95, said.append)
    expected = {(names[i], names[i + 600]) for i in range(600)}
    assert len({tuple(group) for group in found} & expected) >= 0.97 * 600
    assert {tuple(group) for group in found} <= expected
    (sentence,) = said
    assert "approximately" in sentence
    assert float(sentence.split("recall ")[1].rstrip(").")) > 0.97
    assert near_duplicate_groups(tmp_path, 0.95, said.append) == found


def test_copies_are_one_vector_and_many_pairs_one_forest(tmp_path, monkeypatch):
    """500 equal vectors and 300 that are close to each other: 170,000 pairs, held 1,000 at a time."""
    rng = np.random.default_rng(1)
    same = np.tile(rng.normal(size=(1, E_WIDE)), (500, 1))
    alike = rng.normal(size=(1, E_WIDE)) + 0.001 * rng.normal(size=(300, E_WIDE))
    apart = rng.normal(size=(50, E_WIDE))
    names = write_wide(tmp_path, np.concatenate([same, alike, apart]).astype(np.float32), 2)
    monkeypatch.setattr(duplicates, "EDGES", 1_000)
    found = near_duplicate_groups(tmp_path, 0.99)
    assert found == [names[:500], names[500:800]]
