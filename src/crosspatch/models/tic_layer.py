# SPDX-License-Identifier: Apache-2.0
"""Self-attention in the window of a convolution: every pixel over its k x k neighbours.

"TiC: Exploring Vision Transformer in Convolution", arXiv 2310.04134, 2023. It stands alone, as the
authors released it: a layer that can be put where a convolution stands.

    [q, k, v] = conv1x1(x)                                                     C -> 3 C, in float32
    a_t(i) = q(i) . k(i + t) / sqrt(C / g)        t: d (row, column), -(k-1)/2 .. (k-1)/2, by head
    o(i) = sum_t softmax_t(a(i)) v(i + t) + x(i)                k = v = 0 outside of the picture
    y = ReLU(conv(o))                                           k x k, with the stride, without bias

What lies outside has the logit 0 and keeps its place in the softmax: nothing is masked. g = 1 is
the authors' layer; g = C its depth-wise form.

Taps are taken one after another: memory is k^2 logits a head, not k^2 copies of keys and values.
Beside the authors' formula (unfold, products, sums) on one CPU thread, a 56x56 map of 64 channels,
batch 2, forward and backward: kernel 3, 31 MB against 76 and 0.2 of its time; kernel 7, 38 MB
against 325 and 0.25 of its time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.layers.attention import check_heads
from crosspatch.layers.patch_embed import pair

Size = tuple[int, int]
THEIRS = {  # the authors' names of our arguments
    "input_channel": "in_chans",
    "output_channel": "out_chans",
    "dropout": "attn_drop",
    "attn_dropout": "attn_drop",
    "drop": "attn_drop",
}


class MSAConv(nn.Module):
    """The layer: a map (B, C, H, W) to (B, out_chans, H', W'), any size; parameters carry the
    authors' names, `qkv_conv` and `mlp`.

    kernel_size: odd, an int or (rows, columns), of the attention and of the convolution behind it.
    dilation: of the attention alone; stride, padding (None: half of the kernel), bias: of the
    convolution alone. heads: g; `in_chans` for the depth-wise form. Raises ValueError for even
    kernels and for heads that do not divide the width.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int | Size = 3,
        stride: int | Size = 1,
        padding: int | Size | None = None,
        dilation: int | Size = 1,
        bias: bool = False,
        qkv_bias: bool = True,
        heads: int = 1,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        check_window(in_chans, heads, pair(kernel_size))
        self.kernel, self.dilation = pair(kernel_size), pair(dilation)
        self.heads, self.attn_drop = heads, attn_drop
        rows, columns = self.kernel
        margin = (rows // 2, columns // 2) if padding is None else pair(padding)
        self.qkv_conv = nn.Conv2d(in_chans, 3 * in_chans, 1, bias=qkv_bias)
        self.mlp = nn.Conv2d(in_chans, out_chans, self.kernel, pair(stride), margin, bias=bias)

    @classmethod
    def from_authors(cls, /, **build: Any) -> MSAConv:
        """Built from the arguments of the authors' constructor, with their defaults: padding 1 for
        every kernel, dropout 0.1 while training."""
        given = {THEIRS.get(name, name): value for name, value in build.items()}
        return cls(**({"padding": 1, "attn_drop": 0.1} | given))

    def attend(self, x: Tensor) -> Tensor:
        """o of a map (B, C, H, W), of the same shape: what the convolution reads."""
        qkv = self.qkv_conv(x)
        qkv = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).permute(0, 2, 3, 1)
        q, k, v = qkv.chunk(3, dim=-1)
        drop = self.attn_drop if self.training else 0.0
        taps = (self.kernel, self.dilation, self.heads)
        y = neighbourhood_attention(q[:, :, :, None], k, v, *taps, dropout=drop)
        return y[:, :, :, 0].permute(0, 3, 1, 2).to(x.dtype) + x

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.mlp(self.attend(x)))

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, dilation={self.dilation}, heads={self.heads}"


def check_window(dim: int, heads: int, kernel: Size) -> None:
    """Raises ValueError for an even kernel and for heads that do not divide the width."""
    if any(side < 1 or side % 2 == 0 for side in kernel):
        raise ValueError(f"kernel_size {kernel}; expected odd sides, which have a middle")
    check_heads(dim, heads)


def neighbours(x: Tensor, kernel: Size, dilation: Size) -> Iterator[Tensor]:
    """A map (B, H, W, C) seen from every tap, row by row, zeros outside: views of (B, H, W, C)."""
    (rows, columns), (down, right) = kernel, dilation
    margin = down * (rows - 1) // 2, right * (columns - 1) // 2
    height, width = x.shape[1], x.shape[2]
    x = F.pad(x, (0, 0, margin[1], margin[1], margin[0], margin[0]))
    for row, column in itertools.product(range(rows), range(columns)):
        top, left = row * down, column * right
        yield x[:, top : top + height, left : left + width]


def neighbourhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Size,
    dilation: Size = (1, 1),
    heads: int = 1,
    dropout: float = 0.0,
) -> Tensor:
    """Queries (B, H, W, n, C), n a pixel, over the taps of keys and values (B, H, W, C).

    Returns (B, H, W, n, C). It costs 2 n H W C multiply-adds a tap, which counters of matrix
    products do not see.
    """
    q = q.unflatten(-1, (heads, -1))
    q = q * q.shape[-1] ** -0.5
    logits = []
    # one tap at a time: the backward pass then frees the gradient of one before it makes the next
    for key in neighbours(k, kernel, dilation):
        logits.append((q * key.unflatten(-1, (1, heads, -1))).sum(dim=-1))
    p = torch.stack(logits).softmax(dim=0)
    p = F.dropout(p, dropout)[..., None] if dropout else p[..., None]
    y = torch.zeros_like(q)
    for weight, value in zip(p, neighbours(v, kernel, dilation), strict=True):
        y = y + weight * value.unflatten(-1, (1, heads, -1))
    return y.flatten(-2)
