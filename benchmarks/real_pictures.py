"""Search real photos and look at them with no teacher weights at all, by the command lines themselves.

    python benchmarks/real_pictures.py SHARED --work FOLDER [--epochs 100] [--out pictures]

SHARED and FOLDER are those of real_vectors.py, whose student is taken where FOLDER holds one and
trained here otherwise (a few epochs show the pictures, not their quality). The texts are stored
ones: names of things ("a dog") and captions. Prints every command and what it said; the PNGs stay
in the folder of --out, and the photos in them are for research only.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from flickr8k import BATCH, build, params_file, train_and_measure

SEARCHES = ["a dog", "a bicycle", "a ball"]
LOOKS = ["a dog", "a person", "a ball"]
MISSING = "a photo of a dog"  # which nobody has embedded
PHOTOS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shared", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    parser.set_defaults(split="val", change={})
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    params = ensure_student(options)
    where = ["--params", params, "--data", options.work / "data"]
    with np.load(options.shared / "clip_vit_b32/flickr8k_caption_embeddings.npz") as captions:
        pairs = zip(captions["image"].tolist(), captions["caption"].tolist(), strict=True)
        caption_of = dict(pairs)  # one of each photo's five
    photos = sorted(caption_of)[:PHOTOS]
    for i, text in enumerate([*SEARCHES, caption_of[photos[0]]]):
        said(["search", text, "--out", options.out / f"search-{i}.png", *where])
    for i, file in enumerate(photos):
        photo = options.shared / "photos/flickr8k" / file
        texts = [caption_of[file], *LOOKS, MISSING]
        said(["look", photo, *texts, "--out", options.out / f"look-{i}.png", *where])
    said(["search", "--image", photo, "--out", options.out / "search-image.png", *where])
    said(["search", MISSING, "--out", options.out / "none.png", *where])


def ensure_student(options) -> Path:
    """Parameters of a folder in which every stage has run."""
    params = params_file(options.shared, options.work)
    if not (options.work / "data/evaluation").is_dir():
        steps = options.epochs * build(options.shared, options.work, params)["train"] // BATCH
        train_and_measure(options, params, steps, seed=0)
    return params


def said(arguments: list) -> None:
    """Run `pipeline` as a user does: it downloads no weights to look at pictures."""
    words = [str(word) for word in arguments]
    print(f"\n$ {shlex.join(['pipeline', *words])}", flush=True)
    subprocess.run([sys.executable, "-m", "pipeline.cli", *words], stderr=subprocess.STDOUT)


if __name__ == "__main__":
    main()
