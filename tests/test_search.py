"""Searching the collection: the right image wins, by each side, and mistakes are told apart."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import seeing, worlds

from pipeline.core.errors import PipelineError
from pipeline.data.shards import to_float16, unit_rows
from pipeline.explore.nearest import MARGIN, nearest
from pipeline.explore.query_vectors import Queries
from pipeline.explore.search import (
    Collection,
    Hit,
    Hits,
    Query,
    hits_text,
    search_figure,
)


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Collection:
    data = tmp_path_factory.mktemp("handmade")
    return Collection(data, seeing.handmade(data))


@pytest.fixture(scope="module")
def data(finished_world) -> Path:
    return finished_world


def named(hits) -> list[str]:
    return [hit.image_id for hit in hits]


def test_each_side_ranks_by_its_own_vectors(collection):
    hits = collection.search(Queries(collection.data).text("apple"), 1)
    assert named(hits.teacher) == ["apple"]
    assert named(hits.student) == ["bread"]  # which the student takes for an apple
    assert hits.teacher[0].score == pytest.approx(1)
    assert hits.teacher[0].caption == "a picture of apple"
    assert hits.teacher[0].url == "file:apple.jpg"


def test_a_repeated_url_does_not_hide_the_image(collection):
    """Image apple has a second row, without bytes."""
    hits = collection.search(Queries(collection.data).text("apple"), 4)
    assert all(hit.jpg for hit in [*hits.student, *hits.teacher])


def test_a_label_stands_where_there_is_no_caption(tmp_path):
    labelled = Collection(tmp_path, seeing.handmade(tmp_path, named_by="label"))
    hits = labelled.search(Query("bread", *np.eye(4, dtype=np.float32)[[1, 1]]), 2)
    assert hits.teacher[0].caption == "a picture of bread"
    assert "a picture of bread" in hits_text(hits, "table")


def test_scores_fall_and_are_cosines(collection):
    vector = np.array([0.1, 0.7, 0.5, 0.5], np.float32)
    hits = collection.search(Query("mixture", vector, vector), 4)
    assert [hit.score for hit in hits.teacher] == pytest.approx([0.7, 0.5, 0.5, 0.1])
    assert named(hits.teacher) == ["bread", "cloud", "door", "apple"]  # a tie goes by image_id


def test_asking_for_more_than_there_are_gives_all_and_says_so(collection):
    hits = collection.search(Queries(collection.data).text("door"), 9)
    assert len(hits.student) == len(hits.teacher) == 4
    assert hits.notes == ["9 images were asked for; the collection holds 4."]


def test_no_image_at_all_is_no_search(collection):
    with pytest.raises(PipelineError, match="at least one image"):
        collection.search(Queries(collection.data).text("door"), 0)


def test_only_what_is_drawn_is_read(data, tmp_path):
    hits = Collection(data).search(Queries(data).text("a red circle"), 40)
    assert all(hit.jpg for hit in [*hits.student[:12], *hits.teacher[:12]])
    assert not all(hit.jpg for hit in hits.student)
    search_figure(hits, tmp_path / "hits.png")


@pytest.mark.parametrize("k", [1, 7, 50, 60])
def test_nearest_agrees_with_a_full_sort(k):
    random = np.random.default_rng(0)
    vectors = random.integers(-2, 3, (50, 3)).astype(np.float32)  # many ties
    query = np.array([1, 2, -1], np.float32)
    rows, scores = nearest(vectors, query, k)
    expected = sorted(range(50), key=lambda i: (-(vectors[i] @ query), i))[:k]
    assert rows.tolist() == expected
    np.testing.assert_array_equal(scores, vectors[expected] @ query)


def test_a_float16_product_and_a_float32_second_look_give_the_answer_of_float32():
    """Among thousands that a float16 product cannot tell apart."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=512)
    vectors = to_float16((centre + 0.3 * rng.normal(size=(20_000, 512))).astype(np.float32))
    query = unit_rows((centre + 0.3 * rng.normal(size=(1, 512))).astype(np.float32))[0]
    exact = unit_rows(vectors) @ query
    rough = (torch.from_numpy(vectors) @ torch.from_numpy(query.astype(np.float16))).numpy()
    assert np.abs(rough.astype(np.float32) - exact).max() < MARGIN
    rows, scores = nearest(vectors, query, 25)
    expected = np.argsort(-exact, kind="stable")[:25]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, exact[expected], atol=1e-6)


def test_a_large_collection_answers_as_a_small_one(tmp_path, monkeypatch, collection):
    """Mapped float16 files beside float32 in memory; an image without a teacher vector is left out."""
    query = Query("q", np.eye(4, dtype=np.float32)[1], np.eye(4, dtype=np.float32)[2])
    monkeypatch.setattr("pipeline.explore.nearest.SMALL", 0)
    monkeypatch.setattr("pipeline.data.scratch.SMALL", 0)
    large = Collection(collection.data, collection.data / "index")
    assert large.student.dtype == np.float16 and isinstance(large.teacher, np.memmap)
    assert "apple" in large and "zebra" not in large and "" not in large
    small_hits, large_hits = collection.search(query, 4), large.search(query, 4)
    for by in ("student", "teacher"):
        few = [(hit.rank, hit.image_id) for hit in getattr(small_hits, by)]
        assert [(hit.rank, hit.image_id) for hit in getattr(large_hits, by)] == few


def test_spaces_around_a_stored_text_do_not_matter(collection):
    query = Queries(collection.data).text("  door \n")
    assert query.student.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_an_empty_text_is_refused(collection, text):
    with pytest.raises(PipelineError, match="the text is empty"):
        Queries(collection.data).text(text)


@pytest.mark.parametrize("text", ["doors", "🦀", "door " * 10_000])
def test_an_unknown_text_without_a_teacher_names_stored_ones(collection, text):
    with pytest.raises(PipelineError, match=r"no stored embedding .* door") as raised:
        Queries(collection.data).text(text)
    assert len(str(raised.value)) < 500


def test_the_table_holds_one_line_a_hit(collection):
    lines = hits_text(collection.search(Queries(collection.data).text("cloud"), 2), "table")
    header, _, *rows = lines.splitlines()
    assert header.split() == ["by", "rank", "score", "image_id", "caption", "url"]
    assert [row.split()[:2] for row in rows] == [
        ["student", "1"], ["student", "2"], ["teacher", "1"], ["teacher", "2"],
    ]  # fmt: skip


def test_json_and_csv_hold_the_same_hits(collection):
    hits = collection.search(Queries(collection.data).text("cloud"), 2)
    parsed = json.loads(hits_text(hits, "json"))
    assert parsed["query"] == "cloud" and parsed["collection"] == 4
    rows = list(csv.DictReader(io.StringIO(hits_text(hits, "csv"))))
    assert [{k: str(v) for k, v in row.items()} for row in parsed["hits"]] == rows


def test_a_caption_cannot_steer_the_terminal(collection):
    hits = collection.search(Queries(collection.data).text("cloud"), 1)
    evil = hits.student[0].__class__(1, 0.5, "x", "\x1b[31mred\nnew line", "file:x", b"")
    table = hits_text(hits.__class__("t", 1, [evil], [evil], []), "table")
    assert "\x1b" not in table and len(table.splitlines()) == 2 + 2


def test_the_figure_is_a_png_and_the_same_every_time(collection, tmp_path):
    hits = collection.search(Queries(collection.data).text("cloud"), 3)
    for name in ("a.png", "b.png"):
        search_figure(hits, tmp_path / name)
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and "Software" not in image.info
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 20  # not empty
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_students_best_images_stand_above_the_teachers(collection, tmp_path):
    def hit(colour: str):
        out = io.BytesIO()
        Image.new("RGB", (40, 40), colour).save(out, "JPEG")
        return Hit(1, 0.5, colour, "🦀 $x^2$ " * 40, "file:x", out.getvalue())

    hits = Hits("$\\frac{1}$ 🦀 " * 40, 1, [hit("red")], [hit("blue")], ["a note " * 100])
    search_figure(hits, tmp_path / "hits.png")
    with Image.open(tmp_path / "hits.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    red, blue = (pixels[..., c] - pixels[..., 2 - c] > 230 for c in (0, 2))
    assert red.any() and blue.any()
    assert np.flatnonzero(red.any(axis=1)).max() < np.flatnonzero(blue.any(axis=1)).min()


def test_searching_needs_a_student_and_its_index(small_world, data, tmp_path):
    with pytest.raises(PipelineError, match="Run `pipeline distill` first"):
        Collection(small_world.data)
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    shutil.rmtree(copy / "evaluation")
    with pytest.raises(PipelineError, match="Run `pipeline evaluate` first"):
        Collection(copy)


def test_an_index_of_another_student_is_refused(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    other = {"sha256": "0" * 32}
    worlds.forge_stamp(
        copy / "student", lambda stamp: stamp["files"]["model.safetensors"].update(other)
    )
    with pytest.raises(PipelineError, match="not made from the student that data/ holds now"):
        Collection(copy)


def test_the_text_tower_answers_what_is_not_stored(data, small_world):
    queries = Queries(data, small_world.card)
    stored, fresh = queries.text("a red circle"), queries.text("a red circle!")
    assert "teacher" in vars(queries)  # loaded by the second one
    assert stored.student @ fresh.student > 0.5
    assert fresh.student @ fresh.student == pytest.approx(1, abs=1e-5)


def test_the_text_tower_and_the_store_agree(data, small_world):
    queries = Queries(data, small_world.card)
    direct = queries.teacher.embed_texts(["a red circle"])[0]
    np.testing.assert_allclose(queries.text("a red circle").teacher, direct, atol=2e-3)


def test_a_text_that_is_too_long_is_cut_with_a_note(data, small_world):
    queries = Queries(data, small_world.card)
    assert queries.text("word " * 500).notes == ["Only the first 16 tokens of the text count."]
    assert queries.text("🦀 crab").notes == []


def test_a_text_without_tokens_is_refused(data, small_world):
    with pytest.raises(PipelineError, match="no token"):
        Queries(data, small_world.card).text("&nbsp;")


def test_an_image_finds_itself_by_both(data, small_world):
    query = Queries(data, small_world.card).image(small_world.root / "7.jpg")
    hits = Collection(data).search(query, 1)
    for side in (hits.student, hits.teacher):
        assert side[0].url == "file:7.jpg"
        assert side[0].score > 0.999


def test_without_the_teacher_the_students_vector_asks_both(data, small_world):
    query = Queries(data).image(small_world.root / "7.jpg")
    np.testing.assert_array_equal(query.student, query.teacher)
    assert "no teacher card was named" in query.notes[0]
    assert Collection(data).search(query, 1).student[0].url == "file:7.jpg"


@pytest.fixture
def imported(data, tmp_path) -> Path:
    """data/ whose teacher vectors seem to have been imported under the small teacher's card."""
    shutil.copytree(data / "teacher", tmp_path / "data/teacher")

    def forge(stamp: dict) -> None:
        stamp |= {"stage": "import_embeddings"}
        stamp["summary"] |= {"dtype": "imported", "batch": None}
        stamp["summary"]["teacher"] |= {"config": None, "version": None}

    worlds.forge_stamp(tmp_path / "data/teacher", forge)
    return tmp_path / "data"


def test_imported_vectors_know_their_teacher_by_its_card(imported, small_world, tmp_path):
    assert Queries(imported, small_world.card).teacher is not None
    other = worlds.write_teacher(tmp_path / "other", seed=1)
    with pytest.raises(PipelineError, match="is not the teacher of data/teacher"):
        Queries(imported, other).text("something new")


def test_looking_downloads_no_weights(imported):
    """The card names a tag of open_clip's hub, and nothing lies in the cache."""
    code = """
    import os, sys
    os.environ["HF_HOME"] = sys.argv[1]
    from pathlib import Path
    asked = []
    sys.addaudithook(lambda event, found: event.startswith("socket.") and asked.append((event, found)))
    from pipeline.explore.query_vectors import Queries
    queries = Queries(Path(sys.argv[1]), Path(sys.argv[2]))
    assert queries.teacher is None
    assert not [event for event in asked if "connect" in event[0] or "getaddr" in event[0]], asked
    print(queries.no_teacher)
    """
    card = Path(__file__).parents[1] / "manifests/teachers/clip-vit-b32.yaml"
    process = worlds.run_code(code, imported, card)
    said, complained = process.communicate(timeout=120)
    assert process.returncode == 0, complained
    assert "clip-vit-b32.yaml: ViT-B-32-quickgelu with openai cannot be loaded" in said
    assert "ERROR" not in complained


def test_stored_texts_of_the_same_words_are_the_nearest(collection):
    queries = Queries(collection.data)
    with pytest.raises(PipelineError, match=r"\(stored ones near it: door, "):
        queries.text("broad bead door")  # in letters it is nearer to bread
    with pytest.raises(PipelineError, match=r"\(stored ones near it: bread, "):
        queries.text("braed")


def test_another_teachers_card_is_refused(data, tmp_path):
    card = worlds.write_teacher(tmp_path / "other", seed=1)
    with pytest.raises(PipelineError, match="is not the teacher of data/teacher"):
        Queries(data, card).text("something new")
