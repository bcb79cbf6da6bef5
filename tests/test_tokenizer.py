"""tokenizer.json gives the ids of open_clip's tokenizer, but for texts of named classes."""

import csv
import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.errors import PipelineError
from pipeline.models import tokenizer
from pipeline.models.open_clip import open_clip
from pipeline.models.text_tower import read_tokenizer

pytest.importorskip("tokenizers")
LENGTH = 77
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenize():
    return open_clip.get_tokenizer("ViT-B-32-quickgelu")


@pytest.fixture(scope="module")
def folder(tokenize, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("textual")
    assert tokenizer.write_tokenizer(tokenize, LENGTH, folder) == {"clean": "lower"}
    return folder


def other(tokenize, folder: Path, texts: list[str]) -> list[str]:
    """The texts whose ids differ."""
    written = read_tokenizer(folder).encode_batch(texts)
    ours = tokenize(texts).tolist()
    return [t for t, a, b in zip(texts, ours, written, strict=True) if a != b.ids]


def test_texts_as_people_write_them_have_the_same_ids(tokenize, folder):
    texts = ["a red circle", "", " two  blanks ", "UPPER and lower", "it's a dog's, they'll"]
    texts += [
        "\u201ccurly\u201d and \u2018single\u2019",
        "\ufb01ne \ufb02owers",
        "naïve café",
        "über",
    ]
    texts += ["\uff26\uff55\uff4c\uff4c\u3000width", "3.14 + 2", "emoji \U0001f415!", "bell\a"]
    texts += ["a red ring !§ !§ and a blue cat", "word " * 100, "ein Haus am Meer", "\u72ac\u304c"]
    texts += [
        "\u0441\u043e\u0431\u0430\u043a\u0430",
        "tab\tand\nnew line",
        "<start_of_text> a <end_of_text>",
    ]
    assert other(tokenize, folder, texts) == []


def test_the_demos_prompts_have_the_same_ids(tokenize, folder):
    files = sorted((ROOT / "manifests/prompts").glob("*.txt"))
    texts = [line for file in files for line in file.read_text().splitlines()]
    assert len(texts) > 20 and other(tokenize, folder, texts) == []


def test_every_caption_of_the_demo_has_the_same_ids(tokenize, folder, monkeypatch):
    """As many as its world has, of things that are placed but not painted."""
    monkeypatch.syspath_prepend(str(ROOT / "manifests/demo"))
    import draw

    rng = np.random.default_rng(0)
    texts = [draw.caption(draw.place_things(rng, 64)) for _ in range(4800)]
    assert len(set(texts)) > 2000 and other(tokenize, folder, texts) == []


def test_every_shared_caption_has_the_same_ids(tokenize, folder, shared):
    with (shared / "photos/flickr8k.csv").open(encoding="utf-8") as file:
        texts = [t for row in csv.DictReader(file) for t in json.loads(row["captions_all"])]
    assert len(texts) > 9000 and other(tokenize, folder, texts) == []


def test_random_unicode_has_the_same_ids_but_for_named_classes(tokenize, folder):
    draw = random.Random(0)
    known = [
        chr(code)
        for code in range(0x110000)
        if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs")
    ]
    texts = []
    for pool in (known, [c for c in known if ord(c) < 0x3000]):
        texts += ["".join(draw.choices(pool, k=draw.randint(1, 20))) for _ in range(1000)]
    different = other(tokenize, folder, texts)
    assert [t for t in different if tokenizer.differs_by_rule(t) is None] == []
    assert len(different) < 20
    assert tokenizer.check_tokenizer(tokenize, folder, texts) == different


@pytest.mark.parametrize(
    "text,reason",
    [("cats &amp; dogs", "HTML"), ("ΟΔΟΣ", "sigma"), ("voilÃ\xa0 le cafÃ©", "encoding")],
)
def test_a_text_that_is_read_otherwise_belongs_to_a_named_class(tokenize, folder, text, reason):
    assert other(tokenize, folder, [text]) == [text]
    assert reason in tokenizer.differs_by_rule(text)


def test_a_tokenizer_that_reads_a_plain_text_otherwise_is_refused(tokenize, folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    damaged = json.loads((tmp_path / "tokenizer.json").read_text())
    del damaged["normalizer"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(damaged | {"normalizer": None}))
    with pytest.raises(PipelineError, match="'A Cat' otherwise"):
        tokenizer.check_tokenizer(tokenize, tmp_path, ["a dog", "A Cat"])
