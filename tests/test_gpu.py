"""The pipeline on a GPU against itself on the CPU: stage one, training, evaluation, and its limits.

Needs neither img2dataset nor the network: the images are written as `download` leaves them. The
same world is built on the CPU in an ordinary run, so that it cannot grow stale.
"""

import math
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from support import stored, worlds
from support.finished import distill_config, evaluate_config

from pipeline.core.errors import PipelineError
from pipeline.core.records import Recipe
from pipeline.core.work import Work
from pipeline.data import shards
from pipeline.data.embeddings import split_vectors
from pipeline.models.blocks import Attention, neighbourhood_mask
from pipeline.models.student import Student
from pipeline.training.batches import Batch
from pipeline.training.distributed import Ranks
from pipeline.training.trainer import Network, Trainer
from stages.distill import distill
from stages.select import select
from stages.teacher_embed import teacher_embed

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
ON_GPU = torch.device("cuda", 0)


def write_images(data: Path, count: int = 96) -> None:
    """data/images of drawn pictures with captions, in two shards, under a stamp of its own."""
    work = Work(data, "download", data / "images", Recipe(parameters={"test": count}))
    work.begin()
    for shard in range(2):
        rows = []
        for i in range(shard, count, 2):
            row = stored.image(i, False)
            row |= {"caption": f"picture {i}", "captions": [f"picture {i}"], "attempts": 1}
            row |= dict.fromkeys(("sha256", "sha256_original"), sha256(b"%d" % i).hexdigest())
            rows.append(row)
        table = pa.Table.from_pylist(rows, schema=shards.IMAGES)
        groups = [table.slice(start, 10) for start in range(0, len(rows), 10)]
        work.commit(
            f"{shard:05}.parquet",
            lambda path, groups=groups: shards.write_shard(path, shards.IMAGES, groups, {}),
        )
    work.publish(["00000.parquet", "00001.parquet"], {"ok": count})


def embedded(data: Path, card: Path, device: str) -> Path:
    write_images(data)
    prompts = data.parent / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n")
    teacher_embed(worlds.teacher_config(card, prompts), data, device=device, workers=2)
    select(worlds.select_config(), data)
    return data


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, tiny_teacher) -> Path:
    return embedded(tmp_path_factory.mktemp("cpu") / "data", tiny_teacher, "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_teacher_embed_gives_the_vectors_of_the_cpu(on_cpu, tmp_path, tiny_teacher, device):
    data = embedded(tmp_path / "data", tiny_teacher, device)
    for split in ("train", "test"):
        (ids, found), (wanted_ids, wanted) = (split_vectors(d, split) for d in (data, on_cpu))
        assert ids == wanted_ids and len(ids) > 5
        assert (found * wanted).sum(axis=1).min() > 0.9999


@pytest.mark.parametrize("device", DEVICES)
def test_distill_and_evaluate_give_what_they_give_on_the_cpu(on_cpu, tmp_path, device):
    """The same losses in the first steps, in float32; loader processes feed the GPU."""
    metrics = {}
    for name in dict.fromkeys(("cpu", device)):
        data = tmp_path / name
        shutil.copytree(on_cpu, data, ignore=shutil.ignore_patterns(".work"))
        metrics[name] = distill(distill_config(steps=6), data, device=name, workers=2)
    assert metrics[device]["loss"] == pytest.approx(metrics["cpu"]["loss"], rel=0.02)
    assert metrics[device]["val_cosine"] == pytest.approx(metrics["cpu"]["val_cosine"], abs=0.01)
    pytest.importorskip("matplotlib")
    from stages.evaluate import evaluate

    found = evaluate(evaluate_config(), tmp_path / device, device=device, workers=2)
    again = evaluate(evaluate_config(), tmp_path / device, device="cpu", workers=2)
    cosine = found.fidelity["cosine"].value
    assert math.isfinite(cosine) and again.fidelity["cosine"].value == pytest.approx(cosine)


@pytest.mark.parametrize("device", DEVICES)
def test_an_interrupted_run_goes_on_to_the_losses_of_an_undisturbed_one(
    on_cpu, tmp_path, device, monkeypatch
):
    config = distill_config(steps=6, ema=0.9, color_jitter=0.1, mixup=1.0)
    real, metrics = Trainer.train_step, []

    def interrupted(trainer, batch):
        if trainer.step == 3:
            raise KeyboardInterrupt
        real(trainer, batch)

    for disturbed in (False, True):
        data = tmp_path / str(disturbed)
        shutil.copytree(on_cpu, data, ignore=shutil.ignore_patterns(".work"))
        if disturbed:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Trainer, "train_step", interrupted)
                distill(config, data, device=device, workers=2)
        metrics.append(distill(config, data, device=device, workers=2, resume=disturbed))
    exact = 0 if device == "cpu" else 1e-4
    assert metrics[1]["loss"] == pytest.approx(metrics[0]["loss"], rel=exact)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [True, False])
def test_the_two_ways_of_attention_agree(device, masked):
    """With gradients: 33 values a head, which the fused kernels see as 40."""
    torch.manual_seed(0)
    attention = Attention(4 * 33, 4).to(device)
    torch.nn.init.normal_(attention.in_proj_weight, std=0.1)
    torch.nn.init.normal_(attention.in_proj_bias)
    x = torch.randn(3, 16, 4 * 33, device=device)
    seen = neighbourhood_mask(4).to(device)
    bias = torch.zeros(16, 16, device=device).masked_fill(~seen, -torch.inf) if masked else None
    results = []
    for way in (attention.fused, attention.written_out):
        attention.zero_grad()
        out = way(x, bias)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in attention.parameters())])
    for a, b in zip(*results, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= 2e-3 * b.abs().max()


@GPU
def test_the_compiled_step_has_the_loss_and_the_gradients_of_the_plain_one():
    config = stored.distill_config(color_jitter=0.1, mixup=1.0)
    found = trainer(config)
    assert found.fast is not found.network, "no Triton or C compiler here"
    batch = a_batch(config.batch)
    gradients = []
    for way in (found.fast, found.network):
        found.fast = way
        found.optimizer.zero_grad()
        sum(found._terms(batch).values()).backward()
        gradients.append([p.grad.clone() for p in found.student.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max().clamp(min=1e-4)


@GPU
def test_the_network_is_one_graph():
    found = trainer(stored.distill_config())
    pixels = torch.zeros(8, 32, 32, 3, dtype=torch.uint8, device=ON_GPU)
    explained = torch._dynamo.explain(Network(found.student, [found.student.config.image_size]))(
        pixels
    )
    assert explained.graph_break_count == 0


@GPU
def test_a_step_that_is_not_finite_changes_nothing_on_a_gpu():
    config = stored.distill_config(max_skipped_steps=1)
    found, bad = trainer(config), a_batch(config.batch)
    bad.targets[3] = np.nan
    before = [p.clone() for p in found.student.parameters()]
    found.train_step(bad)
    assert found.read()[0]["skipped"] == 1
    assert all(torch.equal(p, q) for p, q in zip(found.student.parameters(), before, strict=True))


@GPU
def test_a_batch_that_does_not_fit_names_one_that_does():
    config = stored.distill_config(batch=65536, student=big(), image_sizes=[64])
    found = trainer(config)
    found.fast = found.network
    torch.cuda.set_per_process_memory_fraction(0.05)
    try:
        with pytest.raises(PipelineError, match=r"65536 does not fit.*; (\d+) does") as refusal:
            found.train_step(a_batch(config.batch, 64))
        fits = int(str(refusal.value).split(" does. ")[0].split()[-1])
        assert 1 < fits < 65536
        del found
        smaller = trainer(stored.distill_config(batch=fits, student=big(), image_sizes=[64]))
        smaller.fast = smaller.network
        smaller.train_step(a_batch(fits, 64))
        assert math.isfinite(smaller.read()[0]["loss"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_batch_that_does_not_fit_into_a_device_is_halved_until_it_does(monkeypatch):
    """Without a GPU: a network that cannot take more than 20 rows at a time."""
    found = trainer(stored.distill_config(batch=64), torch.device("cpu"))
    forward = Network.forward

    def limited(network, pixels, *changes):
        if len(pixels) > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(network, pixels, *changes)

    monkeypatch.setattr(Network, "forward", limited)
    with pytest.raises(PipelineError, match=r"distill\.batch 64 does not fit.*; 16 does"):
        found.train_step(a_batch(64))


def big() -> dict:
    shape = stored.distill_config().student.model_dump()
    return shape | {"image_size": 64, "embedding_size": 512, "heads": 16, "layers": 4}


def trainer(config, device: torch.device = ON_GPU) -> Trainer:
    torch.manual_seed(0)
    mean = np.full(config.student.embedding_size, 0.01, np.float32)
    return Trainer(config, Student(config.student), mean, Ranks(device))


def a_batch(count: int, side: int = 32):
    rng = np.random.default_rng(0)
    length = stored.SIZE if side == 32 else 512
    vectors = rng.normal(size=(2, count, length)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    pixels = rng.integers(0, 256, (count, side, side, 3), np.uint8)
    return Batch([""] * count, pixels, *vectors, np.arange(count), [])
