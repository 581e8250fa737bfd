# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention over all tokens, with what a reducer may ask of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.layers.linear import Linear, linear
from crosspatch.layers.reducer import AttentionStats

Norm = Callable[[int], nn.Module]


def check_heads(dim: int, heads: int) -> None:
    """Raises ValueError where the width does not divide by the heads."""
    if heads < 1 or dim % heads:
        raise ValueError(f"a width of {dim} must divide by {heads} heads")


def join_heads(y: Tensor) -> Tensor:
    """What the heads of an attention give, (..., heads, N, d), side by side: (..., N, heads * d).

    Kernels differ in how their output lies: an exported graph must not depend on which one ran.
    """
    return y.transpose(-3, -2).clone(memory_format=torch.contiguous_format).flatten(-2)


class Attention(nn.Module):
    """Multi-head self-attention with free query-key and value widths (DeiT's where they equal
    `dim`).

    heads, qk, value: number of heads and the TOTAL widths of queries (= keys) and of values.
    shares: this layer has values only and is given another layer's map.
    Parameters carry timm's names: `qkv` (rows: queries, keys, values), `q_norm`, `k_norm`, `proj`.
    gridded: whether `forward` asks where the patches lie, in subclasses that look at neighbours.
    Raises ValueError where a width is not divisible by the heads.
    """

    gridded = False

    def __init__(
        self,
        dim: int,
        heads: int,
        qk: int | None = None,
        value: int | None = None,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: Norm | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        shares: bool = False,
    ) -> None:
        super().__init__()
        qk, value = dim if qk is None else qk, dim if value is None else value
        if qk % heads or value % heads:
            raise ValueError(
                f"widths {qk} (query-key) and {value} (value) must divide by {heads} heads"
            )
        self.num_heads = heads
        self.qk_width = 0 if shares else qk
        self.value_width = value
        self.scale = (qk // heads) ** -0.5 if self.qk_width else 1.0
        self.attn_drop = attn_drop
        self.qkv = Linear(dim, 2 * self.qk_width + value, bias=qkv_bias)
        make = nn.Identity if qk_norm is None or shares else partial(qk_norm, qk // heads)
        self.q_norm, self.k_norm = make(), make()
        self.proj = Linear(value, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        rows: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """x: (B, N, C), bias: (B, N) on the keys or None. Returns (B, N, C), or (B, rows, C): what
        only the first `rows` tokens gather. grid: rows and columns of the patches, the last tokens
        of x, where it is `gridded`."""
        if rows is not None:
            return self.over(x[:, :rows], x, bias)
        return self.merge_heads(self._fused(*self.project(x), bias))

    def over(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """Output (B, M, C): what the tokens x (B, M, C) gather from context (B, N, C); bias: (B, N)
        on its keys or None."""
        return self.merge_heads(
            self._fused(self._queries(x), *self._keys_and_values(context), bias)
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (B, H, N, qk/H) and values (B, H, N, value/H) of x (B, N, C)."""
        q, k, v = self.qkv(x).split([self.qk_width, self.qk_width, self.value_width], dim=-1)
        return self.q_norm(self._heads(q)), self.k_norm(self._heads(k)), self._heads(v)

    def qk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, H, N, qk/H) alone."""
        rows = 2 * self.qk_width
        b = self.qkv.bias[:rows] if self.qkv.bias is not None else None
        q, k = linear(x, self.qkv.weight[:rows], b).chunk(2, dim=-1)
        return self.q_norm(self._heads(q)), self.k_norm(self._heads(k))

    def values(self, x: Tensor) -> Tensor:
        """Values (B, H, N, value/H) alone."""
        rows = 2 * self.qk_width
        b = self.qkv.bias[rows:] if self.qkv.bias is not None else None
        return self._heads(linear(x, self.qkv.weight[rows:], b))

    def _queries(self, x: Tensor) -> Tensor:
        b = self.qkv.bias[: self.qk_width] if self.qkv.bias is not None else None
        return self.q_norm(self._heads(linear(x, self.qkv.weight[: self.qk_width], b)))

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b = self.qkv.bias[self.qk_width :] if self.qkv.bias is not None else None
        both = linear(x, self.qkv.weight[self.qk_width :], b)
        k, v = both.split([self.qk_width, self.value_width], dim=-1)
        return self.k_norm(self._heads(k)), self._heads(v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output (B, N, C) of given queries (B, H, N, d) over keys and values (B, H, Nk, d), by the
        fused kernel."""
        return self.merge_heads(self._fused(q, k, v, None))

    def map(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        """The attention map (B, H, Nq, Nk) that the fused kernel never shows."""
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias[:, None, None, :].to(logits.dtype)
        return logits.softmax(dim=-1)

    def class_row(self, q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, H, N): the first row of the map, 1/N of its cost, beside the fused kernel."""
        return self.map(q[:, :, :1], k, bias)[:, :, 0]

    def apply_map(self, attention: Tensor, v: Tensor) -> Tensor:
        """Output (B, N, C) of a map (B, H, N, Nk) on values (B, H, Nk, value/H)."""
        return self.merge_heads(self.drop(attention) @ v)

    def drop(self, attention: Tensor) -> Tensor:
        """A map (B, H, N, Nk) after the attention's dropout."""
        return F.dropout(attention, self.attn_drop, self.training)

    def inspected(
        self, x: Tensor, bias: Tensor | None, needs: frozenset[str]
    ) -> tuple[Tensor, AttentionStats]:
        """`forward` together with what `needs` names of keys, class row and map; the fused kernel
        stays, and the map beside it has no gradient."""
        q, k, v = self.project(x)
        keys = k if "keys" in needs else None
        row = self.class_row(q, k, bias) if "class_row" in needs else None
        full = None
        if "map" in needs:
            with torch.no_grad():
                full = self.map(q, k, bias)
        return self.merge_heads(self._fused(q, k, v, bias)), AttentionStats(keys, row, full)

    def with_class_row(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        rows: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and beside its fused kernel the attention of the first token (B, N): the mean
        over the heads, before dropout, without a gradient."""
        if rows is None:
            q, k, v = self.project(x)
        else:
            q, (k, v) = self._queries(x[:, :rows]), self._keys_and_values(x)
        return self.merge_heads(self._fused(q, k, v, bias)), self._mean_row(q, k, bias)

    @torch.no_grad()
    def _mean_row(self, q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
        return self.class_row(q, k, bias).float().mean(dim=1)

    def keep_values(self) -> None:
        """Gives up queries and keys for good: from now on this layer is given another one's
        map."""
        rows, self.qk_width = 2 * self.qk_width, 0
        self.qkv.out_features = self.value_width
        for name in ("weight", "bias"):
            whole = getattr(self.qkv, name)
            if whole is not None:
                kept = nn.Parameter(whole.detach()[rows:].clone(), whole.requires_grad)
                setattr(self.qkv, name, kept)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def merge_heads(self, x: Tensor) -> Tensor:
        """(B, H, N, d) to the projected output (B, N, C)."""
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        mask = bias[:, None, None, :].to(q.dtype) if bias is not None else None
        p = self.attn_drop if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, scale=self.scale)
