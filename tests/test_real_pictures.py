"""Real photos and real CLIP vectors, no teacher weights: `pipeline search` and `pipeline look`, and
what they say of what is left out.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.checkout import ROOT

from pipeline.data.embeddings import load_text_embeddings
from pipeline.explore.search import Collection

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def said(shared, folder) -> dict[str, str]:
    """What each command said, after one epoch of training."""
    script = str(ROOT / "benchmarks/real_pictures.py")
    options = ["--work", str(folder), "--out", str(folder / "pictures"), "--epochs", "1"]
    printed = subprocess.run(
        [sys.executable, script, str(shared), *options, "--device", "cpu"],
        stdout=subprocess.PIPE, text=True, check=True, timeout=1800,
    ).stdout  # fmt: skip
    _, *commands = printed.split("\n$ ")
    return dict(command.split("\n", 1) for command in commands)


def test_a_stored_caption_finds_its_photo_by_the_teachers_vectors(said, folder):
    """First of 1,095 for most of the 340 captions; by chance it would be none of them."""
    collection = Collection(folder / "data")
    _, ids, vectors = load_text_embeddings(folder / "data", "image_id IS NOT NULL", [])
    best = [collection.ids[row] for row in (vectors @ collection.teacher.T).argmax(axis=1)]
    assert len(ids) == 340
    assert np.mean([found == own for found, own in zip(best, ids, strict=True)]) > 0.5


def test_the_name_of_a_thing_finds_photos_of_it(said):
    (answer,) = (
        text for command, text in said.items() if command.startswith("pipeline search 'a dog'")
    )
    by_teacher = [line for line in answer.splitlines() if line.startswith("teacher")]
    assert len(by_teacher) == 8
    assert all(re.search("dog|corgi", line, re.IGNORECASE) for line in by_teacher)


def test_every_picture_is_written(said, folder):
    asked = [re.search(r"--out (\S+)", command)[1] for command in said]
    written = [Path(path) for path in asked if not path.endswith("none.png")]
    assert len(written) == len(said) - 1 == 8
    for path in written:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 50


def test_a_look_names_what_is_left_out_and_why(said):
    looks = [text for command, text in said.items() if command.startswith("pipeline look")]
    assert len(looks) == 3
    for text in looks:
        assert re.search("Left out, the teacher's panels: .*openai cannot be loaded", text)
        assert "Left out: 'a photo of a dog' has no stored embedding" in text


def test_a_text_that_nobody_embedded_is_refused_with_stored_ones_near_it(said, folder):
    (answer,) = (text for command, text in said.items() if "none.png" in command)
    assert re.search(
        r"'a photo of a dog' has no stored embedding \(stored ones near it: a dog,", answer
    )
    assert not (folder / "pictures/none.png").exists()
