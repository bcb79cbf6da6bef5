"""Weights that are not here and cannot be fetched: which file, from where, and how to bring it."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from pipeline.core.errors import PipelineError
from pipeline.models.fetched_weights import fetched_weights

CARD = Path("manifests/teachers/clip-vit-b32.yaml")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty cache, and a hub on this machine that nothing listens for."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_network_two_lines_say_what_is_missing_and_how_to_bring_it(elsewhere, capfd):
    with pytest.raises(PipelineError) as error:
        fetched_weights("ViT-B-32-quickgelu", "openai", CARD)
    said = str(error.value)
    assert "cannot be fetched from http://127.0.0.1:9/timm/vit_base_patch32_clip_224.openai" in said
    assert "fetch open_clip_model.safetensors of" in said and "refused" in said
    assert "`pipeline import teacher ViT-B-32-quickgelu --pretrained FILE" in said
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("fetching the weights openai")


def test_offline_nothing_is_tried_and_nothing_is_printed(elsewhere, monkeypatch, capfd):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PipelineError, match="its weights are not on this machine"):
        fetched_weights("ViT-B-32-256", "datacomp_s34b_b86k", CARD)
    assert capfd.readouterr() == ("", "")


def test_a_tag_that_open_clip_does_not_know_is_named(elsewhere):
    with pytest.raises(
        PipelineError, match="ViT-B-32 with opnai cannot be loaded: open_clip knows"
    ):
        fetched_weights("ViT-B-32", "opnai", CARD)
