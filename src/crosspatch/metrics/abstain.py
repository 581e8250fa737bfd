# SPDX-License-Identifier: Apache-2.0
"""Answering only where it is sure: how many pictures that leaves, and how many of them are right.

Selective classification with the confidence as the score: El-Yaniv and Wiener, "On the Foundations
of Noise-free Selective Classification", JMLR 11 (2010); Geifman and El-Yaniv, arXiv 1705.08500.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crosspatch.metrics.interval import wilson

LEAST = 20
"""Answers that a threshold must leave before its precision is believed."""


class Curve(NamedTuple):
    """At each threshold (T,), highest first: the share of pictures that is answered, and of those
    the share that is right."""

    threshold: np.ndarray
    coverage: np.ndarray
    precision: np.ndarray


class Answered(NamedTuple):
    """What a threshold leaves. answered, right: pictures of `images`; low, high: the 95 % interval
    (Wilson) of the precision."""

    threshold: float
    images: int
    answered: int
    right: int
    low: float
    high: float

    @property
    def coverage(self) -> float:
        return self.answered / self.images if self.images else 0.0

    @property
    def precision(self) -> float | None:
        return self.right / self.answered if self.answered else None


def curve(confidence: np.ndarray, right: np.ndarray) -> Curve:
    """confidence: (N,); right: (N,) bool. A picture is answered from the threshold on, so those of
    one confidence come together; N = 0 gives empty arrays."""
    sure = np.asarray(confidence, np.float64)
    order = np.argsort(-sure, kind="stable")
    ranked = sure[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True)) if len(ranked) else order
    hits = np.asarray(right, bool)[order].cumsum()
    return Curve(ranked[last], (last + 1) / max(1, len(sure)), hits[last] / (last + 1))


def threshold_for(
    confidence: np.ndarray, right: np.ndarray, wanted: float, least: int = LEAST
) -> float | None:
    """The lowest threshold whose answers, `least` or more of them, are right in a share of `wanted`
    or more; None where there is none. Choose it on other pictures than those it is judged on."""
    found = curve(confidence, right)
    enough = np.rint(found.coverage * len(confidence)) >= least
    good = np.flatnonzero(enough & (found.precision >= wanted))
    return float(found.threshold[good[-1]]) if len(good) else None


def answered(confidence: np.ndarray, right: np.ndarray, threshold: float) -> Answered:
    """What is answered from `threshold` on, of pictures (N,)."""
    kept = np.asarray(confidence) >= threshold
    count, hits = int(kept.sum()), int(np.asarray(right, bool)[kept].sum())
    return Answered(threshold, len(kept), count, hits, *wilson(hits, count))
