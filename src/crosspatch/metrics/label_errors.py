# SPDX-License-Identifier: Apache-2.0
"""Which labels are likely wrong, by probabilities of models that are asked about each picture.

Everywhere `probs` is (N, K), rows sum to 1, best made without the picture's own label
(cross-validation), and `labels` is (N,) with values in 0..K-1. Scores grow with suspicion:

    self       1 - p[label]
    margin     max over the other classes of p - p[label]
    confident  the same after the mean confidence of each class is taken away from its column: a
               class of which a model is seldom sure is not held against its pictures

The last follows "Confident Learning: Estimating Uncertainty in Dataset Labels", Northcutt, Jiang,
Chuang, arXiv 1911.00068, section 3.1: t_j, the mean of p[j] over the pictures with label j, is what
a picture has to reach to count as one of class j.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SCORES = ("self", "margin", "confident")
FLOOR = 1e-6  # of a probability, in a logarithm


class Suspects(NamedTuple):
    """indices: places (S,) int64 of pictures, the most suspicious first; scores: (S,) float64."""

    indices: np.ndarray
    scores: np.ndarray


def scores(probs: np.ndarray, labels: np.ndarray, how: str = "self") -> np.ndarray:
    """The suspicion of every label, (N,) float64; `how`: one of SCORES. Raises ValueError for
    another word, and for probabilities and labels that do not fit each other."""
    probs = np.asarray(probs, np.float64)
    _check(probs, labels)
    if how not in SCORES:
        raise ValueError(f"{how!r} is none of {', '.join(SCORES)}")
    rows = np.arange(len(labels))
    if how == "self":
        return 1 - probs[rows, labels]
    if how == "confident":
        probs = probs - thresholds(probs, labels)
    own = probs[rows, labels].copy()
    return _others(probs, labels).max(axis=1, initial=-np.inf) - own


def thresholds(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """t_j (K,): the mean probability of class j over the pictures that are labelled so; 1 for a
    class without a picture."""
    _check(probs, labels)
    counts = np.bincount(labels, minlength=probs.shape[1])
    own = probs[np.arange(len(labels)), labels]
    sums = np.bincount(labels, weights=own, minlength=probs.shape[1])
    return np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)


def pooled(*probs: np.ndarray) -> np.ndarray:
    """One opinion of several, each (N, K): their geometric mean, made to sum to 1. Float64."""
    logs = np.mean([np.log(np.maximum(one, FLOOR)) for one in probs], axis=0, dtype=np.float64)
    raised = np.exp(logs - logs.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def suggested(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The most probable other class of each picture, (N,) int64. Raises ValueError for K < 2."""
    _check(probs, labels)
    if probs.shape[1] < 2:
        raise ValueError("one class has no other")
    return _others(probs, labels).argmax(axis=1)


def suspects(probs: np.ndarray, labels: np.ndarray, how: str = "self") -> Suspects:
    """The pictures to which another class is more probable than their own, the most suspicious
    first by the score `how` (of two alike, the earlier one). Raises ValueError as `scores` does."""
    found = scores(probs, labels, how)
    doubted = np.flatnonzero(scores(probs, labels, "margin") > 0)
    order = doubted[np.argsort(-found[doubted], kind="stable")]
    return Suspects(order, found[order])


def _others(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The probabilities with -inf at each picture's own class."""
    rest = np.array(probs, np.float64)
    rest[np.arange(len(labels)), labels] = -np.inf
    return rest


def _check(probs: np.ndarray, labels: np.ndarray) -> None:
    if probs.ndim != 2 or labels.shape != (len(probs),):
        raise ValueError(f"probabilities {probs.shape} and labels {labels.shape}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < probs.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, {probs.shape[1]} classes")
