# SPDX-License-Identifier: Apache-2.0
"""Temperature scaling: one number that makes confidence mean what it says.

"On Calibration of Modern Neural Networks", Guo, Pleiss, Sun, Weinberger, arXiv 1706.04599, section
4.2: logits are divided by T, chosen to make the likelihood of held-out labels greatest. Accuracy
does not change.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from crosspatch.metrics.classification import TINY

LEAST, GREATEST = 0.01, 20.0
"""No temperature is looked for outside of these. A classifier of cosines needs about 1/30."""
GOLDEN = (5**0.5 - 1) / 2


def fit_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the least negative log-likelihood; 1.0 where there is no picture.

    probs: (N, K) of softmax at temperature 1 (their logarithms are logits up to a constant, which
    softmax ignores); labels: (N,). A label counts (N + 1) / (N + 2), the other classes share the
    rest, as in Platt's scaling: without it pictures that are all right would call for certainty.
    The loss is convex in 1/T, so a golden-section search over log T finds its minimum.
    """
    count, classes = probs.shape
    if not count or classes < 2:
        return 1.0
    logits = np.log(np.maximum(probs.astype(np.float64), TINY))
    own = logits[np.arange(count), labels]
    rest = (logits.sum(axis=1) - own) / (classes - 1)
    wanted = (own * (count + 1) + rest) / (count + 2)

    def loss(log_t: float) -> float:
        scaled = logits / np.exp(log_t)
        top = scaled.max(axis=1)
        total = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return float((total - wanted / np.exp(log_t)).mean())

    return _search(loss)


def fit_binary_temperature(probs: np.ndarray, labels: np.ndarray) -> float:
    """The one temperature of K sigmoids with the least negative log-likelihood; 1.0 where there is
    no picture.

    probs: (N, K) of sigmoids at temperature 1; labels: (N, K), 0 or 1. Being there or not counts
    (N + 1) / (N + 2), as in `fit_temperature`.
    """
    count = len(probs)
    if not count:
        return 1.0
    logits = _log_odds(probs)
    wanted = np.where(labels > 0, count + 1, 1) / (count + 2)

    def loss(log_t: float) -> float:
        scaled = logits / np.exp(log_t)
        return float((np.logaddexp(0, scaled) - wanted * scaled).mean())

    return _search(loss)


def _search(loss: Callable[[float], float]) -> float:
    """The temperature at which `loss` (of its logarithm) is least, by golden section."""
    low, high = np.log(LEAST), np.log(GREATEST)
    while high - low > 1e-4:
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return float(np.exp((low + high) / 2))


def _log_odds(probs: np.ndarray) -> np.ndarray:
    likely = probs.astype(np.float64)
    return np.log(np.maximum(likely, TINY)) - np.log(np.maximum(1 - likely, TINY))


def apply_temperature(probs: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (N, K) of softmax at temperature 1, as they are at `temperature`; float32."""
    scaled = np.log(np.maximum(probs.astype(np.float64), TINY)) / temperature
    scaled = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return (scaled / scaled.sum(axis=1, keepdims=True)).astype(np.float32)


def apply_binary_temperature(probs: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (N, K) of sigmoids at temperature 1, as they are at `temperature`; float32."""
    scaled = _log_odds(probs) / temperature
    return np.exp(-np.logaddexp(0, -scaled)).astype(np.float32)
