"""What decides the lists of a manifest: remembered when data/images is finished, so that an edited
manifest is noticed without reading its rows.
"""

from pathlib import Path
from typing import Any

from pipeline.core.config import DownloadConfig
from pipeline.core.provenance import digest, file_digest
from pipeline.fetch.containers import contained_files
from pipeline.fetch.forget import Forgotten
from pipeline.fetch.manifest_files import manifest_files

# Bytes of a manifest's file up to which it is hashed; of a larger one the size counts.
LARGEST = 1 << 26


def listing(config: DownloadConfig, forgotten: Forgotten) -> dict[str, Any]:
    """Digests of the manifest's files and of what must be forgotten, and how rows become lists.

    Neither names nor folders: the same in every clone. Raises PipelineError where a file is missing.
    """
    files = contained_files(Path(config.manifest))
    if not files or any(file.suffix != ".tar" for file in files):  # no collection of tars
        files = manifest_files(Path(config.manifest))
    return {
        "manifest": digest([_content(file) for file in files]),
        "forget": digest(sorted(forgotten.lines) + sorted(forgotten.sha256)),
        "columns": dict(config.columns),
        "rows_per_shard": config.rows_per_shard,
    }


def _content(file: Path) -> str | int:
    size = file.stat().st_size
    return file_digest(file) if size <= LARGEST else size
