# SPDX-License-Identifier: Apache-2.0
"""Batch norms taken into the layers beside them: the same numbers with fewer operators.

With its running statistics a batch norm (Ioffe and Szegedy 2015, arXiv 1502.03167) computes
s x + t, s = gamma / sqrt(var + eps), t = beta - s mean. Behind it W' = W diag(s), b' = b + W t; in
front of it W' = diag(s) W, b' = s b + t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval


def is_batch_norm(module: object) -> bool:
    """Whether it is a batch norm of any kind."""
    return isinstance(module, _BatchNorm)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """(s, t): the batch norm computes s x + t. Raises ValueError where it keeps no statistics."""
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        raise ValueError("a batch norm without running statistics cannot be merged")
    scale = norm.weight / torch.sqrt(variance + norm.eps)
    return scale, norm.bias - mean * scale


@torch.no_grad()
def fold_before(layer: Any, *norms: Any) -> None:
    """Take `norms`, first to last, into the linear layer or 1x1 convolution behind them, in place.

    The layer has a bias; an average over places may lie between.
    """
    scale, shift = affine(norms[0])
    for norm in norms[1:]:
        more, offset = affine(norm)
        scale, shift = scale * more, shift * more + offset
    weight = layer.weight.flatten(1)
    layer.bias.add_(weight @ shift)
    layer.weight.copy_((weight * scale).view_as(layer.weight))


def fold_after(module: nn.Module, conv: str, norm: str) -> None:
    """Take the batch norm `module.norm` into `module.conv` in front of it, in place; nothing where
    there is none."""
    behind = getattr(module, norm)
    if is_batch_norm(behind):
        setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), behind))
        setattr(module, norm, nn.Identity())
