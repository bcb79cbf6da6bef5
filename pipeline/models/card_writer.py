"""Write a teacher card: load the teacher once, and record what it is."""

import os
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.devices import pick_device
from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_file
from pipeline.models.card import (
    CHECKPOINTS,
    LOCAL,
    TeacherCard,
    read_card,
    sha256_of,
    weights_file,
)
from pipeline.models.fetched_weights import fetched_weights
from pipeline.models.golden import golden_of
from pipeline.models.teacher import Teacher
from pipeline.models.teacher_config import CONFIG


def write_card(model: str, pretrained: str | None, out: Path) -> TeacherCard:
    """Card with the digests of all files, the activation really built, golden vectors.

    A card that is there already is completed, if it names this model and these weights and lacks
    their digest or an image vector: its own golden texts must be answered first, and are kept.
    Paths are taken relative to the working folder and written relative to the card. Raises
    PipelineError where the teacher cannot be loaded or another card is in the way.
    """
    if pretrained and pretrained.endswith(CHECKPOINTS) and not Path(pretrained).is_file():
        raise PipelineError(f"no checkpoint {pretrained}. Name a file, or a tag of open_clip's.")
    given = pretrained or model
    out.parent.mkdir(parents=True, exist_ok=True)
    if model.startswith(LOCAL):
        model = f"{LOCAL}{_beside(out, model.removeprefix(LOCAL))}"
    elif pretrained and Path(pretrained).is_file():
        pretrained = _beside(out, pretrained)
    values: dict[str, Any] = {"name": out.stem, "model": model, "pretrained": pretrained}
    values |= {"sha256": None, "config_sha256": None, "activation": "quickgelu", "golden": None}
    if complete := out.exists():
        values = _incomplete(out, model, pretrained)
    probe = out.with_name(f".{out.name}.probe")
    try:
        values |= _digests(TeacherCard.model_validate(values), probe)
        probe.write_text(yaml.safe_dump(values))
        teacher = Teacher(probe, pick_device("cpu"), check_activation=complete)
    except PipelineError as error:  # there is no card yet that it could name
        raise PipelineError(str(error).replace(str(probe), given)) from None
    finally:
        probe.unlink(missing_ok=True)
    golden = golden_of(teacher).model_dump()
    if values["golden"]:
        golden = values["golden"] | {"image": golden["image"]}
    values |= {"activation": teacher.activation(), "golden": golden}
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)
    write_file(out, lambda partial: partial.write_text(text))
    return TeacherCard.model_validate(values)


def _incomplete(out: Path, model: str, pretrained: str | None) -> dict:
    """The values of a card that is to be completed."""
    card = read_card(out)
    named = (card.model, card.pretrained) == (model, pretrained)
    if not named or (card.sha256 and card.golden and card.golden.image):
        raise PipelineError(
            f"{out} exists, and {'is complete' if named else 'names other weights'}. Remove it, or "
            "name another --out."
        )
    return card.model_dump()


def _digests(card: TeacherCard, probe: Path) -> dict[str, str | None]:
    """Of every file that is read."""
    weights = weights_file(card, probe)
    if weights is None and card.pretrained is None:
        return {}
    if weights is None:
        weights = fetched_weights(card.model, card.pretrained or "", probe)
    config = sha256_of(weights.with_name(CONFIG)) if card.model.startswith(LOCAL) else None
    return {"sha256": sha256_of(weights), "config_sha256": config}


def _beside(card: Path, path: str) -> str:
    """A path relative to the card's folder."""
    return os.path.relpath(Path(path).resolve(), card.parent.resolve())
