# SPDX-License-Identifier: Apache-2.0
"""int8 of the products by the weights of Linear layers, written into the ONNX graph by ourselves.

Nothing else is touched: softmax, norms, GELU, the products of attention, convolutions, residual
sums, the fixed resizing of pixels and the classifying layers stay float32. Weights are symmetric,
one scale per output channel; activations are asymmetric uint8, one scale per tensor, found anew in
every call (dynamic; the pictures of a batch then share it) or on calibration pictures (static: the
least and the greatest value; leaving out 0.01 % of them was no better, 0.1 % up to four times
worse).

Weights reach from -64 to 64, not to 127: x86 processors without VNNI add two products of uint8 and
int8 in 16 bits and saturate. Measured with ONNX Runtime 1.31 on an AVX2-only AMD EPYC, one thread:

    weights                uniform product    crossvit_tiny_224, spread    crossvit_small_224
                           relative error     error of its logits          times faster than fp32
    int8, to 127           18 %               25 %                         1.4
    int8, to 64            0.9 %              8 %                          1.4
    uint8, 0 to 255        0.6 %              6 %                          1.3

So the seventh bit costs little, sums are exact on every processor, and the speed stays (with VNNI
it was not measured). "Spread": random weights whose norms have log-normal gains, as outlier
channels of trained networks do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crosspatch.data.decode import UnreadableImage
from crosspatch.data.opening import open_source
from crosspatch.data.preprocess import Preprocess
from crosspatch.data.sources import Source
from crosspatch.data.split import read_split
from crosspatch.deploy.bundle import INPUT, KEY, BundleInfo, needed
from crosspatch.errors import CrosspatchError, DataError
from crosspatch.processor import processor
from crosspatch.training.run import RunFolder

LINEAR, HEAD = "linear/", "head/"
"""What the names of products begin with: by the weight of a Linear, and of one that classifies."""
PRODUCTS = ("MatMul", "Gemm")
LIMIT = 64  # greatest magnitude of a weight in int8
PICTURES = 256  # to calibrate on, at most
BATCH = 8  # calibration pictures at a time


class Product(NamedTuple):
    """A product by a constant weight: its node, and the weight (in, out) float32."""

    node: Any
    weight: np.ndarray


class Range(NamedTuple):
    """Least and greatest value of an activation, 0 among them."""

    low: float
    high: float

    @property
    def scale(self) -> np.float32:
        """The step between two of the 256 values."""
        return np.float32((self.high - self.low) / 255 or 1.0)

    @property
    def zero(self) -> np.uint8:
        """The value that stands for exactly 0."""
        return np.uint8(np.clip(np.rint(-self.low / self.scale), 0, 255))


def quantise_dynamic(path_in: str | Path, path_out: str | Path) -> int:
    """Write the fp32 bundle `path_in` with int8 weights; activations are scaled in every call.

    Returns the number of products in int8. Raises DataError for a bundle that has none.
    """
    model, info = _read(path_in)
    scaled: dict[str, list[Any]] = {}

    def written(product: Product) -> list[Any]:
        return _dynamic_nodes(model, product, scaled)

    return _write(model, replace(info, precision="int8-dynamic"), path_out, written)


def quantise_static(path_in: str | Path, path_out: str | Path, images: np.ndarray) -> int:
    """Write the fp32 bundle `path_in` with int8 weights and fixed scales of the activations.

    images: (N, H, W, 3) uint8 of the bundle's size, that the ranges of the activations are taken
    from. Returns the number of products in int8. Raises DataError for a bundle that has none.
    """
    model, info = _read(path_in)
    ranges = activation_ranges(model, images)
    scaled: dict[str, list[Any]] = {}

    def written(product: Product) -> list[Any]:
        return _static_nodes(model, product, ranges, scaled)

    return _write(model, replace(info, precision="int8-static"), path_out, written)


def calibration_pictures(
    run: Path, preprocess: Preprocess, data: str | Path | None = None
) -> np.ndarray:
    """Up to 256 of the run's validation pictures, evenly taken: (N, H, W, 3) uint8.

    data: where the run's pictures are now, or others of the kind, of which the `val` folder is
    taken or else all (None: where they were). Raises DataError where they cannot be had.
    """
    config = RunFolder(run).read_config() if data is None else {}
    where = config["run"]["data"] if data is None else data
    try:
        source = open_source(
            where, least_classes=1, **{**config.get("reading", {}), "group": "none"}
        )
        items = _validation(run, source, others=data is not None)
    except CrosspatchError as error:
        raise DataError(
            f"no pictures for static scales: {error.got}",
            "the pictures that the run was trained on; its validation pictures give the scales",
            f"add --data PICTURES, or take --int8 without --static ({error.do})",
        ) from error
    chosen = items[np.linspace(0, len(items) - 1, min(len(items), PICTURES)).round().astype(int)]
    pictures = [
        one for item in chosen if (one := _pixels(source, int(item), preprocess)) is not None
    ]
    if not pictures:
        raise DataError(
            f"none of the {len(chosen)} validation pictures in {where} can be read",
            "pictures to find static scales on",
            "add --data PICTURES, or take --int8 without --static",
        )
    return preprocess.centre(np.stack(pictures))


def _validation(run: Path, source: Source, others: bool) -> np.ndarray:
    """The items (int64) that choose in this run, or those of a folder that is not the run's."""
    try:
        split = read_split(run / "split.csv", source)
        return split.val if len(split.val) else split.train
    except (DataError, OSError):
        if not others:
            raise
    given = np.array([item.split == "val" for item in source.items])
    return np.flatnonzero(given if given.any() else ~given)


def _pixels(source: Source, item: int, preprocess: Preprocess) -> np.ndarray | None:
    try:
        return preprocess.fit_image(source.image(item, side=max(preprocess.store)))
    except UnreadableImage:
        return None


def expectation() -> list[str]:
    """What to expect of int8 on this machine, in words, where it has no integer products."""
    if processor().fast_int8:
        return []
    return [
        "this processor has no instructions for products in int8: expect a smaller file (down to a "
        "third) rather than speed (none in small networks, up to 1.5 times in ONNX Runtime, less "
        "than 1 in OpenVINO; crosspatch bench measures it)"
    ]


def quantise_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(in, out) float32 -> int8 of the same shape, and the scale (out,) float32 of each channel."""
    scale = np.abs(weight).max(axis=0).astype(np.float32) / LIMIT
    scale[scale == 0] = 1.0
    return np.rint(weight / scale).astype(np.int8), scale


def products(model: Any) -> list[Product]:
    """The products that are quantised: those that the export named after Linear layers."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        named = node.op_type in PRODUCTS and node.name.startswith(LINEAR)
        if named and node.input[1] in weights:
            weight = numpy_helper.to_array(weights[node.input[1]])
            turned = node.op_type == "Gemm" and _attribute(node, "transB", 0)
            found.append(Product(node, weight.T if turned else weight))
    return found


def activation_ranges(model: Any, images: np.ndarray) -> dict[str, Range]:
    """The range of each product's input over `images` (N, H, W, 3) uint8, by the tensor's name."""
    onnx, runtime = needed("onnx"), needed("onnxruntime")
    watched = list(dict.fromkeys(product.node.input[0] for product in products(model)))
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in watched)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    ranges = dict.fromkeys(watched, Range(0.0, 0.0))
    for start in range(0, len(images), BATCH):
        values = session.run(watched, {INPUT: images[start : start + BATCH]})
        for name, value in zip(watched, values, strict=True):
            low, high = ranges[name]
            ranges[name] = Range(min(low, float(value.min())), max(high, float(value.max())))
    return ranges


def _read(path: str | Path) -> tuple[Any, BundleInfo]:
    model = needed("onnx").load_model(path, load_external_data=False)
    texts = {entry.key: entry.value for entry in model.metadata_props}
    del model.graph.value_info[:]
    return model, BundleInfo.from_json(texts.get(KEY, ""), str(path))


def _write(
    model: Any, info: BundleInfo, path: str | Path, written: Callable[[Product], list[Any]]
) -> int:
    """Put `written` in the place of each product, drop what nothing reads, and save."""
    onnx = needed("onnx")
    found = {id(product.node): product for product in products(model)}
    if not found:
        raise DataError(
            "the bundle has no product that int8 would make smaller",
            "a network with Linear layers, exported by this version of crosspatch",
            "leave --int8 away",
        )
    nodes = [
        made
        for node in model.graph.node
        for made in (written(found[id(node)]) if id(node) in found else [node])
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.helper.set_model_props(model, {KEY: info.to_json()})
    Path(path).write_bytes(model.SerializeToString())
    return len(found)


def _dynamic_nodes(model: Any, product: Product, scaled: dict[str, list[Any]]) -> list[Any]:
    """x -> DynamicQuantizeLinear; MatMulInteger; times both scales; plus the bias of a Gemm."""
    from onnx import TensorProto

    node, prefix = product.node, product.node.name
    source, nodes = node.input[0], []
    names = [f"{source}/{part}" for part in ("int8", "scale", "zero")]
    if source not in scaled:
        scaled[source] = names
        nodes.append(_node("DynamicQuantizeLinear", [source], names))
    values, scale = quantise_weight(product.weight)
    weight = _constant(model, f"{prefix}/weight", values)
    weight_zero = _constant(model, f"{prefix}/zero", np.int8(0))
    weight_scale = _constant(model, f"{prefix}/scale", scale)
    counted, turned, both = (f"{prefix}/{part}" for part in ("sums", "float", "scales"))
    made, bias = _end(node)
    nodes += [
        _node("MatMulInteger", [names[0], weight, names[2], weight_zero], [counted]),
        _node("Cast", [counted], [turned], to=TensorProto.FLOAT),
        _node("Mul", [names[1], weight_scale], [both]),
        _node("Mul", [turned, both], [made]),
    ]
    return nodes + bias


def _static_nodes(
    model: Any, product: Product, ranges: dict[str, Range], scaled: dict[str, list[Any]]
) -> list[Any]:
    """x -> QuantizeLinear, DequantizeLinear; times the weight, dequantised too.

    So is a Gemm's bias: with one in float32, ONNX Runtime would compute that Gemm in float32.
    """
    node, prefix = product.node, product.node.name
    source, nodes = node.input[0], []
    whole, back = f"{source}/int8", f"{source}/float"
    if source not in scaled:
        found = ranges[source]
        steps = [
            _constant(model, f"{source}/scale", found.scale),
            _constant(model, f"{source}/zero", found.zero),
        ]
        scaled[source] = [back]
        nodes.append(_node("QuantizeLinear", [source, *steps], [whole]))
        nodes.append(_node("DequantizeLinear", [whole, *steps], [back]))
    values, scale = quantise_weight(product.weight)
    zeros = np.zeros(len(scale), np.int8)
    weight = _dequantised(model, f"{prefix}/weight", values, scale, zeros)
    terms, kind = [back, weight.output[0]], "MatMul"
    nodes.append(weight)
    if len(node.input) > 2:
        both = ranges[source].scale * scale
        counts = np.rint(_value(model, node.input[2]) / both)
        bias = np.clip(counts, -(2.0**31), 2.0**31 - 1).astype(np.int32)
        nodes.append(_dequantised(model, f"{prefix}/bias", bias, both, np.zeros_like(bias)))
        terms, kind = [*terms, nodes[-1].output[0]], "Gemm"
    return [*nodes, _node(kind, terms, list(node.output))]


def _dequantised(
    model: Any, name: str, values: np.ndarray, scale: np.ndarray, zeros: np.ndarray
) -> Any:
    """A node that makes floats of a constant with one scale per last axis."""
    parts = {"int": values, "scale": scale, "zero": zeros}
    inputs = [_constant(model, f"{name}/{part}", value) for part, value in parts.items()]
    return _node("DequantizeLinear", inputs, [f"{name}/float"], axis=values.ndim - 1)


def _end(node: Any) -> tuple[str, list[Any]]:
    """(what the product itself is to be called, the sum with a Gemm's bias if there is one)."""
    (output,) = node.output
    if len(node.input) < 3:
        return output, []
    product = f"{node.name}/product"
    return product, [_node("Add", [product, node.input[2]], [output])]


def _node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return needed("onnx").helper.make_node(
        kind, inputs, outputs, name=f"{kind}/{outputs[0]}", **attributes
    )


def _constant(model: Any, name: str, value: Any) -> str:
    from onnx import numpy_helper

    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def _value(model: Any, name: str) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def _attribute(node: Any, name: str, default: int) -> int:
    return next((entry.i for entry in node.attribute if entry.name == name), default)
