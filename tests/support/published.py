"""A small student as the published code would have trained and saved it."""

import torch

from pipeline.core.config import StudentConfig
from pipeline.models.student import Student

SMALL = {
    "image_size": 56, "patch_size": 14, "embedding_size": 32, "heads": 4, "layers": 2,
    "pool": "extra-head", "temperature": 1.0,
}  # fmt: skip


def small_student(variant: bool) -> Student:
    torch.manual_seed(0)
    return Student(StudentConfig(**SMALL, neighbourhood_mask=variant, same_norm=variant)).eval()


def checkpoint_of(student: Student, teacher) -> dict:
    size = student.config.embedding_size
    unused = {"ln_post.weight": torch.ones(size), "ln_post.bias": torch.zeros(size)}
    return {
        "epoch": 19,
        "model_state_dict": student.state_dict() | unused,
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-3}]},
        "scheduler_state_dict": {"last_epoch": 19},
        "loss_y_train": [2.0, 1.6],
        "loss_y_val": 1.5781,
        "teacher_model_args": teacher,
    }
