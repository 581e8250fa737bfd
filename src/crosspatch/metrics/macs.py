# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds of one forward pass, counted at the operators that torch runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of `model` for one input of `shape` (C, H, W), in evaluation mode, which is
    left as it was; see `counted`."""
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad():
            return counted(model, torch.zeros(1, *shape, device=device))[0]
    finally:
        model.train(training)


def counted(function: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[int, Any]:
    """(multiply-adds of a call, what it returned).

    Matrix products, convolutions and attention are counted (attention unfused, as the counter does
    not know every fused kernel); norms, activations and sums are not.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        result = function(*arguments, **named)
    return counter.get_total_flops() // 2, result
