"""A class file: what the values of masks mean, a class a line, its synonyms with commas between.

Line i names value i, from 1; with a background that is a class of its own, the first line names
value 0. `#` starts a comment line. A class's first synonym is its name.
"""

from pathlib import Path
from typing import Literal

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import read_text

MOST = 254  # values 1 to 254: 0 is background or nothing, 255 is left out

Background = Literal["none", "threshold", "class"]


def read_classes(file: Path, background: Background) -> list[list[str]]:
    """The prompts of each label, from 0; label 0 has none unless background is `class`.

    Raises PipelineError: no such file, no classes or too many, an empty synonym, one that occurs
    twice.
    """
    text = read_text(
        file,
        f"class file {file}",
        "Expected a text file, a class a line; name it in params.yaml "
        "(evaluate.segmentation.classes).",
    )
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    classes = [[synonym.strip() for synonym in line.split(",")] for line in lines]
    named = [synonym for synonyms in classes for synonym in synonyms]
    if "" in named:
        raise PipelineError(f"class file {file}: a comma with no synonym beside it. Remove it.")
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise PipelineError(
            f"class file {file} holds {twice[0]!r} {named.count(twice[0])} times: a prompt that "
            "stands for two classes tells neither. Keep one of them."
        )
    labels = classes if background == "class" else [[], *classes]
    if not 2 <= len(labels) <= MOST + 1:
        raise PipelineError(
            f"class file {file} names {len(classes)} classes; expected at least one beside the "
            f"background and at most {MOST}, as a mask's values are 1 to {MOST}."
        )
    return labels
