# SPDX-License-Identifier: Apache-2.0
"""ResFormer: a ViT whose positions are computed from the grid, so that any size of picture fits.

"ResFormer: Scaling ViTs with Multi-Resolution Training", Tian et al., arXiv 2212.00776, CVPR 2023.
DeiT with two things instead of its table of positions:

    p  = DWConv3x3(sin | cos of 2 pi r / (n + 1e-6) / 10000^(2 floor(i/2) / (C/2)))     r = 1 … n
    z0 = [class; t + p]                                                 global, once
    y  = Proj(softmax(q k^T / sqrt d) v + [0; DWConv3x3(v of the patches)])       local, per block

The first half of the channels of p is made of rows, the other of columns. The filters of the local
one, one per channel of a head, are the same for all heads, and begin at 0. No tensor's shape
depends on the size of the pictures. Training at several sizes is `objectives/resformer.py`.

Departure: grids need not be square; rows and columns are each normalised by their own number.

Expected at 224 (M parameters, GMACs): tiny 5.69, 1.26; small 21.99, 4.61; base 86.43, 17.6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs
from torch import Tensor, nn

from crosspatch.layers.attention import Attention
from crosspatch.models.registry import register, settings
from crosspatch.models.vit import VisionTransformer

TEMPERATURE = 10_000
EPS = 1e-6  # of the normalised coordinates
FREE = ("pos_embed", "get_v", "cls_token")  # parameters with these in their names do not decay


class ResFormer(VisionTransformer):
    """The trunk with ResFormer's positions; arguments are the trunk's.

    Takes pictures of any size from one patch on, whatever `img_size` says: that is the size it is
    measured and exported at (with `dynamic_img_size=False` it takes no other). Raises ValueError
    for an odd embed_dim, and for the arguments that choose positions or attention.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        *arguments: Any,
        dynamic_img_size: bool = True,
        **trunk: Any,
    ) -> None:
        fixed = {"pos_embed": "none", "no_embed_class": True, "attention": LocalAttention}
        if chosen := sorted(set(fixed) & set(trunk)):
            raise ValueError(f"{', '.join(chosen)}: ResFormer's own cannot be chosen")
        super().__init__(
            img_size, *arguments, dynamic_img_size=dynamic_img_size, **{**trunk, **fixed}
        )
        self.pos_embed = GlobalPosition(self.stages[0].width)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        return self.pos_embed(grid)

    def position_tables(self) -> dict:
        """None: positions are computed."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Whatever belongs to positions and to tokens of its own."""
        names = {name for name, _ in self.named_parameters() if any(part in name for part in FREE)}
        return names | super().no_weight_decay() - {"pos_embed"}


class GlobalPosition(nn.Module):
    """Sines of normalised coordinates, then a depth-wise 3x3 convolution whose result is taken."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim % 2:
            raise ValueError(f"embed_dim={dim}; rows and columns have half of the channels each")
        self.embed_layer = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """Positions (1, h*w, C) of a grid (h, w)."""
        weight = self.embed_layer.weight
        waves = sines(grid, weight.shape[0], weight.device).to(weight.dtype)
        return self.embed_layer(waves).flatten(2).transpose(1, 2)


def sines(grid: tuple[int, int], dim: int, device: torch.device | None = None) -> Tensor:
    """(1, dim, h, w) float32: in each half of the channels a sine and a cosine by turns."""
    half = dim // 2
    channel = torch.arange(half, device=device)
    period = TEMPERATURE ** (2 * (channel // 2) / half)
    waves = []
    for count in grid:
        place = torch.arange(1, count + 1, device=device) / (count + EPS) * (2 * math.pi)
        angle = place[:, None] / period
        waves.append(torch.where(channel % 2 == 0, angle.sin(), angle.cos()))
    rows, columns = waves
    across = (*grid, half)
    both = [rows[:, None].expand(across), columns[None].expand(across)]
    return torch.cat(both, dim=-1).permute(2, 0, 1)[None]


class LocalAttention(Attention):
    """Attention whose patches also see the values of their eight neighbours and their own, by a
    depth-wise 3x3 convolution that all heads share.

    Raises ValueError where it would be given another layer's map.
    """

    gridded = True

    def __init__(self, *shape: Any, shares: bool = False, **options: Any) -> None:
        if shares:
            raise ValueError("a local attention has a map of its own")
        super().__init__(*shape, **options)
        size = self.value_width // self.num_heads
        self.get_v = nn.Conv2d(size, size, 3, 1, 1, groups=size)
        nn.init.zeros_(self.get_v.weight)
        nn.init.zeros_(self.get_v.bias)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        rows: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        if not self._neighbours(x, rows, grid):
            return super().forward(x, bias, rows)
        q, k, v = self.project(x)
        return self._merged(q, k, v, bias, rows, grid)

    def with_class_row(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        rows: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self._neighbours(x, rows, grid):
            return super().with_class_row(x, bias, rows)
        q, k, v = self.project(x)
        return self._merged(q, k, v, bias, rows, grid), self._mean_row(q, k, bias)

    def _neighbours(self, x: Tensor, rows: int | None, grid: tuple[int, int] | None) -> bool:
        """Whether any of the first `rows` tokens is a patch, which alone have neighbours."""
        if grid is None:
            raise ValueError("a local attention needs the grid of the patches")
        return rows is None or rows > x.shape[1] - grid[0] * grid[1]

    def _merged(self, q: Tensor, k: Tensor, v: Tensor, bias: Any, rows: Any, grid: Any) -> Tensor:
        y = self._fused(q, k, v, bias) + self.local(v, grid)
        return self.merge_heads(y[:, :, :rows])

    def local(self, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """Values (B, H, N, d) to what the patches gather from beside them, 0 for prefix tokens."""
        prefix = v.shape[2] - grid[0] * grid[1]
        image = v[:, :, prefix:].flatten(0, 1).transpose(1, 2).unflatten(2, grid)
        found = self.get_v(image).flatten(2).transpose(1, 2).unflatten(0, (-1, self.num_heads))
        return F.pad(found, (0, 0, prefix, 0))


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: ResFormer) -> dict[str, Tensor]:
    """A released state dict: bare, or in {"model": …}; it fits every size."""
    return dict(state_dict.get("model", state_dict))


# the authors' entry points, at 224 unless another size is asked for
VARIANTS = {
    "resformer_tiny_patch16": {"embed_dim": 192, "num_heads": 3},
    "resformer_small_patch16": {"embed_dim": 384, "num_heads": 6},
    "resformer_base_patch16": {"embed_dim": 768, "num_heads": 12},
}
# ours, for small pictures, in the shape of vit_micro_32
SMALL = {
    "resformer_micro_32": {
        "img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2,
        "mlp_ratio": 2.0, "stem": "conv",
    }
}  # fmt: skip


def _settings(arguments: Mapping[str, Any]) -> Any:
    first = "patch_embed.proj.0" if arguments.get("stem") == "conv" else "patch_embed.proj"
    return settings(arguments.get("img_size", 224), first, "head")


default_cfgs = generate_default_cfgs(
    {name: _settings(arguments) for name, arguments in (VARIANTS | SMALL).items()}
)
register(__name__, ResFormer, VARIANTS | SMALL, checkpoint_filter_fn, out_indices=3)
