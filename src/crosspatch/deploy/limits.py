# SPDX-License-Identifier: Apache-2.0
"""What a model file may ask an engine to compute: plain operators on tensors, by name.

The lists hold what the exports of all our networks consist of, and the further plain operators of
networks of timm. No loop, no branch, nothing random, nothing about texts, files or pictures, and
nothing of another domain stands in them: such a graph ends, and needs no library.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path

OPERATORS = frozenset(
    re.findall(
        r"\w+",
        """
    Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Celu Clip Concat Constant
    ConstantOfShape Conv ConvInteger ConvTranspose Cos CumSum DepthToSpace DequantizeLinear Div
    DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand Flatten Floor Gather GatherElements
    GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization
    HardSigmoid HardSwish Identity InstanceNormalization LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax MatMul MatMulInteger Max MaxPool Mean Min Mish Mod Mul Neg Not OneHot
    Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear Range Reciprocal ReduceL1 ReduceL2
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
    Resize Round ScatterElements ScatterND Selu Shape Sigmoid Sign Sin Slice Softmax Softplus
    Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tanh Tile TopK Transpose Trilu Unsqueeze
    Where Xor
    """,
    )
)
"""Operators of ONNX's own domain."""
SHAPES = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Reshape": (1,),
    "Tile": (1,),
    "Pad": (1,),
    "OneHot": (1,),
    "Range": (1,),
    "Resize": (3,),
}
"""Which inputs of an operator say how large its output becomes."""
LAYERS = frozenset(
    re.findall(
        r"\w+",
        """
    Abs AdaptiveAvgPool AdaptiveMaxPool Add AvgPool BatchNormInference Broadcast Bucketize Ceiling
    Clamp Concat Const Convert ConvertLike Convolution ConvolutionBackpropData Cos CumSum
    DepthToSpace Divide Einsum Elu Equal Erf Exp Eye FakeConvert FakeQuantize Floor FloorMod Gather
    GatherElements GatherND Gelu Greater GreaterEqual GroupConvolution GroupConvolutionBackpropData
    GroupNormalization HSigmoid HSwish HardSigmoid Interpolate LRN Less LessEqual Log LogSoftmax
    LogicalAnd LogicalNot LogicalOr LogicalXor MVN MatMul MaxPool Maximum Minimum Mish Mod Multiply
    Negative NormalizeL2 NotEqual OneHot PReLU Pad Parameter Power Range ReLU ReduceL1 ReduceL2
    ReduceLogicalAnd ReduceLogicalOr ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Reshape
    Result Roll Round ScaledDotProductAttention ScatterElementsUpdate ScatterNDUpdate ScatterUpdate
    Select Selu ShapeOf ShuffleChannels Sigmoid Sign Sin Slice SoftMax SoftPlus SoftSign Softmax
    SpaceToDepth Split Sqrt SquaredDifference Squeeze StridedSlice Subtract Swish Tanh Tile TopK
    Transpose Unsqueeze VariadicSplit
    """,
    )
)
"""Types of layers of OpenVINO's own operation sets."""


class Refused(ValueError):
    """A model file that is not run, and why: `it …`."""


def read_whole(path: Path, limit: int) -> bytes:
    """A regular file of at most `limit` bytes. Raises Refused for any other."""
    try:
        status = path.stat()  # before it is opened: a pipe would wait for its other end
        if not stat.S_ISREG(status.st_mode):
            raise Refused("it is no regular file")
        if status.st_size > limit:
            raise Refused(f"it is larger than {limit / 1e6:,.0f} MB")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise Refused(f"it cannot be read: {(error.strerror or str(error)).lower()}") from error
    if len(data) > limit:
        raise Refused(f"it is larger than {limit / 1e6:,.0f} MB")
    return data
