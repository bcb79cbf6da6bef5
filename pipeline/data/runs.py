"""data/runs: one small Parquet row per finished run, so that one can say later what was trained
on what. Times and speeds live here and nowhere else: they would change the bytes of an out.
"""

import json
import platform
import subprocess
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.provenance import command_line, write_file
from pipeline.core.records import Recipe

SCHEMA = pa.schema(
    [
        ("stage", pa.string()),
        ("stamp", pa.string()),
        ("finished", pa.timestamp("s", tz="UTC")),
        ("seconds", pa.float64()),  # of this process; a resumed run counts from the resume
        ("images_per_second", pa.float64()),
        ("device", pa.string()),
        ("host", pa.string()),
        ("git_revision", pa.string()),
        ("command", pa.string()),
        ("recipe", pa.string()),  # JSON: parameters, versions, contents of the inputs
        ("metrics", pa.string()),  # JSON
    ]
)


def append_run(
    data: Path,
    stage: str,
    stamp: str,
    recipe: Recipe,
    metrics: dict,
    device: str,
    began: float,
    images: int,
    spent: float | None = None,
) -> None:
    """Add a row. began: time.monotonic() at the start; images: how many were processed since, in
    the seconds spent on nothing else (all of them where none are given).
    """
    seconds = time.monotonic() - began
    row = {
        "stage": stage,
        "stamp": stamp,
        "finished": int(time.time()),
        "seconds": seconds,
        "images_per_second": images / max(seconds if spent is None else spent, 1e-9),
        "device": device,
        "host": platform.node(),
        "git_revision": _git_revision(),
        "command": command_line(),
        "recipe": json.dumps(recipe.model_dump(), sort_keys=True),
        "metrics": json.dumps(metrics, sort_keys=True),
    }
    path = data / "runs" / f"{stage}-{stamp[:12]}-{time.time_ns()}.parquet"
    write_file(path, partial(pq.write_table, pa.Table.from_pylist([row], schema=SCHEMA)))


def _git_revision() -> str | None:
    """The commit that is checked out, with `-dirty` where files differ; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()
