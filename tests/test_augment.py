"""What is changed of an image before the student sees it, and what becomes of its target."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.training.augment import ColorJitter, Mixup, fixed_stem

CPU = torch.device("cpu")
POSITION = np.arange(8)


def mixup(position=POSITION, alpha: float = 1.0) -> Mixup:
    return Mixup.drawn(alpha, 0, 3, 8, position, CPU)


def images() -> torch.Tensor:
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vectors(seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_mixup_overlays_neighbours_targets_and_captions_with_the_same_fractions():
    change, pixels, targets, texts = mixup(), images(), vectors(1), vectors(2)
    seen, seen_targets, seen_texts = (
        change.images(pixels), change.embeddings(targets), change.embeddings(texts)
    )  # fmt: skip
    for i in range(8):
        own, other = pixels[i].flatten(), pixels[i ^ 1].flatten()
        apart = own - other
        fraction = ((seen[i].flatten() - other) @ apart / apart.square().sum()).item()
        assert 0.5 <= fraction <= 1
        assert torch.allclose(seen[i].flatten(), fraction * own + (1 - fraction) * other, atol=1e-4)
        for given, mixed in ((targets, seen_targets), (texts, seen_texts)):
            wanted = fraction * given[i] + (1 - fraction) * given[i ^ 1]
            assert torch.allclose(mixed[i], wanted / wanted.norm(), atol=1e-4)


def test_an_image_overlaid_with_one_that_has_no_caption_has_none_itself():
    texts = vectors(2)
    texts[5] = 0
    mixed = mixup().embeddings(texts)
    assert [not row.any() for row in mixed] == [i in (4, 5) for i in range(8)]


def test_mixup_does_not_depend_on_who_else_decodes_or_on_ranks():
    """Rows 2 and 5 are missing: 3 and 4, their neighbours, stay as they are."""
    pixels = images()
    everyone, some = mixup().images(pixels), np.array([0, 1, 3, 4, 6, 7])
    left = mixup(some).images(pixels[some])
    for at, position in enumerate(some):
        wanted = pixels[position] if position in (3, 4) else everyone[position]
        assert torch.equal(left[at], wanted)
    assert torch.equal(mixup(POSITION[4:]).images(pixels[4:]), everyone[4:])


def test_mixup_of_no_rows_is_no_rows():
    assert mixup(np.zeros(0, np.int64)).images(images()[:0]).shape == (0, 3, 16, 16)


def test_color_jitter_is_a_function_of_the_position_and_stays_within_its_amount():
    pixels = images()
    change = ColorJitter.drawn(0.2, 0, 3, 8, POSITION, CPU)
    half = ColorJitter.drawn(0.2, 0, 3, 8, POSITION[4:], CPU)
    assert torch.equal(change.images(pixels)[4:], half.images(pixels[4:]))
    slope = (change.images(pixels + 1) - change.images(pixels)).mean(dim=(1, 2, 3))
    offset = change.images(torch.zeros_like(pixels)).amax(dim=(1, 2, 3))
    for moved, middle in ((slope, 1), (offset, 0)):
        assert (moved - middle).abs().max() <= 0.2 + 1e-6
        assert moved.std() > 0.02
    assert slope.numpy() == pytest.approx(change.contrast.flatten().numpy(), abs=1e-5)


def test_a_fixed_stem_holds_no_frequency_above_its_count():
    """Seen by an orthonormal cosine transform along both axes, built from its definition."""
    side, count = 16, 5
    filters = fixed_stem(40, side, count, seed=0)
    assert filters.shape == (40, 3, side, side)
    assert filters.flatten(1).norm(dim=1).mean().item() == pytest.approx(1, abs=1e-5)
    k, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    cosine = torch.cos(torch.pi * k * (x + 0.5) / side)
    spectrum = (cosine @ filters @ cosine.T).abs().amax(dim=(0, 1))  # (side, side)
    high = k + x >= count
    assert spectrum[high].max() < 1e-4 < 1e-2 < spectrum[~high].min()
