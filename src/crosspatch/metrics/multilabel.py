# SPDX-License-Identifier: Apache-2.0
"""Metrics of several labels to a picture, in plain numpy.

Everywhere `probs` and `labels` are (N, K): a probability, and 0 or 1, for every class on its own.
`said` is (N, K) bool: the labels that a model gives. A figure without a denominator is NaN.

Average precision is the area under the steps of the precision-recall curve (Manning, Raghavan and
Schütze 2008, "Introduction to Information Retrieval", section 8.4):

    AP = sum_n (R_n - R_(n-1)) P_n

over the distinct probabilities, greatest first; nothing is interpolated. Pictures of the same
probability come in at once, so that their order does not matter. mAP is its mean over the classes
of which there is a picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np

from crosspatch.metrics.classification import TINY, PerClass

DRAWS = 1000  # bootstrap samples
AT_ONCE = 50  # of them are computed together: more fall out of the processor's cache
_STREAM = 0x6D415000


def average_precision(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """AP of every class (K,), NaN for one of which there is no picture."""
    whole = np.ones((len(labels), 1), np.float32)
    ranked = [_precisions(probs[:, k], labels[:, k], whole)[0] for k in range(labels.shape[1])]
    return np.array(ranked, np.float64)


def mean_average_precision(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean AP over the classes of which there is a picture."""
    return _mean(average_precision(probs, labels))


def map_interval(
    probs: np.ndarray, labels: np.ndarray, seed: int = 0, draws: int = DRAWS
) -> tuple[float, float]:
    """95 % interval of the mAP: percentiles of its value over pictures drawn with replacement.

    The bootstrap of Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3. A
    pure function of its arguments. NaN where no class has a picture, and where every draw has the
    same value, as when each class is ranked without a fault: then it says nothing.
    """
    if not labels.any():
        return float("nan"), float("nan")
    found = [
        _means(
            np.stack(
                [_precisions(probs[:, k], labels[:, k], weights) for k in range(labels.shape[1])]
            )
        )
        for weights in _resampled(len(labels), draws, seed)
    ]
    low, high = np.nanpercentile(np.concatenate(found), [2.5, 97.5])
    return (float(low), float(high)) if low < high else (float("nan"), float("nan"))


def _resampled(count: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each picture is drawn, (N, D) float32, `draws` columns in all."""
    rng = np.random.default_rng([_STREAM, seed])
    for start in range(0, draws, AT_ONCE):
        wide = min(AT_ONCE, draws - start)
        places = rng.integers(0, count, (count, wide)) * wide + np.arange(wide)
        counted = np.bincount(places.ravel(), minlength=wide * count)
        yield counted.reshape(count, wide).astype(np.float32)


def _precisions(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AP of one class (D,) where picture n counts `weights[n]` times (N, D)."""
    order = np.argsort(-probs, kind="stable")
    ranked, hits = probs[order], labels[order] > 0
    if not hits.any():
        return np.full(weights.shape[1], np.nan)
    last = np.searchsorted(-ranked, -ranked[hits], side="right") - 1  # of equal probabilities
    shown = weights[order]
    seen = shown.cumsum(axis=0)[last]
    own = shown[hits]
    # of equal probabilities all hits are found once the last of them has come
    found = own.cumsum(axis=0)[np.searchsorted(last, last, side="right") - 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(seen > 0, found / seen, 0)
        return (own * precision).sum(axis=0, dtype=np.float64) / own.sum(axis=0)


def _means(per_class: np.ndarray) -> np.ndarray:
    """(K, D) -> (D,), without the classes that have no value."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a draw without any label is NaN
        return np.nanmean(per_class, axis=0)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def per_class(said: np.ndarray, labels: np.ndarray) -> PerClass:
    """Precision, recall, F1 and support of each class."""
    truth = labels > 0
    hits, told, support = (said & truth).sum(0), said.sum(0), truth.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return PerClass(hits / told, hits / support, 2 * hits / (told + support), support)


def macro_f1(said: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 over the classes that occur, as truth or as prediction."""
    return _mean(per_class(said, labels).f1)


def micro_f1(said: np.ndarray, labels: np.ndarray) -> float:
    """F1 of all labels of all pictures together."""
    truth = labels > 0
    both = int(said.sum()) + int(truth.sum())
    return 2 * int((said & truth).sum()) / both if both else float("nan")


def exact(said: np.ndarray, labels: np.ndarray) -> int:
    """Pictures of which every label is right."""
    return int((said == (labels > 0)).all(axis=1).sum())


def hamming_loss(said: np.ndarray, labels: np.ndarray) -> float:
    """Share of wrong labels among all N x K."""
    return float((said != (labels > 0)).mean()) if labels.size else float("nan")


def nll(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood of a picture's labels in nats, summed over the classes."""
    if not len(labels):
        return float("nan")
    p = np.where(labels > 0, probs, 1 - probs.astype(np.float64))
    return float(-np.log(np.maximum(p, TINY)).sum(axis=1).mean())


def ece(probs: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of all N x K probabilities: over `bins` equal bins, how far their
    mean is from the share of labels that are there (Guo 2017, 1706.04599, of the probability of
    presence instead of the confidence of the top class)."""
    if not labels.size:
        return float("nan")
    flat = probs.astype(np.float64).ravel()
    place = np.clip(np.ceil(flat * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, weights=(labels.ravel() > 0) - flat, minlength=bins)
    return float(np.abs(gap).sum() / len(flat))


def best_thresholds(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(K,) float64: for each class the threshold with the best F1; a picture has the class from
    there on. 0.5 for a class of which there is no picture.

    Between two neighbouring probabilities every threshold says the same: 0.5 is taken where it lies
    there, else the middle. Of several equally good the one nearest to 0.5.
    """
    return np.array([_threshold(probs[:, k], labels[:, k] > 0) for k in range(labels.shape[1])])


def _threshold(probs: np.ndarray, truth: np.ndarray) -> float:
    if not truth.any():
        return 0.5
    edges, place = np.unique(probs.astype(np.float64), return_inverse=True)
    told = np.bincount(place)[::-1].cumsum()[::-1]  # pictures at or above each edge
    hits = np.bincount(place, weights=truth)[::-1].cumsum()[::-1]
    f1 = 2 * hits / (told + truth.sum())
    below = np.concatenate([[0.0], edges[:-1]])
    around = (below < 0.5) & (edges >= 0.5)
    candidates = np.where(around, 0.5, (below + edges) / 2)
    good = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(candidates[good][np.abs(candidates[good] - 0.5).argmin()])
