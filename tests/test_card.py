"""A teacher card names one teacher, and says so when what lies on disk is another."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from support import worlds

from pipeline.core.errors import PipelineError
from pipeline.models.card import check_weights, read_card, weights_file
from pipeline.models.card_writer import write_card
from pipeline.models.golden import SAME, golden_of
from pipeline.models.teacher import Teacher
from pipeline.models.teacher_config import read_teacher_config

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def card(tiny_teacher, tmp_path) -> Path:
    return shutil.copytree(tiny_teacher.parent, tmp_path / "teacher") / "card.yaml"


def change(card: Path, **values) -> None:
    card.write_text(yaml.safe_dump(yaml.safe_load(card.read_text()) | values))


def refusal(card: Path) -> str:
    with pytest.raises(PipelineError) as caught:
        check_weights(read_card(card), card)
    assert str(card.parent) in str(caught.value), "neither the card nor its neighbour"
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
        ({"golden": {"source": "x", "texts": {}, "image": None}}, "golden.texts"),
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


# The configuration of a local folder


def reconfigure(card: Path, change_config) -> None:
    """An author who gives away a folder with a card that vouches for it."""
    path = card.with_name("open_clip_config.json")
    config = json.loads(path.read_text())
    change_config(config)
    path.write_text(json.dumps(config))
    change(card, config_sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_the_configuration_of_a_folder_is_held_against_its_digest(card):
    with card.with_name("open_clip_config.json").open("a") as file:
        file.write(" ")
    assert "open_clip_config.json has SHA-256" in refusal(card)
    card.with_name("open_clip_config.json").unlink()
    assert "cannot be read" in refusal(card)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("text_cfg", "hf_tokenizer_name", "evil/tokenizer"),
        ("text_cfg", "tokenizer_kwargs", {"trust_remote_code": True}),
        ("text_cfg", "tokenizer_kwargs", {"bpe_path": "/etc/passwd"}),
        ("text_cfg", "hf_model_name", "evil/model"),
        ("text_cfg", "bpe_path", "/etc/passwd"),
        ("text_cfg", "act_kwargs", {"x": 1}),
        ("vision_cfg", "timm_model_name", "hf-hub:evil/model"),
        ("vision_cfg", "timm_model_name", "../../evil"),
        ("vision_cfg", "layers", 10_000_000),
        ("vision_cfg", "layers", [1] * 5),
        ("vision_cfg", "image_size", 100_000),
        ("vision_cfg", "image_size", [32, -1]),
        ("vision_cfg", "width", 1e300),
        ("vision_cfg", "width", "32"),
        ("text_cfg", "context_length", 10**9),
        ("text_cfg", "vocab_size", 10**12),
        ("model_cfg", "embed_dim", 10**9),
        ("model_cfg", "multimodal_cfg", {}),
        ("preprocess_cfg", "size", 10**6),
        ("top", "auto_map", {"AutoModel": "evil.Evil"}),
    ],
)
def test_a_configuration_that_asks_for_more_than_an_architecture_is_refused(
    card, section, key, value
):
    def plant(config):
        model = config["model_cfg"]
        places = {"top": config, "model_cfg": model, "preprocess_cfg": config["preprocess_cfg"]}
        (places | model)[section][key] = value

    reconfigure(card, plant)
    assert key in refusal(card)


@pytest.mark.parametrize("text", ["", "[]", "{}", "{" * 100_000, '{"model_cfg": []}', "NaN"])
def test_what_is_no_configuration_is_refused(card, text):
    card.with_name("open_clip_config.json").write_text(text)
    change(card, config_sha256=hashlib.sha256(text.encode()).hexdigest())
    assert "open_clip_config.json" in refusal(card)


def test_every_local_architecture_of_open_clip_itself_passes(tmp_path):
    """Its own list, without those that need a tokenizer or a text tower of a hub."""
    from pipeline.models.open_clip import open_clip

    passed, left_out = 0, 0
    for name in open_clip.list_models():
        model = open_clip.get_model_config(name)
        hub = any(key.startswith(("hf_", "tokenizer")) for key in model["text_cfg"])
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
        try:
            assert read_teacher_config(tmp_path)["model_cfg"] == model
            passed += 1
        except PipelineError:
            assert hub or "multimodal_cfg" in model or "act_kwargs" in str(model), name
            left_out += 1
    assert passed > 90, (passed, left_out)


# Golden vectors


def test_weights_that_answer_otherwise_are_refused_unless_accepted(tiny_teacher, tmp_path):
    golden = golden_of(Teacher(tiny_teacher, CPU)).model_dump()
    other = worlds.write_teacher(tmp_path / "other", seed=1)
    change(other, golden=golden)
    with pytest.raises(PipelineError, match=r"the text tower's answers have a cosine of [-0-9]"):
        Teacher(other, CPU)
    Teacher(other, CPU, accept_other_vectors=True)
    change(other, golden=golden | {"texts": {"x": [1.0, 2.0]}})
    with pytest.raises(PipelineError, match="This is another model"):
        Teacher(other, CPU, accept_other_vectors=True)


@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize(("cosine", "said"), [(0.999, ""), (0.97, "0.9700"), (0.9, "refused")])
def test_a_small_difference_is_told_with_its_number(
    tiny_teacher, tmp_path, caplog, tower, cosine, said
):
    golden = golden_of(Teacher(tiny_teacher, CPU)).model_dump()

    def turned(vector: list[float]) -> list[float]:
        unit = np.array(vector) / np.linalg.norm(vector)
        aside = np.roll(unit, 1) - unit * (np.roll(unit, 1) @ unit)
        return (cosine * unit + (1 - cosine**2) ** 0.5 * aside / np.linalg.norm(aside)).tolist()

    if tower == "image":
        golden["image"] = turned(golden["image"])
    else:
        golden["texts"] = {text: turned(vector) for text, vector in golden["texts"].items()}
    card = shutil.copytree(tiny_teacher.parent, tmp_path / "teacher") / "card.yaml"
    change(card, golden=golden)
    caplog.clear()
    if said == "refused":
        with pytest.raises(
            PipelineError, match=f"the {tower} tower's answers have a cosine of 0.90"
        ):
            Teacher(card, CPU)
    else:
        Teacher(card, CPU)
        assert said in caplog.text and (not said) == (not caplog.records)


@pytest.mark.slow
def test_another_activation_moves_a_full_size_teacher_too_little_for_golden_vectors():
    """ViT-B/32 with random weights, GELU in place of QuickGELU: cosines of about 0.9999, between
    SAME and 1. So the activation is recognised by what was built, never by what it answers."""
    from pipeline.models.open_clip import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")).eval()
    tokens = open_clip.get_tokenizer("ViT-B-32-quickgelu")(["a zebra", "a teapot"])
    pixels = torch.randn(2, 3, 224, 224)

    @torch.inference_mode()
    def answers():
        vectors = torch.cat([model.encode_text(tokens), model.encode_image(pixels)])
        return torch.nn.functional.normalize(vectors, dim=-1)

    before = answers()
    for block in [*model.transformer.resblocks, *model.visual.transformer.resblocks]:
        assert isinstance(block.mlp.gelu, open_clip.transformer.QuickGELU)
        block.mlp.gelu = torch.nn.GELU()
    moved = 1 - (before * answers()).sum(dim=1)
    assert ((moved > 1e-5) & (moved < 1e-3)).all(), moved
    assert float(moved.max()) < 1 - SAME


def test_a_teacher_known_by_its_texts_alone_is_said_to_be(tmp_path, caplog, tag):
    golden = golden_of(Teacher(tag, CPU)).model_dump()
    assert "nothing recognises its weights" in caplog.text
    caplog.clear()
    change(tag, golden=golden | {"image": None})
    Teacher(tag, CPU)
    assert "only the text tower was recognised" in caplog.text
    assert "pipeline import teacher tiny --pretrained mine" in caplog.text


def test_importing_a_teacher_completes_its_card(tag, caplog):
    """As for OpenAI's: golden texts are there before anybody here has seen the weights."""
    golden = golden_of(Teacher(tag, CPU)).model_dump()
    known = golden | {"image": None, "source": "others", "texts": {"a zebra": [0.0] * 31 + [1.0]}}
    change(tag, golden=known)
    with pytest.raises(PipelineError, match="the text tower's answers"):
        write_card("tiny", "mine", tag)
    zebra = Teacher(tag, CPU, accept_other_vectors=True).embed_texts(["a zebra"])[0].tolist()
    change(tag, golden=known | {"texts": {"a zebra": zebra}})
    before = read_card(tag)
    card = write_card("tiny", "mine", tag)
    assert card == read_card(tag) and card.named() == before.named(), "no vector changes"
    assert card.golden.source == "others" and card.golden.texts == {"a zebra": zebra}
    assert card.golden.image == golden["image"] and len(card.sha256) == 64
    caplog.clear()
    Teacher(tag, CPU)
    assert not caplog.records
    with pytest.raises(PipelineError, match="is complete"):
        write_card("tiny", "mine", tag)
    change(tag, sha256="0" * 64)
    with pytest.raises(PipelineError, match="has SHA-256"):
        Teacher(tag, CPU)


@pytest.fixture
def tag(tiny_teacher, tmp_path, monkeypatch) -> Path:
    """A card of a model and a tag of open_clip's lists, whose download is already here."""
    from pipeline.models import fetched_weights
    from pipeline.models.open_clip import open_clip

    config = json.loads(tiny_teacher.with_name("open_clip_config.json").read_text())
    weights = str(tiny_teacher.with_name("open_clip_model.safetensors"))
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config["model_cfg"])
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"mine": {"hf_hub": "x/"}})
    monkeypatch.setattr(fetched_weights, "try_to_load_from_cache", lambda *_: weights)
    for module in (open_clip, open_clip.factory):
        monkeypatch.setattr(module, "download_pretrained", lambda *_, **__: weights)
    values = {"name": "tiny", "model": "tiny", "pretrained": "mine", "sha256": None}
    values |= {"config_sha256": None, "activation": "gelu", "golden": None}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "card.yaml"


def test_the_default_teachers_golden_texts_are_its_published_vectors(shared):
    """The card holds them rounded; here is where they come from."""
    file = np.load(shared / "clip_vit_b32/lvis_class_name_embeddings.npz", allow_pickle=False)
    published = dict(zip(file["prompt"].tolist(), file["embedding"], strict=True))
    golden = read_card(ROOT / "manifests/teachers/clip-vit-b32.yaml").golden
    for text, vector in golden.texts.items():
        stored = np.array(vector)
        assert stored @ published[text] / np.linalg.norm(stored) > 0.9999
    texts = list(golden.texts)
    between = [published[a] @ published[b] for a in texts for b in texts if a < b]
    assert max(between) < 0.9, "another text's vector would pass for it"


# Writing one


def test_a_written_card_names_the_teacher_that_was_loaded(card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "cards/mine.yaml"
    written = write_card("local-dir:teacher", None, out)
    assert written == read_card(out)
    assert (written.name, written.activation) == ("mine", "gelu")
    assert written.sha256 == read_card(card).sha256
    assert written.config_sha256 == read_card(card).config_sha256
    assert golden_of(Teacher(out, torch.device("cpu"))) == written.golden


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
