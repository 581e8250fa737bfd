# SPDX-License-Identifier: Apache-2.0
"""Learning from labels: the task's loss with label smoothing, batch mixing and class weights.

Where a mixing's label follows the attention (`Mixing.rule`), the pass that gives the logits gives
the class token's attention too; with several class tokens (CrossViT) the share of attention is the
mean over them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.mixing import AREA, PROGRESSIVE, Mixing, OneOf, draws
from crosspatch.mixing.mixpro import attention_share, progressive
from crosspatch.mixing.transmix import halfway
from crosspatch.models.class_row import ClassRow, logits_and_class_rows
from crosspatch.objectives import Given, Inputs
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import MultiLabel


def mean_weight(weights: Tensor) -> Tensor:
    """weights (B,) of the pictures of this process -> their mean over all processes, a scalar.

    A loss that is divided by it is divided by the sum of the weights, not by the pictures.
    """
    total = torch.stack([weights.sum(), weights.new_tensor(float(len(weights)))])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total[0] / total[1]


class Supervised(nn.Module):
    """Trains `model` on labels.

    model: (B, 3, H, W) -> logits (B, K), timm's contract; task: targets and loss; smoothing: label
    smoothing in [0, 1); mixer: picks the batch mixing of a step, or None; weights: how often a
    label of each class counts (K,), or nothing; deferred: from which part of the training on they
    do.
    """

    weighted_mean = False
    """Whether a loss with weights is divided by the sum of the weights in the batch, as torch's
    cross-entropy does, and not by the number of pictures."""

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
        logits, targets = self.answered(inputs, progress)
        loss = self.task.loss(logits, targets).sum() * inputs.scale
        return {"loss": loss, "parts": {}}

    def answered(self, inputs: Inputs, progress: float) -> tuple[Tensor, Tensor]:
        """The model's logits (B, K) and the soft targets (B, K) of a batch after its mixing, by the
        rule of that mixing.

        Processes draw mixings of their own, so whatever they ask of each other (`targets` does) is
        asked once by each rule.
        """
        images, mixing = self.mix(inputs)
        if mixing is None or mixing.rule == AREA:
            return self.model(images), self.targets(inputs.labels, mixing, progress)
        logits, rows = logits_and_class_rows(self.model, images)
        soft = self.task.targets(inputs.labels, mixing, self.smoothing)
        told = mixing._replace(lam=attended_lam(mixing, rows, soft, logits))
        smoothing = 0.0 if mixing.rule == PROGRESSIVE else self.smoothing
        return logits, self.targets(inputs.labels, told, progress, smoothing)

    def mixed(self, inputs: Inputs, progress: float) -> tuple[Tensor, Tensor, Mixing | None]:
        """Images and soft targets (B, K) of a batch after its mixing, and what was mixed."""
        images, mixing = self.mix(inputs)
        return images, self.targets(inputs.labels, mixing, progress), mixing

    def mix(self, inputs: Inputs) -> tuple[Tensor, Mixing | None]:
        """Images of a batch after its mixing, and what was mixed."""
        if self.mixer is None:
            return inputs.images, None
        return self.mixer(inputs.images, draws(*inputs.draw))

    def targets(
        self, labels: Tensor, mixing: Mixing | None, progress: float, smoothing: float | None = None
    ) -> Tensor:
        """What the task's loss takes for these labels: smoothed, mixed, weighted (B, K); smoothing:
        another than the objective's own."""
        weights = self.weights_at(progress)
        smoothing = self.smoothing if smoothing is None else smoothing
        targets = self.task.targets(labels, mixing, smoothing, weights)
        if weights is None or not self.weighted_mean:
            return targets
        return targets / mean_weight(targets.sum(dim=1))  # a row sums to its picture's weight

    def weights_at(self, progress: float) -> Tensor | None:
        """How often a label of each class counts (K,), at this part of the training."""
        return self.weights if progress >= self.deferred else None

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments that the options of a recipe's objective stand for. Raises
        UsageError for unknown and impossible ones."""
        if options:
            raise UsageError(
                f"options of an objective that has none: {', '.join(options)}",
                "its name alone",
                "leave what follows the colon away",
            )
        return {}

    @classmethod
    def build(
        cls, model: nn.Module, task: Classify | MultiLabel, rules: dict[str, Any], given: Given
    ) -> Supervised:
        """The objective of a recipe. rules: the keyword arguments of `Supervised`.

        Raises UsageError for options that it does not have, and for what it cannot work with.
        """
        return cls(model, task, **cls.read(given.options), **rules)

    @property
    def exported(self) -> nn.Module:
        return self.model

    @property
    def averaged(self) -> nn.Module:
        return self.model

    @property
    def remarks(self) -> list[str]:
        """What is said of it beside the plan's reasons, in sentences."""
        return []

    def no_decay(self) -> set[str]:
        """The names that the model's own `no_weight_decay` gives, as this module names them."""
        if not hasattr(self.model, "no_weight_decay"):
            return set()
        return {f"model.{name}" for name in self.model.no_weight_decay()}


def attended_lam(mixing: Mixing, rows: Sequence[ClassRow], soft: Tensor, logits: Tensor) -> Tensor:
    """How often the own label of each mixed image counts, (B,), by a rule that asks the attention.

    rows: of `logits_and_class_rows`; soft: the labels mixed by area (B, K); logits: (B, K).
    """
    mask, mode = mixing.mask, "area" if mixing.rule == PROGRESSIVE else "nearest"
    if mask is None:
        raise ValueError(f"a mixing without a mask cannot follow the rule {mixing.rule!r}")
    shares = []
    for row in rows:
        seen = mask[:, :, : row.extent[0], : row.extent[1]]
        kept = F.interpolate(seen, row.grid, mode=mode).flatten(1)
        shares.append(attention_share(row.attention, kept))
    share = torch.stack(shares).mean(dim=0)
    if mixing.rule == PROGRESSIVE:
        return progressive(mixing.lam, share, soft, logits)
    return halfway(mixing.lam, share)
