# SPDX-License-Identifier: Apache-2.0
"""What objectives for uneven classes share: their options, and the counts that they need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from crosspatch.errors import UsageError
from crosspatch.objectives import Given


def numbers_of(
    name: str, options: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """The options of objective `name` as numbers, each above the first of its range and up to the
    second. Raises UsageError for others and for unknown ones."""
    told = ", ".join(f"{key} above {low:g}, up to {high:g}" for key, (low, high) in ranges.items())
    for key, value in options.items():
        low, high = ranges.get(key, (math.inf, -math.inf))
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low < value <= high:
            raise UsageError(
                f"--objective {name}:{key}={value}",
                f"options of {name}: {told}",
                f"--objective {name}, or change {key}",
            )
    return {key: float(value) for key, value in options.items()}


def require_counts(name: str, given: Given, task: Any) -> tuple[int, ...]:
    """The training pictures of each class. Raises UsageError where they are not known, or a class
    has none."""
    if len(given.counts) != len(task.classes):
        raise UsageError(
            f"the objective {name} without the training pictures of each class",
            f"{name} needs to know how many there are",
            "train anew with --overwrite, or take another --objective",
        )
    if 0 in given.counts:
        rare = task.classes[given.counts.index(0)]
        raise UsageError(
            f"{rare}: a tail class without a training picture",
            f"at least one of each class for the objective {name}",
            f"add pictures of {rare}, or remove the class",
        )
    return given.counts
