"""One student at several image sizes: how much of its retrieval survives another resolution?

Run:   make demo && python benchmarks/resolutions.py [--student data/student] [--sizes 48 56 64 72 96]
Cost:  one pass over the held-out split a size. Nothing is trained: positions are interpolated and
       the neighbourhood mask is built for the new grid.
"""

import argparse
from pathlib import Path

from held_out import held_out_metrics

from pipeline import Student

COLUMNS = ("cosine", "student-teacher R@1", "text-image R@1")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--student", type=Path, help="its folder; DATA/student where not given")
    parser.add_argument("--split", default="test")
    parser.add_argument("--sizes", type=int, nargs="+", default=[48, 56, 64, 72, 80, 96, 128])
    args = parser.parse_args()
    trained = Student.load(args.student or args.data / "student")
    own = held_out_metrics(trained, args.data, args.split)["text-image R@1"]
    print(f"| image size | grid | {' | '.join(COLUMNS)} | share kept |")
    print("| --- " * (len(COLUMNS) + 3) + "|")
    for size in args.sizes:
        student = trained.resized(size)
        figures = held_out_metrics(student, args.data, args.split)
        name = f"{size} px" + (" (trained)" if size == trained.config.image_size else "")
        cells = " | ".join(f"{figures[column]:.3f}" for column in COLUMNS)
        kept = figures["text-image R@1"] / own
        print(f"| {name} | {student.config.grid}² | {cells} | {kept:.0%} |", flush=True)


if __name__ == "__main__":
    main()
