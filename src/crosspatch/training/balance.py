# SPDX-License-Identifier: Apache-2.0
"""What is done about uneven classes: nothing, weights in the loss, or a balanced order.

Weights follow the effective number of pictures (Cui et al. 2019, "Class-Balanced Loss Based on
Effective Number of Samples", arXiv 1901.05555): w = (1 - b) / (1 - b^n) for a class of n pictures.
Where n is far below 1 / (1 - b) this is the inverse frequency; beyond it further pictures hardly
count. The authors let the weights sum to the number of classes; here their mean over the training
pictures is 1, so that the loss, and with it the rate, keeps its scale.

The sampler shows every class equally often (`data.loading.balanced_order`). A rare class gets a
steady place in each batch, where a weight would be a rare and strong push; the price is that its
pictures are seen many times over.

Where a picture may have several labels, an order cannot balance the classes: only weights can, of
the presence of a class. A class gets E(most) / E(n), where E(n) = (1 - b^n) / (1 - b) and `most`
are the pictures of the commonest class, but at most `HEAVIEST`; absence keeps weight 1. Thresholds
and temperature, fitted after, take back what that adds to the probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from crosspatch.errors import UsageError
from crosspatch.training.recipe import Recipe

BETA = 0.999
UNEVEN = 10.0
"""`auto` acts when the largest class has so many times the pictures of the smallest."""
HEAVIEST = 10.0
"""No label counts more often than this."""
SEEN = 1.0
"""`auto` takes weights where a batch holds so many pictures of the smallest class, on average."""


def class_weights(counts: np.ndarray) -> tuple[float, ...]:
    """counts: (K,) training pictures, each at least 1 -> K weights whose mean over the pictures is
    1, to six digits."""
    counts = np.asarray(counts, np.float64)
    weights = (1 - BETA) / -np.expm1(counts * np.log(BETA))
    weights *= counts.sum() / (counts * weights).sum()
    return tuple(float(f"{weight:.6g}") for weight in weights)


def label_weights(counts: np.ndarray) -> tuple[float, ...]:
    """counts: (K,) training pictures with each class, at least 1 -> K weights of their presence, 1
    for the commonest, to six digits."""
    effective = -np.expm1(np.asarray(counts, np.float64) * np.log(BETA))
    weights = np.minimum(effective.max() / effective, HEAVIEST)
    return tuple(float(f"{weight:.6g}") for weight in weights)


def resolve_balance(
    recipe: Recipe, counts: np.ndarray, classes: Sequence[str], reasons: list[str]
) -> Recipe:
    """The recipe with `balance` resolved for good (see `choose_balance`); reasons are added to.

    A linear probe weighs every picture alike. Raises UsageError where it is asked for more.
    """
    if recipe.penalties:
        if recipe.balance not in ("auto", "none"):
            raise UsageError(
                f"--balance {recipe.balance} with --recipe {recipe.name}",
                "a linear probe weighs every picture alike",
                "leave --balance away, or take another --recipe",
            )
        return replace(recipe, balance="none")
    several = recipe.task == "multilabel"
    mode, weights, why = choose_balance(recipe.balance, counts, classes, recipe.batch, several)
    reasons += why
    return replace(recipe, balance=mode, class_weights=weights)


def choose_balance(
    asked: str, counts: np.ndarray, classes: Sequence[str], batch: int, several: bool = False
) -> tuple[str, tuple[float, ...], list[str]]:
    """("none", "weights" or "sampler", the weights of the loss, reasons).

    asked: one of these or "auto"; counts: (K,) training pictures; batch: pictures per step;
    several: whether a picture may have several classes, which takes no sampler (UsageError).
    """
    if several and asked == "sampler":
        raise UsageError(
            "--balance sampler for pictures with several labels",
            "weights: a picture that is shown more often brings all its classes along",
            "--balance weights, or leave it away",
        )
    weigh = label_weights if several else class_weights
    least, most = int(counts.argmin()), int(counts.argmax())
    ratio = counts[most] / max(1, counts[least])
    told = f"{classes[most]} has {ratio:.3g} times the training pictures of {classes[least]}"
    seen = batch * counts[least] / counts.sum()
    if asked != "auto":
        mode, reasons = asked, [] if asked == "none" else [f"--balance {asked}, as asked: {told}."]
    elif ratio < UNEVEN:
        mode, reasons = "none", []
    elif several or seen >= SEEN:
        mode = "weights"
        reasons = [f"--balance weights: {told} (from {UNEVEN:g} on rare classes weigh more)."]
    else:
        mode = "sampler"
        reasons = [
            f"--balance sampler: {told}, and a batch would hold {seen:.2g} of the latter: "
            "each class comes equally often."
        ]
    return mode, weigh(counts) if mode == "weights" else (), reasons
