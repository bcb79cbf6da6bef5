"""Bombs against the process that decodes: each costs a bounded time and memory, and one image."""

import os
import signal
import threading
import time

import psutil
import pytest
from PIL import Image
from support import bombs, worlds
from support import server as web
from support.memory import held

from pipeline.fetch import decoding
from pipeline.fetch.decoding import Undecodable, canonical_jpeg, count_scans
from pipeline.fetch.decoding_process import BASE_BYTES, BYTES_PER_PIXEL, Decoder
from pipeline.fetch.policy import FetchError

SIDE = 3000  # px; squared, all the pixels that are allowed below
GOOD = worlds.picture(1, 300, 200, "JPEG")


@pytest.fixture
def decoder():
    made = Decoder(256, 90, SIDE * SIDE)
    yield made
    made.close()


def why_not(decoder: Decoder, data: bytes) -> tuple[str, str]:
    with pytest.raises(FetchError) as caught:
        decoder.canonical_jpeg(data)
    return caught.value.status, caught.value.detail


def peak(decoder: Decoder) -> int:
    """Most bytes of memory that the child has held so far."""
    return held("VmHWM", decoder.child.pid)


@pytest.fixture(scope="module")
def exploded() -> dict[str, tuple[str, int, float, int]]:
    """Of each bomb, in one process after the other: outcome, peak memory, seconds, bytes stored."""
    found = {}
    for name, data in bombs.bombs(SIDE).items():
        decoder = Decoder(256, 90, SIDE * SIDE)
        decoder.canonical_jpeg(GOOD)
        start, stored = time.monotonic(), b""
        try:
            stored, *_ = decoder.canonical_jpeg(data)
            outcome = "ok"
        except FetchError as error:
            outcome = error.status
        seconds = time.monotonic() - start
        assert decoder.child is not None, f"{name}: the process ended"
        found[name] = outcome, peak(decoder), seconds, len(stored)
        decoder.close()
    return found


STOPPED = {
    "JPEG, progressive, 5,000 scans": "undecodable",
    "BMP, run lengths": "not_an_image",
    "TIFF, 64 x 64 px in a tile of 30,000 x 30,000": "undecodable",
    "TIFF, LZMA": "not_an_image",
    "TIFF, zstd": "not_an_image",
    "TIFF, JBIG": "not_an_image",
    "TIFF, LERC": "not_an_image",
    "TIFF, fax group 3": "not_an_image",
    "TIFF, fax group 4": "not_an_image",
    "TIFF, JPEG": "not_an_image",
}
MAY_FAIL = {
    "TIFF, 64 x 64 px in a strip of 10 M rows",
    "PNG, EXIF of 4,000 tags over the same 1 MB",
}


def test_what_is_not_on_the_list_of_decoders_and_what_costs_too_much_is_refused(exploded):
    outcomes = {name: outcome for name, (outcome, *_) in exploded.items() if name not in MAY_FAIL}
    assert outcomes == dict.fromkeys(outcomes, "ok") | STOPPED


def test_no_bomb_takes_more_memory_than_seventeen_bytes_a_pixel_and_its_own_size(exploded):
    sizes = {name: len(data) for name, data in bombs.bombs(SIDE).items()}
    most = {name: 80_000_000 + 17 * SIDE * SIDE + 4 * sizes[name] for name in exploded}
    assert {name: held for name, (_, held, *_) in exploded.items() if held > most[name]} == {}


def test_no_bomb_takes_long_and_none_is_stored_with_its_ballast(exploded):
    assert {name: s for name, (_, _, s, _) in exploded.items() if s > 20} == {}
    stored = {name: size for name, (*_, size) in exploded.items() if size}
    assert {name: size for name, size in stored.items() if size > 20_000} == {}
    assert max(size for name, size in stored.items() if "64 x 64" in name) < 2000


def test_memory_has_an_end_whatever_a_header_says(decoder, monkeypatch):
    """The limit is the system's: it holds where none of our checks does."""
    decoder.arguments = 256, 90, 1_000_000_000
    decoder.canonical_jpeg(GOOD)
    memory = psutil.Process(decoder.child.pid).rlimit(psutil.RLIMIT_AS)
    assert memory == (BASE_BYTES + BYTES_PER_PIXEL * 1_000_000_000,) * 2
    limits = BASE_BYTES + BYTES_PER_PIXEL * SIDE * SIDE
    psutil.Process(decoder.child.pid).rlimit(psutil.RLIMIT_AS, (limits, limits))
    huge = bombs.of_mode("RGB", "PNG", 13_000, compress_level=1)  # 676 MB decoded
    assert why_not(decoder, huge)[0] == "undecodable"
    assert decoder.canonical_jpeg(GOOD)[1:] == (300, 200, 300, 200)


def test_the_child_can_open_nothing_and_write_nothing(decoder):
    decoder.canonical_jpeg(GOOD)
    child = psutil.Process(decoder.child.pid)
    for limit in (psutil.RLIMIT_NOFILE, psutil.RLIMIT_FSIZE, psutil.RLIMIT_CORE):
        assert child.rlimit(limit) == (0, 0)


def test_an_image_that_takes_too_much_processor_time_is_a_row_and_the_next_one_is_decoded():
    decoder = Decoder(256, 90, 60_000_000, cpu_s=0.2)
    status, detail = why_not(decoder, bombs.jpeg_of_scans(7000, 50))
    assert (status, detail) == ("undecodable", "not decoded in 0.2 s of processor time")
    assert decoder.canonical_jpeg(worlds.picture(1, 30, 20, "PNG"))[1:] == (30, 20, 30, 20)
    decoder.close()


def stopped_child(decoder: Decoder, sent: int) -> None:
    """Send a signal to the child as soon as the parent waits for it."""
    decoder.canonical_jpeg(GOOD)
    os.kill(decoder.child.pid, sent)


def test_a_child_that_stalls_is_a_timeout_and_is_replaced():
    decoder = Decoder(256, 90, 1_000_000, wall_s=30.0)
    stopped_child(decoder, signal.SIGSTOP)
    decoder.wall_s, first = 0.5, decoder.child.pid
    assert why_not(decoder, GOOD) == ("timeout", "not decoded in 0.5 s")
    decoder.wall_s = 30.0
    assert decoder.canonical_jpeg(GOOD)[1:] == (300, 200, 300, 200)
    assert decoder.child.pid != first and not psutil.pid_exists(first)
    decoder.close()


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGKILL, "lost"), (signal.SIGSEGV, "undecodable")]
)
def test_a_child_that_is_killed_costs_one_image(decoder, sent, status):
    stopped_child(decoder, sent)
    assert why_not(decoder, GOOD)[0] == status
    assert decoder.canonical_jpeg(GOOD)[1:] == (300, 200, 300, 200)


def test_the_child_gives_what_the_function_gives(decoder):
    for kind in decoding.FORMATS:
        data = worlds.picture(2, 700, 500, kind)
        assert decoder.canonical_jpeg(data) == canonical_jpeg(data, 256, 90, SIDE * SIDE)
    assert why_not(decoder, b"<html>")[0] == "not_an_image"
    assert why_not(decoder, b"")[0] == "not_an_image"
    assert why_not(decoder, bombs.of_mode("1", "PNG", SIDE + 1))[0] == "too_large"


def test_the_child_ends_with_its_parent():
    code = """
        import sys, time
        from contextlib import suppress
        from pipeline.fetch.policy import FetchError
        from pipeline.fetch.decoding_process import Decoder
        decoder = Decoder(256, 90, 10**6)
        with suppress(FetchError):  # the child starts with the first image
            decoder.canonical_jpeg(b"")
        print(decoder.child.pid, flush=True)
        time.sleep(600)
    """
    parent = worlds.run_code(code)
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    parent.kill()
    parent.communicate()
    assert web.wait_until(lambda: not psutil.pid_exists(child), 20)


# Scans


def test_scans_are_counted_as_the_decoder_meets_them():
    assert count_scans(worlds.picture(0, 64, 64, "JPEG")) == 1
    assert count_scans(bombs.jpeg_of_scans(64, 0)) == 6
    assert count_scans(bombs.jpeg_of_scans(64, 500)) == 506
    assert count_scans(bombs.jpeg_with_archive(100_000)) == 1
    thumbnail = Image.Exif()
    thumbnail[0x010E] = "\u00ff\u00da" * 500  # looks like scans, lies in a segment
    assert count_scans(worlds.picture(0, 64, 64, "JPEG", exif=thumbnail)) == 1


@pytest.mark.parametrize("between", [b"\xff\x02", b"\xff\xd0", b"\xff\x01", b"\xff\xff\xff", b"ab"])
def test_scans_behind_a_marker_without_length_are_counted(between):
    """libjpeg skips them; a reader that takes the next bytes for a length skips the scans."""
    data = bombs.jpeg_of_scans(64, 200)
    first = data.index(b"\xff\xda")
    assert count_scans(data[:first] + between + data[first:]) == 206


def test_too_many_scans_are_refused_before_anything_is_decoded():
    start = time.process_time()
    with pytest.raises(Undecodable, match="a JPEG of 5006 scans; at most 64"):
        canonical_jpeg(bombs.jpeg_of_scans(2000, 5000), 256, 90, 10_000_000)
    assert time.process_time() - start < 2.0


def test_a_decoder_serves_one_caller_after_the_other(decoder):
    """Threads that take turns get their own answers."""
    lock, found = threading.Lock(), {}

    def decode(seed: int) -> None:
        with lock:
            found[seed] = decoder.canonical_jpeg(worlds.picture(seed, 40 + seed, 30))[1]

    threads = [threading.Thread(target=decode, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {seed: 40 + seed for seed in range(8)}


def test_the_process_that_decodes_loads_no_more_than_decoding_needs():
    """Arrow alone would double its memory: 75 MB in place of 39."""
    code = "import sys, pipeline.fetch.decoding_process; print('pyarrow' in sys.modules)"
    output, errors = worlds.run_code(code).communicate(timeout=60)
    assert output.split() == ["False"], errors
