# SPDX-License-Identifier: Apache-2.0
"""The state of a token sequence, passed explicitly through the blocks, and its reductions as data.

Nothing here is stored on a module: a state is a NamedTuple, so compile, export, checkpointing,
deepcopy and pickle accept it. A reduction is data (`Merge`), applied by the trunk as one gather and
one product with a 0/1 matrix; pruning is a merge of nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class TokenState(NamedTuple):
    """Tokens with what is known of them.

    tokens: (B, N, C), prefix tokens (class, distillation, registers) first.
    sizes: (B, N) float32, how many patches each token stands for, or None while all are one.
    source: (B, P) int64, for every patch of the full grid the index in `tokens` that stands for it
    now
        (-1: unseen or dropped), or None while patch p is token n_prefix + p.
    n_prefix: number of prefix tokens, never reduced.
    grid: (rows, columns) of the full patch grid, rows * columns = P.
    carry: whatever a reducer hands to its next block, a NamedTuple of its own, or None.
    """

    tokens: Tensor
    sizes: Tensor | None
    source: Tensor | None
    n_prefix: int
    grid: tuple[int, int]
    carry: Any = None

    @property
    def patches(self) -> Tensor:
        """(B, N - n_prefix, C): the tokens without the prefix."""
        return self.tokens[:, self.n_prefix :]

    @property
    def full_source(self) -> Tensor:
        """(B, P) int64: `source`, spelled out where it is None."""
        if self.source is not None:
            return self.source
        count = self.grid[0] * self.grid[1]
        index = torch.arange(count, device=self.tokens.device) + self.n_prefix
        return index.expand(self.tokens.shape[0], count)

    @property
    def full_sizes(self) -> Tensor:
        """(B, N) float32: `sizes`, spelled out where it is None."""
        if self.sizes is not None:
            return self.sizes
        return torch.ones(self.tokens.shape[:2], device=self.tokens.device)


class Merge(NamedTuple):
    """A reduction from N tokens to T', as indices.

    keep: (B, T') indices of the tokens that stay, prefix included and first.
    src: (B, r) indices of the tokens that are merged away; r = 0 is pruning.
    dst: (B, r) positions in the KEPT sequence (0 .. T'-1) that each of them joins.
    """

    keep: Tensor
    src: Tensor
    dst: Tensor


def order(scores: Tensor) -> Tensor:
    """Indices (..., n) of the last dimension from the largest score to the smallest.

    Stable in eager mode: among equals the first stays first. A stable sort has no ONNX translation,
    so under export it is `topk`, which agrees wherever no two scores are equal.
    """
    if torch.compiler.is_exporting():
        return scores.topk(scores.shape[-1], dim=-1).indices
    return scores.argsort(dim=-1, descending=True, stable=True)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (B, N, C) at index (B, T): (B, T, C)."""
    return x.flatten(0, 1).index_select(0, _rows(x, index)).unflatten(0, (-1, index.shape[1]))


def put(x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """x (B, N, C) with `rows` (B, T, C) in the places index (B, T), no two of them the same."""
    filled = x.flatten(0, 1).index_put((_rows(x, index),), rows.flatten(0, 1))
    return filled.unflatten(0, (-1, x.shape[1]))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """index (B, T) into the rows of x (B, N, C), as one list of rows of x (B * N, C): whole rows
    are copied at once, where `gather` looks up every number (10 times as long on a CPU)."""
    first = torch.arange(x.shape[0], device=x.device) * x.shape[1]
    return (index + first[:, None]).flatten()


def apply_merge(state: TokenState, merge: Merge, weights: Tensor | None = None) -> TokenState:
    """The state with `merge` applied: kept tokens become means of what joins them, each token
    weighed by its size, or by `weights` (B, N)."""
    sizes, keep = state.sizes, merge.keep
    if merge.src.shape[1] == 0:
        tokens = take(state.tokens, keep)
        sizes = sizes.gather(1, keep) if sizes is not None else None
    else:
        weights = state.full_sizes if weights is None else weights
        tokens = mean_rows(state.tokens, merge, weights)
        sizes = _total(state.full_sizes, merge, joins(merge))[0]
    return state._replace(tokens=tokens, sizes=sizes, source=_renumber(state, merge))


def mean_rows(x: Tensor, merge: Merge, weights: Tensor) -> Tensor:
    """x (B, N, D) to (B, T', D): the mean of each kept row and of those that join it, by weights
    (B, N)."""
    weights = weights.to(torch.promote_types(weights.dtype, x.dtype))
    mass, moved = _total(weights, merge, joins(merge))
    kept, others = split_rows(x, merge)
    own = weights.gather(1, merge.keep) / mass
    return kept * own[..., None].to(x.dtype) + (moved / mass[..., None]).to(x.dtype) @ others


def _total(weights: Tensor, merge: Merge, member: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, N) of the groups (B, T'), and of what joins each of them (B, T', r)."""
    moved = member * weights.gather(1, merge.src)[:, None]
    return weights.gather(1, merge.keep) + moved.sum(dim=2), moved


def split_rows(x: Tensor, merge: Merge) -> tuple[Tensor, Tensor]:
    """Rows of x (B, N, D) that are kept, (B, T', D), and that join one of these, (B, r, D)."""
    rows, count = take(x, torch.cat([merge.keep, merge.src], dim=1)), merge.keep.shape[1]
    return rows[:, :count], rows[:, count:]


def joins(merge: Merge) -> Tensor:
    """(B, T', r) float32, 1 where a token joins a kept one."""
    b, r = merge.dst.shape
    none = torch.zeros(b, r, merge.keep.shape[1], device=merge.dst.device)
    return none.scatter(2, merge.dst[..., None], 1.0).transpose(1, 2)


def places(merge: Merge, count: int) -> Tensor:
    """(B, N) int64: for each of N = `count` tokens the kept one that stands for it, -1 where it was
    dropped."""
    b, kept = merge.keep.shape
    slots = torch.arange(kept, device=merge.keep.device).expand(b, -1)
    table = torch.full((b, count), -1, dtype=torch.long, device=merge.keep.device)
    return table.scatter(1, merge.keep, slots).scatter(1, merge.src, merge.dst)


def _renumber(state: TokenState, merge: Merge) -> Tensor:
    """`source` after a merge."""
    table = places(merge, state.tokens.shape[1])
    if state.source is None:
        return table[:, state.n_prefix :]
    return torch.where(state.source < 0, state.source, table.gather(1, state.source.clamp(min=0)))


def recover(state: TokenState) -> Tensor:
    """(B, P, C): every patch of the full grid reads the token that stands for it, 0 where none
    does."""
    if state.source is None:
        return state.patches
    seen = (state.source >= 0)[..., None]
    return take(state.tokens, state.source.clamp(min=0)) * seen.to(state.tokens.dtype)


def over_patches(state: TokenState, row: Tensor) -> Tensor:
    """(B, P): what every token has of `row` (B, N), shared evenly by the patches of the full grid
    that it stands for; 0 where none does."""
    if state.source is None:
        return row[:, state.n_prefix :]
    seen, place = (state.source >= 0).to(row.dtype), state.source.clamp(min=0)
    counts = torch.zeros_like(row).scatter_add(1, place, seen)
    return (row / counts.clamp(min=1)).gather(1, place) * seen


def mean_patch(tokens: Tensor, n_prefix: int, sizes: Tensor | None) -> Tensor:
    """(B, C): the mean of the patch tokens (B, N, C), each weighed by its size (B, N) if given."""
    patches = tokens[:, n_prefix:]
    if sizes is None:
        return patches.mean(dim=1)
    weights = sizes[:, n_prefix:, None].to(patches.dtype)
    return (patches * weights).sum(dim=1) / weights.sum(dim=1)


def as_map(state: TokenState, output_fmt: str, with_prefix: bool) -> Any:
    """The full grid as "NCHW" (B, C, rows, columns) or "NLC" (B, P, C), timm's names for them.

    With the prefix tokens (B, n_prefix, C) beside it if wanted. Raises ValueError for another
    format.
    """
    if output_fmt not in ("NCHW", "NLC"):
        raise ValueError(f"output_fmt {output_fmt!r}; expected NCHW or NLC")
    patches = recover(state)
    if output_fmt == "NCHW":
        patches = patches.transpose(1, 2).unflatten(2, state.grid).contiguous()
    return (patches, state.tokens[:, : state.n_prefix]) if with_prefix else patches


def select_patches(state: TokenState, keep: Tensor) -> TokenState:
    """The state with only the patches `keep` (B, M), indices into the present patch tokens."""
    b = keep.shape[0]
    prefix = torch.arange(state.n_prefix, device=keep.device).expand(b, -1)
    whole = torch.cat([prefix, keep + state.n_prefix], dim=1)
    empty = keep.new_zeros(b, 0)
    return apply_merge(state, Merge(whole, empty, empty))


def counts_of(schedule: tuple[int, ...], tokens: int, n_prefix: int, depth: int) -> tuple[int, ...]:
    """Tokens that enter each block, then those that leave the last, for `schedule` removed per
    block.

    Raises ValueError where the schedule has not `depth` entries or leaves no patch token.
    """
    if len(schedule) != depth:
        raise ValueError(f"a schedule of {len(schedule)} entries for {depth} blocks")
    counts = [tokens]
    for block, removed in enumerate(schedule):
        left = counts[-1] - removed
        if removed < 0 or left <= n_prefix:
            raise ValueError(
                f"block {block} would remove {removed} of {counts[-1] - n_prefix} patch tokens; "
                "at least one must stay"
            )
        counts.append(left)
    return tuple(counts)
