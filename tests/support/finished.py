"""The small world after every stage, for tests that look at it or break a copy."""

import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.core.config import DistillConfig, EvaluateConfig
from support import worlds

DEMO = Path(__file__).parents[2] / "pipeline/core/presets/demo.yaml"
STUDENT = {
    "image_size": 32, "patch_size": 8, "embedding_size": 32, "heads": 4, "layers": 1,
    "neighbourhood_mask": True, "same_norm": True, "pool": "extra-head", "temperature": 1.0,
}  # fmt: skip


def distill_config(**changes) -> DistillConfig:
    few = {"steps": 4, "batch": 16, "warmup": 1, "validate_every": 2, "precision": "float32"}
    few["image_sizes"] = [STUDENT["image_size"]]
    demo = yaml.safe_load(DEMO.read_text())["distill"]
    return DistillConfig(**demo | few | {"student": STUDENT} | changes)


def evaluate_config(**changes) -> EvaluateConfig:
    values = {"split": "test", "batch": 16, "prompts": ["a red circle", "never embedded"]}
    values |= {"templates": str(worlds.TEMPLATES), "segmentation": worlds.segmentation()}
    return EvaluateConfig(**values | changes)


@pytest.fixture(scope="session")
def finished_world(small_world, tmp_path_factory) -> Path:
    """data/ of the small world after select, distill and evaluate; copy it before you change it."""
    from stages.distill import distill
    from stages.evaluate import evaluate
    from stages.select import select

    data = tmp_path_factory.mktemp("finished") / "data"
    shutil.copytree(small_world.data, data)
    select(worlds.select_config(), data)
    distill(distill_config(), data, device="cpu", workers=1)
    evaluate(evaluate_config(), data, device="cpu", workers=1)
    return data
