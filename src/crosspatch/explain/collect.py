# SPDX-License-Identifier: Apache-2.0
"""What to collect next: how fast the errors of each class fall when there are more pictures of it.

A network cannot be trained several times for that. A linear classifier on features that nothing was
learnt for can: it is fitted to 1/8, 1/4, 1/2 and all of the training pictures, and its errors on
the test pictures give each class a power law (`metrics.learning_curve`). The network's own errors
are then taken to fall at the same rate. That is a rough guide, and its interval is wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from crosspatch.metrics.balanced_ridge import balanced_answers
from crosspatch.metrics.learning_curve import fit, shrunk

SIDE, CELLS, ANGLES = 32, 4, 8
"""Of the features: pixels of a picture, cells along a side, directions of gradients."""
SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
DRAWS = 3  # of each share but the last
LEAST = 5  # test pictures that a class needs for a law of its own
FEWEST = 8  # training pictures of a class from which an eighth is a picture


def fixed_features(pictures: np.ndarray) -> np.ndarray:
    """uint8 (N, 32, 32, 3) -> (N, 176) float32 that nothing was learnt for: of each of 4 x 4 cells
    the histogram of the directions of its gradients (Dalal and Triggs, CVPR 2005, section 6) and
    its mean colour. Of 10 classes of CIFAR-10 4,000 pictures teach them 51 % (ridge regression)."""
    parts = [pictures[i : i + 512] for i in range(0, len(pictures), 512)]
    width = CELLS * CELLS * (ANGLES + 3)
    found = [np.zeros((0, width), np.float32), *map(_features, parts)]
    return np.concatenate(found)


def _features(pictures: np.ndarray) -> np.ndarray:
    count, cell = len(pictures), SIDE // CELLS
    pixels = pictures.astype(np.float32) / 255
    grey, cells = pixels.mean(axis=3), (count, CELLS, cell, CELLS, cell)
    down, right = np.zeros_like(grey), np.zeros_like(grey)
    down[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    right[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    strength = np.hypot(right, down)
    angle = (np.arctan2(down, right) % np.pi / np.pi * ANGLES).astype(int) % ANGLES
    sums = [(strength * (angle == k)).reshape(cells).sum(axis=(2, 4)) for k in range(ANGLES)]
    edges = np.stack(sums, axis=-1).reshape(count, -1)
    edges = np.sqrt(edges / (edges.sum(axis=1, keepdims=True) + 1e-6))
    colour = pixels.reshape(*cells, 3).mean(axis=(2, 4)).reshape(count, -1)
    return np.concatenate([edges, colour], axis=1).astype(np.float32)


def learning(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: Sequence[str],
    seed: int = 0,
) -> dict[str, Any] | None:
    """{train, test (pictures), sizes, errors (shares of all test pictures), classes: [{name,
    exponent, error}]}; None where no class has pictures enough.

    train, test: features (N, D) and labels (N,). error: the exponent's standard error.
    """
    features, labels = train
    counts = np.bincount(labels, minlength=len(classes))
    support = np.bincount(test[1], minlength=len(classes))
    fit_for = [c for c in range(len(classes)) if counts[c] >= FEWEST and support[c] >= LEAST]
    if not fit_for:
        return None
    wrong = np.array([_wrong(train, test, share, len(classes), seed) for share in SHARES])
    laws = [
        fit([share * counts[c] for share in SHARES], wrong[:, c].tolist(), int(support[c]))
        for c in fit_for
    ]
    told = [
        {"name": classes[c], "exponent": law.exponent, "error": law.error}
        for c, law in zip(fit_for, shrunk(laws), strict=True)
    ]
    return {
        "train": len(features), "test": len(test[1]),
        "sizes": [round(share * len(features)) for share in SHARES],
        "errors": [float(row.sum() / len(test[1])) for row in wrong], "classes": told,
    }  # fmt: skip


def _wrong(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    share: float,
    classes: int,
    seed: int,
) -> np.ndarray:
    """(K,) test pictures of each class that are named wrongly after a share of the training
    pictures of each class; the mean over the draws."""
    features, labels = train
    draws, found = (1 if share == 1 else DRAWS), np.zeros(classes)
    for draw in range(draws):
        order = np.random.default_rng([seed, draw]).permutation(len(labels))
        rank = np.empty(len(labels), np.int64)
        for c in range(classes):
            mine = order[labels[order] == c]
            rank[mine] = np.arange(len(mine))
        counts = np.bincount(labels, minlength=classes)
        kept = rank < np.ceil(share * counts[labels])
        answers = balanced_answers(features[kept], labels[kept], test[0], classes)
        found += np.bincount(test[1][answers != test[1]], minlength=classes)
    return found / draws
