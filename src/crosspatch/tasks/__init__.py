# SPDX-License-Identifier: Apache-2.0
"""Tasks: what the labels mean. A task owns targets, loss, metrics and the predictions table.

classify     one class to a picture
multilabel   any number of classes to a picture
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from crosspatch.metrics.classification import PerClass
from crosspatch.metrics.interval import wilson

if TYPE_CHECKING:
    from crosspatch.tasks.classify import Classify
    from crosspatch.tasks.multilabel import MultiLabel

TASKS = ("classify", "multilabel")


def make_task(
    name: str, classes: Sequence[str], thresholds: Sequence[float] = ()
) -> Classify | MultiLabel:
    """The task of a name out of `TASKS`; thresholds: (K,) of multilabel, () for 0.5 each."""
    if name == "multilabel":
        from crosspatch.tasks.multilabel import MultiLabel

        return MultiLabel(classes, thresholds)
    from crosspatch.tasks.classify import Classify

    return Classify(classes)


def activate(logits: Any, name: str) -> Any:
    """A tensor of logits (B, K) float -> the probabilities of the task of that name."""
    return logits.sigmoid() if name == "multilabel" else logits.softmax(dim=-1)


def plain(value: float) -> float | None:
    """A float for JSON: NaN has no place there."""
    return None if math.isnan(value) else float(value)


def class_figures(figures: PerClass, place: int, hits: int) -> dict[str, Any]:
    """Of one class, for JSON: precision, recall with its 95 % interval (Wilson), f1, support; hits:
    its pictures that were found."""
    low, high = wilson(hits, int(figures.support[place]))
    return {
        "precision": plain(figures.precision[place]),
        "recall": plain(figures.recall[place]),
        "recall_low": low,
        "recall_high": high,
        "f1": plain(figures.f1[place]),
        "support": int(figures.support[place]),
    }
