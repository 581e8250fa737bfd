# SPDX-License-Identifier: Apache-2.0
"""The attention of MedViTV2 (arXiv 2502.13693): every token of a map over the k x k around it.

"Neighborhood Attention Transformer", Hassani, Walton, Li, Li, Shi, arXiv 2204.07143, CVPR 2023;
with gaps, "Dilated Neighborhood Attention Transformer", Hassani, Shi, arXiv 2209.15001.

    out(i) = sum over j in N(i) of softmax_j(q(i) k(j) / sqrt d + rpb[j - i]) v(j)

N(i) is the window of k x k tokens around i; at a border it is moved inwards, so that every token
sees as many. With dilation D only tokens whose row and column equal those of i modulo D exist for
i, and j - i counts in steps of D. An axis with fewer than k such tokens has a window of them all.

Neighbours are not gathered for every query: the map is cut into tiles of t x t queries with one
region of (t + k - 1)^2 keys each, in which whatever is no neighbour is hidden. With k = 7 a tile of
2 copies every key 16 times instead of 49, for a third more products of queries and keys; one of 4
copies it 6 times, for twice the products, and is faster on a CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.layers.attention import check_heads
from crosspatch.layers.first_weights import drawn
from crosspatch.layers.linear import Linear
from crosspatch.layers.windows import Size

TILE = 2
NOWHERE = -1  # in `Axis.offsets`: a key that is no neighbour of the query


class Axis(NamedTuple):
    """One axis of a map, cut into tiles of `side` queries with `span` keys each.

    queries, keys: positions on the axis, tile by tile; where a tile is not full its last position
    is repeated. back: where the query of every position stands. offsets: different tiles (side,
    span), the row of a bias table for every key; which: which of them every tile is.
    """

    side: int
    span: int
    queries: list[int]
    keys: list[int]
    back: list[int]
    offsets: list[list[list[int]]]
    which: list[int]


def neighbours(place: int, length: int, kernel: int) -> range:
    """The window of a place on an axis: around it, moved inwards at the ends, never longer than the
    axis."""
    kernel = min(kernel, length)
    first = min(max(place - kernel // 2, 0), length - kernel)
    return range(first, first + kernel)


def cut(length: int, kernel: int, dilation: int = 1, tile: int = TILE) -> Axis:
    """An axis of `length` in tiles of `tile` or fewer, every one within its residue class."""
    side = min(tile, -(-length // dilation))
    tiles = []
    for residue in range(min(dilation, length)):
        count = len(range(residue, length, dilation))
        tiles += [(residue, count, first) for first in range(0, count, side)]
    span = max(len(_region(count, first, side, kernel)) for _, count, first in tiles)
    axis = Axis(side, span, [], [], [0] * length, [], [])
    for residue, count, first in tiles:
        region = _region(count, first, side, kernel)
        places = [min(first + i, count - 1) for i in range(side)]
        seen = [min(region.start + i, count - 1) for i in range(span)]
        rows = []
        for place in places:
            window = neighbours(place, count, kernel)
            rows.append(
                [
                    key - place + kernel - 1 if key in window and i < len(region) else NOWHERE
                    for i, key in enumerate(seen)
                ]
            )
        for i in range(min(side, count - first)):
            axis.back[residue + dilation * (first + i)] = len(axis.queries) + i
        axis.queries.extend(residue + dilation * place for place in places)
        axis.keys.extend(residue + dilation * key for key in seen)
        if rows not in axis.offsets:
            axis.offsets.append(rows)
        axis.which.append(axis.offsets.index(rows))
    return axis


def _region(count: int, first: int, side: int, kernel: int) -> range:
    """What any query of a tile sees."""
    last = min(first + side, count) - 1
    return range(neighbours(first, count, kernel).start, neighbours(last, count, kernel).stop)


class Plan(NamedTuple):
    """A map of one size in tiles, as tensors.

    queries, keys: tokens of the map, tile by tile; back: where the query of every token stands.
    which: which of `index` every tile is. index: (different tiles, queries, keys), rows of the
    flattened bias table; hidden: likewise, True for what is no neighbour.
    """

    queries: Tensor
    keys: Tensor
    back: Tensor
    which: Tensor
    index: Tensor
    hidden: Tensor


def plan(size: Size, kernel: int, dilation: int, tile: int, device=None) -> Plan:
    """The tiles of a map of `size`, row by row."""
    down, right = (cut(length, kernel, dilation, tile) for length in size)

    def tokens(rows: list[int], columns: list[int], width: int, sides: Size) -> Tensor:
        """Places on both axes to places on the map, in tiles of `sides`."""
        tall = torch.tensor(rows, device=device).view(-1, 1, sides[0], 1)
        wide = torch.tensor(columns, device=device).view(1, -1, 1, sides[1])
        return (tall * width + wide).flatten()

    sides, spans = (down.side, right.side), (down.span, right.span)
    queries = tokens(down.queries, right.queries, size[1], sides)
    keys = tokens(down.keys, right.keys, size[1], spans)
    tall, wide = (torch.tensor(axis.back, device=device) for axis in (down, right))
    # query (i, j) of tile (r, c) stands at ((r * columns + c) * side + i) * side + j
    tile_of = (tall // sides[0])[:, None] * len(right.which) + wide // sides[1]
    back = (tile_of * sides[0] + (tall % sides[0])[:, None]) * sides[1] + wide % sides[1]
    which = tokens(down.which, right.which, len(right.offsets), (1, 1))
    tall, wide = (torch.tensor(axis.offsets, device=device) for axis in (down, right))
    tall, wide = tall[:, None, :, None, :, None], wide[None, :, None, :, None, :]
    hidden = ((tall == NOWHERE) | (wide == NOWHERE)).flatten(4).flatten(2, 3).flatten(0, 1)
    index = (tall * (2 * kernel - 1) + wide).flatten(4).flatten(2, 3).flatten(0, 1)
    return Plan(queries, keys, back.flatten(), which, index.masked_fill(hidden, 0), hidden)


class NeighbourhoodAttention(nn.Module):
    """Multi-head self-attention of a map (B, H, W, C), of any size, over neighbourhoods.

    kernel_size: k, odd. dilation: D. size: (H, W) of the maps to come, whose tiles are then
    constants of the module (not in the state dict); other maps are cut on the way. tile: t.
    Parameters: `qkv`, `proj` and `rpb`, the table (heads, 2k - 1, 2k - 1) of offsets.
    Raises ValueError for an even kernel, a dilation below 1, and a width that heads do not divide.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        *,
        size: Size | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        tile: int = TILE,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0 or dilation < 1:
            raise ValueError(
                f"kernel_size {kernel_size} with dilation {dilation}; expected an odd kernel and a "
                "dilation of 1 or more"
            )
        check_heads(dim, heads)
        self.num_heads, self.attn_drop, self.tile = heads, attn_drop, tile
        self.kernel_size, self.dilation, self.size = kernel_size, dilation, size
        made = (None,) * len(Plan._fields) if size is None else self._plan(size)
        for name, value in zip(Plan._fields, made, strict=True):
            self.register_buffer(name, value, persistent=False)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = drawn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _plan(self, size: Size, device: torch.device | None = None) -> Plan:
        return plan(size, self.kernel_size, self.dilation, self.tile, device)

    def bias(self, plan: Plan) -> Tensor:
        """(heads, tiles, queries, keys): the table's entries, minus infinity where there is no
        neighbour."""
        rows = self.rpb.flatten(1)[:, plan.index.flatten()].unflatten(1, plan.index.shape)
        return rows.masked_fill(plan.hidden, float("-inf")).index_select(1, plan.which)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C). Returns the same shape."""
        size = (x.shape[1], x.shape[2])
        if size == self.size:
            made = Plan(*(getattr(self, name) for name in Plan._fields))
        else:
            made = self._plan(size, x.device)
        tiles, (_, side, span) = made.which.shape[0], made.index.shape
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        q = q.transpose(1, 2).index_select(2, made.queries).unflatten(2, (tiles, side))
        k, v = (
            one.transpose(1, 2).index_select(2, made.keys).unflatten(2, (tiles, span))
            for one in (k, v)
        )
        # plain products: the fused kernel spends its time on entering so many small ones
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(3, 4) + self.bias(made).to(q.dtype)
        attention = F.dropout(logits.softmax(dim=-1), self.attn_drop, self.training)
        y = (attention @ v).flatten(2, 3).index_select(2, made.back)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2).unflatten(1, size)))

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, dilation={self.dilation}"
