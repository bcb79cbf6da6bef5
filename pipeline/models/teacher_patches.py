"""What the teacher's image tower says of single patches, for pictures only: nothing is trained on it.

For open_clip's own ViT (`open_clip.transformer.VisionTransformer`), as CLIP's are; other towers
(ResNet, timm's) have no class token whose attention could be read here.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.core.errors import PipelineError
from pipeline.core.records import Sample
from pipeline.data.pixels import decode
from pipeline.data.views import view_pixels
from pipeline.models.open_clip import open_clip
from pipeline.models.patches import PatchView
from pipeline.models.teacher import Teacher


@torch.inference_mode()
def teacher_view(teacher: Teacher, pixels: np.ndarray) -> PatchView:
    """(S, S, 3) uint8 -> the class token's attention to the patches, and the patches in its space.

    The attention is the last block's, averaged over heads and scaled to sum 1. The patch tokens
    go through the class token's own head: CLIP trains only that token towards texts, so patches are
    comparable with text as far as the common head carries over (Zhou et al. 2022, MaskCLIP, discuss
    how far). Raises PipelineError for a tower that is no plain ViT.
    """
    tower, last = teacher.model.visual, _last_block(teacher)
    seen: list = []
    hook = last.attn.register_forward_pre_hook(lambda _, tokens: seen.append(tokens))
    try:
        found = tower.forward_intermediates(
            teacher.normalised(pixels[None].copy()),
            indices=1,
            normalize_intermediates=True,
            output_fmt="NLC",
        )
    finally:
        hook.remove()
    _, attention = last.attn(*seen[-1], need_weights=True)  # (1, 1 + N, 1 + N)
    weights = attention[0, 0, 1:].float()  # (N,)
    tokens = found["image_intermediates"][-1][0]  # (N, W)
    patches = tokens if tower.proj is None else tokens @ tower.proj  # (N, E)
    return PatchView(
        (weights / weights.sum()).cpu().numpy().reshape(tower.grid_size),
        F.normalize(patches.float(), dim=-1).cpu().numpy().reshape(*tower.grid_size, -1),
        F.normalize(found["image_features"][0].float(), dim=-1).cpu().numpy(),
    )


def row_viewer(teacher: Teacher) -> Callable[[Sample], PatchView]:
    """The teacher's view of a sample.

    Raises PipelineError at once for a tower that is no plain ViT.
    """
    _last_block(teacher)
    size, how = teacher.image_size, teacher.preprocessing.interpolation

    def view(sample: Sample) -> PatchView:
        image = decode(sample.jpg)
        return teacher_view(teacher, view_pixels(image, sample.box, sample.flip, size, how))

    return view


def _last_block(teacher: Teacher) -> nn.Module:
    tower = teacher.model.visual
    plain = isinstance(tower, open_clip.transformer.VisionTransformer) and tower.attn_pool is None
    last = tower.transformer.resblocks[-1] if plain else None
    if not isinstance(getattr(last, "attn", None), nn.MultiheadAttention):
        raise PipelineError(f"the image tower of {teacher.card.name} is no plain CLIP ViT.")
    return last
