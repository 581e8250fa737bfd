# SPDX-License-Identifier: Apache-2.0
"""Direct logit attribution: logits as the exact sum of what each part of a network adds to them.

"Does Circuit Analysis Interpretability Scale?", Lieberum et al., arXiv 2307.09458 (2023), section
3.1. With the spread of the final norm (in a CrossViT of every norm on the class token's way, and
the gates of the GELUs there) as it is,

    logits = sum over parts c of (d logits / d c) c

where c runs over embeddings, positions, heads, MLPs and every bias; the derivative is that of the
linear map that is left. It is checked each time that the sum is what the network says.

A contribution is DIRECT: what a part writes into the tokens that are read, not what later parts
make of it. `patching.py` tells the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.explain.forward import HEADED, Part, Watch, explainable, logits

TOLERANCE = 1e-5
"""Of the largest logit: how far the sum may be from what the network says."""


class Attribution(NamedTuple):
    """parts: P terms, each head its own; values: (B, P, D), what each adds to each of D directions;
    found: (B, D), what the network says; error: the largest difference of the sums from `found`, as
    a share of the largest logit; slopes and seen: (part, all heads) to the derivative (D, B, …) of
    the directions by what was written, and to what was looked at, by "v" and "attention"."""

    parts: tuple[Part, ...]
    values: np.ndarray
    found: np.ndarray
    error: float
    slopes: dict[Part, Tensor]
    seen: dict[tuple[Part, str], Tensor]

    def table(self, direction: int = 0) -> list[tuple[Part, float, float]]:
        """(part, mean and standard deviation over the pictures), the largest mean effect first."""
        values = self.values[..., direction]
        rows = zip(self.parts, values.mean(axis=0), values.std(axis=0), strict=True)
        return sorted(
            ((part, float(m), float(s)) for part, m, s in rows), key=lambda row: -abs(row[1])
        )


class _Leaves(Watch):
    """Every write is a leaf of the graph, every held factor a constant."""

    def __init__(self, sources: bool) -> None:
        self.sources = sources
        self.leaves: dict[Part, Tensor] = {}
        self.seen: dict[tuple[Part, str], Tensor] = {}

    def write(self, part: Part, value: Tensor) -> Tensor:
        self.leaves[part] = value.detach().clone().requires_grad_()
        return self.leaves[part]

    def hold(self, part: Part, value: Tensor) -> Tensor:
        return value.detach()

    def look(self, part: Part, what: str, value: Tensor) -> Tensor:
        self.seen[part, what] = value.detach()
        return value


def attribute(
    model: nn.Module,
    images: Tensor,
    directions: Tensor | None = None,
    *,
    sources: bool = False,
) -> Attribution:
    """What every part of `model` adds to directions in its logits.

    images: (B, C, H, W), normalised. directions: (D, K), or (D, B, K) for each picture its own;
    None for every class. sources: keep what `attention.written_from` asks for. Computed in float64
    on the processor. Raises UsageError for a network that is no sum of parts, ArithmeticError where
    the sum is not what the network says.
    """
    exact = precise(model)
    images = images.detach().cpu().double()
    watch = _Leaves(sources)
    with torch.enable_grad():
        summed = logits(exact, images, watch)
        if directions is None:
            directions = torch.eye(summed.shape[1])
        along = directions.detach().cpu().double()
        along = along if along.ndim == 3 else along[:, None].expand(-1, len(images), -1)
        leaves = list(watch.leaves.values())
        slopes = [
            torch.autograd.grad((summed * one).sum(), leaves, retain_graph=True, allow_unused=True)
            for one in along
        ]
    with torch.no_grad():
        said = exact(images)
    parts, values, by_part = _gathered(watch.leaves, slopes)
    found = torch.einsum("bk,dbk->bd", said, along)
    error = _checked(values.sum(dim=1), found, said)
    return Attribution(parts, values.numpy(), found.numpy(), error, by_part, watch.seen)


def precise(model: nn.Module) -> Any:
    """A copy of `model` in float64, in evaluation, on the processor, without gradients. Raises
    UsageError as `explainable` does."""
    ours = copy.deepcopy(explainable(model)).cpu().double().eval()
    return ours.requires_grad_(False)


def _gathered(leaves: dict[Part, Tensor], slopes: Sequence) -> tuple:
    """(parts, values (B, P, D), part to slopes (D, B, …))."""
    parts: list[Part] = []
    values, by_part = [], {}
    for i, (part, leaf) in enumerate(leaves.items()):
        rows = [one[i] if one[i] is not None else torch.zeros_like(leaf) for one in slopes]
        slope = torch.stack(rows)
        by_part[part] = slope
        terms = slope * leaf.detach()  # (D, B, …)
        if part.kind in HEADED:
            parts += [part._replace(head=h) for h in range(leaf.shape[1])]
            values.append(terms.flatten(3).sum(dim=-1).permute(1, 2, 0))
        else:
            parts.append(part)
            values.append(terms.flatten(2).sum(dim=-1).transpose(0, 1)[:, None])
    return tuple(parts), torch.cat(values, dim=1), by_part


def _checked(summed: Tensor, found: Tensor, said: Tensor) -> float:
    error = float((summed - found).abs().max() / said.abs().max().clamp(min=1e-12))
    if not error <= TOLERANCE:
        raise ArithmeticError(
            f"the parts add up to something else than the logits (by {error:.1e} of the largest)"
        )
    return error


def between(classes: int, a: Tensor | int, b: Tensor | int | None) -> Tensor:
    """The direction logit a - logit b, or logit a where b is None: (1, K) of numbers, (1, B, K) of
    tensors (B,). Raises UsageError for a class that is not there."""
    rows = []
    for chosen in (a,) if b is None else (a, b):
        place = torch.as_tensor(chosen)
        if bool(((place < 0) | (place >= classes)).any()):
            raise UsageError(
                f"class {chosen}", f"a number from 0 to {classes - 1}", "name a class by its place"
            )
        rows.append(F.one_hot(place.long().cpu(), classes).double())
    return (rows[0] if b is None else rows[0] - rows[1])[None]


def dla(
    model: nn.Module,
    images: Tensor,
    a: Tensor | int,
    b: Tensor | int | None = None,
    *,
    sources: bool = False,
) -> Attribution:
    """What every part adds to logit a - logit b (to logit a where b is None).

    a, b: classes, or one for every picture (B,). Otherwise as `attribute`.
    """
    classes = int(explainable(model).num_classes)
    return attribute(model, images, between(classes, a, b), sources=sources)
