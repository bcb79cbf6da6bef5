"""`pipeline export FOLDER`: what it holds finds what `pipeline search` finds, elsewhere as well."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.readme import ALONE, readme_block

from pipeline.core.errors import PipelineError
from pipeline.explore import model_folder
from pipeline.explore.nearest import load_sides
from pipeline.explore.query_vectors import Queries
from pipeline.explore.search import Collection
from pipeline.models.export import check_overlap, neighbour_overlap
from pipeline.models.student import Student

onnxruntime = pytest.importorskip("onnxruntime")
tokenizers = pytest.importorskip("tokenizers")
ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FILES = {
    *("README.md", "config.json", "index/images.jsonl", "index/texts.json", "index/texts.npy"),
    *("index/vectors.npy", "student/config.json", "student/model.safetensors"),
    *("textual/model.onnx", "textual/tokenizer.json", "textual/tokenizer_config.json"),
    *("visual/model.onnx", "visual/preprocess_cfg.json"),
}
TEXTS = ["a red circle", "A blue square!", "picture 7", "something that nobody stored"]


@pytest.fixture(scope="module")
def card(small_world) -> Path:
    return small_world.card


@pytest.fixture(scope="module")
def exported(finished_world, card, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    summary = model_folder.export_folder(finished_world, out, card)
    assert "visual: onnxruntime within" in summary and "textual: onnxruntime within" in summary
    assert re.search(r"the same best 10 images as `pipeline search` for \d\d texts", summary)
    return out


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_folder_holds_both_towers_and_all_that_they_need(exported):
    assert names(exported) == FILES
    assert [p.name for p in exported.parent.iterdir()] == ["model"]


def test_the_index_is_the_collection(exported, finished_world):
    collection = load_sides(finished_world, finished_world / "evaluation/index")
    ids = [image_id.decode() for image_id in collection.ids]
    lines = (exported / "index/images.jsonl").read_text().splitlines()
    assert [json.loads(line)["image_id"] for line in lines] == ids
    assert json.loads(lines[0]).keys() >= {"url", "caption"}
    vectors = np.load(exported / "index/vectors.npy").astype(np.float32)
    np.testing.assert_allclose(vectors, collection.student, atol=1e-3)
    texts = json.loads((exported / "index/texts.json").read_text())
    assert np.load(exported / "index/texts.npy").shape[0] == len(texts)
    assert "a red circle" in texts


def test_a_copy_of_the_student_loads(exported):
    Student.load(exported / "student")


def test_the_model_card_says_what_it_is_and_under_what_terms(exported):
    text = (exported / "README.md").read_text()
    assert "# A student of tiny" in text
    for words in ("| cosine to the teacher's", "licence not recorded", "Training images: "):
        assert words in text
    held = json.loads((exported / "config.json").read_text())["extrahead"]
    assert sum(held["training_images_by_license"].values()) > 0


class Service:
    """Calls the folder as Immich's machine-learning service calls a model of open_clip's."""

    def __init__(self, folder: Path):
        self.how = json.loads((folder / "visual/preprocess_cfg.json").read_text())
        self.text_cfg = json.loads((folder / "config.json").read_text())["text_cfg"]
        words = json.loads((folder / "textual/tokenizer_config.json").read_text())
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "textual/tokenizer.json"))
        length, pad = self.text_cfg.get("context_length", 77), words["pad_token"]
        self.tokenizer.enable_padding(
            length=length, pad_token=pad, pad_id=self.tokenizer.token_to_id(pad)
        )
        self.tokenizer.enable_truncation(max_length=length)
        self.towers = {
            side: onnxruntime.InferenceSession(folder / side / "model.onnx")
            for side in ("visual", "textual")
        }

    def text(self, text: str) -> np.ndarray:
        """(E,): blanks joined, int32 ids under the name `text`, the first output."""
        ids = self.tokenizer.encode(" ".join(text.split())).ids
        return self.towers["textual"].run(None, {"text": np.array([ids], np.int32)})[0][0]

    def image(self, image: Image.Image) -> np.ndarray:
        """(E,): shorter side to the size, a centre crop in whole pixels, under the name `image`."""
        size = self.how["size"][0]
        method = Image.Resampling[self.how["interpolation"].upper()]
        scale = size / min(image.size)
        image = image.resize([max(size, int(side * scale)) for side in image.size], method)
        left, top = ((side - size) // 2 for side in image.size)
        pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
        pixels = (pixels - np.float32(self.how["mean"])) / np.float32(self.how["std"])
        return self.towers["visual"].run(None, {"image": pixels.transpose(2, 0, 1)[None]})[0][0]


def test_immichs_service_gets_the_teachers_texts_and_the_students_images(
    exported, finished_world, small_world, card
):
    service, queries = Service(exported), Queries(finished_world, card)
    assert service.how["resize_mode"] == "shortest" and service.how["mode"] == "RGB"
    for text in TEXTS:
        vector = service.text(text)
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, queries.teacher.embed_texts([text])[0], atol=1e-5)
    for name in ("0.jpg", "1.jpg", "30.jpg"):
        ours = queries.image(small_world.root / name).student
        theirs = service.image(Image.open(small_world.root / name).convert("RGB"))
        assert float(theirs @ ours) > 0.99 and abs(np.linalg.norm(theirs) - 1) < 1e-5


@pytest.mark.parametrize("text", ["a red circle", "something that nobody stored"])
def test_the_readmes_lines_find_what_pipeline_search_finds_with_four_packages(
    exported, finished_world, small_world, card, tmp_path, text
):
    block = readme_block()
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    photos = tmp_path / "photos"
    photos.mkdir()
    collection = Collection(finished_world)
    for line in (exported / "index/images.jsonl").read_text().splitlines():
        url = json.loads(line)["url"]
        name = url.removeprefix("file:")
        (photos / name).write_bytes((small_world.root / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(exported), str(photos), text],
        input=block, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [(float(s), Path(p).name) for s, p in (x.split() for x in done.stdout.splitlines())]
    hits = collection.search(Queries(finished_world, card).text(text), 10)
    expected = {hit.url.removeprefix("file:"): hit.score for hit in hits.student}
    assert len(found) == 10
    for score, name in found:  # a score that is as good as the tenth may stand for it
        assert score == pytest.approx(expected.get(name, hits.student[-1].score), abs=0.02)


def test_the_readmes_python_prints_how_well_texts_fit_an_image_and_loads_little(
    exported, finished_world, small_world, card, tmp_path
):
    (block,) = re.findall(r"```python\n(import torch.*?)```", README, re.DOTALL)
    (tmp_path / "model").symlink_to(exported)
    (tmp_path / "photo.jpg").write_bytes((small_world.root / "3.jpg").read_bytes())
    names = 'import sys; print(sorted({name.split(".")[0] for name in sys.modules}))'
    done = subprocess.run(
        [sys.executable, "-c", f"{block}\n{names}"], cwd=tmp_path, capture_output=True, text=True,
        timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, loaded = done.stdout.splitlines()
    assert not {"dvc", "duckdb", "img2dataset", "open_clip"} & set(eval(loaded))
    queries = Queries(finished_world, card)
    image = queries.image(tmp_path / "photo.jpg").student
    for line, text in zip(
        lines, ("a photo of a dog", "a photo of a cat", "a red circle"), strict=True
    ):
        name, whole, best = re.fullmatch(
            r"(.*): the image (\S+), its best patch (\S+)", line
        ).groups()
        cosine = float(image @ queries.text(text).teacher)
        assert name == text and float(whole) == pytest.approx(cosine, abs=0.02)
        assert -1 <= float(best) <= 1


def test_without_the_teachers_weights_the_text_side_is_left_out_and_named(finished_world, tmp_path):
    summary = model_folder.export_folder(finished_world, tmp_path / "model", None)
    assert "textual: left out, for the teacher is not here" in summary
    assert names(tmp_path / "model") == {n for n in FILES if not n.startswith("textual/")}
    assert "There is no text tower" in (tmp_path / "model/README.md").read_text()


@pytest.mark.parametrize("weights,fraction", [("float16", 0.75), ("int8", 0.6)])
def test_smaller_towers_are_smaller_and_rank_alike(
    finished_world, exported, card, tmp_path, weights, fraction, monkeypatch
):
    if (
        weights == "int8"
    ):  # a random teacher of 32 values is no measure of int8: the check is tested below
        monkeypatch.setattr("pipeline.models.export.LEAST_OVERLAP", 0.2)
    summary = model_folder.export_folder(finished_world, tmp_path / "model", card, weights)
    assert f"as {weights}" in summary and names(tmp_path / "model") == FILES
    for side in ("visual", "textual"):
        small, exact = (
            (f / side / "model.onnx").stat().st_size for f in (tmp_path / "model", exported)
        )
        assert small < fraction * exact, side


def test_int8_that_ranks_otherwise_is_refused_and_nothing_stays(
    finished_world, card, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.models.export.LEAST_OVERLAP", 1.01)
    with pytest.raises(PipelineError, match="ranks otherwise"):
        model_folder.export_folder(finished_world, tmp_path / "model", card, "int8")
    assert list(tmp_path.iterdir()) == []


def test_overlap_counts_common_neighbours():
    exact = np.random.default_rng(0).normal(size=(60, 8))
    assert neighbour_overlap(exact, exact) == 1
    other = np.random.default_rng(1).normal(size=(60, 8))
    assert neighbour_overlap(exact, other) == pytest.approx(10 / 59, abs=0.06)  # chance
    check_overlap(0.9, "it")
    with pytest.raises(PipelineError, match=r"0\.89"):
        check_overlap(0.89, "it")


def test_a_folder_in_the_way_is_kept(finished_world, card, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(PipelineError, match="exists"):
        model_folder.export_folder(finished_world, tmp_path, card)
    assert (tmp_path / "mine.txt").read_text() == "mine"
