"""benchmarks/segmentation.py at a size that a CPU trains: every variant ends in every cell."""

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.evaluation import segmentation as seg

SCRIPT = Path(__file__).parents[1] / "benchmarks/segmentation.py"
IMAGES = 6


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_segmentation", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # as of a script that is run
        patch.setitem(sys.modules, spec.name, found)  # dataclasses look their module up there
        spec.loader.exec_module(found)
        found.BATCH = 4
        yield found


def drawn_split(benchmark, draw, seed: int):
    """Scenes with their masks, and random vectors in place of a teacher's."""
    rng = np.random.default_rng(seed)
    scenes = list(draw.scenes(seed, IMAGES, 64))
    pixels = {}
    for size in benchmark.SIZES:
        images = torch.from_numpy(np.stack([image for image, _ in scenes])).permute(0, 3, 1, 2)
        pixels[size] = torch.nn.functional.interpolate(images, size=(size, size))
    vectors = rng.normal(size=(2, IMAGES, 128)).astype(np.float32)
    teacher, captions = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
    masks = [draw.mask_of(things, 64) for _, things in scenes]
    return benchmark.Split(torch.from_numpy(teacher), pixels, masks, captions, np.arange(IMAGES))


def test_a_variant_of_several_sizes_is_trained_judged_and_printed(benchmark, capsys):
    draw = benchmark.demo_module()
    kinds = benchmark.kinds_of(draw)
    splits = {name: drawn_split(benchmark, draw, i) for i, name in enumerate(benchmark.SPLITS)}
    prompts = torch.nn.functional.normalize(torch.randn(36, 128), dim=1)
    args = argparse.Namespace(device="cpu", steps=3)
    few = [benchmark.ONE, benchmark.MASK_OFF, benchmark.SEVERAL[1]]
    found = {v: [benchmark.run(args, v, 0, splits, kinds, prompts)] for v in few}
    benchmark.tables(found, few[2:])
    printed = capsys.readouterr().out
    assert "Chosen on val among several sizes" in printed and "Mask on minus mask off" in printed
    for variant in few:
        assert printed.count(f"| {variant.name} |") == 2
    assert "nan" not in printed


def test_pairs_are_grouped_by_what_their_texts_say(benchmark):
    draw = benchmark.demo_module()
    for kind in benchmark.kinds_of(draw)[:2]:
        for label, group in enumerate(kind.groups[1:], start=1):
            words = {draw.TEXTS[i].split()[1 if kind.name == "colours" else 2] for i in group}
            assert len(words) == 1 and len(group) == 6
            assert all(kind.label[i + 1] == label for i in group)
    assert [len(kind.groups) for kind in benchmark.kinds_of(draw)] == [7, 7, 37]


def test_the_baseline_of_all_background_is_exact(benchmark):
    draw = benchmark.demo_module()
    masks = [draw.mask_of(things, 64) for _, things in draw.scenes(0, IMAGES, 64)]
    counts = seg.painted(np.zeros(IMAGES, int), masks, 37)
    shown = len(np.unique(masks))
    assert seg.mean_iou(counts.sum(axis=0)) == pytest.approx(np.mean(np.stack(masks) == 0) / shown)
