"""The teacher's dense features against open_clip's own attention, masked to each position alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.core.errors import PipelineError
from pipeline.models.open_clip import open_clip
from pipeline.models.teacher_patches import dense_patches, dense_sizes

TEXT = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}


def teacher(vision: dict) -> SimpleNamespace:
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=TEXT).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def normalised(pixels: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255

    card = SimpleNamespace(name="drawn")
    return SimpleNamespace(
        model=model, normalised=normalised, image_size=vision["image_size"], card=card
    )


def some(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)


def alone(count: int) -> torch.Tensor:
    """An attention mask that lets each of count positions see itself only."""
    return torch.full((count, count), -torch.inf).fill_diagonal_(0)


def test_a_vits_patches_are_its_last_block_with_each_position_alone():
    of = teacher(VIT)
    tower = of.model.visual
    x = tower._embeds(of.normalised(some(32)))
    for block in tower.transformer.resblocks[:-1]:
        x = block(x)
    x = tower.transformer.resblocks[-1](x, attn_mask=alone(17))
    expected = F.normalize(tower.ln_post(x[:, 1:]) @ tower.proj, dim=-1)
    found = dense_patches(of, some(32))
    assert found.shape == (2, 4, 4, 24)
    np.testing.assert_allclose(found.reshape(2, 16, 24), expected.numpy(), atol=1e-5)


def test_a_resnets_positions_are_its_pool_with_each_position_alone():
    of = teacher(RESNET)
    tower = of.model.visual
    x = of.normalised(some(64))
    for layer in (tower.stem, tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        x = layer(x)
    pool = tower.attnpool
    tokens = x.flatten(2).permute(2, 0, 1) + pool.positional_embedding[1:, None]
    expected, _ = F.multi_head_attention_forward(
        query=tokens, key=tokens, value=tokens, embed_dim_to_check=tokens.shape[-1],
        num_heads=pool.num_heads, q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight, in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0.0,
        out_proj_weight=pool.c_proj.weight, out_proj_bias=pool.c_proj.bias, training=False,
        use_separate_proj_weight=True, need_weights=False, attn_mask=alone(4),
    )  # fmt: skip
    expected = F.normalize(expected.transpose(0, 1), dim=-1)
    found = dense_patches(of, some(64))
    assert found.shape == (2, 2, 2, 24)
    np.testing.assert_allclose(found.reshape(2, 4, 24), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("vision", "grid", "sizes"), [
    (VIT, 4, [32]), (VIT, 3, [32]), (VIT, 8, [32, 64]), (RESNET, 2, [64]), (RESNET, 7, [64, 128, 224]),
])  # fmt: skip
def test_images_are_enlarged_until_there_are_as_many_positions_as_patches(vision, grid, sizes):
    of = teacher(vision)
    assert dense_sizes(of, grid) == sizes
    assert dense_patches(of, some(sizes[-1])).shape[1] >= grid


def test_another_tower_is_named():
    of = teacher(VIT)
    of.model = SimpleNamespace(visual=torch.nn.Identity())
    with pytest.raises(PipelineError, match="the image tower of drawn is no plain CLIP ViT"):
        dense_sizes(of, 4)
