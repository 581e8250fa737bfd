# SPDX-License-Identifier: Apache-2.0
"""Classification: one class per picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crosspatch.metrics import classification as numbers
from crosspatch.metrics.calibration import apply_temperature, fit_temperature
from crosspatch.mixing import Mixing
from crosspatch.tasks import class_figures, plain

PREDICTION_COLUMNS = (
    "path", "split", "label", "prediction", "correct", "confidence", "label_probability",
)  # fmt: skip
TOP = 5  # the second accuracy that is reported, clamped to the number of classes


class Classify:
    """The task of naming the one class of a picture. classes: names in label order."""

    name = "classify"
    merit = "val_accuracy"
    columns = PREDICTION_COLUMNS
    thresholds: tuple[float, ...] = ()

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)

    def targets(
        self,
        labels: Tensor,
        mixing: Mixing | None,
        smoothing: float,
        weights: Tensor | None = None,
    ) -> Tensor:
        """labels (B,) int64 -> soft targets (B, K) float32, rows sum to 1, or with `weights` (K,)
        to the weight of the label.

        Smoothing comes first (off = s/K, on = 1 - s + s/K), then the weight of the label, then
        lam * own + (1 - lam) * partner's.
        """
        count = len(self.classes)
        rest = smoothing / count
        soft = F.one_hot(labels, count).to(torch.float32) * (1 - smoothing) + rest
        if weights is not None:
            soft = soft * weights[labels].view(-1, 1)
        if mixing is None:
            return soft
        return torch.lerp(soft[mixing.partner], soft, mixing.lam.view(-1, 1))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy per picture (B,), in nats; logits and targets (B, K)."""
        return -(targets * F.log_softmax(logits.float(), dim=-1)).sum(dim=-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits (B, K) -> probabilities (B, K) float32."""
        return F.softmax(logits.float(), dim=-1)

    def fit_temperature(self, probs: np.ndarray, labels: np.ndarray) -> float:
        """What logits are to be divided by."""
        return fit_temperature(probs, labels)

    def calibrated(self, probs: np.ndarray, temperature: float) -> np.ndarray:
        """Probabilities at temperature 1 as they are at `temperature`."""
        return apply_temperature(probs, temperature)

    def likelihood(self, probs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """nll (nats per picture) and ece of some pictures, at least one."""
        return {"nll": numbers.nll(probs, labels), "ece": numbers.ece(probs, labels)}

    def with_thresholds(self, probs: np.ndarray, labels: np.ndarray) -> Classify:
        """Itself: the most probable class needs no threshold."""
        del probs, labels
        return self

    def brief(self, probs: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> dict[str, Any]:
        """The figures of a validation during training, as in metrics.csv."""
        probs, labels = np.asarray(probs), np.asarray(labels)
        low, high = numbers.accuracy_interval(probs, labels)
        return {
            "val_loss": plain(numbers.nll(probs, labels)),
            "val_accuracy": plain(numbers.accuracy(probs, labels)),
            "val_low": low,
            "val_high": high,
            "val_map": None,
        }

    def metrics(self, probs: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> dict[str, Any]:
        """Every figure of one split, ready for JSON.

        probs: (N, K); labels: (N,). Keys: images, accuracy, low, high (95 % Wilson), topk {k,
        accuracy}, macro_f1, nll (nats), ece (15 bins), classes (list: name, precision, recall,
        recall_low, recall_high, f1, support), confusion (K x K, rows are the true classes).
        A figure without a denominator is None.
        """
        probs, labels = np.asarray(probs), np.asarray(labels)
        table = numbers.confusion(probs.argmax(axis=1), labels, len(self.classes))
        low, high = numbers.accuracy_interval(probs, labels)
        k = min(TOP, len(self.classes))
        return {
            "images": len(labels),
            "accuracy": plain(numbers.accuracy(probs, labels)),
            "low": low,
            "high": high,
            "topk": {"k": k, "accuracy": plain(numbers.topk(probs, labels, k))},
            "macro_f1": plain(numbers.macro_f1(table)),
            "nll": plain(numbers.nll(probs, labels)),
            "ece": plain(numbers.ece(probs, labels)),
            "classes": self._class_rows(table),
            "confusion": table.tolist(),
        }

    def _class_rows(self, table: np.ndarray) -> list[dict[str, Any]]:
        figures = numbers.per_class(table)
        return [
            {"name": name, **class_figures(figures, place, int(table[place, place]))}
            for place, name in enumerate(self.classes)
        ]

    def predictions(
        self, keys: Sequence[str], labels: np.ndarray | Sequence[int], probs: np.ndarray, split: str
    ) -> Iterator[dict[str, Any]]:
        """One row of `PREDICTION_COLUMNS` per picture; keys are paths relative to the data."""
        for key, label, row in zip(keys, labels, np.asarray(probs), strict=True):
            said = int(row.argmax())
            yield {
                "path": key,
                "split": split,
                "label": self.classes[int(label)],
                "prediction": self.classes[said],
                "correct": int(said == int(label)),
                "confidence": f"{row[said]:.6f}",
                "label_probability": f"{row[int(label)]:.6f}",
            }
