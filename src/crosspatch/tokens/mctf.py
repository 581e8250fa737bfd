# SPDX-License-Identifier: Apache-2.0
"""MCTF: tokens that are alike, uninformative and small are fused, with the attention they had.

"Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers", Lee,
Choi, Kim, arXiv 2403.10030, CVPR 2024. In a block that fuses r of its T tokens x of sizes s:

    A = softmax(q k^T / sqrt d + log s),   m_j = mean over heads and queries of A_ij
    W_ij = ((cos_ij + 1) / 2)^(1/tau_sim) (1 / m_i m_j)^(1/tau_info) (1 / s_i s_j)^(1/tau_size)
    a, b = even, odd positions; the r // 2 strongest a join their best b, and of W without these
    the r - r // 2 strongest b join their best a, with what has joined them
    x' = sum g x / sum g,  s' = sum s,  g = m s;   A' = A with columns summed and rows averaged by g
    x'' = x' + proj(A' v(LN x')),   then the MLP                   one-step-ahead attention

so that attention is computed once, on the tokens before they are fused. What stays is ordered as
the authors order it, as the order makes the next block's a and b: a by position, b by strength.

Fast mode, the default here: 0.35 of the patches at three blocks (3, 6, 9 of 12); the others keep
the fused kernel. Expected at 224, with the similarity of a and b and without the pooling: r = 16 in
blocks 1 to 11, DeiT-T 0.705 G multiply-adds of 1.25 (-43.7 %), DeiT-S 2.59 of 4.60; tokens 197,
197, 181, ..., 37, 21.

Departures: prefix tokens never take part (the authors protect the class token alone); where nothing
is left to fuse, a block that the authors would run by its full map takes the fused kernel;
attention's dropout falls on tokens, not on groups; a list may leave fewer than ten tokens. No
parameters are added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from crosspatch.layers.reducer import Reducer
from crosspatch.layers.tokens import (
    Merge,
    TokenState,
    apply_merge,
    counts_of,
    joins,
    mean_rows,
    order,
    places,
    split_rows,
    take,
)
from crosspatch.tokens.host import Host, check_blocks

FAST = 0.35
LEAST = 10  # tokens that a count for all blocks leaves, as in the authors' code
SIZED, INFORMED, MAX, MEAN = range(4)  # pooling types, by the authors' numbers
AFTER, AHEAD, PRECISE = range(3)  # one-step-ahead modes, likewise
EPS = 1e-12  # as in F.normalize


class Criteria(NamedTuple):
    """Temperatures of similarity, informativeness and size; 0 leaves a criterion out."""

    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0


DEFAULT = Criteria()


class MCTF(Reducer):
    """Fuses `r` tokens in each of `blocks`.

    r: a count (1, 2, ...), a fraction of the patches that are left (below 1), or a list of either,
    one for each block of the network, or of `blocks` where they are given; None: 0.35, the default
    at a quarter, half and three quarters of the depth. blocks: every one but the first if None and
    r is given. tau_sim, tau_info, tau_size: temperatures, 0 leaves a criterion out. bidirectional:
    both sets join the other, or only a joins b. pooling: tokens are averaged by size (0), by
    attention and size (1), alike (3), or their maximum is taken (2). ahead: attention is computed
    before tokens are fused (1), or again after (2), or they are fused at the end of the block (0).
    proportional: attention weighs a key by the number of patches it stands for.
    Raises ValueError for values out of range and for a list that asks for more than there are.
    """

    def __init__(
        self,
        host: Host,
        *,
        r: float | Sequence[float] | None = None,
        blocks: Sequence[int] | None = None,
        tau_sim: float = 1.0,
        tau_info: float = 20.0,
        tau_size: float = 40.0,
        bidirectional: bool = True,
        pooling: int = INFORMED,
        ahead: int = AHEAD,
        proportional: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("tau_sim", tau_sim), ("tau_info", tau_info), ("tau_size", tau_size)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} = {value}; expected 0 (off) or above")
        if pooling not in range(4) or ahead not in range(3):
            raise ValueError(f"pooling = {pooling}, ahead = {ahead}; expected 0 to 3 and 0 to 2")
        self.criteria = Criteria(tau_sim, tau_info, tau_size)
        self.bidirectional, self.pooling, self.ahead = bidirectional, pooling, ahead
        self.proportional = proportional
        self.r, self.blocks = r, _blocks(r, blocks, host)
        self.schedule = _schedule(self.r, self.blocks, host)
        self.counts = counts_of(self.schedule, host.tokens, host.n_prefix, host.depth)
        self.first = min((i for i, count in enumerate(self.schedule) if count), default=host.depth)

    def active(self, block: int) -> bool:
        return self.schedule[block] > 0 or (self.proportional and block > self.first)

    def prefix_only(self, block: int) -> bool:
        return not self.schedule[block] or self.ahead == AFTER

    def bias(self, state: TokenState, block: int) -> Tensor | None:
        return super().bias(state, block) if self.proportional else None

    def instead(self, module: Any, state: TokenState, block: int) -> TokenState | None:
        r, attn = self.schedule[block], module.attn
        if not r:
            return None
        normed = module.norm1(state.tokens)
        q, k = attn.qk(normed)
        attention = attn.map(q, k, self.bias(state, block))
        if self.ahead == AFTER:
            y = attn.apply_map(attention, attn.values(normed))
            tokens = module.add_mlp(module.add_attention(state.tokens, y))
            return self._fused(state._replace(tokens=tokens), attention, r)[0]
        state, groups = self._fused(state, attention, r)
        normed = module.norm1(state.tokens)
        if self.ahead == PRECISE:
            y = attn(normed, self.bias(state, block))
        else:
            y = _ahead(attn, attention, attn.values(normed), groups)
        return state._replace(tokens=module.add_mlp(module.add_attention(state.tokens, y)))

    def with_r(self, r: float, host: Host) -> MCTF:
        """The same with another `r`, one number, at this one's blocks (of a list, those above
        0)."""
        listed = isinstance(self.r, Sequence)
        return MCTF(
            host,
            r=r,
            blocks=[block for block in self.blocks if self.schedule[block] or not listed],
            **self.criteria._asdict(),
            bidirectional=self.bidirectional,
            pooling=self.pooling,
            ahead=self.ahead,
            proportional=self.proportional,
        )

    def _fused(self, state: TokenState, attention: Tensor, r: int) -> tuple[TokenState, Groups]:
        return fuse(state, informativeness(attention), r, self.criteria,
                    bidirectional=self.bidirectional, pooling=self.pooling)  # fmt: skip


def _ahead(attn: Any, attention: Tensor, values: Tensor, groups: Groups) -> Tensor:
    """What the fused map gathers of values (B, heads, N', d) of the fused tokens: (B, N', C).

    Keys that are summed see one value, and a mean of queries is a mean of what they gather: so the
    map (B, heads, N, N) itself is left as it is, which is cheaper, but for the maximum.
    """
    if groups.weights is None:
        return attn.apply_map(fuse_map(attention, groups), values)
    heads, n = attention.shape[1:3]
    spread = take(values.transpose(1, 2).flatten(2), places(groups.merge, n))
    spread = spread.unflatten(2, (heads, -1)).transpose(1, 2)
    dropped = F.dropout(attention, attn.attn_drop, attn.training)
    y = pool_rows((dropped @ spread).transpose(1, 2).flatten(2), groups)
    return attn.merge_heads(y.unflatten(2, (heads, -1)).transpose(1, 2))


# ------------------------------------------------------------------ one fusion


class Groups(NamedTuple):
    """Tokens that become one. weights: (B, N), what each counts in its group's mean, or None where
    the group's maximum is taken."""

    merge: Merge
    weights: Tensor | None


def fuse(
    state: TokenState,
    info: Tensor,
    r: int,
    criteria: Criteria = DEFAULT,
    *,
    bidirectional: bool = True,
    pooling: int = INFORMED,
) -> tuple[TokenState, Groups]:
    """The state with r fewer tokens, at most half of the patches, and what has become one.

    info: (B, N), `informativeness` of the block's map.
    """
    with torch.no_grad():
        scores = fusion_scores(state.tokens, info, state.sizes, state.n_prefix, criteria)
        merge = matched(scores, r, state.n_prefix, bidirectional=bidirectional)
        weights = pooling_weights(info, state.full_sizes, pooling)
    after = apply_merge(state, merge, weights)
    if weights is None:
        after = after._replace(tokens=max_rows(state.tokens, merge))
    return after, Groups(merge, weights)


def informativeness(attention: Tensor) -> Tensor:
    """(B, N) float32 without gradient: what a token is given by the map (B, heads, N, N) on
    average."""
    return attention.detach().float().mean(dim=(1, 2))


def fusion_scores(
    tokens: Tensor, info: Tensor, sizes: Tensor | None, n_prefix: int, criteria: Criteria
) -> Tensor:
    """W (B, |a|, |b|) float32 of the patches at even (a) and odd (b) positions of tokens (B, N,
    C)."""
    a, b = parity(n_prefix)
    worth = torch.ones_like(info)
    if criteria.tau_info:
        u = info[:, n_prefix:].amin(dim=1, keepdim=True) / info
        worth = worth * u ** (1 / criteria.tau_info)
    if criteria.tau_size and sizes is not None:
        worth = worth * sizes ** (-1 / criteria.tau_size)
    scores = worth[:, a, None] * worth[:, None, b]
    if not criteria.tau_sim:
        return scores
    x = tokens.float()
    length = torch.linalg.vector_norm(x, dim=-1).clamp(min=EPS)
    cosine = (x[:, a] @ x[:, b].transpose(1, 2)) / length[:, a, None] / length[:, None, b]
    alike = (cosine + 1) / 2
    if criteria.tau_sim != 1:
        alike = alike.clamp(min=0) ** (1 / criteria.tau_sim)
    return scores * alike


def parity(n_prefix: int) -> tuple[slice, slice]:
    """Patches at even and at odd positions of the whole sequence."""
    odd = n_prefix % 2
    return slice(n_prefix + odd, None, 2), slice(n_prefix + 1 - odd, None, 2)


def matched(scores: Tensor, r: int, n_prefix: int, *, bidirectional: bool) -> Merge:
    """The r strongest joins by scores (B, |a|, |b|): the first half of them, or all, into b, then
    the rest into what is left of a."""
    batch, many_a, many_b = scores.shape
    first_a, first_b = (part.start for part in parity(n_prefix))
    forth = r // 2 if bidirectional else r
    after_a = n_prefix + many_a - forth  # where set b begins in the new order
    best, partner = scores.max(dim=2)
    rank = order(best)
    moved, stays = rank[:, :forth], rank[:, forth:].sort(dim=1).values
    partner = partner.gather(1, moved)
    moved, stays_at = first_a + 2 * moved, first_a + 2 * stays
    slots = torch.arange(after_a + many_b, device=scores.device).expand(batch, -1)
    prefix = slots[:, :n_prefix]
    if not bidirectional:
        rest = first_b + 2 * slots[:, :many_b]
        return Merge(torch.cat([prefix, stays_at, rest], dim=1), moved, after_a + partner)

    best, home = take(scores, stays).max(dim=1)
    rank = order(best)
    joins, rest = rank[:, : r - forth], rank[:, r - forth :]
    homes = n_prefix + home.gather(1, joins)
    new = torch.cat([homes, slots[:, after_a : after_a + rest.shape[1]]], dim=1)
    partner = torch.zeros_like(rank).scatter(1, rank, new).gather(1, partner)
    keep = torch.cat([prefix, stays_at, first_b + 2 * rest], dim=1)
    src = torch.cat([moved, first_b + 2 * joins], dim=1)
    return Merge(keep, src, torch.cat([partner, homes], dim=1))


def pooling_weights(info: Tensor, sizes: Tensor, pooling: int) -> Tensor | None:
    """What each token counts in the mean of its group (B, N); None for the maximum."""
    if pooling == MAX:
        return None
    return {SIZED: sizes, INFORMED: info * sizes, MEAN: torch.ones_like(info)}[pooling]


def pool_rows(x: Tensor, groups: Groups) -> Tensor:
    """x (B, N, D) to (B, N', D), the mean or the maximum of each group."""
    if groups.weights is None:
        return max_rows(x, groups.merge)
    return mean_rows(x, groups.merge, groups.weights)


def max_rows(x: Tensor, merge: Merge) -> Tensor:
    """x (B, N, D) to (B, N', D): the maximum of each kept row and of those that join it."""
    kept, moved = split_rows(x, merge)
    none = ~joins(merge).bool()[..., None]
    return torch.maximum(kept, moved[:, None].masked_fill(none, float("-inf")).amax(dim=2))


def fuse_map(attention: Tensor, groups: Groups) -> Tensor:
    """A map (B, heads, N, N) to (B, heads, N', N'): keys summed, queries pooled as tokens are."""
    heads, n = attention.shape[1:3]
    kept, moved = split_rows(attention.permute(0, 3, 1, 2).flatten(2), groups.merge)
    by_key = (kept + joins(groups.merge).to(kept.dtype) @ moved).unflatten(2, (heads, n))
    fused = pool_rows(by_key.permute(0, 3, 2, 1).flatten(2), groups)
    return fused.unflatten(2, (heads, -1)).transpose(1, 2)


# ------------------------------------------------------------------ schedules


def _blocks(
    r: float | Sequence[float] | None, blocks: Sequence[int] | None, host: Host
) -> tuple[int, ...]:
    """Blocks that may fuse: as named, the three of fast mode, all but the first, or all of a
    list."""
    if blocks is not None:
        return check_blocks(blocks, host, "blocks")
    first = min(1, host.depth - 1)
    within: Sequence[int] = range(first, host.depth)
    if isinstance(r, Sequence):
        return tuple(range(host.depth))
    if r is None:
        within = sorted({max(first, host.depth * quarter // 4) for quarter in (1, 2, 3)})
    return tuple(block for block in within if host.attends(block))


def _schedule(
    r: float | Sequence[float] | None, blocks: tuple[int, ...], host: Host
) -> tuple[int, ...]:
    """Tokens fused at each block of the host."""
    listed = isinstance(r, Sequence)
    values = r if isinstance(r, Sequence) else [FAST if r is None else r] * len(blocks)
    if len(values) != len(blocks):
        raise ValueError(f"r has {len(values)} entries for {len(blocks)} blocks")
    asked: dict[int, float] = dict(zip(blocks, values, strict=True))
    left, schedule = host.patches, []
    for block in range(host.depth):
        one = asked.get(block, 0)
        if one and not host.attends(block):
            raise ValueError(f"r = {one} at block {block}, which has no attention of its own")
        schedule.append(_count(one, left, block, host, exact=listed))
        left -= schedule[-1]
    return tuple(schedule)


def _count(one: float, left: int, block: int, host: Host, *, exact: bool) -> int:
    """How many of `left` patches are fused where `one`, a count or a fraction, is asked."""
    most = left // 2
    limit = most if exact else host.patches
    if not 0 <= one <= limit or (one >= 1 and one != int(one)):
        raise ValueError(
            f"r = {one} at block {block}; expected a fraction below 1 or a whole number from 0 to "
            f"{limit}: {left} patches are left there"
        )
    if one < 1:
        return min(int(left * one), most)
    if not exact:
        one = max(0, min(one, left + host.n_prefix - LEAST))
    return min(int(one), most)
