# SPDX-License-Identifier: Apache-2.0
"""Multi-resolution training: every picture at several sizes, each learning from the next larger.

"ResFormer: Scaling ViTs with Multi-Resolution Training", Tian et al., arXiv 2212.00776, CVPR 2023,
section 3.2. With sizes s_1 > s_2 > … > s_r and f_i what the classifier reads at size s_i:

    L = 1/r sum_i [CE(y_i) + 1[i > 1] alpha SmoothL1(f_i, LN(stopgrad f_(i-1)))]

SmoothL1 has beta = 1 and is the mean over channels; LN has no weights and an eps of 1e-6, and
whitens the teacher alone. Each size is augmented for itself (`Inputs.views`); mixing is drawn once:
the same partners and weights for all sizes, boxes in proportion, the labels those of the largest.
The features may also be the mean of the patches, or the logits, which are not whitened; and be
compared by squared difference, cosine or Kullback-Leibler divergence.

The network need not be a ResFormer: any that takes several sizes will do (`training/sizes.py`).
Departures: of a network without class token, f is what its classifier reads; one backward pass; no
mixing apart for each size (the authors' `sep-mix`, which no released model was trained with).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.models.crossvit import CrossViT
from crosspatch.objectives import Inputs
from crosspatch.objectives.options import Options
from crosspatch.objectives.supervised import Supervised
from crosspatch.tokens.host import reducers_of

EPS = 1e-6
TARGETS = ("class", "mean", "logits")


def whiten(features: Tensor) -> Tensor:
    """(B, C), each row to mean 0 and variance 1."""
    return F.layer_norm(features, features.shape[-1:], eps=EPS)


def _smooth_l1(student: Tensor, teacher: Tensor) -> Tensor:
    return F.smooth_l1_loss(student, teacher, reduction="none").mean(dim=-1)


def _l2(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher, reduction="none").mean(dim=-1)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    names, wanted = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    return F.kl_div(names, wanted, reduction="none", log_target=True).sum(dim=-1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smooth-l1": _smooth_l1,
    "l2": _l2,
    "cosine": _cosine,
    "kl": _kl,
}
OPTIONS = {
    "alpha": "weight of the consistency, 0 or more (1)",
    "loss": f"one of {', '.join(LOSSES)} (smooth-l1)",
    "target": "class, mean (of patch tokens) or logits: what is compared (class)",
}


def consistency(
    student: Tensor, teacher: Tensor, loss: str = "smooth-l1", *, whitened: bool = True
) -> Tensor:
    """(B,): how far each row of `student` (B, C) is from that of `teacher` (B, C), which gets no
    gradient. loss: one of LOSSES; whitened: whether the teacher is."""
    teacher = teacher.detach().float()
    return LOSSES[loss](student.float(), whiten(teacher) if whitened else teacher)


class MultiSize(Supervised):
    """Trains `model` on labels at every size, and each size on what the next larger one finds.

    alpha: weight of the consistency, 0 or more; loss: one of LOSSES; target: what is compared, one
    of TARGETS; rules: of `Supervised`. Raises UsageError for a model that is no network of one
    size after another.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        *,
        alpha: float = 1.0,
        loss: str = "smooth-l1",
        target: str = "class",
        **rules: Any,
    ) -> None:
        super().__init__(model, task, **rules)
        require_resizable(model)
        self.alpha, self.loss, self.target = alpha, loss, target

    def forward(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """The mean over sizes and the global batch, in nats; parts: the mean consistency of a size
        with the next larger one."""
        images, targets, _ = self.mixed(inputs, progress)
        teacher, logits = self.seen(images)
        labelled, apart = self.task.loss(logits, targets), 0.0
        for view in inputs.views:
            images, _ = self.mix(inputs._replace(images=view))
            features, logits = self.seen(images)
            labelled = labelled + self.task.loss(logits, targets)
            how = {"whitened": self.target != "logits"}
            apart = apart + consistency(features, teacher, self.loss, **how)
            teacher = features
        total = (labelled + self.alpha * apart) / (1 + len(inputs.views))
        parts = {}
        if inputs.views:
            parts["consistency"] = apart.detach().mean() / len(inputs.views)  # type: ignore[union-attr]
        return {"loss": total.sum() * inputs.scale, "parts": parts}

    def seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) to what is compared (B, C), and logits (B, K)."""
        model: Any = self.model
        tokens = model.forward_features(images)
        logits = model.forward_head(tokens)
        if self.target == "logits":
            return logits, logits
        if self.target == "class":
            return model.forward_head(tokens, pre_logits=True), logits
        if tokens.ndim != 3:
            raise UsageError(
                "target=mean for a network without patch tokens",
                "a network whose classifier reads tokens, or target=class",
                "--objective resformer",
            )
        return tokens[:, getattr(model, "num_prefix_tokens", 0) :].mean(dim=1), logits

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        asked = Options("resformer", options, OPTIONS)
        return {
            "alpha": asked.number("alpha", 1.0),
            "loss": asked.word("loss", "smooth-l1", tuple(LOSSES)),
            "target": asked.word("target", "class", TARGETS),
        }


def require_resizable(model: nn.Module) -> None:
    """Raises UsageError for a network that is no network of one size after another."""
    if isinstance(model, CrossViT) or not hasattr(model, "forward_features"):
        why = "resizes everything to its branches' sizes" if isinstance(model, CrossViT) else (
            "does not say what its classifier reads"
        )  # fmt: skip
        raise UsageError(
            f"training at several sizes with a {type(model).__name__}, which {why}",
            "a network that computes at the size it is given",
            "--model resformer_tiny_patch16 (resformer_micro_32 for pictures of 32 pixels)",
        )
    if any(reducers_of(model)):
        raise refuse_reduced()


def refuse_reduced() -> UsageError:
    """Why a model with fewer tokens is not trained at several sizes."""
    return UsageError(
        "training at several sizes with a token reduction",
        "one of the two: a schedule of tokens belongs to one size",
        "leave --reduce or --sizes away",
    )
