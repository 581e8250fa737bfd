# SPDX-License-Identifier: Apache-2.0
"""What MetaFormer is made of: token mixers, blocks and stages over maps (B, C, H, W).

"MetaFormer Is Actually What You Need for Vision", Yu et al., arXiv 2111.11418, sections 3 and 4.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import ConvMlp, DropPath, LayerNorm2d, LayerScale2d
from torch import Tensor, nn

from crosspatch.layers.attention import Attention
from crosspatch.layers.linear import Linear
from crosspatch.models.pyramid import Stage

MIXERS = ("pooling", "identity", "random", "attention", "spatial_fc", "depthwise")
Size = tuple[int, int]
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": partial(nn.GroupNorm, 1),
    "layer": partial(LayerNorm2d, eps=1e-5),
    "batch": nn.BatchNorm2d,
    "none": nn.Identity,
}


def make_mixer(
    name: str,
    dim: int,
    *,
    size: Size,
    pool_size: int = 3,
    head_dim: int = 32,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
) -> nn.Module:
    """The mixer `name` of `MIXERS` for maps (B, dim, *size)."""
    if name == "pooling":
        return Pooling(pool_size)
    if name == "identity":
        return nn.Identity()
    if name == "depthwise":
        return nn.Conv2d(dim, dim, pool_size, padding=pool_size // 2, groups=dim)
    if name == "attention":
        return Attention2d(dim, head_dim, attn_drop, proj_drop)
    return RandomMixing(size) if name == "random" else SpatialFc(size)


class Pooling(nn.Module):
    """The mean of the pixels around, padding not counted, minus the pixel, which the block adds."""

    def __init__(self, pool_size: int = 3) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pool_size, 1, pool_size // 2, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x


class Attention2d(Attention):
    """Attention over all pixels of a map, with heads of `head_dim`, queries, keys and values
    without bias. Raises ValueError where `dim` does not divide by `head_dim`."""

    def __init__(self, dim: int, head_dim: int, attn_drop: float, proj_drop: float) -> None:
        if dim % head_dim:
            raise ValueError(f"a width of {dim}; expected one that divides by head_dim={head_dim}")
        heads = dim // head_dim
        super().__init__(dim, heads, qkv_bias=False, attn_drop=attn_drop, proj_drop=proj_drop)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        size = x.shape[2:]
        return super().forward(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, size)


class SpatialFc(nn.Module):
    """One product over the pixels, the same for every channel, without bias."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.fc = Linear(size[0] * size[1], size[0] * size[1], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, self.size)
        return self.fc(x.flatten(2)).unflatten(2, self.size)


class RandomMixing(nn.Module):
    """Every pixel a random mean of all, drawn once and never learnt."""

    matrix: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, count = size, size[0] * size[1]
        self.register_buffer("matrix", torch.rand(count, count).softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        _check_size(x, self.size)
        return (x.flatten(2) @ self.matrix.to(x.dtype).t()).unflatten(2, self.size)


class PositionMap(nn.Module):
    """Adds a learnt map (1, dim, *size), at first zero; interpolated where maps are of another
    size."""

    def __init__(self, dim: int, size: Size) -> None:
        super().__init__()
        self.size = size
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, *size))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        return x + resize_map(self.pos_embed, (height, width)).to(x.dtype)


def resize_map(table: Tensor, size: Size) -> Tensor:
    """A map (1, C, h, w) interpolated to (1, C, *size): bicubic, as position tables are."""
    if tuple(table.shape[2:]) == tuple(size):
        return table
    resized = F.interpolate(table.float(), size=size, mode="bicubic", align_corners=False)
    return resized.to(table.dtype)


def _check_size(x: Tensor, size: Size) -> None:
    if tuple(x.shape[2:]) != size:
        raise ValueError(
            f"a map of {x.shape[2]}x{x.shape[3]}, but this mixer's matrix is for "
            f"{size[0]}x{size[1]}: build it with img_size=... for pictures of this size"
        )


class Block(nn.Module):
    """A mixer of pixels and a perceptron over channels, each normed before; (B, C, H, W).

    layer_scale: first value of the scales, None for none. residual, mlp: False leaves the
    connections or the perceptron away, as the paper's ablations do.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_ratio: float,
        norm: Callable[[int], nn.Module],
        act: type[nn.Module],
        layer_scale: float | None,
        residual: bool,
        mlp: bool,
        drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.residual = residual
        scale = nn.Identity if layer_scale is None else partial(LayerScale2d, dim, layer_scale)
        self.norm1 = norm(dim)
        self.token_mixer = mixer
        self.ls1, self.drop_path1 = scale(), DropPath(drop_path)
        if mlp:
            self.norm2 = norm(dim)
            self.mlp = ConvMlp(dim, int(dim * mlp_ratio), act_layer=act, drop=drop)
            self.drop_out = nn.Dropout(drop)
            self.ls2, self.drop_path2 = scale(), DropPath(drop_path)
        self.has_mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path1(self.ls1(self.token_mixer(self.norm1(x))))
        x = x + y if self.residual else y
        if not self.has_mlp:
            return x
        y = self.drop_path2(self.ls2(self.drop_out(self.mlp(self.norm2(x)))))
        return x + y if self.residual else y


class DenseStage(Stage):
    """A stage that gives (its map, its map normed), of which the next stage takes the first."""

    def __init__(
        self, downsample: nn.Module | None, blocks: Sequence[nn.Module], norm: nn.Module
    ) -> None:
        super().__init__(downsample, blocks)
        self.norm = norm

    def forward(self, x: Any) -> tuple[Tensor, Tensor]:
        x = super().forward(x[0] if isinstance(x, tuple) else x)
        return x, self.norm(x)
