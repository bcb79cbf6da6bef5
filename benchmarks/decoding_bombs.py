"""What bombs cost under the default limits, by format, and what the child costs other images.

Run:   python benchmarks/decoding_bombs.py [--child]
Shows: a table of outcome, peak memory and time of each bomb, each in a fresh child; then (or, with
       --child, only) the processor time of good images in the child against in this process, in
       turns, beside all else that a download does to an image: medians, quartiles of the ratio.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import bombs, worlds  # noqa: E402

from pipeline.fetch.decoding import canonical_jpeg  # noqa: E402
from pipeline.fetch.decoding_process import _ENVIRONMENT, Decoder  # noqa: E402
from pipeline.fetch.http import HttpClient  # noqa: E402
from pipeline.fetch.journal import JournalWriter  # noqa: E402
from pipeline.fetch.policy import FetchError, FetchRules  # noqa: E402

MAX_PIXELS, SIDE = 50_000_000, 7071
LIMITS = 256, 95, MAX_PIXELS


def status_of(decoder: Decoder, name: str) -> int:
    """A field of the child's /proc status, in bytes."""
    text = Path(f"/proc/{decoder.child.pid}/status").read_text()
    return 1024 * int(text.split(f"{name}:")[1].split()[0])


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
    peak, seconds = status_of(decoder, "VmHWM"), seconds_of(decoder) - start
    decoder.close()
    return outcome, peak, seconds


@contextmanager
def served(files: list[bytes]) -> Iterator[list[str]]:
    """URLs of files on loopback, from a server in a process of its own."""
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
            yield [f"http://127.0.0.1:{port}/{i}.jpg" for i in range(len(files))]
        finally:
            server.kill()
            server.wait()


def rules() -> FetchRules:
    return FetchRules(
        timeout_s=30.0, max_bytes=33_554_432, max_pixels=MAX_PIXELS, max_redirects=3, retries=0,
        allow=("127.0.0.1",), root=None, respect_robots=True, per_host=8, image_size=256, quality=95,
    )  # fmt: skip


def cost_of_the_child(width: int, height: int, count: int = 300) -> np.ndarray:
    """(count, 3) ms of processor: one image decoded here, by way of the child, and all the rest
    that a download does to it (fetching, hashing, the journal). In turns, after 20 to get warm."""
    files = [worlds.picture(i, width, height, "JPEG", quality=92) for i in range(20)]
    decoder, client, taken = Decoder(*LIMITS), HttpClient(rules()), []
    decoder.canonical_jpeg(files[0])
    with served(files) as urls, tempfile.TemporaryDirectory() as folder:
        journal = JournalWriter(0, folder, False, 5, None, "jpg")
        for i in range(count + 20):
            data, times = files[i % 20], [time.process_time()]
            jpg = canonical_jpeg(data, *LIMITS)[0]
            times.append(time.process_time())
            before, start = seconds_of(decoder), time.process_time()
            decoder.canonical_jpeg(data)
            way = time.process_time() - start
            there, start = way + seconds_of(decoder) - before, time.process_time()
            body = client.open(Request(urls[i % 20])).read()
            meta = {"image_id": str(i), "sha256": hashlib.sha256(body).hexdigest()}
            journal.write(jpg, None, None, meta)
            taken.append((times[1] - times[0], there, time.process_time() - start))
        journal.close()
    decoder.close()
    return 1000 * np.array(taken[20:])


def tell_bombs() -> None:
    print("| bomb | bytes | outcome | peak MB | s of processor |\n| --- | --- | --- | --- | --- |")
    for name, data in bombs.bombs(SIDE).items():
        outcome, peak, seconds = explode(data)
        print(
            f"| {name} | {len(data):,} | {outcome} | {peak / 1e6:.0f} | {seconds:.1f} |", flush=True
        )


def main() -> None:
    if (
        not _ENVIRONMENT.items() <= os.environ.items()
    ):  # the child's memory settings, for both sides
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | _ENVIRONMENT)
    if "--child" not in sys.argv:
        tell_bombs()
    for size in [(224, 224), (480, 360), (1600, 1200)]:
        here, there, rest = cost_of_the_child(*size).T
        share = np.quantile((there + rest) / (here + rest), [0.25, 0.5, 0.75])
        print(
            f"{size}: decoding here {np.median(here):.2f} ms, in the child {np.median(there):.2f} ms, the "
            f"rest {np.median(rest):.2f} ms; whole image, child against here: {share.round(3)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
