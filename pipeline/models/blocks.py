"""The student's trunk: pre-norm transformer blocks over (B, N, W) tokens.

Letters: B images, N tokens, H heads, D = W / H values per head (the student's C + 1), W token
width. Parameters carry the names of the published checkpoints.

On the CPU, attention is written out as plain matrix products: with heads of 33 values and 64
tokens, the backward pass of `scaled_dot_product_attention` costs there more than all the linear
layers together (benchmarks/README.md). On CUDA its fused kernels are the faster ones.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def neighbourhood_mask(grid: int, class_tokens: int = 0) -> Tensor:
    """Who may attend to whom: (T + N, T + N) bool, N = grid * grid patches in rows.

    A patch sees the patches at most one row and one column away, itself included; the T class
    tokens come first, see everything and are seen by each other only, so that no patch learns of
    distant ones through them.
    """
    row, column = torch.arange(grid * grid) // grid, torch.arange(grid * grid) % grid
    near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
    mask = F.pad(near, (class_tokens, 0, class_tokens, 0))
    mask[:class_tokens] = True
    return mask


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), any shape: the activation of OpenAI's CLIP. May overwrite x.

    It is silu(1.702 x) / 1.702, for which there are native kernels in both directions.
    """
    if torch.compiler.is_compiling():  # which fuses it with its neighbours in either direction
        return x * torch.sigmoid(1.702 * x)
    return _QuickGELU.apply(x) if torch.is_grad_enabled() else _of_scaled(x.mul_(1.702))


def _of_scaled(scaled: Tensor) -> Tensor:
    return F.silu(scaled, inplace=True).mul_(1 / 1.702)


class _QuickGELU(torch.autograd.Function):
    """One new tensor in each direction, where autograd by itself would make five and keep two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _of_scaled(1.702 * x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        scaled = 1.702 * ctx.saved_tensors[0]
        return torch.ops.aten.silu_backward.grad_input(gradient, scaled, grad_input=scaled)


class Attention(nn.Module):
    """Multi-head self-attention, (B, N, W) -> (B, N, W), scaled by 1 / sqrt(D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """bias: (N, N) added to the scores, 0 where a token may look and -inf elsewhere."""
        return (self.fused if x.is_cuda else self.written_out)(x, bias)

    def written_out(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As matrix products: the faster way on a CPU."""
        heads = self._heads(x)
        q, k, v = heads.flatten(1, 2)  # (B H, N, D) each, laid out for the products
        mixed = (_probabilities(q, k, bias) @ v).unflatten(0, heads.shape[1:3])
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, N, W)

    def fused(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """By the fused kernels, which want D in multiples of 8: so many rows of zeros are added to
        the weights (not at load: optimiser and checkpoints keep the published shapes), and no
        activation is copied.
        """
        heads, width = self.heads, x.shape[-1]
        size = width // heads
        pad = -size % 8
        weight = F.pad(self.in_proj_weight.view(3, heads, size, width), (0, 0, 0, pad))
        in_bias = F.pad(self.in_proj_bias.view(3, heads, size), (0, pad)).flatten()
        qkv = F.linear(x, weight.flatten(0, 2), in_bias)  # (B, N, 3 H D')
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D') each
        bias = None if bias is None else bias.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=size**-0.5)
        weight = F.pad(self.out_proj.weight.view(width, heads, size), (0, pad)).flatten(1)
        return F.linear(mixed.transpose(1, 2).flatten(2), weight, self.out_proj.bias)

    def probabilities(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, H, N, N): how much each token (third axis) takes from each; rows sum to 1."""
        heads = self._heads(x)
        q, k, _ = heads.flatten(1, 2)
        return _probabilities(q, k, bias).unflatten(0, heads.shape[1:3])

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, W) -> queries, keys and values, (3, B, H, N, D)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Queries and keys (B H, N, D) -> softmax(q k^T / sqrt(D) + bias), (B H, N, N)."""
    bias = q.new_zeros(()) if bias is None else bias.to(q.dtype)
    return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5).softmax(dim=-1)


class MLP(nn.Module):
    """(B, N, W) -> (B, N, W) through 4 W hidden values and QuickGELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(quick_gelu(self.c_fc(x)))


class Block(nn.Module):
    """One pre-norm residual block, (B, N, W) -> (B, N, W)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), bias)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, initialised as CLIP's: deeper stacks add less per block."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        blocks = [Block(width, heads) for _ in range(layers)]
        self.resblocks = nn.ModuleList(blocks)
        for block in blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=(2 * layers * width) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=(2 * layers * width) ** -0.5)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        for block in self.resblocks:
            x = block(x, bias)
        return x
