# SPDX-License-Identifier: Apache-2.0
"""Maps with the channels last, (B, H, W, C), and layers that want them in front."""

from __future__ import annotations

from torch import Tensor, nn


def on_channels(layer: nn.Module, x: Tensor) -> Tensor:
    """A map (B, H, W, C) through a layer of (B, C, H, W), such as a convolution; channels last
    again."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
