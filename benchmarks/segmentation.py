"""Segmentation of the demo world: mask on and off, one image size and several, against baselines.

Run:   dvc repro, then python benchmarks/segmentation.py [--device cuda] [--data data]
Cost:  28 students, some minutes on an H200. A CPU needs hours: for a look,
       `--seeds 0 --steps 20 --images 400`.

The students and losses are the project's own, with the demo's parameters; the loop is not: all
images lie on the device at every size, since the loader would starve a GPU at this size of student.
Everything is chosen on val; the last table measures what was chosen on test, once.
"""

import argparse
import importlib.util
import math
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from held_out import over_seeds
from torch import Tensor

from pipeline.core.config import StudentConfig
from pipeline.core.errors import PipelineError
from pipeline.data import database
from pipeline.data.embeddings import load_text_embeddings, split_vectors
from pipeline.data.pixels import decode
from pipeline.data.views import view_pixels
from pipeline.evaluation import segmentation as seg
from pipeline.evaluation.dense import sliding_cosines, student_cosines
from pipeline.evaluation.retrieval import hits_at, ranks_of_own
from pipeline.models.sizes import ManySizes
from pipeline.models.student import Student
from pipeline.training.losses import published_loss, relational_loss

ROOT = Path(__file__).parents[1]
PRESET = ROOT / "pipeline/core/presets/demo.yaml"
SIZES = (48, 64, 80, 96, 128)  # px
MEASURED = (64, 96, 128)
DEMO = yaml.safe_load(PRESET.read_text())["distill"]
BATCH, PASS = DEMO["batch"], 256  # images a training step, and a pass without gradients
SPLITS = ("train", "val", "test")
IMAGES = """
SELECT image_id, jpg, boxes, "left", top, "right", bottom
FROM images JOIN teacher USING (image_id) WHERE status = 'ok' AND view = 0
"""


@dataclass(frozen=True, eq=False)
class Variant:
    """A way to train; what is not said is the demo's."""

    name: str
    sizes: tuple[int, ...] = (64,)  # one of them a step, drawn fairly
    steps: float = 1.0  # times the demo's
    student: dict = field(default_factory=dict)


ONE = Variant("one size, mask")
MASK_OFF = Variant("one size, no mask", student={"neighbourhood_mask": False})
SEVERAL = [
    Variant("48, 64, 80, 96 px", (48, 64, 80, 96)),
    Variant("64, 96 px", (64, 96)),
    Variant("64, 96, 128 px", (64, 96, 128)),
    Variant("48, 64, 80, 96, 128 px", SIZES),
]
LONGER = [replace(v, name=f"{v.name}, twice the steps", steps=2.0) for v in (ONE, SEVERAL[2])]
WHY = [
    Variant("2 layers", student={"layers": 2}),
    Variant("6 layers", student={"layers": 6}),
    Variant("patches of 4 px", student={"patch_size": 4}),
    Variant("patches of 16 px", student={"patch_size": 16}),
]


@dataclass(frozen=True)
class Kind:
    """A way to group the 36 colour-shape pairs into classes: label of each pair, prompts of each label."""

    name: str
    label: np.ndarray  # (256,) of each value of a mask of pairs
    groups: list[list[int]]


@dataclass(frozen=True)
class Split:
    """One split: ids, unit teacher vectors, pixels at each size, masks of pairs, captions."""

    teacher: Tensor  # (n, E)
    pixels: dict[int, Tensor]  # size -> (n, 3, S, S) uint8, on the device
    masks: list[np.ndarray]
    captions: np.ndarray  # (c, E)
    owners: np.ndarray  # (c,) row of each caption's image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--card", type=Path, default=ROOT / "manifests/demo/teacher/card.yaml")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="the demo's if not given")
    parser.add_argument("--images", type=int, help="of each split, at most")
    parser.add_argument("--few", action="store_true", help="only one size, no mask, 64 and 96 px")
    args = parser.parse_args()
    began = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    draw = demo_module()
    kinds, prompts = kinds_of(draw), prompt_vectors(args.data, draw.TEXTS)
    splits = {name: read_split(args, name, draw) for name in SPLITS}
    print(f"{ {name: len(split.teacher) for name, split in splits.items()} }, read in "
          f"{time.monotonic() - began:.0f} s, {args.device}", flush=True)  # fmt: skip
    baselines(args, splits, kinds, prompts)
    variants = [ONE, MASK_OFF, SEVERAL[1]] if args.few else [ONE, MASK_OFF, *SEVERAL, *LONGER, *WHY]
    found = {}
    for variant in variants:
        seeds = args.seeds[:1] if variant in WHY else args.seeds
        found[variant] = [run(args, variant, seed, splits, kinds, prompts) for seed in seeds]
    tables(found, SEVERAL[1:2] if args.few else SEVERAL)
    print(f"\n{time.monotonic() - began:.0f} s in all, {args.device}, torch {torch.__version__}")


def demo_module():
    """manifests/demo/draw.py, which is no package."""
    spec = importlib.util.spec_from_file_location("draw", ROOT / "manifests/demo/draw.py")
    draw = importlib.util.module_from_spec(spec)
    sys.modules["draw"] = draw  # its dataclass asks for it
    spec.loader.exec_module(draw)
    return draw


def kinds_of(draw) -> list[Kind]:
    """Shapes, colours and pairs; a class's prompts are the pairs that show it."""
    shapes, colours, pairs = len(draw.SHAPES), len(draw.COLOURS), len(draw.TEXTS)
    number = np.arange(pairs)
    of = {"shapes": number % shapes, "colours": number // shapes, "pairs": number}
    kinds = []
    for name, classes in of.items():
        label = np.zeros(256, np.uint8)
        label[1 : pairs + 1] = classes + 1
        groups = [np.flatnonzero(classes == c).tolist() for c in range(classes.max() + 1)]
        kinds.append(Kind(name, label, [[], *groups]))
    assert max(of["colours"]) + 1 == colours
    return kinds


def prompt_vectors(data: Path, wanted: list[str]) -> Tensor:
    texts, _, vectors = load_text_embeddings(data, "image_id IS NULL", [])
    rows = dict(zip(texts, vectors, strict=True))
    return torch.from_numpy(np.stack([rows[text] for text in wanted]))


def read_split(args, name: str, draw) -> Split:
    ids, teacher = split_vectors(args.data, name)
    ids, teacher = ids[: args.images], teacher[: args.images]
    rows = {key: row for key, *row in database.connect(args.data).execute(IMAGES).fetchall()}
    images = {key: decode(rows[key][0]) for key in ids}
    pixels = {}
    for size in SIZES if name == "train" else MEASURED:
        seen = [view_pixels(images[key], tuple(rows[key][2:]), False, size) for key in ids]
        pixels[size] = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2).contiguous()
        pixels[size] = pixels[size].to(args.device)
    masks = [] if name == "train" else [mask_of(draw, images[key], rows[key][1]) for key in ids]
    row_of = {key: i for i, key in enumerate(ids)}
    _, owners, vectors = load_text_embeddings(args.data, "image_id IS NOT NULL", [])
    mine = [i for i, key in enumerate(owners) if key in row_of]
    own = np.array([row_of[owners[i]] for i in mine])
    return Split(torch.from_numpy(teacher).to(args.device), pixels, masks, vectors[mine], own)


def mask_of(draw, image: np.ndarray, boxes: list[dict]) -> np.ndarray:
    """The mask of pairs that follows from a scene's boxes, whole pixels of the stored image."""
    things = []
    for box in boxes:
        _, colour, shape = box["text"].split()
        side = round(box["x1"] - box["x0"])
        things.append(draw.Thing("", colour, shape, round(box["x0"]), round(box["y0"]), side))
    return draw.mask_of(things, len(image))


# Training and measuring


def train(args, variant: Variant, seed: int, split: Split) -> Student:
    """The demo's parameters in a light loop: AdamW, warm-up and cosine, l1 + relational."""
    steps = round((args.steps or DEMO["steps"]) * variant.steps)
    warm = max(1, round(steps * DEMO["warmup"] / DEMO["steps"]))
    torch.manual_seed(seed)
    config = StudentConfig(**DEMO["student"] | variant.student)
    student = Student(config).to(args.device).train()
    sized = ManySizes(student, list(variant.sizes))
    decayed = [p for p in student.parameters() if p.ndim > 1]
    others = [p for p in student.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": DEMO["weight_decay"]}]
    groups += [{"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=DEMO["learning_rate"], betas=(0.9, 0.98), fused=True)

    def rate_at(step: int) -> float:
        over = max(0, step - warm) / max(1, steps - warm)
        return min(1, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * over))

    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
    cast = DEMO["precision"] == "bfloat16" and args.device == "cuda"
    mean, rng, order = split.teacher.mean(dim=0), np.random.default_rng(seed), np.zeros(0, int)
    for _ in range(steps):
        while len(order) < BATCH:
            order = np.concatenate([order, rng.permutation(len(split.teacher))])
        rows, order = torch.from_numpy(order[:BATCH]).to(args.device), order[BATCH:]
        pixels = split.pixels[int(rng.choice(variant.sizes))][rows]
        with torch.autocast(args.device, torch.bfloat16, enabled=cast):
            embedding = sized.embeddings_for_loss(student.normalise(pixels))[0]
        target = split.teacher[rows]
        loss = published_loss(embedding, target)
        loss = loss + relational_loss(embedding, target, mean, DEMO["relational_scale"])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), DEMO["max_grad_norm"])
        optimizer.step()
        rate.step()
    return student.eval()


@dataclass(frozen=True)
class Score:
    """One student at one size, or a baseline, for one kind of classes."""

    val: float
    test: dict[str, float]  # value, low, high
    choice: seg.Choice
    called: np.ndarray  # (K,) share of the object pixels of test that each label is given


def run(args, variant: Variant, seed: int, splits, kinds, prompts: Tensor) -> dict:
    """{("miou", size, kind, "plain" or "weighted"): Score, ("R@1", size): (val, test)}."""
    began = time.monotonic()
    trained, found = train(args, variant, seed, splits["train"]), {}
    for size in MEASURED:
        student = trained.resized(size)
        cosines, recall = {}, []
        for name in ("val", "test"):
            cosines[name], vectors = seen_by(student, splits[name].pixels[size], prompts)
            split = splits[name]
            ranks = ranks_of_own(split.captions, vectors, split.owners)
            recall.append(float(hits_at(1, ranks).mean()))
        found["R@1", size] = tuple(recall)
        found |= scores(size, cosines, splits, kinds)
    windows = {
        name: windowed(trained, splits[name].pixels[96], prompts) for name in ("val", "test")
    }
    found |= scores("96, windows", windows, splits, kinds)
    line = " ".join(
        f"{size} px {found['miou', size, 'shapes', 'plain'].val:.3f}" for size in MEASURED
    )
    print(f"{variant.name}, seed {seed}: val shapes {line}, {time.monotonic() - began:.1f} s",
          flush=True)  # fmt: skip
    return found


def seen_by(student: Student, pixels: Tensor, prompts: Tensor) -> tuple[seg.Cosines, np.ndarray]:
    """Cosines to the prompts, and the (n, E) embeddings, of a split."""
    parts, vectors = [], []
    for start in range(0, len(pixels), PASS):
        part = pixels[start : start + PASS]
        parts.append(student_cosines(student, part, prompts))
        with torch.inference_mode():
            vectors.append(student(student.normalise(part))[0].float().cpu().numpy())
    return joined(parts), np.concatenate(vectors)


def windowed(student: Student, pixels: Tensor, prompts: Tensor) -> seg.Cosines:
    """Windows of 64 px every 16 px over larger images."""
    parts = [pixels[i : i + PASS] for i in range(0, len(pixels), PASS)]
    return joined([sliding_cosines(student, part, prompts, 16) for part in parts])


def joined(parts: list[seg.Cosines]) -> seg.Cosines:
    return seg.Cosines(*map(torch.cat, zip(*parts, strict=True)))


def scores(size, cosines: dict[str, seg.Cosines], splits, kinds) -> dict:
    found = {}
    for kind in kinds:
        masks = {name: [kind.label[m] for m in splits[name].masks] for name in cosines}
        for way, weights in (("plain", (0.0,)), ("weighted", seg.WEIGHTS)):
            choice = seg.choose(cosines["val"], masks["val"], kind.groups, weights, True)
            counts = seg.scored(cosines["test"], masks["test"], kind.groups, choice)
            test = seg.miou_interval(counts)
            called = called_in_objects(cosines["test"], masks["test"], kind.groups, choice)
            found["miou", size, kind.name, way] = Score(choice.miou, test, choice, called)
    return found


def called_in_objects(cosines, masks, groups, choice: seg.Choice) -> np.ndarray:
    """(K,) share of all object pixels that is given each label."""
    total = torch.zeros(len(groups), dtype=torch.long)
    for rows, truth in seg.same_size_chunks(masks):
        parts = cosines.patches[rows], cosines.images[rows]
        size = tuple(truth.shape[1:])
        labels = seg.segment(*parts, groups, size, choice.weight, choice.threshold).cpu()
        total += torch.bincount(labels[truth > 0], minlength=len(groups))
    return (total / total.sum()).numpy()


# Tables


def baselines(args, splits, kinds, prompts: Tensor) -> None:
    """What needs no student: all background, the grids' coverage, the teacher's dense features."""
    rows = {"all background": [], "coverage, 8 x 8": [], "coverage, 12 x 12": []}
    for kind in kinds:
        masks = [kind.label[m] for m in splits["test"].masks]
        count = len(kind.groups)
        rows["all background"].append(seg.painted(np.zeros(len(masks), int), masks, count))
        for grid in (8, 12):
            rows[f"coverage, {grid} x {grid}"].append(seg.coverage(masks, grid, count))
    print("\n| baseline, test | " + " | ".join(kind.name for kind in kinds) + " |")
    print("| --- " * (1 + len(kinds)) + "|")
    for name, counts in rows.items():
        print(
            f"| {name} | " + " | ".join(interval_text(seg.miou_interval(c)) for c in counts) + " |"
        )
    try:
        for grid in (2, 4, 8, 12):
            name, found = teacher_scores(args, grid, splits, kinds, prompts)
            for way in ("plain", "weighted"):
                cells = [interval_text(found["miou", grid, k.name, way].test) for k in kinds]
                label = "" if way == "plain" else ", lambda chosen on val"
                print(f"| {name}{label} | " + " | ".join(cells) + " |")
            shares = ", ".join(f"{v:.2f}" for v in found["miou", grid, "shapes", "plain"].called)
            print(
                f"| {name}: shares of object pixels called background, then each shape: {shares} | | | |"
            )
    except (PipelineError, ImportError, OSError) as error:
        print(f"| the teacher's dense features: left out, for {error} | | | |")


def teacher_scores(args, grid: int, splits, kinds, prompts: Tensor) -> tuple[str, dict]:
    from pipeline.models.teacher import Teacher
    from pipeline.models.teacher_patches import dense_patches, dense_sizes

    teacher, cosines = Teacher(args.card, torch.device(args.device)), {}
    size = dense_sizes(teacher, grid)[-1]
    for name in ("val", "test"):
        pixels = splits[name].pixels[64].permute(0, 2, 3, 1).cpu().numpy()
        shape = (0.0, 0.0, 64.0, 64.0)
        large = np.stack([view_pixels(image, shape, False, size) for image in pixels])
        own = np.stack([view_pixels(image, shape, False, teacher.image_size) for image in pixels])
        parts = [
            (dense_patches(teacher, large[i : i + 64]), teacher.embed_images(own[i : i + 64]))
            for i in range(0, len(large), 64)
        ]
        dense, whole = (torch.from_numpy(np.concatenate(p)) for p in zip(*parts, strict=True))
        found = (dense @ prompts.T).permute(0, 3, 1, 2).contiguous(), whole @ prompts.T
        cosines[name] = seg.Cosines(*(x.to(args.device) for x in found))
    name = f"the teacher's dense features, {dense.shape[1]} x {dense.shape[1]}"
    return name, scores(grid, cosines, splits, kinds)


def interval_text(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def tables(found: dict[Variant, list[dict]], several: list[Variant]) -> None:
    """Means over seeds and the largest distance from them: val for all, then test for what is chosen."""
    print("\nOn val, mean over seeds ± the largest distance from it:\n")
    table(found, "val")

    def merit(variant: Variant) -> float:
        runs = found[variant]
        sizes = np.mean([[r["R@1", size][0] for size in MEASURED] for r in runs])
        return sizes + np.mean([r["miou", 96, "shapes", "plain"].val for r in runs])

    best = max(several, key=merit)
    print(
        f"\nChosen on val among several sizes (R@1 over the three sizes + mIoU at 96 px): {best.name}"
    )
    print("\nOn test, mean over seeds ± the largest distance from it:\n")
    table(
        {v: runs for v, runs in found.items() if v in (ONE, MASK_OFF, best, *LONGER, *WHY)}, "test"
    )
    print(
        "\nShare of the object pixels of test that is called background, then each shape, 64 px:\n"
    )
    for variant, runs in found.items():
        called = np.mean([r["miou", 64, "shapes", "plain"].called for r in runs], axis=0)
        print(f"- {variant.name}: " + ", ".join(f"{share:.2f}" for share in called))
    difference = [a["miou", 64, "shapes", "plain"].test["value"]
                  - b["miou", 64, "shapes", "plain"].test["value"]
                  for a, b in zip(found[ONE], found[MASK_OFF], strict=True)]  # fmt: skip
    print(f"\nMask on minus mask off, shapes, test: {over_seeds(difference)} (each seed: "
          f"{', '.join(f'{d:+.3f}' for d in difference)})")  # fmt: skip
    for variant in (ONE, best):
        run = found[variant][0]
        print(f"\n{variant.name}, first seed, 95 % intervals over the images of test:")
        for (what, *key), score in run.items():
            if what == "miou":
                print(f"- {key}: {interval_text(score.test)}, lambda {score.choice.weight}, "
                      f"threshold {score.choice.threshold:.3f}")  # fmt: skip


def table(found: dict[Variant, list[dict]], side: str) -> None:
    columns = [("miou", 64, kind, way) for kind in ("shapes", "colours", "pairs")
               for way in ("plain", "weighted")]  # fmt: skip
    columns += [("miou", 96, "shapes", "plain"), ("miou", 96, "shapes", "weighted")]
    columns += [("miou", "96, windows", "shapes", "plain"), ("miou", 128, "shapes", "plain")]
    columns += [("R@1", size) for size in MEASURED]
    names = [" ".join(map(str, c[1:3])) + (" + image" if c[-1] == "weighted" else "")
             if c[0] == "miou" else f"R@1 {c[1]}" for c in columns]  # fmt: skip
    print("| student | " + " | ".join(names) + " |\n" + "| --- " * (1 + len(columns)) + "|")
    for variant, runs in found.items():
        cells = []
        for column in columns:
            if column[0] == "miou":
                values = [r[column].val if side == "val" else r[column].test["value"] for r in runs]
            else:
                values = [r[column][side == "test"] for r in runs]
            cells.append(over_seeds(values))
        print(f"| {variant.name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
