# SPDX-License-Identifier: Apache-2.0
"""A whole training, from the name of the data to the report: what `crosspatch train` calls."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crosspatch.data.sources import Source
from crosspatch.data.split import SPLITS, Split
from crosspatch.errors import UsageError
from crosspatch.training import plan as plans
from crosspatch.training import team
from crosspatch.training.judge import finish, split_sizes, weight
from crosspatch.training.loop import fit
from crosspatch.training.objective import make_objective
from crosspatch.training.pictures import Pictures, open_source, read_pictures
from crosspatch.training.probe import fit_probe
from crosspatch.training.recipe import Recipe
from crosspatch.training.reporter import Reporter, Silent
from crosspatch.training.resuming import Asked, begun_reading, continue_run
from crosspatch.training.run import RunFolder
from crosspatch.training.start import require_alike, start_run, versions_of
from crosspatch.training.taught import Course, Lesson, waited
from crosspatch.training.warmstart import saved_model

SLOWER = 1.25  # a shared machine may take this much longer than the estimate


def train_run(
    source_spec: str | Path,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reading: Mapping[str, Any] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Train on `source_spec` into the folder `out`; returns the summary (plain JSON values).

    overrides: see `training.plan`; reading: what `open_source` is told of columns and groups (a run
    that is continued knows it). A run in `out` that has not ended is continued with `resume`, or
    when all is as it was begun; `force`: also with other settings and pictures, where that can be
    (`training.resuming`). Validation chooses the weights; test is touched once, at the
    end. Summary: run, out, data, model, reduce, objective, parameters, size, classes, images,
    skipped, split, epochs, steps, best (row of metrics.csv), val and test (figures of the task,
    None without pictures), calibration (temperature, images it was fitted on), baseline (see
    `training.baseline`; None for a run that was begun without), seconds, files.
    Where several processes were launched, each calls this; the first one writes, the others work.
    Raises UsageError, DataError, Interrupted (exit codes 2, 3, 4).
    """
    began = time.perf_counter()
    given = plans.check_overrides(overrides or {})
    with team.joined(given.pop("devices", None)):
        told = dict(reading or {})
        reporter = reporter if reporter and team.first() else Silent()
        wish = _Wish(Path(out), resume, overwrite, force)
        return _train(source_spec, wish, given, reporter, told, began)


class _Wish(NamedTuple):
    """What is to be done with the run in `out`."""

    out: Path
    resume: bool
    overwrite: bool
    force: bool


def _train(
    source_spec: str | Path,
    wish: _Wish,
    given: dict[str, Any],
    reporter: Reporter,
    reading: dict[str, Any],
    began: float,
    split: Split | None = None,
) -> dict[str, Any]:
    """A training in the team; split: that of a student, for its teacher."""
    out, resume, overwrite, force = wish
    begun = team.share(resume or (RunFolder(out).unfinished and not overwrite))
    if force and not begun:
        raise _nothing_to_force(out)
    if begun and team.share(RunFolder(out).config_path.is_file()):
        was = begun_reading(out, reading, whole=not resume) if team.first() else None
        reading = team.share(was)
    waiting = begun and team.share(RunFolder(out).waiting)
    if waiting:
        given, reading = team.share(waited(out, given, reading, whole=not resume))
    source = open_source(source_spec, **reading)
    with _folder(out, overwrite=overwrite, resume=begun) as run:
        begun = begun and not waiting
        if begun:
            asked = Asked(given, whole=not resume, force=force)
            recipe, pictures, config = _continue(run, source, asked, reporter)
        else:
            course = Course(_lesson(source_spec, reading), run, reporter, began, split)
            recipe, pictures, config = start_run(
                run, source, source_spec, reading, given, reporter, course
            )
        model = saved_model(run, recipe, len(source.classes)) if begun else None
        objective = make_objective(recipe, source.classes, model)
        _announce(run, recipe, pictures, config, objective, reporter)
        facts = {"fingerprint": pictures.fingerprint, "versions": config["versions"]}
        train, val = pictures.part("train"), pictures.validation
        train_it = fit_probe if recipe.penalties else fit
        how = {"resume": begun, "force": force, "facts": facts}
        outcome = train_it(recipe, objective, train, val, run, reporter, **how)
        summary = finish(run, recipe, pictures, config, outcome, reporter)
    reporter.done(summary)
    return summary


def _lesson(source_spec: str | Path, reading: dict[str, Any]) -> Lesson:
    """What trains a teacher on the same pictures, or goes on with one."""

    def train(out: Path, settings: dict[str, Any], reporter: Reporter, split: Split) -> None:
        resume = team.share(RunFolder(out).unfinished)
        wish = _Wish(out, resume, overwrite=False, force=False)
        given = {} if resume else plans.check_overrides(settings)
        _train(source_spec, wish, given, reporter, dict(reading), time.perf_counter(), split)

    return train


def _folder(out: Path, *, overwrite: bool, resume: bool) -> RunFolder:
    """The run's folder, which the first process alone makes, locks and fills."""
    if not team.first():
        return RunFolder(out)
    return RunFolder.create(out, overwrite=overwrite, resume=resume)


def _nothing_to_force(out: Path) -> UsageError:
    return UsageError(
        f"--force, and {out} holds no run that could go on",
        "--force goes on with a run whose settings or pictures have changed",
        "leave --force out, or add --resume",
    )


def _continue(
    run: RunFolder, source: Source, asked: Asked, reporter: Reporter
) -> tuple[Recipe, Pictures, dict[str, Any]]:
    """What `continue_run` finds in the run's folder, in all processes, and as many as there are."""
    if team.first():
        recipe, pictures, config = continue_run(run, source, asked, reporter)
        parts = [getattr(pictures.split, name).tolist() for name in SPLITS]
        team.share([recipe.to_dict(), config, parts])
    else:
        settings, config, parts = team.share()
        recipe, split = Recipe.from_dict(settings), Split(*(np.array(p, np.int64) for p in parts))
        prepared = read_pictures(source, recipe, reporter)
        pictures = Pictures(source, prepared, split, source.fingerprint())
    require_alike(pictures)
    recipe = recipe.by(team.size())
    return recipe, pictures, {**config, "versions": versions_of(recipe)}


def _labels(source: Source) -> dict[str, Any] | None:
    """How many labels pictures have, where they may have several."""
    if not source.multi:
        return None
    counts = source.presence.sum(axis=1)
    return {
        "mean": float(counts.mean()),
        "most": int(counts.max()),
        "none": int((counts == 0).sum()),
    }


def _announce(
    run: RunFolder,
    recipe: Recipe,
    pictures: Pictures,
    config: dict[str, Any],
    objective: Any,
    reporter: Reporter,
) -> None:
    """Tell the reporter everything that is known before the first step."""
    source, skipped = pictures.source, pictures.prepared.skipped
    counts = pictures.counts()
    rarest = int(counts.argmin())
    estimate = config["run"]["estimate_seconds"]
    reporter.plan(
        {
            "data": config["run"]["data"],
            "out": str(run.path),
            "images": len(pictures.prepared.images),
            "classes": list(source.classes),
            "task": recipe.task,
            "labels": _labels(source),
            "skipped": len(skipped),
            "skipped_files": [{"path": s.path, "reason": s.reason} for s in skipped],
            "split": split_sizes(pictures.split),
            "smallest": {"class": source.classes[rarest], "images": int(counts[rarest])},
            "cache": pictures.prepared.message,
            "model": recipe.model,
            "reduce": recipe.reduce,
            "objective": recipe.objective,
            "size": list(recipe.size),
            "fit": recipe.fit,
            **weight(objective.exported, recipe),
            "epochs": recipe.epochs,
            "penalties": len(recipe.penalties),
            "steps": recipe.steps,
            "batch": recipe.batch,
            "lr": recipe.lr,
            "precision": recipe.precision,
            "device": recipe.device,
            "baseline": config.get("baseline"),
            "reasons": config["why"]["reasons"],
            "estimate": {"low": estimate, "high": estimate * SLOWER},
        }
    )
    if not len(pictures.split.val):
        reporter.message(
            "There are too few pictures for a validation split: the training pictures choose."
        )
