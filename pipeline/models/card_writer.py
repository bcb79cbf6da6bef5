"""Write a teacher card: load the teacher once, and record what it is."""

import hashlib
import os
from pathlib import Path

import yaml

from pipeline.core.devices import pick_device
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_file
from pipeline.models.card import CHECKPOINTS, TeacherCard, weights_file
from pipeline.models.teacher import Teacher


def write_card(model: str, pretrained: str | None, out: Path) -> TeacherCard:
    """Card with the digest of a local checkpoint, the activation really built, golden vectors.

    Paths are taken relative to the working folder and written relative to the card. Raises
    PipelineError where the teacher cannot be loaded or the card is in the way.
    """
    if out.exists():
        raise PipelineError(f"{out} exists. Remove it, or name another --out.")
    if pretrained and pretrained.endswith(CHECKPOINTS) and not Path(pretrained).is_file():
        raise PipelineError(f"no checkpoint {pretrained}. Name a file, or a tag of open_clip's.")
    given = pretrained or model
    out.parent.mkdir(parents=True, exist_ok=True)
    if model.startswith("local-dir:"):
        model = f"local-dir:{_beside(out, model.removeprefix('local-dir:'))}"
    elif pretrained and Path(pretrained).is_file():
        pretrained = _beside(out, pretrained)
    values = {"name": out.stem, "model": model, "pretrained": pretrained, "sha256": None}
    values |= {"activation": "quickgelu", "golden": None}
    probe = out.with_name(f".{out.name}.probe")
    try:
        if weights := weights_file(TeacherCard(**values), probe):
            with weights.open("rb") as file:
                values["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        probe.write_text(yaml.safe_dump(values))
        teacher = Teacher(probe, pick_device("cpu"), check_activation=False)
        values |= {"activation": teacher.activation(), "golden": teacher.golden()}
    except PipelineError as error:  # there is no card yet that it could name
        raise PipelineError(str(error).replace(str(probe), given)) from None
    finally:
        probe.unlink(missing_ok=True)
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    write_file(out, lambda partial: partial.write_text(text))
    return TeacherCard(**values)


def _beside(card: Path, path: str) -> str:
    """A path relative to the card's folder."""
    return os.path.relpath(Path(path).resolve(), card.parent.resolve())
