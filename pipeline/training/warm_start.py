"""Starting from a student that somebody has trained, instead of from random weights."""

from pathlib import Path

import torch

from pipeline.core.config import StudentConfig
from pipeline.core.errors import PipelineError
from pipeline.core.records import Preprocessing
from pipeline.models.student import Student

SHAPES = ("embedding_size", "heads", "layers", "patch_size", "pool")  # what weights cannot change


def warm_student(folder: Path, config: StudentConfig, preprocessing: Preprocessing) -> Student:
    """The weights of a saved student in one of this configuration, which is to be trained.

    Positions are interpolated to another image size; the mask is the configuration's, and with
    same_norm the learned length starts at 1 where the other student has none.

    Raises PipelineError for a folder that holds no student, one of another shape, and weights that
    are not finite.
    """
    start = Student.load(folder)
    differing = [
        f"{name} {getattr(start.config, name)} instead of {getattr(config, name)}"
        for name in SHAPES
        if getattr(start.config, name) != getattr(config, name)
    ]
    if differing:
        raise PipelineError(
            f"distill.init: the student in {folder} has {', '.join(differing)}: its weights mean "
            "nothing here. Set distill.student to its shape, or distill.init to null."
        )
    weights = start.resized(config.image_size).state_dict()
    if bad := [name for name, x in weights.items() if not x.isfinite().all()]:
        raise PipelineError(
            f"distill.init: {folder} holds weights that are not finite ({bad[0]}). Start from "
            "another student, or set distill.init to null."
        )
    scale = weights.pop("scale", torch.ones(1))
    if config.same_norm:
        weights["scale"] = scale
    student = Student(config, preprocessing)
    student.load_state_dict(weights)
    return student
