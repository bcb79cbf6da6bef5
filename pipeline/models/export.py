"""A student as ONNX, for use without this project: written only once onnxruntime agrees with it.

Input `pixels` (B, 3, S, S) normalised float32, any B; outputs `embedding` (B, E), `patch_weights`
(B, N), `patch_embeddings` (B, N, E). The file's metadata say how to make the pixels: mean, std,
image_size, interpolation. Needs the optional packages of `pip install "extrahead[export]"`.
Cost: some ten seconds.
"""

import contextlib
import copy
import importlib
import itertools
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.errors import PipelineError
from pipeline.core.provenance import write_file
from pipeline.data.pixels import NotAnImage, decode
from pipeline.data.shards import read_shard, shard_paths
from pipeline.data.views import canonical_view, view_pixels
from pipeline.models.student import Outputs, Student

TOLERANCE = 1e-4  # largest difference between onnxruntime and PyTorch, of values of size about 1
IMAGES = 64  # how many the loss by quantisation is measured on


class _AllOutputs(nn.Module):
    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.student.outputs(pixels))


def export_student(student_folder: Path, out: Path, *, int8: bool = False) -> str:
    """What `pipeline export` does: write out, with int8 also NAME.int8.onnx; returns a summary.

    The quantised student is compared with the float one on images of data/images, the folder
    beside student_folder.
    """
    student, out = Student.load(student_folder), Path(out)
    deviation = export_onnx(student, out)
    summary = f"{out} written: onnxruntime within {deviation:.0e} of PyTorch"
    if int8:
        small = out.with_suffix(".int8.onnx")
        cosine = quantise_onnx(out, small, stored_pixels(student_folder.parent / "images", student))
        share = small.stat().st_size / out.stat().st_size
        summary += f"\n{small} written: {share:.0%} of the size, mean cosine to it {cosine:.4f}"
    return summary


def export_onnx(student: Student, file: Path | str) -> float:
    """Write a student as ONNX; returns the largest difference from PyTorch, at most 1e-4.

    Checked with batches of 1 and 3 before the file gets its name. Raises PipelineError where the
    optional packages are missing or the check fails.
    """
    _need("onnx", "onnxruntime", "onnxscript")
    student = copy.deepcopy(student).cpu().float().eval()
    size = student.config.image_size
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, size, size, generator=generator) for n in (1, 3)]
    deviation = float("nan")

    def write(partial: Path) -> None:
        nonlocal deviation
        _export(student, batches[1], partial)
        _describe(student, partial)
        deviation = max(_deviation(student, partial, pixels) for pixels in batches)
        if not deviation <= TOLERANCE:
            raise PipelineError(
                f"onnxruntime differs from PyTorch by {deviation:.1e}, expected at most {TOLERANCE}"
                f"; {file} was not written. Try another version of onnxruntime."
            )

    write_file(Path(file), write)
    return deviation


def quantise_onnx(file: Path | str, out: Path | str, pixels: np.ndarray) -> float:
    """Write an int8 copy (weights quantised, activations as they come) of an exported student.

    pixels: (B, 3, S, S) normalised float32, real images. Returns the mean cosine between the two
    files' embeddings of them, 1 at best.
    """
    _need("onnx", "onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def write(partial: Path) -> None:
        quantize_dynamic(str(file), str(partial), weight_type=QuantType.QInt8)

    try:
        write_file(Path(out), write)
        exact, small = _run(Path(file), pixels).embedding, _run(Path(out), pixels).embedding
    except Exception as error:  # onnxruntime's own exceptions share no base below Exception
        raise PipelineError(f"{file} was not quantised: {error}") from None
    return float(torch.nn.functional.cosine_similarity(exact, small).mean())


def stored_pixels(images: Path, student: Student) -> np.ndarray:
    """(B, 3, S, S) float32: the first good images of data/images as the student wants them."""
    found = np.stack(list(itertools.islice(_squares(images, student), IMAGES)) or [[]])
    if not found.size:
        raise PipelineError(f"{images} holds no good image. Run `pipeline download` first.")
    return student.normalise(torch.from_numpy(found).permute(0, 3, 1, 2)).contiguous().numpy()


def _squares(images: Path, student: Student) -> Iterator[np.ndarray]:
    """(S, S, 3) uint8, one after the other, opening no more shards than are asked for."""
    size, how = student.config.image_size, student.preprocessing.interpolation
    for shard in shard_paths(images, "download"):
        for jpg in read_shard(shard, "download", ["jpg"])["jpg"].drop_null().to_pylist():
            with contextlib.suppress(NotAnImage):
                image = decode(jpg)
                view = canonical_view(image.shape[1], image.shape[0])
                yield view_pixels(image, view[:4], view.flip, size, how)


def _export(student: Student, example: Tensor, partial: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every operator it meets
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _AllOutputs(student),
            (example,),
            partial,
            dynamo=True,
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            input_names=["pixels"],
            output_names=list(Outputs._fields),
            external_data=False,
            verbose=False,
        )


def _describe(student: Student, partial: Path) -> None:
    import onnx

    model = onnx.load(partial)
    how = student.preprocessing
    facts = {
        "mean": json.dumps(how.mean),
        "std": json.dumps(how.std),
        "image_size": str(student.config.image_size),
        "interpolation": how.interpolation,
    }
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, partial)


def _run(file: Path, pixels: np.ndarray) -> Outputs:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return Outputs(*map(torch.from_numpy, session.run(list(Outputs._fields), {"pixels": pixels})))


def _deviation(student: Student, file: Path, pixels: Tensor) -> float:
    with torch.no_grad():
        ours = student.outputs(pixels)
    theirs = _run(file, pixels.numpy())
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def _need(*packages: str) -> None:
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise PipelineError(
                f'no package {package}. Run `pip install "extrahead[export]"` first.'
            ) from None
