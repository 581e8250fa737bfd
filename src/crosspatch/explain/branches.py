# SPDX-License-Identifier: Apache-2.0
"""CrossViT's two scales: how far the fine branch decides, how far the coarse one, and how far both.

Two questions, which have different answers. "Who wrote it?": the direct contributions
(`circuits.py`) of each branch's own parts, of what fusions took from the other branch, and of the
biases; they add up to the difference of two logits. "Who is needed?": what the network says when a
branch sees an empty picture, or fusions take nothing; that counts whatever later parts make of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.explain.circuits import Attribution, between, dla
from crosspatch.explain.forward import Part, explainable, logits
from crosspatch.explain.patching import Exchange, Record, record
from crosspatch.models.crossvit import CrossViT
from crosspatch.tokens.host import branch_names

EXCHANGE, BIASES = "exchange", "biases"


class Shares(NamedTuple):
    """Who makes logit a - logit b. written: fine, coarse, …, "exchange" (what fusions took from the
    other branch), "biases", each to (B,): they add up to `difference` (B,). read: the same by the
    branch whose class token it was read from. without: "fine", …, "exchange" to the logits (B, K)
    when that branch sees only the mean colour of its picture, or fusions take nothing; logits: (B,
    K) of the whole network."""

    written: dict[str, np.ndarray]
    read: dict[str, np.ndarray]
    difference: np.ndarray
    without: dict[str, np.ndarray]
    logits: np.ndarray


def group(part: Part) -> str:
    """The branch that a part belongs to, or "exchange" or "biases"."""
    if part.constant:
        return BIASES
    return EXCHANGE if part.kind == "fusion head" else part.branch


def grouped(
    found: Attribution, names: tuple[str, ...], direction: int = 0
) -> dict[str, np.ndarray]:
    """Contributions (B,) by `group`, in the order of the branches, exchange, biases."""
    sums = {name: np.zeros(len(found.values)) for name in (*names, EXCHANGE, BIASES)}
    for place, part in enumerate(found.parts):
        sums[group(part)] = sums[group(part)] + found.values[:, place, direction]
    return sums


def shares(
    model: nn.Module,
    images: Tensor,
    a: Tensor | int,
    b: Tensor | int | None = None,
    *,
    found: Attribution | None = None,
) -> Shares:
    """Who makes logit a - logit b of a CrossViT (of logit a, where b is None).

    images: (B, C, H, W). found: `dla` of the same, where it was computed already. Raises UsageError
    for a network of one branch, and as `explainable` does.
    """
    ours = explainable(model)
    names = branch_names(ours)
    if not isinstance(ours, CrossViT):
        raise UsageError(
            f"a {type(ours).__name__}, which has one branch",
            "a CrossViT, which has two or more",
            "crosspatch train DATA --model crossvit_micro_32",
        )
    found = dla(ours, images, a, b) if found is None else found
    kept = record(ours, images)
    along = between(kept.logits.shape[1], a, b)[0].to(kept.logits)
    read = {
        name: _numbers((kept.seen[Part(name, "classifier"), "logits"] * along).sum(dim=-1))
        / len(names)
        for name in names
    }
    return Shares(
        grouped(found, names),
        read,
        found.found[:, 0],
        without(ours, images, kept),
        _numbers(kept.logits),
    )


@torch.no_grad()
def without(model: nn.Module, images: Tensor, kept: Record | None = None) -> dict[str, np.ndarray]:
    """Logits (B, K) of a CrossViT with each branch blind in turn, and with fusions taking nothing.

    A blind branch is given the embedding of a picture of the same mean colour everywhere.
    """
    ours = explainable(model).eval()
    kept = record(ours, images) if kept is None else kept
    plain = record(ours, images.mean(dim=(2, 3), keepdim=True).expand_as(images))
    found = {}
    for name in branch_names(ours):
        watch = Exchange(plain.writes, [Part(name, "embedding")])
        found[name] = _numbers(logits(ours, images, watch))
    taken = [part for part in kept.writes if part.kind == "fusion head"]
    if taken:
        nothing = {part: torch.zeros_like(kept.writes[part]) for part in taken}
        found[EXCHANGE] = _numbers(logits(ours, images, Exchange(nothing, taken)))
    return found


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()
