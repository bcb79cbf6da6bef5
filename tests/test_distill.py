"""Stage two refuses what does not belong together, before it trains a step."""

import shutil
from pathlib import Path

import finished
import pytest
import worlds
from finished import finished_world  # noqa: F401  (a fixture)

from pipeline.core.errors import PipelineError
from pipeline.training.trainer import Trainer
from stages.distill import distill
from stages.evaluate import evaluate


@pytest.fixture
def data(finished_world, tmp_path) -> Path:  # noqa: F811
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
    config = worlds.download_config(small_world.manifest, small_world.root, buckets=5)
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
