"""Small worlds for tests: pictures, manifests, parameters, and a real open_clip teacher of random
weights that fits into a few megabytes. `small_world` in conftest.py puts them together.
"""

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from pipeline.core.config import DownloadConfig, SelectConfig, TeacherEmbedConfig

EMBEDDING_SIZE, IMAGE_SIZE = 32, 32
PROMPTS = Path(__file__).parents[2] / "manifests/prompts"
TEMPLATES, CLASSES = PROMPTS / "templates.txt", PROMPTS / "demo-classes.txt"
FORGET = Path(__file__).parents[2] / "manifests/forget.txt"


def picture(seed: int, width: int = 48, height: int = 40, kind: str = "PNG", **options) -> bytes:
    """A smooth random picture: a function of its arguments."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
    image.save(file, kind, **options)
    return file.getvalue()


def write_manifest(path: Path, rows: list[dict]) -> Path:
    """Rows (url and other columns; the first row names them all) as a CSV manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def download_config(manifest: Path, root: Path, **changes) -> DownloadConfig:
    values = {
        "manifest": str(manifest),
        "root": str(root),
        "store": "local",
        "rows_per_shard": 21,
        "round": 0,
        "image_size": IMAGE_SIZE,
        "quality": 95,
        "timeout": 5.0,
        "retries": 0,
        "max_bytes": 1_000_000,
        "max_pixels": 1_000_000,
        "max_redirects": 3,
        "per_host": 8,
        "allow": ["127.0.0.0/8"],
        "ports": [],
        "robots": True,
        "columns": {},
        "changed": "refuse",
        "forget": str(FORGET),
    }
    return DownloadConfig(**values | changes)


def teacher_config(card: Path, prompts: Path, **changes) -> TeacherEmbedConfig:
    values = {
        "card": str(card),
        "store": "local",
        "views": 2,
        "crop_area": [0.5, 1.0],
        "crop_ratio": [0.75, 1.3333],
        "seed": 0,
        "dtype": "float32",
        "batch": 8,
        "prompts": str(prompts),
        "templates": str(TEMPLATES),
    }
    return TeacherEmbedConfig(**values | changes)


def select_config(**changes) -> SelectConfig:
    values = {"where": "true", "val": 0.2, "test": 0.3, "near_duplicates": 1.0}
    return SelectConfig(**values | changes)


def segmentation(card: Path = Path("no-card.yaml"), **changes) -> dict:
    """How masks would be judged, were there any: nothing reads the files before that."""
    values = {
        "classes": str(CLASSES), "background": "threshold", "zero_is": "background", "stride": 32,
        "image_size": IMAGE_SIZE, "window": IMAGE_SIZE, "card": str(card),
    }  # fmt: skip
    return values | changes


def write_teacher(folder: Path, seed: int = 0, context: int = 16) -> Path:
    """A CLIP of 32 px, width 32, one layer a tower, random weights; returns its card."""
    import torch
    from safetensors.torch import save_file

    from pipeline.models.open_clip import open_clip

    model = {
        "embed_dim": EMBEDDING_SIZE,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": context,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model, "preprocess_cfg": {"interpolation": "bicubic"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(seed)
    weights = folder / "open_clip_model.safetensors"
    save_file({k: v.clone() for k, v in open_clip.CLIP(**model).state_dict().items()}, weights)
    card = {
        "name": "tiny",
        "model": "local-dir:.",
        "pretrained": None,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "config_sha256": hashlib.sha256(json.dumps(config).encode()).hexdigest(),
        "activation": "gelu",
        "golden": None,
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    return folder / "card.yaml"


def run_code(code: str, *arguments, **options) -> subprocess.Popen:
    """A real second process, our modules on its path."""
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def end_at_step(steps: int, *names: str) -> None:
    """End this process without warning at its call number `steps`, from 0, of these of os."""
    left = iter(range(steps))

    def ending(real: Callable) -> Callable:
        def step(*arguments, **options):
            if next(left, None) is None:
                os._exit(9)
            return real(*arguments, **options)

        return step

    for name in names:
        setattr(os, name, ending(getattr(os, name)))


@dataclass(frozen=True)
class World:
    """Pictures below root, their manifest, and data/ as download and teacher_embed left it."""

    root: Path
    manifest: Path
    card: Path
    prompts: Path
    data: Path
    rows: list[dict]


def forge_stamp(stage_folder: Path, change: Callable[[dict], object]) -> None:
    """Edit the stamp of a finished stage in place, under a digest that fits."""
    from pipeline.core.layout import STAMP_FILE
    from pipeline.core.provenance import sealed, write_json

    stamp = json.loads((stage_folder / STAMP_FILE).read_text())
    change(stamp)
    write_json(stage_folder / STAMP_FILE, sealed(stamp))  # a new file: a hard link leads elsewhere


def write_params(path: Path, **sections) -> Path:
    """The demo's parameters with other sections (models) in their place."""
    from pipeline.core.presets import write_preset

    write_preset("demo", path, force=True)
    values = yaml.safe_load(path.read_text())
    values |= {name: section.model_dump() for name, section in sections.items()}
    path.write_text(yaml.safe_dump(values))
    return path
