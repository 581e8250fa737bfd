# SPDX-License-Identifier: Apache-2.0
"""Classification metrics on probabilities, in plain numpy (importing them costs nothing).

Everywhere `probs` is (N, K), rows sum to 1, and `labels` is (N,) with values in 0..K-1. N = 0 gives
NaN for shares and losses: no pictures, no number.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from crosspatch.metrics.interval import wilson

TINY = 1e-12  # a probability is never taken for smaller than this in a logarithm


class PerClass(NamedTuple):
    """Per-class figures, each (K,) float64; NaN where a figure has no denominator."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray


def _share(hits: np.ndarray) -> float:
    return float(hits.mean()) if len(hits) else float("nan")


def _rank(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Place of the true class, 0 = first, (N,); among equals the lower index comes first."""
    own = probs[np.arange(len(labels)), labels][:, None]
    before = np.arange(probs.shape[1])[None] < labels[:, None]
    return ((probs > own) | ((probs == own) & before)).sum(axis=1)


def topk(probs: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of pictures whose class is among the k most probable; k is clamped to 1..K."""
    return _share(_rank(probs, labels) < min(max(k, 1), probs.shape[1]))


def accuracy(probs: np.ndarray, labels: np.ndarray) -> float:
    """Share of pictures whose most probable class is theirs."""
    return topk(probs, labels, 1)


def accuracy_interval(probs: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """95 % Wilson interval of the accuracy."""
    return wilson(int((_rank(probs, labels) == 0).sum()), len(labels))


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Counts (K, K) int64: row = true class, column = predicted class."""
    flat = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes).astype(np.int64)


def per_class(table: np.ndarray) -> PerClass:
    """Precision, recall, F1 and support of each class from a confusion table (K, K)."""
    hits, support, said = np.diag(table).astype(float), table.sum(1), table.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return PerClass(hits / said, hits / support, 2 * hits / (said + support), support)


def macro_f1(table: np.ndarray) -> float:
    """Mean F1 over the classes that occur, as truth or as prediction."""
    f1 = per_class(table).f1
    return float(np.nanmean(f1)) if np.isfinite(f1).any() else float("nan")


def nll(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood of the true classes, in nats."""
    if not len(labels):
        return float("nan")
    own = probs[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(own, TINY)).mean())


def ece(probs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the top class over `bins` equal bins (Guo 2017, 1706.04599)."""
    if not len(labels):
        return float("nan")
    confidence = probs.max(axis=1).astype(np.float64)
    hit = probs.argmax(axis=1) == labels
    # bins are open on the left, as in the paper: (0, 1/15], (1/15, 2/15] ...
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, weights=hit - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))
