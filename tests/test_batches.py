"""Which rows a step sees is a function of its place; each is seen as the teacher saw it."""

import numpy as np
import pytest
import stored
from PIL import Image

from pipeline.core.errors import PipelineError
from pipeline.data import shards
from pipeline.training.batches import Epochs, Rows, batches_of, training_batches

SEED, BATCH, WINDOW = 3, 6, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    stored.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[str]:
    return stored.write_data(tmp_path_factory.mktemp("again"))


def rows(data, split="train", **options) -> Rows:
    return Rows(data, split, 32, "bicubic", **{"window": WINDOW, "views": 2} | options)


def steps(data, start=0, stop=16, seed=SEED, **options):
    how = {"workers": 1} | options
    return list(training_batches(Epochs(rows(data), seed, BATCH, WINDOW), start, stop, **how))


def same(a, b) -> bool:
    return a.ids == b.ids and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("pixels", "targets", "texts")
    )


def number(key: str) -> int:
    return int(key, 16)


def test_rows_are_those_that_the_selection_keeps_in_the_shards_order(data, expected):
    found = rows(data)
    assert [found.read(i, 0, 0)["image_id"] for i in range(len(found))] == expected


def test_an_epoch_shows_every_row_once_up_to_the_tail_that_fills_no_step(data, expected):
    per_epoch = len(expected) // BATCH
    for epoch in range(3):
        found = steps(data, epoch * per_epoch, (epoch + 1) * per_epoch)
        ids = [key for batch in found for key in batch.ids]
        assert len(ids) == len(set(ids)) == per_epoch * BATCH
        assert set(ids) <= set(expected)


def test_a_row_that_one_epoch_leaves_in_its_tail_is_shown_by_others(data, expected):
    seen = {key for batch in steps(data, 0, 60) for key in batch.ids}
    assert seen == set(expected)


def test_epochs_and_seeds_differ_in_order(data, expected):
    per_epoch = len(expected) // BATCH
    first, second = (
        [key for batch in steps(data, e * per_epoch, (e + 1) * per_epoch) for key in batch.ids]
        for e in (0, 1)
    )
    other = [key for batch in steps(data, 0, per_epoch, seed=SEED + 1) for key in batch.ids]
    assert first != second and first != other and first != sorted(first)


@pytest.mark.parametrize("min_crop_area", [1.0, 0.3])
def test_a_run_that_begins_anywhere_sees_what_an_undisturbed_one_sees(data, min_crop_area):
    whole = steps(data, 0, 16, min_crop_area=min_crop_area)
    for start in (1, 7, 8, 15):
        rest = steps(data, start, 16, min_crop_area=min_crop_area)
        assert all(same(a, b) for a, b in zip(rest, whole[start:], strict=True))


@pytest.mark.parametrize("min_crop_area", [1.0, 0.3])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_and_workers_share_out_the_very_same_steps(data, ranks, min_crop_area):
    whole = steps(data, 2, 9, min_crop_area=min_crop_area)
    parts = [
        steps(data, 2, 9, rank=rank, ranks=ranks, workers=1 + 2 * rank, min_crop_area=min_crop_area)
        for rank in range(ranks)
    ]
    for step, batch in enumerate(whole):
        mine = [part[step] for part in parts]
        assert [key for share in mine for key in share.ids] == batch.ids
        for name in ("pixels", "targets", "places"):
            assert np.array_equal(
                np.concatenate([getattr(s, name) for s in mine]), getattr(batch, name)
            )


def test_pixels_are_the_view_of_which_the_target_is(data):
    """Both views turn up; each is cropped by PIL from another decoder's pixels for comparison."""
    seen = set()
    for batch in steps(data, 0, 16):
        for key, pixels, target in zip(batch.ids, batch.pixels, batch.targets, strict=True):
            i = number(key)
            agreement = [float(target @ stored.vector(i, v)) for v in range(stored.VIEWS)]
            view = int(np.argmax(agreement))
            assert agreement[view] == pytest.approx(1, abs=1e-3)
            box = [(4, 0, 44, 40), (24, 0, 48, 40)][view]
            image = Image.fromarray(stored.decoded(i)).resize((32, 32), Image.BICUBIC, box=box)
            wanted = np.asarray(image)[:, ::-1] if view else np.asarray(image)
            assert np.abs(wanted.astype(int) - pixels).max() <= 3  # two JPEG decoders
            seen.add(view)
    assert seen == {0, 1}


def test_a_row_group_shows_its_views_in_turn(data):
    found = rows(data)
    first, second, third = (found.read(0, epoch, SEED)["flip"] for epoch in range(3))
    assert first != second and first == third


def test_jitter_shows_a_part_of_the_view_and_keeps_the_target(data):
    whole, part = steps(data, 0, 8), steps(data, 0, 8, min_crop_area=0.25)
    assert [a.ids for a in whole] == [b.ids for b in part]
    assert all(np.array_equal(a.targets, b.targets) for a, b in zip(whole, part, strict=True))
    changed = [not np.array_equal(x, y) for a, b in zip(whole, part, strict=True)
               for x, y in zip(a.pixels, b.pixels, strict=True)]  # fmt: skip
    assert np.mean(changed) > 0.9


def test_jitter_boxes_lie_in_the_view_have_its_shape_and_reach_the_least_share():
    from pipeline.training.batches import _glimpse

    row = {"box": (10.0, 20.0, 50.0, 40.0), "flip": True}
    found = [_glimpse(row, 0.3, 1, 2, i) for i in range(2000)]
    boxes = np.array([glimpse["box"] for glimpse in found])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = width * height / (40 * 20)
    assert (boxes[:, :2] >= [10, 20]).all() and (boxes[:, 2:] <= [50, 40]).all()
    assert (np.rint(boxes) == boxes).all()
    assert np.abs(width - 2 * height).max() < 4  # up to two whole pixels more on either side
    assert 0.3 <= area.min() < 0.4 and area.max() == 1
    assert 0.45 < np.mean([glimpse["flip"] for glimpse in found]) < 0.55


def test_a_damaged_picture_is_named_and_never_replaced(tmp_path):
    expected = stored.write_data(tmp_path, damaged=(1, 30))
    found = Epochs(rows(tmp_path), SEED, BATCH, WINDOW)
    lost, shown = [], []
    for batch in training_batches(found, 0, found.steps, workers=2):
        assert len(batch.ids) + len(batch.lost) == BATCH
        assert len(batch.pixels) == len(batch.targets) == len(batch.places) == len(batch.ids)
        lost, shown = lost + batch.lost, shown + batch.ids
    tail = set(expected) - set(lost) - set(shown)
    assert {number(key) for key in lost} == {1, 30} - {number(key) for key in tail}
    assert lost and len(shown) == len(set(shown))


def test_captions_take_turns_and_rows_without_one_are_zero(data):
    epochs = Epochs(rows(data, captions=True), SEED, BATCH, WINDOW)
    seen = {}
    for batch in training_batches(epochs, 0, 40, workers=1):
        for key, vector in zip(batch.ids, batch.texts, strict=True):
            seen.setdefault(number(key), set()).add(vector.tobytes())
            if number(key) % 3:
                assert not vector.any()
            else:
                own = [float(vector @ stored.vector(number(key), 100 + t)) for t in range(2)]
                assert max(own) == pytest.approx(1, abs=1e-3)
    assert {len(vectors) for i, vectors in seen.items() if i % 3 == 0} == {2}


def test_batches_of_gives_view_0_in_the_order_asked_for(data):
    held_out = rows(data, "val", views=1)
    found = list(batches_of(held_out, range(len(held_out)), 4, workers=2))
    ids = [key for batch in found for key in batch.ids]
    assert ids == sorted(ids) and all(number(key) % 7 == 0 for key in ids)
    targets = np.concatenate([batch.targets for batch in found])
    wanted = np.array([stored.vector(number(key), 0) for key in ids])
    assert np.abs(targets - wanted).max() < 1e-3


def test_more_views_than_are_stored_are_refused(data):
    with pytest.raises(PipelineError, match=r"holds 2 views, distill\.views asks for 3"):
        rows(data, views=3).read(0, 1, 0), rows(data, views=3).read(0, 2, 0)


def test_fewer_rows_than_a_batch_and_an_empty_split_are_refused(data):
    with pytest.raises(PipelineError, match="fewer than one batch of 1000"):
        Epochs(rows(data), SEED, 1000, WINDOW)
    with pytest.raises(PipelineError, match="keeps no image for test"):
        rows(data, "test")


def test_an_image_without_a_target_is_named(tmp_path):
    stored.write_data(tmp_path)
    path = tmp_path / "teacher/images/00000.parquet"
    with shards.open_shard(path, "teacher-embed") as file:
        groups = [file.read_row_group(g) for g in range(file.num_row_groups)]
    schema = shards.teacher_schema(stored.SIZE)
    shards.write_shard(path, schema, [group.slice(3) for group in groups], {})
    with pytest.raises(PipelineError, match=f"{1:032x} has no embedding of view"):
        rows(tmp_path).read(0, 0, 0)
