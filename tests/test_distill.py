"""Stage two refuses what does not belong together, before it trains a step."""

import shutil
from pathlib import Path

import finished
import pytest
import worlds
from finished import finished_world  # noqa: F401  (a fixture)

from pipeline.core.errors import PipelineError
from stages.distill import distill
from stages.evaluate import evaluate


@pytest.fixture
def data(finished_world, tmp_path) -> Path:  # noqa: F811
    shutil.copytree(finished_world, tmp_path / "data", ignore=shutil.ignore_patterns(".work"))
    shutil.rmtree(tmp_path / "data/student")
    return tmp_path / "data"


def train(data: Path, **changes) -> dict:
    return distill(finished.distill_config(**changes), data, device="cpu", workers=1)


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
    with pytest.raises(PipelineError, match="not of one run"):
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
        train(data, learning_rate=1e30, warmup=0, steps=50, clip=1e30)
    assert not (data / "student").exists()
