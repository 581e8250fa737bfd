# SPDX-License-Identifier: Apache-2.0
"""The network with everything around it as one graph: uint8 pixels in, probabilities out.

`Shipped` is what is exported: normalisation, network, temperature and softmax or sigmoid. `to_onnx`
writes it with torch's own exporter and cleans the result: every product by the weight of a Linear
is named after the module it comes from, and nothing tells of the machine that wrote the file.
"""

from __future__ import annotations

import ast
import copy
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.bundle import INPUT, OUTPUT, PATCHES, needed
from crosspatch.deploy.quantise import HEAD, LINEAR, PRODUCTS
from crosspatch.tasks import activate

OPSET = 18
GREATEST_BATCH = 1 << 16


class Shipped(nn.Module):
    """A network as it is shipped: (B, H, W, 3) uint8 -> probabilities (B, K) float32.

    module: normalised (B, 3, H, W) -> logits (B, K). Normalises as `data.augment.normalise` does,
    divides the logits by `temperature`, and takes the softmax, or the sigmoids where `task` is
    multilabel. H and W are `preprocess.size`.
    """

    explains = False
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        preprocess: Preprocess,
        temperature: float = 1.0,
        task: str = "classify",
    ) -> None:
        super().__init__()
        self.module = module
        self.size = preprocess.size
        self.temperature = temperature
        self.task = task
        for name in ("mean", "std"):
            values = 255 * torch.tensor(getattr(preprocess, name))[:, None, None]
            self.register_buffer(name, values, persistent=False)

    def forward(self, image: Tensor) -> Any:
        return self.probabilities(image)

    def probabilities(self, image: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> probabilities (B, K)."""
        return self.answer(self.normalised(image))

    def normalised(self, image: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 -> (B, 3, H, W) float32."""
        return (image.permute(0, 3, 1, 2).float() - self.mean) / self.std

    def answer(self, inputs: Tensor) -> Tensor:
        """What `normalised` gives -> probabilities (B, K)."""
        logits = self.module(inputs)
        return activate(logits.float() / self.temperature, self.task)

    def folded(self) -> Shipped:
        """The same with the network's form for inference, where it has one (`for_inference`: norms
        and scales within the weights)."""
        fold = getattr(self.module, "for_inference", None)
        if fold is None:
            return self
        made = copy.copy(self)
        made._modules = {**self._modules, "module": fold().eval()}
        return made


def trace(shipped: Shipped) -> torch.export.ExportedProgram:
    """The graph that torch.export makes of its folded form, for any batch from 1 on.

    Traced with two pictures: of one, torch would make a constant.
    """
    example = torch.zeros(2, *shipped.size, 3, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=GREATEST_BATCH)
    with _quiet(), torch.no_grad():
        return torch.export.export(shipped.folded(), (example,), dynamic_shapes=({0: batch},))


def to_onnx(program: torch.export.ExportedProgram) -> Any:
    """An `onnx.ModelProto` of what `trace` gave, clean and without metadata of ours.

    Products by the weight of a Linear are called `linear/<module>`, those that classify
    `head/<module>`. Raises UsageError where onnx or onnxscript is not installed, and whatever
    torch's exporter raises for a graph that it cannot write.
    """
    needed("onnx")
    needed("onnxscript")
    outputs = len(program.graph_signature.user_outputs)
    with _quiet():
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT, PATCHES][:outputs],
            external_data=False,
            verbose=False,
            custom_translation_table=_translations(),
        )
    model: Any = made and made.model_proto
    if outputs > 1:
        _merge_same(model.graph)
    _name_products(model.graph)
    _strip(model)
    return model


def _translations() -> dict[Any, Any]:
    """Attention and GELU in the shapes that ONNX Runtime and OpenVINO fuse, with fewer nodes.

    torch's own translations compute the key's shape at every call and order the products of GELU so
    that no engine knows it: 4 % slower on a crossvit_tiny_224 in ONNX Runtime.
    """
    aten = torch.ops.aten
    return {
        aten.scaled_dot_product_attention.default: _attention,
        aten.gelu.default: _gelu,
    }


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """Softmax(scale * query key^T + attn_mask) value, all of them (B, heads, N, d)."""
    op = needed("onnxscript").opset18

    if is_causal or enable_gqa or dropout_p:
        raise ValueError("attention with a causal mask, dropout or shared heads")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
    logits = op.Mul(logits, op.Constant(value_float=scale))
    if attn_mask is not None:
        logits = op.Add(logits, attn_mask)
    return op.MatMul(op.Softmax(logits, axis=-1), value)


def _gelu(x, approximate="none"):
    """(x / 2) (1 + erf(x / sqrt 2)), or with the tanh of a polynomial for erf."""
    op = needed("onnxscript").opset18

    def number(value):
        return op.Constant(value_float=value)

    half = op.Mul(x, number(0.5))
    if approximate == "none":
        bend = op.Erf(op.Div(x, number(math.sqrt(2))))
    else:
        cube = op.Mul(op.Mul(x, op.Mul(x, x)), number(0.044715))
        bend = op.Tanh(op.Mul(op.Add(x, cube), number(math.sqrt(2 / math.pi))))
    return op.Mul(half, op.Add(bend, number(1.0)))


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's advice to programmers is not the user's: nothing here can be changed by it."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.")
            yield
    finally:
        logger.setLevel(level)


def _merge_same(graph: Any) -> None:
    """Nodes that compute what an earlier one does give way to it: the scores of patches ask for
    much that the answer has needed already."""
    renamed: dict[str, str] = {}
    known: dict[Any, Any] = {}
    kept, last = [], {output.name for output in graph.output}
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
        settings = sorted(one.SerializeToString() for one in node.attribute)
        key = (node.domain, node.op_type, *node.input, None, *settings, len(node.output))
        first = known.setdefault(key, node)
        if first is node or last & set(node.output):
            kept.append(node)
        else:
            renamed |= dict(zip(node.output, first.output, strict=True))
    del graph.node[:]
    graph.node.extend(kept)


def _name_products(graph: Any) -> None:
    """Name products by weights after their modules, while the exporter's notes still stand."""
    products = {}
    for node in graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        kinds = ast.literal_eval(notes.get("pkg.torch.onnx.class_hierarchy", "[]"))
        if node.op_type in PRODUCTS and kinds and kinds[-1] == "aten.linear.default":
            scopes = ast.literal_eval(notes["pkg.torch.onnx.name_scopes"])
            products[id(node)] = (node, scopes[-2].removeprefix("module."))
    heads = _last_products(graph, set(products))
    taken: dict[str, int] = {}
    for key, (node, scope) in products.items():
        name = (HEAD if key in heads else LINEAR) + scope
        taken[name] = taken.get(name, 0) + 1
        node.name = name if taken[name] == 1 else f"{name}#{taken[name]}"


def _last_products(graph: Any, products: set[int]) -> set[int]:
    """Of the given nodes those from which the answer is reached without passing another."""
    makers = {name: node for node in graph.node for name in node.output}
    found, seen, waiting = set(), set(), [graph.output[0].name]
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if id(node) in products:
            found.add(id(node))
        else:
            waiting += node.input
    return found


def _strip(model: Any) -> None:
    """Drop notes, stored shapes and paths of the exporter; name the batch."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
