"""How fast training is fed: this loader, webdataset, Hugging Face datasets and bare JPEG decoding.

Run:   pip install webdataset datasets && python benchmarks/loader_speed.py [--photos FOLDER]
All four see the same JPEGs and, but for bare decoding, give 224 px crops with a flip in batches;
as many workers each, in turn, several rounds in one run, start-up left out. Prints images/s, ratios of
medians, and the main process's own time. This loader runs twice: with threads and with processes.
"""

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import simplejpeg
from by_turns import by_turns
from worlds import AREA, RATIO, photos, write_data

import pipeline.models.open_clip  # noqa: F401  # before torchvision, which it makes importable
from pipeline.training.batches import Loader, TrainingOrder
from pipeline.training.dataset import Dataset
from pipeline.training.sampler import Sampler

import datasets  # isort: skip
import webdataset  # isort: skip
from PIL import Image  # isort: skip
from torch.utils.data import DataLoader  # isort: skip
from torchvision import transforms  # isort: skip

SIZE, BATCH = 224, 64
CROP = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, AREA, RATIO, interpolation=Image.Resampling.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
)


def crop_sample(sample: tuple) -> tuple:
    return (CROP(sample[0].convert("RGB")),)


def crop_row(row: dict) -> dict:
    return {"pixels": CROP(Image.open(io.BytesIO(row["jpg"])).convert("RGB"))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder of images; drawn where not given")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        jpgs = photos(args.photos, args.images)
        write_data(data, jpgs, 512, len(jpgs) // 4)
        tars = write_tars(Path(scratch), jpgs, len(jpgs) // 4)
        steps = len(jpgs) // BATCH

        def ours(processes: bool) -> Iterator[int]:
            dataset = Dataset(data, "train", SIZE, "bicubic")
            order = TrainingOrder(Sampler(dataset, 0, BATCH, 16), 1.0, [dataset.image_size])
            with Loader(dataset, order, 0, BATCH, args.workers, processes) as loader:
                for batch in loader.batches(range(steps)):
                    yield len(batch.ids)

        def threads() -> Iterator[int]:
            return ours(False)

        def processes() -> Iterator[int]:
            return ours(True)

        def webdataset_tars() -> Iterator[int]:
            source = (
                webdataset.WebDataset(
                    tars, shardshuffle=len(tars), workersplitter=webdataset.split_by_worker
                )
                .shuffle(1000)
                .decode("pil")
                .to_tuple("jpg")
                .map(crop_sample)
                .batched(BATCH, partial=True)
            )
            return counted(webdataset.WebLoader(source, batch_size=None, num_workers=args.workers))

        def huggingface() -> Iterator[int]:
            files = [str(path) for path in sorted((data / "images").glob("*.parquet"))]
            source = datasets.load_dataset(
                "parquet", data_files=files, split="train", streaming=True, columns=["jpg"],
                cache_dir=scratch,
            )  # fmt: skip
            source = source.shuffle(seed=0, buffer_size=1000).map(crop_row, remove_columns=["jpg"])
            return counted(DataLoader(source, batch_size=BATCH, num_workers=args.workers))

        def bare_decoding() -> Iterator[int]:
            with ThreadPoolExecutor(args.workers) as pool:
                for _ in pool.map(simplejpeg.decode_jpeg, jpgs):
                    yield 1

        runs = (threads, processes, webdataset_tars, huggingface, bare_decoding)
        measures = {run.__name__: partial(measured, run) for run in runs}
        found = by_turns(measures, args.rounds)
    print(f"{len(jpgs)} images, {args.workers} workers, batch {BATCH}, {SIZE} px, after start-up")
    median = {name: statistics.median(rate for rate, _ in of) for name, of in found.items()}
    best = max(median["threads"], median["processes"])
    for name, rate in median.items():
        cost = statistics.median(own for _, own in found[name])
        print(
            f"| {name} | {rate:.0f} images/s | ours / this: {best / rate:.2f} | "
            f"main process: {cost:.0f} us an image |"
        )


def measured(run: Callable[[], Iterator[int]]) -> tuple[float, float]:
    """images/s and this process's own microseconds an image, from the fourth batch to the last."""
    counts = run()
    for _ in range(4):
        next(counts)
    began, own = time.perf_counter(), time.process_time()
    total = sum(counts)
    return total / (time.perf_counter() - began), (time.process_time() - own) / total * 1e6


def counted(loader) -> Iterator[int]:
    for batch in loader:
        pixels = batch["pixels"] if isinstance(batch, dict) else batch
        yield len(pixels[0] if isinstance(pixels, tuple | list) else pixels)


def write_tars(folder: Path, jpgs: list[bytes], per_shard: int) -> list[str]:
    paths = []
    for shard, start in enumerate(range(0, len(jpgs), per_shard)):
        path = folder / f"{shard:05}.tar"
        with tarfile.open(path, "w") as tar:
            for i, jpg in enumerate(jpgs[start : start + per_shard], start):
                member = tarfile.TarInfo(f"{i:06}.jpg")
                member.size = len(jpg)
                tar.addfile(member, io.BytesIO(jpg))
        paths.append(str(path))
    return paths


if __name__ == "__main__":
    main()
