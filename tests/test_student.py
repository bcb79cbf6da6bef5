"""The student: parity with the published implementation, its pools, its refusals."""

import ast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.students import SMALL, small_student, some_pixels

from pipeline.core.config import StudentConfig
from pipeline.core.errors import PipelineError
from pipeline.core.records import Preprocessing
from pipeline.models.blocks import Attention, neighbourhood_mask, quick_gelu
from pipeline.models.student import Student
from pipeline.training.losses import published_loss

FIXTURES = ["masked_same_norm", "unmasked_free_norm"]
POOLS = ["extra-head", "mean", "cls", "cls-distill"]


@pytest.fixture(params=FIXTURES)
def published(request, shared) -> tuple[Student, dict[str, torch.Tensor]]:
    """A student with the fixture's weights, and the fixture's arrays."""
    with np.load(shared / "parity" / f"{request.param}.npz") as file:
        config = ast.literal_eval(str(file["config"]))
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "config"}
    config["embedding_size"] = config.pop("width")
    student = Student(StudentConfig(pool="extra-head", **config)).eval()
    student.load_state_dict(
        {n.removeprefix("state/"): x for n, x in arrays.items() if n.startswith("state/")}
    )
    return student, arrays


def test_outputs_equal_the_published_implementation(published):
    student, arrays = published
    for name, found in student.outputs(arrays["pixels"])._asdict().items():
        torch.testing.assert_close(found, arrays[name], atol=1e-5, rtol=0)


def test_loss_equals_the_published_implementation(published):
    student, arrays = published
    found = published_loss(student(arrays["pixels"])[0], arrays["target"])
    torch.testing.assert_close(found, arrays["loss_norm100"], atol=0, rtol=1e-5)


def test_parameters_have_the_published_names_except_ln_post(published):
    student, arrays = published
    names = {name.removeprefix("state/") for name in arrays if name.startswith("state/")}
    assert set(student.state_dict()) == names - {"ln_post.weight", "ln_post.bias"}


def test_full_size_student_has_the_published_number_of_parameters():
    config = dict(image_size=224, patch_size=28, embedding_size=512, heads=16, layers=6)
    student = Student(StudentConfig(**SMALL | config))
    unused_ln_post = 2 * 512
    assert sum(x.numel() for x in student.parameters()) + unused_ln_post == 21_391_361


def test_attention_equals_torch_multihead_attention():
    torch.manual_seed(0)
    ours, theirs = Attention(27, 3), torch.nn.MultiheadAttention(27, 3, batch_first=True)
    torch.nn.init.normal_(ours.in_proj_weight, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    x, mask = torch.randn(2, 16, 27), neighbourhood_mask(4)
    bias = torch.zeros(16, 16).masked_fill(~mask, float("-inf"))
    expected, weights = theirs(x, x, x, attn_mask=~mask, average_attn_weights=False)
    torch.testing.assert_close(ours(x, bias), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.probabilities(x, bias), weights, atol=1e-6, rtol=1e-5)


def test_quick_gelu_and_its_gradient_equal_the_formula():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    assert torch.autograd.gradcheck(quick_gelu, x.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(quick_gelu(x.clone()), x * torch.sigmoid(1.702 * x))


def test_training_gradients_in_bfloat16_point_where_those_in_float32_do():
    student, target = small_student(), F.normalize(torch.randn(3, 24), dim=1)
    gradients = []
    for enabled in (False, True):
        student.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (embedding,) = student.embeddings_for_loss(some_pixels())
        assert embedding.dtype == torch.float32
        published_loss(embedding, target).backward()
        used = [x.grad for x in student.parameters() if x is not student.scale]
        gradients.append(torch.cat([x.flatten() for x in used]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("grid", [1, 2, 5])
def test_mask_lets_a_patch_see_king_moves_only(grid):
    mask = neighbourhood_mask(grid)
    for a in range(grid * grid):
        for b in range(grid * grid):
            steps = max(abs(a // grid - b // grid), abs(a % grid - b % grid))
            assert mask[a, b] == (steps <= 1)


def test_class_tokens_see_everything_and_patches_do_not_see_them():
    mask = neighbourhood_mask(3, class_tokens=2)
    assert mask[:2].all() and not mask[2:, :2].any()
    assert torch.equal(mask[2:, 2:], neighbourhood_mask(3))


def test_masked_patch_does_not_depend_on_pixels_beyond_the_layers_reach():
    student = small_student(image_size=64)  # 8 x 8 patches; two layers reach two patches far
    pixels = some_pixels(1, 64)
    changed = pixels.clone()
    changed[..., 24:] += 1  # from the fourth column on
    before, after = student.patch_embeddings(pixels), student.patch_embeddings(changed)
    same = (before == after).all(dim=2).view(8, 8)
    assert same[:, 0].all() and not same[:, 1:].any()


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("masked", [True, False])
def test_patch_weights_are_a_distribution_and_every_parameter_learns(pool, masked):
    student = small_student(pool=pool, neighbourhood_mask=masked)
    embedding, weights = student(some_pixels())
    assert embedding.shape == (3, 24) and weights.shape == (3, 16)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    losses = student.embeddings_for_loss(some_pixels())
    assert losses.shape == (2 if pool == "cls-distill" else 1, 3, 24)
    torch.testing.assert_close(losses.mean(dim=0), embedding)
    losses.square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in student.parameters())


def test_embedding_is_the_weighted_sum_of_the_patch_embeddings():
    outputs = small_student().outputs(some_pixels())
    expected = torch.einsum("bn,bne->be", outputs.patch_weights, outputs.patch_embeddings)
    torch.testing.assert_close(outputs.embedding, expected)


def test_mean_pool_weighs_all_patches_alike():
    outputs = small_student(pool="mean").outputs(some_pixels())
    torch.testing.assert_close(outputs.embedding, outputs.patch_embeddings.mean(dim=1))
    assert (outputs.patch_weights == 1 / 16).all()


@pytest.mark.parametrize("scale,length", [(1.5, 1.5), (25.0, 10.0)])
def test_same_norm_gives_all_patches_one_length_of_at_most_ten(scale, length):
    student = small_student()
    torch.nn.init.constant_(student.scale, scale)
    norms = student.patch_embeddings(some_pixels()).norm(dim=2)
    torch.testing.assert_close(norms, torch.full_like(norms, length))


def test_low_temperature_picks_one_patch():
    weights = small_student(temperature=1e-4)(some_pixels())[1]
    torch.testing.assert_close(weights.max(dim=1).values, torch.ones(3))


@pytest.mark.parametrize("same_norm", [True, False])
def test_zero_tokens_give_zeros_and_no_nan(same_norm):
    student = small_student(same_norm=same_norm)
    for parameter in student.parameters():
        torch.nn.init.zeros_(parameter)
    embedding, weights = student(some_pixels())
    assert (embedding == 0).all() and weights.isfinite().all()
    embedding.sum().backward()
    assert all(x.grad.isfinite().all() for x in student.parameters() if x.grad is not None)


def test_loss_of_zero_vectors_is_finite():
    assert published_loss(torch.zeros(2, 8), torch.zeros(2, 8)) == 0


@given(st.integers(0, 10**6), st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_loss_ignores_length_and_is_twice_the_mean_for_opposite_vectors(seed, length):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        published_loss(length * x, x, 1.0), torch.tensor(0.0), atol=1e-6, rtol=0
    )
    expected = 2 * F.normalize(x, dim=1).abs().mean()
    torch.testing.assert_close(published_loss(-x, x, 1.0), expected)


def test_an_image_does_not_depend_on_the_others_in_its_batch():
    student, pixels = small_student(), some_pixels()
    torch.testing.assert_close(student(pixels)[0][1:2], student(pixels[1:2])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pixels_of_any_float_type_are_taken(dtype):
    student, pixels = small_student(), some_pixels(64).to(dtype) + 3
    torch.testing.assert_close(student(pixels)[0], student(pixels.float())[0])


def test_student_cast_to_bfloat16_stays_close():
    student, pixels = small_student(), some_pixels()
    exact = student(pixels)[0]
    assert F.cosine_similarity(student.bfloat16()(pixels)[0], exact).min() > 0.999


def test_normalise_maps_bytes_as_the_preprocessing_says():
    student = small_student(Preprocessing(mean=[0.5, 0.25, 0.0], std=[0.5, 1.0, 2.0]))
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    pixels[0, 0, 1] = 255  # the second pixel of the first row
    expected = torch.tensor([[-1.0, 1.0], [-0.25, 0.75], [0.0, 0.5]])
    torch.testing.assert_close(student.as_input(pixels)[0, :, 0, :2], expected)


def test_same_seed_gives_the_same_weights():
    first, second = small_student().state_dict(), small_student().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resized_to_its_own_size_is_an_equal_copy():
    student = small_student()
    copy, pixels = student.resized(32), some_pixels()
    assert copy is not student
    assert torch.equal(copy(pixels)[0], student(pixels)[0])


@pytest.mark.parametrize("pool", ["extra-head", "cls-distill"])
def test_resized_keeps_a_linear_ramp_of_positions_and_takes_the_new_size(pool):
    student = small_student(pool=pool)
    ramp = torch.arange(4.0).repeat_interleave(4)[:, None] + torch.arange(4.0).repeat(4)[:, None]
    student.positional_embedding.data = ramp.expand(16, 27).clone()
    larger = student.resized(64)
    centre = larger.positional_embedding.detach()[:, 0].view(8, 8)[3:5, 3:5]
    torch.testing.assert_close(centre, torch.tensor([[2.5, 3.0], [3.0, 3.5]]), atol=0.03, rtol=0)
    assert larger(some_pixels(2, 64))[1].shape == (2, 64)


@pytest.mark.parametrize(
    "pixels,message",
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "normalised floats"),
        (torch.zeros(2, 4, 32, 32), "expected (B, 3, 32, 32)"),
        (torch.zeros(2, 32, 32, 3), "expected (B, 3, 32, 32)"),
        (torch.zeros(2, 3, 40, 40), "student.resized"),
        (torch.zeros(3, 32, 32), "expected (B, 3, 32, 32)"),
        (torch.zeros(0, 3, 32, 32), "B >= 1"),
        (torch.full((1, 3, 32, 32), float("nan")), "NaN"),
        (torch.full((1, 3, 32, 32), float("inf")), "infinity"),
    ],
)
def test_unfit_pixels_are_refused(pixels, message):
    with pytest.raises(PipelineError) as caught:
        small_student()(pixels)
    assert message in str(caught.value)


def test_normalise_refuses_floats():
    with pytest.raises(PipelineError, match="expected uint8"):
        small_student().as_input(np.zeros((1, 32, 32, 3), np.float32))


@pytest.mark.parametrize(
    "change",
    [{"image_size": 33}, {"heads": 5}, {"temperature": 0.0}, {"temperature": -1.0}, {"layers": 0}],
)
def test_impossible_configurations_are_refused(change):
    with pytest.raises(ValueError):
        StudentConfig(**SMALL | change)


def test_resizing_to_a_part_of_a_patch_is_refused():
    with pytest.raises(PipelineError, match="multiple of patch_size"):
        small_student().resized(36)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_outputs_on_cuda_equal_those_on_the_cpu(published):
    student, arrays = published
    on_cuda = student.to("cuda").outputs(arrays["pixels"].to("cuda"))
    for name, found in on_cuda._asdict().items():
        torch.testing.assert_close(found.cpu(), arrays[name], atol=1e-5, rtol=0)
