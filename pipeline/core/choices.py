"""What an option of a command may say: `--help` lists it, and nothing heavy is imported for that."""

from pathlib import Path
from typing import Literal

Preset = Literal["demo", "clip-vit-b32"]
AnswerFormat = Literal["table", "csv", "json", "parquet"]  # of `pipeline query`
HitsFormat = Literal["table", "json", "csv"]  # of `pipeline search`
FindingsFormat = Literal["table", "json"]  # of `pipeline verify`
ExportFormat = Literal["folder", "onnx"]

TEACHERS = Path("manifests/teachers")


def teacher_names() -> str:
    """The names of the teacher cards that lie here, for `--help`."""
    return ", ".join(sorted(path.stem for path in TEACHERS.glob("*.yaml"))) or "none here"
