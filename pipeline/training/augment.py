"""What is changed of an image on its way to the student; each change a function of where it stands.

Letters: b images of this rank, S image size in px, E embedding size, W token width, p patch size.
position: (b,) of each image in the whole batch of its step, so that neither ranks nor images that
do not decode change what happens to the others.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.records import Sample


def cropped(sample: Sample, min_crop_area: float, *position: int) -> Sample:
    """A part of a sample's view: min_crop_area to 1 of its area, in its shape, anywhere in it, with
    a fair flip; a function of position (seed, epoch, row).

    On whole pixels, outwards. For targets of which one view is stored: the target stays, which is
    right for the complete view.
    """
    rng = np.random.default_rng(position)
    left, top, right, bottom = sample.box
    side = rng.uniform(min_crop_area, 1) ** 0.5
    width, height = (right - left) * side, (bottom - top) * side
    left, top = rng.uniform(left, right - width), rng.uniform(top, bottom - height)
    flip = sample.flip != (rng.random() < 0.5)
    start = float(math.floor(left)), float(math.floor(top))
    end = float(math.ceil(left + width)), float(math.ceil(top + height))
    return sample._replace(box=(*start, *end), flip=flip)


class ColorJitter(NamedTuple):
    """Contrast and brightness of each image moved by up to an amount, for the student alone."""

    contrast: Tensor  # (b, 1, 1, 1) factor
    brightness: Tensor  # (b, 1, 1, 1) of normalised pixels

    @classmethod
    def drawn(
        cls,
        amount: float,
        seed: int,
        step: int,
        batch: int,
        position: np.ndarray,
        device: torch.device,
    ) -> "ColorJitter":
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        drawn = torch.rand(batch, 2, generator=generator)[position]  # (b, 2)
        drawn = ((2 * drawn - 1) * amount).to(device, non_blocking=True)
        return cls(drawn[:, :1, None, None] + 1, drawn[:, 1:, None, None])

    def images(self, pixels: Tensor) -> Tensor:
        """(b, 3, S, S) normalised -> the same shape."""
        return pixels * self.contrast + self.brightness


class Mixup(NamedTuple):
    """Rows overlaid with their neighbours of the step (mixup, Zhang et al. 2018), whose fractions,
    Beta(alpha, alpha), are a function of seed, step and position.

    A row keeps the larger fraction of itself; one whose neighbour did not decode stays as it is.
    """

    neighbour: Tensor  # (b,) index of the row that is laid over
    own: Tensor  # (b, 1) in [0.5, 1]

    @classmethod
    def drawn(
        cls,
        alpha: float,
        seed: int,
        step: int,
        batch: int,
        position: np.ndarray,
        device: torch.device,
    ) -> "Mixup":
        drawn = np.random.default_rng([seed, step]).beta(alpha, alpha, batch)
        own = np.maximum(drawn, 1 - drawn)[position].astype(np.float32)
        wanted, b = position ^ 1, len(position)
        at = np.searchsorted(position, wanted).clip(max=b - 1)
        neighbour = np.where(position[at] == wanted, at, np.arange(b)) if b else at
        tensors = torch.from_numpy(neighbour), torch.from_numpy(own)[:, None]
        return cls(*(x.to(device, non_blocking=True) for x in tensors))

    def images(self, pixels: Tensor) -> Tensor:
        """(b, 3, S, S) -> the same shape, overlaid."""
        return torch.lerp(pixels[self.neighbour], pixels, self.own[..., None, None])

    def embeddings(self, vectors: Tensor) -> Tensor:
        """(b, E) unit length -> what stands for the overlaid images; zero where one of the two is
        zero, as of an image without a caption: half of what is seen would have no words.
        """
        other = vectors[self.neighbour]
        both = (vectors != 0).any(dim=1) & (other != 0).any(dim=1)
        return F.normalize(torch.lerp(other, vectors, self.own), dim=1) * both[:, None]


def fixed_stem(width: int, side: int, frequencies: int, seed: int) -> Tensor:
    """(W, 3, p, p) random patch filters of mean length 1 that see only smooth patterns.

    They combine the products of cosines whose two frequencies add up to less than frequencies, in
    brightness and two opponent colours; what photos hold less of (amplitudes fall with frequency,
    Field 1987; colour varies less than brightness, Ruderman et al. 1998) counts for more. From a
    few hundred images a learned projection of p * p * 3 values learns noise.
    """
    x = (torch.arange(side) + 0.5) / side
    waves = torch.cos(torch.pi * torch.arange(frequencies)[:, None] * x)  # (frequencies, p)
    waves[1:] *= 2**0.5
    number = torch.arange(frequencies)
    across, down = (f.flatten() for f in torch.meshgrid(number, number, indexing="ij"))
    kept = across + down < frequencies
    across, down = across[kept], down[kept]
    patterns = waves[across][:, :, None] * waves[down][:, None] * (1 + across + down)[:, None, None]
    opponent = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    opponent = F.normalize(opponent, dim=1) * torch.tensor([[1.0], [3.0], [3.0]])
    basis = torch.einsum("fxy,oc->focxy", patterns, opponent).flatten(0, 1).flatten(1)
    weights = torch.randn(width, len(basis), generator=torch.Generator().manual_seed(seed))
    filters = weights @ basis  # (W, 3 p p)
    return (filters / filters.norm(dim=1).mean()).view(width, 3, side, side)
