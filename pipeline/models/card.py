"""A teacher card: manifests/teachers/NAME.yaml, which names a teacher and what to recognise it by.

The card is what DVC and every stamp depend on. It vouches for every file that is read, by SHA-256:

    name: clip-vit-b32              how the teacher is called in results
    model: ViT-B-32-quickgelu       open_clip's name, or local-dir:FOLDER relative to the card
    pretrained: openai              open_clip's tag, a file relative to the card; null for local-dir
    sha256: null                    of the weights: a must for a local file; for a tag, of its
                                    download, null until `pipeline import teacher` has seen it
    config_sha256: null             of the folder's open_clip_config.json; null without a folder
    activation: quickgelu           or gelu: what must really be built
    golden:                         null, or what the towers answered (models/golden.py checks it)
      source: ...                   who computed the vectors, from what
      texts: {"a zebra": [...]}     a text -> its complete unit vector, rounded; at least one
      image: null                   the vector of `golden.test_pattern`; null where nobody has it
    license: MIT                    of the weights; it stands in the model card of an export

`pipeline import teacher MODEL --out CARD` writes one from weights, and completes one that has neither
digest nor image vector. A tag's tokenizer and configuration are open_clip's own, in its package.
"""

import hashlib
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import digest
from pipeline.core.records import NamedTeacher, Record
from pipeline.models.teacher_config import CONFIG, read_teacher_config

CHECKPOINTS = (".safetensors", ".pt", ".bin", ".pth")  # endings of files; a tag has none
LOCAL = "local-dir:"


class Golden(Record):
    """Unit vectors that a teacher once answered, rounded."""

    source: str
    texts: dict[str, list[float]] = Field(min_length=1)
    image: list[float] | None


class TeacherCard(NamedTeacher):
    """What a card says."""

    config_sha256: str | None
    golden: Golden | None
    license: str | None = None  # of the weights, as far as it is known

    def named(self) -> NamedTeacher:
        """Without what only recognises a teacher and changes none of its vectors: a tag names its
        weights whether their digest is known or not.
        """
        values = self.model_dump(include=set(NamedTeacher.model_fields))
        local = self.model.startswith(LOCAL) or (self.pretrained or "").endswith(CHECKPOINTS)
        return NamedTeacher.model_validate(values | {"sha256": self.sha256 if local else None})


def read_card(path: Path) -> TeacherCard:
    """Raises PipelineError for a missing, ill-formed or incomplete card."""
    try:
        return TeacherCard.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise PipelineError(
            f"no teacher card {path}. `pipeline import teacher` writes one; "
            "`ls manifests/teachers` shows those that are here."
        ) from None
    except OSError as error:
        raise PipelineError(f"{path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise PipelineError(
            f"{path} is no teacher card: {'; '.join(lines)}. "
            f"Expected the keys {', '.join(TeacherCard.model_fields)}."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PipelineError(f"{path} is not YAML: {error}") from None


def weights_file(card: TeacherCard, path: Path) -> Path | None:
    """The local checkpoint that a card names; null for a tag of open_clip's own list."""
    if card.model.startswith(LOCAL):
        folder = path.parent / card.model.removeprefix(LOCAL)
        files = sorted(folder.glob("*.safetensors"))
        usual = [file for file in files if file.name == "open_clip_model.safetensors"]
        if len(usual or files) != 1:  # open_clip would choose one of several by rules of its own
            raise PipelineError(
                f"{path}: expected one open_clip_model.safetensors in {folder}, found "
                f"{', '.join(file.name for file in files) or 'no *.safetensors'}."
            )
        return (usual or files)[0]
    if card.pretrained and (path.parent / card.pretrained).is_file():
        return path.parent / card.pretrained
    if card.pretrained and card.pretrained.endswith(CHECKPOINTS):
        raise PipelineError(f"{path}: no checkpoint {path.parent / card.pretrained}.")
    return None


def config_digest(card: TeacherCard, path: Path) -> str | None:
    """Of the open_clip_config.json beside a folder's weights; None for a card without a folder."""
    weights = weights_file(card, path)
    config = weights.with_name(CONFIG) if weights and card.model.startswith(LOCAL) else None
    return digest(config.read_text()) if config and config.is_file() else None


def check_weights(card: TeacherCard, path: Path) -> None:
    """Raises PipelineError unless every local file that is read has the bytes that the card names,
    and a folder's configuration asks for nothing but an architecture.
    """
    file = weights_file(card, path)
    if file is None:
        if not card.pretrained:
            raise PipelineError(
                f"{path} names no weights (pretrained is null): the teacher would be random. Name an "
                "open_clip tag or a checkpoint file."
            )
        return
    check_digest(path, file, card.sha256)
    if card.model.startswith(LOCAL):
        check_digest(path, file.with_name(CONFIG), card.config_sha256)
        read_teacher_config(file.parent)


def check_digest(path: Path, file: Path, expected: str | None) -> None:
    """Raises PipelineError unless a file has the SHA-256 that the card (at path) names."""
    if (actual := sha256_of(file)) != expected:
        raise PipelineError(
            f"{path}: {file} has SHA-256 {actual}, the card says {expected}. Put the right file "
            "there, or write the card anew with `pipeline import teacher`."
        )


def sha256_of(file: Path) -> str:
    """64 hex digits. Raises PipelineError for a file that cannot be read."""
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise PipelineError(f"{file} cannot be read: {error.strerror}.") from None
