# SPDX-License-Identifier: Apache-2.0
"""A convolution and its batch norm under the names that LeViT's authors gave them."""

from __future__ import annotations

from torch import nn


class ConvNorm(nn.Sequential):
    """A convolution `c` without bias and a batch norm `bn`; (B, dim, H, W) to (B, out, h, w)."""

    def __init__(self, dim: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        conv = nn.Conv2d(dim, out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.add_module("c", conv)
        self.add_module("bn", nn.BatchNorm2d(out))
