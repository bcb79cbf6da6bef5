"""Training goes on from a checkpoint as if nothing had happened; its parts do what they say."""

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from support import stored, worlds

from pipeline.core.errors import PipelineError
from pipeline.models.student import Student
from pipeline.training.batches import Batch, held_out_batches, training_batches
from pipeline.training.dataset import Dataset
from pipeline.training.distributed import Ranks
from pipeline.training.sampler import Sampler
from pipeline.training.trainer import Trainer

EVERYTHING = {"mixup": 1.0, "min_crop_area": 0.5, "fixed_stem_frequencies": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    stored.write_data(folder)
    return folder


def trainer(config) -> Trainer:
    torch.manual_seed(config.seed)
    mean = np.full(stored.SIZE, 0.01, np.float32)
    return Trainer(config, Student(config.student), mean, Ranks(torch.device("cpu")))


def train(found: Trainer, data, stop: int) -> list[float]:
    """Steps from where a trainer stands to stop; returns the losses."""
    config = found.config
    rows = Dataset(data, "train", 32, "bicubic", views=2, captions=True)
    order = Sampler(rows, config.seed, config.batch, config.shuffle_row_groups)
    steps = training_batches(
        rows, order, found.step, stop, workers=1, min_crop_area=config.min_crop_area
    )
    return [step(found, batch)["loss"] for batch in steps]


def step(found: Trainer, batch: Batch) -> dict:
    """One step, and what it did."""
    found.train_step(batch)
    return found.read()[0]


def held_out(data):
    rows = Dataset(data, "val", 32, "bicubic")
    return held_out_batches(rows, range(len(rows)), 4, workers=1)


def batch(count: int, position=None, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    targets = rng.normal(size=(count, stored.SIZE)).astype(np.float32)
    return Batch(
        ids=[str(i) for i in range(count)],
        pixels=rng.integers(0, 256, (count, 32, 32, 3), np.uint8),
        targets=targets / np.linalg.norm(targets, axis=1, keepdims=True),
        texts=np.zeros((count, stored.SIZE), np.float32),
        position=np.arange(count) if position is None else np.array(position),
        undecodable=[],
    )


def assert_equal(a: Trainer, b: Trainer) -> None:
    for x, y in ((a.student, b.student), (a.averaged_student(), b.averaged_student())):
        assert all(torch.equal(p, q) for p, q in zip(x.parameters(), y.parameters(), strict=True))


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
@pytest.mark.parametrize("extra", [{}, EVERYTHING])
@pytest.mark.parametrize("ended_at", [1, 5, 9])
def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(
    data, tmp_path, ended_at, extra, schedule
):
    config = stored.distill_config(schedule=schedule, **extra)
    undisturbed = trainer(config)
    losses = train(undisturbed, data, ended_at)
    undisturbed.validate(held_out(data))
    undisturbed.save(tmp_path / "checkpoint.pt")
    losses += train(undisturbed, data, config.steps)
    resumed = trainer(config)
    resumed.restore(tmp_path / "checkpoint.pt")
    assert resumed.step == ended_at
    assert train(resumed, data, config.steps) == losses[ended_at:]
    assert_equal(resumed, undisturbed)


def test_two_runs_of_one_configuration_are_equal_and_another_seed_is_not(data):
    config = stored.distill_config(**EVERYTHING)
    first, second = trainer(config), trainer(config)
    losses = train(first, data, 6)
    assert train(second, data, 6) == losses
    assert_equal(first, second)
    assert train(trainer(stored.distill_config(seed=1, **EVERYTHING)), data, 6) != losses


def test_a_torn_checkpoint_is_refused_by_name(data, tmp_path):
    found = trainer(stored.distill_config())
    path = tmp_path / "checkpoint.pt"
    found.save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PipelineError, match=r"checkpoint\.pt cannot be resumed from"):
        found.restore(path)


def test_a_student_learns_the_targets_of_a_batch_that_it_sees_again_and_again():
    loss = {"l1": 1.0, "cosine": 0.0, "relational": 0.0, "caption": 0.0}
    config = stored.distill_config(
        loss=loss, steps=200, color_jitter=0.0, learning_rate=0.01, ema=0.0
    )
    found, same = trainer(config), batch(8)
    losses = [step(found, same)["loss"] for _ in range(200)]
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_more_than_allowed_end_the_run(poison):
    """A gradient may be infinite under a loss that is not: zero vectors, overflowing products."""
    found = trainer(stored.distill_config(max_skipped_steps=1, ema=0.0))
    step(found, batch(8))
    before = copy.deepcopy([found.student.state_dict(), found.optimizer.state_dict()["state"]])
    bad = batch(8)
    if poison == "loss":
        bad.targets[3] = np.nan
    else:
        parameter = next(found.student.parameters())
        hook = parameter.register_hook(lambda gradient: gradient * torch.inf)
    log = step(found, bad)
    assert log["skipped"] == found.skipped == 1 and log["step"] == 2
    assert math.isfinite(log["loss"]) == (poison == "gradient")
    after = found.student.state_dict(), found.optimizer.state_dict()["state"]
    assert all(torch.equal(x, after[0][name]) for name, x in before[0].items())
    for key, state in before[1].items():
        assert all(torch.equal(x, after[1][key][name]) for name, x in state.items())
    found.train_step(bad)
    with pytest.raises(PipelineError, match=r"2 such steps were skipped.*learning_rate"):
        found.read()
    if poison == "gradient":
        hook.remove()
    assert all(p.isfinite().all() for p in found.student.parameters())


def test_a_checkpoint_after_a_skipped_step_goes_on_with_finite_weights(tmp_path):
    config = stored.distill_config(max_skipped_steps=1)
    first, resumed, bad = trainer(config), trainer(config), batch(8)
    bad.targets[0] = np.inf
    assert step(first, bad)["skipped"]
    first.best.see(1, 0.5, first.averaged_student())
    first.save(tmp_path / "checkpoint.pt")
    resumed.restore(tmp_path / "checkpoint.pt")
    assert resumed.skipped == 1 and math.isfinite(step(resumed, batch(8))["loss"])


def test_a_batch_of_which_nothing_decodes_is_refused():
    found = trainer(stored.distill_config(mixup=1.0))
    with pytest.raises(PipelineError, match="none of the 8 images of step 0 decodes"):
        found.train_step(batch(0, position=np.zeros(0, np.int64)))


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine():
    config = stored.distill_config(steps=20, warmup=4, learning_rate=0.01)
    found = trainer(config)
    rates = [step(found, batch(8))["learning_rate"] for _ in range(20)]
    wanted = [0.01 * (s + 1) / 4 for s in range(4)]
    wanted += [0.005 * (1 + math.cos(math.pi * (s - 4) / 16)) for s in range(4, 20)]
    assert rates == pytest.approx(wanted)


def test_averaged_weights_start_as_the_weights_and_lag_behind_them():
    found = trainer(stored.distill_config(ema=0.9))
    start = [p.clone() for p in found.student.parameters()]
    for _ in range(12):
        found.train_step(batch(8))
    for old, new, mean in zip(
        start, found.student.parameters(), found.averaged_student().parameters(), strict=True
    ):
        if not torch.equal(old, new):
            assert not torch.equal(mean, new)
            assert (mean - new).norm() < (old - new).norm()


def test_validation_gives_the_cosine_beside_that_of_the_mean(data):
    found = trainer(stored.distill_config(ema=0.0))
    figures = found.validate(held_out(data))
    student, cosines, floors = found.averaged_student(), [], []
    for part in held_out(data):
        with torch.inference_mode():
            pixels = torch.from_numpy(part.pixels).permute(0, 3, 1, 2)
            vectors = student(student.normalise(pixels))[0].numpy()
        cosines += list((vectors * part.targets).sum(1) / np.linalg.norm(vectors, axis=1))
        floors += list(part.targets @ np.full(stored.SIZE, stored.SIZE**-0.5))
    assert figures["val_cosine"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert figures["val_floor"] == pytest.approx(np.mean(floors), abs=1e-5)


def test_mixup_with_an_odd_share_is_refused():
    with pytest.raises(PipelineError, match=r"mixup pairs images, and 7 a rank is odd"):
        trainer(stored.distill_config(mixup=1.0, batch=7))


def test_a_fixed_stem_frequencies_stays_as_it_is_and_a_learned_one_does_not(data):
    for count in (0, 4):
        found = trainer(stored.distill_config(fixed_stem_frequencies=count))
        before = found.student.conv1.weight.clone()
        train(found, data, 3)
        assert torch.equal(found.student.conv1.weight, before) == bool(count)


def test_a_stem_of_more_frequencies_than_a_patch_has_is_refused():
    with pytest.raises(ValueError, match="fixed_stem_frequencies 9 is more than"):
        stored.distill_config(fixed_stem_frequencies=9)


def test_a_resume_with_other_parameters_starts_afresh(small_world, tmp_path, monkeypatch):
    """What an interrupted run left behind does not reach into the next one's weights."""
    from stages.distill import distill
    from stages.select import select

    weights = {}
    for name in ("interrupted", "undisturbed"):
        data = tmp_path / name
        for stage_folder in ("images", "teacher"):
            shutil.copytree(small_world.data / stage_folder, data / stage_folder)
        select(worlds.select_config(), data)
        if name == "interrupted":
            step = Trainer.train_step
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Trainer, "train_step", _interrupted_after(step, 6))
                distill(stored.distill_config(), data, device="cpu")
            assert list(data.glob(".work/distill/*/checkpoint.pt"))
        distill(stored.distill_config(learning_rate=0.001), data, device="cpu")
        weights[name] = (data / "student/model.safetensors").read_bytes()
    assert weights["interrupted"] == weights["undisturbed"]


def _interrupted_after(step, count: int):
    def train_step(self, batch):
        if self.step == count:
            raise KeyboardInterrupt
        return step(self, batch)

    return train_step


def test_a_validation_split_of_which_nothing_decodes_is_said():
    with pytest.raises(PipelineError, match="no image of the validation split decodes"):
        trainer(stored.distill_config()).validate([])
