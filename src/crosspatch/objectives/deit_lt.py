# SPDX-License-Identifier: Apache-2.0
"""DeiT-LT: distillation for long tails, in which the second token learns the rare classes.

"DeiT-LT: Distillation Strikes Back for Vision Transformer Training on Long-Tailed Datasets", arXiv
2404.02900, CVPR 2024, sections 3.1 to 3.3, as the authors' code computes it. z is the class token's
logits, z' the distillation token's, y the labels, y_t = argmax of the teacher's answer, w the
weights of the classes:

    L = (1 - a) CE(z, y) + a CE(z', y_t)                          up to the part `drw` of the run
    L = (1 - a) CE(z, y) + a sum w[y_t] CE(z', y_t) / sum w[y_t]  from there on

The teacher is a flat convolutional network that was trained on weakly augmented pictures. It sees
the student's own, strongly augmented and mixed, resized (bicubic) to its size: out-of-distribution
distillation, by which the two tokens learn different things. From `drw` on nothing is mixed or
smoothed. w_c = (1 - b) / (1 - b^n_c), b = 0.9999, scaled to sum to the number of classes. What is
exported gives the mean of both logits.

Options: `weighted_base=yes` weighs the first term as well; `kind=soft` takes the divergence of
`objectives.deit.soft_distillation` at temperature `tau` instead of y_t, which no weights enter (the
authors weigh hard labels alone). Departures: `drw` is a part of the run (they say an epoch: 1100 of
1200); their weights apply from the first epoch where that is left away, by an oversight, ours never
before it. The order of the classes is one for student and teacher, so that nothing is renumbered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.objectives import Given, Inputs
from crosspatch.objectives.deit import soft_distillation
from crosspatch.objectives.distill import has_token
from crosspatch.objectives.options import Options
from crosspatch.objectives.supervised import Supervised, mean_weight
from crosspatch.objectives.teacher import Teacher
from crosspatch.objectives.uneven import effective_weights, require_counts
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import MultiLabel

KINDS = ("hard", "soft")
OPTIONS = {
    "drw": "from which part of the run on rare classes weigh more, 0 to 1 (0.9)",
    "alpha": "the teacher's part of the loss, 0 to 1 (0.5)",
    "weighted_base": "yes: the labels' part is weighted too (no)",
    "kind": "hard or soft (hard)",
    "tau": "temperature of kind=soft, above 0 and up to 100 (3)",
}
"""What `--objective deit-lt:…` takes."""


class Loss(NamedTuple):
    """total: what is minimised; base: (1 - alpha) of the labels' part; distill: alpha of the
    teacher's. Scalars, in nats."""

    total: Tensor
    base: Tensor
    distill: Tensor


def deit_lt_loss(
    logits: Tensor,
    logits_dist: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    weights: Tensor | None = None,
    weighted_base: bool = False,
    kind: str = "hard",
    tau: float = 3.0,
) -> Loss:
    """The loss of one batch. logits, logits_dist, teacher: (B, K); labels: soft (B, K) or int64
    (B,); weights: (K,) of the classes, None before the deferred point.

    Raises ValueError for an alpha outside of [0, 1], another kind and a tau that is not above 0.
    """
    rows = _rows(logits, logits_dist, teacher, labels, weights, weighted_base, kind, tau)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is in [0, 1], got {alpha}")
    base, distill = (row.sum() / weight.sum() for row, weight in rows)
    return Loss((1 - alpha) * base + alpha * distill, (1 - alpha) * base, alpha * distill)


def _rows(
    logits: Tensor,
    logits_dist: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    weighted_base: bool,
    kind: str,
    tau: float,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of the labels' and of the teacher's part the loss of each picture (B,), times its weight, and
    those weights (B,)."""
    own = weights if weighted_base else None
    if kind not in KINDS:
        raise ValueError(f"kind is one of {KINDS}, got {kind!r}")
    if kind == "hard":
        return _row(logits, labels, own), _row(logits_dist, teacher.argmax(dim=-1), weights)
    whole = soft_distillation(logits, logits_dist, teacher, teacher, alpha=1.0, tau=tau)
    ones = whole.new_ones(len(logits))
    return _row(logits, labels, own), (whole * ones, ones)


def _row(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of each picture, and its weight (B,)."""
    chances = F.log_softmax(logits.float(), dim=-1)
    if labels.ndim == 1:
        labels = F.one_hot(labels, logits.shape[-1])
    if weights is not None:
        labels = labels * weights.to(chances.dtype)
        return -(labels * chances).sum(dim=-1), labels.sum(dim=-1)
    return -(labels * chances).sum(dim=-1), chances.new_ones(len(chances))


class DeitLT(Supervised):
    """Trains a `model` with a distillation token on labels and on a teacher's answers.

    teacher: see `objectives.teacher`; counts: (K,) training pictures of each class; drw, alpha,
    weighted_base, kind, tau: see the module; rules: see `Supervised`, without weights. Raises
    UsageError for a model without such a token, for several labels to a picture and for a class
    without a picture.
    """

    counted: Tensor

    def __init__(
        self,
        model: nn.Module,
        task: Classify | MultiLabel,
        *,
        teacher: Teacher,
        counts: Sequence[int],
        drw: float = 0.9,
        alpha: float = 0.5,
        weighted_base: bool = False,
        kind: str = "hard",
        tau: float = 3.0,
        **rules: Any,
    ) -> None:
        super().__init__(model, task, **rules)
        require_student(model)
        if isinstance(task, MultiLabel):
            raise UsageError(
                "the objective deit-lt for pictures with several labels",
                "one class to a picture: the teacher names one",
                "leave --objective away",
            )
        require_counts("deit-lt", counts, task)
        self.teacher, self.drw, self.alpha = teacher, drw, alpha
        self.weighted_base, self.kind, self.tau = weighted_base, kind, tau
        self.register_buffer("counted", effective_weights(counts).float(), persistent=False)
        self.model.set_distilled_training(True)  # type: ignore[operator]

    def forward(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """The loss of one batch, in nats; parts: class and distillation, as `Loss` has them."""
        late = progress >= self.drw
        images, labels = (inputs.images, inputs.labels) if late else self.blended(inputs)
        answer = self.teacher.logits(images)
        logits, logits_dist = self.model(images)
        weights = self.counted if late else None
        how = (weights, self.weighted_base, self.kind, self.tau)
        rows = _rows(logits, logits_dist, answer, labels, *how)
        base, distill = (
            row.sum() * inputs.scale / (mean_weight(weight) if weights is not None else 1)
            for row, weight in rows
        )
        base, distill = (1 - self.alpha) * base, self.alpha * distill
        parts = {"class": base.detach(), "distillation": distill.detach()}
        return {"loss": base + distill, "parts": parts}

    def blended(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Mixed images, and their smoothed and mixed targets (B, K)."""
        images, mixing = self.mix(inputs)
        return images, self.task.targets(inputs.labels, mixing, self.smoothing)

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        asked = Options("deit-lt", options, OPTIONS)
        return {
            "drw": asked.number("drw", 0.9, high=1.0),
            "alpha": asked.number("alpha", 0.5, high=1.0),
            "weighted_base": asked.switch("weighted_base", False),
            "kind": asked.word("kind", "hard", KINDS),
            "tau": asked.number("tau", 3.0, above=True, high=100.0),
        }

    @classmethod
    def build(cls, model: nn.Module, task: Any, rules: dict[str, Any], given: Given) -> Self:
        options = cls.read(given.options)
        if given.teacher is None:
            raise UsageError(
                "the objective deit-lt without a teacher",
                "a run to learn from, or one that crosspatch train trains first",
                "add --teacher RUN",
            )
        kept = {key: rules[key] for key in ("smoothing", "mixer")}
        return cls(model, task, teacher=given.teacher, counts=given.counts, **options, **kept)


def require_student(model: nn.Module) -> None:
    """Raises UsageError for a model without a distillation token."""
    if not has_token(model):
        raise UsageError(
            f"the objective deit-lt with a {type(model).__name__} that has no distillation token",
            "a model with a head of its own for what the teacher says",
            "--model deit_micro_distilled_32 or deit_tiny_distilled_patch16_224, or leave --model "
            "away",
        )
