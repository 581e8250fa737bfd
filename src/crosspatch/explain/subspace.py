# SPDX-License-Identifier: Apache-2.0
"""How many directions of a head's queries, keys or values the answers need.

"Does Circuit Analysis Interpretability Scale?", Lieberum et al., arXiv 2307.09458 (2023), section
4: the singular vectors of a head's activations over a set of inputs; the activations are projected
onto the first of them, and the answers are looked at again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.explain.forward import Part, Watch, explainable, logits
from crosspatch.explain.patching import record


class Subspace(NamedTuple):
    """rank: directions kept, of d; spread: (d,) singular values, the largest first; kept: share of
    the variance in those kept; accuracy, before: with labels, of the projected and of the whole
    network, else None; same: share of the pictures with the same answer; change: mean of |logit
    change|."""

    rank: int
    spread: np.ndarray
    kept: float
    accuracy: float | None
    before: float | None
    same: float
    change: float


class _Projection(Watch):
    def __init__(self, part: Part, which: str, mean: Tensor, basis: Tensor) -> None:
        self.part, self.which, self.mean, self.basis = part, which, mean, basis

    def look(self, part: Part, what: str, value: Tensor) -> Tensor:
        if (part, what) != (self.part.whole, self.which):
            return value
        changed = value.clone()
        centred = value[:, self.part.head] - self.mean
        changed[:, self.part.head] = centred @ self.basis.T @ self.basis + self.mean
        return changed


@torch.no_grad()
def head_svd(
    model: nn.Module,
    images: Tensor,
    block: int,
    head: int,
    which: str = "q",
    rank: int = 1,
    *,
    labels: Tensor | None = None,
    branch: str = "",
    kind: str = "head",
) -> Subspace:
    """The network with one head's queries ("q"), keys ("k") or values ("v") at all tokens projected
    onto their first `rank` directions around their mean.

    images: (B, C, H, W); labels: (B,) int64. branch, kind: see `forward.Part`. Raises UsageError
    for a head or a word that is not there, a rank that is none, and as `explainable` does.
    """
    ours = explainable(model).eval()
    kept = record(ours, images)
    part = Part(branch, kind, block, head)
    found = kept.seen.get((part.whole, which))
    if found is None or not 0 <= head < found.shape[1]:
        raise UsageError(
            f"no {which!r} of {part.name!r} in this network",
            "'q', 'k' or 'v' of a head that is there",
            "take heads from record(model, images).parts",
        )
    rows = found[:, head].flatten(0, 1)
    if not 0 <= rank <= rows.shape[1]:
        raise UsageError(f"rank {rank}", f"a number from 0 to {rows.shape[1]}", "rank=1")
    mean = rows.mean(dim=0)
    _, spread, basis = torch.linalg.svd(rows - mean, full_matrices=False)
    again = logits(ours, images, _Projection(part, which, mean, basis[:rank]))
    answers, own = again.argmax(dim=1), kept.logits.argmax(dim=1)
    right = lambda said: None if labels is None else float((said == labels).double().mean())
    power = spread.square()
    return Subspace(
        rank,
        spread.cpu().numpy(),
        float(power[:rank].sum() / power.sum().clamp(min=1e-30)),
        right(answers),
        right(own),
        float((answers == own).double().mean()),
        float((again - kept.logits).abs().mean()),
    )
