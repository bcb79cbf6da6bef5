"""What the caption term costs the loader: the same rows with and without captions, 64 shards.

Run:   python benchmarks/captions_speed.py [--photos FOLDER] [--captions 5] [--rounds 3]
Both read the same shards, in turns, each time in a process of its own: an epoch in batches of 256.
Prints images a second of processor (of all threads, which a busy machine does not stretch) and of the
clock from the fourth batch on, peak memory, and how it grew in the second half of the epoch; medians,
and the median of the rounds' ratios. Once with photos, once with images of 16 px,
whose decoding costs next to nothing.
"""

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from by_turns import by_turns, median_ratio
from PIL import Image
from worlds import photos, write_data

from pipeline.training.batches import training_batches
from pipeline.training.dataset import Dataset
from pipeline.training.sampler import Sampler

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.memory import held

SHARDS, PER_SHARD, BATCH, LANES, DRAWN = 64, 512, 256, 16, 512


def epoch(data: Path, size: int, captions: bool, workers: int) -> dict[str, float]:
    dataset = Dataset(data, "train", size, "bicubic", captions=captions, groups_in_use=LANES)
    sampler = Sampler(dataset, 0, BATCH, LANES)
    rows, began, used, halfway = 0, 0.0, 0.0, 0.0
    batches = training_batches(dataset, sampler, 0, sampler.steps, workers=workers)
    for step, batch in enumerate(batches):
        assert (batch.texts is not None) == captions and len(batch.ids) == BATCH
        rows += BATCH
        if step == 2:
            began, used, rows = time.perf_counter(), time.process_time(), 0
        if step == sampler.steps // 2:
            halfway = held("VmHWM") / 2**20
    cost, spent = time.process_time() - used, time.perf_counter() - began
    peak = held("VmHWM") / 2**20
    rates = {"of processor": rows / cost, "of the clock": rows / spent}
    return rates | {"peak": peak, "growth": peak - halfway}


def alone(data: Path, size: int, captions: bool, workers: int) -> dict[str, float]:
    """`epoch` in a fresh process."""
    arguments = [data, "--size", size, "--workers", workers, *(["--with"] if captions else [])]
    command = [sys.executable, __file__, "--epoch", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def pixel() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder of images; drawn where not given")
    parser.add_argument("--captions", type=int, default=5, help="of each image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--epoch", type=Path, help="one epoch of this data/, in this process")
    parser.add_argument("--size", type=int)
    parser.add_argument("--with", action="store_true", dest="with_captions")
    args = parser.parse_args()
    if args.epoch:
        return print(json.dumps(epoch(args.epoch, args.size, args.with_captions, args.workers)))
    print(f"{SHARDS} shards of {PER_SHARD} images, {args.captions} captions each")
    print("| images | images/s | without | with | with / without | peak MiB | growth, MiB |")
    for name, size in {"photos, 224 px": 224, "16 px": 16}.items():
        with tempfile.TemporaryDirectory() as scratch:
            some = photos(args.photos, DRAWN) if size > 16 else [pixel()]
            jpgs = list(itertools.islice(itertools.cycle(some), SHARDS * PER_SHARD))
            write_data(Path(scratch), jpgs, 512, PER_SHARD, args.captions)
            run = partial(alone, Path(scratch), size)
            ways = {way: partial(run, way == "with", args.workers) for way in ("without", "with")}
            found = by_turns(ways, args.rounds)
        values = {key: [[of[key] for of in found[way]] for way in ways] for key in found["with"][0]}
        held_most = [
            ", ".join(f"{statistics.median(of):.0f}" for of in values[key])
            for key in ("peak", "growth")
        ]
        for kind in ("of processor", "of the clock"):
            without, with_captions = values[kind]
            cells = [name, kind, *(f"{statistics.median(of):.0f}" for of in values[kind])]
            cells += [f"{median_ratio(with_captions, without):.2f}", *held_most]
            print(f"| {' | '.join(cells)} |", flush=True)
    return None


if __name__ == "__main__":
    main()
