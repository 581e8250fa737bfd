# SPDX-License-Identifier: Apache-2.0
"""The parts of MedViTV2: local blocks, global blocks, and the KAN that is their feed-forward.

"Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood Attention",
arXiv 2502.13693; the equations stand in `medvitv2.py`. Maps are (B, C, H, W).
"""

from __future__ import annotations

from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
from timm.layers import DropPath
from timm.models import nextvit as timms
from torch import Tensor, nn

from crosspatch.layers.linear import Linear
from crosspatch.layers.windows import Size
from crosspatch.models.medvitv2_attention import NeighbourhoodAttention
from crosspatch.models.nextvit_blocks import TransformerBlock

LAYOUTS = ("map", "authors")
KNOTS = 8
REACH = 2.0  # knots lie on [-REACH, REACH]
WIDTH = 0.33  # of a basis function
KAN_RATIO = 2  # hidden width
FFN_RATIO = 3


def to_rows(x: Tensor, layout: str) -> Tensor:
    """A map (B, C, H, W) as (B, H, W, C): its pixels or, in the authors' layout, its memory cells,
    C in a row. Raises ValueError for a map that is not square in the authors' layout."""
    if layout == "map":
        return x.permute(0, 2, 3, 1)
    if x.shape[2] != x.shape[3]:
        raise ValueError(
            f"a map of {x.shape[2]}x{x.shape[3]} with layout 'authors', which takes square "
            "pictures; build it with layout='map' for others"
        )
    return x.reshape(x.shape[0], x.shape[2], x.shape[3], x.shape[1])


def from_rows(x: Tensor, layout: str) -> Tensor:
    """What `to_rows` gave, back to (B, C, H, W)."""
    if layout == "map":
        return x.permute(0, 3, 1, 2)
    return x.reshape(x.shape[0], x.shape[3], x.shape[1], x.shape[2])


class SqueezeExcite(nn.Module):
    """Channels times a gate that comes of their means over the map."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            Linear(dim, hidden), nn.ReLU(), Linear(hidden, dim), nn.Hardsigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None]


class ConvFfn(nn.Module):
    """x + G(x): 1x1 to `ratio` times the width, depth-wise, squeeze and excite, 1x1 back."""

    def __init__(self, dim: int, ratio: int, kernel: int) -> None:
        super().__init__()
        hidden = dim * ratio
        self.conv = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            nn.Conv2d(hidden, hidden, kernel, 1, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.Hardswish(),
            SqueezeExcite(hidden, ratio),
            nn.Conv2d(hidden, dim, 1, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class LocalBlock(nn.Module):
    """LFP: neighbourhood attention and a convolutional feed-forward; drop path on the attention.

    size: (H, W) of the map that attention gets. attention: further arguments of
    `NeighbourhoodAttention`. Raises ValueError where heads of `head_dim` do not divide the width.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        size: Size,
        *,
        stride: int = 1,
        head_dim: int = 32,
        conv_kernel: int = 3,
        layout: str = "map",
        drop_path: float = 0.0,
        **attention: Any,
    ) -> None:
        super().__init__()
        if out_chs % head_dim:
            raise ValueError(f"a width of {out_chs} must divide by heads of {head_dim}")
        self.layout = layout
        self.patch_embed = timms.PatchEmbed(in_chs, out_chs, stride)
        self.norm1 = nn.BatchNorm2d(out_chs)
        self.attn = NeighbourhoodAttention(out_chs, out_chs // head_dim, size=size, **attention)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.BatchNorm2d(out_chs)
        self.conv = ConvFfn(out_chs, FFN_RATIO, conv_kernel)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        seen = self.attn(to_rows(self.norm1(x), self.layout))
        x = x + self.drop_path(from_rows(seen, self.layout))
        return x + self.conv(self.norm2(x))


class KanLayer(nn.Module):
    """Sums of learned functions of every input: (..., n) to (..., out).

    y = W [phi_g(LN x)], phi_g(t) = 1 - tanh^2((t - g) / 0.33), for fixed knots g; the basis is
    sorted by input, then by knot.
    """

    grid: Tensor

    def __init__(self, width: int, out: int, knots: int = KNOTS) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(width)
        grid = torch.linspace(-REACH, REACH, knots)
        self.register_buffer("grid", grid, persistent=False)
        self.spline_linear = Linear(width * knots, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.tanh((self.layernorm(x)[..., None] - self.grid) / WIDTH)
        return self.spline_linear((1 - t * t).flatten(-2))


class Kan(nn.Module):
    """Two layers, C to `ratio` C to C, at every pixel of a map (or row of cells, see `to_rows`)."""

    def __init__(self, dim: int, ratio: int, knots: int, layout: str) -> None:
        super().__init__()
        hidden = dim * ratio
        self.layout = layout
        self.layers = nn.Sequential(KanLayer(dim, hidden, knots), KanLayer(hidden, dim, knots))

    def forward(self, x: Tensor) -> Tensor:
        return from_rows(self.layers(to_rows(x, self.layout)), self.layout)


class GlobalBlock(TransformerBlock):
    """GFP: Next-ViT's transformer block with a KAN as its feed-forward."""

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        *,
        drop_path: float = 0.0,
        knots: int = KNOTS,
        layout: str = "map",
        **more: Any,
    ) -> None:
        super().__init__(in_chs, out_chs, drop_path, **more)
        self.mlp = Kan(out_chs, KAN_RATIO, knots, layout)
