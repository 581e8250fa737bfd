# SPDX-License-Identifier: Apache-2.0
"""A linear layer by least squares, its weights held small, in plain numpy.

Everywhere `features` is (N, D), `targets` (N, T), and a penalty counts the mean square of the
weights against the mean square of the errors. Features are brought to mean 0 and deviation 1 first;
the offset is free. One decomposition, of the smaller of the two Gram matrices, serves all penalties
and all pictures left out: N D min(N, D) multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PENALTIES = (0.001, 0.01, 0.1, 1.0)
FLAT = 1e-6  # a feature that deviates less than this is left as it is


class Layer(NamedTuple):
    """weight (D, T), offset (T,): `layer(features)` is (N, T) float32."""

    weight: np.ndarray
    offset: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return features.astype(np.float32) @ self.weight + self.offset


class _Parts(NamedTuple):
    """Scaled features with rows U and columns V of their singular vectors, as far as they are
    needed: values (R,) of the Gram matrix, left (N, R), back (D, R) with X^T U as columns."""

    values: np.ndarray
    left: np.ndarray
    back: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """labels (N,) -> targets (N, K) float32 of 0 and 1."""
    return np.eye(classes, dtype=np.float32)[labels]


def fit_layers(
    features: np.ndarray, targets: np.ndarray, penalties: Sequence[float] = PENALTIES
) -> list[Layer]:
    """A layer for each penalty. Raises ValueError for no picture, or features and targets of
    different lengths."""
    parts, middle = _parts(features, targets), targets.mean(axis=0)
    answer = parts.left.T @ (targets - middle)
    found = []
    for penalty in penalties:
        shrunk = answer / (parts.values + penalty * len(features))[:, None]
        weight = (parts.back @ shrunk) / parts.deviation[:, None]
        offset = middle - parts.mean @ weight
        found.append(Layer(weight.astype(np.float32), offset.astype(np.float32)))
    return found


def left_out(
    features: np.ndarray, targets: np.ndarray, penalties: Sequence[float] = PENALTIES
) -> list[np.ndarray]:
    """For each penalty what a layer fitted to all other pictures says of each one, (N, T) float32.

    Exact, without a fit for each (Allen 1974, Technometrics 16:125): the error of a picture that is
    left out is its error e / (1 - h), with h its own share in its answer. Raises ValueError for
    fewer than two pictures.
    """
    if len(features) < 2:
        raise ValueError(f"one left out of {len(features)}")
    parts, middle = _parts(features, targets), targets.mean(axis=0)
    answer, found = parts.left.T @ (targets - middle), []
    for penalty in penalties:
        kept = parts.values / (parts.values + penalty * len(features))
        said = middle + (parts.left * kept) @ answer
        own = (np.square(parts.left) @ kept + 1 / len(features))[:, None]
        found.append((targets - (targets - said) / np.maximum(1 - own, 1e-6)).astype(np.float32))
    return found


def _parts(features: np.ndarray, targets: np.ndarray) -> _Parts:
    if features.ndim != 2 or not len(features) or len(targets) != len(features):
        raise ValueError(f"features {features.shape} and targets {targets.shape}")
    mean = features.mean(axis=0, dtype=np.float64)
    deviation = features.std(axis=0, dtype=np.float64)
    deviation = np.where(deviation > FLAT, deviation, 1.0)
    scaled = ((features - mean) / deviation).astype(np.float32)
    tall = len(scaled) >= scaled.shape[1]
    gram = (scaled.T @ scaled if tall else scaled @ scaled.T).astype(np.float64)
    values, vectors = np.linalg.eigh(gram)
    good = values > max(values[-1], 0) * 1e-6
    if not good.any():  # all pictures are alike
        return _Parts(np.zeros(0), np.zeros((len(scaled), 0)), np.zeros((len(mean), 0)),
                      mean, deviation)  # fmt: skip
    values, vectors = values[good], vectors[:, good]
    if tall:
        left = scaled @ vectors / np.sqrt(values)
        return _Parts(values, left, vectors * np.sqrt(values), mean, deviation)
    return _Parts(values, vectors, scaled.T @ vectors, mean, deviation)
