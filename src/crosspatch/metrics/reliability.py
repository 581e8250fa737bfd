# SPDX-License-Identifier: Apache-2.0
"""Reliability: of the answers that were 80 % sure, are 80 % right?

The diagram of DeGroot and Fienberg (1983, doi 10.2307/2987588) as Guo et al. draw it (arXiv
1706.04599, section 2): answers are sorted into bins by their confidence, and in each bin the mean
confidence stands beside the share that is right.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from crosspatch.metrics.interval import wilson

BINS = 10


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[dict]:
    """[{low, high, count, confidence, right, right_low, right_high}] of the bins that hold answers.

    confidence: (N,) from 0 to 1; right: (N,) bool. Bins are equally wide and open on the left, as
    those of `ece`; the interval is Wilson's of 95 %.
    """
    sure, hit = np.asarray(confidence, np.float64), np.asarray(right, bool)
    place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    found: list[dict[str, Any]] = []
    for one in np.unique(place).tolist():
        mine = place == one
        count, hits = int(mine.sum()), int(hit[mine].sum())
        low, high = wilson(hits, count)
        found.append({
            "low": one / bins, "high": (one + 1) / bins, "count": count,
            "confidence": float(sure[mine].mean()), "right": hits / count,
            "right_low": low, "right_high": high,
        })  # fmt: skip
    return found


def of_answers(probs: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[dict]:
    """`reliability` of probabilities (N, K): with labels (N,) of the most probable class, with
    labels (N, K) of every class being there."""
    probs, labels = np.asarray(probs), np.asarray(labels)
    if labels.ndim == 2:
        return reliability(probs.ravel(), labels.ravel() > 0, bins)
    return reliability(probs.max(axis=1), probs.argmax(axis=1) == labels, bins)
