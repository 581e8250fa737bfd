# SPDX-License-Identifier: Apache-2.0
"""Token-reduction consistency: a model of few tokens learns from itself with more of them.

"Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers", Lee,
Choi, Kim, arXiv 2403.10030, CVPR 2024. In every step two passes of the same weights, a student with
the model's own schedule and a teacher that fuses r' tokens per block, drawn anew from 0 to 7:

    L = CE(student) + CE(teacher) + 3 L_c
    L_c = mean over pictures with p > 0.4, and over channels, of (stopgrad c_teacher - c_student)^2

c is the class token after the final norm, and p the probability that the student gives to the label
and, in a mixed picture, to the other label (once where they are the same). A fractional r' is drawn
in steps of 0.01.

Departures: patches are embedded once for both passes; several class tokens (of branches, of a
distillation) count alike; a model that averages its patches is compared in that average; of several
processes each takes the mean over its own pictures and weighs it by how many it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.mixing import Mixing, draws
from crosspatch.models.crossvit import CrossViT
from crosspatch.objectives import Inputs
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify
from crosspatch.tokens.host import hosts_of, reducers_of
from crosspatch.tokens.mctf import FAST, MCTF

SHARE = 7 / 16  # the paper's teacher fuses at most 7 tokens where the student fuses 16


class Consistency(Supervised):
    """Trains `model`, reduced by MCTF, on labels and on agreeing with itself at more tokens.

    weight: of L_c; confidence: p above which a picture counts; teacher_r: the most that the teacher
    fuses per block, a count or a fraction, or None for 7/16 of the student's; the other arguments
    are those of `Supervised`.
    Raises UsageError for a model without MCTF in it and for a task of several labels per picture,
    ValueError for a negative weight or teacher_r and a confidence outside of [0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        *,
        weight: float = 3.0,
        confidence: float = 0.4,
        teacher_r: float | None = None,
        **rules: Any,
    ) -> None:
        super().__init__(model, task, **rules)
        if not isinstance(task, Classify):
            raise UsageError(
                "token-reduction consistency with several labels per picture",
                "one label per picture: its confidence rule asks for the probability of the label",
                "train with the supervised objective",
            )
        if not any(isinstance(reducer, MCTF) for reducer in reducers_of(model)):
            raise UsageError(
                "token-reduction consistency for a model without MCTF in it",
                "a model reduced by mctf",
                "--reduce mctf:r=16",
            )
        if weight < 0 or not 0 <= confidence <= 1:
            raise ValueError(f"weight = {weight}, confidence = {confidence}; expected 0 or more "
                             "and a number in [0, 1]")  # fmt: skip
        if teacher_r is not None and (teacher_r < 0 or (teacher_r > 1 and teacher_r % 1)):
            raise ValueError(f"teacher_r = {teacher_r}; expected a fraction or a count from 0 on")
        self.weight, self.confidence, self.teacher_r = weight, confidence, teacher_r

    def forward(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """The loss of one batch, in nats; parts: L_c and the share of pictures that count in it."""
        rng = draws(*inputs.draw)
        images, mixing = inputs.images, None
        if self.mixer is not None:
            images, mixing = self.mixer(images, rng)
        targets = self.targets(inputs.labels, mixing, progress)
        start = self.model.embed(images)  # pyright: ignore[reportCallIssue]
        student, logits = classified(self.model, start, list(reducers_of(self.model)))
        teacher, others = classified(self.model, start, self.teachers(rng))
        labelled = self.task.loss(logits, targets) + self.task.loss(others, targets)

        counts = (label_confidence(logits, inputs.labels, mixing) > self.confidence).float()
        apart = consistency(student, teacher)
        mean = (apart * counts).sum() / counts.sum().clamp(min=1)
        share = images.shape[0] * inputs.scale
        loss = labelled.sum() * inputs.scale + self.weight * mean * share
        return {
            "loss": loss,
            "parts": {"consistency": mean.detach(), "confident": counts.mean().detach()},
        }

    def teachers(self, rng: np.random.Generator) -> list[Any]:
        """The reducers of a teacher's pass, one per branch, with r' drawn for each."""
        pairs = zip(reducers_of(self.model), hosts_of(self.model), strict=True)
        return [
            one.with_r(min(self.draw(one, rng), host.patches), host)
            if isinstance(one, MCTF)
            else one
            for one, host in pairs
        ]

    def draw(self, student: MCTF, rng: np.random.Generator) -> float:
        """r': uniform over the whole numbers, or the hundredths, from 0 to the most."""
        most = _most(student) if self.teacher_r is None else self.teacher_r
        if 0 < most < 1:
            return int(rng.integers(0, round(100 * most) + 1)) / 100
        return int(rng.integers(0, int(most) + 1))


def _most(student: MCTF) -> float:
    r = FAST if student.r is None else student.r
    r = max(r, default=0) if isinstance(r, Sequence) else r
    return round(SHARE * r, 2) if r < 1 else int(SHARE * r)


def classified(model: Any, start: Any, reducers: list[Any]) -> tuple[list[Tensor], Tensor]:
    """The pooled features (B, C) of every class token, and the logits (B, K), of one pass from the
    embedded state `start` with these reducers."""
    if isinstance(model, CrossViT):
        states, _ = model.run(start, reducers=reducers)
        pooled = model.pool(states)
        return pooled, model.classify(pooled, states)
    state, _ = model.run(start, pooled=True, reducer=reducers[0])
    pooled = model.pool(state)
    logits = reducers[0].decide(state, model.classify(pooled))
    tokens = pooled if isinstance(pooled, tuple) else (pooled,)
    return [one for one in tokens if one.ndim == 2], logits  # LV-ViT pools its patches as well


def consistency(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """(B,): how far the student's class tokens (B, C_i) are from the teacher's, squared; the
    teacher is not moved."""
    pairs = zip(student, teacher, strict=True)
    apart = [(t.detach().float() - s.float()).square().mean(dim=1) for s, t in pairs]
    return torch.stack(apart).mean(dim=0)


def label_confidence(logits: Tensor, labels: Tensor, mixing: Mixing | None) -> Tensor:
    """(B,): the probability of a picture's label and of the one that is mixed in."""
    probabilities = logits.detach().float().softmax(dim=-1)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    if mixing is None:
        return own
    other = labels[mixing.partner]
    return own + probabilities.gather(1, other[:, None])[:, 0] * (other != labels)
