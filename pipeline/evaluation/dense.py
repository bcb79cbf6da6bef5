"""The cosine of every patch to every prompt, of a batch of images at any size."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import PipelineError
from pipeline.evaluation.segmentation import Cosines
from pipeline.models.student import Student


@torch.inference_mode()
def student_cosines(student: Student, pixels: Tensor, prompts: Tensor) -> Cosines:
    """pixels (b, 3, S, S) uint8 at the student's own size; prompts (P, E) of unit length."""
    outputs = student.outputs(student.normalise(pixels.to(student.mean.device)))
    prompts = prompts.to(outputs.embedding)
    patches = F.normalize(outputs.patch_embeddings.float(), dim=-1) @ prompts.T  # (b, N, P)
    images = F.normalize(outputs.embedding.float(), dim=-1) @ prompts.T
    grid = student.config.grid
    return Cosines(patches.transpose(1, 2).unflatten(2, (grid, grid)), images)


def sliding_cosines(student: Student, pixels: Tensor, prompts: Tensor, stride: int) -> Cosines:
    """pixels (b, 3, H, W) uint8, no smaller than the student: windows of its own size over them.

    stride (px), as H and W a multiple of the patch size: windows begin so far apart, and the last
    ones end with the image. Cosines that windows share are averaged, those of whole images over
    all windows. Patches (b, P, H / p, W / p). Raises PipelineError for sizes that do not fit.
    """
    side, patch = student.config.image_size, student.config.patch_size
    height, width = pixels.shape[2:]
    if min(height, width) < side or height % patch or width % patch or stride % patch:
        raise PipelineError(
            f"windows of {side} px every {stride} px over {width} x {height} px: the stride and the "
            f"sides must be multiples of the patch size {patch}, and the sides at least {side}."
        )
    total = torch.zeros(len(pixels), len(prompts), height // patch, width // patch)
    total, times_covered = total.to(student.mean.device), torch.zeros(total.shape[2:])
    times_covered, images = times_covered.to(total.device), []
    for top in window_starts(height, side, stride):
        for left in window_starts(width, side, stride):
            window = pixels[:, :, top : top + side, left : left + side]
            cosines = student_cosines(student, window, prompts)
            rows, columns = (slice(at // patch, (at + side) // patch) for at in (top, left))
            total[:, :, rows, columns] += cosines.patches
            times_covered[rows, columns] += 1
            images.append(cosines.images)
    return Cosines(total / times_covered, torch.stack(images).mean(dim=0))


def window_starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows of `side` begin on an axis: every `stride`, and one that ends with the axis."""
    return sorted({*range(0, length - side, stride), length - side})
