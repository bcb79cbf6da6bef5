"""A thousand photos and the real CLIP vectors of them, from the folder of photos to measured students."""

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
