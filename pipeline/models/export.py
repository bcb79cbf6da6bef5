"""A student as ONNX, for use without this project: written only once onnxruntime agrees with it.

Two forms. A single file: input `pixels` (B, 3, S, S) normalised float32, any B; outputs `embedding`
(B, E), `patch_weights` (B, N), `patch_embeddings` (B, N, E); its metadata say how to make the
pixels. The folder of two towers (`pipeline/explore/model_folder.py`): input `image`, and an
embedding of unit length. Needs the optional packages of `pip install "extrahead[export]"`.
Cost: some ten seconds.
"""

import contextlib
import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_file, write_json
from pipeline.data.pixels import NotAnImage, decode
from pipeline.data.shards import read_shard, shard_paths
from pipeline.models.onnx_files import (
    add_metadata,
    need,
    quantise,
    run_onnx,
    store_as_float16,
    write_onnx,
)
from pipeline.models.preprocessing import square_pixels
from pipeline.models.student import Outputs, Student

TOLERANCE = 1e-4  # largest difference between onnxruntime and PyTorch, of values of size about 1
IMAGES = 256  # stored images on which a smaller copy is compared
NEIGHBOURS = 10
LEAST_OVERLAP = 0.9  # of the nearest neighbours by a smaller copy and by the float32 model
LEAST_COSINE = 0.999  # of weights stored as float16
TOWER = ["image_embedding", "patch_weights", "patch_embeddings"]  # the first one is what counts


class _AllOutputs(nn.Module):
    def __init__(self, student: Student, unit: bool):
        super().__init__()
        self.student, self.unit = student, unit

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        embedding, *more = self.student.outputs(pixels)
        if self.unit:
            embedding = nn.functional.normalize(embedding, dim=-1)
        return embedding, *more


def export_student(student_folder: Path, out: Path, *, int8: bool = False) -> str:
    """What `pipeline export --format onnx` does: write out, with int8 also NAME.int8.onnx.

    Returns a summary. The quantised student is compared with the float one on images of
    data/images, the folder beside student_folder; raises PipelineError where it ranks otherwise.
    """
    student, out = Student.load(student_folder), Path(out)
    deviation = export_onnx(student, out)
    summary = f"{out} written: onnxruntime within {deviation:.0e} of PyTorch"
    if int8:
        small = out.with_suffix(".int8.onnx")
        overlap = quantise_onnx(
            out, small, stored_pixels(student_folder.parent / "images", student)
        )
        fraction = small.stat().st_size / out.stat().st_size
        summary += f"\n{small} written: {fraction:.0%} of the size, {overlap_text(overlap)}"
    return summary


def export_onnx(student: Student, file: Path | str) -> float:
    """Write a student; returns the largest difference from PyTorch, at most TOLERANCE.

    Raises PipelineError where a package is missing or the file answers otherwise.
    """
    need("onnx", "onnxruntime", "onnxscript")
    deviation = float("nan")

    def write(partial: Path) -> None:
        nonlocal deviation
        deviation = _export(student, partial, "pixels", list(Outputs._fields), unit=False)
        preprocessing = student.preprocessing
        facts = {"mean": json.dumps(preprocessing.mean), "std": json.dumps(preprocessing.std)}
        size = str(student.config.image_size)
        facts |= {"image_size": size, "interpolation": preprocessing.interpolation}
        add_metadata(partial, facts | {"resize_mode": preprocessing.resize_mode})

    write_file(Path(file), write)
    return deviation


def export_image_tower(student: Student, folder: Path) -> float:
    """Write folder/model.onnx (input `image`) and folder/preprocess_cfg.json, as open_clip names
    its values; returns the largest difference from PyTorch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deviation = _export(student, folder / "model.onnx", "image", TOWER, unit=True)
    how = student.preprocessing
    preprocessing: dict[str, Any] = {"size": [student.config.image_size] * 2, "mode": "RGB"}
    preprocessing |= {"mean": list(how.mean), "std": list(how.std)}
    preprocessing |= {"interpolation": how.interpolation, "resize_mode": how.resize_mode}
    write_json(folder / "preprocess_cfg.json", preprocessing)
    return deviation


def quantise_onnx(file: Path | str, out: Path | str, pixels: np.ndarray) -> float:
    """Write an int8 copy of an exported student; returns the overlap of `neighbour_overlap`.

    pixels: (B, 3, S, S) normalised float32, real images. Raises PipelineError, and writes nothing,
    where the overlap is below LEAST_OVERLAP.
    """
    overlap = float("nan")

    def write(partial: Path) -> None:
        nonlocal overlap
        quantise(Path(file), partial)
        overlap = neighbour_overlap(run_onnx(Path(file), pixels)[0], run_onnx(partial, pixels)[0])
        check_overlap(overlap, "the student in int8")

    write_file(Path(out), write)
    return overlap


def shrink_image_tower(file: Path, weights: str, pixels: np.ndarray) -> str:
    """Replace an exported tower by its copy in `int8` or `float16`; returns what that costs.

    pixels: (B, 3, S, S) normalised float32, real images. Raises PipelineError where it costs too
    much.
    """
    small, exact = file.with_suffix(".small"), run_onnx(file, pixels)[0]
    if weights == "int8":
        overlap = quantise_onnx(file, small, pixels)
        small.replace(file)
        return overlap_text(overlap)
    store_as_float16(file, small)
    cosine = float((exact * run_onnx(small, pixels)[0]).sum(axis=1).min())
    check_cosine(cosine, "the student stored as float16")
    small.replace(file)
    return f"least cosine to float32 {cosine:.5f}"


def neighbour_overlap(exact: np.ndarray, small: np.ndarray) -> float:
    """Two (n, E) matrices of embeddings of the same images -> overlap@10 in [0, 1]: the mean
    fraction of each image's ten nearest others that are the same by both.
    """
    nearest = []
    for vectors in (exact, small):
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        scores = unit @ unit.T
        np.fill_diagonal(scores, -np.inf)
        k = min(NEIGHBOURS, len(scores) - 1)
        nearest.append(np.argsort(-scores, axis=1, kind="stable")[:, :k])
    if nearest[0].shape[1] == 0:
        return 1.0
    common = [len(set(a) & set(b)) for a, b in zip(*map(np.ndarray.tolist, nearest), strict=True)]
    return float(np.mean(common) / nearest[0].shape[1])


def check_overlap(overlap: float, name: str) -> None:
    """Raises PipelineError below LEAST_OVERLAP."""
    if not overlap >= LEAST_OVERLAP:
        raise PipelineError(
            f"{name} ranks otherwise: overlap@{NEIGHBOURS} with float32 is {overlap:.2f}, at least "
            f"{LEAST_OVERLAP} is wanted. It was not written; export without --int8, or with --fp16."
        )


def check_cosine(cosine: float, name: str) -> None:
    """Raises PipelineError below LEAST_COSINE."""
    if not cosine >= LEAST_COSINE:
        raise PipelineError(
            f"{name} has a cosine of {cosine:.4f} to float32, at least {LEAST_COSINE} is wanted. "
            "It was not written; export without --fp16."
        )


def check_deviation(deviation: float, name: str) -> None:
    """Raises PipelineError above TOLERANCE."""
    if not deviation <= TOLERANCE:
        raise PipelineError(
            f"onnxruntime differs from PyTorch by {deviation:.1e}, expected at most {TOLERANCE}; "
            f"{name} was not written. Try another version of onnxruntime."
        )


def overlap_text(overlap: float) -> str:
    return f"overlap@{NEIGHBOURS} with float32 {overlap:.3f} on stored images"


def stored_pixels(images: Path, student: Student) -> np.ndarray:
    """(B, 3, S, S) float32: the first good images of data/images as the student wants them."""
    pixels = np.stack(list(itertools.islice(_squares(images, student), IMAGES)) or [[]])
    if not pixels.size:
        raise PipelineError(f"{images} holds no good image. Run `pipeline download` first.")
    return student.as_input(pixels).contiguous().numpy()


def _squares(images: Path, student: Student) -> Iterator[np.ndarray]:
    """(S, S, 3) uint8, one after the other, opening no more shards than are asked for."""
    for shard in shard_paths(images, "download"):
        for jpg in read_shard(shard, "download", ["jpg"])["jpg"].drop_null().to_pylist():
            with contextlib.suppress(NotAnImage):
                yield square_pixels(decode(jpg), student.preprocessing)


def _export(student: Student, file: Path, given: str, names: list[str], unit: bool) -> float:
    """Write and compare; raises PipelineError where the file answers otherwise."""
    student = copy.deepcopy(student).cpu().float().eval()
    module, size = _AllOutputs(student, unit), student.config.image_size
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, size, size, generator=generator) for n in (1, 3)]
    write_onnx(module, batches[1], file, given, names)
    deviation = 0.0
    for pixels in batches:
        with torch.no_grad():
            ours = module(pixels)
        theirs = run_onnx(file, pixels.numpy())
        for a, b in zip(ours, theirs, strict=True):
            deviation = max(deviation, float(np.abs(a.numpy() - b).max()))
    check_deviation(deviation, file.name.removesuffix(".partial"))
    return deviation
