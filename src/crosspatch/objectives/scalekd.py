# SPDX-License-Identifier: Apache-2.0
"""ScaleKD: a student's maps learn from a strong teacher's, through the teacher's own last stage.

"ScaleKD: Strong Vision Transformers Could Be Excellent Teachers", arXiv 2411.06786, NeurIPS 2024.
The heads are those of `scalekd_heads`; s3, s4 are the student's last two maps, t the teacher's
last, A and B the two views:

    u_v = LastStage(CAP_v3(s3; learned query))        v in {A, B}, the teacher's frozen weights
    w_v = CAP_v4(s4; query = u_v)
    L   = (1 - a) CE(y, s) + a T^2 CE(softmax(t / T), softmax(s / T))
          + sum over v of alpha_v (|u_v - t|^2 + |w_v - t|^2)           after the normalisation of v

a = 0.5, T = 1, alpha = 0.08 (A) and 0.06 (B). The heads are training's only: the student that is
saved, averaged and shipped is the one without them.

Departures. The authors read a Swin of four stages at 224 pixels. Here any two networks whose maps
`stages.Reader` can read: of a plain ViT the last stage is its last quarter of blocks, and its class
token there is the teacher's own. A teacher whose last stage is no function of the map before it
(reduced tokens, rotary positions) is learned from without that: s3 is then compared with the
teacher's map of that stage, and s4 asks with a learned query. A teacher of other classes gives
its features alone (a = 0). Students of several heads learn by what their evaluation answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosspatch.errors import UsageError
from crosspatch.objectives import Given, Inputs
from crosspatch.objectives.options import Options
from crosspatch.objectives.scalekd_heads import (
    ALPHAS,
    FACTOR,
    Projector,
    as_grid,
    logit_mimicry,
    mimicry,
)
from crosspatch.objectives.stages import Read, Reader
from crosspatch.objectives.supervised import Supervised
from crosspatch.objectives.teacher import Teacher
from crosspatch.tasks.classify import Classify

STAGES, VIEWS = ("3", "4"), ("spatial", "frequency")
OPTIONS = {
    "spatial": "weight of the maps, a number or one for each stage (0.08)",
    "frequency": "weight of the maps less their means, likewise (0.06)",
    "kd": "the teacher's answers' part of the loss, in [0, 1] (0.5; 0 where classes differ)",
    "tau": "temperature of the answers, above 0 (1)",
    "heads": "heads of the projectors, a number or one for each stage (8)",
    "factor": "of the attention's logits, above 0 (5)",
    "perceive": "whether the student's map goes through the teacher's last stage (yes)",
    "student": "two places in the student's feature_info (its last two stages)",
    "teacher": "two places in the teacher's (its last two stages)",
}


class ScaleKD(Supervised):
    """Trains `model` on labels and on the maps of a teacher; `rules` are those of `Supervised`.

    spatial, frequency: weights of the two views at stages 3 and 4; kd, tau: part and temperature of
    the teacher's answers; heads: of the projectors at the two stages, None for 8; perceive: whether
    the teacher's last stage is gone through; student, teaching: places to read at (`stages`).
    Raises UsageError for networks whose maps cannot be read, and impossible settings.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Classify,
        *,
        teacher: Teacher,
        spatial: Sequence[float] = (ALPHAS[0],) * 2,
        frequency: Sequence[float] = (ALPHAS[1],) * 2,
        kd: float | None = None,
        tau: float = 1.0,
        heads: Sequence[int | None] = (None, None),
        factor: float = FACTOR,
        perceive: bool = True,
        student: Sequence[int] = (),
        teaching: Sequence[int] = (),
        **rules: Any,
    ) -> None:
        super().__init__(model, task, **rules)
        self.teacher, self.tau = teacher, tau
        self.kd = (0.5 if teacher.agrees else 0.0) if kd is None else kd
        if self.kd and not teacher.agrees:
            raise UsageError(
                f"kd = {kd} with the teacher {teacher.where}, whose classes are others",
                "its features alone: kd = 0",
                "leave kd away, or name a teacher of the same classes",
            )
        self.student = Reader(model, teacher.seen, student)
        who = f"the teacher {teacher.where}"
        self.taught = Reader(teacher.module, teacher.size, teaching, who=who, of="teacher")
        self.perceive = self.taught.perceive if perceive else None
        self.alphas = {
            (view, stage): float(alpha)
            for view, pair in zip(VIEWS, (spatial, frequency), strict=True)
            for stage, alpha in zip(STAGES, pair, strict=True)
        }
        self.projectors = nn.ModuleDict(
            {_name(*key): self._projector(*key, heads, factor)
             for key, alpha in self.alphas.items() if alpha > 0}
        )  # fmt: skip

    def _projector(
        self, view: str, stage: str, heads: Sequence[int | None], factor: float
    ) -> Projector:
        place = STAGES.index(stage)
        (width, *seen), (wide, *grid) = self.student.shapes[place], self.taught.shapes[place]
        asked = stage == "4" and self.perceive is not None and self.alphas[view, "3"] > 0
        many = heads[place]
        if many and wide % many:
            raise UsageError(
                f"{many} heads at stage {stage}, where the teacher has {wide} channels",
                f"a number that divides {wide}",
                "change heads, or leave it away",
            )
        return Projector(
            width, wide, (grid[0], grid[1]), (seen[0], seen[1]),
            self_query=not asked, softmax_scale=factor, num_heads=many,
        )  # fmt: skip

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        asked = Options("scalekd", options, OPTIONS)
        return {
            "spatial": asked.pair("spatial", (ALPHAS[0],) * 2),
            "frequency": asked.pair("frequency", (ALPHAS[1],) * 2),
            "kd": asked.number("kd", None, high=1.0),
            "tau": asked.number("tau", 1.0, above=True),
            "heads": asked.pair("heads", (None, None), low=1, whole=True),
            "factor": asked.number("factor", FACTOR, above=True),
            "perceive": asked.switch("perceive", True),
            "student": asked.places("student"),
            "teaching": asked.places("teacher"),
        }

    @classmethod
    def build(cls, model: nn.Module, task: Any, rules: dict[str, Any], given: Given) -> Supervised:
        """The objective of a recipe with a teacher. Raises UsageError; see `OPTIONS`."""
        options, teacher = cls.read(given.options), given.teacher
        if teacher is None:
            raise ValueError("scalekd learns from a teacher")
        return cls(model, task, teacher=teacher, **options, **rules)

    def forward(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """The loss of one batch, in nats and squared distances; its three parts as parts."""
        images, targets, _ = self.mixed(inputs, progress)
        read = self.student(self.model, images)
        told = self.told(images)
        labels = self.task.loss(read.logits, targets).sum() * inputs.scale
        loss, parts = (1 - self.kd) * labels, {"labels": labels.detach()}
        if self.kd:
            wanted = self.teacher.arranged(told.logits)
            answers = logit_mimicry(read.logits, wanted, self.tau).sum() * inputs.scale
            loss, parts = loss + self.kd * answers, {**parts, "answers": answers.detach()}
        features = self.features(read, told).sum() * inputs.scale
        return {"loss": loss + features, "parts": {**parts, "features": features.detach()}}

    @torch.no_grad()
    def told(self, images: Tensor) -> Read:
        """What the teacher makes of the student's images, in one pass without gradients."""
        module = self.teacher.moved(images.device)
        told = self.taught(module, self.teacher.view(images))
        self.teacher.require_finite(told.logits)
        return told

    def features(self, read: Read, told: Read) -> Tensor:
        """(B,): the weighed distances of the student's maps in both views at both stages."""
        total = told.high.new_zeros(len(told.high), dtype=torch.float32)
        for view in VIEWS:
            query, centred = None, view == "frequency"
            if alpha := self.alphas[view, "3"]:
                found = self._projected(view, "3", read.low, told.low)
                wanted = told.low
                if (last_stage := self.perceive) is not None:
                    found, wanted = last_stage(found, told), told.high
                    query = found.flatten(2).transpose(1, 2)
                total = total + alpha * mimicry(found, wanted, centred=centred)
            if alpha := self.alphas[view, "4"]:
                found = self._projected(view, "4", read.high, told.high, query)
                total = total + alpha * mimicry(found, told.high, centred=centred)
        return total

    def _projected(
        self, view: str, stage: str, x: Tensor, wanted: Tensor, query: Tensor | None = None
    ) -> Tensor:
        grid = (wanted.shape[2], wanted.shape[3])
        return as_grid(self.projectors[_name(view, stage)](x, query, grid), grid)

    @property
    def remarks(self) -> list[str]:
        """What the plan says of it."""
        said = [
            f"ScaleKD: the student's {self.student.text} learn from {self.taught.text} of the "
            f"teacher {self.teacher.where}."
        ]
        if self.perceive is not None:
            said.append("The earlier of them goes through the teacher's own last stage.")
        elif self.taught.why_not:
            said.append(
                "The teacher's last stage is not gone through: "
                f"{self.taught.why_not}; each map is compared with its own."
            )
        if not self.kd:
            why = "" if self.teacher.agrees else ": its classes are others"
            said.append(f"The teacher's answers are not learnt{why}.")
        return said

    def no_decay(self) -> set[str]:
        """Besides the model's: positions and queries of the projectors."""
        tables = (".pos_embed", ".query.weight")
        names = (f"projectors.{name}" for name, _ in self.projectors.named_parameters())
        return super().no_decay() | {name for name in names if name.endswith(tables)}


def _name(view: str, stage: str) -> str:
    return f"{view}_{stage}"
