"""How busy a GPU is kept: the step, the loader, training end to end and stage one, in one run.

Run:   python benchmarks/gpu.py [--batch 1024] [--images 16384] [--workers 16]
Cost:  about five minutes with one GPU and 16 cores; draws its own JPEGs, needs no weights.

Prints one table. The student is the published one (224 px, patch 28), the teacher a ViT-B/32 with
random weights; both in bfloat16. What fails is said in the table, and the rest is still measured.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from published import PUBLISHED, bare_products
from worlds import full_size_card, photos, write_data

from pipeline.core.config import load_section
from pipeline.data import shards
from pipeline.models.blocks import Attention
from pipeline.models.student import Student
from pipeline.models.teacher import Teacher
from pipeline.models.teacher_shards import view_tables
from pipeline.training.batches import Batch, training_batches
from pipeline.training.dataset import Dataset
from pipeline.training.distributed import Ranks
from pipeline.training.sampler import Sampler
from pipeline.training.trainer import Trainer

PRESET = Path(__file__).parents[1] / "pipeline/core/presets/clip-vit-b32.yaml"
PEAK = 989e12  # bfloat16 FLOP/s of an H100 or H200, dense
DRAWN = 512  # distinct images; they are repeated
KINDS = {  # of kernels, by their names; the first that fits
    "element-wise": r"^triton_",
    "optimiser and clipping": r"[Aa]dam|multi_tensor|lerp|_foreach|Optimizer",
    "attention": r"fmha|flash|attention|sdp",
    "matrix products": r"gemm|cutlass|nvjet|xmma|cublas|splitK|aten::(add|b|badd)?b?mm$",
    "copies": r"[Mm]emcpy|[Mm]emset|copy|Cat",
}
Row = tuple[str, float, str]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--images", type=int, default=16384)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=60, help="of training end to end")
    parser.add_argument("--device", default="cuda")
    parts = (decoding, loading, default_step, end_to_end, profile, stage_one, other_steps)
    parser.add_argument("--only", choices=[part.__name__ for part in parts], help="one part")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        began, folder = time.monotonic(), Path(scratch)
        jpgs = []
        if args.only not in ("default_step", "profile", "other_steps"):
            jpgs = drawn(args.images, args.workers)
            write_data(folder / "data", jpgs, PUBLISHED.embedding_size, args.images // 8)
            note(began, "images drawn")
        for part in [part for part in parts if args.only in (None, part.__name__)]:
            try:
                for row in part(args, folder, jpgs, device):
                    rows.append(row)
                    note(began, f"{row[0]}: {row[1]:,.0f} {row[2]}")
            except Exception as error:
                rows.append((f"{part.__name__} FAILED", float("nan"), repr(error)[:300]))
                note(began, repr(rows[-1]))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"\n{name}, {args.workers} cores, torch {torch.__version__}, batch {args.batch}\n")
    print("| | images/s | |\n| --- | --- | --- |")
    for what, rate, remark in rows:
        print(f"| {what} | {rate:,.0f} | {remark} |")
    print(json.dumps({what: rate for what, rate, _ in rows}))


def note(began: float, text: str) -> None:
    print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)


def drawn(count: int, workers: int) -> list[bytes]:
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        some = pool.map(one_photo, range(DRAWN))
    return (some * (count // DRAWN + 1))[:count]


def one_photo(seed: int) -> bytes:
    return photos(None, 1, seed)[0]


# What the parts are held against


def decoding(args, folder: Path, jpgs: list[bytes], device) -> Iterator[Row]:
    """Bare simplejpeg on all cores, by processes that hold their images already."""
    share = jpgs[: max(1, len(jpgs) // args.workers)]
    with multiprocessing.get_context("spawn").Pool(
        args.workers, initializer=keep, initargs=(share,)
    ) as pool:
        pool.map(decode_kept, range(args.workers), chunksize=1)  # every process has started
        rates = []
        for _ in range(3):
            began = time.perf_counter()
            pool.map(decode_kept, range(args.workers), chunksize=1)
            rates.append(args.workers * len(share) / (time.perf_counter() - began))
    yield f"bare decoding, {args.workers} processes", statistics.median(rates), "256 x 341 px"


KEPT: list[bytes] = []


def keep(jpgs: list[bytes]) -> None:
    KEPT[:] = jpgs
    torch.set_num_threads(1)


def decode_kept(_) -> None:
    for jpg in KEPT:
        simplejpeg.decode_jpeg(jpg, "RGB")


def trainer(args, device) -> Trainer:
    config = load_section(PRESET, "distill").model_copy(
        update={"student": PUBLISHED, "batch": args.batch, "warmup": 0}
    )
    if device.type == "cpu":
        config = config.model_copy(update={"precision": "float32"})
    torch.manual_seed(0)
    mean = np.full(PUBLISHED.embedding_size, PUBLISHED.embedding_size**-0.5, np.float32)
    return Trainer(config, Student(PUBLISHED), mean, Ranks(device))


def ready_batch(args, device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    size, length = PUBLISHED.image_size, PUBLISHED.embedding_size
    pixels = torch.randint(0, 256, (args.batch, size, size, 3), generator=generator).byte()
    targets = torch.nn.functional.normalize(torch.randn(args.batch, length, generator=generator))
    return Batch(
        [str(i) for i in range(args.batch)], pixels.to(device), targets.to(device), None,
        np.arange(args.batch), [],
    )  # fmt: skip


def step_flops() -> float:
    """Of one image's forward and backward pass: matrix products and attention."""
    width, tokens = PUBLISHED.embedding_size + PUBLISHED.heads, PUBLISHED.grid**2
    linear = 3 * PUBLISHED.patch_size**2 * width + 12 * PUBLISHED.layers * width**2
    return 3 * 2 * tokens * (linear + 2 * PUBLISHED.layers * tokens * width)


def rate_of(step: Callable[[], object], images: int, device, seconds: float = 4.0) -> float:
    """images/s of a step that has been warmed up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    wait()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(5):
            step()
        wait()
        count += 5
    return count * images / (time.perf_counter() - began)


def default_step(args, folder: Path, jpgs, device) -> Iterator[Row]:
    products = bare_products(args.batch, PUBLISHED, torch.bfloat16, args.device, True)
    with torch.no_grad():
        rate = rate_of(products, args.batch, device)
    yield "the step's bare matrix products", rate, of_peak(rate)
    yield cached_step(args, device, args.batch, "fused", True)


def other_steps(args, folder: Path, jpgs, device) -> Iterator[Row]:
    yield cached_step(args, device, args.batch, "fused", False)
    yield cached_step(args, device, args.batch, "written_out", False)
    yield cached_step(args, device, 256, "fused", False)
    yield cached_step(args, device, 4 * args.batch, "fused", True)
    yield cached_step(args, device, args.batch, "written_out", True)
    yield cached_step(args, device, 256, "fused", True)


def cached_step(args, device, batch: int, attention: str, compiles: bool) -> Row:
    """A step on a batch that lies on the device, in one of the ways that it could be taken."""
    sized, forward = argparse.Namespace(**vars(args) | {"batch": batch}), Attention.forward
    Attention.forward = getattr(Attention, attention)
    try:
        found, ready = trainer(sized, device), ready_batch(sized, device)
        if not compiles:
            found.fast = found.network
        rate = rate_of(partial(taken, found, ready), batch, device)
    finally:
        Attention.forward = forward
        torch._dynamo.reset()
    how = f"{'compiled' if compiles else 'eager'}, attention {attention}"
    return f"step on a cached batch of {batch}, {how}", rate, of_peak(rate)


def taken(found: Trainer, batch: Batch) -> None:
    found.train_step(batch)
    if found.step % 10 == 0:
        found.read()


def of_peak(rate: float) -> str:
    return f"{rate * step_flops() / PEAK:.3f} of the peak"


def profile(args, folder: Path, jpgs, device) -> Iterator[Row]:
    """Where the device's time goes in a step as the code takes it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watched

    found, ready = trainer(args, device), ready_batch(args, device)
    on_gpu, steps = device.type == "cuda", 10
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)
    for _ in range(3):
        taken(found, ready)
    wait()
    began = time.perf_counter()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with watched(activities=kinds) as seen:
        for _ in range(steps):
            taken(found, ready)
        wait()
    wall = time.perf_counter() - began
    spent: Counter = Counter()
    for event in seen.events():
        on_device = str(event.device_type).endswith("CUDA")
        if on_device != on_gpu or getattr(event, "is_user_annotation", False):
            continue
        kind = next((k for k, form in KINDS.items() if re.search(form, event.name)), "element-wise")
        spent[kind] += event.device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(spent.values())
    shares = ", ".join(f"{kind} {time / total:.1%}" for kind, time in spent.most_common())
    covered = f"kernels cover {total / 1e6 / wall:.0%} of the time"
    rate = steps * args.batch / wall
    yield "profile of a step (slower for being watched)", rate, f"{shares}; {covered}"


# The whole way


def loader_of(args, folder: Path, device, stop: int) -> Iterator[Batch]:
    dataset = Dataset(folder / "data", "train", PUBLISHED.image_size, "bicubic")
    order = Sampler(dataset, 0, args.batch, 16)
    return training_batches(dataset, order, 0, stop, workers=args.workers, device=device)


def loading(args, folder: Path, jpgs, device) -> Iterator[Row]:
    """Batches on the device, with nobody who uses them; the start of the processes is left out."""
    batches = loader_of(args, folder, device, args.steps + 5)
    for _ in range(5):
        next(batches)
    own, began = time.process_time(), time.perf_counter()
    count = sum(len(batch.ids) for batch in batches)
    seconds, own = time.perf_counter() - began, time.process_time() - own
    remark = f"main process: {own / count * 1e6:.1f} us an image"
    yield f"the loader alone, {args.workers} processes", count / seconds, remark


def end_to_end(args, folder: Path, jpgs, device) -> Iterator[Row]:
    found, ready = trainer(args, device), ready_batch(args, device)
    for _ in range(5):  # compiles
        taken(found, ready)
    batches = loader_of(args, folder, device, args.steps + 5)
    for _ in range(5):
        taken(found, next(batches))
    found.read()
    began, count = time.perf_counter(), 0
    for batch in batches:
        taken(found, batch)
        count += len(batch.ids)
    found.read()
    rate = count / (time.perf_counter() - began)
    yield "training end to end", rate, f"{of_peak(rate)}; start-up and compilation left out"


def stage_one(args, folder: Path, jpgs, device) -> Iterator[Row]:
    card = full_size_card(folder)
    paths = sorted((folder / "data/images").glob("*.parquet"))
    yield from in_one_process(args, card, paths, device)
    torch.cuda.empty_cache()
    yield from in_parts(args, card, paths)


def in_one_process(args, card: Path, paths: list[Path], device) -> Iterator[Row]:
    teacher = Teacher(card, device)
    ready = np.random.default_rng(0).integers(0, 256, (512, 224, 224, 3), np.uint8)
    teacher = teacher.cast(torch.bfloat16)
    bare = torch.inference_mode()(partial(teacher.model.encode_image, teacher.normalised(ready)))
    yield "teacher ViT-B/32, bare forward pass", rate_of(bare, len(ready), device), "batch 512"
    embed(teacher, paths[0], 2)  # warms up
    began = time.perf_counter()
    count = sum(embed(teacher, path, args.workers) for path in paths)
    rate = count / (time.perf_counter() - began)
    yield f"teacher_embed's shards, one process, {args.workers} threads", rate, ""


def in_parts(args, card: Path, paths: list[Path]) -> Iterator[Row]:
    """As many processes as there are shards, each with a teacher of its own on the one GPU."""
    context = multiprocessing.get_context("spawn")
    start, done = context.Barrier(len(paths) + 1), context.Queue()
    threads = max(1, args.workers // len(paths))
    children = [
        context.Process(target=one_part, args=(card, path, args.device, threads, start, done))
        for path in paths
    ]
    for child in children:
        child.start()
    start.wait(120)
    began = time.perf_counter()
    count = sum(done.get(timeout=120) for _ in children)
    seconds = time.perf_counter() - began
    for child in children:
        child.join(60)
    yield f"teacher_embed's shards, {len(paths)} processes on the GPU", count / seconds, ""


def one_part(card: Path, path: Path, device: str, threads: int, start, done) -> None:
    teacher = Teacher(card, torch.device(device))
    teacher = teacher.cast(torch.bfloat16)
    teacher.embed_images(np.zeros((512, 224, 224, 3), np.uint8))
    start.wait(120)
    count = 0
    for _ in range(3):  # long enough to be measured
        count += embed(teacher, path, threads)
    done.put(count)


def embed(teacher: Teacher, path: Path, threads: int) -> int:
    """A shard as the stage embeds it, and written down."""
    config = load_section(PRESET, "teacher_embed").model_copy(update={"views": 1, "batch": 512})
    tables = view_tables(teacher, path, config, {}, threads, lambda _: None)
    schema = shards.teacher_schema(teacher.embedding_size)
    with tempfile.TemporaryDirectory() as folder:
        shards.write_shard(Path(folder) / "out.parquet", schema, tables, {})
    return sum(table.num_rows for table in tables)


if __name__ == "__main__":
    main()
