# SPDX-License-Identifier: Apache-2.0
"""SMT's blocks: scale-aware modulation, attention with a convolution of its values, a perceptron
with one of its hidden map.

See `smt` for the paper. Maps are channels last, (B, H, W, C). Modules and parameters carry the
authors' names.
"""

from __future__ import annotations

from functools import partial

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from crosspatch.layers.attention import join_heads
from crosspatch.layers.linear import Linear
from crosspatch.layers.maps import on_channels

Norm = partial(nn.LayerNorm, eps=1e-6)


def _depthwise(dim: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel, 1, kernel // 2, groups=dim)


class Stem(nn.Module):
    """The picture (B, in_chans, H, W) to a map (B, H / patch, W / patch, dim)."""

    def __init__(self, in_chans: int, dim: int, kernel: int, patch_size: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_chans, dim, kernel, patch_size // 2, kernel // 2, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 2, 2),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class ScaleAwareModulation(nn.Module):
    """Values times a modulator of convolutions; x: (B, H, W, C). Names are the authors'.

    heads: n; expand: width between the two 1x1 convolutions, over C.
    """

    def __init__(
        self, dim: int, heads: int, expand: int, *, qkv_bias: bool, proj_drop: float
    ) -> None:
        super().__init__()
        self.num_heads, part = heads, dim // heads
        self.v = Linear(dim, dim, bias=qkv_bias)
        self.s = Linear(dim, dim, bias=qkv_bias)
        for i in range(heads):
            self.add_module(f"local_conv_{i + 1}", _depthwise(part, 3 + 2 * i))
        self.proj0 = nn.Conv2d(dim, expand * dim, 1, groups=part)
        self.bn = nn.BatchNorm2d(expand * dim)
        self.proj1 = nn.Conv2d(expand * dim, dim, 1)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        m = self.aggregate(self.mix(self.s(x)))
        return self.proj_drop(self.proj(m * self.v(x)))

    def mix(self, s: Tensor) -> Tensor:
        """Every head of (B, H, W, C) convolved, channel j of head i at place j * n + i."""
        heads = s.permute(0, 3, 1, 2).chunk(self.num_heads, dim=1)
        convolved = [self.get_submodule(f"local_conv_{i + 1}")(h) for i, h in enumerate(heads)]
        return torch.stack(convolved, dim=2).flatten(1, 2).permute(0, 2, 3, 1)

    def aggregate(self, x: Tensor) -> Tensor:
        """The n channels of a place become `expand` * n, then all of them C; (B, H, W, C)."""
        x = F.gelu(self.bn(self.proj0(x.permute(0, 3, 1, 2))))
        return self.proj1(x).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Multi-head self-attention over the whole map (B, H, W, C), and a convolution of the values.

    Names are the authors'.
    """

    def __init__(
        self, dim: int, heads: int, *, qkv_bias: bool, attn_drop: float, proj_drop: float
    ) -> None:
        super().__init__()
        self.num_heads, self.attn_drop = heads, attn_drop
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.local_conv = _depthwise(dim, 3)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        k, v = self.kv(x).chunk(2, dim=-1)
        near = on_channels(self.local_conv, v)
        q, k, v = (
            t.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t in (self.q(x), k, v)
        )
        drop = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        return self.proj_drop(self.proj(join_heads(y).unflatten(1, (height, width)) + near))


class ConvMlp(nn.Module):
    """A perceptron whose hidden map is added to its own 3x3 convolution; (B, H, W, C)."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.dwconv = _depthwise(hidden, 3)
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.drop(F.gelu(x + on_channels(self.dwconv, x)))
        return self.drop(self.fc2(x))


class Block(nn.Module):
    """`attn`, of either type, and `mlp`, each added to a map behind a norm of its own, scaled by
    `gamma_1` and `gamma_2` where `layer_scale`, their first value, is given."""

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp: nn.Module,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.attn = Norm(dim), attn
        self.norm2, self.mlp = Norm(dim), mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        for name in ("gamma_1", "gamma_2"):
            scale = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(_scaled(self.attn(self.norm1(x)), self.gamma_1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma_2))


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else scale * x
