# SPDX-License-Identifier: Apache-2.0
"""The parts of DuoFormer: the trunk, the cells of every region, the scale token, and the blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from crosspatch.layers.attention import Attention
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.windows import Size
from crosspatch.models.pyramid import Stage

STD = 0.036  # of tables, class token and scale token
EPS = 1e-6  # of norms


class Trunk(NamedTuple):
    """A ResNet: blocks and planes of its stages; small: a 3x3 stem without stride, not 7x7 of
    stride 2 and pooling."""

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, ...]
    planes: tuple[int, ...]
    small: bool = False


WIDE = (64, 128, 256, 512)
TRUNKS = {
    "r18": Trunk(BasicBlock, (2, 2, 2, 2), WIDE),
    "r50": Trunk(Bottleneck, (3, 4, 6, 3), WIDE),
    "small": Trunk(BasicBlock, (1, 1, 1, 1), (16, 24, 32, 48), small=True),
}


def trunk(shape: Trunk, in_chans: int) -> tuple[nn.Sequential, list[Stage], list[int], list[int]]:
    """(stem, stages, their widths, their strides) of a ResNet without pooling and classifier."""
    first = shape.planes[0]
    side, stride = (3, 1) if shape.small else (7, 2)
    stem = nn.Sequential(
        nn.Conv2d(in_chans, first, side, stride, side // 2, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(inplace=True),
        nn.Identity() if shape.small else nn.MaxPool2d(3, 2, 1),
    )
    stages, width = [], first
    for number, (depth, planes) in enumerate(zip(shape.depths, shape.planes, strict=True)):
        blocks = []
        for place in range(depth):
            blocks.append(_block(shape.block, width, planes, 2 if number and not place else 1))
            width = planes * shape.block.expansion
        stages.append(Stage(None, blocks))
    for module in nn.Sequential(stem, *stages).modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    widths = [planes * shape.block.expansion for planes in shape.planes]
    return stem, stages, widths, [(1 if shape.small else 4) * 2**i for i in range(len(widths))]


def _block(kind: type, width: int, planes: int, stride: int) -> nn.Module:
    out, shortcut = planes * kind.expansion, None
    if stride != 1 or width != out:
        shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    return kind(width, planes, stride, shortcut)


def regions(x: Tensor, grid: Size) -> Tensor:
    """A map (B, D, h*k, w*k) over a grid (h, w) to the cells of its regions, (B, h*w, k*k, D).

    Row by row; for k = 2 column by column, as the authors' tables were learnt.
    """
    k = x.shape[2] // grid[0]
    x = x.unflatten(3, (grid[1], k)).unflatten(2, (grid[0], k))  # B D h k w k
    order = (0, 2, 4, 5, 3, 1) if k == 2 else (0, 2, 4, 3, 5, 1)
    return x.permute(order).flatten(3, 4).flatten(1, 2)


class RandomToken(nn.Module):
    """One learned vector for all regions; maps to (1, 1, 1, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 1, dim))
        if not self.token.is_meta:
            trunc_normal_(self.token, std=STD)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.token


class ConvNormAct(nn.Module):
    """A 3x3 convolution with bias, batch norm, ReLU; (B, C, h, w)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, 3, 1, 1)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class ChannelToken(nn.Module):
    """A token of every region, made from the maps of all four stages; to (B, N, 1, D).

    The first two are made smaller by convolutions of stride 2, all of them by pooling, until they
    are as large as the last; together they go through four convolutions.
    """

    def __init__(self, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.shrink = nn.ModuleList(
            nn.Sequential(*(nn.Conv2d(width, width, 3, 2, 1) for _ in range(count)))
            for width, count in zip(widths[:2], (2, 1), strict=True)
        )
        steps = pairwise((sum(widths), dim, dim, dim, dim))
        self.fuse = nn.Sequential(*(ConvNormAct(before, after) for before, after in steps))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        fine = [shrink(x) for shrink, x in zip(self.shrink, maps, strict=False)]
        alike = [F.max_pool2d(x, 2) for x in (*fine, maps[2])]
        x = self.fuse(torch.cat([*alike, maps[3]], dim=1))
        return x.flatten(2).transpose(1, 2).unsqueeze(2)


class ScaleBlock(nn.Module):
    """A pre-norm block on bags of tokens, each for itself; x: (B * N, S, D)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, path: float, **drop: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, **drop)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop["proj_drop"])
        self.drop_path = DropPath(path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchBlock(nn.Module):
    """Bare attention between regions, as published, or behind a norm and added; x: (B, N, D)."""

    def __init__(self, dim: int, heads: int, residual: bool, path: float, **drop: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS) if residual else None
        self.attn = Attention(dim, heads, **drop)
        self.drop_path = DropPath(path)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is None:
            return self.attn(x)
        return x + self.drop_path(self.attn(self.norm(x)))
