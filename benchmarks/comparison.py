"""Students that differ in one thing, same budget, on the demo world: what does each choice buy?

Run:   make demo && python benchmarks/comparison.py {pools,masks,losses,averages} [--steps 250] [--seeds 3]
Trains one student per variant and seed from data/ through the stage itself, in a folder of its own,
and prints one table: fidelity, retrieval, pointing, each with its spread over the seeds. Held out:
the validation split, since what is compared is chosen between; --split test reports what was chosen.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from held_out import held_out_metrics, over_seeds

from pipeline import Student
from pipeline.core.config import DistillConfig, load_section
from pipeline.evaluation.grounding import pointing_metrics
from stages.distill import distill

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
    *("cosine", "centred cosine", "student-teacher R@1", "text-image R@1"),
    *("pointing", "pointing_centred", "energy", "energy_centred"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=VARIANTS)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", default="val")
    parser.add_argument("--only", nargs="+", help="of the variants, these")
    args = parser.parse_args()
    base = load_section(args.params, "distill").model_dump()
    if args.steps:
        base["steps"] = args.steps
    print("| student | " + " | ".join(COLUMNS) + " | parameters |")
    print("| --- " * (len(COLUMNS) + 2) + "|")
    for variant in args.only or VARIANTS[args.what]:
        changes = VARIANTS[args.what][variant]
        found = [run(args, changed(base, changes | {"seed": seed})) for seed in range(args.seeds)]
        cells = [over_seeds([row[name] for row in found]) for name in COLUMNS]
        parameters = found[0]["parameters"] / 1e6
        print(f"| {variant} | {' | '.join(cells)} | {parameters:.2f} M |", flush=True)
    chance, centre = found[0]["chance"], found[0]["centre"]
    print(f"Pointing and energy by chance: {chance:.3f}; ever the centre: {centre:.3f}.")


def changed(values: dict, changes: dict) -> dict:
    """values with changes, one level deep."""
    nested = {k: values[k] | v if isinstance(v, dict) else v for k, v in changes.items()}
    return values | nested


def run(args, values: dict) -> dict[str, float]:
    """The figures of one student on the held-out split, and how many parameters it has."""
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        for stage_folder in ("images", "teacher", "selection"):
            shutil.copytree(args.data / stage_folder, data / stage_folder)
        distill(DistillConfig.model_validate(values), data)
        student = Student.load(data / "student")
        figures = held_out_metrics(student, data, args.split)
        pointing = pointing_metrics(data, args.split, student, 256, workers=2)
    assert pointing is not None, "the demo's scenes have boxes"
    figures |= {name: metric.value for name, metric in pointing.metrics.items()}
    ends = {"chance": pointing["pointing"].floor, "centre": pointing["pointing"].centre}
    return figures | ends | {"parameters": sum(p.numel() for p in student.parameters())}


if __name__ == "__main__":
    main()
