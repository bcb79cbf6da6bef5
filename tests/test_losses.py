"""Each term against numpy and its limits; two ranks together against one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import stored

from pipeline.core.config import LossWeights
from pipeline.core.devices import own_device
from pipeline.models.student import Student
from pipeline.training.batches import Batch
from pipeline.training.distributed import Ranks
from pipeline.training.losses import (
    CENTRED,
    contrastive_loss,
    cosine_loss,
    loss_terms,
    published_loss,
    relational_loss,
)
from pipeline.training.trainer import Trainer

B, E = 12, 16


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Student and target (B, E) of many lengths, and a mean (E,)."""
    rng = np.random.default_rng(0)
    student, target = rng.normal(size=(2, B, E)) * rng.uniform(0.1, 9, (2, B, 1))
    return student, target + 2, rng.normal(size=E) / E


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.asarray(array, np.float32)) for array in arrays]


def clip_reference(student: np.ndarray, target: np.ndarray, scale: float) -> float:
    """CLIP's loss as its paper writes it, in float64."""
    scores = np.exp(scale * unit(student) @ unit(target).T)
    rows, columns = scores / scores.sum(1, keepdims=True), scores / scores.sum(0)
    return -(np.log(np.diag(rows)).mean() + np.log(np.diag(columns)).mean()) / 2


def test_published_loss_is_the_mean_difference_of_unit_vectors_times_100(pair):
    student, target, _ = pair
    wanted = 100 * np.abs(unit(student) - unit(target)).mean()
    assert published_loss(*tensors(student, target)).item() == pytest.approx(wanted, rel=1e-5)


def test_published_loss_is_zero_for_equal_directions_and_scales_with_norm(pair):
    student, target, _ = pair
    a, b, longer = tensors(student, target, 7 * student)
    assert published_loss(a, longer).item() == pytest.approx(0, abs=1e-5)
    assert published_loss(a, b, norm=1.0).item() * 100 == pytest.approx(published_loss(a, b).item())


def test_cosine_loss_is_zero_one_and_two_for_equal_orthogonal_and_opposite_vectors():
    a, b = torch.eye(4), torch.eye(4).roll(1, 0)
    found = [cosine_loss(a, x).item() for x in (3 * a, b, -0.1 * a)]
    assert found == pytest.approx([0, 1, 2], abs=1e-6)


def test_contrastive_loss_is_clips(pair):
    student, target, _ = pair
    wanted = clip_reference(student, target, 5.0)
    assert contrastive_loss(*tensors(student, target), 5.0).item() == pytest.approx(
        wanted, rel=1e-5
    )


def test_contrastive_loss_is_log_b_at_chance_and_zero_when_certain(pair):
    student, target, _ = pair
    a, b = tensors(student, target)
    assert contrastive_loss(a, b, 0.0).item() == pytest.approx(np.log(B), rel=1e-6)
    assert contrastive_loss(torch.eye(B), torch.eye(B), 100.0).item() == pytest.approx(0, abs=1e-6)


def test_relational_loss_is_clips_after_most_of_the_mean_is_taken_off(pair):
    student, target, mean = pair
    wanted = clip_reference(unit(student) - CENTRED * mean, unit(target) - CENTRED * mean, 5.0)
    found = relational_loss(*tensors(student, target, mean), 5.0).item()
    assert found == pytest.approx(wanted, rel=1e-5)


def test_predicting_the_mean_for_every_image_is_no_better_than_chance_to_relations(pair):
    _, target, _ = pair
    mean = unit(target).mean(axis=0)
    constant = np.broadcast_to(mean, target.shape)
    assert relational_loss(*tensors(constant, target, mean), 20.0).item() >= np.log(B) - 1e-5
    assert relational_loss(*tensors(target, target, mean), 20.0).item() < np.log(B) / 2


@pytest.mark.parametrize("length", [0.0, 1e-30])
def test_a_vanishing_student_gives_finite_losses_and_gradients(pair, length):
    _, target, mean = pair
    target, mean = tensors(target, mean)
    student = torch.full((1, B, E), length, requires_grad=True)
    weights = LossWeights(l1=1.0, cosine=1.0, relational=1.0, caption=1.0)
    terms = loss_terms(weights, 20.0, student, target, target, mean)
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values()) and student.grad.isfinite().all()


def test_only_terms_with_a_weight_are_computed(pair):
    student, target, mean = tensors(*pair)
    for name in ("l1", "cosine", "relational", "caption"):
        weights = dict.fromkeys(("l1", "cosine", "relational", "caption"), 0.0) | {name: 0.1}
        found = loss_terms(LossWeights(**weights), 20.0, student[None], target, target, mean)
        assert list(found) == [name]


def test_several_student_embeddings_are_averaged(pair):
    student, target, mean = tensors(*pair)
    weights = LossWeights(l1=1.0, cosine=1.0, relational=1.0, caption=0.0)
    both = loss_terms(weights, 20.0, torch.stack([student, -student]), target, target, mean)
    single = [loss_terms(weights, 20.0, s[None], target, target, mean) for s in (student, -student)]
    for name, term in both.items():
        assert term.item() == pytest.approx((single[0][name] + single[1][name]).item() / 2)


def test_rows_without_a_caption_take_no_part_in_the_caption_term(pair):
    student, target, mean = tensors(*pair)
    texts = target.clone()
    texts[::3] = 0
    have = [i for i in range(B) if i % 3]
    weights = LossWeights(l1=1.0, cosine=0.0, relational=0.0, caption=1.0)
    found = loss_terms(weights, 20.0, student[None], target, texts, mean)["caption"].item()
    wanted = clip_reference(student.numpy()[have], texts.numpy()[have], 20.0)
    assert found == pytest.approx(wanted, rel=1e-5)
    nothing = loss_terms(weights, 20.0, student[None], target, 0 * texts, mean)["caption"]
    assert nothing.item() == 0


def test_images_that_share_a_caption_are_no_negatives_of_each_other(pair):
    """Rows 2, 5 and 9 have one text: each is compared with itself and the other nine."""
    student, target, mean = tensors(*pair)
    texts = target.clone()
    texts[[5, 9]] = texts[2] * torch.tensor([[2.0], [1 + 1e-6]])  # of another length or last bit
    weights = LossWeights(l1=0.0, cosine=0.0, relational=0.0, caption=1.0)
    found = loss_terms(weights, 2.0, student[None], target, texts, mean)["caption"].item()
    a, b = unit(student.numpy().astype(float)), unit(texts.numpy().astype(float))
    shared, wanted = {2, 5, 9}, []
    for scores in (2 * a @ b.T, 2 * b @ a.T):
        for i in range(B):
            left = [j for j in range(B) if j == i or not {i, j} <= shared]
            wanted.append(np.log(np.exp(scores[i, left]).sum()) - scores[i, i])
    assert found == pytest.approx(np.mean(wanted), rel=1e-4)
    assert found < clip_reference(student.numpy(), texts.numpy(), 2.0) - 0.01


def test_captions_are_gathered_only_where_the_loss_has_use_for_them(monkeypatch):
    gathered = []
    monkeypatch.setattr(Ranks, "gather", lambda self, own: gathered.append(own) or own)
    for caption, count in ((0.0, 2), (0.1, 3)):
        loss = {"l1": 1.0, "cosine": 0.0, "relational": 0.0, "caption": caption}
        config = stored.distill_config(loss=loss, batch=4)
        mean = np.zeros(stored.SIZE, np.float32)
        found = Trainer(config, Student(config.student), mean, Ranks(torch.device("cpu")))
        vectors = np.ones((2, 4, stored.SIZE), np.float32)
        pixels = np.zeros((4, 32, 32, 3), np.uint8)
        gathered.clear()
        found.train_step(Batch([""] * 4, pixels, *vectors, np.arange(4), []))
        assert len(gathered) == count


def test_a_rank_opens_its_own_gpu_and_no_other(monkeypatch):
    opened = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, device: opened.append(device))
    assert own_device("auto") == torch.device("cuda", 3)
    assert opened == [torch.device("cuda", 3)]


STEP = """
import sys, numpy as np, torch, stored
from pathlib import Path
from pipeline.models.student import Student
from pipeline.training.batches import training_batches
from pipeline.training.dataset import Dataset
from pipeline.training.sampler import Sampler
from pipeline.training.trainer import Trainer
from pipeline.training.distributed import Ranks

data, out = map(Path, sys.argv[1:])
torch.set_num_threads(1)
ranks = Ranks(torch.device("cpu"))
loss = {"l1": 1.0, "cosine": 0.5, "relational": 0.5, "caption": 0.3}
config = stored.distill_config(
    loss=loss, mixup=1.0, min_crop_area=0.5, fixed_stem_frequencies=4, max_grad_norm=1e9
)
rows = Dataset(data, "train", 32, "bicubic", views=2, captions=True)
steps = training_batches(
    rows, Sampler(rows, 0, 8, 2), 0, 1, workers=1, rank=ranks.rank, ranks=ranks.size, min_crop_area=0.5
)
torch.manual_seed(0)
mean = np.full(stored.SIZE, 0.01, np.float32)
trainer = Trainer(config, Student(config.student), mean, ranks)
trainer.train_step(next(iter(steps)))
values = trainer.read()[0]
gradients = {n: p.grad for n, p in trainer.student.named_parameters() if p.grad is not None}
if ranks.first:
    torch.save({"values": values, "gradients": gradients, "lost": trainer.undecodable}, out)
with ranks.together():
    ranks.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("lost", [[], [0, 5, 6], [0, 1, 2, 3]])
def test_two_ranks_have_the_loss_and_the_gradients_of_one(tmp_path, lost):
    """One step under torchrun (gloo). lost: positions in the step whose rows do not decode, so that
    the shares are unequal, or that of the first rank is empty.
    """
    from pipeline.training.dataset import Dataset
    from pipeline.training.sampler import Sampler

    stored.write_data(tmp_path / "data")
    rows = Dataset(tmp_path / "data", "train", 32, "bicubic", views=2)
    order = Sampler(rows, 0, 8, 2)
    shown = [rows.sample(int(row)) for row in order.rows(order.position(0))]
    damaged = tuple(int(shown[at].image_id, 16) for at in lost)
    stored.write_data(tmp_path / "data", damaged=damaged)
    (tmp_path / "step.py").write_text(STEP)
    one, two = _run(tmp_path, 1), _run(tmp_path, 2)
    assert one["lost"] == two["lost"] == len(lost)
    assert two["values"] == pytest.approx(one["values"], abs=1e-5)
    assert two["gradients"].keys() == one["gradients"].keys()
    for name, gradient in one["gradients"].items():
        assert (two["gradients"][name] - gradient).abs().max() <= 1e-5, name
    assert max(g.abs().max() for g in one["gradients"].values()) > 1e-3


def _run(folder: Path, ranks: int) -> dict:
    here = Path(__file__).parent
    out = folder / f"{ranks}.pt"
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, folder / "step.py", folder / "data", out]
    environment = os.environ | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)
