"""A teacher card names one teacher, and says so when what lies on disk is another."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from pipeline.core.errors import PipelineError
from pipeline.models.card import check_weights, read_card, weights_file
from pipeline.models.card_writer import write_card


@pytest.fixture
def card(tiny_teacher, tmp_path) -> Path:
    return shutil.copytree(tiny_teacher.parent, tmp_path / "teacher") / "card.yaml"


def change(card: Path, **values) -> None:
    card.write_text(yaml.safe_dump(yaml.safe_load(card.read_text()) | values))


def refusal(card: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        check_weights(read_card(card), card)
    assert str(card) in str(caught.value)
    return str(caught.value)


def test_the_weights_of_a_card_are_held_against_its_digest(card):
    check_weights(read_card(card), card)
    with weights_file(read_card(card), card).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"X")
    assert "has SHA-256" in refusal(card)


def test_a_card_without_digest_is_refused(card):
    change(card, sha256=None)
    assert "the card says None" in refusal(card)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"activation": "relu"}, "activation"),
        ({"nmae": "x"}, "nmae"),
        ({"golden": {"image": [1.0], "text": [1.0] * 4}}, "golden.image"),
        ({"model": "ViT-B-32", "pretrained": "none.pt"}, "no checkpoint"),
        ({"model": "ViT-B-32", "pretrained": None}, "names no weights"),
    ],
)
def test_a_wrong_value_is_named(card, values, expected):
    change(card, **values)
    assert expected in refusal(card)


@pytest.mark.parametrize("data", [b"", b"[1]", b"text", b"a: [", b"\xff\xfe\x00"])
def test_what_is_no_card_is_named(card, data):
    card.write_bytes(data)
    assert refusal(card)


def test_a_missing_card_and_a_folder_are_refused_by_name(card):
    assert "pipeline import teacher" in refusal(card.with_name("none.yaml"))
    assert "cannot be read" in refusal(card.parent)


def test_the_digest_is_of_the_file_that_open_clip_loads(card):
    """A folder from a hub may hold weights of other libraries beside open_clip's."""

    from open_clip import factory  # isort: skip

    for name in ("a.safetensors", "model.safetensors", "open_clip_pytorch_model.bin"):
        (card.parent / name).write_bytes(b"other weights")
    assert str(weights_file(read_card(card), card)) == factory._find_checkpoint_in_dir(card.parent)
    check_weights(read_card(card), card)


def test_weights_that_are_not_named_clearly_are_refused(card):
    weights = card.parent / "open_clip_model.safetensors"
    weights.rename(card.parent / "b.safetensors")
    check_weights(read_card(card), card)  # the only one
    (card.parent / "a.safetensors").write_bytes(b"")
    assert "found a.safetensors, b.safetensors" in refusal(card)
    for path in card.parent.glob("*.safetensors"):
        path.unlink()
    assert "found no *.safetensors" in refusal(card)


# Writing one


def test_a_written_card_names_the_teacher_that_was_loaded(card, tmp_path, monkeypatch):
    from pipeline.models.teacher import Teacher

    monkeypatch.chdir(tmp_path)
    out = tmp_path / "cards/mine.yaml"
    written = write_card("local-dir:teacher", None, out)
    assert written == read_card(out)
    assert (written.name, written.activation) == ("mine", "gelu")
    assert written.sha256 == read_card(card).sha256
    assert Teacher(out, torch.device("cpu")).golden() == written.golden.model_dump()


@pytest.mark.parametrize(
    ("model", "pretrained", "expected"),
    [
        ("ViT-B-32", "weights.pt", "weights.pt: ViT-B-32 with "),
        ("ViT-B-32", "none.pt", "no checkpoint none.pt"),
        ("ViT-B-32", None, "ViT-B-32 names no weights"),
        ("local-dir:none", None, "local-dir:none: expected one open_clip_model.safetensors"),
    ],
)
def test_a_teacher_that_cannot_be_loaded_is_named_as_the_user_named_it(
    tmp_path, monkeypatch, model, pretrained, expected
):
    monkeypatch.chdir(tmp_path)
    Path("weights.pt").write_bytes(b"no weights")
    with pytest.raises(PipelineError) as caught:
        write_card(model, pretrained, Path("cards/mine.yaml"))
    assert str(caught.value).startswith(expected)
    assert "mine.yaml" not in str(caught.value)
    assert not list(Path("cards").glob("*")), "half a card"
