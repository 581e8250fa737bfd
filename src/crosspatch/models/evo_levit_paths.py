# SPDX-License-Identifier: Apache-2.0
"""Evo-LeViT's two paths through a run of blocks, and how many patches take the slow one.

"Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", Xu et al., arXiv 2108.01390,
section 3; the equations stand in `models/evo_levit.py`. Plain functions: what is slow is decided
from the scores that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from crosspatch.layers.stage import each
from crosspatch.layers.tokens import order, take
from crosspatch.models.evo_levit_blocks import total

FAST = ("representative", "copy")


class Segment(NamedTuple):
    """Blocks `start` to `stop` (exclusive) of a stage; `keep` patches are slow, or None: all."""

    start: int
    stop: int
    keep: int | None


def representative(rest: Tensor, scores: Tensor) -> Tensor:
    """(B, 1, C): the mean of tokens (B, M, C) weighed by their scores (B, M)."""
    weights = scores / total(scores)
    return (weights[..., None] * rest).sum(dim=1, keepdim=True).to(rest.dtype)


def slow_fast(
    blocks: Iterable[Callable[..., tuple[Tensor, Tensor, Tensor]]],
    x: Tensor,
    scores: Tensor,
    keep: int,
    fast: str = "representative",
) -> tuple[Tensor, Tensor, Tensor]:
    """`blocks` over the class token and the `keep` patches of highest score; the rest follows.

    x: (B, 1 + N, C); scores: (B, N). fast: "representative", or "copy": the rest stays as it is.
    Returns tokens and scores in the order given, and the indices (B, keep) of the slow patches.
    """
    rank = order(scores)
    patches, ranked = take(x[:, 1:], rank), scores.gather(1, rank)
    rest, rest_scores, mine = patches[:, keep:], ranked[:, keep:], ranked[:, :keep]
    slow = [x[:, :1], patches[:, :keep]]
    if fast == "representative":
        slow.append(representative(rest, rest_scores))
    x = torch.cat(slow, dim=1)
    moved: Tensor | float = 0.0
    for block in blocks:
        x, mine, step = block(x, mine)
        moved = moved + step
    if fast == "representative":
        rest = rest + moved
    places = torch.arange(rank.shape[1], device=rank.device).expand_as(rank)
    back = torch.zeros_like(rank).scatter(1, rank, places)
    patches = take(torch.cat([x[:, 1 : 1 + keep], rest], dim=1), back)
    scores = torch.cat([mine, rest_scores], dim=1).gather(1, back)
    return torch.cat([x[:, :1], patches], dim=1), scores, rank[:, :keep]


def segments(
    depth: Sequence[int],
    keep_ratio: float | Sequence[float],
    stage_keep_ratio: float | Sequence[float] | None,
    grids: Sequence[tuple[int, int]],
    stagewise: bool,
) -> list[list[Segment]]:
    """Per stage its blocks in runs, each with the number of patches that are slow in it."""
    blocks = sum(depth)
    if not isinstance(keep_ratio, Sequence):
        keep_ratio = [1.0] * min(2, blocks) + [keep_ratio] * (blocks - 2)
    if len(keep_ratio) != blocks:
        raise ValueError(f"keep_ratio has {len(keep_ratio)} entries for {blocks} blocks")
    if keep_ratio[0] < 1:
        raise ValueError(f"keep_ratio {keep_ratio[0]} of block 0; it has no scores yet: expected 1")
    (shares,) = each(len(depth), stage_keep_ratio=stage_keep_ratio)
    plan, first = [], 0
    for count, share, (rows, columns) in zip(depth, shares, grids, strict=True):
        ratios = list(keep_ratio[first : first + count])
        if stagewise:
            ratios = _spanning(ratios, share)
        keeps = [_kept(rows * columns, ratio) for ratio in ratios]
        plan.append(_runs(keeps, stagewise))
        first += count
    return plan


def _spanning(ratios: list[float], share: float | None) -> list[float]:
    """The ratios of a stage's blocks when its reduced ones, from the first to the last, are one."""
    reduced = [i for i, ratio in enumerate(ratios) if ratio < 1]
    if not reduced:
        return ratios
    start, chosen = reduced[0], ratios[reduced[0]] if share is None else share
    return ratios[:start] + [chosen] * (len(ratios) - start)


def _kept(patches: int, ratio: float) -> int | None:
    """The slow ones of so many patches, at least one; None for all."""
    if not 0 < ratio <= 1:
        raise ValueError(f"a keep ratio of {ratio}; expected one above 0 and at most 1")
    keep = max(1, int(patches * ratio))
    return None if keep == patches else keep


def _runs(keeps: list[int | None], stagewise: bool) -> list[Segment]:
    """Neighbours without a selection, and stage-wise those with one, make a run."""
    runs: list[Segment] = []
    for i, keep in enumerate(keeps):
        if runs and runs[-1].keep == keep and (stagewise or keep is None):
            runs[-1] = Segment(runs[-1].start, i + 1, keep)
        else:
            runs.append(Segment(i, i + 1, keep))
    return runs
