"""What runs in img2dataset's processes: its own code with our client, decoder and writer.

img2dataset imports torch (through webdataset), albumentations, pandas and wandb, which costs every
one of its processes seconds of a processor, and uses none of them here. They stand aside while it is
imported, and come when one of their attributes is asked for.
"""

import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.request import Request

from pipeline.fetch.decoding_process import Decoder
from pipeline.fetch.http import Body, HttpClient
from pipeline.fetch.img2dataset import HEARTBEAT, REPORT_S, SIZE, SLOWEST
from pipeline.fetch.journal import JournalWriter, tell_if_full
from pipeline.fetch.policy import FetchError, FetchRules

UNUSED = ("albumentations", "pandas", "wandb", "webdataset")


class _Later(ModuleType):
    """Stands for a module that is imported when it is used."""

    def __getattr__(self, name: str) -> Any:
        if sys.modules.get(self.__name__) is self:  # asked for while img2dataset is imported
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


_later = {name: _Later(name) for name in UNUSED if name not in sys.modules}
sys.modules.update(_later)
try:
    import img2dataset.main
    from img2dataset import downloader
    from img2dataset.logger import LoggerProcess
finally:
    for _name, _module in _later.items():
        if sys.modules.get(_name) is _module:
            del sys.modules[_name]


def run() -> None:
    """The process that runs img2dataset."""
    lists, raw, rules, processes, threads, rows = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    main = sys.modules["img2dataset.main"]  # hidden behind the function of the same name
    setattr(main, "Downloader", functools.partial(GuardedDownloader, rules, raw))  # noqa: B010
    setattr(main, "LoggerProcess", LightLogger)  # noqa: B010
    img2dataset.download(
        url_list=str(lists),
        input_format="parquet",
        output_folder=str(raw),
        output_format="parquet",
        save_additional_columns=["image_id"],
        distributor="multiprocessing",  # Ray and Spark would work where our client is not
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


@functools.cache
def _watch_parent() -> None:
    """In a worker: where the process that runs img2dataset is killed alone, as Ray does with the
    children of a task, all that it started ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


class LightLogger(LoggerProcess):
    """img2dataset's logger; that it lies here makes its process import this module first."""


class GuardedDownloader:
    """Stands for img2dataset's Downloader in its pool of spawned workers."""

    def __init__(self, rules: FetchRules, raw: Path, **arguments: Any) -> None:
        self.rules, self.raw = rules, raw
        ours = {"resizer": CanonicalResizer(rules, raw), "sample_writer_class": JournalWriter}
        self.downloader = downloader.Downloader(**arguments | ours)

    def __call__(self, shard: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
        """(whether it worked, shard), as img2dataset's distributor expects it."""
        _watch_parent()
        setattr(downloader, "exifread", CountBytes)  # noqa: B010 - no parser of untrusted bytes
        fetch = functools.partial(fetch_row, _client(self.rules, self.raw))
        setattr(downloader, "download_image_with_retry", fetch)  # noqa: B010
        try:
            (self.raw / f"{shard[0]:05}.pid").write_text(str(os.getpid()))
            return self.downloader(shard)
        except OSError as error:
            tell_if_full(self.raw, error)
            raise
        finally:
            _tell_hosts(self.rules, self.raw)


def fetch_row(
    client: HttpClient, row: tuple[int, str], **_: object
) -> tuple[int, Body | None, str | None]:
    """(key, body or None, error or None): img2dataset's own function asks urllib."""
    key, url = row
    try:
        return key, client.open(Request(url)), None
    except Exception as error:  # also of what urllib takes for no URL
        return key, None, str(error)


@functools.cache
def _client(rules: FetchRules, raw: Path) -> HttpClient:
    """One per process, so that robots.txt, turns and accounts are shared by its shards."""
    told = [time.monotonic()]

    def heartbeat() -> None:
        (raw / HEARTBEAT).touch()
        if time.monotonic() - told[0] > REPORT_S:
            told[0] = time.monotonic()
            _tell_hosts(rules, raw)

    return HttpClient(rules, heartbeat)


def _tell_hosts(rules: FetchRules, raw: Path) -> None:
    """What hosts have cost this process, for the progress that the caller shows."""
    costs = _client(rules, raw).hosts.slowest(SLOWEST)
    with suppress(OSError):  # a full disk is told by what needs it
        (raw / f"{os.getpid()}.hosts").write_text(json.dumps(costs))


@functools.cache
def _decoder(rules: FetchRules) -> Decoder:
    """One per process."""
    return Decoder(rules.image_size, rules.quality, rules.max_pixels)


class CountBytes:
    """Stands for img2dataset's parser of EXIF, whose answer becomes a column: counts the bytes."""

    @staticmethod
    def process_file(stream: io.BytesIO, details: bool) -> dict[str, int]:
        return {SIZE: stream.getbuffer().nbytes}


class CanonicalResizer:
    """Stands for img2dataset's Resizer: bytes are judged, decoded and stored by our rules."""

    def __init__(self, rules: FetchRules, raw: Path) -> None:
        self.rules, self.raw = rules, raw

    def __call__(self, body: Body, bboxes: object = None) -> tuple:
        """(jpg or None, width, height, original width, original height, error or None)."""
        (self.raw / HEARTBEAT).touch()
        hosts, start = _client(self.rules, self.raw).hosts, time.monotonic()
        try:
            if body.host:
                hosts.require_budget(body.host)
            return *_decoder(self.rules).canonical_jpeg(body.read()), None
        except FetchError as error:
            return None, None, None, None, None, str(error)
        finally:
            if body.host:
                hosts.charge_decoding(body.host, time.monotonic() - start)
