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

    def __init__(self, *values: object) -> None:
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
    teacher = _words(checkpoint.get("teacher_model_args"))
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
    _refuse_what_is_not_stored(state, source)
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


def _refuse_what_is_not_stored(state: dict, source: Path | str) -> None:
    """A tensor can be a view that repeats one stored value: anything done with it allocates it all."""
    for name, tensor in state.items():
        if not (
            isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided
        ):
            raise PipelineError(
                f"{source} holds no published student: model_state_dict maps "
                f"{type(name).__name__} to {type(tensor).__name__}, expected names to tensors"
            )
        stored = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > stored:
            raise PipelineError(
                f"{source}: {name} of shape {tuple(tensor.shape)} stores {stored} bytes: it is no "
                "whole tensor"
            )


def _refuse_compressed(file: Path) -> None:
    """torch.save stores its bytes as they are; an archive that unpacks to more is none of its."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > file.stat().st_size:
            raise PipelineError(
                f"{file} is no checkpoint of torch.save: it unpacks to {unpacked} bytes, and has "
                f"{file.stat().st_size}"
            )


def _read(file: Path) -> dict:
    try:
        _refuse_compressed(file)
        enums = [name for name in get_unsafe_globals_in_checkpoint(file) if _harmless(name)]
        with safe_globals([(_StandIn, name) for name in enums]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise PipelineError(f"no file {file}. Give a published checkpoint (.pt).") from None
    except pickle.UnpicklingError as error:
        raise PipelineError(
            f"{file} was not loaded: it asks for code that weights do not need. {_first(error)}"
        ) from None
    except (
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        RecursionError,
        MemoryError,
        zipfile.BadZipFile,
    ) as error:
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


def _words(enum: object) -> tuple | None:
    """The values of the stand-in, of which only texts and numbers are kept: tuples that share their
    parts forty deep have 2**40 of them.
    """
    values = getattr(enum, "values", None)
    if values is None:
        return None
    return tuple(v if isinstance(v, str | int | float) else type(v).__name__ for v in values)


def _number(value: object) -> float | int | None:
    """A number, or the last one of a list; None for anything else."""
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, int | float) and math.isfinite(value) else None
