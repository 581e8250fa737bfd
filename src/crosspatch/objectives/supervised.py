# SPDX-License-Identifier: Apache-2.0
"""Learning from labels: the task's loss with label smoothing, batch mixing and class weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.mixing import Mixing, OneOf, draws
from crosspatch.objectives import Given, Inputs
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import MultiLabel


class Supervised(nn.Module):
    """Trains `model` on labels.

    model: (B, 3, H, W) -> logits (B, K), timm's contract; task: targets and loss; smoothing: label
    smoothing in [0, 1); mixer: picks the batch mixing of a step, or None; weights: how often a
    label of each class counts (K,), or nothing; deferred: from which part of the training on they
    do.
    """

    reads_warp = False
    """Whether `Inputs.warp` is asked for."""

    def __init__(
        self,
        model: nn.Module,
        task: Classify | MultiLabel,
        *,
        smoothing: float = 0.0,
        mixer: OneOf | None = None,
        weights: Sequence[float] = (),
        deferred: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.smoothing = smoothing
        self.mixer = mixer
        self.deferred = deferred
        self.weights: torch.Tensor | None
        given = torch.tensor(weights, dtype=torch.float32) if weights else None
        self.register_buffer("weights", given, persistent=False)

    def forward(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """The loss of one batch: the mean over the global batch, in nats."""
        images, targets, _ = self.mixed(inputs, progress)
        loss = self.task.loss(self.model(images), targets).sum() * inputs.scale
        return {"loss": loss, "parts": {}}

    def mixed(self, inputs: Inputs, progress: float) -> tuple[Tensor, Tensor, Mixing | None]:
        """Images and soft targets (B, K) of a batch after its mixing, and what was mixed."""
        images, mixing = inputs.images, None
        if self.mixer is not None:
            images, mixing = self.mixer(images, draws(*inputs.draw))
        weights = self.weights_at(progress)
        return images, self.task.targets(inputs.labels, mixing, self.smoothing, weights), mixing

    def weights_at(self, progress: float) -> Tensor | None:
        """How often a label of each class counts (K,), at this part of the training."""
        return self.weights if progress >= self.deferred else None

    @classmethod
    def build(
        cls, model: nn.Module, task: Classify | MultiLabel, rules: dict[str, Any], given: Given
    ) -> Supervised:
        """The objective of a recipe. rules: the keyword arguments of `Supervised`.

        Raises UsageError for options that it does not have, and for what it cannot work with.
        """
        if given.options:
            raise UsageError(
                f"options of an objective that has none: {', '.join(given.options)}",
                "its name alone",
                "leave what follows the colon away",
            )
        return cls(model, task, **rules)

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
