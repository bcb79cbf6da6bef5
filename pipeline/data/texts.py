"""Texts beside images: prompt lists that people write, and the ids of embedded texts."""

import hashlib
from glob import escape
from pathlib import Path

import duckdb

from pipeline.core.errors import PipelineError


def text_id(image_id: str | None, text: str) -> str:
    """32 hex digits that name a caption of an image, or a prompt (image_id None)."""
    return hashlib.sha256(f"{image_id or ''}\n{text}".encode()).hexdigest()[:32]


def read_prompts(file: Path) -> list[str]:
    """Distinct non-empty lines of a prompt file, sorted. `#` starts a comment line.

    Raises PipelineError for a file that is missing or no UTF-8 text.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(
            f"prompt list {file} cannot be read ({error}). Expected a text file, a prompt a line; "
            "name it in params.yaml (teacher_embed.prompts)."
        ) from None
    return sorted({line.strip() for line in lines if not line.startswith("#")} - {""})


def box_texts(images: Path) -> list[str]:
    """Distinct texts of all boxes in a folder of image shards, sorted."""
    rows = (
        duckdb.connect()
        .execute(
            "SELECT DISTINCT box.text AS t FROM (SELECT unnest(boxes) AS box FROM read_parquet(?)) "
            "WHERE trim(box.text) <> '' ORDER BY t",
            [f"{escape(str(images))}/*.parquet"],
        )
        .fetchall()
    )
    return [text for (text,) in rows]
