"""mIoU against a plain loop over pixels, and limit cases whose value is known beforehand."""

import math

import numpy as np
import pytest
import torch

from pipeline.evaluation import segmentation as seg

GROUPS = [[], [0, 1], [2], [3, 4, 5]]  # labels 1 to 3 have two, one and three prompts


def drawn(seed: int, images: int, sizes=((12, 16),)) -> tuple[seg.Cosines, list[np.ndarray]]:
    """Random maps of 6 prompts on 4 x 4 patches, and random blocky masks with ignored pixels."""
    rng = np.random.default_rng(seed)
    patches = rng.uniform(-1, 1, (images, 6, 4, 4)).astype(np.float32)
    whole = rng.uniform(-1, 1, (images, 6)).astype(np.float32)
    masks = []
    for i in range(images):
        h, w = sizes[i % len(sizes)]
        coarse = rng.choice([0, 0, 1, 2, 3, seg.IGNORED], (5, 5))
        rows, columns = np.arange(h) * 5 // h, np.arange(w) * 5 // w
        masks.append(coarse[rows[:, None], columns[None]].astype(np.uint8))
    return seg.Cosines(torch.from_numpy(patches), torch.from_numpy(whole)), masks


def bilinear(values: np.ndarray, y: float, x: float) -> float:
    """A (g, g) map at a point in px of the map whose first value's centre is 0.5."""

    def line(at: float, length: int) -> tuple[int, int, float]:
        at = min(max(at - 0.5, 0.0), length - 1.0)
        first = math.floor(at)
        return first, min(first + 1, length - 1), at - first

    y0, y1, down = line(y, values.shape[0])
    x0, x1, across = line(x, values.shape[1])
    top = values[y0, x0] * (1 - across) + values[y0, x1] * across
    bottom = values[y1, x0] * (1 - across) + values[y1, x1] * across
    return top * (1 - down) + bottom * down


def reference_miou(cosines, masks, groups, weight, threshold) -> float:
    """Pixel by pixel in Python: nothing shared with the module."""
    labels = len(groups)
    confusion = np.zeros((labels, labels))
    for patches, whole, mask in zip(cosines.patches.numpy(), cosines.images.numpy(), masks,
                                    strict=True):  # fmt: skip
        h, w = mask.shape
        grid = patches.shape[1]
        for row in range(h):
            for column in range(w):
                if mask[row, column] == 255:
                    continue
                y, x = (row + 0.5) * grid / h, (column + 0.5) * grid / w
                cosine = [float(bilinear(p, y, x)) for p in patches]
                best, answer = -1e9, None
                for label, group in enumerate(groups):
                    for prompt in group:
                        score = cosine[prompt] + weight * float(whole[prompt])
                        if score > best:
                            best, answer = score, label
                if threshold is not None and max(cosine) <= threshold:
                    answer = 0
                confusion[mask[row, column], answer] += 1
    found = []
    for label in range(labels):
        union = confusion[label].sum() + confusion[:, label].sum() - confusion[label, label]
        if union:
            found.append(confusion[label, label] / union)
    return sum(found) / len(found)


@pytest.mark.parametrize(("weight", "threshold"), [(0.0, None), (0.0, 0.4), (0.7, 0.6)])
def test_miou_is_that_of_a_loop_over_pixels(weight, threshold):
    cosines, masks = drawn(1, 5, sizes=((12, 16), (12, 16), (9, 7)))
    counts = seg.scored(cosines, masks, GROUPS, seg.Choice(weight, threshold, 0.0))
    expected = reference_miou(cosines, masks, GROUPS, weight, threshold)
    assert seg.mean_iou(counts.sum(axis=0)) == pytest.approx(expected, abs=1e-9)


def test_a_background_with_prompts_of_its_own_is_a_class():
    cosines, masks = drawn(2, 3)
    groups = [[5], [0, 1], [2], [3, 4]]
    counts = seg.scored(cosines, masks, groups, seg.Choice(0.0, None, 0.0))
    expected = reference_miou(cosines, masks, groups, 0.0, None)
    assert seg.mean_iou(counts.sum(axis=0)) == pytest.approx(expected, abs=1e-9)
    assert counts[:, 1, 0].sum() > 0  # background was answered


def test_what_is_chosen_on_val_is_the_best_of_all_that_may_be_chosen():
    cosines, masks = drawn(3, 4)
    weights = (0.0, 0.5)
    found = seg.choose(cosines, masks, GROUPS, weights, True)
    largest = cosines.patches.amax(dim=1).numpy()
    limits = np.quantile(largest, seg.QUANTILES)
    every = {(w, t): reference_miou(cosines, masks, GROUPS, w, t) for w in weights for t in limits}
    assert len(seg.QUANTILES) == 27 and seg.QUANTILES[0] == 0.3 and seg.QUANTILES[-1] == 0.95
    assert found.miou == pytest.approx(max(every.values()), abs=1e-6)
    counts = seg.scored(cosines, masks, GROUPS, found)
    assert seg.mean_iou(counts.sum(axis=0)) == pytest.approx(found.miou)


def test_maps_that_are_the_truth_score_one():
    """Patches as fine as the mask, each certain of its own label."""
    _, masks = drawn(4, 6, sizes=((8, 8),))
    masks = [np.where(mask == seg.IGNORED, 1, mask) for mask in masks]
    truth = torch.from_numpy(np.stack(masks).astype(np.int64))
    patches = torch.nn.functional.one_hot(truth, 4).movedim(-1, 1).float()[:, 1:]  # (n, 3, 8, 8)
    cosines = seg.Cosines(patches, torch.zeros(6, 3))
    counts = seg.scored(cosines, masks, [[], [0], [1], [2]], seg.Choice(0.0, 0.0, 0.0))
    assert seg.mean_iou(counts.sum(axis=0)) == 1
    found = seg.miou_interval(counts)
    assert (found["value"], found["low"], found["high"]) == (1, 1, 1)
    np.testing.assert_array_equal(seg.coverage(masks, 8, 4), counts)


def test_all_background_has_its_exact_value():
    """Its IoU is its share of the pixels, and every class with a pixel has 0."""
    _, masks = drawn(5, 8)
    counts = seg.painted(np.zeros(8, np.int64), masks, 4)
    known = np.concatenate([mask[mask != seg.IGNORED] for mask in masks])
    assert seg.mean_iou(counts.sum(axis=0)) == pytest.approx((known == 0).mean() / 4)


def test_a_class_that_nobody_shows_or_names_is_left_out_of_the_mean():
    masks = [np.ones((4, 4), np.uint8)]
    counts = seg.painted(np.array([1]), masks, 5)
    assert seg.mean_iou(counts.sum(axis=0)) == 1


def test_ignored_pixels_count_nowhere():
    masks = [np.full((4, 4), seg.IGNORED, np.uint8)]
    masks[0][0, 0] = 2
    assert seg.painted(np.array([2]), masks, 3).sum() == 3  # one pixel: right, called, true
    assert seg.mean_iou(seg.painted(np.array([2]), masks, 3)[0]) == 1


def test_a_coarser_grid_covers_less():
    _, masks = drawn(6, 20, sizes=((20, 20),))
    values = [seg.mean_iou(seg.coverage(masks, grid, 4).sum(axis=0)) for grid in (20, 4, 2)]
    assert values == sorted(values, reverse=True) and values[0] == 1 > values[1]


def test_image_labels_are_the_nearest_classes():
    cosines = torch.tensor([[0.9, 0.1, 0, 0.0, 0.2, 0], [0.1, 0.1, 0, 0.0, 0.2, 0.3]])
    assert seg.image_labels(cosines, GROUPS).tolist() == [1, 3]


def test_the_interval_covers_the_truth_of_a_drawn_population():
    """95 % intervals of 40 images hold the mIoU of all 4000 about 19 times in 20."""
    rng = np.random.default_rng(0)
    skill = rng.beta(2, 2, 4000)[:, None]
    true = rng.integers(0, 50, (4000, 3))
    right = rng.binomial(true, skill)
    wrong = true - right
    called = right + np.roll(wrong, 1, axis=1)
    counts = np.stack([right, called, true], axis=1)
    truth, hits = seg.mean_iou(counts.sum(axis=0)), 0
    for _ in range(200):
        found = seg.miou_interval(counts[rng.integers(0, 4000, 40)])
        hits += found["low"] <= truth <= found["high"]
    assert 176 <= hits <= 199
