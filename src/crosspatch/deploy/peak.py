# SPDX-License-Identifier: Apache-2.0
"""What matrix products reach on this machine: the ceiling that a network's speed is set against.

A product of two square matrices of the best size, by whichever operator is fastest here, does
nothing but multiply and add; the share of its rate that a network reaches says how much of its time
goes elsewhere (memory, softmax, norms, small products).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from crosspatch.deploy.bundle import needed
from crosspatch.errors import UsageError
from crosspatch.layers.linear import onednn_exists, onednn_product
from crosspatch.metrics.latency import alternate

SIZES = (384, 512, 1024)  # sides; larger ones took longer and reached no more on any machine tried
SECONDS = 0.4


class Product(NamedTuple):
    """A product of two square matrices. name: operator and side; operations: 2 side^3."""

    name: str
    call: Callable[[], object]
    operations: int


class Peak(NamedTuple):
    """The fastest product of a kind, and its operations per second in the best 5 % of its turns."""

    product: Product
    rate: float


def peaks(threads: int, *, bf16: bool = False) -> dict[str, Peak]:
    """The peak of fp32, of int8 where ONNX Runtime is installed, of bf16 where it is asked for.

    threads: for int8; fp32 and bf16 take as many as torch is set to. A kind takes about `SECONDS`.
    """
    kinds = {"fp32": _float_products(torch.float32)}
    if bf16:
        kinds["bf16"] = _float_products(torch.bfloat16)
    with suppress(UsageError):  # without ONNX Runtime nothing here multiplies integers
        kinds["int8"] = [_int8_product(side, threads) for side in SIZES]
    return {kind: fastest(products, SECONDS) for kind, products in kinds.items()}


def fastest(products: list[Product], seconds: float) -> Peak:
    """The one with the greatest rate when they take turns."""
    times = alternate({one.name: one.call for one in products}, seconds=seconds, least=3)
    rates = [one.operations / times[one.name].low for one in products]
    best = int(np.argmax(rates))
    return Peak(products[best], rates[best])


def _float_products(dtype: torch.dtype) -> list[Product]:
    """torch.mm and, where torch was built with it, oneDNN's own operator."""
    kinds: dict[str, Callable[..., object]] = {"torch.mm": torch.mm}
    if onednn_exists() and dtype == torch.float32:  # torch.mm takes oneDNN itself for bf16
        kinds["oneDNN"] = onednn_product
    return [
        Product(f"{name} {side}", _float_call(product, side, dtype), 2 * side**3)
        for side in SIZES
        for name, product in kinds.items()
    ]


def _float_call(product: Callable[..., object], side: int, dtype: torch.dtype) -> Callable:
    generator = torch.Generator().manual_seed(side)
    a, b = (torch.randn(side, side, generator=generator).to(dtype) for _ in range(2))
    return torch.inference_mode()(lambda: product(a, b))


def _int8_product(side: int, threads: int) -> Product:
    """uint8 x int8 into int32, with a constant on the right, as in a network's linear layers."""
    onnx, runtime = needed("onnx"), needed("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto
    generator = np.random.default_rng(side)
    weight = generator.integers(-64, 64, (side, side), dtype=np.int8)
    node = helper.make_node("MatMulInteger", ["a", "b"], ["c"])
    ports = [
        helper.make_tensor_value_info(name, dtype, [side, side])
        for name, dtype in (("a", kind.UINT8), ("c", kind.INT32))
    ]
    constant = onnx.numpy_helper.from_array(weight, "b")
    graph = helper.make_graph([node], "product", ports[:1], ports[1:], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    options: Any = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {"a": generator.integers(0, 256, (side, side), dtype=np.uint8)}
    return Product(f"MatMulInteger {side}", lambda: session.run(None, given), 2 * side**3)
