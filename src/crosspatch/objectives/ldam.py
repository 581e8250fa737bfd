# SPDX-License-Identifier: Apache-2.0
"""LDAM: a wider margin for rarer classes.

"Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", Cao, Wei, Gaidon, Arechiga
and Ma, arXiv 1906.07413, equations 11 to 13. A class of n training pictures has the margin

    D = C / n^(1/4),    C such that the rarest class has `margin` (0.5)

and a picture of class y with the logits z the loss -log softmax(s (z - D_y e_y))_y, s = `scale`.
The paper defers the weights of the classes to the end of the training (DRW): `--balance drw`.

The authors' last layer gives cosines, in [-1, 1], which s = 30 makes logits of. Before the usual
linear layer s = 30 trained better than s = 1 as well (docs/longtail.md): its logits become so
much smaller, which the temperature, fitted after, takes back.

Departures: the authors train on labels as they are. A mixed picture has here the mixture of both
losses, each with the margin of its own label, and a smoothed label the margin of its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.objectives import Given, Inputs
from crosspatch.objectives.options import Options
from crosspatch.objectives.supervised import Supervised, mean_weight
from crosspatch.objectives.uneven import require_counts

SCALE = 30.0
OPTIONS = {
    "margin": "the rarest class's margin above 0, up to 10 (0.5)",
    "scale": "the logits' scale above 0, up to 1000 (30)",
}


def margins(counts: Tensor, most: float = 0.5) -> Tensor:
    """counts (K,) training pictures of each class, at least 1 -> margins (K,) float32, the largest
    of which is `most`. Raises ValueError for a class without a picture."""
    if not len(counts) or counts.min() < 1:
        raise ValueError("a class without a training picture has no margin")
    found = counts.double() ** -0.25
    return (found * (most / found.max())).float()


def ldam_loss(
    logits: Tensor, labels: Tensor, targets: Tensor, margins: Tensor, scale: float
) -> Tensor:
    """The loss per picture (B,), in nats: logits (B, K), labels (B,) whose margins count, targets
    (B, K) of the cross-entropy, margins (K,)."""
    wide = F.one_hot(labels, logits.shape[1]) * margins[labels].view(-1, 1)
    return -(targets * F.log_softmax(scale * (logits.float() - wide), dim=-1)).sum(dim=-1)


class Ldam(Supervised):
    """Trains `model` on labels with margins. counts: (K,) training pictures of each class; margin:
    of the rarest; scale: of the logits; rules: see `Supervised`. Raises UsageError for a class
    without a training picture."""

    margins: Tensor

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        *,
        counts: Sequence[int],
        margin: float = 0.5,
        scale: float = SCALE,
        **rules: Any,
    ) -> None:
        super().__init__(model, task, **rules)
        require_counts("ldam", counts, task)
        self.scale = scale
        self.register_buffer("margins", margins(torch.tensor(counts), margin), persistent=False)

    def forward(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """The loss of one batch, in nats."""
        images, mixing = self.mix(inputs)
        logits, labels, weights = self.model(images), inputs.labels, self.weights_at(progress)
        targets = self.task.targets(labels, None, self.smoothing, weights)
        loss, counted = ldam_loss(logits, labels, targets, self.margins, self.scale), targets.sum(1)
        if mixing is not None:
            partner, lam = mixing.partner, mixing.lam
            other = ldam_loss(logits, labels[partner], targets[partner], self.margins, self.scale)
            loss = lam * loss + (1 - lam) * other
            counted = lam * counted + (1 - lam) * counted[partner]
        if weights is not None and self.weighted_mean:
            loss = loss / mean_weight(counted)
        return {"loss": loss.sum() * inputs.scale, "parts": {}}

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        asked = Options("ldam", options, OPTIONS)
        return {
            "margin": asked.number("margin", 0.5, above=True, high=10.0),
            "scale": asked.number("scale", SCALE, above=True, high=1000.0),
        }

    @classmethod
    def build(cls, model: nn.Module, task: Any, rules: dict[str, Any], given: Given) -> Self:
        return cls(model, task, counts=given.counts, **cls.read(given.options), **rules)
