# SPDX-License-Identifier: Apache-2.0
"""The weights that layers begin with, as most papers have them: ViT's, ConvNeXt's."""

from __future__ import annotations

import crosspatch._torchvision  # noqa: F401

from timm.layers import trunc_normal_
from torch import nn


def init_linear(module: nn.Module) -> None:
    """Truncated normal of 0.02 and zero bias, for every Linear layer; anything else as built."""
    if isinstance(module, nn.Linear):
        _init(module)


def init_weights(module: nn.Module) -> None:
    """As `init_linear`, for 2-D convolutions as well."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        _init(module)


def _init(module: nn.Linear | nn.Conv2d) -> None:
    if module.weight.is_meta:
        return
    trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
