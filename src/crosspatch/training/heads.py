# SPDX-License-Identifier: Apache-2.0
"""What each head of a distilled network says by itself: the class token's, the distillation token's
and, for comparison, the mean of both, which is what is shipped (DeiT-LT, arXiv 2404.02900, table 6:
the first serves the frequent classes, the second the rare ones)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crosspatch.data.prepare import ImageSet
from crosspatch.metrics.tails import with_groups
from crosspatch.models.vit import VisionTransformer
from crosspatch.tasks.classify import Classify
from crosspatch.training.evaluation import predict_probabilities, softmax
from crosspatch.training.recipe import Recipe

NAMES = ("class", "distillation")
MEAN = "mean"
KEPT = ("accuracy", "low", "high", "groups")


class EachHead(nn.Module):
    """(B, 3, H, W) -> (B, 2 K): the logits of `model`'s class head, then of `second`, its other."""

    def __init__(self, model: VisionTransformer, second: nn.Module) -> None:
        super().__init__()
        self.model, self.second = model, second

    def forward(self, x: Tensor) -> Tensor:
        state, _ = self.model.run(self.model.embed(x), pooled=True)
        first, second = self.model.pool(state)
        return torch.cat([self.model.head(first), self.second(second)], dim=1)


def head_figures(
    model: nn.Module, images: ImageSet, recipe: Recipe, task: Any, whole: dict[str, Any]
) -> list[dict[str, Any]]:
    """[{name, accuracy, low, high, and groups where classes are uneven}] of the class head, the
    distillation head and their mean on these pictures; [] for a model that has one head.

    whole: the figures of the mean (`Classify.metrics`). All processes of the team take part.
    """
    if not isinstance(model, VisionTransformer) or model.head_dist is None:
        return []
    if not isinstance(task, Classify):
        return []
    logits = predict_probabilities(
        EachHead(model, model.head_dist),
        images,
        recipe.eval_batch,
        precision=recipe.precision,
        workers=recipe.workers,
        probabilities=Tensor.float,
        shared=True,
    )
    labels = images.labels.numpy()
    found = []
    for name, part in zip(NAMES, logits.chunk(2, dim=1), strict=True):
        metrics = task.metrics(softmax(part).numpy(), labels)
        found.append(_kept(name, with_groups(metrics, recipe.class_counts)))
    return [*found, _kept(MEAN, whole)]


def _kept(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, **{key: metrics[key] for key in KEPT if key in metrics}}
