"""A card's preprocessing without weights is what the loaded teacher would say."""

import pytest
import torch

from pipeline.core.errors import PipelineError
from pipeline.core.records import Preprocessing
from pipeline.models.card import TeacherCard, read_card
from pipeline.models.stated_preprocessing import stated_preprocessing
from pipeline.models.teacher import Teacher


def card(model: str, pretrained: str | None) -> TeacherCard:
    return TeacherCard(
        name="x",
        model=model,
        pretrained=pretrained,
        sha256=None,
        config_sha256=None,
        activation="gelu",
        golden=None,
    )


def test_openais_clip_is_the_default_of_imports(tmp_path):
    found = stated_preprocessing(card("ViT-B-32-quickgelu", "openai"), tmp_path / "card.yaml")
    assert found == Preprocessing()


def test_siglip_squashes_and_centres_at_one_half(tmp_path):
    found = stated_preprocessing(card("ViT-B-16-SigLIP-256", "webli"), tmp_path / "card.yaml")
    assert (found.image_size, found.resize_mode) == (256, "squash")
    assert found.mean == found.std == (0.5, 0.5, 0.5)


def test_a_local_teacher_says_the_same_before_and_after_loading(tiny_teacher):
    found = stated_preprocessing(read_card(tiny_teacher), tiny_teacher)
    assert found == Teacher(tiny_teacher, torch.device("cpu")).preprocessing


def test_a_model_that_open_clip_does_not_know_is_named(tmp_path):
    with pytest.raises(PipelineError, match="knows no model 'ViT-X'"):
        stated_preprocessing(card("ViT-X", "openai"), tmp_path / "card.yaml")
