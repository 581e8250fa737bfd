# SPDX-License-Identifier: Apache-2.0
"""Accuracy of frequent, middling and rare classes.

Classes are ranked by their training pictures, most first (equal ones in their order). The first
three tenths of them, rounded, are the head, the last three tenths the tail, so that ten classes are
3, 4 and 3; papers that divide otherwise (CIFAR-100-LT by 36, 35 and 29) give the sizes. The
accuracy of a group is the mean of the accuracies of its classes (Liu et al. 2019, arXiv 1904.05160)
of which there are pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crosspatch.metrics.interval import wilson

NAMES = ("head", "middle", "tail")
UNEVEN = 10.0
"""Classes are uneven from so many times the pictures of the smallest in the largest on."""


def uneven(counts: Sequence[int] | np.ndarray) -> bool:
    """Whether these training pictures of classes are worth groups."""
    return len(counts) > 1 and max(counts) >= UNEVEN * max(1, min(counts))


def by_frequency(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """(K,) classes, those of most training pictures first, equal ones in their order."""
    return np.argsort(-np.asarray(counts, np.int64), kind="stable")


def group_sizes(classes: int) -> tuple[int, int, int]:
    """How many of so many classes are head, middle and tail."""
    outer = (3 * classes + 5) // 10
    return outer, classes - 2 * outer, outer


def group_accuracy(
    counts: Sequence[int] | np.ndarray,
    right: Sequence[int] | np.ndarray,
    support: Sequence[int] | np.ndarray,
    sizes: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """[{name, classes (labels, most frequent first), training (pictures), images, accuracy, low,
    high}] of the groups that have classes; accuracy None where there is no picture.

    counts, right, support: (K,) training pictures, judged pictures that were named rightly, and all
    judged; sizes: of head, middle and tail, which sum to K. The interval is Wilson's of 95 %, with
    the number of pictures whose share would be as uncertain as the mean is if the classes were
    equally hard: (classes)^2 / sum(1 / pictures). Raises ValueError for other sizes.
    """
    counts, right, support = (np.asarray(one, np.int64) for one in (counts, right, support))
    sizes = tuple(sizes or group_sizes(len(counts)))
    if len(sizes) != len(NAMES) or sum(sizes) != len(counts) or min(sizes) < 0:
        raise ValueError(f"three sizes that sum to {len(counts)}, got {sizes}")
    order, found, start = by_frequency(counts), [], 0
    for name, size in zip(NAMES, sizes, strict=True):
        group, start = order[start : start + size], start + size
        if size:
            found.append({"name": name, **_group(group, counts, right, support)})
    return found


def _group(
    group: np.ndarray, counts: np.ndarray, right: np.ndarray, support: np.ndarray
) -> dict[str, Any]:
    seen = group[support[group] > 0]
    shares = right[seen] / support[seen]
    accuracy, low, high = None, 0.0, 1.0
    if len(seen):
        accuracy = float(shares.mean())
        worth = float(len(seen) ** 2 / (1 / support[seen]).sum())
        low, high = wilson(min(accuracy * worth, worth), worth)
    return {
        "classes": group.tolist(),
        "training": int(counts[group].sum()),
        "images": int(support[group].sum()),
        "accuracy": accuracy,
        "low": low,
        "high": high,
    }


def with_groups(metrics: dict[str, Any], counts: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """The figures of a split (`Classify.metrics`) with "groups", whose classes are names, where the
    classes were uneven in training; else as they are. counts: (K,), or nothing."""
    if "confusion" not in metrics or len(counts) != len(metrics["classes"]) or not uneven(counts):
        return metrics
    table, names = np.array(metrics["confusion"]), [row["name"] for row in metrics["classes"]]
    groups = group_accuracy(counts, table.diagonal(), table.sum(axis=1))
    told = [{**one, "classes": [names[label] for label in one["classes"]]} for one in groups]
    return {**metrics, "groups": told}
