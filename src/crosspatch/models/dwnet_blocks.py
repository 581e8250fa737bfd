# SPDX-License-Identifier: Apache-2.0
"""The parts of DWNet: three local layers that differ in where their kernels come from, the block.

The equations stand in `dwnet.py`. Local layers take and give (B, C, H, W); embedding and blocks
give maps with the channels last, (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from crosspatch.layers.first_weights import drawn
from crosspatch.layers.maps import on_channels
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.position import resize_table
from crosspatch.layers.windows import Size, pad_to

Norm = Callable[[int], nn.Module]

# ---------------------------------------------------------------------- local layers


def local_sum(x: Tensor, weight: Tensor, kernel: int) -> Tensor:
    """The sum of `weight` times `x` over the neighbours of each place, zero outside.

    x: (B, C, H, W). weight: (B, G, kernel^2, H, W), for groups of C / G channels in a row, or
    (B, G, kernel^2, 1, 1) for all places alike.
    """
    margin = kernel // 2
    x = F.pad(x, (margin,) * 4)
    add = _by_rows if torch.compiler.is_compiling() else _by_places
    return add(x, weight, kernel)


def _by_places(x: Tensor, weight: Tensor, kernel: int) -> Tensor:
    """`local_sum` of a padded x, neighbour by neighbour: it keeps nothing but x and the weights."""
    height, width = x.shape[2] - kernel + 1, x.shape[3] - kernel + 1
    x = x.unflatten(1, (weight.shape[1], -1))
    terms = (
        share * x[..., place // kernel :, place % kernel :][..., :height, :width]
        for place, share in enumerate(weight.unsqueeze(2).unbind(3))
    )
    return reduce(torch.add, terms).flatten(1, 2)


def _by_rows(x: Tensor, weight: Tensor, kernel: int) -> Tensor:
    """`local_sum` of a padded x, a row of neighbours at once: a graph of a seventh of the size."""
    height, width = x.shape[2] - kernel + 1, x.shape[3] - kernel + 1
    x = torch.stack([x[..., c : c + width] for c in range(kernel)], dim=2)
    x = x.unflatten(1, (weight.shape[1], -1))
    shares = weight.unflatten(2, (kernel, kernel)).unsqueeze(2).unbind(3)
    terms = ((share * x[..., r : r + height, :]).sum(dim=3) for r, share in enumerate(shares))
    return reduce(torch.add, terms).flatten(1, 2)


class DynamicConv(nn.Module):
    """D-DW: a depthwise convolution whose kernels are predicted from the mean of each picture.

    (B, C, H, W) to the same shape; `bias` is one number per channel, the same for all pictures. A
    single picture, whose one mean no norm can train on, is trained with the running statistics.
    """

    def __init__(self, dim: int, kernel: int, reduction: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.conv1 = nn.Conv2d(dim, dim // reduction, 1, bias=False)
        self.bn = nn.BatchNorm2d(dim // reduction)
        self.conv2 = nn.Conv2d(dim // reduction, dim * kernel**2, 1)
        self.bias = nn.Parameter(torch.zeros(dim))

    def weight(self, x: Tensor) -> Tensor:
        """Kernels (B, C, kernel^2, 1, 1) for the pictures x."""
        hidden = F.relu(self._normalised(self.conv1(x.mean(dim=(2, 3), keepdim=True))))
        return self.conv2(hidden).unflatten(1, (-1, self.kernel**2))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight(x), self.bias[:, None, None]
        if torch.compiler.is_compiling():  # a number of groups cannot follow the batch
            return local_sum(x, weight, self.kernel) + bias
        kernels = weight.reshape(-1, 1, self.kernel, self.kernel)
        margin = self.kernel // 2
        y = F.conv2d(x.flatten(0, 1)[None], kernels, padding=margin, groups=len(kernels))
        return y.reshape(x.shape) + bias

    def _normalised(self, x: Tensor) -> Tensor:
        bn = self.bn
        if not self.training or x.shape[0] > 1 or type(bn) is not nn.BatchNorm2d:
            return bn(x)
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)


class InhomogeneousConv(nn.Module):
    """I-D-DW: kernels predicted at every place for that place, shared by `group` channels each.

    (B, C, H, W) to the same shape, without a bias.
    """

    def __init__(self, dim: int, kernel: int, reduction: int, group: int) -> None:
        super().__init__()
        self.kernel = kernel
        hidden = dim // reduction
        self.conv1 = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(hidden, dim // group * kernel**2, 1))

    def weight(self, x: Tensor) -> Tensor:
        """Kernels (B, groups, kernel^2, H, W) for the places of x."""
        return self.conv2(self.conv1(x)).unflatten(1, (-1, self.kernel**2))

    def forward(self, x: Tensor) -> Tensor:
        return local_sum(x, self.weight(x), self.kernel)


class LocalSpec(NamedTuple):
    """The local layer of a stage. kind: "static", "dynamic" or "inhomogeneous"; kernel: its side;
    group: channels that share an inhomogeneous kernel; reduction: how much narrower than the map
    the hidden layer is that predicts kernels."""

    kind: str
    kernel: int
    group: int
    reduction: int

    def build(self, dim: int) -> nn.Module:
        if self.kind == "static":
            return nn.Conv2d(dim, dim, self.kernel, padding=self.kernel // 2, groups=dim)
        if self.kind == "dynamic":
            return DynamicConv(dim, self.kernel, self.reduction)
        return InhomogeneousConv(dim, self.kernel, self.reduction, self.group)


# ---------------------------------------------------------------------- the block


class SpatialPart(nn.Module):
    """D of the equations: a local layer between two 1x1 convolutions, each behind a batch norm."""

    def __init__(self, dim: int, local: LocalSpec) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 1, bias=False)
        self.bn0 = nn.BatchNorm2d(dim)
        self.conv = local.build(dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        x = F.relu(self.bn(self.conv(x)))
        return self.bn2(self.conv2(x))


class DwBlock(nn.Module):
    """The spatial part, and an MLP of the batch norm, each added to a map (B, H, W, C)."""

    def __init__(
        self, dim: int, local: LocalSpec, mlp_ratio: float, drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.attn2conv = SpatialPart(dim, local)
        self.bn = nn.BatchNorm2d(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(on_channels(self.attn2conv, x))
        return x + self.drop_path(self.mlp(on_channels(self.bn, x)))


# ---------------------------------------------------------------------- the embedding


class Embed(nn.Module):
    """Patches of pictures (B, C_in, H, W), normalised: (B, h, w, dim).

    Pictures that patches do not divide are padded at the bottom and at the right. grid: (h, w) of
    a position table, None for none.
    """

    absolute_pos_embed: nn.Parameter | None

    def __init__(
        self, in_chans: int, dim: int, patch: Size, grid: Size | None, norm: Norm, drop: float
    ) -> None:
        super().__init__()
        self.patch, self.grid = patch, grid
        self.proj = nn.Conv2d(in_chans, dim, patch, patch)
        self.norm = norm(dim)
        self.absolute_pos_embed = None if grid is None else drawn(1, grid[0] * grid[1], dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to(x.permute(0, 2, 3, 1), self.patch).permute(0, 3, 1, 2)
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))
        if self.absolute_pos_embed is not None and self.grid is not None:
            size = x.shape[1], x.shape[2]
            x = x + resize_table(self.absolute_pos_embed, self.grid, size, 0).unflatten(1, size)
        return self.drop(x)
