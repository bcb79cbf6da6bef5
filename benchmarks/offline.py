"""What does computing the teacher beforehand cost in quality, and what does it save in time?

Run:   make demo && python benchmarks/offline.py quality [--steps 400] [--views 2 5 10] [--seeds 1]
       python benchmarks/offline.py price [--batch 32] [--rounds 5]

quality: students of one budget of steps on the demo world, which differ in their targets alone: one
stored view, plain or with crops that the target was not made for; K stored views, each with its own
target; and the published way, online: every step draws new crops, and the teacher embeds the very
pixels that the student sees. Crops are drawn alike everywhere (teacher_embed.crop_area, crop_ratio).
price: seconds a step at full size (ViT-B/32 and the published student), loader included, with the
targets read from Parquet and with the teacher in the loop, in float32 and in bfloat16.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from by_turns import median_ratio, seconds_by_turns
from held_out import held_out_metrics
from published import PUBLISHED
from worlds import full_size_card, photos, write_data

from pipeline import Student
from pipeline.core.config import DistillConfig, load_section
from pipeline.core.provenance import teacher_summary
from pipeline.core.records import Sample
from pipeline.data.embeddings import training_mean
from pipeline.data.views import random_view
from pipeline.models.teacher import Teacher
from pipeline.training.batches import Batch, training_batches
from pipeline.training.dataset import Dataset
from pipeline.training.distributed import Ranks
from pipeline.training.sampler import Sampler
from pipeline.training.trainer import Trainer
from stages.select import select
from stages.teacher_embed import teacher_embed

CPU = torch.device("cpu")
COLUMNS = ("cosine", "centred cosine", "student-teacher R@1", "text-image R@1")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    asked = parser.add_subparsers(dest="what", required=True)
    quality = asked.add_parser("quality")
    quality.add_argument("--params", type=Path, default=Path("params.yaml"))
    quality.add_argument("--data", type=Path, default=Path("data"))
    quality.add_argument("--steps", type=int, default=400)
    quality.add_argument("--share", type=float, default=0.25, help="of the scenes, to train on")
    quality.add_argument("--views", type=int, nargs="+", default=[2, 5, 10])
    quality.add_argument("--seeds", type=int, default=1)
    price = asked.add_parser("price")
    price.add_argument("--batch", type=int, default=32)
    price.add_argument("--steps", type=int, default=4, help="a round")
    price.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        {"quality": print_quality, "price": print_prices}[args.what](args, Path(scratch) / "data")


class FreshViews(Dataset):
    """Another crop of every image in every epoch, drawn as the stored views are; no target fits it."""

    def __init__(self, *args, crops: dict, **options):
        super().__init__(*args, **options)
        self.crops = crops

    def sample(self, row: int, epoch: int = 0, seed: int = 0) -> Sample:
        found = super().sample(row, epoch, seed)
        _, _, width, height = found.box  # of the whole image: the demo's are square
        drawn = random_view(found.image_id, epoch + 1, int(width), int(height), **self.crops)
        return found._replace(box=drawn.box, flip=drawn.flip)


def print_quality(args, data: Path) -> None:
    """One line a kind of targets; data: a scratch folder that takes the demo's images over."""
    embedding, base = (load_section(args.params, name) for name in ("teacher_embed", "distill"))
    crops = embedding.model_dump(include={"crop_area", "crop_ratio", "seed"})
    crops = {name.removeprefix("crop_"): value for name, value in crops.items()}
    selection = load_section(args.params, "select")
    selection = selection.model_copy(update={"val": 1 - selection.test - args.share})
    base = base.model_copy(update={"steps": args.steps})
    shutil.copytree(args.data / "images", data / "images")
    teacher = Teacher(Path(embedding.card), CPU)
    if teacher.image_size != base.student.image_size:
        raise SystemExit("teacher and student see different sizes: nothing here is online for both")
    print(
        f"{args.share:.0%} of the scenes, {args.steps} steps of {base.batch}, {args.seeds} seed(s)"
    )
    print(f"| targets | {' | '.join(COLUMNS)} | teacher: s | targets on disk |")
    print("| --- " * (len(COLUMNS) + 3) + "|")

    def line(name: str, rows: Callable[[], Dataset], targets=None, seconds: float = 0, **changes):
        config, found = base.model_copy(update=changes), []
        for seed in range(args.seeds):
            trained = train(config.model_copy(update={"seed": seed}), data, rows(), targets)
            found.append(held_out_metrics(trained, data))
        means = [statistics.mean(figures[column] for figures in found) for column in COLUMNS]
        size = sum(path.stat().st_size for path in (data / "teacher/images").glob("*.parquet"))
        disk = "-" if targets else f"{size / 2**20:.1f} MB"
        cells = " | ".join(f"{mean:.3f}" for mean in means)
        print(f"| {name} | {cells} | {seconds:.0f} | {disk} |", flush=True)

    def rows(**options) -> Dataset:
        return Dataset(
            data, "train", base.student.image_size, teacher.preprocessing.interpolation, **options
        )

    for count in (1, *args.views):
        began = time.monotonic()
        teacher_embed(embedding.model_copy(update={"views": count}), data, device="cpu")
        seconds = time.monotonic() - began
        select(selection, data)
        if count == 1:
            line("one view, no augmentation", rows, seconds=seconds)
            line(
                "one view, mismatched crops", rows, seconds=seconds, min_crop_area=crops["area"][0]
            )
        else:
            line(f"{count} views", lambda count=count: rows(views=count), seconds=seconds)
    fresh = FreshViews(
        data, "train", base.student.image_size, teacher.preprocessing.interpolation, crops=crops
    )
    line("online, new crops every step", lambda: fresh, teacher.embed_images)


def train(config: DistillConfig, data: Path, dataset: Dataset, targets: Callable | None) -> Student:
    """A student after config.steps; targets: from a batch's pixels, or None for the stored ones."""
    torch.manual_seed(config.seed)
    how = teacher_summary(data).preprocessing
    student = Student(config.student, how)
    trainer = Trainer(config, student, training_mean(data), Ranks(CPU))
    order = Sampler(dataset, config.seed, config.batch, config.shuffle_row_groups)
    steps(trainer, dataset, order, config.steps, targets)
    return trainer.averaged_student()


def print_prices(args, data: Path) -> None:
    """One line a precision: seconds a step offline and online, and their ratio."""
    card = full_size_card(data.parent)
    write_data(data, photos(None, args.batch * args.steps), PUBLISHED.embedding_size, 10**6)
    preset = Path(__file__).parents[1] / "pipeline/core/presets/clip-vit-b32.yaml"
    config = load_section(preset, "distill").model_copy(
        update={"batch": args.batch, "student": PUBLISHED, "warmup": 0}
    )
    print(f"ViT-B/32 and the published student, batch {args.batch}, {args.rounds} rounds")
    print(
        "| precision | offline: s a step | online | online / offline | (teacher + student) / student |"
    )
    print("| --- " * 5 + "|")
    for precision in ("float32", "bfloat16"):
        teacher = Teacher(card, CPU)
        ready = np.random.default_rng(0).integers(0, 256, (args.batch, 224, 224, 3), np.uint8)
        teacher = teacher.cast(getattr(torch, precision))
        dataset = Dataset(data, "train", PUBLISHED.image_size, "bicubic")
        order = Sampler(dataset, 0, args.batch, config.shuffle_row_groups)
        chosen = config.model_copy(update={"precision": precision})
        trainer = Trainer(chosen, Student(PUBLISHED), training_mean(data), Ranks(CPU))
        batch = next(training_batches(dataset, order, 0, 1, workers=2))
        run = partial(steps, trainer, dataset, order, args.steps)
        ways = {
            "offline": partial(run, None),
            "online": partial(run, teacher.embed_images),
            "student": lambda: [step(trainer, batch) for _ in range(args.steps)],  # noqa: B023
            "teacher": lambda: [teacher.embed_images(ready) for _ in range(args.steps)],  # noqa: B023
        }
        seconds = seconds_by_turns(ways, args.rounds, warm_up=True)
        ratio = median_ratio(seconds["online"], seconds["offline"])
        both = map(sum, zip(seconds["teacher"], seconds["student"], strict=True))
        bound = median_ratio(both, seconds["student"])
        offline, online = (
            statistics.median(seconds[name]) / args.steps for name in ("offline", "online")
        )
        print(
            f"| {precision} | {offline:.2f} | {online:.2f} | **{ratio:.2f}** | {bound:.2f} |",
            flush=True,
        )


def steps(
    trainer: Trainer, dataset: Dataset, order: Sampler, count: int, targets: Callable | None
) -> None:
    """Where targets is given, the published way: the teacher embeds what the student will see."""
    min_crop_area = trainer.config.min_crop_area
    for batch in training_batches(dataset, order, 0, count, workers=2, min_crop_area=min_crop_area):
        seen = replace(batch, targets=targets(batch.pixels)) if targets else batch
        step(trainer, seen)


def step(trainer: Trainer, batch: Batch) -> None:
    trainer.train_step(batch)
    trainer.read()


if __name__ == "__main__":
    main()
