# SPDX-License-Identifier: Apache-2.0
"""What a run begins with: looked at, planned, decoded, divided, measured; and written down."""

from __future__ import annotations

import platform
import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import crosspatch
from crosspatch.data.prepare import survey, write_skipped
from crosspatch.data.sources import Source
from crosspatch.data.split import gaps, make_split, write_split
from crosspatch.errors import DataError, UsageError
from crosspatch.training import machine as machines
from crosspatch.training import plan as plans
from crosspatch.training import team
from crosspatch.training.balance import resolve_balance
from crosspatch.training.baseline import to_beat
from crosspatch.training.measure import resolve_products, settle_length
from crosspatch.training.objective import rehearse
from crosspatch.training.pictures import Pictures, read_pictures
from crosspatch.training.recipe import Recipe
from crosspatch.training.recipes import load_recipe
from crosspatch.training.reporter import Reporter
from crosspatch.training.resuming import with_defaults
from crosspatch.training.run import RunFolder
from crosspatch.training.sizes import describe_sizes, settle_sizes
from crosspatch.training.taught import Course, learns_first
from crosspatch.training.teacher import find_teacher, refuse_taught
from crosspatch.training.token_labels import find_labels, refuse_labels
from crosspatch.training.warmstart import plan_with_weights
from crosspatch.versions import installed

VERSIONED = ("torch", "numpy", "timm", "lightning-fabric", "safetensors", "pillow")


def start_run(
    run: RunFolder,
    source: Source,
    spec: str | Path,
    reading: dict[str, Any],
    given: dict[str, Any],
    reporter: Reporter,
    course: Course,
) -> tuple[Recipe, Pictures, dict[str, Any]]:
    """(recipe, pictures, config) of a new run; the folder has what it needs before the first step.

    spec, reading: the data as they were named, and how they are read; given: the settings typed;
    course: when the command began, and the teacher that may have to be trained first. Raises
    UsageError and DataError.
    """
    course.asked = {"data": str(spec), "reading": reading, "asked": given}
    given, machine = with_defaults(source, given), machines.look()
    recipe, pictures, reasons = planned(source, given, machine, reporter, course)
    own = team.first()
    baseline = team.share(to_beat(recipe, pictures, reporter.progress) if own else None)
    recipe, estimate = settle_length(recipe, pictures, given, reasons, course.began)
    recipe = Recipe.from_dict(team.share(recipe.to_dict()))
    if not recipe.penalties:
        reasons.append(plans.describe_augment(recipe))
    config = {
        "run": {
            "data": str(spec),
            "command": shlex.join(sys.argv),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": pictures.fingerprint,
            "estimate_seconds": round(estimate, 1),
            "memory": pictures.prepared.message,
        },
        "reading": reading,
        "why": {"reasons": reasons},
        "asked": {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()},
        "machine": machine.to_dict(),
        "versions": versions_of(recipe),
        "recipe": recipe.to_dict(),
        **({"baseline": baseline} if baseline else {}),
    }
    if team.first():
        run.write_classes(source.classes)
        write_split(run.path / "split.csv", source, pictures.split)
        write_skipped(run.path / "skipped.csv", pictures.prepared.skipped)
        run.write_config(config)
        run.waiting_path.unlink(missing_ok=True)
    return recipe, pictures, config


def planned(
    source: Source,
    given: dict[str, Any],
    machine: machines.Machine,
    reporter: Reporter,
    course: Course | None = None,
) -> tuple[Recipe, Pictures, list[str]]:
    """(recipe but for its length, pictures, reasons). What is planned for the pictures that are
    there decides how they are decoded; those that can be read, what is trained. Nothing is
    written; without a `course` no teacher is trained. Raises UsageError and DataError for what
    cannot be."""
    seed, look = given.get("split_seed", given.get("seed", 0)), survey(source)
    guess = make_split(source, seed=seed)
    shape = (look, len(guess.train), len(source.classes), machine)
    teacher = find_teacher(given["teacher"]) if given.get("teacher") else {}
    first, beginning = plan_with_weights(shape, given, reporter)
    _require_able(first, teacher)
    task = "multilabel" if source.multi else "classify"
    labels = find_labels(given.get("labels"), source, first)
    first = settle_sizes(first, len(source.classes))
    rehearse(replace(first, task=task, teacher=teacher, labels=labels), source.classes)
    prepared = read_pictures(source, first, reporter)
    told = course.split if course else None
    split = told or make_split(source, keep=prepared.kept, seed=seed, twins=prepared.alike)
    pictures = Pictures(source, prepared, split, source.fingerprint())
    require_alike(pictures)
    if course and not teacher and learns_first(first):
        teacher = course.teach(given, first, look.median_side, pictures)
    refuse_taught(teacher, pictures)
    said = refuse_labels(labels, pictures)
    shape = (look, len(split.train), len(source.classes), machine)
    recipe, reasons = beginning.plan(shape, pictures)
    reasons += said
    kept = {
        key: getattr(first, key) for key in ("model", "model_args", "size", "store", "fit", "sizes")
    }
    workers = 0 if prepared.images.cached else given.get("workers", max(1, machine.cores - 1))
    recipe = replace(recipe, **kept, workers=workers, task=task, devices=team.size())
    recipe = replace(recipe, teacher=teacher, class_counts=tuple(pictures.counts().tolist()))
    recipe = replace(recipe, labels=labels)
    recipe = resolve_balance(resolve_products(recipe), pictures.counts(), source.classes, reasons)
    reasons += describe_sizes(recipe)
    reasons += [*source.remarks, *prepared.remarks, *gaps(source, split)]
    if load_recipe(recipe.name).RANGE and "lr" not in given:
        reporter.message("looking for the rate: some steps of a copy, thrown away afterwards")
    return Recipe.from_dict(team.share(recipe.to_dict())), pictures, reasons


def _require_able(recipe: Recipe, teacher: dict[str, str]) -> None:
    """Raises UsageError for what a linear probe cannot have: several processes, a teacher."""
    if not recipe.penalties:
        return
    if team.size() > 1:
        raise UsageError(
            f"{team.size()} processes with --recipe {recipe.name}",
            "one process: a linear probe takes seconds",
            "leave --devices away",
        )
    if teacher:
        raise UsageError(
            f"--teacher with --recipe {recipe.name}",
            "a recipe that trains a network; a linear probe fits a head to labels",
            "leave --teacher away, or take --recipe finetune",
        )


def require_alike(pictures: Pictures) -> None:
    """Raises DataError when the processes of a team do not read the same pictures."""
    kept = pictures.prepared.kept
    mine = [pictures.fingerprint, len(kept), int(kept.sum())]
    for number, theirs in enumerate(team.gather(mine)):
        if theirs != mine:
            raise DataError(
                f"process {number + 1} reads {theirs[1]:,} pictures that are not the {len(kept):,} "
                f"of process {team.rank() + 1}",
                "the same files on every machine",
                "copy the data anew, or use a shared folder",
            )


def versions_of(recipe: Recipe) -> dict[str, str]:
    """What the numbers of a run may depend on."""
    found = {"crosspatch": crosspatch.__version__, "python": platform.python_version()}
    found |= {name: given or "unknown" for name, given in installed(VERSIONED).items()}
    return {**found, "threads": str(recipe.threads), "device": recipe.device}
