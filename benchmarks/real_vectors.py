"""Distil real CLIP vectors that others computed, from photos to figures, and print the table.

    python benchmarks/real_vectors.py SHARED --work FOLDER [--seeds 0 1 2] [--epochs 100]

SHARED holds photos/flickr8k.csv (file, caption, captions_all), photos/flickr8k/*.jpg and
clip_vit_b32/*.npz. Everything is built below FOLDER through the project's own stages; what is
there already is not made again, and a run that was interrupted goes on. Cost: about 80,000
training images a seed with the full-size student; RECIPE.md says what that took and what it gave.
"""

import argparse
import json
from pathlib import Path

from flickr8k import BATCH, build, params_file, train_and_measure

from pipeline.core.records import Evaluation


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
