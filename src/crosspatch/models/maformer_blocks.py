# SPDX-License-Identifier: Apache-2.0
"""The parts of MAFormer: the two streams and their fusion, plain blocks, positions.

"MAFormer", Wang et al., arXiv 2209.01620; the equations stand in `maformer.py`. Maps are channels
last, (B, H, W, C).
"""

from __future__ import annotations

from dataclasses import dataclass

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from crosspatch.layers.attention import Attention, check_heads, join_heads
from crosspatch.layers.first_weights import drawn
from crosspatch.layers.linear import Linear
from crosspatch.layers.maps import on_channels
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.position import resize_table
from crosspatch.layers.resize import resize_matrix
from crosspatch.layers.windows import Size, WindowAttention

BRANCHES = ("both", "local", "global")
GLDS = ("fc", "pool")


@dataclass(frozen=True)
class Spec:
    """What all blocks of a network have in common; see `MAFormer`. Raises ValueError for words that
    it does not know."""

    window: int
    ratio: float
    gld: str
    branches: str
    mlp_ratio: float
    qkv_bias: bool
    attn_drop: float
    proj_drop: float

    def __post_init__(self) -> None:
        if self.gld not in GLDS or self.branches not in BRANCHES or self.window < 1:
            raise ValueError(
                f"gld {self.gld!r}, branches {self.branches!r}, window_size {self.window}; "
                f"expected one of {', '.join(GLDS)}, of {', '.join(BRANCHES)}, and 1 or more"
            )


class ToMap(nn.Module):
    """A convolution of 2 stride - 1 that gives a map (B, h, w, out): the stem, of pictures
    (B, C, H, W), or what stands between two stages, of maps (B, H, W, C)."""

    def __init__(self, dim: int, out: int, stride: int, *, stem: bool = False) -> None:
        super().__init__()
        self.stem = stem
        self.conv = nn.Conv2d(dim, out, 2 * stride - 1, stride, stride // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).permute(0, 2, 3, 1) if self.stem else on_channels(self.conv, x)


def shrunk(size: Size, stride: int) -> Size:
    """(H, W) behind a `ToMap`. Raises ValueError where nothing is left."""
    kernel, padding = 2 * stride - 1, 2 * (stride // 2)
    if min(size) + padding < kernel:
        raise ValueError(f"img_size leaves a map of {size[0]}x{size[1]} before a stride {stride}")
    return (size[0] + padding - kernel) // stride + 1, (size[1] + padding - kernel) // stride + 1


def coarse(size: Size, ratio: float) -> Size:
    """The grid of coarse tokens of a map: as many columns, `ratio` of the rows."""
    return max(1, round(ratio * size[0])), size[1]


# ---------------------------------------------------------------------- the MAF block


class Local(nn.Module):
    """Attention in windows, then the MLP; (B, H, W, C)."""

    def __init__(self, dim: int, heads: int, spec: Spec, size: Size, rate: float) -> None:
        super().__init__()
        self.attn = None
        if spec.branches != "global":
            self.norm1 = nn.LayerNorm(dim)
            self.attn = WindowAttention(
                dim, heads, spec.window, size=size, qkv_bias=spec.qkv_bias,
                attn_drop=spec.attn_drop, proj_drop=spec.proj_drop,
            )  # fmt: skip
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * spec.mlp_ratio), drop=spec.proj_drop)
        self.drop_path = DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Gld(nn.Module):
    """Global learned down-sampling: a map (B, H, W, C) to coarse tokens (B, PM, C).

    size: (H, W) that `fc` and `pos` are made for; maps of another are brought to it.
    """

    def __init__(self, dim: int, size: Size, ratio: float, kind: str) -> None:
        super().__init__()
        self.size, self.ratio, self.coarse = size, ratio, coarse(size, ratio)
        self.norm = nn.LayerNorm(dim)
        self.fc = None
        if kind == "fc":
            self.fc = Linear(size[0] * size[1], self.coarse[0] * self.coarse[1])
        self.pos = drawn(1, self.coarse[0] * self.coarse[1], dim)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        grid = coarse(size, self.ratio)
        x = self.norm(x)
        if self.fc is None:
            x = _along(x, mean_matrix(size[0], grid[0]), 1)
        else:
            if size != self.size:
                for axis in (0, 1):
                    step = resize_matrix(self.size[axis], size[axis], "bilinear").transpose(0, 1)
                    x = _along(x, step * (self.size[axis] / size[axis]), axis + 1)
            x = self.fc(x.flatten(1, 2).transpose(1, 2)).transpose(1, 2).unflatten(1, self.coarse)
            if grid != self.coarse:
                for axis in (0, 1):
                    step = resize_matrix(self.coarse[axis], grid[axis], "bilinear")
                    x = _along(x, step, axis + 1)
        return x.flatten(1, 2) + resize_table(self.pos, self.coarse, grid, 0, mode="bilinear")


def _along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """A map (B, H, W, C) times a matrix (out, in) on axis 1 or 2."""
    matrix = matrix.to(x)
    if axis == 2:
        return matrix @ x
    return (matrix @ x.flatten(2)).unflatten(2, x.shape[2:])


def mean_matrix(n_in: int, n_out: int) -> Tensor:
    """(n_out, n_in) float32: the means of `n_out` parts of an axis, as equal as they can be."""
    return F.adaptive_avg_pool1d(torch.eye(n_in)[None], n_out)[0].transpose(0, 1)


def resize_fc(weight: Tensor, old: tuple[Size, Size], new: tuple[Size, Size]) -> Tensor:
    """A token layer's weight (PM, M) between grids of M and PM tokens, for other grids.

    Bilinear on both; times M over the new M, so that a constant map keeps its answer.
    """
    found = resize_table(weight[..., None], old[0], new[0], 0, mode="bilinear")[..., 0]
    found = resize_table(found[None], old[1], new[1], 0, mode="bilinear")[0]
    return found * (weight.shape[1] / found.shape[1])


class Fusion(nn.Module):
    """What fine tokens (B, M, C) gather from coarse ones (B, PM, C)."""

    def __init__(self, dim: int, heads: int, spec: Spec) -> None:
        super().__init__()
        self.num_heads, self.attn_drop = heads, spec.attn_drop
        self.norm = nn.LayerNorm(dim)
        self.q = Linear(dim, dim, bias=spec.qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=spec.qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(spec.proj_drop)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            one.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for one in (self.q(self.norm(x)), *self.kv(context).chunk(2, dim=2))
        )
        drop = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        return self.proj_drop(self.proj(join_heads(y)))


class MafBlock(nn.Module):
    """Both streams of a map (B, H, W, C), and their fusion. Raises ValueError where heads do not
    divide the width."""

    def __init__(self, dim: int, heads: int, spec: Spec, size: Size, rate: float) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.local = Local(dim, heads, spec, size, rate)
        self.gld = self.fuse = None
        if spec.branches != "local":
            self.gld = Gld(dim, size, spec.ratio, spec.gld)
            self.fuse = Fusion(dim, heads, spec)
        self.drop_path = DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        y = self.local(x)
        if self.gld is None or self.fuse is None:
            return y
        gathered = self.fuse(y.flatten(1, 2), self.gld(x))
        return y + self.drop_path(gathered).view(y.shape)


# ---------------------------------------------------------------------- plain stages


class Positions(nn.Module):
    """A map (B, H, W, C) plus a learned table of `grid`, resized for others."""

    def __init__(self, grid: Size, dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.pos = drawn(1, grid[0] * grid[1], dim)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        return x + resize_table(self.pos, self.grid, size, 0, mode="bilinear").unflatten(1, size)


class PlainBlock(nn.Module):
    """Attention of all tokens of a map (B, H, W, C), and the MLP, each behind a norm."""

    def __init__(self, dim: int, heads: int, spec: Spec, rate: float) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(
            dim, heads, qkv_bias=spec.qkv_bias, attn_drop=spec.attn_drop, proj_drop=spec.proj_drop
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * spec.mlp_ratio), drop=spec.proj_drop)
        self.drop_path = DropPath(rate)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.attn(self.norm1(x).flatten(1, 2))
        x = x + self.drop_path(tokens).view(x.shape)
        return x + self.drop_path(self.mlp(self.norm2(x)))
