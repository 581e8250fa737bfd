# SPDX-License-Identifier: Apache-2.0
"""Evo-ViT's training: a head on the class token beside the one on the patches, and stages that are
single layers at first.

"Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer", arXiv 2108.01390, AAAI 2022.

    L = 0.5 CE(y, patches' head) + 0.5 CE(y, class token's head)

The first two thirds of the training select patches anew at every layer, the rest at every stage, as
evaluation does. Without a second head the loss is that of the model's own head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from crosspatch.models.crossvit import CrossViT
from crosspatch.objectives import Inputs
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import MultiLabel
from crosspatch.tokens.evovit import EvoViT
from crosspatch.tokens.host import reducers_of

SWITCH = 2 / 3  # of the training is layer-wise


class TwoHeads(Supervised):
    """Trains a `model` that is reduced by `evovit`; arguments are those of `Supervised`.

    On a CrossViT the logits of the class token's heads are averaged over the branches that have
    one, as its own are. Raises ValueError for a model without that reduction.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Classify | MultiLabel,
        **rules: Any,
    ) -> None:
        super().__init__(model, task, **rules)
        if not any(isinstance(one, EvoViT) for one in reducers_of(model)):
            raise ValueError(f"a {type(model).__name__} without evovit; reduce it with that first")

    def forward(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """The loss of one batch: the mean over the global batch, in nats; its halves as parts."""
        images, targets, _ = self.mixed(inputs, progress)
        logits, second = both_heads(self.model, images, layerwise=progress < SWITCH)
        loss = self.task.loss(logits, targets).sum() * inputs.scale
        if second is None:
            return {"loss": loss, "parts": {}}
        other = self.task.loss(second, targets).sum() * inputs.scale
        parts = {"patches": loss.detach(), "class": other.detach()}
        return {"loss": (loss + other) / 2, "parts": parts}


def both_heads(model: Any, images: Tensor, *, layerwise: bool) -> tuple[Tensor, Tensor | None]:
    """The logits (B, K) of the model's own head, and of the second ones on the class token or None
    where there is none.

    layerwise: every block is a stage, whatever the model's own stages are.
    """
    given = reducers_of(model)
    used: list[Any] = [r.layerwise() if layerwise and isinstance(r, EvoViT) else r for r in given]
    if isinstance(model, CrossViT):
        states, _ = model.run(model.embed(images), reducers=used)
        logits = model.classify(model.pool(states), states)
    else:
        state, _ = model.run(model.embed(images), pooled=True, reducer=used[0])
        states = [state]
        logits = used[0].decide(state, model.classify(model.pool(state)))
    rows = zip(used, states, strict=True)
    found = [r.second(s) for r, s in rows if isinstance(r, EvoViT)]
    second = [one for one in found if one is not None]
    return logits, sum(second[1:], second[0]) / len(second) if second else None
