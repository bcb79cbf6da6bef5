"""What a student makes of one image, patch by patch, as plain arrays.

g patches per side, E embedding size.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.models.inside import weight_entropy
from pipeline.models.student import Student


class PatchView(NamedTuple):
    """One image, seen by a student or by its teacher."""

    weights: np.ndarray  # (g, g), >= 0, sums to 1: the student's, or the class token's attention
    patches: np.ndarray  # (g, g, E), unit length
    embedding: np.ndarray  # (E,), unit length


@torch.inference_mode()
def student_view(student: Student, pixels: np.ndarray) -> PatchView:
    """(S, S, 3) uint8 -> what the student makes of it."""
    outputs, grid = student.outputs(student.as_input(pixels[None])), student.config.grid
    patches = F.normalize(outputs.patch_embeddings[0].float(), dim=-1)  # (N, E)
    return PatchView(
        outputs.patch_weights[0].float().cpu().numpy().reshape(grid, grid),
        patches.cpu().numpy().reshape(grid, grid, -1),
        F.normalize(outputs.embedding[0].float(), dim=-1).cpu().numpy(),
    )


def entropy(weights: np.ndarray) -> float:
    """Of weights that sum to 1, in bits: 0 for one patch, log2(N) for all alike."""
    return float(weight_entropy(torch.from_numpy(weights).reshape(1, -1))) / np.log(2)


def in_shares(weights: np.ndarray) -> np.ndarray:
    """Weights in multiples of the equal share: 1 on average, comparable between grids."""
    return weights * weights.size


def on_grid(weights: np.ndarray, grid: int) -> np.ndarray:
    """(g, g) -> (grid, grid), bilinear and antialiased, summing to 1 again."""
    tensor = torch.from_numpy(weights)[None, None]
    resized = F.interpolate(tensor, (grid, grid), mode="bilinear", antialias=True)[0, 0]
    return (resized / resized.sum()).numpy()


def agreement(weights: np.ndarray, others: np.ndarray) -> float:
    """Correlation in [-1, 1] of two maps, the first brought onto the second's grid; 0 for a flat one."""
    mine, theirs = on_grid(weights, len(others)).ravel(), others.ravel()
    mine, theirs = mine - mine.mean(), theirs - theirs.mean()
    return float(mine @ theirs / max(np.linalg.norm(mine) * np.linalg.norm(theirs), 1e-12))
