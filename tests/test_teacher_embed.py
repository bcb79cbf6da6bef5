"""data/images -> data/teacher: each claim on a small world with a real open_clip model."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support import worlds

from pipeline.core.errors import PipelineError
from pipeline.data import shards
from pipeline.models.teacher import Teacher
from stages.teacher_embed import teacher_embed

CPU = torch.device("cpu")
WITH_TOKEN_ZERO = "a red ring !§ !§ !§ and a blue cat"


@pytest.fixture
def data(small_world, tmp_path) -> Path:
    """data/ with images only."""
    shutil.copytree(small_world.data / "images", tmp_path / "data/images")
    return tmp_path / "data"


def embed(small_world, data: Path, **changes) -> dict:
    config = worlds.teacher_config(small_world.card, small_world.prompts, **changes)
    return teacher_embed(config, data, device="cpu", workers=1)


def rows(data: Path) -> dict[tuple[str, int], dict]:
    found = {}
    for path in sorted((data / "teacher/images").glob("*.parquet")):
        table = pq.read_table(path)
        vectors = shards.stored_embeddings(table["embedding"])
        for row, vector in zip(table.drop(["embedding"]).to_pylist(), vectors, strict=True):
            found[row["image_id"], row["view"]] = row | {"embedding": vector.tobytes()}
    return found


@pytest.fixture
def embedded_images(monkeypatch) -> list[int]:
    """Counts, batch by batch, the images that the teacher really embeds (the probe is none)."""
    counts = []
    embed_images = Teacher.embed_images

    def counting(self, pixels):
        counts.append(int((pixels.reshape(len(pixels), -1) > 0).any(axis=1).sum()))
        return embed_images(self, pixels)

    monkeypatch.setattr(Teacher, "embed_images", counting)
    return counts


def test_every_good_image_has_every_view_and_every_text_is_embedded(small_world, data):
    summary = embed(small_world, data, views=3)
    images = pq.read_table(data / "images")
    good = {r["image_id"] for r in images.to_pylist() if r["status"] == "ok"}
    assert rows(data).keys() == {(key, view) for key in good for view in range(3)}
    assert summary.images == 3 * len(good)
    texts = pq.read_table(data / "teacher/texts").to_pylist()
    templates = [x for x in worlds.TEMPLATES.read_text().splitlines() if not x.startswith("#")]
    assert {t["text"] for t in texts if t["image_id"] is None} == {
        "a red circle", "a blue square",
        *(line.replace("{}", label) for line in templates for label in ("wide", "high")),
    }  # fmt: skip
    assert {t["text"] for t in texts if t["image_id"]} == {
        text for row in images.to_pylist() for text in row["captions"]
    }
    assert len({t["text_id"] for t in texts}) == len(texts)


def test_a_row_group_holds_one_view_of_one_row_group_of_images(small_world, data):
    embed(small_world, data, views=3)
    for path in sorted((data / "images").glob("*.parquet")):
        with (
            pq.ParquetFile(path) as images,
            pq.ParquetFile(data / "teacher/images" / path.name) as teacher,
        ):
            groups = images.num_row_groups
            assert teacher.num_row_groups == 3 * groups
            for view in range(3):
                for group in range(groups):
                    good = [
                        row["image_id"]
                        for row in images.read_row_group(group, ["image_id", "status"]).to_pylist()
                        if row["status"] == "ok"
                    ]
                    mine = teacher.read_row_group(view * groups + group).to_pylist()
                    assert [row["image_id"] for row in mine] == good
                    assert {row["view"] for row in mine} <= {view}


def test_more_views_cost_only_the_new_ones_and_equal_a_run_from_scratch(
    small_world, data, tmp_path, embedded_images
):
    embed(small_world, data, views=2)
    first = sum(embedded_images)
    embedded_images.clear()
    embed(small_world, data, views=4)
    more = rows(data)
    assert sum(embedded_images) <= first  # two new views, as many as the first run's two
    shutil.copytree(data / "images", tmp_path / "fresh/images")
    embed(small_world, tmp_path / "fresh", views=4)
    assert rows(tmp_path / "fresh") == more


def test_another_seed_of_the_crops_keeps_the_canonical_view_only(
    small_world, data, embedded_images
):
    embed(small_world, data, views=2)
    before = rows(data)
    first = sum(embedded_images)
    embedded_images.clear()
    embed(small_world, data, views=2, seed=1)
    after = rows(data)
    assert 0 < sum(embedded_images) < first
    assert all(after[key] == before[key] for key in after if key[1] == 0)
    assert any(after[key] != before[key] for key in after if key[1] == 1)


def test_a_rows_bits_do_not_depend_on_its_neighbours(small_world, data, tmp_path):
    """The same images in other shards, among other rows: constant batches, the last one padded."""
    from stages.download import download

    embed(small_world, data)
    other = tmp_path / "other"
    config = worlds.download_config(small_world.manifest, small_world.root, rows_per_shard=9)
    download(config, other, processes=1, threads=4)
    embed(small_world, other)
    assert rows(other) == rows(data)


def test_embeddings_of_another_teacher_are_never_replaced_silently(small_world, data, tmp_path):
    embed(small_world, data)
    before = rows(data)
    card = worlds.write_teacher(tmp_path / "another", seed=1)
    config = worlds.teacher_config(card, small_world.prompts)
    with pytest.raises(PipelineError, match="another teacher"):
        teacher_embed(config, data, device="cpu")
    assert rows(data) == before


def test_embeddings_of_another_dtype_are_never_replaced_silently(small_world, data):
    embed(small_world, data)
    before = rows(data)
    with pytest.raises(PipelineError, match=r"in float32, params\.yaml asks for bfloat16"):
        embed(small_world, data, dtype="bfloat16")
    assert rows(data) == before


def test_a_finished_run_is_on_record_once_with_the_speed_of_what_the_teacher_saw(
    small_world, data, tmp_path
):
    def speeds() -> list[float]:
        tables = [pq.read_table(path) for path in (data / "runs").glob("teacher_embed-*.parquet")]
        return sorted(table["images_per_second"][0].as_py() for table in tables)

    for _ in range(2):
        embed(small_world, data)
        (speed,) = speeds()
        assert speed > 0
    (tmp_path / "prompts.txt").write_text("one more")
    config = worlds.teacher_config(small_world.card, tmp_path / "prompts.txt")
    teacher_embed(config, data, device="cpu", workers=1)  # no image is embedded again
    assert speeds() == [0, speed]


def test_a_missing_stage_is_named(small_world, tmp_path):
    with pytest.raises(PipelineError, match="pipeline download"):
        embed(small_world, tmp_path / "nothing")


def test_padding_that_is_not_computed_changes_no_text(tmp_path):
    """A causal tower reads its answer at the end of the text: padding beyond it is idle."""
    teacher = Teacher(worlds.write_teacher(tmp_path / "teacher", context=77), CPU)
    assert teacher.context_lengths(["a cat", "a cat " * 12, "a cat " * 40]) == [16, 32, 77]
    texts = ["a cat", "", "a dog beside a red car in front of an old house by the sea " * 3]
    texts += [WITH_TOKEN_ZERO, "!" + WITH_TOKEN_ZERO]
    whole = teacher.model.encode_text(teacher.tokenize(texts))
    expected = torch.nn.functional.normalize(whole, dim=-1).detach().numpy()
    for text, vector in zip(texts, expected, strict=True):
        np.testing.assert_allclose(teacher.embed_texts([text])[0], vector, atol=1e-6)


def test_a_text_with_tokens_of_id_zero_keeps_its_end(tmp_path):
    """Id 0 is "!" inside a longer run of signs: counting ids that are not 0 lost the end token."""
    teacher = Teacher(worlds.write_teacher(tmp_path / "teacher", context=77), CPU)
    (tokens,) = teacher.tokenize([WITH_TOKEN_ZERO])
    assert (tokens[: tokens.argmax()] == 0).any()
    length = int(tokens.argmax()) + 1
    assert int((tokens != 0).sum()) <= 16 < length
    assert teacher.context_lengths([WITH_TOKEN_ZERO]) == [32]
    assert teacher.was_cut_short([WITH_TOKEN_ZERO, "a cat", "a cat!"]) == [True, False, False]


def test_only_texts_that_an_earlier_version_cut_short_are_embedded_again(
    small_world, data, tmp_path, monkeypatch
):
    """The earlier version is written down as it was: lengths that skip id 0."""
    card = worlds.write_teacher(tmp_path / "teacher", context=77)
    (tmp_path / "prompts.txt").write_text(f"a red circle\n{WITH_TOKEN_ZERO}\n")
    config = worlds.teacher_config(card, tmp_path / "prompts.txt")
    with monkeypatch.context() as earlier:
        counted = lambda self, tokens: (tokens != 0).sum(dim=1)  # noqa: E731
        earlier.setattr(Teacher, "_ends", counted)
        earlier.setattr("pipeline.models.vector_shards.TEXTS_VERSION", 1)
        teacher_embed(config, data, device="cpu", workers=1)
    before = vectors_of_texts(data)
    embedded, embed_texts = [], Teacher.embed_texts
    monkeypatch.setattr(
        Teacher,
        "embed_texts",
        lambda self, texts: embedded.extend(texts) or embed_texts(self, texts),
    )
    images = rows(data)
    teacher_embed(config, data, device="cpu", workers=1)
    after = vectors_of_texts(data)
    assert set(embedded) - {"", "a photo of a cat"} == {WITH_TOKEN_ZERO}
    assert {text for text in after if after[text] != before[text]} == {WITH_TOKEN_ZERO}
    assert rows(data) == images


def vectors_of_texts(data: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted((data / "teacher/texts").glob("*.parquet")):
        table = pq.read_table(path)
        vectors = shards.stored_embeddings(table["embedding"])
        found |= {t: v.tobytes() for t, v in zip(table["text"].to_pylist(), vectors, strict=True)}
    return found


def broken(tmp_path: Path, change) -> Path:
    """A teacher whose weights were changed, with a card that has the new digest."""
    import hashlib

    card = worlds.write_teacher(tmp_path / "broken")
    weights = card.parent / "open_clip_model.safetensors"
    state = load_file(weights)
    change(state)
    save_file(state, weights)
    values = yaml.safe_load(card.read_text())
    values["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    card.write_text(yaml.safe_dump(values))
    return card


def change_card(card: Path, **values) -> Path:
    card.write_text(yaml.safe_dump(yaml.safe_load(card.read_text()) | values))
    return card


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    card = broken(tmp_path, lambda state: state.pop("visual.proj"))
    with pytest.raises(PipelineError, match="cannot be loaded"):
        Teacher(card, CPU)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    card = broken(tmp_path, lambda state: state.update({"visual.proj": torch.zeros(3, 3)}))
    with pytest.raises(PipelineError, match="cannot be loaded"):
        Teacher(card, CPU)


def test_weights_that_are_not_finite_leave_no_embedding(small_world, data, tmp_path):
    card = broken(tmp_path, lambda state: state["visual.proj"].fill_(float("nan")))
    with pytest.raises(PipelineError, match="zero or not finite"):
        teacher_embed(worlds.teacher_config(card, small_world.prompts), data, device="cpu")
    assert not (data / "teacher").exists()


def test_a_name_without_weights_is_never_a_random_teacher(tmp_path):
    card = worlds.write_teacher(tmp_path / "teacher")
    change_card(card, model="ViT-B-32-quickgelu", pretrained=None, sha256=None)
    with pytest.raises(PipelineError, match="random"):
        Teacher(card, CPU)


def test_the_activation_that_was_built_must_be_the_cards(tmp_path):
    card = change_card(worlds.write_teacher(tmp_path / "teacher"), activation="quickgelu")
    with pytest.raises(PipelineError, match="built with gelu"):
        Teacher(card, CPU)
