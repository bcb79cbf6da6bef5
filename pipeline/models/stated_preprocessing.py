"""What a teacher card says of preprocessing, without the teacher's weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.core.errors import PipelineError
from pipeline.core.presets.settings import Value
from pipeline.core.records import Preprocessing
from pipeline.models.card import LOCAL, TeacherCard
from pipeline.models.open_clip import open_clip
from pipeline.models.teacher_config import read_teacher_config

GRID, HEAD = 8, 32  # of the published student: patches a side, values of a head
STORED = 256  # px: the least shorter side of stored images, so that crops have something to cut


def preprocessing_of(values: Mapping[str, Any], card_path: Path) -> Preprocessing:
    """open_clip's `preprocess_cfg` as our record.

    Raises PipelineError for a resize mode or an interpolation that the students cannot imitate.
    """
    size = values["size"]
    try:
        return Preprocessing(
            image_size=size if isinstance(size, int) else size[0],
            mean=values["mean"],
            std=values["std"],
            interpolation=values["interpolation"],
            resize_mode=values["resize_mode"],
        )
    except ValidationError as error:
        found = "; ".join(f"{e['loc'][0]} {e['input']!r}: {e['msg']}" for e in error.errors())
        raise PipelineError(
            f"{card_path}: this model's preprocessing cannot be used ({found}). Only a resize of "
            "the shorter side and `squash` keep a crop box meaningful. Choose another teacher."
        ) from None


def stated_preprocessing(card: TeacherCard, path: Path) -> Preprocessing:
    """The preprocessing of the card's model, from open_clip's lists or the local folder's
    configuration; equal to that of the loaded `Teacher`.

    path: the card's. Raises PipelineError for a model that open_clip does not know.
    """
    model, tag = _stated(card, path)
    size = model["vision_cfg"].get("image_size", 224)
    defaults = open_clip.transform.PreprocessCfg()
    names = ("mean", "std", "interpolation", "resize_mode")
    stated = {name: tag.get(name, getattr(defaults, name)) for name in names}
    return preprocessing_of(stated | {"size": size}, path)


def student_settings(card: TeacherCard, path: Path) -> dict[str, Value]:
    """What params.yaml must say for a student of this teacher: the names of its values -> values.

    The published grid of 8 x 8 patches at the teacher's image size, heads of 32 values. Raises
    PipelineError for a model that open_clip does not know.
    """
    model, _ = _stated(card, path)
    size, values = stated_preprocessing(card, path).image_size, model["embed_dim"]
    student = {"image_size": size, "patch_size": size // GRID, "embedding_size": values}
    student["heads"] = values // HEAD
    named = {f"distill.student.{name}": value for name, value in student.items()}
    settings: dict[str, Value] = {
        "teacher_embed.card": str(path),
        "download.image_size": max(size, STORED),
    }
    return settings | named | {"distill.image_sizes": [size]}


def _stated(card: TeacherCard, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's configuration of the card's model, and of its preprocessing."""
    if card.model.startswith(LOCAL):
        config = read_teacher_config(path.parent / card.model.removeprefix(LOCAL))
        return config["model_cfg"], config["preprocess_cfg"]
    model = open_clip.get_model_config(card.model)
    if model is None:
        raise PipelineError(f"{path}: open_clip knows no model {card.model!r}.")
    return model, open_clip.pretrained.get_pretrained_cfg(card.model, card.pretrained or "")
