# SPDX-License-Identifier: Apache-2.0
"""What objectives for uneven classes share: the counts that they need, and the weights by effective
numbers (Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples", arXiv
1901.05555, equation 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crosspatch.errors import UsageError

BETA = 0.9999


def effective_weights(counts: Sequence[int], beta: float = BETA) -> Tensor:
    """counts: training pictures of each of K classes, at least 1 -> weights (K,) float64, (1 - b) /
    (1 - b^n), which sum to K. Raises ValueError for a class without a picture and for a beta
    outside of [0, 1)."""
    held = torch.tensor(list(counts), dtype=torch.float64)
    if not len(held) or held.min() < 1:
        raise ValueError(f"every class needs a training picture, got counts {list(counts)}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta is in [0, 1), got {beta}")
    weights = (1 - beta) / -torch.expm1(held * math.log(beta) if beta else held * -math.inf)
    return weights * (len(held) / weights.sum())


def require_counts(name: str, counts: Sequence[int], task: Any) -> None:
    """Raises UsageError where the training pictures of each class are not known to the objective
    `name`, or a class has none."""
    if len(counts) != len(task.classes):
        raise UsageError(
            f"the objective {name} without the training pictures of each class",
            f"{name} needs to know how many there are",
            "train anew with --overwrite, or take another --objective",
        )
    if 0 in counts:
        rare = task.classes[list(counts).index(0)]
        raise UsageError(
            f"{rare}: a tail class without a training picture",
            f"at least one of each class for the objective {name}",
            f"add pictures of {rare}, or remove the class",
        )
