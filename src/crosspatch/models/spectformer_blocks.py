# SPDX-License-Identifier: Apache-2.0
"""The parts of SpectFormer: the spectral gate and the blocks around it or around attention.

The equations stand in `spectformer.py`. Names of modules are the authors'; tokens are (B, N, C),
maps (B, H, W, C).
"""

from __future__ import annotations

from functools import partial

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from crosspatch.layers.attention import Attention
from crosspatch.layers.linear import Linear
from crosspatch.layers.maps import on_channels
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.precision import full_precision
from crosspatch.layers.spectrum import products, resize_filter, transforms
from crosspatch.layers.windows import Size

Norm = partial(nn.LayerNorm, eps=1e-6)


class SpectralGate(nn.Module):
    """irfft2(w * rfft2(x)) over a map (B, H, W, C), both orthonormal, always in fp32.

    size: the map (h, w) for which `complex_weight` (h, w//2+1, C, 2) is learnt; for others it is
    interpolated, bilinear with corners aligned. Under compile and export the transforms are
    products with matrices of sines and cosines, as neither ONNX nor the compiler holds complex
    numbers; else they are FFTs, which take as long forward and half as long backward.
    """

    def __init__(self, dim: int, size: Size) -> None:
        super().__init__()
        self.complex_weight = nn.Parameter(torch.zeros(size[0], size[1] // 2 + 1, dim, 2))
        if not self.complex_weight.is_meta:
            nn.init.normal_(self.complex_weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            weight = self.complex_weight.permute(2, 0, 1, 3)
            weight = resize_filter(weight, (x.shape[1], x.shape[2] // 2 + 1))
            compiled = torch.compiler.is_compiling() or torch.compiler.is_exporting()
            gate = products if compiled else transforms
            return gate(x.permute(0, 3, 1, 2).float(), weight).permute(0, 2, 3, 1).to(x.dtype)


# ---------------------------------------------------------------------- of the vanilla family


class SpectralBlock(nn.Module):
    """x + DropPath(MLP(LN(gate(LN x)))): one residual around both."""

    def __init__(self, dim: int, size: Size, hidden: int, drop: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.filter = Norm(dim), SpectralGate(dim, size)
        self.norm2, self.mlp = Norm(dim), Mlp(dim, hidden, drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        y = self.filter(self.norm1(x).unflatten(1, grid)).flatten(1, 2)
        return x + self.drop_path(self.mlp(self.norm2(y)))


class AttentionBlock(nn.Module):
    """ViT's block: x += DropPath(attention(LN x)); x += DropPath(MLP(LN x))."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        qkv_bias: bool,
        attn_drop: float,
        proj_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = Norm(dim)
        self.attn = Attention(
            dim, heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop
        )
        self.norm2, self.mlp = Norm(dim), Mlp(dim, hidden, drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


# ---------------------------------------------------------------------- of the hierarchical family


class Stem(nn.Module):
    """Convolutions 7x7 of stride 2 and 3x3 twice, each with batch norm and ReLU, then one 3x3 of
    `stride` and a LN; (B, in_chans, H, W) to (B, h, w, dim)."""

    def __init__(self, in_chans: int, dim: int, width: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, kernel, step in ((in_chans, 7, 2), (width, 3, 1), (width, 3, 1)):
            conv = nn.Conv2d(before, width, kernel, step, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(width, dim, 3, stride, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(self.conv(x)).permute(0, 2, 3, 1))


class MapAttention(Attention):
    """Attention over the whole of a map (B, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


class ConvMlp(nn.Module):
    """Linear, depthwise 3x3, GELU, Linear; (B, H, W, C) to the same shape."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden)
        self.fc2 = Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.gelu(on_channels(self.dwconv, self.fc1(x))))
        return self.drop(self.fc2(x))


class Block(nn.Module):
    """`attn`, a gate or attention, and a perceptron, each added behind a norm; (B, H, W, C)."""

    def __init__(self, dim: int, attn: nn.Module, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = Norm(dim), attn
        self.norm2, self.mlp = Norm(dim), mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassBlock(nn.Module):
    """Class attention: the first of the tokens (B, 1 + N, C) asks all of them, then goes through a
    perceptron; the others stay."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        qkv_bias: bool,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        super().__init__()
        self.norm1 = Norm(dim)
        self.attn = Attention(
            dim, heads, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop
        )
        self.norm2, self.mlp = Norm(dim), Mlp(dim, hidden, drop=proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1] + self.attn(self.norm1(x), rows=1)
        first = first + self.mlp(self.norm2(first))
        return torch.cat([first, x[:, 1:]], dim=1)
