"""Students that differ in one thing, same budget, on the demo world: what does each choice buy?

Run:   make demo && python benchmarks/comparison.py {pools,masks,losses,averages} [--steps 250] [--seeds 1]
Trains one student per variant and seed from data/ through the stages themselves, in a folder of
its own, and prints one table: fidelity, retrieval, pointing, parameters, training images/s.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from pipeline import Student
from pipeline.core.config import DistillConfig, load_section
from stages.distill import distill
from stages.evaluate import evaluate

VARIANTS = {
    "pools": {
        "extra head": {"student": {"pool": "extra-head"}},
        "mean of patches": {"student": {"pool": "mean"}},
        "CLS token": {"student": {"pool": "cls"}},
        "CLS + distillation token": {"student": {"pool": "cls-distill"}},
    },
    "masks": {
        f"mask {'on' if mask else 'off'}, same_norm {'on' if norm else 'off'}": {
            "student": {"neighbourhood_mask": mask, "same_norm": norm}
        }
        for mask in (True, False)
        for norm in (True, False)
    },
    "losses": {
        name: {"loss": {"l1": 1.0, "cosine": 0.0, "relational": 0.0, "caption": 0.0} | weights}
        for name, weights in {
            "l1, the published one": {},
            "cosine": {"l1": 0.0, "cosine": 1.0},
            "l1 + relational 0.25": {"relational": 0.25},
            "l1 + relational 1": {"relational": 1.0},
            "l1 + caption 0.25": {"caption": 0.25},
            "l1 + caption 1": {"caption": 1.0},
        }.items()
    },
    "averages": {f"weights averaged with {decay}": {"ema": decay} for decay in (0.0, 0.99)},
}
COLUMNS = (
    ("cosine", "fidelity", "cosine"),
    ("centred cosine", "fidelity", "centred_cosine"),
    ("student-teacher R@1", "student_to_teacher", "R@1"),
    ("text-image R@1", "text_to_image", "R@1"),
    ("pointing", "pointing", "pointing"),
    ("pointing, centred", "pointing", "pointing_centred"),
    ("energy", "pointing", "energy"),
    ("energy, centred", "pointing", "energy_centred"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=VARIANTS)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    base = load_section(args.params, "distill").model_dump()
    if args.steps:
        base["steps"] = args.steps
    names = [name for name, *_ in COLUMNS]
    print("| student | " + " | ".join(names) + " | parameters | images/s |")
    print("| --- " * (len(names) + 3) + "|")
    for variant, changes in VARIANTS[args.what].items():
        found = [run(args, changed(base, changes | {"seed": seed})) for seed in range(args.seeds)]
        mean = [statistics.mean(row[i] for row in found) for i in range(len(found[0]))]
        *figures, parameters, rate = mean
        cells = [f"{figure:.3f}" for figure in figures]
        print(
            f"| {variant} | {' | '.join(cells)} | {parameters / 1e6:.2f} M | {rate:.0f} |",
            flush=True,
        )
    ends = json.loads((args.data / "evaluation/metrics.json").read_text())["pointing"]["pointing"]
    print(
        f"Pointing and energy by chance: {ends['floor']:.3f}; ever the centre: {ends['centre']:.3f}."
    )


def changed(values: dict, changes: dict) -> dict:
    """values with changes, one level deep."""
    nested = {k: values[k] | v if isinstance(v, dict) else v for k, v in changes.items()}
    return values | nested


def run(args, values: dict) -> list[float]:
    """The figures of one student, its parameters and the images/s of its training."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        for stage_folder in ("images", "teacher", "selection"):
            shutil.copytree(args.data / stage_folder, data / stage_folder)
        distill(DistillConfig.model_validate(values), data)
        figures = evaluate(load_section(args.params, "evaluate"), data)
        student = Student.load(data / "student")
        rates = [
            pq.read_table(path)["images_per_second"][0].as_py()
            for path in (data / "runs").glob("distill-*.parquet")
        ]
    found = [getattr(figures, group)[name].value for _, group, name in COLUMNS]
    return [*found, sum(p.numel() for p in student.parameters()), rates[0]]


if __name__ == "__main__":
    main()
