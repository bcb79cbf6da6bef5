"""Distil real CLIP vectors that others computed, from photos to figures, and print the table.

    python benchmarks/real_vectors.py SHARED --work FOLDER [--seeds 0 1 2] [--epochs 100]

SHARED holds photos/flickr8k.csv (file, caption, captions_all), photos/flickr8k/*.jpg and
clip_vit_b32/*.npz. Everything is built below FOLDER through the project's own stages; what is
there already is not made again, and a run that was interrupted goes on. Cost: about 80,000
training images a seed with the full-size student; RECIPE.md says what that took and what it gave.
"""

import argparse
import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.core.config import DistillConfig, EvaluateConfig, SelectConfig, load_section
from pipeline.core.presets import write_preset
from pipeline.core.records import Evaluation
from pipeline.models.card import read_card
from stages.distill import distill
from stages.download import download
from stages.evaluate import evaluate
from stages.import_embeddings import import_embeddings
from stages.select import select

ROOT = Path(__file__).parents[1]
CARD = ROOT / "manifests/teachers/clip-vit-b32.yaml"
PATHS = [("teacher_embed", key) for key in ("card", "prompts", "templates")]
PATHS += [("evaluate", "templates")]
BATCH = 64
RECIPE = {
    "loss": {"l1": 1.0, "cosine": 0.0, "relational": 0.25, "caption": 0.0},
    "relational_scale": 10.0,
    "views": 1,
    "color_jitter": 0.2,
    "min_crop_area": 0.4,
    "mixup": 1.0,
    "fixed_stem_frequencies": 8,
    "batch": BATCH,
    "learning_rate": 3e-4,
    "ema": 0.99,
}
SELECTION = SelectConfig(where="true", val=0.13526, test=0.14421, near_duplicates=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--change", type=json.loads, default={}, help="JSON over the recipe")
    options = parser.parse_args()
    params = params_file(options.shared, options.work)
    train = build(options.shared, options.work, params)["train"]
    steps = options.epochs * train // BATCH
    print(f"{train} images to train on, {steps} steps of {BATCH}, split {options.split}")
    print(f"{'seed':>4} {'cosine':>7} {'floor':>7} {'gain':>7} {'centred':>7} "
          f"{'R@1':>6} {'R@5':>6} {'chance':>6} {'text R@1':>8} {'teacher':>8}")  # fmt: skip
    for seed in options.seeds:
        print_row(seed, train_and_measure(options, params, steps, seed))


def params_file(shared: Path, work: Path) -> Path:
    """The preset of the real teacher, with this world's manifest."""
    work.mkdir(parents=True, exist_ok=True)
    params, manifest = work / "params.yaml", work / "flickr8k.parquet"
    with (shared / "photos/flickr8k.csv").open() as file:
        rows = list(csv.DictReader(file))
    captions = [json.loads(row["captions_all"]) for row in rows]
    pq.write_table(
        pa.table({"url": [f"file:{row['file']}" for row in rows], "caption": captions}), manifest
    )
    write_preset("clip-vit-b32", params, force=True)
    values = yaml.safe_load(params.read_text())
    root = shared.resolve() / "photos/flickr8k"
    values["download"] |= {
        "manifest": str(manifest),
        "root": str(root),
        "rows_per_shard": 500,
        "round": 0,
    }
    for section, key in PATHS:  # of this repository, wherever the command is started
        values[section][key] = str(ROOT / values[section][key])
    params.write_text(yaml.safe_dump(values))
    return params


def build(shared: Path, work: Path, params: Path) -> dict[str, int]:
    """data/images, data/teacher and data/selection; returns the selection's counts."""
    data, vectors = work / "data", shared / "clip_vit_b32"
    print(download(load_section(params, "download"), data, processes=2, threads=16))
    texts = [vectors / f"{name}_embeddings.npz" for name in ("flickr8k_caption", "lvis_class_name")]
    source = vectors / "flickr8k_image_embeddings.npz"
    summary = import_embeddings(data, source, teacher=read_card(CARD).named(), texts=texts)
    print({"images": summary.images, "texts": summary.texts} | summary.further_counts)
    counts = select(SELECTION, data)
    print(counts)
    return counts


def train_and_measure(options, params: Path, steps: int, seed: int) -> Evaluation:
    """The figures of one seed; the student replaces the one before."""
    data = options.work / "data"
    config = load_section(params, "distill").model_dump() | RECIPE | options.change
    config |= {"steps": steps, "seed": seed, "warmup": steps // 20}
    config["validate_every"] = max(1, steps // 10)
    speed = {"device": options.device, "workers": options.workers}
    distill(DistillConfig.model_validate(config), data, **speed)
    measure = load_section(params, "evaluate").model_dump()
    measure |= {"split": options.split, "batch": BATCH, "prompts": []}
    return evaluate(EvaluateConfig.model_validate(measure), data, **speed)


def print_row(seed: int, measured: Evaluation) -> None:
    cosine, recall = measured.fidelity["cosine"], measured.student_to_teacher
    print(f"{seed:4} {cosine.value:7.4f} {cosine.floor:7.4f} {cosine.value - cosine.floor:+7.4f} "
          f"{measured.fidelity['centred_cosine'].value:7.4f} {recall['R@1'].value:6.3f} "
          f"{recall['R@5'].value:6.3f} {recall['R@1'].floor:6.3f} ", end="")  # fmt: skip
    if measured.text_to_image:
        text = measured.text_to_image["R@1"]
        print(f"{text.value:8.3f} {text.ceiling:8.3f}", end="")
    print(flush=True)


if __name__ == "__main__":
    main()
