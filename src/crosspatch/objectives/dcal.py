# SPDX-License-Identifier: Apache-2.0
"""DCAL's training: three branches learn from the labels, their weights are learnt too.

"Dual Cross-Attention Learning for Fine-Grained Visual Categorization and Object
Re-Identification", Zhu, Ke, Li, Liu, Tian, Shan, arXiv 2205.02151, CVPR 2022. With L the task's
loss of SA's, GLCA's and PWCA's logits (`tokens/dcal.py`) for the same labels:

    loss = 1/2 sum_i (exp(-w_i) L_i + w_i),   w_i learnt, 0 at first, not decayed

PWCA's class token goes through SA's norm and head; its label is that of the picture, not of the
partner. Both passes start from the same embedding. The partners of a step are drawn from its
number, from the pictures of the process. Batch mixing is refused: what a partner is to a mixed
picture is untested. The paper's triplet loss for re-identification is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.mixing import OneOf, draws
from crosspatch.models.crossvit import CrossViT
from crosspatch.objectives import Inputs
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import MultiLabel
from crosspatch.tokens.dcal import DCAL, PairWise, pair, paired
from crosspatch.tokens.host import reducers_of

NAMES = ("sa", "glca", "pwca")


class DualCross(Supervised):
    """Trains a model that has GLCA in it (`xp.reduce(model, "dcal")`) by SA, GLCA and PWCA.

    The arguments are those of `Supervised`. On a CrossViT every branch of the loss is the mean of
    the logits over its streams, GLCA over those that have it. Raises UsageError for a model without
    GLCA, for one whose answers are not of the task's kind, and for a mixer.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Classify | MultiLabel,
        *,
        mixer: OneOf | None = None,
        **rules: Any,
    ) -> None:
        _check(model, task, mixer)
        super().__init__(model, task, **rules)
        self.loss_weights = nn.Parameter(torch.zeros(len(NAMES)))

    def forward(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """The loss of one batch; parts: the three branches' own, means over the global batch."""
        count = inputs.images.shape[0]
        partner = pair(count, draws(*inputs.draw), inputs.images.device)
        targets = self.targets(inputs.labels, None, progress)
        losses = torch.stack(
            [
                self.task.loss(logits, targets).sum() * inputs.scale
                for logits in branches(self.model, inputs.images, partner)
            ]
        )
        w = self.loss_weights
        share = inputs.scale * count  # of the global batch: shares of a step average to 1
        loss = ((-w).exp() * losses + w * share).sum() / 2
        return {"loss": loss, "parts": dict(zip(NAMES, losses.detach(), strict=True))}

    def no_decay(self) -> set[str]:
        """The model's own, and the weights of the losses."""
        return super().no_decay() | {"loss_weights"}


def branches(model: Any, images: Tensor, partner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K) of SA, GLCA and PWCA for images (B, 3, H, W), partner (B,) distracting them."""
    embedded = model.embed(images)
    if isinstance(model, CrossViT):
        final, _ = model.run(embedded)
        told = [paired(state, partner) for state in embedded]
        distracted, _ = model.run(told, reducers=[PairWise()] * len(told))
        streams = zip(reducers_of(model), final, strict=True)
        glca = [r.logits(state) for r, state in streams if isinstance(r, DCAL)]
        mine = torch.stack(glca).mean(dim=0)
    else:
        final, _ = model.run(embedded, pooled=True)
        distracted, _ = model.run(paired(embedded, partner), pooled=True, reducer=PairWise())
        mine = model.reducer.logits(final)
    sa, pwca = (model.classify(model.pool(states)) for states in (final, distracted))
    return sa, mine, pwca


def _check(model: nn.Module, task: Classify | MultiLabel, mixer: OneOf | None) -> None:
    found = [r for r in reducers_of(model) if isinstance(r, DCAL)]
    if not found:
        raise UsageError("a model without GLCA", "one with it", "--reduce dcal")
    several = task.name == "multilabel"
    if any(r.multilabel != several for r in found):
        raise UsageError(
            f"GLCA that answers with {'softmax' if several else 'sigmoids'}, in {task.name}",
            "multilabel=yes where a picture may have several classes, else no",
            f"--reduce dcal:multilabel={'yes' if several else 'no'}",
        )
    if mixer is not None:
        raise UsageError(
            "batch mixing together with DCAL",
            "pictures of one class each: a partner distracts them as it is",
            "leave the mixing out of the recipe (mix = [])",
        )
