# SPDX-License-Identifier: Apache-2.0
"""A whole training, from the name of the data to the report: what `crosspatch train` calls."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import crosspatch
from crosspatch.data.prepare import survey, write_skipped
from crosspatch.data.sources import DIGITS, Source, open_source
from crosspatch.data.split import gaps, make_split, read_split, write_split
from crosspatch.errors import DataError, UsageError
from crosspatch.training import machine as machines
from crosspatch.training import plan as plans
from crosspatch.training.balance import resolve_balance
from crosspatch.training.judge import finish, split_sizes, weight
from crosspatch.training.loop import fit
from crosspatch.training.measure import resolve_products, settle_length
from crosspatch.training.objective import make_objective
from crosspatch.training.optim import AGAIN
from crosspatch.training.pictures import Pictures, read_pictures
from crosspatch.training.probe import fit_probe
from crosspatch.training.recipe import Recipe
from crosspatch.training.recipes import load_recipe
from crosspatch.training.reporter import Reporter, Silent
from crosspatch.training.run import RunFolder
from crosspatch.training.start import plan_with_weights, saved_model
from crosspatch.versions import installed

VERSIONED = ("torch", "numpy", "timm", "lightning-fabric", "safetensors", "pillow")
SLOWER = 1.25  # a shared machine may take this much longer than the estimate


def train_run(
    source_spec: str | Path,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reading: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train on `source_spec` into the folder `out`; returns the summary (plain JSON values).

    overrides: see `training.plan`; reading: what `open_source` is told of columns and groups (a run
    that is continued knows it). Validation chooses the weights; test is touched once, at the
    end. Summary: run, out, data, model, parameters, size, classes, images, skipped, split, epochs,
    steps, best (row of metrics.csv), val and test (figures of the task, None without pictures),
    calibration (temperature, images it was fitted on), seconds, files.
    Raises UsageError, DataError, Interrupted (exit codes 2, 3, 4).
    """
    began = time.perf_counter()
    reporter = reporter or Silent()
    given = plans.check_overrides(overrides or {})
    reading = _reading(Path(out), dict(reading or {}), resume)
    source = open_source(source_spec, **reading)
    with RunFolder.create(out, overwrite=overwrite, resume=resume) as run:
        if resume:
            recipe, pictures, config = _continue(run, source, given, reporter)
        else:
            recipe, pictures, config = _begin(
                run, source, source_spec, reading, given, reporter, began
            )
        model = saved_model(run, recipe, len(source.classes)) if resume else None
        objective = make_objective(recipe, source.classes, model)
        _announce(run, recipe, pictures, config, objective, reporter)
        facts = {"fingerprint": pictures.fingerprint, "versions": config["versions"]}
        train, val = pictures.part("train"), pictures.validation
        train_it = fit_probe if recipe.penalties else fit
        outcome = train_it(recipe, objective, train, val, run, reporter, resume=resume, facts=facts)
        summary = finish(run, recipe, pictures, config, outcome, reporter)
    reporter.done(summary)
    return summary


def _reading(out: Path, asked: dict[str, Any], resume: bool) -> dict[str, Any]:
    """How the data are read: as asked, and when a run is continued as it was begun."""
    if not resume or not (out / "config.toml").is_file():
        return asked
    begun = RunFolder(out).read_config().get("reading", {})
    changed = [f"{key} {value} (was {begun.get(key, 'not given')})" for key, value in asked.items()
               if begun.get(key) != value]  # fmt: skip
    if changed:
        raise UsageError(
            f"the run was begun with its data read otherwise: {', '.join(changed)}",
            "--resume alone, or the columns and groups it was begun with",
            "leave them away, or train anew with --overwrite",
        )
    return begun


def _begin(
    run: RunFolder,
    source: Source,
    spec: str | Path,
    reading: dict[str, Any],
    given: dict[str, Any],
    reporter: Reporter,
    began: float,
) -> tuple[Recipe, Pictures, dict[str, Any]]:
    """Plan, decode, divide, measure; write what the folder needs before the first step."""
    if source.name == DIGITS:
        given = {"flip": False, **given}
    seed, look, machine = given.get("seed", 0), survey(source), machines.look()
    guess = make_split(source, seed=seed)
    shape = (look, len(guess.train), len(source.classes), machine)
    first, begun = plan_with_weights(shape, given, reporter)
    prepared = read_pictures(source, first, reporter)
    split = make_split(source, keep=prepared.kept, seed=seed, twins=prepared.twins)
    pictures = Pictures(source, prepared, split, source.fingerprint())
    shape = (look, len(split.train), len(source.classes), machine)
    recipe, reasons = begun.plan(shape, pictures)
    kept = {key: getattr(first, key) for key in ("model", "size", "store", "fit")}
    workers = 0 if prepared.images.cached else given.get("workers", max(1, machine.cores - 1))
    recipe = replace(recipe, **kept, workers=workers)
    recipe = resolve_balance(resolve_products(recipe), pictures.counts(), source.classes, reasons)
    reasons += [*source.remarks, *prepared.remarks, *gaps(source, split)]
    if load_recipe(recipe.name).RANGE and "lr" not in given:
        reporter.message("looking for the rate: some steps of a copy, thrown away afterwards")
    recipe, estimate = settle_length(recipe, pictures, given, reasons, began)
    if not recipe.penalties:
        reasons.append(plans.describe_augment(recipe))
    config = {
        "run": {
            "data": str(spec),
            "command": " ".join(sys.argv),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "fingerprint": pictures.fingerprint,
            "estimate_seconds": round(estimate, 1),
            "memory": prepared.message,
        },
        "reading": reading,
        "why": {"reasons": reasons},
        "asked": {k: list(v) if isinstance(v, tuple) else v for k, v in given.items()},
        "machine": machine.to_dict(),
        "versions": _versions(recipe),
        "recipe": recipe.to_dict(),
    }
    run.write_classes(source.classes)
    write_split(run.path / "split.csv", source, split)
    write_skipped(run.path / "skipped.csv", prepared.skipped)
    run.write_config(config)
    return recipe, pictures, config


def _continue(
    run: RunFolder, source: Source, given: dict[str, Any], reporter: Reporter
) -> tuple[Recipe, Pictures, dict[str, Any]]:
    """The recipe, pictures and split that the run was begun with."""
    config = _lengthen(run, run.read_config(), given, reporter)
    asked, recipe = config.get("asked", {}), Recipe.from_dict(config.get("recipe", {}))
    changed = [
        f"--{key} {value} (was {asked.get(key, 'not given')})"
        for key, value in given.items()
        if asked.get(key) != (list(value) if isinstance(value, tuple) else value)
    ]
    if changed:
        raise UsageError(
            f"the run was begun with other settings: {', '.join(changed)}",
            "--resume alone, or the settings it was begun with",
            "leave them away, or train anew with --overwrite",
        )
    fingerprint = source.fingerprint()
    if fingerprint != config["run"]["fingerprint"]:
        raise DataError(
            "the pictures are no longer those the run was begun with (names, sizes or labels)",
            f"the data of {config['run']['data']} as it was",
            "put it back, or train anew with --overwrite",
        )
    split = read_split(run.path / "split.csv", source)
    pictures = Pictures(source, read_pictures(source, recipe, reporter), split, fingerprint)
    now = _versions(recipe)
    return recipe, pictures, {**config, "versions": now}


def _lengthen(
    run: RunFolder, config: dict[str, Any], given: dict[str, Any], reporter: Reporter
) -> dict[str, Any]:
    """The settings of a run that has ended and is to have more epochs; else as they were.

    Raises UsageError when it has had as many already.
    """
    recipe, epochs = Recipe.from_dict(config.get("recipe", {})), given.get("epochs")
    ended = (run.path / "report.json").is_file()
    if not ended or epochs in (None, config["asked"].get("epochs"), recipe.epochs):
        return config
    if recipe.penalties or recipe.schedule == "epochs":
        raise UsageError(
            f"--epochs {epochs:g} for a run of --recipe {recipe.name} that has ended",
            "a recipe whose rates may rise once more, such as small",
            "train anew with --overwrite",
        )
    steps = round(epochs * recipe.steps_per_epoch)
    if steps <= recipe.steps:
        raise UsageError(
            f"--epochs {epochs:g}, and the run has ended after {recipe.epochs}",
            "more epochs than it has had",
            f"--resume --epochs {2 * recipe.epochs}, or train anew with --overwrite",
        )
    longer = recipe.longer(steps)
    estimate = config["run"]["estimate_seconds"] * (steps - recipe.steps) / recipe.steps
    config = {
        **config,
        "run": {**config["run"], "estimate_seconds": round(estimate, 1)},
        "asked": {**config["asked"], "epochs": epochs},
        "recipe": longer.to_dict(),
    }
    run.write_config(config)
    (run.path / "report.json").unlink()
    reporter.message(
        f"Goes on to {longer.epochs} epochs: the rate rises once more, to {AGAIN * recipe.lr:.2g}, "
        "and falls as half a cosine."
    )
    return config


def _versions(recipe: Recipe) -> dict[str, str]:
    found = {"crosspatch": crosspatch.__version__, "python": platform.python_version()}
    found |= {name: given or "unknown" for name, given in installed(VERSIONED).items()}
    return {**found, "threads": str(recipe.threads), "device": recipe.device}


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
            "skipped": len(skipped),
            "skipped_files": [{"path": s.path, "reason": s.reason} for s in skipped],
            "split": split_sizes(pictures.split),
            "smallest": {"class": source.classes[rarest], "images": int(counts[rarest])},
            "cache": pictures.prepared.message,
            "model": recipe.model,
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
            "reasons": config["why"]["reasons"],
            "estimate": {"low": estimate, "high": estimate * SLOWER},
        }
    )
    if not len(pictures.split.val):
        reporter.message(
            "There are too few pictures for a validation split: the training pictures choose."
        )
