"""Looking inside a student: what attends to what, what the filters and positions have learned.

Letters: B images, N patches in rows of g, T class tokens (none in the published pools), H heads,
L layers, W token width, E embedding size, p patch size in px. `look_inside` runs the student once
and keeps everything; the other functions are pure. Costs memory for L * H * (T + N)^2 values per
image: a few hundred images at a time.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.errors import PipelineError
from pipeline.models.blocks import Block
from pipeline.models.student import Student


class Inside(NamedTuple):
    """What one pass leaves behind."""

    attention: Tensor  # (L, B, H, T + N, T + N): rows sum to 1
    tokens: Tensor  # (L + 1, B, T + N, W): what enters each block, and what leaves the last


@torch.no_grad()
def look_inside(student: Student, pixels: Tensor) -> Inside:
    """(B, 3, S, S) normalised float pixels -> attention and tokens of every layer."""
    x, bias = student.first_tokens(pixels), student.attention_bias
    attention, tokens = [], [x]
    for block in student.transformer.resblocks:
        assert isinstance(block, Block)
        attention.append(block.attn.probabilities(block.ln_1(x), bias))
        x = block(x, bias)
        tokens.append(x)
    return Inside(torch.stack(attention), torch.stack(tokens))


def attention_rollout(attention: Tensor) -> Tensor:
    """(L, B, H, n, n) -> (B, n, n): how much of each last token stems from each first one.

    Heads are averaged and the residual path counts one half, then the layers are multiplied
    (Abnar and Zuidema 2020, "Quantifying attention flow in transformers"). Rows sum to 1.
    """
    identity = torch.eye(attention.shape[-1], device=attention.device)
    rollout = identity.expand(attention.shape[1], -1, -1)
    for layer in attention.float().mean(dim=2):  # (B, n, n)
        rollout = (layer + identity) / 2 @ rollout
    return rollout


def mean_attention_distance(attention: Tensor, patch_size: int) -> Tensor:
    """(L, B, H, T + N, T + N) -> (L, H): px between a patch's centre and what it attends to.

    Averaged over images and patches with attention as weight (Dosovitskiy et al. 2021, figure 7);
    class tokens are left out and the rest scaled to sum 1.
    """
    grid = math.isqrt(attention.shape[-1])  # T is at most 2, less than a further row of patches
    patches = attention.float()[..., -(grid**2) :, -(grid**2) :]
    centres = torch.stack(torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij"))
    centres = centres.flatten(1).T.to(attention.device, torch.float32)  # (N, 2)
    distances = torch.cdist(centres, centres) * patch_size  # (N, N)
    fractions = patches / patches.sum(dim=-1, keepdim=True)
    return (fractions * distances).sum(dim=-1).mean(dim=(1, 3))


@torch.no_grad()
def position_similarity(student: Student) -> Tensor:
    """(g, g, g, g): cosine between the position embeddings of two patches (row, column each)."""
    unit = F.normalize(student.positional_embedding, dim=1)
    grid = student.config.grid
    return (unit @ unit.T).reshape(grid, grid, grid, grid)


@torch.no_grad()
def filter_components(student: Student, count: int = 28) -> tuple[Tensor, Tensor]:
    """Principal components of the patch filters: (count, 3, p, p) of unit length, and (count,)
    their shares of the variance, falling, in [0, 1] (Dosovitskiy et al. 2021, figure 7).
    """
    filters = student.conv1.weight.flatten(1)  # (W, 3 p p)
    _, singular, components = torch.linalg.svd(filters - filters.mean(dim=0), full_matrices=False)
    if not 1 <= count <= len(components):
        raise PipelineError(f"found count {count}, expected 1 to {len(components)} components")
    shares = singular**2 / (singular**2).sum()
    return components[:count].unflatten(1, student.conv1.weight.shape[1:]), shares[:count]


def patch_norms(student: Student, tokens: Tensor) -> Tensor:
    """(..., T + N, W) tokens -> (..., N): length of each patch's E values before same_norm.

    After same_norm all lengths are equal, so artefacts show here only.
    """
    patches = tokens[..., student.class_tokens :, :].float()
    values = patches.unflatten(-1, (student.config.heads, -1))[..., :-1]
    return torch.linalg.vector_norm(values, dim=(-2, -1))


def outlier_share(norms: Tensor, times: float = 2.0) -> float:
    """Share in [0, 1] of patches that are more than `times` as long as the median patch.

    Long tokens in plain places are the artefacts of Darcet et al. 2024, "Vision transformers need
    registers".
    """
    return float((norms > times * norms.median()).float().mean())


def weight_entropy(patch_weights: Tensor) -> Tensor:
    """(B, N) weights with rows that sum to 1 -> (B,) nats: 0 for one patch, log N for all alike."""
    return torch.special.entr(patch_weights.float()).sum(dim=1)
