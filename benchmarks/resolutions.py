"""One student at several image sizes: how much of its retrieval survives another resolution?

Run:   make demo && python benchmarks/resolutions.py [--sizes 48 64 96 128]
Cost:  one pass over the held-out split a size. Nothing is trained: positions are interpolated and
       the neighbourhood mask is built for the new grid.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from pipeline import Student
from pipeline.data.targets import split_vectors, text_vectors
from pipeline.evaluation.metrics import cosine, ranks_of_own
from pipeline.training.batches import Rows, batches_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--split", default="test")
    parser.add_argument("--sizes", type=int, nargs="+", default=[48, 64, 96, 128])
    args = parser.parse_args()
    trained = Student.load(args.data / "student")
    ids, teacher = split_vectors(args.data, args.split)
    place = {key: i for i, key in enumerate(ids)}
    _, owners, texts = text_vectors(args.data, "image_id IS NOT NULL", [])
    mine = [i for i, key in enumerate(owners) if key in place]
    own = np.array([place[owners[i]] for i in mine])
    print("| image size | grid | cosine | student-teacher R@1 | text-image R@1 |")
    print("| --- | --- | --- | --- | --- |")
    for size in args.sizes:
        student = trained.resized(size)
        rows = Rows(args.data, args.split, size, student.preprocessing.interpolation)
        found = np.zeros_like(teacher)
        for batch in batches_of(rows, range(len(rows)), 128, workers=2):
            with torch.inference_mode():
                pixels = student.normalise(torch.from_numpy(batch.pixels).permute(0, 3, 1, 2))
                vectors = student(pixels)[0].numpy()
            found[[place[key] for key in batch.ids]] = vectors
        images = (ranks_of_own(found, teacher, np.arange(len(ids))) < 1).mean()
        captions = (ranks_of_own(texts[mine], found, own) < 1).mean()
        name = f"{size} px" + (" (trained)" if size == trained.config.image_size else "")
        mean = cosine(found, teacher).mean()
        print(f"| {name} | {student.config.grid}² | {mean:.3f} | {images:.3f} | {captions:.3f} |")


if __name__ == "__main__":
    main()
