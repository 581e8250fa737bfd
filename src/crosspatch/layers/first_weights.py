# SPDX-License-Identifier: Apache-2.0
"""The weights that layers begin with, as most papers have them: ViT's, ConvNeXt's, PVT's."""

from __future__ import annotations

import crosspatch._torchvision  # noqa: F401

import torch
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


def init_fan_out(module: nn.Module) -> None:
    """As `init_linear`; 2-D convolutions normal with the variance 2 over their fan-out, bias 0."""
    init_linear(module)
    if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def drawn(*shape: int) -> nn.Parameter:
    """A parameter of this shape, such as a table of positions: truncated normal of 0.02."""
    table = torch.zeros(shape)
    return nn.Parameter(table if table.is_meta else trunc_normal_(table, std=0.02))


def _init(module: nn.Linear | nn.Conv2d) -> None:
    if module.weight.is_meta:
        return
    trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
