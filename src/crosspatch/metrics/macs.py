# SPDX-License-Identifier: Apache-2.0
"""Multiply-adds of one forward pass, counted at the operators that torch runs."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-adds of `model` for one input of `shape` (C, H, W), in evaluation mode.

    Matrix products, convolutions and attention are counted (attention unfused, as the counter does
    not know every fused kernel); norms, activations and sums are not. The model's mode is left as
    it was.
    """
    training = model.training
    device = next(model.parameters()).device
    model.eval()
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            model(torch.zeros(1, *shape, device=device))
    finally:
        model.train(training)
    return counter.get_total_flops() // 2
