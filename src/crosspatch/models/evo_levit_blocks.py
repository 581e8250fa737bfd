# SPDX-License-Identifier: Apache-2.0
"""The layers of Evo-LeViT: LeViT's, with a class token, and attention that shows its class row.

"LeViT: a Vision Transformer in ConvNet's Clothing for Faster Inference", Graham et al., arXiv
2104.01136, ICCV 2021; "Evo-ViT", arXiv 2108.01390. Every Linear is without bias and followed by
batch normalisation over all tokens; there is no LayerNorm. Per head, queries and keys are d wide
and values `attn_ratio` times d. `scores` (B, N) are the patches' importances g, None before the
first block; see `models/evo_levit.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.utils.checkpoint
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crosspatch.layers.conv_norm import ConvNorm
from crosspatch.layers.linear import Linear

STRIDE = 2  # of a convolution of the stem, and of a Downsample


class LinearNorm(nn.Module):
    """A Linear without bias and batch norm over all tokens; (B, N, C) to (B, N, D).

    scale: what the norm's weight begins with.
    """

    def __init__(self, dim_in: int, dim_out: int, scale: float = 1.0) -> None:
        super().__init__()
        self.c = Linear(dim_in, dim_out, bias=False)
        self.bn = nn.BatchNorm1d(dim_out)
        nn.init.constant_(self.bn.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class NormLinear(nn.Module):
    """A classifier: batch norm `bn`, then a Linear `l` (an identity for no class); (B, C) to (B,
    K)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.reset(num_classes)

    def reset(self, num_classes: int) -> None:
        """A new Linear; the norm, which belongs to the features, stays."""
        self.l = nn.Identity()
        if num_classes > 0:
            like = self.bn.weight
            self.l = Linear(self.bn.num_features, num_classes).to(like)
            if not like.is_meta:
                trunc_normal_(self.l.weight, std=0.02)
                nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))


def stem(in_chans: int, dim: int, halvings: int) -> nn.Sequential:
    """Convolutions that halve the picture `halvings` times, twice as wide each time up to `dim`,
    with Hardswish between them; (B, in_chans, H, W) to (B, dim, h, w)."""
    widths = [in_chans, *(dim >> (halvings - 1 - i) for i in range(halvings))]
    layers: list[nn.Module] = []
    for previous, width in pairwise(widths):
        layers += [ConvNorm(previous, width, 3, STRIDE), nn.Hardswish()]
    return nn.Sequential(*layers[:-1])


def blend(scores: Tensor | None, row: Tensor, weight: Tensor | float) -> Tensor:
    """(1 - t) g + t s of scores g and a class row s, both (B, N); the row where there is no g."""
    return row if scores is None else (1 - weight) * scores + weight * row


class Blending(nn.Module):
    """Attention with a learned weight for its class row: t = sigmoid(learn_tradeoff)."""

    def __init__(self) -> None:
        super().__init__()
        self.learn_tradeoff = nn.Parameter(torch.zeros(1))

    def weight(self, learned: bool) -> Tensor | float:
        """t, or the 0.5 at which it begins."""
        return self.learn_tradeoff.sigmoid() if learned else 0.5


class Attention(Blending):
    """Self-attention over [class; patches; more]; (B, T, C) to (B, T, C) and the class row."""

    def __init__(self, dim: int, key_dim: int, heads: int, attn_ratio: float) -> None:
        super().__init__()
        value = int(attn_ratio * key_dim)
        self.heads, self.scale, self.widths = heads, key_dim**-0.5, (key_dim, key_dim, value)
        self.qkv = LinearNorm(dim, heads * sum(self.widths))
        self.proj = nn.Sequential(nn.Hardswish(), LinearNorm(heads * value, dim, scale=0.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, T, C). The residual (B, T, C), and the attention (B, T - 1) of the class token to
        the others, mean over the heads."""
        q, k, v = _heads(self.qkv(x), self.heads).split(self.widths, dim=-1)
        attention = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        y = (attention @ v).transpose(1, 2).flatten(2)
        return self.proj(y), attention[:, :, 0, 1:].mean(dim=1)


class Mlp(nn.Module):
    """LinearNorm, Hardswish, LinearNorm; (B, T, C) to (B, T, C)."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = LinearNorm(dim, hidden)
        self.act = nn.Hardswish()
        self.fc2 = LinearNorm(hidden, dim, scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """x + DropPath(attention(x)), then x + DropPath(MLP(x))."""

    def __init__(
        self,
        dim: int,
        key_dim: int,
        heads: int,
        attn_ratio: float,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.attn = Attention(dim, key_dim, heads, attn_ratio)
        self.mlp = Mlp(dim, mlp_ratio) if mlp_ratio > 0 else None
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, scores: Tensor | None, learned: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, 1 + N [+ 1], C); scores: (B, N) or None, of the N patches after the class token.

        Returns the tokens, the new scores, and what the branches gave to the last token, (B, 1, C),
        before stochastic depth.
        """
        y, row = self.attn(x)
        if scores is not None:
            row = row[:, : scores.shape[1]]  # nobody asks about the representative
        scores = blend(scores, row, self.attn.weight(learned))
        x, moved = x + self.drop_path(y), y[:, -1:]
        if self.mlp is not None:
            y = self.mlp(x)
            x, moved = x + self.drop_path(y), moved + y[:, -1:]
        return x, scores, moved


class Downsample(Blending):
    """Between stages: attention of the class token and every second row and column to all.

    A learned table is added to the input first; an MLP with a residual follows.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        grid: tuple[int, int],
        key_dim: int,
        heads: int,
        attn_ratio: float,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        value = int(attn_ratio * key_dim)
        self.grid, self.heads = grid, heads
        self.scale, self.widths = key_dim**-0.5, (key_dim, value)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim_in))
        self.kv = LinearNorm(dim_in, heads * sum(self.widths))
        self.q = LinearNorm(dim_in, heads * key_dim)
        self.proj = nn.Sequential(nn.Hardswish(), LinearNorm(heads * value, dim_out))
        self.mlp = Mlp(dim_out, mlp_ratio) if mlp_ratio > 0 else None
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, scores: Tensor, learned: bool) -> tuple[Tensor, Tensor]:
        """x: (B, 1 + N, C) and scores (B, N) in raster order. Tokens (B, 1 + M, D) of the coarser
        grid and their scores (B, M), whose sum is that of all N before."""
        x = x + self.pos_embed
        few = torch.cat([x[:, :1], every_second(x[:, 1:], self.grid)], dim=1)
        k, v = _heads(self.kv(x), self.heads).split(self.widths, dim=-1)
        q = _heads(self.q(few), self.heads)
        attention = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        x = self.proj((attention @ v).transpose(1, 2).flatten(2))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(x))
        row = attention[:, :, 0, 1:].mean(dim=1)
        old, new = every_second(scores, self.grid), every_second(row, self.grid)
        blended = blend(old, new, self.weight(learned))
        return x, blended * (scores.sum(dim=1, keepdim=True) / total(blended))


def every_second(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """x (B, N, ...) over a grid of N, to what stands in its even rows and columns."""
    return x.unflatten(1, grid)[:, ::STRIDE, ::STRIDE].flatten(1, 2)


def total(scores: Tensor) -> Tensor:
    """The sum of scores (B, N), (B, 1), never 0: a softmax may underflow."""
    return scores.sum(dim=1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H * d) to (B, H, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def checkpointed(block: nn.Module) -> Callable[..., Any]:
    """The block, computed again in the backward pass. Its batch norms count the batch once."""
    run = partial(torch.utils.checkpoint.checkpoint, block, use_reentrant=False)
    if torch.compiler.is_compiling():
        return run
    return partial(run, context_fn=lambda: (nullcontext(), _still(block)))


@contextmanager
def _still(block: nn.Module) -> Iterator[None]:
    """Running statistics stand still meanwhile."""
    norms: list[Any] = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    was = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, (momentum, count) in zip(norms, was, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
