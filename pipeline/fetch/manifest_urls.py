"""Addresses of a manifest that cannot be meant: said before any work, not row by row after it."""

from collections.abc import Callable
from pathlib import Path

import duckdb

from pipeline.core.config import DownloadConfig
from pipeline.core.errors import PipelineError
from pipeline.fetch.policy import FetchError, read_local

# What must be forgotten may be gone already.
_KINDS = """
SELECT CASE WHEN url ILIKE 'file:%' THEN 'file'
            WHEN regexp_matches(url, '^[A-Za-z][A-Za-z0-9+.-]*:') THEN 'scheme' ELSE 'bare' END,
       count(*), min(url), count(content)
FROM read_parquet(?) WHERE trim(url) <> '' AND occurrence = 0 AND NOT forgotten GROUP BY ALL
"""


def check_urls(lists: list[Path], config: DownloadConfig, say: Callable[[str], object]) -> None:
    """Say how many urls of a manifest's lists have no scheme.

    Raises PipelineError where none has one, and where not one local image can be read below the
    root and there is no other.
    """
    manifest, root = config.manifest, Path(config.root)
    counts = duckdb.connect().execute(_KINDS, [list(map(str, lists))]).fetchall()
    kinds = {kind: rest for kind, *rest in counts}
    bare, first, _ = kinds.get("bare", (0, "", 0))
    meant = (
        f"write `file:{first}` for an image below download.root ({root}), or all of `https://...`"
    )
    if bare and len(kinds) == 1:
        there = " That file is there." if (root / first).is_file() else ""
        raise PipelineError(
            f"{manifest}: the urls name no scheme, such as {first!r}: {meant}.{there}"
        )
    if bare:
        say(f"{manifest}: {bare} urls name no scheme and will fail, such as {first!r}: {meant}.")
    count, first, read = kinds.get("file", (0, "", 0))
    if count and not root.is_dir():
        raise PipelineError(
            f"download.root: there is no folder {root.absolute()}, below which {manifest} names "
            f"{count} images, such as {first!r}. Set it to the folder from which the paths start."
        )
    if count and not read and "scheme" not in kinds:
        raise PipelineError(
            f"not one of the {count} images of {manifest} can be read below download.root "
            f"({root.absolute()}); {_why(first, root, config.max_bytes)}. Set download.root to the "
            "folder from which the paths start."
        )


def _why(url: str, root: Path, max_bytes: int) -> str:
    try:
        read_local(url, root.resolve(), max_bytes)
    except FetchError as error:
        return str(error)
    return f"{url!r} came while it was looked for: run the command again"
