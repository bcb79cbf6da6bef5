"""A teacher card: manifests/teachers/NAME.yaml, which names a teacher and what to hold it to.

The card is what DVC and every stamp depend on; a local checkpoint enters by its SHA-256.
"""

import hashlib
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from pipeline.core.errors import PipelineError
from pipeline.core.records import NamedTeacher, Record

CHECKPOINTS = (".safetensors", ".pt", ".bin", ".pth")  # endings of files; a tag has none


class Golden(Record):
    """First values of the unit embeddings of the teacher's fixed test pattern and test text."""

    image: list[float] = Field(min_length=4)
    text: list[float] = Field(min_length=4)


class TeacherCard(NamedTeacher):
    """What a card says."""

    golden: Golden | None

    def named(self) -> NamedTeacher:
        """Without the golden vectors, which check a teacher and change none of its vectors."""
        return NamedTeacher(**self.model_dump(exclude={"golden"}))


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
    if card.model.startswith("local-dir:"):
        folder = path.parent / card.model.removeprefix("local-dir:")
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


def check_weights(card: TeacherCard, path: Path) -> None:
    """Raises PipelineError unless a local checkpoint has the bytes that the card names."""
    file = weights_file(card, path)
    if file is None:
        if not card.pretrained:
            raise PipelineError(
                f"{path} names no weights (pretrained is null): the teacher would be random. Name an "
                "open_clip tag or a checkpoint file."
            )
        return
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != card.sha256:
        raise PipelineError(
            f"{path}: {file} has SHA-256 {found}, the card says {card.sha256}. Put the right file "
            "there, or write the card anew with `pipeline import teacher`."
        )
