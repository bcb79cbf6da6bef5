"""img2dataset under our policy, in a process group of its own.

Reads a folder of lists NNNNN.parquet (image_id, url), yields raw shards NNNNN.parquet: a row per
image in no particular order, with image_id, url, status (`success` or a failure), error_message
(`split_error` takes it apart), width, height, original_width, original_height, sha256 (of the
fetched bytes), exif (JSON: their number as `bytes`) and jpg. A row that img2dataset lost is
missing: compare image_ids.

Nothing of img2dataset is imported here, only in the child: it takes seconds, and its SIGINT
handler would end us with status 0.
"""

import functools
import io
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError
from pipeline.data.pixels import NotAnImage
from pipeline.fetch.decoding import TooManyPixels, canonical_jpeg
from pipeline.fetch.http import LONGEST_PAUSE_S, Opener
from pipeline.fetch.policy import RETRYABLE, STATUSES, FetchRules, split_error

__all__ = ["RETRYABLE", "STATUSES", "FetchRules", "fetch_lists", "split_error"]

LOG = "img2dataset.log"
STALL_GRACE_S = 120.0  # to start processes and decode what was fetched, without a request
SIZE = "bytes"  # key in the column exif
_POLL_S = 0.2
_BEAT = "beat"  # its time changes with every request
_CHILD = (
    "import sys; sys.path.insert(0, {!r}); from pipeline.fetch.img2dataset import _child; _child()"
)


def fetch_lists(
    lists: Path, out: Path, rules: FetchRules, processes: int, threads: int
) -> Iterator[Path]:
    """Fetch every list; yield out/NNNNN.parquet, named as its list, as soon as it is complete.

    The caller may delete what it was given. `out` belongs to this function alone and is emptied
    first: give it only lists that are still to be fetched, none of them empty. img2dataset's
    output goes to out/img2dataset.log. However this ends, kill -9 included, its processes end too.

    Raises PipelineError where a list cannot be fetched as a whole; failed images are rows.
    """
    waiting = _rows_per_list(lists)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    raw = out / "raw"
    patience = STALL_GRACE_S + 3 * (rules.timeout_s + LONGEST_PAUSE_S)
    with _running(lists, raw, rules, processes, threads, max(waiting.values())) as child:
        # img2dataset numbers its shards by the place of a list among the sorted lists
        numbers = {path.name: f"{i:05}" for i, path in enumerate(sorted(lists.glob("*.parquet")))}
        seen, since = None, time.monotonic()
        while waiting:
            ended = child.poll()  # before looking: what it finished last is then seen below
            done = [name for name in waiting if (raw / f"{numbers[name]}_stats.json").exists()]
            for name in done:
                (raw / f"{numbers[name]}.parquet").replace(out / name)
                _require_whole(out / name, waiting.pop(name))
                yield out / name
            sign = (raw / _BEAT).stat().st_mtime_ns if (raw / _BEAT).exists() else None
            if done or sign != seen:
                seen, since = sign, time.monotonic()
            elif ended is not None:
                raise _unfinished(f"ended (exit code {ended})", waiting, out)
            elif time.monotonic() - since > patience:
                raise _unfinished(f"did nothing for {patience:.0f} s", waiting, out)
            else:
                time.sleep(_POLL_S)


def _rows_per_list(lists: Path) -> dict[str, int]:
    rows = {path.name: pq.read_metadata(path).num_rows for path in lists.glob("*.parquet")}
    assert rows and all(rows.values()), f"{lists}: an empty list would shift img2dataset's numbers"
    return rows


def _require_whole(path: Path, rows: int) -> None:
    """A shard whose footer can be read; it may lack rows, but not have more than its list."""
    try:
        found = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowInvalid) as error:
        raise PipelineError(f"img2dataset left a broken {path}: {error}. Run it again.") from None
    if found > rows:
        raise PipelineError(f"{path} has {found} rows, its list {rows}. Run it again.")


def _unfinished(what: str, waiting: dict[str, int], out: Path) -> PipelineError:
    return PipelineError(
        f"img2dataset {what} without shard {min(waiting)} ({len(waiting)} missing in all). "
        f"Its output is in {out / LOG}. Run the command again: finished shards are kept."
    )


@contextmanager
def _running(lists, raw: Path, rules: FetchRules, processes: int, threads: int, rows: int):
    """img2dataset as the leader of a session of its own, which a Ctrl-C does not reach.

    Its standard input is a pipe that we hold: when we are gone it reads an end of file.
    """
    raw.mkdir()
    scratch = tempfile.mkdtemp(prefix="extrahead-")  # what its logger leaves behind on every start
    quiet = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1"}
    quiet["TMPDIR"] = scratch
    code = _CHILD.format(str(Path(__file__).resolve().parents[2]))
    with (raw.parent / LOG).open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | quiet,
            start_new_session=True,
        )
    try:
        with suppress(BrokenPipeError):  # it died at once: the caller sees that
            child.stdin.write(pickle.dumps((lists, raw, rules, processes, threads, rows)))
            child.stdin.flush()
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with suppress(BrokenPipeError):
            child.stdin.close()
        child.wait()
        shutil.rmtree(scratch, ignore_errors=True)


def _child() -> None:
    """The process that runs img2dataset."""
    lists, raw, rules, processes, threads, rows = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    import img2dataset
    import img2dataset.main  # hidden behind the function of the same name

    guarded = functools.partial(GuardedDownloader, rules, raw / _BEAT)
    sys.modules["img2dataset.main"].Downloader = guarded
    img2dataset.download(
        url_list=str(lists),
        input_format="parquet",
        output_folder=str(raw),
        output_format="parquet",
        save_additional_columns=["image_id"],
        distributor="multiprocessing",  # Ray and Spark would work where our opener is not
        number_sample_per_shard=rows,
        processes_count=processes,
        thread_count=threads,
        timeout=math.ceil(rules.timeout_s),
        retries=0,  # its loop is blind; ours knows what may succeed later
        disallowed_header_directives=[],  # ours also honours `none`
        extract_exif=True,  # the only column of our own that it offers: `CountBytes`
    )


def _die_with_parent() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


class GuardedDownloader:
    """Stands for img2dataset's Downloader in its pool of spawned workers."""

    def __init__(self, rules: FetchRules, beat: Path, **arguments):
        from img2dataset.downloader import Downloader

        self.rules, self.beat = rules, beat
        resizer = CanonicalResizer(rules.image_size, rules.quality, rules.max_pixels)
        self.downloader = Downloader(**arguments | {"resizer": resizer})

    def __call__(self, shard):
        """(whether it worked, shard), as img2dataset's distributor expects it."""
        import urllib.request

        from img2dataset import downloader

        downloader.exifread = CountBytes  # in place of a parser of strangers' bytes
        urllib.request.install_opener(_opener(self.rules, self.beat))
        return self.downloader(shard)


@functools.cache
def _opener(rules: FetchRules, beat: Path) -> Opener:
    """One per process, so that robots.txt and turns are shared by its shards."""
    return Opener(rules, beat.touch)


class CountBytes:
    """Stands for img2dataset's parser of EXIF, whose answer becomes a column: counts the bytes."""

    @staticmethod
    def process_file(stream: io.BytesIO, details: bool) -> dict[str, int]:
        return {SIZE: stream.getbuffer().nbytes}


class CanonicalResizer:
    """Stands for img2dataset's Resizer: bytes are judged, decoded and stored by our rules."""

    def __init__(self, image_size: int, quality: int, max_pixels: int):
        self.arguments = image_size, quality, max_pixels

    def __call__(self, stream: io.BytesIO, bboxes=None):
        """(jpg or None, width, height, original width, original height, error or None)."""
        try:
            return *canonical_jpeg(stream.read(), *self.arguments), None
        except NotAnImage as error:
            return None, None, None, None, None, f"not_an_image: {error}"
        except TooManyPixels as error:
            return None, None, None, None, None, f"too_large: {error}"
