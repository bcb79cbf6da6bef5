"""The demo's world is what it says it is, and its teacher is an open_clip model like any other."""

import hashlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from pipeline.models.open_clip import open_clip

DEMO = Path(__file__).parent.parent / "manifests" / "demo"
SIZE = 64


def module(name: str):
    """manifests/demo is no package: its scripts are imported by path."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up there
    spec.loader.exec_module(found)
    return found


draw, train_teacher = module("draw"), module("train_teacher")


@pytest.fixture(scope="module")
def scenes() -> list:
    return list(draw.scenes(seed=1, count=400, size=SIZE))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    draw.draw_world(folder, seed=1, count=40, size=SIZE)
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_box_holds_all_of_its_object_and_the_object_touches_every_side(scenes):
    grey = np.full((SIZE, SIZE, 3), 128.0)
    for _, things in scenes[:100]:
        for thing in things:
            painted = (draw.paint(grey, [thing], np.random.default_rng(0)) != 128).any(axis=2)
            rows, columns = painted.any(axis=1).nonzero()[0], painted.any(axis=0).nonzero()[0]
            assert (columns[0], columns[-1]) == (thing.x, thing.x + thing.side - 1)
            assert (rows[0], rows[-1]) == (thing.y, thing.y + thing.side - 1)


def test_no_two_boxes_of_a_scene_overlap(scenes):
    for _, things in scenes:
        covered = np.zeros((SIZE, SIZE), int)
        for thing in things:
            covered[thing.y : thing.y + thing.side, thing.x : thing.x + thing.side] += 1
        assert covered.max() == 1


def test_no_two_scenes_hold_the_same_objects(scenes):
    contents = Counter(frozenset(thing.description for thing in things) for _, things in scenes)
    assert max(contents.values()) == 1


def test_a_boxs_text_names_one_object_of_its_scene(scenes):
    assert all(len({thing.text for thing in things}) == len(things) for _, things in scenes)


def test_a_caption_lists_every_object():
    def thing(size: str, colour: str, shape: str):
        return draw.Thing(size, colour, shape, 0, 0, 20)

    one, two, three = (
        thing("small", "red", "circle"),
        thing("large", "blue", "ring"),
        thing("large", "red", "cross"),
    )
    assert draw.caption([one]) == "a small red circle"
    assert draw.caption([one, two]) == "a small red circle and a large blue ring"
    assert draw.caption([one, two, three]) == (
        "a small red circle, a large blue ring and a large red cross"
    )


def test_the_same_seed_draws_the_same_bytes_and_another_seed_others(world, tmp_path):
    draw.draw_world(tmp_path / "same", seed=1, count=40, size=SIZE)
    draw.draw_world(tmp_path / "other", seed=2, count=40, size=SIZE)
    assert bytes_of(tmp_path / "same") == bytes_of(world)
    assert not set(bytes_of(tmp_path / "other").values()) & set(bytes_of(world).values())


def test_boxes_lie_inside_the_image_that_their_row_names(world):
    rows = pq.read_table(world / "scenes.parquet").to_pylist()
    assert len(rows) == len(list((world / "images").iterdir())) == 40
    for row in rows:
        assert (world / row["url"].removeprefix("file:")).is_file()
        for box in row["boxes"]:
            assert 0 <= box["x0"] < box["x1"] <= SIZE and 0 <= box["y0"] < box["y1"] <= SIZE


def test_a_mask_says_which_object_covers_at_least_half_of_a_pixel(world):
    """Coverage is what black and white ground leave of an object painted over both."""
    for row in pq.read_table(world / "scenes.parquet").to_pylist():
        with Image.open(world / row["mask"].removeprefix("file:")) as image:
            assert image.mode == "L"
            mask = np.asarray(image)
        expected = np.zeros_like(mask)
        for box in row["boxes"]:
            _, colour, shape = box["text"].split()
            side = int(box["x1"] - box["x0"])
            thing = [draw.Thing("any", colour, shape, int(box["x0"]), int(box["y0"]), side)]
            over = [
                draw.paint(np.full((SIZE, SIZE, 3), ground, float), thing, np.random.default_rng(0))
                for ground in (0, 255)
            ]
            left = (over[1].astype(int) - over[0]).mean(axis=2) / 255  # in 16ths, rounded
            expected[left < 0.53] = draw.TEXTS.index(box["text"]) + 1
        np.testing.assert_array_equal(mask, expected)


def test_the_teacher_never_sees_the_scenes_that_are_held_out(world):
    rows = pq.read_table(world / "scenes.parquet").to_pylist()
    files = [(world / row["url"].removeprefix("file:")).read_bytes() for row in rows]
    place = [int(hashlib.sha256(data).hexdigest()[:13], 16) / 16**13 for data in files]
    seen = train_teacher.read_training_scenes(world, test_fraction=0.3, val_fraction=0.2).captions
    assert seen == [row["caption"] for row, at in zip(rows, place, strict=True) if at >= 0.5]
    assert 0 < len(seen) < len(rows)


def test_a_word_keeps_its_vector_in_the_full_vocabulary():
    torch.manual_seed(0)
    words = torch.tensor([0, 320, 736, 49406, 49407])
    small = open_clip.CLIP(**train_teacher.model_config(SIZE, len(words))).eval()
    full = train_teacher.with_full_vocabulary(small, words)
    text = torch.tensor([[49406, 320, 736, 49407] + [0] * (train_teacher.CONTEXT - 4)])
    torch.testing.assert_close(
        full.encode_text(text), small.encode_text(torch.searchsorted(words, text)), rtol=0, atol=0
    )


def test_open_clip_opens_the_teacher_with_its_weights(world, tmp_path):
    params = yaml.safe_load((DEMO / "params.yaml").read_text())["teacher"]
    params |= {"steps": 2, "batch_size": 8, "warmup_steps": 1}
    scenes = train_teacher.read_training_scenes(world, 0.1, 0.1)
    first, second = (train_teacher.train(scenes, params) for _ in range(2))
    train_teacher.save(first, tmp_path / "first")
    train_teacher.save(second, tmp_path / "second")
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second")

    name = f"local-dir:{tmp_path / 'first'}"
    loaded, _, _ = open_clip.create_model_and_transforms(name, require_pretrained=True)
    tokens = open_clip.get_tokenizer(name)(["a red circle"])
    assert tokens.shape == (1, train_teacher.CONTEXT)
    pixels = train_teacher.normalise(scenes.pixels[:2])
    torch.testing.assert_close(loaded.eval().encode_image(pixels), first.encode_image(pixels))
    torch.testing.assert_close(loaded.encode_text(tokens), first.encode_text(tokens))


def test_the_teachers_card_names_the_bytes_of_its_weights(tmp_path):
    model = open_clip.CLIP(**train_teacher.model_config(SIZE))
    train_teacher.save(model, tmp_path)
    card = yaml.safe_load((tmp_path / "card.yaml").read_text())
    weights = (tmp_path / train_teacher.WEIGHTS).read_bytes()
    assert card["sha256"] == hashlib.sha256(weights).hexdigest()
    assert card["model"] == "local-dir:." and card["pretrained"] is None
