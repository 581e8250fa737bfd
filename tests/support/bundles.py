"""A bundle of a few nodes, written without torch: a linear classifier of the mean colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.bundle import INPUT, KEY, OUTPUT, BundleInfo, check_pictures

CLASSES = ("red", "green", "blue")


def colours(images: np.ndarray, sharpness: float = 20.0) -> np.ndarray:
    """What the graph computes: uint8 (B, H, W, 3) -> probabilities (B, 3)."""
    logits = images.astype(np.float32).mean(axis=(1, 2)) / 255 * sharpness
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def info(size: tuple[int, int] = (24, 32), **given) -> BundleInfo:
    """A description that fits the graph of `write_bundle`."""
    usual = {
        "classes": CLASSES,
        "preprocess": Preprocess(size, size),
        "architecture": "mean_colour",
        "parameters": 9,
        "macs": 9,
        "weights": "0" * 64,
        "check": tuple(tuple(row) for row in colours(check_pictures(size)).round(7).tolist()),
    }
    return BundleInfo(**(usual | given))


def write_bundle(
    path: Path,
    described: BundleInfo | None = None,
    *,
    scale: float = 1.0,
    batch: int | str = "batch",
    dtype: int = TensorProto.UINT8,
    names: tuple[str, str] = (INPUT, OUTPUT),
    size: tuple[int, int] | None = None,
) -> Path:
    """Writes the graph with its description. scale: a factor on the logits; 3e38 makes them
    infinite, so that the answers are NaN."""
    described = described or info()
    height, width = size or described.preprocess.size
    weights = np.eye(3, dtype=np.float32) * (20.0 / 255) * scale
    nodes = [
        helper.make_node("Cast", [names[0]], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["logits"]),
        helper.make_node("Softmax", ["logits"], [names[1]], axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "mean_colour",
        [helper.make_tensor_value_info(names[0], dtype, [batch, height, width, 3])],
        [helper.make_tensor_value_info(names[1], TensorProto.FLOAT, [batch, 3])],
        [
            numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    opsets = [helper.make_opsetid("", 18)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    helper.set_model_props(model, {KEY: described.to_json()})
    path.write_bytes(model.SerializeToString())
    return path


def write_openvino(path: Path, onnx: Path, described: BundleInfo | None = None) -> Path:
    """The same bundle as the pair of files that OpenVINO writes."""
    import openvino

    model = openvino.convert_model(onnx)
    model.set_rt_info((described or info()).to_json(), [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)
    return path
