"""What the benchmarks measure of a student on a held-out split, at view 0."""

import statistics
from pathlib import Path

import numpy as np
import torch

from pipeline import Student
from pipeline.data.embeddings import load_text_embeddings, split_vectors, training_mean
from pipeline.evaluation.metrics import fidelity
from pipeline.evaluation.retrieval import hits_at, ranks_of_own
from pipeline.training.batches import held_out_batches
from pipeline.training.dataset import Dataset


def held_out_metrics(student: Student, data: Path, split: str = "test") -> dict[str, float]:
    """cosine, its floor, centred cosine, student-teacher R@1 and, with captions, text-image R@1."""
    ids, teacher = split_vectors(data, split)
    place = {key: i for i, key in enumerate(ids)}
    dataset = Dataset(data, split, student.config.image_size, student.preprocessing.interpolation)
    found = np.zeros_like(teacher)
    for batch in held_out_batches(dataset, range(len(dataset)), 128, workers=2):
        with torch.inference_mode():
            pixels = student.as_input(batch.pixels)
            found[[place[key] for key in batch.ids]] = student(pixels)[0].float().numpy()
    close = fidelity(found, teacher, training_mean(data))
    figures = {"cosine": close["cosine"].value, "floor": close["cosine"].floor}
    figures["centred cosine"] = close["centred_cosine"].value
    own = np.arange(len(ids))
    figures["student-teacher R@1"] = float(hits_at(1, ranks_of_own(found, teacher, own)).mean())
    _, owners, texts = load_text_embeddings(data, "image_id IS NOT NULL", [])
    mine = [i for i, key in enumerate(owners) if key in place]
    if mine:
        right = np.array([place[owners[i]] for i in mine])
        ranks = ranks_of_own(texts[mine], found, right)
        figures["text-image R@1"] = float(hits_at(1, ranks).mean())
    return figures


def over_seeds(values: list[float]) -> str:
    """Their mean, and the largest distance from it where there are several."""
    mean = statistics.mean(values)
    spread = max(abs(value - mean) for value in values)
    return f"{mean:.3f}" + (f" ± {spread:.3f}" if len(values) > 1 else "")
