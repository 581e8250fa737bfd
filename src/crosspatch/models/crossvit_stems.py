# SPDX-License-Identifier: Apache-2.0
"""The two stems of CrossViT besides plain patches: three convolutions (the dagger models) and T2T.

"CrossViT", arXiv 2103.14899, section 4.1 (dagger) and the starred model, which takes its embedding
from "Tokens-to-Token ViT", Yuan et al., arXiv 2101.11986. Both give the token grid of plain
patches.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.layers.linear import Linear
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.patch_embed import flatten_grid

# per patch: (kernel, stride, padding) of the second and third convolution, after 7x7 of stride 4
DAGGER = {12: ((3, 3, 0), (3, 1, 1)), 16: ((3, 2, 1), (3, 2, 1))}
# per patch: strides of the second and third unfold, after 7x7 of stride 4
T2T_STRIDES = {12: (3, 1), 16: (2, 2)}


def _known(patch_size: int, table: dict, stem: str) -> tuple:
    if patch_size not in table:
        raise ValueError(f"the {stem} stem is defined for patches of 12 and 16, not {patch_size}")
    return table[patch_size]


class DaggerStem(nn.Module):
    """Three convolutions with bias, ReLU after the first two; (B, C, H, W) to (B, h*w, dim)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        second, third = _known(patch_size, DAGGER, "dagger")
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 4, 7, 4, 3),
            nn.ReLU(),
            nn.Conv2d(dim // 4, dim // 2, *second),
            nn.ReLU(),
            nn.Conv2d(dim // 2, dim, *third),
        )

    def forward(self, x: Tensor) -> Tensor:
        return flatten_grid(self.proj(x))


class TokenAttention(nn.Module):
    """One head of width `dim` over tokens of width `dim_in`; the values are the skip.

    The logits are scaled by dim_in^-0.5, as the authors do, not by the head's width.
    """

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.scale = dim_in**-0.5
        self.qkv = Linear(dim_in, 3 * dim, bias=False)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part[:, None] for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return (v + self.proj(y))[:, 0]


class TokenTransformer(nn.Module):
    """x = v + Attention(LN x); x = x + MLP(LN x); (B, N, dim_in) to (B, N, dim). LN eps is 1e-5."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim_in)
        self.attn = TokenAttention(dim_in, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class T2TStem(nn.Module):
    """Three overlapping unfolds with a token transformer after the first two, then a Linear."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, token_dim: int = 64) -> None:
        super().__init__()
        self.strides = _known(patch_size, T2T_STRIDES, "T2T")
        self.attention1 = TokenTransformer(in_chans * 49, token_dim)
        self.attention2 = TokenTransformer(token_dim * 9, token_dim)
        self.project = Linear(token_dim * 9, dim)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[2] // 4, x.shape[3] // 4
        x = flatten_grid(F.unfold(x, 7, stride=4, padding=2))
        x = self.attention1(x).transpose(1, 2).unflatten(2, (rows, columns))
        second, third = self.strides
        x = flatten_grid(F.unfold(x, 3, stride=second, padding=1))
        rows, columns = (rows - 1) // second + 1, (columns - 1) // second + 1
        x = self.attention2(x).transpose(1, 2).unflatten(2, (rows, columns))
        return self.project(flatten_grid(F.unfold(x, 3, stride=third, padding=1)))
