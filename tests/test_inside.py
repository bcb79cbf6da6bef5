"""Looking inside: each function against a case whose answer is known."""

import math
from functools import partial

import pytest
import torch
from support import students

from pipeline.core.errors import PipelineError
from pipeline.models.inside import (
    attention_rollout,
    filter_components,
    look_inside,
    mean_attention_distance,
    outlier_share,
    patch_norms,
    position_similarity,
    weight_entropy,
)

small_student = partial(students.small_student, same_norm=False)

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
PATCHES = 16


def test_attention_rows_sum_to_one_and_stay_in_the_neighbourhood():
    student = small_student()
    attention = look_inside(student, PIXELS).attention
    assert attention.shape == (2, 2, 3, PATCHES, PATCHES)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 2, 3, PATCHES))
    assert (attention[..., student.attention_bias.isinf()] == 0).all()


@pytest.mark.parametrize("pool,extra", [("extra-head", 0), ("cls-distill", 2)])
def test_last_tokens_are_those_that_the_student_pools(pool, extra):
    student = small_student(pool=pool)
    tokens = look_inside(student, PIXELS).tokens
    assert tokens.shape == (3, 2, extra + PATCHES, 27)
    heads = tokens[-1, :, extra:].unflatten(2, (3, 9))
    torch.testing.assert_close(heads[..., :-1].flatten(2), student.patch_embeddings(PIXELS))


def test_rollout_of_tokens_that_look_at_themselves_only_is_the_identity():
    identity = torch.eye(5).expand(3, 2, 4, 5, 5)
    torch.testing.assert_close(attention_rollout(identity), torch.eye(5).expand(2, 5, 5))


def test_rollout_of_one_uniform_layer_is_half_identity_half_uniform():
    uniform = torch.full((1, 1, 2, 4, 4), 0.25)
    expected = 0.5 * torch.eye(4) + 0.125
    torch.testing.assert_close(attention_rollout(uniform)[0], expected)


def test_rollout_rows_sum_to_one():
    rollout = attention_rollout(look_inside(small_student(), PIXELS).attention)
    torch.testing.assert_close(rollout.sum(dim=-1), torch.ones(2, PATCHES))


def test_attention_distance_is_zero_for_self_attention_and_the_mean_distance_for_uniform():
    own = torch.eye(4).expand(1, 1, 1, 4, 4)
    uniform = torch.full((1, 1, 1, 4, 4), 0.25)
    attention = torch.cat([own, uniform], dim=2)  # one layer, two heads, 2 x 2 patches of 8 px
    expected = torch.tensor([[0.0, 8 * (0 + 1 + 1 + math.sqrt(2)) / 4]])
    torch.testing.assert_close(mean_attention_distance(attention, 8), expected)


def test_attention_distance_leaves_class_tokens_out():
    attention = torch.full((1, 1, 1, 6, 6), 1 / 6)
    without = torch.full((1, 1, 1, 4, 4), 1 / 4)
    torch.testing.assert_close(
        mean_attention_distance(attention, 8), mean_attention_distance(without, 8)
    )


def test_position_similarity_is_one_with_itself_and_addressed_by_row_and_column():
    student = small_student()
    similarity = position_similarity(student)
    torch.testing.assert_close(similarity.reshape(16, 16).diagonal(), torch.ones(16))
    first, last = student.positional_embedding[1], student.positional_embedding[14]
    expected = torch.nn.functional.cosine_similarity(first, last, dim=0)
    torch.testing.assert_close(similarity[0, 1, 3, 2], expected)


def test_filters_that_are_multiples_of_one_pattern_have_one_component():
    student = small_student()
    pattern = torch.randn(3, 8, 8)
    student.conv1.weight.data = torch.randn(27, 1, 1, 1) * pattern
    components, shares = filter_components(student, 2)
    assert components.shape == (2, 3, 8, 8)
    torch.testing.assert_close(shares, torch.tensor([1.0, 0.0]), atol=1e-5, rtol=0)
    cosine = (components[0] * pattern).sum() / pattern.norm()
    torch.testing.assert_close(cosine.abs(), torch.tensor(1.0))


def test_more_components_than_filters_are_refused():
    with pytest.raises(PipelineError, match="1 to 27"):
        filter_components(small_student(), 28)


def test_patch_norms_are_taken_before_same_norm():
    free, same = small_student(), small_student(same_norm=True)
    expected = free.patch_embeddings(PIXELS).norm(dim=2)
    found = patch_norms(same, look_inside(same, PIXELS).tokens[-1])
    torch.testing.assert_close(found, expected)


def test_outlier_share_counts_the_long_ones():
    norms = torch.tensor([[1.0, 1.0, 1.1, 5.0], [0.9, 1.0, 1.0, 1.0]])
    assert outlier_share(norms) == 1 / 8
    assert outlier_share(norms, times=10) == 0


def test_weight_entropy_is_zero_for_one_patch_and_log_n_for_all_alike():
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(weight_entropy(weights), torch.tensor([0.0, math.log(4)]))
