"""What is a published student worth as a start? A quarter of the scenes and steps, warm and cold.

Run:   make demo && python benchmarks/warm_start.py [--seeds 3] [--device cuda]

The demo's training scenes are cut by image id: three quarters make the start, a student of 48 px
(the demo's see 64), as somebody else might have published it; the last quarter, with a quarter of the
steps, is what one has oneself. Held out: the demo's own validation split, or --split test.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from held_out import held_out_metrics, over_seeds

from pipeline import Student
from pipeline.core.config import DistillConfig, load_section
from pipeline.core.devices import pick_device
from pipeline.core.records import Preprocessing
from pipeline.data.embeddings import training_mean
from pipeline.training.batches import training_batches
from pipeline.training.dataset import Dataset
from pipeline.training.distributed import Ranks
from pipeline.training.sampler import Sampler
from pipeline.training.trainer import Trainer
from pipeline.training.warm_start import warm_student

COLUMNS = ("cosine", "centred cosine", "student-teacher R@1", "text-image R@1")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of the full budget; the demo's where not given")
    parser.add_argument("--split", default="val")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    base = load_section(args.params, "distill")
    base = base.model_copy(update={"steps": args.steps or base.steps})
    with tempfile.TemporaryDirectory() as scratch:
        most, own = (part_of(args.data, Path(scratch) / name, name) for name in ("most", "own"))
        shape = base.student.model_copy(update={"image_size": 48})
        small = base.model_copy(update={"student": shape, "image_sizes": [48]})
        start = Path(scratch) / "start"
        trained(small, most, device).save(start, provenance={})
        quarter = {"steps": base.steps // 4, "warmup": base.warmup // 4}
        print(f"| student | {' | '.join(COLUMNS)} |\n| --- " + "| --- " * len(COLUMNS) + "|")
        as_it_is = warm_student(start, base.student, Preprocessing())
        line("the start at 64 px, untrained", [held_out_metrics(as_it_is.eval(), own, args.split)])
        starts = {"cold": cold, "cold, from the mean embedding": from_the_mean}
        starts["warm"] = lambda config, mean: warm_student(start, config.student, Preprocessing())
        for name, first in starts.items():
            found = []
            for seed in range(args.seeds):
                config = base.model_copy(update=quarter | {"seed": seed})
                student = trained(config, own, device, first)
                found.append(held_out_metrics(student, own, args.split))
            line(f"{name}, a quarter of scenes and steps, {args.seeds} seeds", found)


def cold(config: DistillConfig, mean: np.ndarray) -> Student:
    return Student(config.student, Preprocessing())


@torch.no_grad()
def from_the_mean(config: DistillConfig, mean: np.ndarray) -> Student:
    """The last layer's bias points where the mean embedding does, as long as tokens are, so that the
    first output is nearly that: what a student can know before it has seen an image.
    """
    student, size = cold(config, mean), config.student.embedding_size
    bias = student.transformer.resblocks[-1].mlp.c_proj.bias.view(config.student.heads, -1)
    direction = torch.from_numpy(mean / np.linalg.norm(mean)) * size**0.5
    bias[:, :-1] = direction.view(config.student.heads, -1)
    return student


def part_of(data: Path, copy: Path, name: str) -> Path:
    """data/ with the training scenes of one part: image ids that start with 0 to 3, or the rest."""
    for folder in ("images", "teacher"):
        shutil.copytree(data / folder, copy / folder)
    table = pq.read_table(data / "selection/selection.parquet")
    digits = pc.utf8_slice_codeunits(table["image_id"], 0, 1)
    first = pc.is_in(digits, pa.array(list("0123")))
    mine = first if name == "own" else pc.invert(first)
    mine = pc.or_(mine, pc.not_equal(table["split"], "train"))
    at = table.schema.get_field_index("keep")
    table = table.set_column(at, table.schema.field(at), pc.and_(table["keep"], mine))
    (copy / "selection").mkdir()
    pq.write_table(table, copy / "selection/selection.parquet")
    return copy


def trained(
    config: DistillConfig, data: Path, device: torch.device, first: Callable = cold
) -> Student:
    torch.manual_seed(config.seed)
    mean = training_mean(data)
    trainer = Trainer(config, first(config, mean), mean, Ranks(device))
    dataset = Dataset(data, "train", config.student.image_size, "bicubic")
    order = Sampler(dataset, config.seed, config.batch, config.shuffle_row_groups)
    for batch in training_batches(dataset, order, 0, config.steps, workers=2, device=device):
        trainer.train_step(batch)
    trainer.read()
    return trainer.averaged_student().cpu()


def line(name: str, found: list[dict]) -> None:
    cells = [over_seeds([metrics[column] for metrics in found]) for column in COLUMNS]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
