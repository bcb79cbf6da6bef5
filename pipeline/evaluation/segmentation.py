"""Patches judged as the field judges them: training-free open-vocabulary segmentation.

The metric, exactly. Unit patch embeddings of view 0; their cosine to every prompt; bilinear to the
mask's size (`align_corners=False`); a class scores the maximum over its prompts, and, reported
apart, that plus a weight (lambda) times the cosine of the whole image and the prompt. A pixel is
background where the largest *patch* cosine there is at most a threshold. Weight and threshold are
chosen on val, the threshold among 27 quantiles (.30 to .95) of the patches' largest cosines. One
confusion matrix over the split, 255 left out; mIoU is the mean over background and all classes with
a union; its interval is by bootstrap over images.

Letters: n images, P prompts, g patches per side, h and w px of a mask, K labels: 0 is background,
1 to K - 1 are the classes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 255  # of a mask: no label
QUANTILES = tuple(np.linspace(0.30, 0.95, 27).round(3).tolist())
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)  # lambda
CHUNK = 64  # images of one mask size that are scored together
DRAWS = 1000  # of the bootstrap


class Cosines(NamedTuple):
    """What a split's images say to the prompts."""

    patches: Tensor  # (n, P, g, g)
    images: Tensor  # (n, P), of the whole images


class Choice(NamedTuple):
    """What is chosen on val."""

    weight: float  # lambda
    threshold: (
        float | None
    )  # largest cosine of a background pixel; None: no background by threshold
    miou: float  # with them, on val


def class_scores(
    patches: Tensor, images: Tensor, groups: list[list[int]], size: tuple[int, ...], weight: float
) -> tuple[Tensor, Tensor]:
    """Scores (n, K, h, w) of the labels and the largest cosine (n, h, w) to any prompt.

    patches (n, P, g, g), images (n, P): cosines; groups: for each label the numbers of its prompts;
    a label without prompts scores -inf; size: h, w.
    """
    cosines = F.interpolate(patches, size=size, mode="bilinear", align_corners=False)
    largest = cosines.amax(dim=1)
    if weight:
        cosines = cosines + weight * images[:, :, None, None]
    nothing = cosines.new_full(largest.shape, -torch.inf)
    scores = [cosines[:, group].amax(dim=1) if group else nothing for group in groups]
    return torch.stack(scores, dim=1), largest


def segment(
    patches: Tensor,
    images: Tensor,
    groups: list[list[int]],
    size: tuple[int, ...],
    weight: float = 0.0,
    threshold: float | None = None,
) -> Tensor:
    """(n, h, w) the label of each pixel; arguments as `class_scores`, threshold as `Choice`."""
    scores, largest = class_scores(patches, images, groups, size, weight)
    labels = scores.argmax(dim=1)
    return labels if threshold is None else labels.masked_fill(largest <= threshold, 0)


def label_counts(labels: Tensor, truth: Tensor, count: int) -> Tensor:
    """(n, 3, K) pixels of each label that are right, that are called so, that are so.

    labels, truth (n, h, w); what truth ignores counts nowhere. Sums over images give one confusion
    matrix's diagonal and margins.
    """
    known = truth != IGNORED
    own = torch.arange(len(labels), device=labels.device)[:, None, None] * count
    right = (labels == truth) & known
    values = [(right, truth), (known, labels), (known, truth)]
    return (
        torch.stack(
            [
                torch.bincount((own + of.long())[where], minlength=len(labels) * count)
                for where, of in values
            ]
        )
        .unflatten(1, (len(labels), count))
        .movedim(0, 1)
    )


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """(..., 3, K) counts of a split -> (...) mean over the labels with a union; NaN without any."""
    right, called, true = np.moveaxis(np.asarray(counts, np.float64), -2, 0)
    union = called + true - right
    with np.errstate(invalid="ignore"):
        return np.where(union > 0, right / union.clip(1), 0).sum(-1) / (union > 0).sum(-1)


def miou_interval(counts: np.ndarray) -> dict[str, float]:
    """mIoU of a split and its 95 % interval; counts (n, 3, K) by image, which are drawn again."""
    counts = np.asarray(counts, np.float64)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), DRAWS)  # (d, n)
    values = mean_iou((drawn @ counts.reshape(len(counts), -1)).reshape(-1, *counts.shape[1:]))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return {
        "value": float(mean_iou(counts.sum(axis=0))),
        "low": float(low),
        "high": float(high),
    }


def choose(
    cosines: Cosines,
    masks: list[np.ndarray],
    groups: list[list[int]],
    weights: tuple[float, ...],
    by_threshold: bool,
) -> Choice:
    """The weight and threshold of the highest mIoU, on val.

    masks: n of (h, w) uint8. by_threshold: whether background is found by a threshold.
    """
    largest = cosines.patches.amax(dim=1).flatten()
    quantiles = torch.tensor(QUANTILES, device=largest.device, dtype=largest.dtype)
    limits = torch.quantile(_some(largest), quantiles) if by_threshold else largest.new_empty(0)
    best = Choice(0.0, None, -1.0)
    for weight in weights:
        binned = _binned_confusion(cosines, masks, groups, weight, limits)
        for k, confusion in enumerate(_by_limit(binned)):
            value = float(mean_iou(_margins(confusion)))
            if value > best.miou:
                best = Choice(weight, float(limits[k]) if by_threshold else None, value)
    return best


def _some(values: Tensor, most: int = 2**24) -> Tensor:
    """Evenly spaced ones: torch.quantile takes no more than 2^24."""
    return values[:: -(-len(values) // most)]


def _binned_confusion(
    cosines: Cosines,
    masks: list[np.ndarray],
    groups: list[list[int]],
    weight: float,
    limits: Tensor,
) -> np.ndarray:
    """(limits + 1, K, K) pixels by how many limits lie below their largest cosine, truth, label."""
    count, bins = len(groups), len(limits) + 1
    total = torch.zeros(bins * count * count, dtype=torch.long, device=limits.device)
    for rows, truth in same_size_chunks(masks):
        truth = truth.to(limits.device)
        patches, images = cosines.patches[rows], cosines.images[rows]
        scores, largest = class_scores(patches, images, groups, truth.shape[1:], weight)
        cell = (torch.bucketize(largest, limits) * count + truth) * count + scores.argmax(dim=1)
        total += torch.bincount(cell[truth != IGNORED], minlength=len(total))
    return total.reshape(bins, count, count).cpu().numpy()


def _by_limit(binned: np.ndarray) -> Iterator[np.ndarray]:
    """The confusion (K, K) of truth and label under each limit: what is at most it is background."""
    if len(binned) == 1:
        yield binned[0]
        return
    for k in range(len(binned) - 1):
        confusion = binned[k + 1 :].sum(axis=0)
        confusion[:, 0] += binned[: k + 1].sum(axis=(0, 2))
        yield confusion


def _margins(confusion: np.ndarray) -> np.ndarray:
    """(K, K) of truth and label -> (3, K) right, called, true."""
    return np.stack([confusion.diagonal(), confusion.sum(axis=0), confusion.sum(axis=1)])


def scored(
    cosines: Cosines, masks: list[np.ndarray], groups: list[list[int]], choice: Choice
) -> np.ndarray:
    """(n, 3, K) counts by image with what was chosen on val."""
    counts = []
    for rows, truth in same_size_chunks(masks):
        truth = truth.to(cosines.patches.device)
        patches, images = cosines.patches[rows], cosines.images[rows]
        size = tuple(truth.shape[1:])
        labels = segment(patches, images, groups, size, choice.weight, choice.threshold)
        counts.append(label_counts(labels, truth, len(groups)).cpu().numpy())
    return np.concatenate(counts)


def painted(labels: np.ndarray, masks: list[np.ndarray], count: int) -> np.ndarray:
    """(n, 3, K) counts by image of answering labels (n,), one an image, at every pixel."""
    counts = []
    for rows, truth in same_size_chunks(masks):
        everywhere = torch.as_tensor(labels[rows])[:, None, None].expand_as(truth)
        counts.append(label_counts(everywhere, truth, count).numpy())
    return np.concatenate(counts)


def image_labels(images: Tensor, groups: list[list[int]]) -> np.ndarray:
    """(n, P) cosines of whole images -> (n,) the class nearest to each: a label from 1."""
    scores = [images[:, group].amax(dim=1) for group in groups[1:]]
    return torch.stack(scores, dim=1).argmax(dim=1).cpu().numpy() + 1


def coverage(masks: list[np.ndarray], grid: int, count: int) -> np.ndarray:
    """(n, 3, K) counts by image of the best that a grid can do: `covered`."""
    counts = []
    for _, truth in same_size_chunks(masks):
        for one in truth:  # K maps of a mask's size at a time
            counts.append(label_counts(covered(one, grid, count)[None], one[None], count))
    return torch.cat(counts).numpy()


def covered(truth: Tensor, grid: int, count: int) -> Tensor:
    """(h, w) labels, from (h, w) labels, of a grid that knows no more than a patch.

    Each patch says which share of it every label covers; these maps are brought to the mask's size
    as a student's cosines are, and the largest wins.
    """
    maps = torch.stack([truth == label for label in range(count)]).float()[None]
    shares = F.adaptive_avg_pool2d(maps, grid)
    whole = F.interpolate(shares, size=truth.shape, mode="bilinear", align_corners=False)
    return whole.argmax(dim=1)[0]


def same_size_chunks(masks: list[np.ndarray]) -> Iterator[tuple[slice, Tensor]]:
    """Neighbours of one size: their rows, and the masks (b, h, w) as int64."""
    start = 0
    while start < len(masks):
        stop = start + 1
        while stop < min(len(masks), start + CHUNK) and masks[stop].shape == masks[start].shape:
            stop += 1
        yield slice(start, stop), torch.from_numpy(np.stack(masks[start:stop]).astype(np.int64))
        start = stop
