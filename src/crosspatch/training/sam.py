# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware minimisation: the gradient is taken where the loss around the weights is highest.

"Sharpness-Aware Minimization for Efficiently Improving Generalization", Foret, Kleiner, Mobahi and
Neyshabur, arXiv 2010.01412, algorithm 1 and equation 2 with p = 2: from the gradient g at w

    e = rho g / |g|,    and the step is made from w with the gradient at w + e

where |g| is the norm over all weights. Every pass sees the same pictures and the same draws.
Several processes climb together, by the gradient that they share; the paper lets each climb by its
own (section 4.1, m-sharpness). Running statistics of normalisations follow the first pass alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

TINY = 1e-12
"""What keeps a gradient of 0 from being divided by 0."""


@torch.no_grad()
def ascent(gradients: list[Tensor], rho: float) -> list[Tensor]:
    """The step of length `rho` along these gradients, which may be scaled by any number; no step
    where one of them is not finite, as the loss scaling of fp16 expects now and then."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    finite, factor = norm.isfinite(), rho / (norm + TINY)
    return [torch.where(finite, one * factor, 0.0) for one in gradients]


def sharpness_aware(module: nn.Module, rho: float, again: Callable[[], object]) -> None:
    """Replace the gradients of `module` by those at the top of its neighbourhood of radius `rho`.

    again: computes them anew at the weights as they are then. Weights and buffers are, bit for bit,
    what they were.
    """
    moved: list[Tensor] = [p for p in module.parameters() if p.grad is not None]
    if not moved:
        return
    state = [*moved, *module.buffers()]
    kept = [one.detach().clone() for one in state]
    with torch.no_grad():
        torch._foreach_add_(moved, ascent([p.grad for p in moved if p.grad is not None], rho))
    for parameter in moved:
        parameter.grad = None
    try:
        again()
    finally:
        with torch.no_grad():
            for one, was in zip(state, kept, strict=True):
                one.copy_(was)
