# SPDX-License-Identifier: Apache-2.0
"""Maps with the channels last, (B, H, W, C): layers that want them in front, half of the size."""

from __future__ import annotations

from torch import Tensor, nn


def on_channels(layer: nn.Module, x: Tensor) -> Tensor:
    """A map (B, H, W, C) through a layer of (B, C, H, W), such as a convolution; channels last
    again."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, a LN: (B, H, W, in_chans) to (B, H / 2, W / 2, dim), rounded
    up."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 3, 2, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(on_channels(self.proj, x))
