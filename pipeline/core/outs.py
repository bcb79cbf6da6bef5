"""How files become a stage's out: built aside, renamed into place, exactly one run's or nobody's."""

import os
import shutil
from pathlib import Path
from typing import Any

from pipeline.core.errors import PipelineError
from pipeline.core.layout import STAMP_FILE, WORK
from pipeline.core.provenance import digest, read_stamp, sealed
from pipeline.core.records import Recipe, Stamp, StoredFile


def make_stamp(
    stage: str, recipe: Recipe, files: dict[str, StoredFile], summary: dict[str, Any]
) -> Stamp:
    """What a finished stage says of itself."""
    values = {
        "stage": stage,
        "stamp": recipe_digest(recipe),
        "recipe": recipe.model_dump(),
        "files": {name: file.model_dump() for name, file in sorted(files.items())},
        "summary": summary,
    }
    return Stamp.model_validate(sealed(values))


def recipe_digest(recipe: Recipe) -> str:
    """What tells one run of a stage from another."""
    return digest(recipe.model_dump())


def is_published(out: Path, stage: str, recipe: Recipe) -> bool:
    """Whether an out already holds this very run, complete, and nothing else."""
    try:
        stamp = read_stamp(out, stage)
    except PipelineError:
        return False
    complete = stamp.stamp == recipe_digest(recipe) and all(
        (out / name).is_file() and (out / name).stat().st_size == file.bytes
        for name, file in stamp.files.items()
    )
    return complete and not _unexpected(out, stage)


def refuse_unexpected(out: Path, stage: str) -> None:
    """Raises PipelineError for an out with files that its stage did not write: they are not ours to
    replace."""
    if unexpected := _unexpected(out, stage):
        raise PipelineError(
            f"{out} holds files that {stage} did not write: "
            f"{', '.join(unexpected[:3])}{' ...' if len(unexpected) > 3 else ''}. "
            "Move them away and run the command again."
        )


def _unexpected(out: Path, stage: str) -> list[str]:
    """Files of an out that no finished run of its stage wrote.

    Raises PipelineError where they cannot be told, for the out's stamp is damaged.
    """
    if not out.is_dir():
        return [out.name] if out.exists() else []
    ours = set()
    if (out / STAMP_FILE).is_file():
        stamp = read_stamp(out, stage)
        ours = {STAMP_FILE, *stamp.files} if stamp.stage == stage else set()
    files = {str(p.relative_to(out)) for p in out.rglob("*") if not p.is_dir()}
    return sorted(files - ours)


def holds_stamp_alone(out: Path, stamp: Stamp) -> bool:
    """Whether the shards of an out lie in a remote store, and here nothing but their stamp."""
    stored = [name for name, file in stamp.files.items() if file.stored]
    return bool(stored) and not any(os.path.lexists(out / name) for name in stored)


def place_out(data: Path, stage: str, out: Path, files: dict[str, Path]) -> None:
    """Make the out exactly these files (name in it -> where they lie), by links.

    It is built aside and renamed into place: it is never half of two runs.
    """
    work_folder = data / WORK / stage
    aside, old = work_folder / "out.new", work_folder / "out.old"
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    for name, source in files.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        link(source, aside / name)
    if out.exists():
        out.rename(old)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Hard link; a copy where the file system has none, or where it is another one."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
