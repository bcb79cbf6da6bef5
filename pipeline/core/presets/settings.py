"""Values of a parameter file set in place: comments, order and everything else stay as they are."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_file

Value = str | int | float | list
HELD_OUT = 50  # images of a test split below which its metrics mean little
FEW = 10_000  # images below which a student learns them by heart, if nothing is done about it
SEARCHED = 3  # labels that the report searches for
PASSES = 100  # over the training images, where they are few
# What was best of a thousand real vectors (benchmarks/RECIPE.md).
OF_FEW = {
    "distill.loss.relational": 0.25,
    "distill.relational_scale": 10.0,
    "distill.color_jitter": 0.2,
    "distill.min_crop_area": 0.4,
    "distill.mixup": 1.0,
    "distill.fixed_stem_frequencies": 8,
    "distill.learning_rate": 0.0003,
    "distill.ema": 0.99,
}


def set_values(path: Path, values: dict[str, Value]) -> None:
    """Set `section.key` or `section.group.key` of a parameter file to values.

    Raises PipelineError where the file has not such a key on a line of its own.
    """
    text = with_values(path.read_text(encoding="utf-8"), values, path)
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def with_values(text: str, values: dict[str, Value], path: Path) -> str:
    """The text of a parameter file with other values; path is what an error names."""
    lines = text.splitlines(keepends=True)
    rows, above = {}, []
    for row, line in enumerate(lines):
        if match := re.match(r"( *)([\w-]+):", line):
            above = [*above[: len(match[1]) // 2], match[2]]
            rows[".".join(above)] = row
    for name, value in values.items():
        if name not in rows:
            raise PipelineError(
                f"{path} has no line for {name}. Set it by hand, or write the file anew with "
                "`pipeline init PRESET --force`."
            )
        row = rows[name]
        head, comment = re.match(r"( *[\w-]+:).*?( #.*)?\n?$", lines[row]).groups()  # ty: ignore[missing-union-attribute]
        lines[row] = f"{head} {_written(value)}{comment or ''}\n"
    return "".join(lines)


def values_for(images: int, labels: Iterable[str] = ()) -> dict[str, Value]:
    """What fits a collection of so many images, where the preset is made for millions.

    labels: those of the images; the report then searches for the most frequent ones.

    A test split of HELD_OUT images where a fifth of them gives that; where they are few, PASSES
    passes over the training images in batches of at most 64, four or more a pass.
    """
    prompts = [f"a photo of a {label}" for label, _ in Counter(labels).most_common(SEARCHED)]
    held_out = round(min(0.2, max(0.05, HELD_OUT / images)), 3)
    trained = images * (1 - held_out - 0.05)
    most, batch, steps = (64 if images < FEW else 256), 8, 100_000
    while batch < most and batch * 8 <= trained:
        batch *= 2
    if images < FEW:
        steps = max(400, int(PASSES * trained / batch))
    return {
        "select.test": held_out,
        "distill.batch": batch,
        "distill.steps": steps,
        "distill.warmup": max(1, min(2000, steps // 20)),
        "distill.validate_every": max(1, min(1000, steps // 20)),
        **(OF_FEW if images < FEW else {}),
        **({"evaluate.prompts": prompts} if prompts else {}),
    }


def _written(value: Value) -> str:
    """As YAML: JSON is YAML, and a plain word needs no quotes."""
    plain = isinstance(value, str) and re.fullmatch(r"[\w./~][\w./~ -]*[\w./]|\w", value)
    return value if plain and not value.replace(".", "").isdigit() else json.dumps(value)
