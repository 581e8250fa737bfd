# SPDX-License-Identifier: Apache-2.0
"""Adaptive polyphase anchoring, and the blocks of the networks that it makes shift-equivariant.

"Reviving Shift Equivariance in Vision Transformers", arXiv 2306.07470. The equations stand in
`shift_equivariant.py`. Maps are channels last, (B, H, W, C); strides and windows are (rows,
columns). A circular shift of the map that comes in is a circular shift of the map that goes out of
every part here, by whole strides where the part anchors.
"""

from __future__ import annotations

from collections.abc import Callable

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from crosspatch.layers.attention import check_heads
from crosspatch.layers.linear import Linear
from crosspatch.layers.maps import on_channels
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.patch_embed import pair
from crosspatch.layers.windows import Size, WindowAttention, attend, from_windows, to_windows

EPS = 1e-5  # of the norms of embeddings and of sub-sampled keys
Norm = Callable[[int], nn.Module]


# ---------------------------------------------------------------------- anchoring


def strongest_phase(x: Tensor, stride: Size) -> tuple[Tensor, Tensor]:
    """(p, q), each (B,) int64: the phase of a map (B, H, W, C) whose sub-grid x[:, p::s, q::s] has
    the greatest norm, the first in row-major order of equal ones.

    Channels are summed in float32, positions in float64 where the device has it: the sum must not
    depend on where a picture begins. No gradient. Raises ValueError where strides do not divide the
    map.
    """
    rows, columns = stride
    if x.shape[1] % rows or x.shape[2] % columns:
        raise ValueError(
            f"a map of {x.shape[1]}x{x.shape[2]} has no phases of {rows}x{columns}, which must "
            "divide it: build the model with img_size=… of multiples"
        )
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    energy = x.square().sum(dim=-1)
    energy = energy if x.device.type == "mps" else energy.double()
    energy = energy.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).sum(dim=(1, 3))
    best = energy.flatten(1).argmax(dim=1)
    return torch.div(best, columns, rounding_mode="floor"), best % columns


def rolled(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Every map of (B, H, W, C) rolled by its own (-down, -right), each (B,) int64: the pixel
    (down, right) comes to the origin."""
    batch, height, width, channels = x.shape
    rows = torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device)
    rows = (rows + down[:, None]) % height
    columns = (columns + right[:, None]) % width
    first = torch.arange(batch, device=x.device)[:, None] * (height * width)
    place = ((first + rows * width)[:, :, None] + columns[:, None]).flatten()
    return x.reshape(-1, channels).index_select(0, place).unflatten(0, (batch, height, width))


def anchored(x: Tensor, stride: Size) -> Tensor:
    """PolyOrder of a map (B, H, W, C): its strongest phase at the origin of the grid. The gradient
    is the inverse roll. Raises ValueError where strides do not divide the map."""
    if stride == (1, 1):
        return x
    return rolled(x, *strongest_phase(x, stride))


class PolyOrder(nn.Module):
    """`anchored` for maps (B, C, H, W); it has no parameters."""

    def __init__(self, stride: int | Size) -> None:
        super().__init__()
        self.stride = pair(stride)

    def forward(self, x: Tensor) -> Tensor:
        return anchored(x.permute(0, 2, 3, 1), self.stride).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


def wrapped(x: Tensor) -> Tensor:
    """A map (B, H, W, C) with one pixel more on each side, taken from the opposite one."""
    x = torch.cat([x[:, -1:], x, x[:, :1]], dim=1)
    return torch.cat([x[:, :, -1:], x, x[:, :, :1]], dim=2)


def fitting_window(window: int, size: Size) -> Size:
    """The window for a map: on each side the divisor that is nearest to `window` in ratio.

    It is `window` wherever that divides the map, so weights of the authors are not concerned; of
    two as near, the smaller.
    """
    rows, columns = (_divisor(side, window) for side in size)
    return rows, columns


def _divisor(side: int, window: int) -> int:
    divisors = [d for d in range(1, side + 1) if side % d == 0]
    ratios = [max(d / window, window / d) for d in divisors]
    return divisors[ratios.index(min(ratios))]


# ---------------------------------------------------------------------- parts


class AnchoredEmbed(nn.Module):
    """(B, H, W, C) to (B, H / k, W / k, dim): anchored unless told otherwise, then a convolution
    with kernel and stride k, then a norm. Raises ValueError where k does not divide the map."""

    def __init__(self, in_chans: int, dim: int, stride: int | Size, anchors: bool = True) -> None:
        super().__init__()
        self.stride, self.anchors = pair(stride), anchors
        self.proj = nn.Conv2d(in_chans, dim, self.stride, self.stride)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        x = anchored(x, self.stride) if self.anchors else x
        return self.norm(on_channels(self.proj, x))


class CircularPosition(nn.Module):
    """PEG: a map (B, H, W, C) and its depth-wise 3x3 convolution, the borders joined."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, dim, 3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + on_channels(self.proj, wrapped(x))


class LocalAttention(nn.Module):
    """LSA: attention within windows of a map, without positions. Raises ValueError where the width
    does not divide by the heads."""

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.num_heads, self.window, self.attn_drop = heads, window, attn_drop
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def stride(self, size: Size) -> Size:
        """What a map of `size` must be anchored to."""
        return fitting_window(self.window, size)

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[1], x.shape[2])
        window = self.stride(size)
        q, k, v = self.qkv(to_windows(x, window)).chunk(3, dim=-1)
        y = attend(q, k, v, self.num_heads, dropout=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(from_windows(y, window, size)))


class SubsampledAttention(nn.Module):
    """GSA: every pixel attends to keys and values of cells of r x r. Raises ValueError where the
    width does not divide by the heads."""

    def __init__(
        self,
        dim: int,
        heads: int,
        sr_ratio: int,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_heads(dim, heads)
        self.num_heads, self.sr_ratio, self.attn_drop = heads, sr_ratio, attn_drop
        self.q = Linear(dim, dim, bias=qkv_bias)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=EPS)

    def stride(self, size: Size) -> Size:
        """What a map of `size` must be anchored to."""
        return self.sr_ratio, self.sr_ratio

    def forward(self, x: Tensor) -> Tensor:
        cells = self.norm(on_channels(self.sr, x)) if self.sr_ratio > 1 else x
        q = self.q(x).flatten(1, 2)[:, None]
        k, v = self.kv(cells).flatten(1, 2)[:, None].chunk(2, dim=-1)
        y = attend(q, k, v, self.num_heads, dropout=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(y[:, 0].unflatten(1, x.shape[1:3])))


class TwinsBlock(nn.Module):
    """x = PolyOrder(x); x += DropPath(attention(LN x)); x += DropPath(MLP(LN x)); in the first
    block of a stage x += PEG(x)."""

    def __init__(
        self,
        dim: int,
        attention: LocalAttention | SubsampledAttention,
        *,
        mlp_ratio: float,
        norm: Norm,
        positions: bool,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = attention
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.peg = CircularPosition(dim) if positions else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = anchored(x, self.attn.stride((x.shape[1], x.shape[2])))
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return self.peg(x)


class PolySwinBlock(nn.Module):
    """x = roll(PolyOrder(x)); x += DropPath(attention(LN x)); x += DropPath(LN(MLP x)).

    shifts: whether the map is rolled by half a window; no mask stands where the borders meet, for a
    circle has none.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Size,
        shifts: bool,
        *,
        mlp_ratio: float,
        norm: Norm,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.window, self.shift = window, (window[0] // 2, window[1] // 2) if shifts else (0, 0)
        self.norm1 = norm(dim)
        self.attn = WindowAttention(
            dim, heads, window, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop
        )
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.norm2 = norm(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = anchored(x, self.window)
        if self.shift != (0, 0):
            x = x.roll((-self.shift[0], -self.shift[1]), (1, 2))
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.norm2(self.mlp(x)))
