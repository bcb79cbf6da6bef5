"""A small student with random weights, and pixels for it."""

import torch

from pipeline.core.config import StudentConfig
from pipeline.core.records import Preprocessing
from pipeline.models.student import Student

SMALL = {
    "image_size": 32, "patch_size": 8, "embedding_size": 24, "heads": 3, "layers": 2,
    "neighbourhood_mask": True, "same_norm": True, "pool": "extra-head", "temperature": 1.0,
}  # fmt: skip


def small_student(preprocessing: Preprocessing | None = None, **changes) -> Student:
    torch.manual_seed(0)
    return Student(StudentConfig(**SMALL | changes), preprocessing).eval()


def some_pixels(count: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
