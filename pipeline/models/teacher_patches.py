"""What the teacher's image tower says of single patches: to look at and to compare with, nothing is
trained on it.

`teacher_view` is for open_clip's own ViT (`open_clip.transformer.VisionTransformer`), as CLIP's
are; other towers (ResNet, timm's) have no class token whose attention could be read here.
`dense_patches` is for those and for CLIP's ResNets.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.core.errors import PipelineError
from pipeline.core.records import Sample
from pipeline.data.pixels import decode
from pipeline.data.views import view_pixels
from pipeline.models.open_clip import ModifiedResNet, VisionTransformer
from pipeline.models.patches import PatchView
from pipeline.models.sizes import positions_for
from pipeline.models.teacher import Teacher

RESNET_STRIDE = 32  # px of the image for each position before CLIP's attention pool


@torch.inference_mode()
def teacher_view(teacher: Teacher, pixels: np.ndarray) -> PatchView:
    """(S, S, 3) uint8 -> the class token's attention to the patches, and the patches in its space.

    The attention is the last block's, averaged over heads and scaled to sum 1. The patch tokens
    go through the class token's own head: CLIP trains only that token towards texts, so patches are
    comparable with text as far as the common head carries over (Zhou et al. 2022, MaskCLIP, discuss
    how far). Raises PipelineError for a tower that is no plain ViT.
    """
    tower, last = teacher.model.visual, _last_block(teacher)
    inputs: list = []
    hook = last.attn.register_forward_pre_hook(lambda _, tokens: inputs.append(tokens))
    try:
        features = tower.forward_intermediates(
            teacher.normalised(pixels[None].copy()),
            indices=1,
            normalize_intermediates=True,
            output_fmt="NLC",
        )
    finally:
        hook.remove()
    _, attention = last.attn(*inputs[-1], need_weights=True)  # (1, 1 + N, 1 + N)
    weights = attention[0, 0, 1:].float()  # (N,)
    tokens = features["image_intermediates"][-1][0]  # (N, W)
    patches = tokens if tower.proj is None else tokens @ tower.proj  # (N, E)
    return PatchView(
        (weights / weights.sum()).cpu().numpy().reshape(tower.grid_size),
        F.normalize(patches.float(), dim=-1).cpu().numpy().reshape(*tower.grid_size, -1),
        F.normalize(features["image_features"][0].float(), dim=-1).cpu().numpy(),
    )


def row_viewer(teacher: Teacher) -> Callable[[Sample], PatchView]:
    """The teacher's view of a sample.

    Raises PipelineError at once for a tower that is no plain ViT.
    """
    _last_block(teacher)
    size, interpolation = teacher.image_size, teacher.preprocessing.interpolation

    def view(sample: Sample) -> PatchView:
        image = decode(sample.jpg)
        return teacher_view(
            teacher, view_pixels(image, sample.box, sample.flip, size, interpolation)
        )

    return view


def dense_sizes(teacher: Teacher, grid: int) -> list[int]:
    """Image sizes (px) to compare with a student of grid x grid patches: the teacher's own, and
    doubled until its positions are as many. Larger images are finer, and further from what the
    teacher was trained on. Raises PipelineError for a tower that is neither a plain ViT nor CLIP's
    ResNet.
    """
    tower = teacher.model.visual
    if isinstance(tower, ModifiedResNet):
        stride = RESNET_STRIDE
    else:
        _last_block(teacher)
        stride = tower.patch_size[0]
    sizes = [teacher.image_size]
    while sizes[-1] < stride * grid:
        sizes.append(min(2 * sizes[-1], stride * grid))
    return [size - size % stride for size in sizes]


@torch.inference_mode()
def dense_patches(teacher: Teacher, pixels: np.ndarray) -> np.ndarray:
    """(B, S, S, 3) uint8, S one of `dense_sizes` -> (B, g, g, E) float32, unit length.

    The last attention, a block's or a ResNet's pool, gives each position its own value and the
    output projection instead of a mixture of all: MaskCLIP's way (Zhou et al. 2022, section 3.2).
    Where the grid is finer than the one the teacher was trained on, its positions are interpolated.
    """
    tower, x = teacher.model.visual, teacher.normalised(pixels)
    dense = _resnet_patches if hasattr(tower, "attnpool") else _vit_patches
    patches = dense(tower, x)  # (B, N, E)
    grid = round(patches.shape[1] ** 0.5)
    return F.normalize(patches.float(), dim=-1).cpu().numpy().reshape(len(x), grid, grid, -1)


def _resnet_patches(tower: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in (tower.stem, tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        x = layer(x)
    pool, tokens = tower.attnpool, x.flatten(2).transpose(1, 2)  # (B, N, W)
    positions = positions_for(pool.positional_embedding[1:].float(), x.shape[-1])
    return pool.c_proj(pool.v_proj(tokens + positions.to(tokens.dtype)))


def _vit_patches(tower: Any, x: torch.Tensor) -> torch.Tensor:
    x = tower.conv1(x)  # (B, W, g, g)
    positions = positions_for(tower.positional_embedding[1:].float(), x.shape[-1]).to(x.dtype)
    first = tower.class_embedding.to(x.dtype) + tower.positional_embedding[:1].to(x.dtype)
    tokens = x.flatten(2).transpose(1, 2) + positions
    x = tower.ln_pre(torch.cat([first.expand(len(x), 1, -1), tokens], dim=1))
    *below, last = tower.transformer.resblocks
    for block in below:
        x = block(x)
    tokens = x[:, 1:]
    value = last.attn.in_proj_weight.chunk(3)[2], last.attn.in_proj_bias.chunk(3)[2]
    tokens = tokens + last.ls_1(last.attn.out_proj(F.linear(last.ln_1(tokens), *value)))
    tokens = tower.ln_post(tokens + last.ls_2(last.mlp(last.ln_2(tokens))))
    return tokens if tower.proj is None else tokens @ tower.proj


def _last_block(teacher: Teacher) -> Any:
    tower = teacher.model.visual
    plain = isinstance(tower, VisionTransformer) and tower.attn_pool is None
    last = tower.transformer.resblocks[-1] if plain else None
    if not isinstance(getattr(last, "attn", None), nn.MultiheadAttention):
        raise PipelineError(f"the image tower of {teacher.card.name} is no plain CLIP ViT.")
    return last
