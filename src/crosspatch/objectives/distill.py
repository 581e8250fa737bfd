# SPDX-License-Identifier: Apache-2.0
"""Learning from a teacher's answers, by DeiT's distillation token or by the student's own head.

"Training data-efficient image transformers & distillation through attention", Touvron et al., arXiv
2012.12877, section 4; "Distilling the Knowledge in a Neural Network", Hinton et al., arXiv
1503.02531, for a student without a token. The losses are those of `deit`; with z the logits of the
class token, z' of the distillation token and t the teacher's:

    hard   (1 - a) CE(z, y) + a CE(z', argmax t)                                      a = 0.5
    soft   (1 - a) CE(z, y) + a T^2 KL(softmax(t / T) || softmax(z' / T))     a = 0.1, T = 3

The teacher sees the same augmented and mixed pictures. In evaluation the mean of both heads' logits
answers. A student without the token has z' = z.

Departures: the authors divide the soft loss by B K, so that its gradient is K times weaker than
with the usual mean over the pictures. Both are there (`per`), and below 1,000 classes it is the
mean over pictures. Evo-LeViT's four heads are two such pairs, of which the mean counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from crosspatch.objectives import Given, Inputs
from crosspatch.objectives.deit import PER, hard_distillation, soft_distillation
from crosspatch.objectives.options import Options
from crosspatch.objectives.supervised import Supervised
from crosspatch.objectives.teacher import Teacher
from crosspatch.tasks.classify import Classify

KINDS = ("soft", "hard")
ALPHA = {"soft": 0.1, "hard": 0.5}
TAU = 3.0
MANY = 1000  # classes from which the soft loss is divided as the authors do
OPTIONS = {
    "kind": "soft or hard: the teacher's probabilities, or its answer (soft)",
    "alpha": "the teacher's part of the loss, in [0, 1] (soft 0.1, hard 0.5)",
    "tau": "temperature of soft, above 0 (3)",
    "per": "picture or logit: what soft is divided by (picture below 1,000 classes)",
}


class Distill(Supervised):
    """Trains `model` on labels and on a teacher's answers; `rules` are those of `Supervised`.

    kind: one of `KINDS`; alpha: the teacher's part, None for `ALPHA`; tau: temperature; per: one of
    `deit.PER`, None for the number of classes to decide.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Classify,
        *,
        teacher: Teacher,
        kind: str = "soft",
        alpha: float | None = None,
        tau: float = TAU,
        per: str | None = None,
        **rules: Any,
    ) -> None:
        super().__init__(model, task, **rules)
        teacher.require_agreement()
        self.teacher, self.kind, self.tau = teacher, kind, tau
        self.alpha = ALPHA[kind] if alpha is None else alpha
        few = len(task.classes) < MANY
        self.per = per or ("picture" if few else "logit")
        self.token = has_token(model)
        if self.token:
            chosen: Any = model
            chosen.set_distilled_training(True)

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        asked = Options("distill", options, OPTIONS)
        kind = asked.word("kind", "soft", KINDS)
        if kind == "hard" and (unread := [key for key in ("tau", "per") if key in options]):
            raise asked.wrong(unread[0])
        return {
            "kind": kind,
            "alpha": asked.number("alpha", None, high=1.0),
            "tau": asked.number("tau", TAU, above=True),
            "per": asked.word("per", None, PER),
        }

    @classmethod
    def build(cls, model: nn.Module, task: Any, rules: dict[str, Any], given: Given) -> Supervised:
        """The objective of a recipe with a teacher. Raises UsageError; see `OPTIONS`."""
        options = cls.read(given.options)
        if given.teacher is None:
            raise ValueError("distill learns from a teacher")
        return cls(model, task, teacher=given.teacher, **options, **rules)

    def forward(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """The loss of one batch: the mean over the global batch, in nats."""
        images, targets, _ = self.mixed(inputs, progress)
        answers = self.teacher.logits(images)
        given = self.model(images)
        pairs = [(given, given)]
        if isinstance(given, tuple):
            pairs = list(zip(given[0::2], given[1::2], strict=True))
        loss = sum(self._loss(*pair, answers, targets) for pair in pairs) / len(pairs)
        return {"loss": loss * len(images) * inputs.scale, "parts": {}}

    def _loss(self, own: Tensor, other: Tensor, answers: Tensor, targets: Tensor) -> Tensor:
        if self.kind == "hard":
            return hard_distillation(own, other, answers, targets, alpha=self.alpha)
        how = {"alpha": self.alpha, "tau": self.tau, "per": self.per}
        return soft_distillation(own, other, answers, targets, **how)

    @property
    def remarks(self) -> list[str]:
        """What the plan says of it."""
        by = (
            "its distillation token" if self.token else "its own head: it has no distillation token"
        )
        how = f", temperature {self.tau:g}, mean per {self.per}" if self.kind == "soft" else ""
        return [
            f"Distilled ({self.kind}) from the teacher {self.teacher.where}, whose part of the "
            f"loss is {self.alpha:g}{how}; the student learns it by {by}."
        ]


def has_token(model: nn.Module) -> bool:
    """Whether a model has a distillation token with a head of its own, as ours and timm's do."""
    return hasattr(model, "set_distilled_training") and isinstance(
        getattr(model, "head_dist", None), nn.Module
    )
