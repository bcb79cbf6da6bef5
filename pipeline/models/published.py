"""A published checkpoint (.pt) -> a student folder, without executing anything from the pickle.

Such a file is a dictionary of epoch, model_state_dict, optimizer_state_dict,
scheduler_state_dict, loss_y_train, loss_y_val and teacher_model_args. The last is an enum of the
training code's module `_types`, for which a harmless stand-in is let through; any other global
that plain weights do not need is refused.
"""

import math
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from pipeline.core.config import StudentConfig
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import file_digest
from pipeline.core.records import Preprocessing
from pipeline.models.student import Student, load_weights, validated

ENUM_MODULE = "_types."
# The published training code resized the whole image to a square, without keeping its shape.
PUBLISHED = Preprocessing(interpolation="bilinear", resize_mode="squash")


class _StandIn:
    """Takes the place of every class of `_types`: keeps what it was called with, does nothing."""

    def __init__(self, *values):
        self.values = values


def import_checkpoint(file: Path | str, out_folder: Path | str) -> Student:
    """Read a published .pt file, write the folder that `Student.load` reads, return the student.

    The variant is recognised from the weights: with a learned `scale` it is `multimodal-patch`
    (neighbourhood mask and same_norm), without one `no-cls`. Its mean and std are OpenAI CLIP's; it
    saw whole images, squashed to a square with bilinear interpolation.

    Raises PipelineError for a missing, foreign, damaged or hostile file.
    """
    file = Path(file)
    checkpoint = _read(file)
    student = student_from_state(checkpoint["model_state_dict"], file)
    teacher = getattr(checkpoint.get("teacher_model_args"), "values", None)
    student.save(
        out_folder,
        teacher={"published_teacher_model_args": repr(teacher)} if teacher else None,
        provenance={
            "imported_from": file.name,
            "digest": file_digest(file),
            "epoch": _number(checkpoint.get("epoch")),
            "loss_y_train": _number(checkpoint.get("loss_y_train")),
            "loss_y_val": _number(checkpoint.get("loss_y_val")),
        },
    )
    return student


def student_from_state(state: dict[str, Tensor], source: Path | str) -> Student:
    """Published parameters (name -> tensor) -> the student they belong to, in evaluation mode.

    The sizes follow from the shapes: E is the length of the otherwise unused ln_post, H = W - E.
    source: named in errors.
    """
    try:
        width, channels, side, _ = state["conv1.weight"].shape
        patches = len(state["positional_embedding"])
        embedding_size = len(state["ln_post.weight"])
        tensors = all(bool(x.isfinite().all()) for x in state.values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PipelineError(
            f"{source} holds no published student: {error!r} in model_state_dict"
        ) from None
    grid = math.isqrt(patches)
    if not tensors or channels != 3 or grid**2 != patches:
        raise PipelineError(
            f"{source} holds no published student: found {channels} channels, {patches} patches, "
            f"all values finite: {tensors}; expected 3, a square number, True"
        )
    layers = {name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")}
    config = {
        "image_size": grid * side,
        "patch_size": side,
        "embedding_size": embedding_size,
        "heads": width - embedding_size,
        "layers": len(layers),
        "neighbourhood_mask": "scale" in state,
        "same_norm": "scale" in state,
        "pool": "extra-head",
        "temperature": 1.0,
    }
    student = Student(validated(StudentConfig, config, source), PUBLISHED)
    load_weights(student, state, source)
    return student.eval()


def _read(file: Path) -> dict:
    try:
        enums = [name for name in get_unsafe_globals_in_checkpoint(file) if _harmless(name)]
        with safe_globals([(_StandIn, name) for name in enums]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PipelineError(f"no file {file}. Give a published checkpoint (.pt).") from None
    except pickle.UnpicklingError as error:
        raise PipelineError(
            f"{file} was not loaded: it asks for code that weights do not need. {_first(error)}"
        ) from None
    except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise PipelineError(f"{file} is no checkpoint of torch.save: {_first(error)}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        raise PipelineError(
            f"{file} is no published checkpoint: found {type(checkpoint).__name__}, expected a "
            "dictionary with model_state_dict"
        )
    return checkpoint


def _harmless(name: str) -> bool:
    return name.startswith(ENUM_MODULE)


def _first(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _number(value) -> float | int | None:
    """A number, or the last one of a list; None for anything else."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, int | float) and math.isfinite(value) else None
