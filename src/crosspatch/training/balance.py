# SPDX-License-Identifier: Apache-2.0
"""What is done about uneven classes: nothing, weights in the loss, or a balanced order.

Weights follow the effective number of pictures (Cui et al. 2019, "Class-Balanced Loss Based on
Effective Number of Samples", arXiv 1901.05555): w = (1 - b) / (1 - b^n) for a class of n pictures.
Where n is far below 1 / (1 - b) this is the inverse frequency; beyond it further pictures hardly
count. The authors let the weights sum to the number of classes; here their mean over the training
pictures is 1, so that the loss, and with it the rate, keeps its scale.

`effective` and `drw` are the weights as the authors have them: b = 0.9999, K weights that sum to K,
and the loss of a batch divided by the sum of its weights (torch's weighted mean), so that here too
the loss keeps its scale. Deferred re-weighting, `drw` (Cao et al. 2019, arXiv 1906.07413, algorithm
1), has all pictures alike first and these weights from `DEFERRED` of the run on: what the rare
classes have to say is learnt without being learnt by heart.

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
from crosspatch.metrics.tails import UNEVEN
from crosspatch.objectives.uneven import effective_weights
from crosspatch.training.recipe import EFFECTIVES, Recipe

BETA = 0.999
DEFERRED = 0.8
"""From which part of a run on `drw` weighs: epoch 160 of the authors' 200."""
COMES_WITH = {"ldam": "drw", "logit-adjust": "none"}
"""What `auto` is for an objective that is made for uneven classes."""
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


def effective(counts: np.ndarray) -> tuple[float, ...]:
    """counts: (K,) training pictures, each at least 1 -> `effective_weights`, to nine digits."""
    return tuple(float(f"{weight:.9g}") for weight in effective_weights(counts.tolist()).tolist())


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
    several, asked = recipe.task == "multilabel", recipe.balance
    if asked == "auto" and not several and recipe.objective in COMES_WITH:
        asked = COMES_WITH[recipe.objective]
    if asked == "sampler" and recipe.objective == "logit-adjust":
        raise UsageError(
            "--balance sampler with the objective logit-adjust",
            "pictures as often as they are: the objective takes out how uneven they are",
            "leave --balance away, or take another --objective",
        )
    mode, weights, why = choose_balance(asked, counts, classes, recipe.batch, several)
    deferred = 0.0
    if mode == "drw":
        deferred = recipe.deferred or DEFERRED
        why.append(f"All pictures count alike for {deferred:.0%} of the run; then rare classes "
                   "weigh more.")  # fmt: skip
    reasons += why
    return replace(recipe, balance=mode, class_weights=weights, deferred=deferred)


def choose_balance(
    asked: str, counts: np.ndarray, classes: Sequence[str], batch: int, several: bool = False
) -> tuple[str, tuple[float, ...], list[str]]:
    """(one of `BALANCES` but "auto", the weights of the loss, reasons).

    asked: one of them; counts: (K,) training pictures; batch: pictures per step; several: whether a
    picture may have several classes. Raises UsageError for what that does not take, and for weights
    of a class without a picture.
    """
    if several and asked in ("sampler", *EFFECTIVES):
        raise UsageError(
            f"--balance {asked} for pictures with several labels",
            "weights of the presence of each class: a picture that is shown more often brings all "
            "its classes along",
            "--balance weights, or leave it away",
        )
    if asked in EFFECTIVES and not counts.all():
        rare = classes[int(counts.argmin())]
        raise UsageError(
            f"{rare}: a tail class without a training picture",
            f"at least one of each class for --balance {asked}",
            f"add pictures of {rare}, remove the class, or leave --balance away",
        )
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
    plain = label_weights if several else class_weights
    weigh = {"weights": plain, **dict.fromkeys(EFFECTIVES, effective)}.get(mode)
    return mode, weigh(counts) if weigh else (), reasons
