"""Stage two refuses what does not belong together, before it trains a step."""

import copy
import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from support import finished, worlds

from pipeline.core.config import StudentConfig
from pipeline.core.errors import PipelineError
from pipeline.models.student import Student
from pipeline.training.trainer import Best, Trainer
from pipeline.training.warm_start import warm_student
from stages.distill import distill
from stages.evaluate import evaluate


@pytest.fixture
def data(finished_world, tmp_path) -> Path:
    shutil.copytree(finished_world, tmp_path / "data", ignore=shutil.ignore_patterns(".work"))
    shutil.rmtree(tmp_path / "data/student")
    return tmp_path / "data"


def train(data: Path, resume: bool = False, **changes) -> dict:
    config = finished.distill_config(**changes)
    return distill(config, data, device="cpu", workers=1, resume=resume)


def test_a_student_of_another_embedding_size_than_the_teachers_is_refused(data):
    student = finished.STUDENT | {"embedding_size": 64}
    with pytest.raises(PipelineError, match=r"embedding_size is 64\. Set it to 32"):
        train(data, student=student)


def test_a_batch_larger_than_the_data_is_refused(data):
    with pytest.raises(PipelineError, match="fewer than one batch of 4096"):
        train(data, batch=4096)


def test_a_missing_stage_is_named(data):
    shutil.rmtree(data / "selection")
    with pytest.raises(PipelineError, match="Run `pipeline select` first"):
        train(data)


def test_embeddings_of_other_images_than_lie_here_are_refused(data, small_world):
    from stages.download import download

    shutil.rmtree(data / "images")
    config = worlds.download_config(small_world.manifest, small_world.root, rows_per_shard=13)
    download(config, data, processes=1, threads=4)
    with pytest.raises(PipelineError, match="not made from the images that data/ holds now"):
        train(data)
    with pytest.raises(PipelineError, match="distill"):
        evaluate(finished.evaluate_config(), data, device="cpu")


def test_a_truncated_shard_is_named_with_what_to_run(data):
    shard = next(p for p in sorted((data / "teacher/images").glob("*.parquet")))
    whole = shard.read_bytes()
    shard.unlink()  # it may be a hard link
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PipelineError, match="teacher"):
        train(data)


def test_a_loss_that_explodes_ends_with_a_clear_error_and_no_student(data):
    with pytest.raises(PipelineError, match="learning_rate"):
        train(data, learning_rate=1e30, warmup=0, steps=50, max_grad_norm=1e30)
    assert not (data / "student").exists()


@pytest.fixture
def interrupted(data, monkeypatch) -> Path:
    """data/ with a run that ended after its first checkpoint."""
    whole = Trainer.train_step

    def ends(trainer, batch):
        if trainer.step == finished.distill_config().validate_every:
            raise KeyboardInterrupt
        return whole(trainer, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", ends)
        train(data)
    return data


def test_resume_goes_on_with_the_run_of_these_very_parameters(interrupted, monkeypatch):
    first_steps = []
    restore = Trainer.restore

    def watched(trainer, path):
        restore(trainer, path)
        first_steps.append(trainer.step)

    monkeypatch.setattr(Trainer, "restore", watched)
    train(interrupted, resume=True)
    assert first_steps == [finished.distill_config().validate_every]


def test_resume_with_other_parameters_is_refused_and_names_them(interrupted):
    was = finished.distill_config().learning_rate
    with pytest.raises(PipelineError, match=f"learning_rate was {was}, is 0.5") as refusal:
        train(interrupted, resume=True, learning_rate=0.5)
    assert "steps" not in str(refusal.value)
    train(interrupted, resume=True)  # the checkpoint is still there


def test_resume_with_other_data_is_refused_and_names_it(interrupted, small_world):
    from stages.select import select

    select(worlds.select_config(where="label = 'wide'"), interrupted)
    with pytest.raises(PipelineError, match="other files in data/selection"):
        train(interrupted, resume=True)


def test_resume_without_a_run_to_resume_is_refused(data):
    with pytest.raises(PipelineError, match="no run to resume"):
        train(data, resume=True)


def test_the_best_student_by_validation_is_published_and_the_last_beside_it(data, monkeypatch):
    """Each validation sees other weights, of which those of step 4 are forged to be the best."""
    see, weights = Best.see, {}

    def forged(best, step, cosine, student):
        weights[step] = copy.deepcopy(student.state_dict())
        see(best, step, {2: 0.2, 4: 0.9, 6: 0.4}[step], student)

    monkeypatch.setattr(Best, "see", forged)
    metrics = train(data, steps=6)
    assert metrics["best_step"] == 4 and metrics["steps"] == 6
    assert metrics["best_val_cosine"] == 0.9 != metrics["val_cosine"]
    for folder, step, which in ((data / "student", 4, "best"), (data / "student/last", 6, "last")):
        found = Student.load(folder).state_dict()
        assert all(torch.equal(x, found[name]) for name, x in weights[step].items())
        card = json.loads((folder / "config.json").read_text())
        assert card["provenance"]["checkpoint"]["which"] == which
        assert card["provenance"]["checkpoint"]["step"] == step


def test_a_last_step_that_was_skipped_leaves_the_metrics_of_the_one_before(data, monkeypatch):
    real = Trainer.train_step

    def poisoned(trainer, batch):
        if trainer.step == 3:
            batch.targets[0] = float("nan")
        real(trainer, batch)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    metrics = train(data, max_skipped_steps=1)
    log = list(csv.DictReader((data / "student/training.csv").open()))
    assert metrics["skipped_steps"] == 1 and [row["skipped"] for row in log] == ["0", "1"]
    assert metrics["loss"] == pytest.approx(float(log[0]["loss"]))
    assert json.loads((data / "student/training.json").read_text()) == metrics


def test_training_ends_early_once_validation_gets_no_better_and_stays_ended(data, monkeypatch):
    """A learning rate so small that nothing is learned: no validation after the first is better."""
    still = {"learning_rate": 1e-30, "weight_decay": 0.0, "steps": 40}
    metrics = train(data, early_stopping=2, **still)
    assert metrics["steps"] == 6 and metrics["best_step"] == 2
    assert train(data, early_stopping=0, **still | {"steps": 8})["steps"] == 8


def test_a_student_starts_from_another_one(data, finished_world):
    """With no step worth the name, it stays that one; the configuration's mask and norm hold."""
    still = {"learning_rate": 1e-30, "weight_decay": 0.0, "steps": 2}
    start = str(finished_world / "student")
    train(data, init=start, **still)
    first, found = Student.load(start), Student.load(data / "student")
    for name, x in first.state_dict().items():
        assert torch.allclose(found.state_dict()[name], x, atol=1e-6), name


def test_a_start_is_adapted_to_another_image_size_mask_and_norm(finished_world):
    start = Student.load(finished_world / "student")
    shape = start.config.model_dump()
    asked = {"image_size": 48, "neighbourhood_mask": False, "same_norm": False}
    config = StudentConfig(**shape | asked)
    found = warm_student(finished_world / "student", config, start.preprocessing)
    assert found.config == config and found.attention_bias is None
    resized = start.resized(48).state_dict()
    for name, x in found.state_dict().items():
        assert torch.equal(x, resized[name]), name
    back = warm_student(finished_world / "student", start.config, start.preprocessing)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back.eval()(pixels)[0], start(pixels)[0])


def test_a_start_of_another_shape_is_refused_with_the_reason(data, finished_world):
    start = str(finished_world / "student")
    for changes, reason in (
        ({"layers": 2}, "has layers 1 instead of 2"),
        ({"heads": 8}, "has heads 4 instead of 8"),
        ({"patch_size": 16}, "has patch_size 8 instead of 16"),
    ):
        with pytest.raises(PipelineError, match=reason):
            train(data, init=start, student=finished.STUDENT | changes)
    other = StudentConfig(**finished.STUDENT | {"embedding_size": 64})
    with pytest.raises(PipelineError, match="embedding_size 32 instead of 64"):
        warm_student(finished_world / "student", other, Student.load(start).preprocessing)


def test_a_start_that_is_no_student_or_holds_nan_is_refused(data, finished_world, tmp_path):
    with pytest.raises(PipelineError, match=r"distill\.init: .*cannot be read"):
        train(data, init=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="fixed_stem_frequencies replaces"):
        finished.distill_config(init="student", fixed_stem_frequencies=4)
    broken = Student.load(finished_world / "student")
    with torch.no_grad():
        broken.ln_pre.weight[3] = torch.nan
    broken.save(tmp_path / "broken", provenance={})
    with pytest.raises(PipelineError, match=r"weights that are not finite \(ln_pre\.weight\)"):
        train(data, init=str(tmp_path / "broken"))
