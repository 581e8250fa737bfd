# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours and class means of feature vectors, in plain numpy.

Distances are Euclidean. Everywhere `features` is (N, D) of finite numbers and `labels` is (N,) with
values in 0..K-1. Neighbours are exact, and of two that are equally far the one that comes first is
the nearer.
"""

from __future__ import annotations

import numpy as np

CHUNK = 1 << 22  # distances that are held at once
NEIGHBOURS = 10  # of a picture, that vote


def nearest(queries: np.ndarray, gallery: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(places in the gallery (Q, k) int64, distances (Q, k) float32), the nearest first.

    queries: (Q, D); gallery: (G, D); k: clamped to G. Raises ValueError for k below 1, an empty
    gallery and widths that differ.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries {queries.shape} and gallery {gallery.shape}")
    if k < 1 or not len(gallery):
        raise ValueError(f"the {k} nearest of {len(gallery)}")
    k = min(k, len(gallery))
    centre = gallery.mean(axis=0, dtype=np.float64)  # small numbers lose less in their squares
    asked, known = ((part - centre).astype(np.float32) for part in (queries, gallery))
    squares = np.square(known).sum(axis=1)
    places = np.empty((len(asked), k), np.int64)
    distances = np.empty((len(asked), k), np.float32)
    for at in range(0, len(asked), step := max(1, CHUNK // len(known))):
        rows = slice(at, at + step)
        rough = squares - 2 * asked[rows] @ known.T
        places[rows], distances[rows] = _ordered(asked[rows], known, rough, k)
    return places, distances


def _ordered(
    asked: np.ndarray, known: np.ndarray, rough: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best by `rough`, which rounds, and some more, put in order by their differences."""
    count = min(len(known), k + 4)
    some = np.sort(np.argpartition(rough, count - 1, axis=1)[:, :count], axis=1)
    exact = np.stack(
        [np.linalg.norm(known[own] - one, axis=1) for own, one in zip(some, asked, strict=True)]
    )
    order = np.argsort(exact, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(some, order, 1), np.take_along_axis(exact, order, 1)


def class_means(features: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The mean of each class, (K, D) float64; NaN for one without a picture."""
    _check(features, labels, classes)
    sums = np.zeros((classes, features.shape[1]))
    np.add.at(sums, labels, features)
    counts = np.bincount(labels, minlength=classes)[:, None]
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def nearest_mean(features: np.ndarray, means: np.ndarray) -> np.ndarray:
    """The class (N,) int64 whose mean (K, D) is nearest; means of NaN are passed over.

    Raises ValueError where no class has a mean.
    """
    known = np.flatnonzero(np.isfinite(means).all(axis=1))
    return known[nearest(features, means[known], 1)[0][:, 0]]


def crossvalidated_neighbours(
    features: np.ndarray, labels: np.ndarray, k: int = NEIGHBOURS, classes: int | None = None
) -> np.ndarray:
    """Probabilities (N, K) float64 of each picture's class by the labels of its k nearest others.

    The picture itself has no vote: this is cross-validation with as many folds as pictures. A vote
    counts 1 / distance, relative to the nearest; one more vote is divided as all labels are, so
    that no probability is 0. classes: K, None for the greatest label + 1. A lone picture gets that
    last vote alone. Raises ValueError for k below 1 and for labels that do not fit.
    """
    classes = int(labels.max(initial=0)) + 1 if classes is None else classes
    _check(features, labels, classes)
    if k < 1:
        raise ValueError(f"the {k} nearest")
    count = len(features)
    if not count:
        return np.zeros((0, classes))
    prior = np.bincount(labels, minlength=classes) / count
    if count == 1:
        return prior[None].copy()
    places, distances = nearest(features, features, min(k + 1, count))
    own = places == np.arange(count)[:, None]
    own[~own.any(axis=1), -1] = True  # copies of it are nearer than it is itself: the last goes
    others = places[~own].reshape(count, -1)
    far = distances[~own].reshape(count, -1).astype(np.float64)
    floor = np.maximum(far[:, :1], 1e-12)
    votes = floor / np.maximum(far, floor)
    votes *= votes.shape[1] / votes.sum(axis=1, keepdims=True)
    probs = np.tile(prior, (count, 1))
    rows = np.repeat(np.arange(count), others.shape[1])
    np.add.at(probs, (rows, labels[others].ravel()), votes.ravel())
    return probs / probs.sum(axis=1, keepdims=True)


def _check(features: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if features.ndim != 2 or labels.shape != (len(features),):
        raise ValueError(f"features {features.shape} and labels {labels.shape}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {classes} classes")
