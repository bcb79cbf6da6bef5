"""What bombs cost under the default limits, by format, and what the child costs other images.

Run:   python benchmarks/decoding_bombs.py
Shows: a table of outcome, peak memory and time of each bomb, each in a fresh child; then the
       processor time of good images in the child against in this process, in turns.
"""

import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import bombs, worlds  # noqa: E402

from pipeline.fetch.decoder import Decoder  # noqa: E402
from pipeline.fetch.decoding import canonical_jpeg  # noqa: E402
from pipeline.fetch.policy import FetchError  # noqa: E402

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


def cost_of_the_child(width: int, height: int, count: int = 200) -> tuple[float, float]:
    """Milliseconds of processor per image: here, and beside it in the child and for the way there."""
    files = [worlds.picture(i, width, height, "JPEG", quality=92) for i in range(20)]
    decoder = Decoder(*LIMITS)
    here = there = 0.0
    for i in range(count + 20):
        data = files[i % 20]
        start = time.process_time()
        canonical_jpeg(data, *LIMITS)
        middle = time.process_time()
        before = seconds_of(decoder) if i else 0.0
        decoder.canonical_jpeg(data)
        if i >= 20:  # both are warm
            here += middle - start
            there += time.process_time() - middle + seconds_of(decoder) - before
    decoder.close()
    return 1000 * here / count, 1000 * there / count


def main() -> None:
    print("| bomb | bytes | outcome | peak MB | s of processor |\n| --- | --- | --- | --- | --- |")
    for name, data in bombs.bombs(SIDE).items():
        outcome, peak, seconds = explode(data)
        print(
            f"| {name} | {len(data):,} | {outcome} | {peak / 1e6:.0f} | {seconds:.1f} |", flush=True
        )
    for size in [(224, 224), (480, 360), (1600, 1200)]:
        here, there = cost_of_the_child(*size)
        print(
            f"{size}: here {here:.2f} ms, child {there:.2f} ms, {there - here:+.2f} ms", flush=True
        )


if __name__ == "__main__":
    main()
