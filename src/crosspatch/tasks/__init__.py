# SPDX-License-Identifier: Apache-2.0
"""Tasks: what the labels mean. A task owns targets, loss, metrics and the predictions table.

classify     one class to a picture
multilabel   any number of classes to a picture
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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
