"""A retry that lasts: it is a parameter, so DVC, its run cache and other clones know of it."""

import re
from pathlib import Path

from pipeline.core.config import load_section
from pipeline.core.errors import PipelineError
from pipeline.core.layout import STAGES
from pipeline.core.provenance import read_stamp, write_file
from pipeline.data import shards
from pipeline.data.remote_shards import shards_in
from pipeline.fetch.policy import RETRYABLE

STAGE = "download"


def begin_round(params: Path, data: Path) -> str:
    """Raise `download.round` in a parameter file where a retry could change anything; says what it
    did. Comments stay.

    It stays as it is while a run or an earlier retry is not finished, and where data/images has no
    row that may succeed now. Raises PipelineError where the file does not say the round in a line
    of its own.
    """
    asked = load_section(params, STAGE).round
    out = data / STAGES[STAGE].folder
    try:
        done = read_stamp(out, STAGE).recipe.parameters["round"]
    except PipelineError:
        return f"no finished {out} yet: round {asked} goes on"
    if done < asked:
        return f"round {asked} goes on"
    if not (again := _retryable(out)):
        return "no row may succeed now: nothing to ask again"
    _write_round(params, asked + 1)
    return f"{params}: download.round is {asked + 1} now; {again} rows are asked again"


def _retryable(out: Path) -> int:
    """Rows of data/images that may succeed now."""
    statuses = (
        status
        for path in shards_in(out)
        for status in shards.read_shard(path, STAGE, ["status"])["status"].to_pylist()
    )
    return sum(status in RETRYABLE for status in statuses)


def _write_round(params: Path, round: int) -> None:
    pattern = r"(?ms)^(download:[^\n]*\n(?:[ \t#][^\n]*\n|\n)*?[ \t]+round:[ \t]*)\d+"
    text, replaced = re.subn(pattern, rf"\g<1>{round}", params.read_text(encoding="utf-8"), count=1)
    if replaced:
        mode = params.stat().st_mode
        write_file(params, lambda path: (path.write_text(text, encoding="utf-8"), path.chmod(mode)))
    if not replaced or load_section(params, STAGE).round != round:
        raise PipelineError(
            f"{params}: found no line `round:` in the section download. Write `round: {round}` there "
            "yourself, and run `pipeline download`."
        )
