"""How close teacher_embed comes to the teacher's bare forward pass, and how far ahead of a plain loop.

Run:   python benchmarks/teacher_embed_speed.py [--photos FOLDER] [--images 512] [--rounds 3]
Prints images/s of three things in turn, several rounds in one run, and the ratios of the medians:
  bare       the same model and dtype on one ready batch of pixels
  stage      decode, crop, embed and write a shard, as the stage does
  reference  float32, PIL, open_clip's own transform, one image batch after another
"""

import argparse
import io
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from by_turns import seconds_by_turns
from PIL import Image
from worlds import FULL_SIZE, full_size_card, photos, write_images

from pipeline.core.config import load_section
from pipeline.core.devices import fast_dtype, pick_device
from pipeline.data import shards
from pipeline.models.open_clip import open_clip
from pipeline.models.teacher import Teacher
from pipeline.models.teacher_shards import view_tables

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--photos", type=Path, help="folder of images; drawn where not given")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        jpgs = photos(args.photos, args.images)
        shard = folder / "00000.parquet"
        write_images(shard, jpgs)
        card = full_size_card(folder)
        exact, teacher = (Teacher(card, device) for _ in range(2))
        ready = np.random.default_rng(0).integers(0, 256, (BATCH, 224, 224, 3), np.uint8)
        dtype = fast_dtype(device)
        teacher = teacher.cast(dtype)
        preset = Path(__file__).parents[1] / "pipeline/core/presets/clip-vit-b32.yaml"
        config = load_section(preset, "teacher_embed").model_copy(
            update={"views": 1, "batch": BATCH}
        )
        transform = open_clip.create_model_and_transforms(FULL_SIZE, load_weights=False)[2]

        some = jpgs[: max(BATCH, len(jpgs) // 4) // BATCH * BATCH]

        def bare() -> None:
            pixels = teacher.normalised(ready)
            for _ in range(args.images // BATCH):
                with torch.inference_mode():
                    teacher.model.encode_image(pixels)

        def stage() -> None:
            tables = view_tables(teacher, shard, config, {}, args.workers, lambda _: None)
            schema = shards.teacher_schema(teacher.embedding_size)
            shards.write_shard(folder / "out.parquet", schema, tables, {})

        def reference() -> None:
            for start in range(0, len(some), BATCH):
                images = [Image.open(io.BytesIO(j)) for j in some[start : start + BATCH]]
                pixels = torch.stack([transform(image) for image in images]).to(device)
                with torch.inference_mode():
                    torch.nn.functional.normalize(exact.model.encode_image(pixels), dim=-1).cpu()

        counts = {"bare": args.images // BATCH * BATCH, "stage": len(jpgs), "reference": len(some)}
        calls = {"bare": bare, "stage": stage, "reference": reference}
        bare()
        times = seconds_by_turns(calls, args.rounds, device=device.type)
    median = {name: counts[name] / statistics.median(found) for name, found in times.items()}
    print(
        f"{len(jpgs)} images, batch {BATCH}, {device}, {dtype}, {torch.get_num_threads()} threads"
    )
    for name, rate in median.items():
        print(f"  {name:<10} {rate:8.1f} images/s")
    print(f"stage / bare forward pass: {median['stage'] / median['bare']:.2f}")
    print(f"stage / float32 reference loop: {median['stage'] / median['reference']:.2f}")


if __name__ == "__main__":
    main()
