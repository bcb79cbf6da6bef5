"""One student at several image sizes at once: the same weights, positions interpolated in the graph.

Unlike `Student.resized`, which copies, gradients flow back to the student that was given: this is
how a student learns several sizes.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from pipeline.models.student import Student

POSITIONS = "positional_embedding"


def positions_for(positions: Tensor, grid: int) -> Tensor:
    """(N, W) positions of a square grid -> (grid * grid, W), bicubic and antialiased."""
    own = round(len(positions) ** 0.5)
    if grid == own:
        return positions
    maps = positions.unflatten(0, (own, own)).permute(2, 0, 1)[None]  # (1, W, g, g)
    resized = F.interpolate(maps, size=(grid, grid), mode="bicubic", antialias=True)
    return resized[0].flatten(1).T


class ManySizes:
    """What a student gives for pixels of any of some sizes, each with the mask of its own grid."""

    def __init__(self, student: Student, sizes: list[int]):
        self.student = student
        others = [size for size in sizes if size != student.config.image_size]
        self._shells = {size: _ForLoss(student.resized(size)) for size in others}

    def embeddings_for_loss(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) normalised, S one of the sizes -> (T, B, E), with gradients."""
        if pixels.shape[-1] not in self._shells:
            return self.student.embeddings_for_loss(pixels)
        shell = self._shells[pixels.shape[-1]]
        shell.train(self.student.training)
        state: dict[str, Tensor] = {
            f"student.{name}": value for name, value in self.student.named_parameters()
        }
        name = f"student.{POSITIONS}"
        state[name] = positions_for(state[name], shell.student.config.grid)
        return functional_call(shell, state, (pixels,))


class _ForLoss(nn.Module):
    """`embeddings_for_loss` as a module's forward, which is what torch can call with other weights."""

    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, pixels: Tensor) -> Tensor:
        return self.student.embeddings_for_loss(pixels)
