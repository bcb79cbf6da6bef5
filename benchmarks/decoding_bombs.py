"""What bombs cost under the default limits, by format, and what the child costs other images.

Run:   python benchmarks/decoding_bombs.py [--child]
Shows: a table of outcome, peak memory and time of each bomb, each in a fresh child; then (or, with
       --child, only) the processor time of whole downloads over loopback that decode in the child
       against downloads that decode in img2dataset's own worker, in turns.
"""

import ctypes
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import bombs, worlds  # noqa: E402
from support.memory import held  # noqa: E402

from pipeline.fetch.decoding_process import _ENVIRONMENT, Decoder  # noqa: E402
from pipeline.fetch.policy import FetchError  # noqa: E402
from stages.download import download  # noqa: E402

MAX_PIXELS, SIDE = 50_000_000, 7071
LIMITS = 256, 95, MAX_PIXELS


def seconds_of(decoder: Decoder) -> float:
    """Processor time of the child so far."""
    return int(Path(f"/proc/{decoder.child.pid}/schedstat").read_text().split()[0]) / 1e9


def explode(data: bytes) -> tuple[str, int, float]:
    """(outcome, peak memory of the child in bytes, its processor time in s) of one bomb."""
    decoder = Decoder(*LIMITS)
    decoder.canonical_jpeg(worlds.picture(0, kind="JPEG"))
    start = seconds_of(decoder)
    try:
        outcome = f"stored, {len(decoder.canonical_jpeg(data)[0]) / 1000:.0f} kB"
    except FetchError as error:
        outcome = f"`{error.status}`"
    if decoder.child is None:
        return outcome + ", child ended", 0, float("nan")
    peak, seconds = held("VmHWM", decoder.child.pid), seconds_of(decoder) - start
    decoder.close()
    return outcome, peak, seconds


# What the child costs a download


_WITHOUT_THE_CHILD = """
import pipeline.fetch.decoding_process as module
from pipeline.fetch.decoding import canonical_jpeg

class Here:
    def __init__(self, *limits):
        self.limits = limits

    def canonical_jpeg(self, data):
        return canonical_jpeg(data, *self.limits)

module.Decoder = Here
"""


@contextmanager
def decoding_here(folder: Path) -> Iterator[None]:
    """While it lasts, new processes decode in themselves: by a sitecustomize that they import."""
    (folder / "sitecustomize.py").write_text(_WITHOUT_THE_CHILD)
    kept = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT), kept])
    try:
        yield
    finally:
        os.environ["PYTHONPATH"] = kept


@contextmanager
def served(files: list[bytes]) -> Iterator[str]:
    """The address of files on loopback, from a server in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for i, data in enumerate(files):
            (Path(folder) / f"{i}.jpg").write_bytes(data)
        command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
        server = subprocess.Popen(
            [*command, "--directory", folder], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port = re.search(r"port (\d+)", server.stdout.readline())[1]
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def cost_of_a_download(address: str, files: int, urls: int) -> float:
    """Seconds of processor that one download of so many URLs takes, all its processes added up."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [f"{address}/{i % files}.jpg?{i}" for i in range(urls)]
        pq.write_table(pa.table({"url": lines}), folder / "list.parquet")
        config = worlds.download_config(
            folder / "list.parquet", folder, rows_per_shard=urls, image_size=LIMITS[0], per_host=32,
            timeout=10.0, max_bytes=33_554_432, max_pixels=MAX_PIXELS, allow=["127.0.0.1"],
        )  # fmt: skip
        before, others = processor_seconds(), psutil.Process().children()
        download(config, folder / "data", processes=1, threads=16)
        orphans = set(psutil.Process().children()) - set(others)
        psutil.wait_procs(orphans, timeout=10)  # the decoding process ends with its parent
        seconds = processor_seconds() - before
        status = pq.read_table(folder / "data/images", columns=["status"])["status"]
        assert status.to_pylist() == ["ok"] * urls
    return seconds


def processor_seconds() -> float:
    """Of this process and of all below it that have ended and were waited for."""
    sums = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in sums)


def adopt_orphans() -> None:
    """Processes below us whose parent ends become ours, so that their time is counted (prctl(2))."""
    set_child_subreaper = 36
    assert ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0) == 0


def tell_child(urls: int = 2000, rounds: int = 7) -> None:
    adopt_orphans()
    os.environ.update(_ENVIRONMENT)  # the child's settings of memory, for both sides
    print(
        "| image | ms an image, decoded in the worker | in the child | ratio: median, all rounds |"
    )
    print("| --- | --- | --- | --- |")
    for width, height in [(224, 224), (480, 360), (1600, 1200)]:
        files = [worlds.picture(i, width, height, "JPEG", quality=92) for i in range(20)]
        here, there = [], []
        with served(files) as address, tempfile.TemporaryDirectory() as folder:
            for _ in range(rounds):
                with decoding_here(Path(folder)):
                    here.append(cost_of_a_download(address, len(files), urls))
                there.append(cost_of_a_download(address, len(files), urls))
        ratios = np.divide(there, here)
        print(
            f"| {width} x {height} px | {1000 * np.median(here) / urls:.2f} | "
            f"{1000 * np.median(there) / urls:.2f} | {np.median(ratios):.3f}: "
            f"{', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))} |",
            flush=True,
        )


def tell_bombs() -> None:
    print("| bomb | bytes | outcome | peak MB | s of processor |\n| --- | --- | --- | --- | --- |")
    for name, data in bombs.bombs(SIDE).items():
        outcome, peak, seconds = explode(data)
        print(
            f"| {name} | {len(data):,} | {outcome} | {peak / 1e6:.0f} | {seconds:.1f} |", flush=True
        )


def main() -> None:
    if "--child" not in sys.argv:
        tell_bombs()
    tell_child()


if __name__ == "__main__":
    main()
