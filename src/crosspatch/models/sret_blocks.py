# SPDX-License-Identifier: Apache-2.0
"""The parts of SReT: attention within slices, blocks that are passed through several times.

The equations stand in `sret.py`. Names of modules are the authors'.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from crosspatch.layers.attention import Attention
from crosspatch.layers.first_weights import drawn
from crosspatch.layers.maps import on_channels
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.patch_embed import flatten_grid
from crosspatch.layers.position import resize_table
from crosspatch.layers.windows import HIDDEN, Size

PERMUTATIONS = ("none", "train", "random")
Norm = partial(nn.LayerNorm, eps=1e-6)


class Stem(nn.Module):
    """Three 3x3 convolutions with batch norm and ReLU, and the positions of the map that they give;
    (B, in_chans, H, W) to (B, h, w, dim). grid: what positions are learnt for."""

    def __init__(self, in_chans: int, dim: int, strides: Sequence[int], grid: Size) -> None:
        super().__init__()
        first, second, third = strides
        self.conv1 = nn.Conv2d(in_chans, dim // 2, 3, first, 1)
        self.bn1 = nn.BatchNorm2d(dim // 2)
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, second, 1)
        self.bn2 = nn.BatchNorm2d(dim)
        self.conv3 = nn.Conv2d(dim, dim, 3, third, 1)
        self.bn3 = nn.BatchNorm2d(dim)
        self.pos_embed = drawn(1, dim, *grid)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        x = x + resize_positions(self.pos_embed, (x.shape[2], x.shape[3]))
        return x.permute(0, 2, 3, 1)


def resize_positions(table: Tensor, size: Size) -> Tensor:
    """A table (1, C, h, w) bicubic to (1, C, *size)."""
    old = (table.shape[2], table.shape[3])
    resized = resize_table(flatten_grid(table), old, size, 0)
    return resized.transpose(1, 2).unflatten(2, size)


class Pool(nn.Module):
    """A 3x3 convolution of stride 2 in which every channel becomes out / dim ones; (B, H, W, dim)
    to (B, H/2, W/2, out), rounded up."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, 3, 2, 1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return on_channels(self.conv, x)


class SlicedAttention(Attention):
    """Attention within consecutive groups of tokens, which may be shuffled before.

    permutation: of the shuffled passes, see `SReT`. Where groups do not divide the tokens, the last
    one is smaller.
    """

    def __init__(
        self, dim: int, heads: int, *, permutation: str, attn_drop: float, proj_drop: float
    ) -> None:
        super().__init__(dim, heads, attn_drop=attn_drop, proj_drop=proj_drop)
        self.permutation = permutation

    def sliced(self, x: Tensor, groups: int, shuffled: bool) -> Tensor:
        """x: (B, N, C), to the same shape."""
        if groups == 1:
            return super().forward(x)
        if not shuffled or self.permutation == "none":
            return self.within(x, groups)
        order = self.order(x.shape[1]).to(x.device)
        return self.within(x[:, order], groups)[:, inverse(order)]

    def within(self, x: Tensor, groups: int) -> Tensor:
        """Attention in `groups` runs of the tokens x (B, N, C), the last one of what is left."""
        tokens = x.shape[1]
        size = -(-tokens // groups)
        groups = -(-tokens // size)
        lacking = groups * size - tokens
        bias = None
        if lacking:
            x = F.pad(x, (0, 0, 0, lacking))
            bias = torch.zeros(groups * size, device=x.device)
            bias[tokens:] = HIDDEN
            bias = bias.expand(x.shape[0], -1).reshape(-1, size)
        y = super().forward(x.reshape(-1, size, x.shape[2]), bias)
        return y.reshape(x.shape)[:, :tokens]

    def order(self, count: int) -> Tensor:
        """The permutation of this pass; an exported graph always has the settled one."""
        fresh = self.permutation == "random" or self.training
        if fresh and not torch.compiler.is_exporting():
            return torch.randperm(count)
        return torch.tensor(settled_order(count))


def settled_order(count: int) -> list[int]:
    """A permutation that is the same always and everywhere."""
    order, drawn = list(range(count)), 1
    for last in range(count - 1, 0, -1):
        drawn = (1_103_515_245 * drawn + 12_345) % 2**31
        other = (drawn >> 8) % (last + 1)
        order[last], order[other] = order[other], order[last]
    return order


def inverse(order: Tensor) -> Tensor:
    """The permutation that puts back what `order` has moved."""
    step = torch.arange(len(order), device=order.device)
    return torch.zeros_like(order).scatter(0, order, step)


class Scaled(nn.Module):
    """Residual branches whose two sides have learned scalars, `coefficient1` to `coefficient<n>`;
    without `learned` all are 1."""

    def __init__(self, count: int, learned: bool) -> None:
        super().__init__()
        for number in range(1, count + 1):
            value = nn.Parameter(torch.ones(1)) if learned else None
            self.register_parameter(f"coefficient{number}", value)

    def add(self, x: Tensor, y: Tensor, number: int) -> Tensor:
        """a x + b y, the coefficients from `number` on."""
        a, b = (getattr(self, f"coefficient{n}") for n in (number, number + 1))
        return x + y if a is None else a * x + b * y


class Block(Scaled):
    """Sliced attention and a perceptron, used in all passes."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        learned: bool,
        permutation: str,
        proj_drop: float,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__(4, learned)
        self.norm1 = Norm(dim)
        self.attn = SlicedAttention(
            dim, heads, permutation=permutation, attn_drop=attn_drop, proj_drop=proj_drop
        )
        self.norm2 = Norm(dim)
        self.mlp = Mlp(dim, hidden, drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, groups: int, shuffled: bool) -> Tensor:
        x = self.add(x, self.drop_path(self.attn.sliced(self.norm1(x), groups, shuffled)), 1)
        return self.add(x, self.drop_path(self.mlp(self.norm2(x))), 3)


class Projection(Scaled):
    """The small perceptron behind a pass, the non-linear projection layer."""

    def __init__(self, dim: int, hidden: int, *, learned: bool, proj_drop: float) -> None:
        super().__init__(2, learned)
        self.norm1 = Norm(dim)
        self.mlp = Mlp(dim, hidden, drop=proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, self.mlp(self.norm1(x)), 1)


class Recursion(nn.Module):
    """One block passed through once for each of `slices`, a projection of its own behind each pass;
    (B, H, W, C) to the same shape.

    slices: (groups, shuffled) of each pass.
    """

    def __init__(
        self, block: Block, projections: Sequence[Projection], slices: Sequence[tuple[int, bool]]
    ) -> None:
        super().__init__()
        self.block, self.projections = block, nn.ModuleList(projections)
        self.slices = tuple(slices)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        for projection, (groups, shuffled) in zip(self.projections, self.slices, strict=True):
            tokens = projection(self.block(tokens, groups, shuffled))
        return tokens.unflatten(1, x.shape[1:3])
