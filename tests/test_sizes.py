"""One student at several image sizes: the same weights, and gradients that reach them."""

import numpy as np
import pytest
import torch
from support import stored
from support.students import small_student, some_pixels

from pipeline.models.sizes import POSITIONS, ManySizes, positions_for
from pipeline.training.batches import training_batches
from pipeline.training.dataset import Dataset
from pipeline.training.distributed import Ranks
from pipeline.training.sampler import Sampler
from pipeline.training.trainer import Trainer

SIZES = [24, 32, 48]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pool", ["extra-head", "cls-distill"])
def test_each_size_gives_what_a_resized_student_gives(size, pool):
    student, pixels = small_student(pool=pool), some_pixels(size=size)
    found = ManySizes(student, SIZES).embeddings_for_loss(pixels)
    torch.testing.assert_close(found, student.resized(size).embeddings_for_loss(pixels))


def test_gradients_of_another_size_reach_the_students_own_weights_and_positions():
    """Against the difference of the loss along the gradient itself."""
    student, pixels = small_student(), some_pixels(size=48)
    sized = ManySizes(student, SIZES)

    def loss() -> torch.Tensor:
        return sized.embeddings_for_loss(pixels).square().sum()

    loss().backward()
    parameters = dict(student.named_parameters())
    length = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter += sign * 1e-3 * parameter.grad / length
            values.append(float(loss()))
            for parameter in parameters.values():
                parameter -= sign * 1e-3 * parameter.grad / length
    assert float(length) == pytest.approx((values[0] - values[1]) / 2e-3, rel=0.02)
    assert parameters[POSITIONS].grad.abs().sum() > 0


def test_positions_of_the_own_grid_are_the_own_ones():
    positions = torch.randn(16, 5)
    assert positions_for(positions, 4) is positions
    assert positions_for(positions, 6).shape == (36, 5)


def batches(data, sizes, start=0, stop=12, workers=2):
    dataset = Dataset(data, "train", 32, "bicubic")
    sampler = Sampler(dataset, 5, 8, 2)
    return list(training_batches(dataset, sampler, start, stop, workers=workers, image_sizes=sizes))


def test_each_step_shows_one_size_as_a_function_of_its_number(tmp_path):
    stored.write_data(tmp_path)
    found = batches(tmp_path, SIZES)
    sides = [batch.pixels.shape[1] for batch in found]
    assert set(sides) == set(SIZES)
    resumed = batches(tmp_path, SIZES, start=7, workers=1)
    for batch, again in zip(found[7:], resumed, strict=True):
        assert batch.ids == again.ids
        np.testing.assert_array_equal(batch.pixels, again.pixels)
    alone = batches(tmp_path, [48])
    for batch, same in zip(found, alone, strict=True):
        assert batch.ids == same.ids  # which rows a step sees does not depend on the sizes
        if batch.pixels.shape[1] == 48:
            np.testing.assert_array_equal(batch.pixels, same.pixels)


def test_a_student_learns_all_sizes_with_one_set_of_weights(tmp_path):
    stored.write_data(tmp_path)
    loss = {"l1": 1.0, "cosine": 0.0, "relational": 0.5, "caption": 0.0}
    config = stored.distill_config(image_sizes=SIZES, views=1, loss=loss)
    torch.manual_seed(0)
    student = small_student(embedding_size=32, heads=4, layers=1)
    before = {name: x.clone() for name, x in student.named_parameters()}
    trainer = Trainer(config, student, np.zeros(32, np.float32), Ranks(torch.device("cpu")))
    for batch in batches(tmp_path, SIZES, stop=4):
        trainer.train_step(batch)
    losses = [row["loss"] for row in trainer.read()]
    assert np.isfinite(losses).all()
    assert all((x != before[name]).any() for name, x in trainer.student.named_parameters())
    assert set(trainer.student.state_dict()) == set(before)


@pytest.mark.parametrize("sizes", [[64], [32, 36], [32, 32], []])
def test_sizes_that_do_not_fit_the_student_are_refused(sizes):
    with pytest.raises(ValueError, match=r"student\.image_size 32 among them"):
        stored.distill_config(image_sizes=sizes)
