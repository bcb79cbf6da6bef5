"""Which rows a step sees is a function of its position; each is seen as the teacher saw it."""

import multiprocessing
import os
import shutil
import signal

import numpy as np
import psutil
import pytest
from PIL import Image
from support import stored, worlds

from pipeline.core.errors import PipelineError
from pipeline.core.records import Sample
from pipeline.data import shards
from pipeline.training.augment import cropped
from pipeline.training.batches import (
    Loader,
    TrainingOrder,
    held_out_batches,
    training_batches,
)
from pipeline.training.dataset import Dataset, _caption
from pipeline.training.sampler import Sampler

SEED, BATCH, LANES = 3, 6, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    stored.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[str]:
    return stored.write_data(tmp_path_factory.mktemp("again"))


def dataset(data, split="train", **options) -> Dataset:
    return Dataset(data, split, 32, "bicubic", **{"groups_in_use": LANES, "views": 2} | options)


def steps(data, start=0, stop=16, seed=SEED, **options):
    rows, how = dataset(data), {"workers": 1} | options
    return list(training_batches(rows, Sampler(rows, seed, BATCH, LANES), start, stop, **how))


def same(a, b) -> bool:
    return a.ids == b.ids and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("pixels", "targets")
    )


def number(key: str) -> int:
    return int(key, 16)


def test_rows_are_those_that_the_selection_keeps_in_the_shards_order(data, expected):
    rows = dataset(data)
    assert [rows.sample(i).image_id for i in range(len(rows))] == expected


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
        for name in ("pixels", "targets", "position"):
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
    rows = dataset(data)
    first, second, third = (rows.sample(0, epoch, SEED).flip for epoch in range(3))
    assert first != second and first == third


def test_jitter_shows_a_part_of_the_view_and_keeps_the_target(data):
    whole, part = steps(data, 0, 8), steps(data, 0, 8, min_crop_area=0.25)
    assert [a.ids for a in whole] == [b.ids for b in part]
    assert all(np.array_equal(a.targets, b.targets) for a, b in zip(whole, part, strict=True))
    changed = [not np.array_equal(x, y) for a, b in zip(whole, part, strict=True)
               for x, y in zip(a.pixels, b.pixels, strict=True)]  # fmt: skip
    assert np.mean(changed) > 0.9


def test_jitter_boxes_lie_in_the_view_have_its_shape_and_reach_the_least_share():
    view = Sample("", b"", (10.0, 20.0, 50.0, 40.0), True, None, None)
    shown = [cropped(view, 0.3, 1, 2, i) for i in range(2000)]
    boxes = np.array([sample.box for sample in shown])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area = width * height / (40 * 20)
    assert (boxes[:, :2] >= [10, 20]).all() and (boxes[:, 2:] <= [50, 40]).all()
    assert (np.rint(boxes) == boxes).all()
    assert np.abs(width - 2 * height).max() < 4  # up to two whole pixels more on either side
    assert 0.3 <= area.min() < 0.4 and area.max() == 1
    assert 0.45 < np.mean([sample.flip for sample in shown]) < 0.55


def test_a_damaged_picture_is_named_and_never_replaced(tmp_path):
    expected = stored.write_data(tmp_path, damaged=(1, 30))
    rows = dataset(tmp_path)
    order = Sampler(rows, SEED, BATCH, LANES)
    lost, shown = [], []
    for batch in training_batches(rows, order, 0, order.steps, workers=2):
        assert len(batch.ids) + len(batch.undecodable) == BATCH
        assert len(batch.pixels) == len(batch.targets) == len(batch.position) == len(batch.ids)
        lost, shown = lost + batch.undecodable, shown + batch.ids
    tail = set(expected) - set(lost) - set(shown)
    assert {number(key) for key in lost} == {1, 30} - {number(key) for key in tail}
    assert lost and len(shown) == len(set(shown))


def test_captions_take_turns_and_rows_without_one_are_zero(data):
    rows, seen = dataset(data, captions=True), {}
    for batch in training_batches(rows, Sampler(rows, SEED, BATCH, LANES), 0, 40, workers=1):
        for key, vector in zip(batch.ids, batch.texts, strict=True):
            seen.setdefault(number(key), set()).add(vector.tobytes())
            if number(key) % 3:
                assert not vector.any()
            else:
                own = [float(vector @ stored.vector(number(key), 100 + t)) for t in range(2)]
                assert max(own) == pytest.approx(1, abs=1e-3)
    assert {len(vectors) for i, vectors in seen.items() if i % 3 == 0} == {2}


def test_held_out_batches_give_view_0_in_the_order_asked_for(data):
    held_out = dataset(data, "val", views=1)
    found = list(held_out_batches(held_out, range(len(held_out)), 4, workers=2))
    ids = [key for batch in found for key in batch.ids]
    assert ids == sorted(ids) and all(number(key) % 7 == 0 for key in ids)
    targets = np.concatenate([batch.targets for batch in found])
    wanted = np.array([stored.vector(number(key), 0) for key in ids])
    assert np.abs(targets - wanted).max() < 1e-3


def test_more_views_than_are_stored_are_refused(data):
    with pytest.raises(PipelineError, match=r"holds 2 views, distill\.views asks for 3"):
        dataset(data, views=3).sample(0, 1), dataset(data, views=3).sample(0, 2)


def test_fewer_rows_than_a_batch_and_an_empty_split_are_refused(data):
    with pytest.raises(PipelineError, match="fewer than one batch of 1000"):
        Sampler(dataset(data), SEED, 1000, LANES)
    with pytest.raises(PipelineError, match="keeps no image for test"):
        dataset(data, "test")


def test_an_image_without_a_target_is_named(tmp_path):
    stored.write_data(tmp_path)
    path = tmp_path / "teacher/images/00000.parquet"
    with shards.open_shard(path, "teacher-embed") as file:
        groups = [file.read_row_group(g) for g in range(file.num_row_groups)]
    schema = shards.teacher_schema(stored.SIZE)
    shards.write_shard(path, schema, [group.slice(3) for group in groups], {})
    with pytest.raises(PipelineError, match=f"{1:032x} has no embedding of view"):
        dataset(tmp_path).sample(0)


@pytest.mark.parametrize(("views", "captions"), [(5, 5), (2, 4), (3, 5), (1, 3)])
def test_every_pair_of_view_and_caption_occurs(views, captions):
    pairs = {(epoch % views, _caption(epoch, views, captions)) for epoch in range(views * captions)}
    assert len(pairs) == views * captions
    shown = [_caption(epoch, views, captions) for epoch in range(captions)]
    assert len(set(shown)) >= min(captions, 2)  # and the captions change from epoch to epoch


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_rank_reads_only_its_part_of_the_row_groups(data, ranks, monkeypatch):
    """But for those that lie on a cut between two lanes, of which there are LANES - 1."""
    groups = len(dataset(data).edges) - 1
    read = []
    real = Dataset._read_group
    monkeypatch.setattr(
        Dataset, "_read_group", lambda self, *key: read.append(key) or real(self, *key)
    )
    per_rank = []
    for rank in range(ranks):
        read.clear()
        rows = dataset(data, views=1)
        order = Sampler(rows, SEED, 8, LANES)
        list(training_batches(rows, order, 0, order.steps, workers=1, rank=rank, ranks=ranks))
        assert len(read) == len(set(read))  # each once: they are kept as long as they are needed
        per_rank.append(len(read))
    assert sum(per_rank) <= groups + LANES - 1
    assert max(per_rank) <= groups / ranks + LANES


def test_processes_give_the_batches_of_threads(data):
    """Spawned loader processes, as for a GPU: the same rows, pixels, targets and captions."""
    rows = dataset(data, captions=True)
    order = TrainingOrder(Sampler(rows, SEED, BATCH, LANES), 0.5, [rows.image_size])
    made = []
    for processes in (False, True):
        with Loader(rows, order, 0, BATCH, 2, processes=processes) as loader:
            made.append(list(loader.batches(range(3, 12))))
    for a, b in zip(*made, strict=True):
        assert same(a, b) and np.array_equal(a.texts, b.texts)


def test_a_loader_process_that_is_killed_ends_the_run_clearly(data):
    rows = dataset(data)
    order = TrainingOrder(Sampler(rows, SEED, BATCH, LANES), 1.0, [rows.image_size])
    with Loader(rows, order, 0, BATCH, 2, processes=True) as loader:
        batches = loader.batches(range(100_000))
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(
            PipelineError, match=r"a loader process has ended.*Run the command again"
        ):
            for _ in batches:
                pass
    assert not multiprocessing.active_children()


def test_loader_processes_end_with_a_parent_that_is_killed_while_they_start(data):
    parent = worlds.run_code(
        """
        import sys
        from pathlib import Path
        from pipeline.training.batches import GivenOrder, Loader
        from pipeline.training.dataset import Dataset

        if __name__ == "__main__":
            rows = Dataset(Path(sys.argv[1]), "train", 32, "bicubic")
            with Loader(rows, GivenOrder(range(10), 2, 32), 0, 2, 2, processes=True) as loader:
                filled = loader._by_processes(iter([(0, 0)] * 10))
                import threading, time
                threading.Thread(target=lambda: next(filled), daemon=True).start()
                import multiprocessing
                while len(multiprocessing.active_children()) < 2:
                    time.sleep(0.01)
                print(*[child.pid for child in multiprocessing.active_children()], flush=True)
                time.sleep(60)
        """,
        data,
    )
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(children) == 2, parent.stderr.read()
    parent.kill()
    parent.wait()
    gone, alive = psutil.wait_procs(children, timeout=300)
    assert len(gone) == 2 and not alive


def test_an_error_in_a_loader_process_keeps_its_words(tmp_path):
    stored.write_data(tmp_path)
    rows = dataset(tmp_path)
    order = TrainingOrder(Sampler(rows, SEED, BATCH, LANES), 1.0, [rows.image_size])
    for path in (tmp_path / "teacher/images").glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:100])
    loader = Loader(rows, order, 0, BATCH, 1, processes=True)
    with loader, pytest.raises(PipelineError) as refusal:
        next(loader.batches(range(10)))
    assert "is damaged or no Parquet file" in str(refusal.value)
    assert "Traceback" not in str(refusal.value)


def test_too_little_shared_memory_is_refused_before_anything_is_started(data, monkeypatch):
    """As in a container, whose /dev/shm has 64 MB unless it is told otherwise."""
    rows = dataset(data)
    order = TrainingOrder(Sampler(rows, SEED, BATCH, LANES), 1.0, [rows.image_size])
    usage = shutil.disk_usage("/")._replace(free=64 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with Loader(rows, order, 0, 1000, 1, processes=True):
        pass  # 15 MB
    with pytest.raises(
        PipelineError, match=r"146 MB of shared memory.*64 MB free.*--shm-size=293m"
    ):
        Loader(rows, order, 0, 10_000, 1, processes=True)
    assert not multiprocessing.active_children()
