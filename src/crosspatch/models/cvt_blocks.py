# SPDX-License-Identifier: Apache-2.0
"""The parts of CvT (see `cvt.py`): embeddings, attention and stages of tokens that have a map."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import crosspatch._torchvision  # noqa: F401

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNormFp32, QuickGELU
from torch import Tensor, nn

from crosspatch.layers.attention import check_heads, join_heads
from crosspatch.layers.first_weights import drawn
from crosspatch.layers.linear import Linear
from crosspatch.layers.mlp import Mlp
from crosspatch.layers.position import resize_table
from crosspatch.models.pyramid import run

Size = tuple[int, int]
METHODS = ("dw_bn", "avg", "linear")


class Tokens(NamedTuple):
    """x: (B, prefix + H * W, C), the class token (if any) before the patches of a map of `size`."""

    x: Tensor
    size: Size
    prefix: int


class ConvEmbed(nn.Module):
    """Convolutional token embedding: (B, C_in, H, W) to a normalised map (B, h, w, C)."""

    def __init__(
        self, in_chans: int, dim: int, kernel: int, stride: int, padding: int, eps: float
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)
        self.norm = LayerNormFp32(dim, eps=eps)
        self.least = kernel - 2 * padding

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.least:
            raise ValueError(
                f"a map of {x.shape[2]}x{x.shape[3]}; this convolution takes {self.least} pixels "
                "a side or more"
            )
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvAttention(nn.Module):
    """Attention whose queries, keys and values come from convolutions of the map.

    method: "dw_bn", a depthwise convolution and batch norm for each of the three; "avg", average
    pooling for keys and values (the last window may overhang); "linear", none. The class token is
    not convolved. The logits are divided by the root of `dim`, not of a head's width.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        method: str,
        kernel: int,
        padding_q: int,
        padding_kv: int,
        stride_q: int,
        stride_kv: int,
        qkv_bias: bool,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        super().__init__()
        _check_attention(dim, heads, method, kernel, padding_q, stride_q)
        self.num_heads, self.scale, self.attn_drop = heads, dim**-0.5, attn_drop
        queries = "linear" if method == "avg" else method
        self.conv_proj_q = _projection(dim, queries, kernel, stride_q, padding_q)
        self.conv_proj_k = _projection(dim, method, kernel, stride_kv, padding_kv)
        self.conv_proj_v = _projection(dim, method, kernel, stride_kv, padding_kv)
        self.proj_q = Linear(dim, dim, bias=qkv_bias)
        self.proj_k = Linear(dim, dim, bias=qkv_bias)
        self.proj_v = Linear(dim, dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: Size, prefix: int) -> Tensor:
        """x: (B, prefix + H * W, C) of a map of `size`. Returns the same shape."""
        first, grid = x[:, :prefix], x[:, prefix:].unflatten(1, size).permute(0, 3, 1, 2)
        q = self._heads(self.proj_q, first, self.conv_proj_q(grid))
        k = self._heads(self.proj_k, first, self.conv_proj_k(grid))
        v = self._heads(self.proj_v, first, self.conv_proj_v(grid))
        drop = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
        return self.proj_drop(self.proj(join_heads(y)))

    def _heads(self, proj: nn.Module, first: Tensor, grid: Tensor) -> Tensor:
        """first: (B, prefix, C), grid: (B, C, h, w). Returns (B, heads, tokens, C / heads)."""
        tokens = torch.cat([first.to(grid.dtype), grid.flatten(2).transpose(1, 2)], dim=1)
        return proj(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _check_attention(dim, heads, method, kernel, padding_q, stride_q) -> None:
    check_heads(dim, heads)
    if method not in METHODS:
        raise ValueError(f"qkv_proj_method {method!r}; expected one of {', '.join(METHODS)}")
    if method == "dw_bn" and (stride_q != 1 or 2 * padding_q != kernel - 1):
        raise ValueError(
            f"queries of kernel {kernel}, stride {stride_q} and padding {padding_q}; expected "
            "stride 1 and a padding that keeps the size of the map, which they are added to"
        )


def _projection(dim: int, method: str, kernel: int, stride: int, padding: int) -> nn.Module:
    if method == "linear":
        return nn.Identity()
    if method == "avg":
        return nn.AvgPool2d(kernel, stride, padding, ceil_mode=True)
    conv = nn.Conv2d(dim, dim, kernel, stride, padding, groups=dim, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(dim)))


class Block(nn.Module):
    """Convolutional attention and MLP, each added behind a norm of its own."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        drop_path: float,
        proj_drop: float,
        eps: float,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNormFp32(dim, eps=eps)
        self.attn = ConvAttention(dim, heads, proj_drop=proj_drop, **attention)
        self.norm2 = LayerNormFp32(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act=QuickGELU, drop=proj_drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, state: Tokens) -> Tokens:
        x, size, prefix = state
        x = x + self.drop_path(self.attn(self.norm1(x), size, prefix))
        return Tokens(x + self.drop_path(self.mlp(self.norm2(x))), size, prefix)


class ConvStage(nn.Module):
    """Embedding (None in the first stage: the stem is it), class token, table, blocks.

    size: (H, W) of the table of positions, None for no table.
    """

    cls_token: nn.Parameter | None
    pos_embed: nn.Parameter | None

    def __init__(
        self,
        downsample: ConvEmbed | None,
        dim: int,
        blocks: Sequence[Block],
        cls_token: bool,
        size: Size | None,
        drop: float,
    ) -> None:
        super().__init__()
        self.downsample = nn.Identity() if downsample is None else downsample
        self.cls_token = drawn(1, 1, dim) if cls_token else None
        self.pos_embed = drawn(1, size[0] * size[1], dim) if size is not None else None
        self.size, self.drop = size, nn.Dropout(drop)
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor | Tokens) -> Tokens:
        """A map (B, h, w, C) of the stem, or what the stage before gives."""
        if isinstance(x, Tokens):
            x = self.downsample(patches(x).permute(0, 3, 1, 2))
        size = (x.shape[1], x.shape[2])
        x = x.flatten(1, 2)
        if self.pos_embed is not None:
            x = x + resize_table(self.pos_embed, self.size or size, size, 0)
        if self.cls_token is not None:
            first = self.cls_token.expand(x.shape[0], -1, -1)
            x = torch.cat([first.to(x.dtype), x], dim=1)
        state = Tokens(self.drop(x), size, int(self.cls_token is not None))
        for block in self.blocks:
            state = run(block, state, self)
        return state


def patches(state: Tokens) -> Tensor:
    """The map (B, H, W, C) of patches, without the class token."""
    return state.x[:, state.prefix :].unflatten(1, state.size)
