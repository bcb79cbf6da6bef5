"""A list of 10,000 URLs over 200 addresses of loopback, clean and with 1 % of them hostile.

Run:   python benchmarks/hostile_list.py [URLS]
Shows: that the hostile list ends by itself with every good image, and in what time beside the clean
       one. Hostile are ten addresses, each in its own way (`ATTACKS`); the time-out is 2 s.
"""

import asyncio
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import bombs, worlds  # noqa: E402

from stages.download import download  # noqa: E402

ADDRESSES = [f"127.0.{1 + i // 100}.{1 + i % 100}" for i in range(200)]
PICTURES = 64
ATTACKS = {  # what an address does with each of its pages
    "drips": "a byte every 0.2 s",
    "silent": "says nothing",
    "endless": "a body that never ends",
    "slow robots": "a robots.txt that drips",
    "robots bomb": "a robots.txt of 30,000 rules with wildcards",
    "redirects": "to itself, each to a robots.txt that takes 1.5 s",
    "scans": "a progressive JPEG of 5,000 scans",
    "decoding": "49 megapixels in some kilobytes: PNG of 16 bits, lossless WebP, 60 scans",
    "tiles": "a TIFF whose one tile is 30,000 px wide",
    "ballast": "a JPEG of 64 px in 30 MB of comments",
}
HOSTILE = dict(zip(ADDRESSES, ATTACKS, strict=False))


def payloads() -> dict[str, list[bytes]]:
    side = 7000
    rules = b"User-agent: *\n" + b"".join(b"Disallow: /*%05x\n" % i for i in range(30_000))
    return {
        "good": [worlds.picture(i, 480, 360, "JPEG", quality=92) for i in range(PICTURES)],
        "robots bomb": [rules],
        "scans": [bombs.jpeg_of_scans(side, 5000)],
        "decoding": [
            bombs.of_mode("I;16", "PNG", side),
            bombs.of_mode("RGBA", "WEBP", side, lossless=True),
            bombs.jpeg_of_scans(side, 54),
        ],
        "tiles": [bombs.tiff_of_tile(30_000)],
        "ballast": [bombs.jpeg_with_comments(30_000_000)],
    }


class Site:
    """All 200 addresses, on one port."""

    def __init__(self, hostile: bool, ready):
        self.hostile, self.ready, self.files = hostile, ready, payloads()

    async def serve(self) -> None:
        server = await asyncio.start_server(self.answer, ADDRESSES[0], 0, backlog=512)
        port = server.sockets[0].getsockname()[1]
        others = await asyncio.start_server(self.answer, ADDRESSES[1:], port, backlog=512)
        self.ready.put(port)
        async with server, others:
            await asyncio.Event().wait()

    async def answer(self, reader, writer) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            address, port = writer.get_extra_info("sockname")[:2]
            attack = HOSTILE.get(address) if self.hostile else None
            await self.play(attack, path, f"http://{address}:{port}", writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def play(self, attack: str | None, path: str, origin: str, writer) -> None:
        robots = path == "/robots.txt"
        if attack == "silent":
            await asyncio.sleep(600)
        elif attack == "drips" or (attack == "slow robots" and robots):
            await self.drip(writer)
        elif attack == "endless" and not robots:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                writer.write(b"\xff" * 65_536)
                await writer.drain()
        elif attack == "redirects":
            await asyncio.sleep(1.5 if robots else 0)
            head = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: "
            writer.write(head + f"{origin}{path}x".encode() + b"\r\n\r\n")
        elif robots and attack != "robots bomb":
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        else:
            files = self.files.get(attack if robots or attack != "robots bomb" else "good")
            body = (files or self.files["good"])[hash_of(path) % len(files or self.files["good"])]
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def drip(self, writer) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + b"x" * 9999:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.2)


def hash_of(path: str) -> int:
    return sum(map(ord, path))


def run_site(hostile: bool, ready) -> None:
    asyncio.run(Site(hostile, ready).serve())


def write_manifest(path: Path, port: int, urls: int, hostile: bool) -> None:
    """1 % of the URLs lie on the hostile addresses, or all of them anywhere."""
    good = ADDRESSES[len(HOSTILE) :] if hostile else ADDRESSES
    bad = urls // 100 if hostile else 0
    hosts = [list(HOSTILE)[i % len(HOSTILE)] for i in range(bad)]
    hosts += [good[i % len(good)] for i in range(urls - bad)]
    lines = [f"http://{host}:{port}/{i}.jpg" for i, host in enumerate(hosts)]
    random.Random(0).shuffle(lines)
    pq.write_table(pa.table({"url": lines}), path)


def measure(urls: int, hostile: bool) -> tuple[float, Counter, Counter]:
    """Seconds, and statuses of the good and of the hostile addresses' rows."""
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    site = context.Process(target=run_site, args=(hostile, ready), daemon=True)
    site.start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_manifest(folder / "list.parquet", ready.get(timeout=300), urls, hostile)
        config = worlds.download_config(
            folder / "list.parquet", folder, rows_per_shard=2500, image_size=256, timeout=2.0, retries=1,
            max_bytes=33_554_432, max_pixels=50_000_000, allow=["127.0.0.0/16"],
        )  # fmt: skip
        start = time.monotonic()
        download(config, folder / "data", processes=2, threads=16)
        seconds = time.monotonic() - start
        found = {True: Counter(), False: Counter()}
        for shard in (folder / "data/images").glob("*.parquet"):
            rows = pq.read_table(shard, columns=["url", "status"]).to_pylist()
            for row in rows:
                address = row["url"].split("/")[2].split(":")[0]
                found[hostile and address in HOSTILE][row["status"]] += 1
    site.kill()
    return seconds, found[False], found[True]


def main(urls: int) -> None:
    clean, good, _ = measure(urls, hostile=False)
    print(f"clean:   {clean:.1f} s, {dict(good)}, load {os.getloadavg()[1]:.1f}", flush=True)
    attacked, good, bad = measure(urls, hostile=True)
    print(
        f"hostile: {attacked:.1f} s, good {dict(good)}, hostile {dict(bad)}, load {os.getloadavg()[1]:.1f}"
    )
    print(f"ratio:   {attacked / clean:.2f}")
    assert set(good) == {"ok"} and good["ok"] == urls - urls // 100, "a good image was lost"


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
