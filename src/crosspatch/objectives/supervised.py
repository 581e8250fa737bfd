# SPDX-License-Identifier: Apache-2.0
"""Learning from labels: the task's loss with label smoothing, batch mixing and class weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from crosspatch.mixing import OneOf, draws
from crosspatch.objectives import Inputs
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import MultiLabel


class Supervised(nn.Module):
    """Trains `model` on labels.

    model: (B, 3, H, W) -> logits (B, K), timm's contract; task: targets and loss; smoothing: label
    smoothing in [0, 1); mixer: picks the batch mixing of a step, or None; weights: how often a
    label of each class counts (K,), or nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Classify | MultiLabel,
        *,
        smoothing: float = 0.0,
        mixer: OneOf | None = None,
        weights: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.smoothing = smoothing
        self.mixer = mixer
        self.weights: torch.Tensor | None
        given = torch.tensor(weights, dtype=torch.float32) if weights else None
        self.register_buffer("weights", given, persistent=False)

    def forward(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """The loss of one batch: the mean over the global batch, in nats."""
        del progress
        images, mixing = inputs.images, None
        if self.mixer is not None:
            images, mixing = self.mixer(images, draws(*inputs.draw))
        targets = self.task.targets(inputs.labels, mixing, self.smoothing, self.weights)
        loss = self.task.loss(self.model(images), targets).sum() * inputs.scale
        return {"loss": loss, "parts": {}}

    @property
    def exported(self) -> nn.Module:
        return self.model

    @property
    def averaged(self) -> nn.Module:
        return self.model

    def no_decay(self) -> set[str]:
        """The names that the model's own `no_weight_decay` gives, as this module names them."""
        if not hasattr(self.model, "no_weight_decay"):
            return set()
        return {f"model.{name}" for name in self.model.no_weight_decay()}
