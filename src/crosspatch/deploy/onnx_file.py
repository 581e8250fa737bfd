# SPDX-License-Identifier: Apache-2.0
"""An ONNX file as data: what may stand in one, before any engine sees it.

A bundle is one file of plain operators on tensors that it holds itself. What is refused: weights in
other files, wherever they hang; loops, branches, functions and operators of other domains, with
which a graph can run for ever or need libraries; tensors whose size is not what their shape says;
weights that are no numbers; files that would take far more memory than their size. This module does
not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.data import jsons
from crosspatch.deploy.limits import OPERATORS, SHAPES, Refused, read_whole

LARGEST = (1 << 31) - 1  # bytes: what protobuf can read
PARTS = 500_000  # nodes, attributes, names … of which a graph consists
DEEPEST = 8
GREATEST = 1 << 27  # values of a tensor that a graph makes of constants
BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
"""ONNX's number of a tensor's type, and the bytes of a value. Texts are not among them."""
FLOATS = {1: "float32", 10: "float16", 11: "float64"}
INSIDE = {
    "model": {7: "graph", 8: "opset", 14: "entry"},
    "graph": {1: "node", 5: "tensor", 11: "value", 12: "value", 13: "value"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 10: "tensor"},
    "value": {2: "type"},
    "type": {1: "array"},
    "array": {2: "shape"},
    "shape": {1: "side"},
}
"""Of each message the fields that are messages of which the parts are counted one by one."""
TEXTS = {
    "model": {2, 3, 4, 6},
    "opset": {1},
    "entry": {1, 2},
    "graph": {2, 10},
    "node": {1, 2, 3, 4, 6, 7, 8},
    "attribute": {1, 13, 21},
    "tensor": {8, 12},
    "value": {1, 3},
    "side": {2, 3},
}
"""Of each message the fields that are texts. protobuf lets any bytes through, and engines fail."""
BULK = {("tensor", 9), ("tensor", 4), ("tensor", 5), ("tensor", 7), ("tensor", 10), ("tensor", 11)}
"""Fields that hold numbers, which take about as much memory as room in the file."""


def onnx_metadata(onnx: Any, path: Path) -> dict[str, str]:
    """The metadata of an ONNX file that may be run. onnx: the package. Raises Refused with the
    reason for any other file."""
    data = read_whole(path, LARGEST)
    _require_few(data)
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's errors have no common base
        raise Refused(f"it cannot be read as ONNX: {error}") from error
    if not model.HasField("graph"):
        raise Refused("it cannot be read as ONNX: there is no graph in it")
    for tensor in _tensors(model):
        if tensor.external_data or tensor.data_location:
            raise Refused(f"it refers to data outside of it (tensor {jsons.shown(tensor.name)})")
    _require_plain(model)
    for tensor in _tensors(model):
        _require_whole(tensor)
    _require_small(model.graph)
    found = {entry.key: entry.value for entry in model.metadata_props}
    if len(found) != len(model.metadata_props):
        raise Refused("its metadata say the same thing twice")
    return found


def _require_plain(model: Any) -> None:
    """Raises Refused for anything but plain operators of ONNX itself."""
    if model.functions or model.training_info:
        raise Refused("it brings functions of its own")
    if model.graph.sparse_initializer:
        raise Refused("it holds sparse tensors")
    for node in model.graph.node:
        name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            raise Refused(f"it asks for the operator {jsons.shown(name)}, which no bundle needs")
        for attribute in node.attribute:
            plain = not (attribute.HasField("g") or attribute.graphs or attribute.ref_attr_name)
            if not plain or attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                raise Refused(f"its operator {node.op_type} holds a graph or a sparse tensor")


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor in an ONNX model, those in sparse ones, attributes and subgraphs too."""
    functions = (node for f in model.functions for node in f.node)
    graphs, nodes = [model.graph, *_training(model)], list(functions)
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
        while nodes:
            for attribute in nodes.pop().attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                held = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
                for sparse in (*held, *attribute.sparse_tensors):
                    yield from (sparse.values, sparse.indices)
                graphs += [attribute.g] if attribute.HasField("g") else []
                graphs += attribute.graphs


def _training(model: Any) -> Iterator[Any]:
    for one in model.training_info:
        yield from (one.initialization, one.algorithm)


def _require_whole(tensor: Any) -> None:
    """Raises Refused unless a tensor holds exactly the values that its shape needs, all numbers."""
    name, kind = jsons.shown(tensor.name), tensor.data_type
    if kind not in BYTES:
        raise Refused(f"the tensor {name} has the type number {kind}")
    if any(side < 0 for side in tensor.dims) or tensor.HasField("segment"):
        raise Refused(f"the tensor {name} has an impossible shape")
    values = math.prod(tensor.dims)
    fields = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
    listed = [len(getattr(tensor, field)) for field in fields]
    if tensor.HasField("raw_data"):
        right = len(tensor.raw_data) == values * BYTES[kind] and not any(listed)
    else:
        right = sum(listed) == values
    if not right or tensor.string_data:
        raise Refused(f"the tensor {name} of {values:,} values does not hold them")
    if kind in FLOATS:
        _require_numbers(tensor, name)


def _require_numbers(tensor: Any, name: str) -> None:
    if tensor.HasField("raw_data"):
        values = np.frombuffer(tensor.raw_data, np.dtype(FLOATS[tensor.data_type]))
    else:
        values = np.array([*tensor.float_data, *tensor.double_data], np.float64)
    if np.isnan(values).any() or (values.size > 1 and not np.isfinite(values).all()):
        raise Refused(f"the tensor {name} holds values that are not finite")


def _require_small(graph: Any) -> None:
    """Raises Refused where a constant tells an operator to make a tensor beyond any use."""
    shapes = {one.name: one for one in graph.initializer if one.data_type in (6, 7)}
    for node in graph.node:
        for place in SHAPES.get(node.op_type, ()):
            named = node.input[place] if place < len(node.input) else ""
            if named in shapes and _product(shapes[named]) > GREATEST:
                raise Refused(f"its operator {node.op_type} makes a tensor of a senseless size")


def _product(shape: Any) -> int:
    if math.prod(shape.dims) > 64:
        return 0
    if shape.HasField("raw_data"):
        kind = np.int64 if shape.data_type == 7 else np.int32
        values = np.frombuffer(shape.raw_data, kind).tolist()
    else:
        values = [*shape.int64_data, *shape.int32_data]
    return math.prod(max(abs(one), 1) for one in values)


# ------------------------------------------------------------------ before it is parsed


def _require_few(data: bytes) -> None:
    """Raises Refused for a file whose parts would take far more memory than its bytes: empty nodes
    are two bytes in the file and a hundred in memory."""
    if not data or data.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        what = "is empty" if not data else "is a zip archive or a pickle"
        raise Refused(f"it cannot be read as ONNX: it {what}")
    count, waiting = 0, [("model", 0, len(data), 0)]
    while waiting:
        kind, at, end, depth = waiting.pop()
        while at < end:
            field, wire, at, length = _field(data, at, end)
            count += 1
            inner = INSIDE.get(kind, {}).get(field) if wire == 2 else None
            if wire == 2 and field in TEXTS.get(kind, ()):
                _require_text(data[at : at + length])
            elif inner is not None and depth < DEEPEST:
                waiting.append((inner, at, at + length, depth + 1))
            elif wire == 2 and (kind, field) not in BULK:
                count += length // 64
            if count > PARTS:
                raise Refused(f"it consists of more than {PARTS:,} parts")
            at += length


def _require_text(data: bytes) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("it cannot be read as ONNX: a text in it is not UTF-8") from error


def _field(data: bytes, at: int, end: int) -> tuple[int, int, int, int]:
    """(number, wire type, where the value begins, its bytes) of a field of a protobuf message."""
    tag, at = _varint(data, at, end)
    wire = tag & 7
    if wire == 0:
        length = _varint(data, at, end)[1] - at
    elif wire == 2:
        length, at = _varint(data, at, end)
    elif wire in (1, 5):
        length = 8 if wire == 1 else 4
    else:
        raise Refused("it cannot be read as ONNX: no protobuf")
    if at + length > end:
        raise Refused("it cannot be read as ONNX: it is cut short")
    return tag >> 3, wire, at, length


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise Refused("it cannot be read as ONNX: it is cut short")
