# SPDX-License-Identifier: Apache-2.0
"""Logit adjustment: what training pictures say of the frequency of a class is taken out.

"Long-tail Learning via Logit Adjustment", Menon, Jayasumana, Rawat, Jain, Veit and Kumar, arXiv
2007.07314, equation 10. While it trains, a class of the share p of the training pictures has its
logit raised by tau log p; what the network learns besides is the answer for classes that come
equally often, and so it is used without. tau = 1 is consistent with the balanced error
(theorem 1). Smoothing and mixing soften the labels as ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from crosspatch.objectives import Given, Inputs
from crosspatch.objectives.options import Options
from crosspatch.objectives.supervised import Supervised
from crosspatch.objectives.uneven import require_counts

OPTIONS = {"tau": "how much is taken out, tau above 0, up to 10 (1)"}


def adjustment(counts: Tensor, tau: float = 1.0) -> Tensor:
    """counts (K,) training pictures of each class, at least 1 -> tau log of their shares, (K,)
    float32. Raises ValueError for a class without a picture."""
    if not len(counts) or counts.min() < 1:
        raise ValueError("a class without a training picture has no logarithm of its share")
    shares = counts.double() / counts.sum()
    return (tau * shares.log()).float()


class LogitAdjust(Supervised):
    """Trains `model` on labels with adjusted logits. counts: (K,) training pictures of each class;
    tau: how much of the adjustment; rules: see `Supervised`. Raises UsageError for a class without
    a training picture."""

    adjustment: Tensor

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        *,
        counts: Sequence[int],
        tau: float = 1.0,
        **rules: Any,
    ) -> None:
        super().__init__(model, task, **rules)
        require_counts("logit-adjust", counts, task)
        self.register_buffer("adjustment", adjustment(torch.tensor(counts), tau), persistent=False)

    def forward(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """The loss of one batch: the mean over the global batch, in nats."""
        images, targets, _ = self.mixed(inputs, progress)
        loss = self.task.loss(self.model(images).float() + self.adjustment, targets)
        return {"loss": loss.sum() * inputs.scale, "parts": {}}

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        asked = Options("logit-adjust", options, OPTIONS)
        return {"tau": asked.number("tau", 1.0, above=True, high=10.0)}

    @classmethod
    def build(cls, model: nn.Module, task: Any, rules: dict[str, Any], given: Given) -> Self:
        return cls(model, task, counts=given.counts, **cls.read(given.options), **rules)
