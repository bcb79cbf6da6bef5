"""The published student, and the matrix products that no implementation of it can avoid."""

from collections.abc import Callable

import torch

from pipeline.core.config import StudentConfig

PUBLISHED = StudentConfig(
    image_size=224, patch_size=28, embedding_size=512, heads=16, layers=6,
    neighbourhood_mask=True, same_norm=True, pool="extra-head", temperature=1.0,
)  # fmt: skip


def bare_products(
    batch: int, config: StudentConfig, dtype: torch.dtype, device: str, train: bool
) -> Callable[[], None]:
    """The step's linear layers and nothing else: x W, and in training also g W^T and x^T g."""
    width, rows = config.embedding_size + config.heads, batch * config.grid**2
    shapes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    shapes = [(3 * config.patch_size**2, width)] + shapes * config.layers
    tensors = {
        shape: [torch.randn(*size, device=device).to(dtype)
                for size in ((rows, shape[0]), (shape[0], shape[1]), (rows, shape[1]))]
        for shape in set(shapes)
    }  # fmt: skip

    def step() -> None:
        for index, shape in enumerate(shapes):
            x, weight, gradient = tensors[shape]
            x @ weight
            if train:
                x.t() @ gradient
                if index:  # no gradient for pixels
                    gradient @ weight.t()

    return step
