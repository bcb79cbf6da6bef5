"""Texts beside images: lists of prompts and templates that people write, ids of embedded texts."""

import hashlib
from itertools import chain
from pathlib import Path

import duckdb

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import read_text
from pipeline.data.database import parquet_files

CLASS = "{}"  # where a template takes a label


def text_id(image_id: str | None, text: str) -> str:
    """32 hex digits that name a caption of an image, or a prompt (image_id None)."""
    return hashlib.sha256(f"{image_id or ''}\n{text}".encode()).hexdigest()[:32]


def read_prompts(file: Path) -> list[str]:
    """Distinct non-empty lines of a prompt file, sorted. `#` starts a comment line.

    Raises PipelineError for a file that is missing or no UTF-8 text.
    """
    return _lines(file, "prompt", "teacher_embed.prompts")


def read_templates(file: Path) -> list[str]:
    """Distinct non-empty lines of a file of class prompts, sorted, each with {} for the class.

    Raises PipelineError for a file that is missing or no UTF-8 text, and for a line without {}.
    """
    templates = _lines(file, "template", "teacher_embed.templates, evaluate.templates")
    if without := [template for template in templates if CLASS not in template]:
        raise PipelineError(
            f"template list {file}: {without[0]!r} has no {CLASS}, where a label goes."
        )
    return templates


def class_prompts(templates: list[str], label: str) -> list[str]:
    """The templates with a label in them."""
    return [template.replace(CLASS, label) for template in templates]


def all_prompts(prompts: Path, templates: Path, images: Path) -> list[str]:
    """All texts that belong to no single image, sorted: prompts, texts of boxes, class prompts.

    prompts, templates: files that people wrote; images: folder of image shards. Raises
    PipelineError as `read_prompts` and `read_templates` do.
    """
    lines = read_templates(templates)
    classes = chain.from_iterable(class_prompts(lines, label) for label in labels(images))
    return sorted({*read_prompts(prompts), *box_texts(images), *classes})


def _lines(file: Path, kind: str, key: str) -> list[str]:
    expected = f"Expected a text file, a {kind} a line; name it in params.yaml ({key})."
    lines = read_text(file, f"{kind} list {file}", expected).splitlines()
    return sorted({line.strip() for line in lines if not line.startswith("#")} - {""})


def labels(images: Path) -> list[str]:
    """Distinct labels of all rows in a folder of image shards, sorted: the classes."""
    return _texts(
        "SELECT DISTINCT label FROM read_parquet(?) WHERE trim(label) <> '' ORDER BY label", images
    )


def box_texts(images: Path) -> list[str]:
    """Distinct texts of all boxes in a folder of image shards, sorted."""
    return _texts(
        "SELECT DISTINCT box.text AS t FROM (SELECT unnest(boxes) AS box FROM read_parquet(?)) "
        "WHERE trim(box.text) <> '' ORDER BY t",
        images,
    )


def _texts(sql: str, images: Path) -> list[str]:
    connection = duckdb.connect()
    rows = connection.execute(sql, [parquet_files(connection, images)]).fetchall()
    return [text for (text,) in rows]
