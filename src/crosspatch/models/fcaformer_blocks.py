# SPDX-License-Identifier: Apache-2.0
"""The parts of FcaFormer: convolutional blocks, and blocks with forward cross attention.

The equations stand in `fcaformer.py`. An attention block takes and gives a pair: the map, and the
summary tokens of the blocks before it, oldest first. It works within windows, (B, W, T, C); a whole
map is one window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from crosspatch.layers.attention import check_heads
from crosspatch.layers.conv_norm import ConvNorm
from crosspatch.layers.linear import Linear
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.windows import (
    HIDDEN,
    Size,
    attend,
    from_windows,
    resize_bias_table,
    to_windows,
)
from crosspatch.models.pyramid import Stage, run

STRIDE = 4  # of the convolution that makes summary tokens
CONV_EPS = 1e-6  # of the norms of convolutional blocks
State = tuple[Tensor, tuple[Tensor, ...]]


class Downsample(nn.Module):
    """1x1, depthwise 3x3 of stride 2, 1x1: (B, dim, H, W) to (B, out, H/2, W/2), rounded up."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(dim, out, 1)
        self.conv2 = ConvNorm(out, out, 3, 2, groups=out)
        self.conv3 = ConvNorm(out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class ConvBlock(nn.Module):
    """ConvNeXt's block, x: (B, C, H, W)."""

    def __init__(self, dim: int, mlp_ratio: float, gamma: float, drop: float, path: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.dwconv = nn.Conv2d(dim, dim, 7, 1, 3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=CONV_EPS)
        self.pwconv1 = Linear(dim, hidden)
        self.pwconv2 = Linear(hidden, dim)
        self.gamma = nn.Parameter(gamma * torch.ones(dim))
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.drop(self.pwconv2(F.gelu(self.pwconv1(y))))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class NormedMlp(Mlp):
    """An MLP behind a norm of its own."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__(dim, hidden, drop=drop)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class FcaSpec(NamedTuple):
    """What the attention blocks of a stage have in common.

    size: (H, W) of its map, that tables are made for; window: side of its windows, None for the
    whole map; keeps: blocks whose summaries are remembered, None for all; gamma: LayerScale's
    first value.
    """

    dim: int
    heads: int
    size: Size
    window: int | None
    keeps: int | None
    mlp_ratio: float
    qkv_bias: bool
    mask_padding: bool
    gamma: float
    attn_drop: float
    proj_drop: float

    @property
    def tabled(self) -> Size:
        """The window that tables are made for."""
        return self.size if self.window is None else (self.window, self.window)


class FcaBlock(nn.Module):
    """Block number `number` of a stage of `depth`: forward cross attention, token merge and
    enhancement, MLP. Takes and gives (map (B, H, W, C), memory, each (B, W, m, C)).

    The first block, and every block of a stage without memory, has no part that reads it; the last
    one, whose summary nobody would read, makes none.
    """

    index: Tensor

    def __init__(self, spec: FcaSpec, number: int, depth: int, path: float) -> None:
        super().__init__()
        dim, heads = spec.dim, spec.heads
        check_heads(dim, heads)
        self.spec, self.before = spec, number % 2 == 0
        known = number if spec.keeps is None else min(number, spec.keeps)
        rows, columns = spec.tabled
        self.gamma_1 = nn.Parameter(spec.gamma * torch.ones(dim))
        self.gamma_2 = nn.Parameter(spec.gamma * torch.ones(dim))
        if known:
            tokens = known * _area(summary_size(spec.tabled))
            self.s_token_bias = nn.Parameter(torch.zeros(1, heads, 1, tokens))
            self.s_scale_factors = nn.Parameter(torch.ones(1, tokens, 1))
            self.s_norm = nn.LayerNorm(dim)
        self.attention_biases = nn.Parameter(torch.zeros(heads, rows * columns))
        self.register_buffer("index", offset_index(spec.tabled), persistent=False)
        writes = spec.keeps != 0 and number + 1 < depth
        self.dw_conv = _summary_conv(dim) if writes else None
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = Linear(dim, 3 * dim, bias=spec.qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(spec.proj_drop)
        self.local_conv = ConvNorm(dim, dim, 3, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = NormedMlp(dim, int(dim * spec.mlp_ratio), spec.proj_drop)
        self.drop_path = DropPath(path)

    def forward(self, state: State) -> State:
        x, memory = state
        size = x.shape[1], x.shape[2]
        window = size if self.spec.window is None else self.spec.tabled
        x, mask = self._cut(x, window)
        x = x + self.drop_path(self.gamma_1 * self.attention(x, memory, window, mask))
        x, summary = self.merge(x, window)
        x = x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))
        if summary is not None:
            keeps = self.spec.keeps
            memory = (*memory, summary)[-keeps if keeps else 0 :]
        return self._join(x, window, size), memory

    def attention(
        self, x: Tensor, memory: Sequence[Tensor], window: Size, mask: Tensor | None = None
    ) -> Tensor:
        """Windows (B, W, T, C) to what their tokens gather from each other and from the memory.

        mask: (W, 1, T) added to the logits of the window's own keys.
        """
        count, tokens = x.shape[2], self.norm1(x)
        if memory:
            tokens = torch.cat([tokens, self._remembered(memory, window)], dim=2)
        if mask is not None:
            mask = F.pad(mask, (0, tokens.shape[2] - count))
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        drop = self.spec.attn_drop if self.training else 0.0
        bias = self.bias(window, bool(memory))
        y = attend(q[:, :, :count], k, v, self.spec.heads, bias, mask, drop)
        return self.proj_drop(self.proj(y))

    def _remembered(self, memory: Sequence[Tensor], window: Size) -> Tensor:
        """Learned scale factors: LN(s * f), (B, W, |s|, C)."""
        factors = self._fitted(self.s_scale_factors[:, :, 0], window)
        return self.s_norm(torch.cat(list(memory), dim=2) * factors[0, :, None])

    def bias(self, window: Size, remembers: bool) -> Tensor:
        """(heads, T, T) by distance, or (heads, T, T + |s|) with one number per memory token."""
        table, index = self.attention_biases, self.index
        if window != self.spec.tabled:
            table = resize_offsets(table, self.spec.tabled, window)
            index = offset_index(window, table.device)
        bias = table[:, index.flatten()].unflatten(1, index.shape)
        if not remembers:
            return bias
        of_memory = self._fitted(self.s_token_bias[0, :, 0], window)
        return torch.cat([bias, of_memory[:, None].expand(-1, index.shape[0], -1)], dim=2)

    def _fitted(self, table: Tensor, window: Size) -> Tensor:
        return resize_memory(table, summary_size(self.spec.tabled), summary_size(window))

    def merge(self, x: Tensor, window: Size) -> tuple[Tensor, Tensor | None]:
        """Windows (B, W, T, C) enhanced by their neighbours, and the summary (B, W, m, C) of what
        came in, or None."""
        windows = x.shape[1]
        x = x.flatten(0, 1).transpose(1, 2).unflatten(2, window)
        summary = None if self.dw_conv is None else _tokens(self.dw_conv(x), windows)
        return _tokens(self.local_conv(x), windows), summary

    def _cut(self, x: Tensor, window: Size) -> tuple[Tensor, Tensor | None]:
        """A map (B, H, W, C), padded at the top and left by every second block, at the bottom and
        right by the others, as windows; and the mask that hides the padding."""
        size = x.shape[1], x.shape[2]
        down, right = -size[0] % window[0], -size[1] % window[1]
        if not down and not right:
            return to_windows(x, window), None
        sides = (0, 0, right, 0, down, 0) if self.before else (0, 0, 0, right, 0, down)
        x = to_windows(F.pad(x, sides), window)
        if not self.spec.mask_padding:
            return x, None
        real = F.pad(torch.zeros(1, *size, 1, device=x.device), sides, value=HIDDEN)
        return x, to_windows(real, window)[0].transpose(1, 2)

    def _join(self, x: Tensor, window: Size, size: Size) -> Tensor:
        if not self.before:
            return from_windows(x, window, size)
        padded = size[0] + -size[0] % window[0], size[1] + -size[1] % window[1]
        x = from_windows(x, window, padded)
        return x if padded == size else x[:, padded[0] - size[0] :, padded[1] - size[1] :]


class FcaStage(Stage):
    """Attention blocks that share a memory, which begins empty; x: (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        state: Any = (self.downsample(x).permute(0, 2, 3, 1), ())
        for block in self.blocks:
            state = run(block, state, self)
        return state[0].permute(0, 3, 1, 2).contiguous()


# ---------------------------------------------------------------------- tables and shapes


def summary_size(window: Size) -> Size:
    """(rows, columns) of the summary tokens of a window."""
    return -(-window[0] // STRIDE), -(-window[1] // STRIDE)


def offset_index(window: Size, device: torch.device | None = None) -> Tensor:
    """(tokens, tokens) int64: |dy| * width + |dx| of every query and key."""
    h, w = window
    place = torch.arange(h * w, device=device)
    rows, columns = place // w, place % w
    down, right = rows[:, None] - rows[None], columns[:, None] - columns[None]
    return down.abs() * w + right.abs()


def resize_offsets(table: Tensor, old: Size, new: Size) -> Tensor:
    """A table (heads, h*w) of distances for windows `old`, for windows `new`: mirrored to signed
    offsets, resized as Swin's are."""
    if tuple(old) == tuple(new):
        return table
    image = table.unflatten(1, old)
    for axis, side in enumerate(old, start=1):
        signed = torch.arange(1 - side, side, device=table.device).abs()
        image = image.index_select(axis, signed)
    image = resize_bias_table(image.flatten(1).transpose(0, 1), old, new).transpose(0, 1)
    image = image.unflatten(1, (2 * new[0] - 1, 2 * new[1] - 1))
    return image[:, new[0] - 1 :, new[1] - 1 :].flatten(1)


def resize_memory(table: Tensor, old: Size, new: Size) -> Tensor:
    """A table (A, blocks * h*w) of summary tokens, each block's image bicubic to `new`."""
    if tuple(old) == tuple(new):
        return table
    image = F.interpolate(
        table.float().unflatten(1, (-1, *old)), new, mode="bicubic", align_corners=False
    )
    return image.flatten(1).to(table.dtype)


def _summary_conv(dim: int) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, 7, STRIDE, 3, groups=dim, bias=False)


def _tokens(x: Tensor, windows: int) -> Tensor:
    """(B*W, C, h, w) to (B, W, h*w, C)."""
    return x.flatten(2).transpose(1, 2).unflatten(0, (-1, windows))


def _area(size: Size) -> int:
    return size[0] * size[1]
