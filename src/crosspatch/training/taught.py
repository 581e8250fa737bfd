# SPDX-License-Identifier: Apache-2.0
"""A teacher that is trained first: what `--objective deit-lt` does where no --teacher is named.

It is a whole run in OUT/teacher on the same pictures with the same split: a residual network by the
recipe `cnn`, with LDAM, deferred weights and flat minima (arXiv 2404.02900, section 4.1). Until it
has ended, OUT/waiting.toml holds what was asked, so that `--resume` alone goes on with whichever of
the two was interrupted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from crosspatch.data.split import Split
from crosspatch.errors import DataError, UsageError
from crosspatch.training import team
from crosspatch.training.pictures import Pictures
from crosspatch.training.recipe import Recipe
from crosspatch.training.recipes import cnn
from crosspatch.training.reporter import Reporter
from crosspatch.training.resuming import differing
from crosspatch.training.run import RunFolder
from crosspatch.training.teacher import find_teacher

DEIT_LT = "deit-lt"
SHARE = 1 / 3  # of --time is the teacher's
LESSON: dict[str, Any] = {
    "recipe": "cnn", "objective": "ldam", "balance": "drw", "sam": 0.05, "weights": "none"
}  # fmt: skip
"""How a teacher is trained, besides what follows from its student."""
SHARED = ("epochs", "steps", "flip", "precision", "workers", "linear", "threads", "eval_batch")
"""Settings typed for the student that hold for its teacher."""


class Lesson(Protocol):
    """Trains a teacher in a folder, or goes on with the one that is there."""

    def __call__(
        self, out: Path, settings: dict[str, Any], reporter: Reporter, split: Split
    ) -> None: ...


@dataclass
class Course:
    """What the start of a run needs besides its settings.

    began: when the command did, by `time.perf_counter`, as far as `--time` is concerned; split:
    that of a student, where this run is its teacher; asked: what `waiting.toml` is to hold.
    """

    lesson: Lesson
    run: RunFolder
    reporter: Reporter
    began: float
    split: Split | None = None
    asked: dict[str, Any] = field(default_factory=dict)

    def teach(
        self, given: Mapping[str, Any], student: Recipe, side: int, pictures: Pictures
    ) -> dict[str, str]:
        """What the student's recipe keeps of its teacher, which is trained unless it has ended.

        side: median of the pictures, in pixels. Raises what a training does, and DataError where
        the teacher was trained on other pictures.
        """
        out = self.run.teacher
        if not team.share(RunFolder(out).ended):
            if team.first():
                self.run.write_waiting(self.asked)
            self.reporter.message(f"First its teacher is trained, in {out}.")
            settings = lesson_of(given, student, side)
            self.lesson(out, settings, Aside(self.reporter), pictures.split)
        config = team.share(RunFolder(out).read_config() if team.first() else None)
        if config["run"]["fingerprint"] != pictures.fingerprint:
            raise DataError(
                f"the teacher in {out} was trained on other pictures",
                "the pictures that the run was begun with",
                "put them back, or train anew with --overwrite",
            )
        self._count_time(out)
        self.reporter.message("Now the student.")
        return find_teacher(str(out))

    def _count_time(self, out: Path) -> None:
        """The teacher's seconds count, also those before an interruption."""
        if not team.first():
            return
        report = json.loads(RunFolder(out).report_path.read_text(encoding="utf-8"))
        now = time.perf_counter()
        self.began = min(self.began, now - float(report.get("seconds", 0.0)))


class Aside:
    """A reporter for a teacher: says that it is one, and leaves the last screen to the student."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.message, self.progress = reporter.message, reporter.progress
        self.step, self.epoch = reporter.step, reporter.epoch

    def plan(self, info: dict[str, Any]) -> None:
        """The plan of the teacher, under its name."""
        self.reporter.plan({**info, "role": "teacher"})

    def done(self, summary: dict[str, Any]) -> None:
        """One sentence."""
        judged = summary["test"] or summary["val"] or {}
        found = judged.get("accuracy")
        said = "" if found is None else f", with an accuracy of {100 * found:.1f} %"
        self.reporter.message(f"The teacher is trained{said}: {summary['out']}")


def learns_first(recipe: Recipe) -> bool:
    """Whether a run whose teacher is not named trains one."""
    return recipe.objective == DEIT_LT


def lesson_of(given: Mapping[str, Any], student: Recipe, side: int) -> dict[str, Any]:
    """The settings of the teacher of a student. given: the settings typed for it."""
    gpu, short = student.device == "cuda", min(student.size)
    model, pixels = cnn.preset(side, 0, gpu)
    pixels = min(pixels, max(cnn.SMALLEST_SIDE, short))  # it sees no more than its student
    seed = student.seed if student.split_seed is None else student.split_seed
    lesson = {
        **LESSON,
        **{key: given[key] for key in SHARED if given.get(key) is not None},
        "model": model,
        "size": tuple(max(1, round(edge * pixels / short)) for edge in student.size),
        "fit": student.fit,
        "seed": student.seed,
        "split_seed": seed,
    }
    if model.endswith("_cifar"):
        lesson["model_args"] = {"use_norm": True}
    if given.get("time"):
        lesson["time"] = SHARE * given["time"]
    return lesson


def waited(
    out: Path, given: dict[str, Any], reading: dict[str, Any], *, whole: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, reading) of the run in `out` that waits for its teacher; whole: whether all of
    its command was typed again.

    Raises UsageError where something else is asked for now.
    """
    begun = RunFolder(out).read_waiting()
    changed = differing(given, begun["asked"], whole)
    changed += differing(reading, begun["reading"], whole)
    if changed:
        raise UsageError(
            f"the run in {out} was begun with other settings: {', '.join(changed)}",
            "--resume alone: its teacher is not yet trained",
            "leave the settings away, or train anew with --overwrite",
        )
    return begun["asked"], begun["reading"]
