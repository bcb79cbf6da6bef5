"""img2dataset under our policy, in a process group of its own.

Reads a folder of lists NNNNN.parquet (image_id, url), yields raw shards NNNNN.parquet: a row per
image in no particular order, with image_id, url, status (`success` or a failure), error_message
(`split_error` takes it apart), width, height, original_width, original_height, sha256 (of the
fetched bytes), exif (JSON: their number as `bytes`) and jpg. A row that got lost is missing:
compare image_ids.

Nothing of img2dataset is imported here, only in the child (`img2dataset_child`): its SIGINT handler
would end us with status 0. Its workers keep a journal of finished rows. Where one is
killed, or all of img2dataset hangs or ends, it is started anew for the rows that are not in one.
"""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import FULL
from pipeline.fetch.http import LONGEST_PAUSE_S
from pipeline.fetch.journal import SPACE, SUFFIX, FetchedRows
from pipeline.fetch.policy import RETRYABLE, STATUSES, FetchRules, split_error

__all__ = ["RETRYABLE", "STATUSES", "FetchRules", "fetch_lists", "split_error"]

LOG = "img2dataset.log"
STALL_GRACE_S = 120.0  # to start processes and decode what was fetched, without a request
SIZE = "bytes"  # key in the column exif
TRIES = 3  # to fetch a list whose worker dies; after them its missing rows are lost
SLOWEST = 3  # hosts that are reported
_POLL_S = 0.2
REPORT_S = 2.0  # between two looks at what hosts cost
HEARTBEAT = "heartbeat"  # its time changes with every request and every decoded image
_CHILD = (
    "import sys; sys.path.insert(0, {!r}); from pipeline.fetch.img2dataset_child import run; run()"
)

Report = Callable[[dict[str, float]], None]  # seconds that each of the slowest hosts has cost


def fetch_lists(
    lists: Path,
    out: Path,
    rules: FetchRules,
    processes: int,
    threads: int,
    report: Report = lambda hosts: None,
) -> Iterator[tuple[str, FetchedRows]]:
    """Fetch every list; yield its name and its rows as soon as it is complete.

    The caller may delete the rows that it was given. `out` belongs to this function alone and is
    emptied first: give it only lists that are still to be fetched, none of them empty. The output of
    img2dataset goes to out/img2dataset.log. However this ends, kill -9 included, its processes end
    too. `report` is told now and then which hosts have cost most seconds by failures and slow
    answers.

    A list that loses its worker TRIES times lacks the rows that were never finished.
    Raises PipelineError where img2dataset does not even begin, OSError (ENOSPC) where the disk is
    full; failed images are rows.
    """
    waiting = _rows_per_list(lists)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    journals: dict[str, list[Path]] = {name: [] for name in waiting}
    losses: Counter = Counter()
    for number in range(TRIES * len(waiting)):
        attempt = _Attempt(lists, out, out / f"attempt-{number}", waiting, journals)
        with _running(attempt, rules, processes, threads) as child:
            patience = STALL_GRACE_S + 3 * (rules.timeout_s + LONGEST_PAUSE_S)
            for name in (watching := _Watch(attempt, child, patience, report)):
                journals[name].append(attempt.journal(name))
                yield name, _finished(name, waiting, journals)
        if waiting and watching.failed:
            attempt.require_space()
            raise _unfinished(watching.ending, waiting, out)
        begun = [name for name in sorted(waiting) if attempt.journal(name).exists()]
        for name in begun:
            losses[name] += 1
            journals[name].append(attempt.journal(name))
            if losses[name] == TRIES or len(FetchedRows(journals[name])) == waiting[name]:
                yield name, _finished(name, waiting, journals)
        if not waiting:
            return
        if not begun and not watching.done:
            raise _unfinished(watching.ending, waiting, out)


def _rows_per_list(lists: Path) -> dict[str, int]:
    rows = {path.name: pq.read_metadata(path).num_rows for path in lists.glob("*.parquet")}
    assert rows and all(rows.values()), f"{lists}: an empty list would shift img2dataset's numbers"
    return rows


def _finished(name: str, waiting: dict[str, int], journals: dict[str, list[Path]]) -> FetchedRows:
    """One list's rows, out of all attempts."""
    rows, asked = FetchedRows(journals.pop(name)), waiting.pop(name)
    if len(rows) > asked:
        raise PipelineError(f"{name}: {len(rows)} rows came, {asked} were asked for. Run it again.")
    return rows


def _unfinished(what: str, waiting: dict[str, int], out: Path) -> PipelineError:
    return PipelineError(
        f"img2dataset {what} without shard {min(waiting)} ({len(waiting)} missing in all). "
        f"Its output is in {out / LOG}. Run the command again: finished shards are kept."
    )


class _Attempt:
    """One start of img2dataset, for what is still missing."""

    def __init__(self, lists: Path, out: Path, folder: Path, waiting: dict, journals: dict):
        self.log, self.lists, self.raw = out / LOG, folder / "lists", folder / "raw"
        self.lists.mkdir(parents=True)
        self.raw.mkdir()
        for name in (SPACE, HEARTBEAT):
            (self.raw / name).touch()
        self.rows = max(waiting.values())
        for name in waiting:
            rows = pq.read_table(lists / name)
            done = set(FetchedRows(journals[name]))
            left = [key not in done for key in rows["image_id"].to_pylist()]
            pq.write_table(rows.filter(left), self.lists / name)
        # img2dataset numbers its shards by the place of a list among the sorted lists
        self.numbers = {name: f"{i:05}" for i, name in enumerate(sorted(waiting))}

    def journal(self, name: str) -> Path:
        return self.raw / f"{self.numbers[name]}{SUFFIX}"

    def is_done(self, name: str) -> bool:
        return (self.raw / f"{self.numbers[name]}_stats.json").exists()

    def has_lost_its_worker(self, name: str) -> bool:
        try:
            os.kill(int((self.raw / f"{self.numbers[name]}.pid").read_text()), 0)
        except (FileNotFoundError, ValueError):
            return False  # not begun
        except ProcessLookupError:
            return not self.is_done(name)
        return False

    def last_sign(self) -> int:
        return (self.raw / HEARTBEAT).stat().st_mtime_ns

    def found_no_space(self) -> bool:
        return not (self.raw / SPACE).exists()

    def require_space(self) -> None:
        """Raises OSError (ENOSPC) where a process found no space, or there is hardly any."""
        if self.found_no_space() or shutil.disk_usage(self.raw).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.raw))

    def slowest_hosts(self) -> dict[str, float]:
        """Seconds lost to hosts, added over the workers; the dearest hosts first."""
        costs: Counter = Counter()
        for path in self.raw.glob("*.hosts"):
            with suppress(ValueError, OSError):
                costs.update(json.loads(path.read_text()))
        return dict(costs.most_common(SLOWEST))


class _Watch:
    """Names of lists as they are finished; ends when no more of them will be."""

    def __init__(self, attempt: _Attempt, child: subprocess.Popen, patience: float, report: Report):
        self.attempt, self.child, self.patience, self.report = attempt, child, patience, report
        self.done: list[str] = []
        self.ending, self.failed = "lost its workers", False

    def __iter__(self) -> Generator[str, None, None]:
        attempt, waiting = self.attempt, set(self.attempt.numbers)
        last_sign, since, reported = None, time.monotonic(), 0.0
        while waiting:
            ended = self.child.poll()  # before looking: what it finished last is then seen below
            for name in (done := [name for name in sorted(waiting) if attempt.is_done(name)]):
                waiting.discard(name)
                self.done.append(name)
                yield name
            if time.monotonic() - reported > REPORT_S and (hosts := attempt.slowest_hosts()):
                self.report(hosts)
                reported = time.monotonic()
            if waiting and attempt.found_no_space():
                self.ending, self.failed = "found the disk full", True
                return
            if done or attempt.last_sign() != last_sign:
                last_sign, since = attempt.last_sign(), time.monotonic()
            elif ended is not None:
                self.ending = f"ended (exit code {ended})"
                self.failed = ended >= 0  # by itself: a broken installation
                return
            elif time.monotonic() - since > self.patience:
                self.ending = f"did nothing for {self.patience:.0f} s"
                return
            elif waiting and all(attempt.has_lost_its_worker(name) for name in waiting):
                return
            time.sleep(_POLL_S)


@contextmanager
def _running(
    attempt: _Attempt, rules: FetchRules, processes: int, threads: int
) -> Iterator[subprocess.Popen]:
    """img2dataset as the leader of a session of its own, which a Ctrl-C does not reach.

    Its standard input is a pipe that we hold: when we are gone it reads an end of file.
    """
    code = _CHILD.format(str(Path(__file__).resolve().parents[2]))
    with attempt.log.open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    assert child.stdin is not None  # a pipe, as asked
    try:
        with suppress(BrokenPipeError):  # it died at once: the caller sees that
            order = attempt.lists, attempt.raw, rules, processes, threads, attempt.rows
            child.stdin.write(pickle.dumps(order))
            child.stdin.flush()
        yield child
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with suppress(BrokenPipeError):
            child.stdin.close()
        child.wait()
