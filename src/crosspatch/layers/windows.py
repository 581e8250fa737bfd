# SPDX-License-Identifier: Apache-2.0
"""Attention within windows of a feature map, shifted or not: what Swin's relatives share.

"Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", Liu et al., arXiv
2103.14030, ICCV 2021. Maps are channels last, (B, H, W, C), of any size: a map that windows do not
divide is padded with zeros at the bottom and at the right, then rolled, as the authors'
dense-prediction code does. Windows stand in an axis of their own, (B, windows, tokens, C), row by
row; a window is (height, width).

    x = x + DropPath(WindowAttention(LN x));   x = x + DropPath(MLP(LN x))                a block
    WindowAttention = softmax(q k^T / sqrt d + bias[offset of the two tokens] + mask) v
    merge(x) = Linear(LN([x(0,0), x(1,0), x(0,1), x(1,1)])), (row, column) in each cell of 2x2

Parameters carry the authors' names; their buffers `attn_mask` and `relative_position_index` are
made anew from the shapes. Departure: padded tokens are hidden from attention; `mask_padding=False`
lets them be seen, as the authors do.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from crosspatch.layers.attention import check_heads, join_heads
from crosspatch.layers.first_weights import drawn
from crosspatch.layers.linear import Linear
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.patch_embed import pair

Size = tuple[int, int]
ACROSS = -100.0  # the authors' mask between tokens that only the roll has made neighbours
HIDDEN = -1000.0  # and that of padding

# ---------------------------------------------------------------------- cutting maps


def counts(size: int | Size, window: int | Size) -> Size:
    """(rows, columns) of windows that cover a map: its sides after a stride, rounded up."""
    height, width = (size, size) if isinstance(size, int) else size
    h, w = (window, window) if isinstance(window, int) else window
    return -(-height // h), -(-width // w)


def pad_to(x: Tensor, window: Size, value: float = 0.0) -> Tensor:
    """A map (B, H, W, C), continued at the bottom and at the right until windows divide it."""
    down, right = -x.shape[1] % window[0], -x.shape[2] % window[1]
    return F.pad(x, (0, 0, 0, right, 0, down), value=value) if down or right else x


def to_windows(x: Tensor, window: Size) -> Tensor:
    """(B, H, W, C) to (B, windows, h * w, C). Raises ValueError where windows do not divide it."""
    h, w = window
    if x.shape[1] % h or x.shape[2] % w:
        raise ValueError(f"windows of {h}x{w} do not divide a map of {x.shape[1]}x{x.shape[2]}")
    rows, columns, c = x.shape[1] // h, x.shape[2] // w, x.shape[3]
    x = x.reshape(-1, rows, h, columns, w, c).transpose(2, 3)
    return x.reshape(-1, rows * columns, h * w, c)


def from_windows(x: Tensor, window: Size, size: Size) -> Tensor:
    """(B, windows, h * w, C) back to (B, H, W, C), without what `pad_to` had added to `size`."""
    (rows, columns), (h, w), c = counts(size, window), window, x.shape[3]
    x = x.reshape(-1, rows, columns, h, w, c).transpose(2, 3)
    x = x.reshape(-1, rows * h, columns * w, c)
    return x if x.shape[1:3] == size else x[:, : size[0], : size[1]]


def neighbourhoods(x: Tensor, kernel: Size, stride: Size) -> Tensor:
    """Overlapping windows of a map: (B, H, W, C) to (B, windows, kernel, C), row by row."""
    x = x.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    return x.flatten(4).transpose(3, 4).flatten(1, 2)


def surroundings(x: Tensor, window: Size, margin: Size, value: float = 0.0) -> Tensor:
    """Every window of a map (B, H, W, C) with `margin` tokens more on each of its sides.

    (B, windows, (h + 2 margin) * (w + 2 margin), C); `value` stands where the map has ended.
    """
    rows, columns = margin
    x = F.pad(pad_to(x, window, value), (0, 0, columns, columns, rows, rows), value=value)
    return neighbourhoods(x, (window[0] + 2 * rows, window[1] + 2 * columns), window)


def hidden_surroundings(
    size: Size, window: Size, margin: Size, device: torch.device | None = None
) -> Tensor | None:
    """The mask (windows, 1, keys) that hides what `surroundings` has added; None for nothing."""
    if margin == (0, 0) and size[0] % window[0] == 0 and size[1] % window[1] == 0:
        return None
    real = torch.zeros(1, *size, 1, device=device)
    return surroundings(real, window, margin, HIDDEN)[0].transpose(1, 2)


def fitted(window: int | Size, size: Size) -> Size:
    """The window that a map of `size` gets: no larger than the map.

    A square window takes the map's smaller side on both axes, as the authors do; another one is cut
    per side. Where it is cut, or fills the map on an axis, nothing is shifted (`half`).
    """
    h, w = pair(window)
    if h == w:
        h = w = min(h, *size)
    return min(h, size[0]), min(w, size[1])


def half(window: Size, size: Size) -> Size:
    """The shift of every second block: half a window; none where a window fills an axis."""
    if size[0] <= window[0] or size[1] <= window[1]:
        return 0, 0
    return window[0] // 2, window[1] // 2


# ---------------------------------------------------------------------- masks and biases


def window_mask(
    size: Size,
    window: Size,
    shift: Size,
    mask_padding: bool = True,
    device: torch.device | None = None,
) -> Tensor | None:
    """(windows, tokens, tokens) added to the logits of a map of `size` that was padded and rolled.

    -100 between the regions that the roll has joined, -1000 for padded keys; None for no mask.
    """
    padded = tuple(n * w for n, w in zip(counts(size, window), window, strict=True))
    hides = mask_padding and padded != tuple(size)
    if shift == (0, 0) and not hides:
        return None
    mask = torch.zeros(1, device=device)
    if shift != (0, 0):
        axes = zip(padded, window, shift, strict=True)
        rows, columns = (_regions(*axis, device) for axis in axes)
        labels = to_windows((3 * rows[:, None] + columns)[None, ..., None], window)[0, :, :, 0]
        mask = mask + ACROSS * (labels[:, :, None] != labels[:, None, :])
    if hides:
        keys = pad_to(torch.zeros(1, *size, 1, device=device), window, HIDDEN)
        keys = to_windows(keys.roll((-shift[0], -shift[1]), (1, 2)), window)[0, :, :, 0]
        mask = mask + keys[:, None, :]
    tokens = window[0] * window[1]
    return mask.expand(mask.shape[0], tokens, tokens).contiguous()


def _regions(length: int, window: int, shift: int, device: torch.device | None) -> Tensor:
    """(length,): 0, 1 or 2, cut where the last window and what was rolled into it begin."""
    place = torch.arange(length, device=device)
    if not shift:
        return torch.zeros_like(place)
    return (place >= length - window).long() + (place >= length - shift).long()


def relative_index(window: Size, device: torch.device | None = None) -> Tensor:
    """(tokens, tokens) int64: the row of a bias table for the offset of every query to every key.

    A table has (2h - 1) * (2w - 1) rows; offsets are query - key, rows before columns.
    """
    h, w = window
    place = torch.arange(h * w, device=device)
    rows, columns = place // w, place % w
    down = rows[:, None] - rows[None, :] + h - 1
    right = columns[:, None] - columns[None, :] + w - 1
    return down * (2 * w - 1) + right


def bias_table(window: Size, heads: int) -> nn.Parameter:
    """A table ((2h - 1) * (2w - 1), heads), drawn with a deviation of 0.02."""
    return drawn((2 * window[0] - 1) * (2 * window[1] - 1), heads)


def relative_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias (heads, tokens, tokens) that a table ((2h - 1) * (2w - 1), heads) gives."""
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)


def resize_bias_table(table: Tensor, old: Size, new: Size) -> Tensor:
    """A bias table of windows `old`, for windows `new`: each head's image, bicubic."""
    if tuple(old) == tuple(new):
        return table
    (from_h, from_w), (h, w) = ((2 * h - 1, 2 * w - 1) for h, w in (old, new))
    image = table.float().transpose(0, 1).unflatten(1, (from_h, from_w))[None]
    image = F.interpolate(image, (h, w), mode="bicubic", align_corners=False)
    return image[0].flatten(1).transpose(0, 1).to(table.dtype)


def map_bias(table: Tensor, made_for: Size, size: Size, index: Tensor | None = None) -> Tensor:
    """The bias (heads, tokens, tokens) of a map of `size` by a table of maps or windows `made_for`,
    resized for others. index: that of `made_for`, where it is kept."""
    if size != made_for or index is None:
        index = relative_index(size, table.device)
    return relative_bias(resize_bias_table(table, made_for, size), index)


def fit_bias_table(table: Tensor, window: Size, square: bool = False) -> Tensor:
    """A bias table, resized from the square window that it must be of; as it is where it fits.

    square: it cannot be of an oblong one.
    """
    side = (math.isqrt(table.shape[0]) + 1) // 2
    rows = (2 * window[0] - 1) * (2 * window[1] - 1)
    fits = table.shape[0] == rows and not square
    if fits or (2 * side - 1) ** 2 != table.shape[0]:
        return table
    return resize_bias_table(table, (side, side), window)


# ---------------------------------------------------------------------- attention


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Queries (B, W, Tq, C) over keys and values (B, W, Tk, C) of the same window: (B, W, Tq, C).

    bias: (heads, Tq, Tk), added in every window. mask: (W, Tq or 1, Tk), added for every head.
    The fused kernel takes one axis besides the batch: windows go into that of the heads.
    """
    windows = q.shape[1]
    q, k, v = (_heads(x, heads) for x in (q, k, v))
    added = None
    if mask is not None:
        added = mask[:, None].expand(-1, heads, -1, -1)
    if bias is not None:
        added = bias.expand(windows, -1, -1, -1) if added is None else added + bias
    if added is not None:
        added = added.flatten(0, 1)[None].to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, added, dropout_p=dropout)
    return join_heads(y.unflatten(1, (windows, heads)))


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, W, T, C) to (B, W * heads, T, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(2, 3).flatten(1, 2)


class WindowAttention(nn.Module):
    """Multi-head self-attention within the windows of a map, after a roll by `shift`.

    window, shift: (height, width). size: (H, W) of the maps to come, whose mask is then a constant
    of the module (not in the state dict); other maps make theirs on the way. mask_padding: see the
    head of this file. Raises ValueError where the width does not divide by the heads.
    """

    index: Tensor
    mask: Tensor | None

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int | Size,
        shift: int | Size = 0,
        *,
        size: Size | None = None,
        qkv_bias: bool = True,
        mask_padding: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.num_heads, self.attn_drop = heads, attn_drop
        self.window, self.shift, self.size = pair(window), pair(shift), size
        self.mask_padding = mask_padding
        self.relative_position_bias_table = bias_table(self.window, heads)
        self.register_buffer("index", relative_index(self.window), persistent=False)
        mask = self._mask(size) if size is not None else None
        self.register_buffer("mask", mask, persistent=False)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C), of any size. Returns the same shape."""
        size, (down, right) = (x.shape[1], x.shape[2]), self.shift
        mask = self.mask if size == self.size else self._mask(size, x.device)
        x = pad_to(x, self.window)
        padded = (x.shape[1], x.shape[2])
        if self.shift != (0, 0):
            x = x.roll((-down, -right), (1, 2))
        q, k, v = self.qkv(to_windows(x, self.window)).chunk(3, dim=-1)
        bias = relative_bias(self.relative_position_bias_table, self.index)
        drop = self.attn_drop if self.training else 0.0
        y = self.proj_drop(self.proj(attend(q, k, v, self.num_heads, bias, mask, drop)))
        y = from_windows(y, self.window, padded)
        if self.shift != (0, 0):
            y = y.roll((down, right), (1, 2))
        return y if padded == size else y[:, : size[0], : size[1]]

    def _mask(self, size: Size, device: torch.device | None = None) -> Tensor | None:
        return window_mask(size, self.window, self.shift, self.mask_padding, device)

    def extra_repr(self) -> str:
        return f"window={self.window}, shift={self.shift}"


class SwinBlock(nn.Module):
    """Window attention and MLP, each added to a map (B, H, W, C) behind a norm of its own.

    attention: further arguments of `WindowAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int | Size,
        shift: int | Size = 0,
        *,
        mlp_ratio: float = 4.0,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        **attention,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = WindowAttention(dim, heads, window, shift, proj_drop=proj_drop, **attention)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Cells of 2x2 tokens become one: (B, H, W, C) to (B, H/2, W/2, out), odd sides padded."""

    def __init__(
        self,
        dim: int,
        out: int | None = None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.norm = norm(4 * dim)
        self.reduction = Linear(4 * dim, 2 * dim if out is None else out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to(x, (2, 2))
        cells = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(cells, dim=-1)))
