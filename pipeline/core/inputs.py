"""The inputs of a running stage, as links of its own: `dvc repro` beside it deletes data/images before
it starts a command that is then refused, and nothing is taken away from the stage that runs.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import PipelineError
from pipeline.core.layout import RUNS, STAGES, STAMP_FILE
from pipeline.core.outs import holds_stamp_alone
from pipeline.core.plans import scratch_folder
from pipeline.core.provenance import stamp_of


@contextmanager
def own_inputs(data: Path, stage: str) -> Iterator[Path]:
    """A folder like data/ that holds what a stage reads, and the records of runs, until it ends.

    Raises PipelineError where an input goes while it is being linked.
    """
    with scratch_folder(data, stage) as folder:
        files = [str(path.relative_to(data)) for path in (data / RUNS).glob("*.parquet")]
        for name in STAGES[stage].inputs:
            stamp = stamp_of(data, name)
            shards = () if holds_stamp_alone(data / name, stamp) else stamp.files
            files += [f"{name}/{file}" for file in [STAMP_FILE, *shards]]
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            _link(data / file, folder / file)
        yield folder


def _link(source: Path, target: Path) -> None:
    """Hard link to the file itself, also where an out is made of symbolic links (a cache type of
    DVC's); a symbolic one to another file system, which is then that cache."""
    file = os.path.realpath(source)
    try:
        os.link(file, target)
    except FileNotFoundError:
        raise PipelineError(
            f"{source} is not there any more: another command replaced it. Run this one again."
        ) from None
    except OSError:
        os.symlink(file, target)
