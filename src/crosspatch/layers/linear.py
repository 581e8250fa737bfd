# SPDX-License-Identifier: Apache-2.0
"""The linear layer through oneDNN, on CPUs where that beats torch's default BLAS.

torch's CPU build multiplies float32 matrices with MKL, which on some makers' processors leaves half
of the machine unused; oneDNN in the same wheel does not. Its operator has no autograd formula, so
three calls make one: output, input gradient, weight gradient. Which of the two is faster is a
matter of the machine: `auto` measures once (a tenth of a second) and remembers the answer for this
processor and number of threads; a run writes it into its settings so that resuming stays exact. The
two differ in the last bits (1e-5); with `off` every number is torch's own.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crosspatch.cache import remembered
from crosspatch.errors import UsageError
from crosspatch.processor import processor

MODES = ("auto", "on", "off")
VARIABLE = "CROSSPATCH_LINEAR"
LEAST_MACS = 1_000_000  # below it the call costs more than the product
WORTH = 1.15  # oneDNN must be this much faster before `auto` takes it
TURNS = 8
SHAPES = ((401, 128, 384), (197, 384, 1536))  # rows, in, out: a fine and a coarse branch's products

_on: bool | None = None  # None: not resolved yet


class Linear(nn.Linear):
    """torch's Linear, (..., C) to (..., D), whose product goes through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C) @ weight (D, C)^T + bias (D,), as `F.linear`; through oneDNN where that applies.

    Gradients flow once: a second backward pass through oneDNN raises RuntimeError. Plain `F.linear`
    is taken below a million multiply-adds, for anything but float32 on the CPU, and under compile,
    export, autocast, tracing, functorch, forward-mode derivatives and operator counting.
    """
    if torch.compiler.is_compiling() or not _applies(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        return _OneDnnLinear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return onednn_product(x, weight, bias)


def use(mode: str) -> bool:
    """Set how this process multiplies; returns whether oneDNN is on.

    `auto` obeys `$CROSSPATCH_LINEAR`, and where that says nothing the measurement. Raises
    UsageError for another mode.
    """
    global _on
    if mode == "auto":
        mode = os.environ.get(VARIABLE, "auto")
    if mode not in MODES:
        raise UsageError(
            f"linear {mode!r}", f"It is one of: {', '.join(MODES)}", "Leave it out for auto"
        )
    _on = _remembered() >= WORTH if mode == "auto" else mode == "on" and onednn_exists()
    return _on


def active() -> bool:
    """Whether large products go through oneDNN; `auto` until `use` is called."""
    return use("auto") if _on is None else _on


@contextmanager
def switched(mode: str) -> Iterator[bool]:
    """`use(mode)` for a while, for bit tests and comparisons."""
    global _on
    before = _on
    try:
        yield use(mode)
    finally:
        _on = before


def _remembered() -> float:
    threads = f"{torch.get_num_threads()} threads"
    key = f"{processor().describe()}; {threads}; torch {torch.__version__}"
    number = lambda answer: isinstance(answer, int | float)
    return float(remembered("linear.json", key, measure, number))


def measure() -> float:
    """How many times as fast oneDNN is here, over `SHAPES`; 0 where the operator is missing."""
    if not onednn_exists():
        return 0.0
    return statistics.geometric_mean(_ratio(*shape) for shape in SHAPES)


@torch.inference_mode()
def _ratio(rows: int, width: int, out: int) -> float:
    """The best time of each, taken in turns: other jobs on the cores can only make one longer."""
    x, weight, bias = torch.randn(rows, width), torch.randn(out, width), torch.randn(out)
    turns = [
        (_seconds(F.linear, x, weight, bias), _seconds(onednn_product, x, weight, bias))
        for _ in range(TURNS)
    ]
    plain, other = (min(times) for times in zip(*turns, strict=True))
    return plain / other


def _seconds(product: Callable[..., Tensor], *operands: Tensor) -> float:
    began = time.perf_counter()
    product(*operands)
    return time.perf_counter() - began


def onednn_exists() -> bool:
    """Whether this torch was built with the operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _applies(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN may compute this product: large, plain, float32, and nobody is looking."""
    parts = (x, weight) if bias is None else (x, weight, bias)
    return (
        _on is not False
        and x.numel() * weight.shape[0] >= LEAST_MACS
        and all(type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided for t in parts)
        and all(t.dtype is torch.float32 and t.device.type == "cpu" for t in parts)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._is_torch_function_mode_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and active()
    )


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C) @ weight (D, C)^T + bias (D,), float32 on the CPU; it has no derivative."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """The three products of a linear layer; the gradient of the bias is a sum."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = onednn_product(grad, weight.t()) if wants_x else None
        grad_weight = None
        if wants_weight:
            grad_weight = onednn_product(rows.t(), x.reshape(-1, x.shape[-1]).t())
        return grad_x, grad_weight, rows.sum(dim=0) if wants_bias else None
