# SPDX-License-Identifier: Apache-2.0
"""Multi-label classification: any number of classes to a picture, or none.

The loss of a picture is the sum over the classes of their binary cross-entropies in nats: the
negative log-likelihood of all its labels, as that of `classify` is of its one. The gradient of a
logit is probability minus target in both, so learning rates carry over; a mean over the classes
would make it K times weaker and leave the clipping of gradients without a meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crosspatch.data.labels import SEPARATOR
from crosspatch.metrics import multilabel as numbers
from crosspatch.metrics.calibration import apply_binary_temperature, fit_binary_temperature
from crosspatch.metrics.interval import wilson
from crosspatch.mixing import Mixing
from crosspatch.tasks import class_figures, plain

PREDICTION_COLUMNS = (
    "path", "split", "labels", "predictions", "correct", "confidence", "missed", "added",
)  # fmt: skip


class MultiLabel:
    """The task of naming all classes of a picture.

    classes: names in label order; thresholds: (K,) the probability from which on a picture has the
    class, () for 0.5 each.
    """

    name = "multilabel"
    merit = "val_map"
    columns = PREDICTION_COLUMNS

    def __init__(self, classes: Sequence[str], thresholds: Sequence[float] = ()) -> None:
        self.classes = tuple(classes)
        self.thresholds = tuple(float(t) for t in thresholds) or (0.5,) * len(self.classes)

    def targets(
        self,
        labels: Tensor,
        mixing: Mixing | None,
        smoothing: float,
        weights: Tensor | None = None,
    ) -> Tensor:
        """labels (B, K), 0 or 1 -> targets (B, K, 2) float32: what presence and absence count.

        Smoothing comes first: each class gives s / max(2, K) to the other answer, so that all of
        them together give what the one class of `classify` gives. Then presence counts `weights`
        (K,) times, then lam * own + (1 - lam) * partner's.
        """
        given = smoothing / max(2, len(self.classes))
        there = labels.to(torch.float32) * (1 - 2 * given) + given
        gain = there if weights is None else there * weights
        soft = torch.stack([gain, 1 - there], dim=-1)
        if mixing is None:
            return soft
        return torch.lerp(soft[mixing.partner], soft, mixing.lam.view(-1, 1, 1))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy per picture (B,), summed over the classes, in nats; logits (B, K),
        targets (B, K, 2)."""
        logits = logits.float()
        there, absent = targets.unbind(dim=-1)
        return -(there * F.logsigmoid(logits) + absent * F.logsigmoid(-logits)).sum(dim=-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits (B, K) -> probabilities (B, K) float64, in which certainty near 1 is not lost."""
        return torch.sigmoid(logits.double())

    def said(self, probs: np.ndarray) -> np.ndarray:
        """probs (N, K) -> bool (N, K): the classes that each picture is said to have."""
        return np.asarray(probs) >= np.asarray(self.thresholds)

    def fit_temperature(self, probs: np.ndarray, labels: np.ndarray) -> float:
        """One temperature for the logits of all classes."""
        return fit_binary_temperature(probs, labels)

    def calibrated(self, probs: np.ndarray, temperature: float) -> np.ndarray:
        """Probabilities at temperature 1 as they are at `temperature`."""
        return apply_binary_temperature(probs, temperature)

    def likelihood(self, probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """nll (nats per picture) and ece of some pictures, at least one."""
        return {"nll": numbers.nll(probs, labels), "ece": numbers.ece(probs, labels)}

    def with_thresholds(self, probs: np.ndarray, labels: np.ndarray) -> MultiLabel:
        """The task with the thresholds of the best F1 on these pictures."""
        return MultiLabel(self.classes, numbers.best_thresholds(probs, labels).tolist())

    def brief(self, probs: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> dict[str, Any]:
        """The figures of a validation during training, as in metrics.csv; accuracy is the share of
        pictures of which every label is right at 0.5."""
        probs, labels = np.asarray(probs), np.asarray(labels)
        right = numbers.exact(self.said(probs), labels)
        low, high = wilson(right, len(labels))
        return {
            "val_loss": plain(numbers.nll(probs, labels)),
            "val_accuracy": right / len(labels) if len(labels) else None,
            "val_low": low,
            "val_high": high,
            "val_map": plain(numbers.mean_average_precision(probs, labels)),
        }

    def metrics(self, probs: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> dict[str, Any]:
        """Every figure of one split, ready for JSON.

        probs, labels: (N, K). Keys: images, labels (that are there, of all pictures), map, map_low,
        map_high (95 %, bootstrap over pictures), accuracy (share of pictures with every label
        right), low, high (95 % Wilson), macro_f1, micro_f1, hamming (share of wrong labels), nll
        (nats per picture), ece (15 bins), classes (list: name, threshold, ap, precision, recall,
        recall_low, recall_high, f1, support). A figure without a denominator is None.
        """
        probs, labels = np.asarray(probs), np.asarray(labels)
        said = self.said(probs)
        right = numbers.exact(said, labels)
        low, high = wilson(right, len(labels))
        map_low, map_high = numbers.map_interval(probs, labels)
        return {
            "images": len(labels),
            "labels": int((labels > 0).sum()),
            "map": plain(numbers.mean_average_precision(probs, labels)),
            "map_low": plain(map_low),
            "map_high": plain(map_high),
            "accuracy": right / len(labels) if len(labels) else None,
            "low": low,
            "high": high,
            "macro_f1": plain(numbers.macro_f1(said, labels)),
            "micro_f1": plain(numbers.micro_f1(said, labels)),
            "hamming": plain(numbers.hamming_loss(said, labels)),
            "nll": plain(numbers.nll(probs, labels)),
            "ece": plain(numbers.ece(probs, labels)),
            "classes": self._class_rows(probs, said, labels),
        }

    def _class_rows(
        self, probs: np.ndarray, said: np.ndarray, labels: np.ndarray
    ) -> list[dict[str, Any]]:
        figures = numbers.per_class(said, labels)
        ranked, hits = numbers.average_precision(probs, labels), (said & (labels > 0)).sum(axis=0)
        return [
            {
                "name": name,
                "threshold": self.thresholds[place],
                "ap": plain(ranked[place]),
                **class_figures(figures, place, int(hits[place])),
            }
            for place, name in enumerate(self.classes)
        ]

    def predictions(
        self, keys: Sequence[str], labels: np.ndarray, probs: np.ndarray, split: str
    ) -> Iterator[dict[str, Any]]:
        """One row of `PREDICTION_COLUMNS` per picture; keys are paths relative to the data.

        Names are joined by `SEPARATOR`; confidence: the probabilities of what is said, alike.
        """
        said = self.said(probs)
        for key, label, row, told in zip(keys, labels, np.asarray(probs), said, strict=True):
            truth = np.asarray(label) > 0
            yield {
                "path": key,
                "split": split,
                "labels": self._names(truth),
                "predictions": self._names(told),
                "correct": int((truth == told).all()),
                "confidence": SEPARATOR.join(f"{p:.6f}" for p in row[told]),
                "missed": self._names(truth & ~told),
                "added": self._names(told & ~truth),
            }

    def _names(self, chosen: np.ndarray) -> str:
        return SEPARATOR.join(self.classes[k] for k in np.flatnonzero(chosen))
