# SPDX-License-Identifier: Apache-2.0
"""The dumbbell unit of STViT-R: six blocks that read a map through a handful of semantic tokens.

"Making Vision Transformers Efficient from A Token Sparsification View", Chang et al., arXiv
2303.08685, CVPR 2023. X is the map, S the semantic tokens, t x t of them for every window of X:

    0  X = SwinBlock(X), not shifted
    1  P = maxpool of windows to t x t; S = ls1 MHA(LN P, LN [P; neighbourhood in X])   `Generate`
    2  Q = S + G; S = Q + ls1 MHA(LN Q, LN [S; X])                                       `Refine`
    3  S = S + ls1 MHA(LN S) within windows of t x t                                     `Among`
    4  S = S + ls1 MHA(LN S) over all of S                                               `Among`
    5  X = X + ls1 MHA(LN X, LN S)                                                       `Recover`

Each of 1 to 5 ends with an MLP of its own, x + ls2 MLP(LN x). Without its shortcut block 1 adds
nothing to the attention's output. Maps are channels last, (B, H, W, C), S as well: its tokens lie
where their windows lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from crosspatch.layers.attention import check_heads
from crosspatch.layers.linear import Linear
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.windows import (
    Size,
    attend,
    bias_table,
    counts,
    from_windows,
    hidden_surroundings,
    map_bias,
    neighbourhoods,
    pad_to,
    surroundings,
    to_windows,
)

UNIT = 6  # blocks


@dataclass(frozen=True)
class SemanticSpec:
    """How the units of a stage read a map.

    size, window: of the map that is expected, and of the windows on it. tokens: t. generate,
    refine, recover: tokens around a window that blocks 1, 2 and 5 read on each of its sides (around
    t x t semantic tokens in block 5); None for the whole map. append: whether block 1, and block 2
    where it reads the whole map, read P and S besides. kernel: side of the neighbourhoods of block
    1 that are moved inwards at the border, where the map is two windows high and wide; None pads
    there as elsewhere.
    """

    size: Size
    window: Size
    tokens: int = 3
    generate: Size = (1, 1)
    refine: Size | None = None
    recover: Size | None = None
    append: bool = True
    kernel: int | None = 10
    shortcut: bool = False
    use_conv_pos: bool = False
    relative_pos: bool = False
    layer_scale: float | None = 1e-5
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    norm: Callable[[int], nn.Module] = nn.LayerNorm

    @property
    def group(self) -> Size:
        """The semantic tokens of one window."""
        return self.tokens, self.tokens

    @property
    def grid(self) -> Size:
        """The semantic tokens of the expected map, (rows, columns)."""
        return self.grid_of(self.size)

    def grid_of(self, size: Size) -> Size:
        """The semantic tokens of a map, (rows, columns)."""
        rows, columns = counts(size, self.window)
        return rows * self.tokens, columns * self.tokens


class SemanticAttention(nn.Module):
    """Attention of queries over keys and values that `kv` has made, in windows of their own.

    Parameters carry the authors' names. window: (h, w) of the queries, which then are the keys as
    well, for a relative position bias; None for none.
    """

    def __init__(self, dim: int, heads: int, spec: SemanticSpec, window: Size | None) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.num_heads, self.attn_drop, self.window = heads, spec.attn_drop, window
        self.relative_position_bias_table = bias_table(window, heads) if window else None
        self.q = Linear(dim, dim, bias=spec.qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=spec.qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(spec.proj_drop)

    def forward(
        self, x: Tensor, kv: Tensor, mask: Tensor | None = None, window: Size | None = None
    ) -> Tensor:
        """x: (B, W, T, C), kv: (B, W, K, 2C), mask: (W, 1, K), window: (h, w), h * w = T, where
        there is a bias. Returns (B, W, T, C)."""
        k, v = kv.chunk(2, dim=-1)
        drop = self.attn_drop if self.training else 0.0
        y = attend(self.q(x), k, v, self.num_heads, self._bias(window), mask, drop)
        return self.proj_drop(self.proj(y))

    def _bias(self, window: Size | None) -> Tensor | None:
        table = self.relative_position_bias_table
        if table is None or self.window is None or window is None:
            return None
        return map_bias(table, self.window, window)


class SemanticBlock(nn.Module):
    """What blocks 1 to 5 have in common: one norm for queries and keys, LayerScale, the MLP."""

    def __init__(
        self,
        dim: int,
        heads: int,
        spec: SemanticSpec,
        drop_path: float = 0.0,
        window: Size | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.norm1, self.norm2 = spec.norm(dim), spec.norm(dim)
        self.attn = SemanticAttention(dim, heads, spec, window if spec.relative_pos else None)
        self.mlp = Mlp(dim, int(dim * spec.mlp_ratio), drop=spec.proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.layer_scale_1 = _scale(dim, spec.layer_scale)
        self.layer_scale_2 = _scale(dim, spec.layer_scale)

    def read(self, x: Tensor) -> Tensor:
        """Keys and values of tokens (..., C) side by side, (..., 2C)."""
        return self.attn.kv(self.norm1(x))

    def gather(
        self, x: Tensor, kv: Tensor, mask: Tensor | None = None, window: Size | None = None
    ) -> Tensor:
        """What queries x (B, W, T, C) find in kv (B, W, K, 2C), scaled: (B, W, T, C)."""
        return _scaled(self.attn(self.norm1(x), kv, mask, window), self.layer_scale_1)

    def add_mlp(self, x: Tensor) -> Tensor:
        """The second half of the block."""
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.layer_scale_2))


class Generate(SemanticBlock):
    """Block 1: every window's semantic tokens, pooled, ask the neighbourhood of the window."""

    def __init__(self, dim: int, heads: int, spec: SemanticSpec, drop_path: float = 0.0) -> None:
        super().__init__(dim, heads, spec, drop_path)
        self.conv_pos = PositionConv(dim) if spec.use_conv_pos else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C). Returns S (B, h, w, C)."""
        spec, size = self.spec, (x.shape[1], x.shape[2])
        pooled = pool_windows(to_windows(pad_to(x, spec.window), spec.window), spec)
        if self.conv_pos is not None:
            pooled = self.conv_pos(pooled, spec.group)
        if spec.append:  # read together, a token once for every window that it is near
            around, mask = self._around(x)
            kv = self.read(torch.cat([pooled, around], dim=2))
            if mask is not None:
                mask = torch.cat([mask.new_zeros(*mask.shape[:2], pooled.shape[2]), mask], dim=2)
        else:
            kv, mask = self._around(self.read(x))
        found = self.gather(pooled, kv, mask)
        s = pooled + self.drop_path(found) if spec.shortcut else found
        return self.add_mlp(from_windows(s, spec.group, spec.grid_of(size)))

    def _around(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The neighbourhood (B, windows, K, C) of every window, and the mask of what is none."""
        spec, size = self.spec, (x.shape[1], x.shape[2])
        k, (h, w) = spec.kernel, spec.window
        if k is not None and size == (2 * h, 2 * w) and max(h, w) <= k < 2 * min(h, w):
            return neighbourhoods(x, (k, k), (size[0] - k, size[1] - k)), None
        mask = hidden_surroundings(size, spec.window, spec.generate, x.device)
        return surroundings(x, spec.window, spec.generate), mask


class Refine(SemanticBlock):
    """Block 2: semantic tokens, with the global centres if there are any, ask the map."""

    def forward(self, query: Tensor, s: Tensor, x: Tensor) -> Tensor:
        """query: S with the centres, s: S without, (B, h, w, C), x: (B, H, W, C). Returns S."""
        spec, grid, size = self.spec, (s.shape[1], s.shape[2]), (x.shape[1], x.shape[2])
        near, group, mask = spec.refine, grid, None
        if near is not None:
            group = spec.group
            mask = hidden_surroundings(size, spec.window, near, x.device)
            kv = surroundings(self.read(x), spec.window, near)
        elif spec.append:
            kv = self.read(torch.cat([to_windows(s, grid), to_windows(x, size)], dim=2))
        else:
            kv = self.read(to_windows(x, size))
        found = self.gather(to_windows(query, group), kv, mask)
        return self.add_mlp(query + self.drop_path(from_windows(found, group, grid)))


class Among(SemanticBlock):
    """Blocks 3 and 4: self-attention of semantic tokens, in windows of t x t or over all."""

    def __init__(
        self, dim: int, heads: int, spec: SemanticSpec, drop_path: float = 0.0, *, local: bool
    ) -> None:
        super().__init__(dim, heads, spec, drop_path, spec.group if local else spec.grid)
        self.local = local

    def forward(self, s: Tensor) -> Tensor:
        """s: (B, h, w, C). Returns the same shape."""
        grid = (s.shape[1], s.shape[2])
        window = self.spec.group if self.local else grid
        tokens = to_windows(s, window)
        found = self.gather(tokens, self.read(tokens), window=window)
        return self.add_mlp(s + self.drop_path(from_windows(found, window, grid)))


class Recover(SemanticBlock):
    """Block 5: the map asks the semantic tokens."""

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        """x: (B, H, W, C), s: (B, h, w, C). Returns the map (B, H, W, C)."""
        spec, grid, size = self.spec, (s.shape[1], s.shape[2]), (x.shape[1], x.shape[2])
        near, window, mask = spec.recover, size, None
        if near is not None:
            window = spec.window
            mask = hidden_surroundings(grid, spec.group, near, s.device)
            kv = surroundings(self.read(s), spec.group, near)
        else:
            kv = self.read(to_windows(s, grid))
        found = self.gather(to_windows(pad_to(x, window), window), kv, mask)
        return self.add_mlp(x + self.drop_path(from_windows(found, window, size)))


class PositionConv(nn.Module):
    """x plus a 3x3 depth-wise convolution of it, in every window: conditional positions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim))

    def forward(self, x: Tensor, window: Size) -> Tensor:
        """x: (B, W, h * w, C), window: (h, w). Returns the same shape."""
        images = x.flatten(0, 1).transpose(1, 2).unflatten(2, window)
        return x + self.proj(images).flatten(2).transpose(1, 2).unflatten(0, x.shape[:2])


def pool_windows(x: Tensor, spec: SemanticSpec) -> Tensor:
    """Adaptive max pooling of windows (B, W, h * w, C) to (B, W, t * t, C)."""
    x = x.unflatten(2, spec.window)
    for axis, length in zip((2, 3), spec.window, strict=True):
        bins = [
            x.narrow(axis, start, end - start).amax(axis)
            for start, end in _bins(length, spec.tokens)
        ]
        x = torch.stack(bins, dim=axis)
    return x.flatten(2, 3)


def _bins(length: int, count: int) -> list[tuple[int, int]]:
    """Start and end of the cells of adaptive pooling; they overlap where they do not divide."""
    return [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]


def _scale(dim: int, value: float | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(torch.full((dim,), value))


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else scale * x
