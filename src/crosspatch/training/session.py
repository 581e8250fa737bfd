# SPDX-License-Identifier: Apache-2.0
"""A whole training, from the name of the data to the report: what `crosspatch train` calls."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import crosspatch
from crosspatch.data.prepare import (
    ImageSet,
    Prepared,
    plan_memory,
    prepare,
    survey,
    write_skipped,
)
from crosspatch.data.sources import DIGITS, Source, open_source
from crosspatch.data.split import SPLITS, Split, gaps, make_split, read_split, write_split
from crosspatch.errors import DataError, UsageError
from crosspatch.layers import linear
from crosspatch.metrics.calibration import apply_temperature, fit_temperature
from crosspatch.metrics.classification import ece, nll
from crosspatch.metrics.macs import count_macs
from crosspatch.tasks.classify import PREDICTION_COLUMNS, Classify
from crosspatch.training import machine as machines
from crosspatch.training import plan as plans
from crosspatch.training.balance import resolve_balance
from crosspatch.training.evaluation import predict_probabilities
from crosspatch.training.loop import Outcome, Reporter, Silent, fit
from crosspatch.training.measure import measure_evaluation, measure_step
from crosspatch.training.objective import make_objective
from crosspatch.training.optim import AGAIN
from crosspatch.training.package import load_model, save_temperature
from crosspatch.training.probe import fit_probe
from crosspatch.training.recipe import Recipe
from crosspatch.training.run import RunFolder

VERSIONED = ("torch", "numpy", "timm", "lightning-fabric", "safetensors", "pillow")
FEWER_THREADS = 1.4  # half the threads must be this much faster, so that a quiet machine keeps all
SLOWER = 1.25  # a shared machine may take this much longer than the estimate


@dataclass
class _Pictures:
    """What is trained on: the readable pictures of a source, divided."""

    source: Source
    prepared: Prepared
    split: Split
    fingerprint: str

    def part(self, name: str) -> ImageSet:
        """The pictures of a split, as positions among the readable ones."""
        wanted, kept = getattr(self.split, name), self.prepared.kept
        places = np.searchsorted(kept, wanted)
        found = places < len(kept)
        found[found] = kept[places[found]] == wanted[found]
        if not found.all():
            lost = self.source.items[int(wanted[~found][0])].key
            raise DataError(
                f"{lost} can no longer be read",
                "the pictures the run was begun with",
                "put it back, or train anew with --overwrite",
            )
        return self.prepared.images.subset(places)

    @property
    def validation(self) -> ImageSet:
        """The pictures that choose: `val`, or `train` where there are too few to have any."""
        return self.part("val" if len(self.split.val) else "train")


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
        objective = make_objective(recipe, source.classes)
        _announce(run, recipe, pictures, config, objective, reporter)
        facts = {"fingerprint": pictures.fingerprint, "versions": config["versions"]}
        train, val = pictures.part("train"), pictures.validation
        train_it = fit_probe if recipe.penalties else fit
        outcome = train_it(recipe, objective, train, val, run, reporter, resume=resume, facts=facts)
        summary = _finish(run, recipe, pictures, config, outcome, reporter)
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
) -> tuple[Recipe, _Pictures, dict[str, Any]]:
    """Plan, decode, divide, measure; write what the folder needs before the first step."""
    if source.name == DIGITS:
        given = {"flip": False, **given}
    seed, look, machine = given.get("seed", 0), survey(source), machines.look()
    guess = make_split(source, seed=seed)
    first, _ = plans.plan(look, len(guess.train), len(source.classes), machine, given)
    prepared = _prepare(source, first, reporter)
    split = make_split(source, keep=prepared.kept, seed=seed, twins=prepared.twins)
    pictures = _Pictures(source, prepared, split, source.fingerprint())
    if first.weights:
        _refuse_seen(RunFolder(first.weights), pictures)
    recipe, reasons = plans.plan(look, len(split.train), len(source.classes), machine, given)
    shape = {key: getattr(first, key) for key in ("model", "size", "store", "fit")}
    workers = 0 if prepared.images.cached else given.get("workers", max(1, machine.cores - 1))
    recipe = replace(recipe, **shape, workers=workers)
    counts = _counts(source, split.train)
    recipe = resolve_balance(_resolve_products(recipe), counts, source.classes, reasons)
    reasons += [*source.remarks, *prepared.remarks, *gaps(source, split)]
    recipe, estimate = _measure(recipe, pictures, given, reasons, began)
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
) -> tuple[Recipe, _Pictures, dict[str, Any]]:
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
    pictures = _Pictures(source, _prepare(source, recipe, reporter), split, fingerprint)
    now = _versions(recipe)
    return recipe, pictures, {**config, "versions": now}


def _refuse_seen(run: RunFolder, pictures: _Pictures) -> None:
    """Raises UsageError where `run`, which gives the weights, was trained on pictures that would
    validate or test them here."""
    config = run.read_config() if run.config_path.is_file() else {}
    if config.get("run", {}).get("fingerprint") != pictures.fingerprint:
        return
    theirs = read_split(run.path / "split.csv", pictures.source)
    judging = np.concatenate([pictures.split.val, pictures.split.test])
    seen = int(np.isin(judging, theirs.train).sum())
    if seen:
        raise UsageError(
            f"{run.path} was trained on {seen:,} of the pictures that would judge it here",
            "the split of that run, for the same pictures",
            f"add --seed {config['recipe']['seed']}",
        )


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


def _prepare(source: Source, recipe: Recipe, reporter: Reporter) -> Prepared:
    _, memory = plan_memory(len(source), recipe.preprocess)
    reporter.message(f"reading: {memory}")
    tell = lambda done, total: reporter.progress("reading pictures", done, total)
    return prepare(source, recipe.preprocess, progress=tell)


def _counts(source: Source, part: np.ndarray) -> np.ndarray:
    return np.bincount(source.labels[part], minlength=len(source.classes))


def _resolve_products(recipe: Recipe) -> Recipe:
    """The recipe with `linear` resolved for good, so that a resumed run computes the same bits."""
    plain = recipe.device == "cpu" and recipe.precision == "fp32" and not recipe.compile
    torch.set_num_threads(recipe.threads)
    return replace(recipe, linear="on" if plain and linear.use(recipe.linear) else "off")


def _measure(
    recipe: Recipe,
    pictures: _Pictures,
    given: dict[str, Any],
    reasons: list[str],
    began: float,
) -> tuple[Recipe, float]:
    """(the recipe with its threads and its final length, estimated seconds of the training)."""
    if recipe.penalties:
        objective = make_objective(recipe, pictures.source.classes)
        seen, val = pictures.prepared.images, pictures.validation
        return recipe, measure_evaluation(recipe, objective, val) * len(seen) / len(val)
    measuring = time.perf_counter()
    recipe, per_step = _choose_threads(recipe, pictures, given, reasons)
    compiling = time.perf_counter() - measuring if recipe.compile else 0.0  # and once more in `fit`
    objective = make_objective(recipe, pictures.source.classes)
    per_eval = measure_evaluation(recipe, objective, pictures.validation)
    if recipe.time_budget is None:
        if "eval_every" not in given:
            recipe = plans.space_evaluations(recipe, per_step, per_eval)
    else:
        left = recipe.time_budget - (time.perf_counter() - began)
        tail = per_eval * len(pictures.split.test) / max(1, len(pictures.validation))
        recipe, why = plans.fit_to_time(recipe, per_step, per_eval, left - tail - compiling, given)
        reasons.append(why)
    return recipe, compiling + plans.run_seconds(recipe, per_step, per_eval)


def _choose_threads(
    recipe: Recipe, pictures: _Pictures, given: dict[str, Any], reasons: list[str]
) -> tuple[Recipe, float]:
    """(the recipe, seconds per step). All cores, unless half of them are clearly faster: threads
    that wait for each other on busy cores, or on small models, cost more than they bring."""

    def seconds(candidate: Recipe) -> float:
        objective = make_objective(candidate, pictures.source.classes)
        return measure_step(candidate, objective, pictures.part("train"))

    cores, best = recipe.threads, seconds(recipe)
    fixed = "threads" in given or recipe.compile or recipe.device != "cpu"
    while recipe.threads > 1 and not fixed:
        fewer = replace(recipe, threads=recipe.threads // 2)
        found = seconds(fewer)
        if found * FEWER_THREADS > best:
            break
        recipe, best = fewer, found
    if recipe.threads < cores:
        reasons.append(
            f"{recipe.threads} of {cores} CPU cores: with more, steps took longer (a busy machine)."
        )
    return recipe, best


def _versions(recipe: Recipe) -> dict[str, str]:
    found = {"crosspatch": crosspatch.__version__, "python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return {**found, "threads": str(recipe.threads), "device": recipe.device}


def _announce(
    run: RunFolder,
    recipe: Recipe,
    pictures: _Pictures,
    config: dict[str, Any],
    objective: Any,
    reporter: Reporter,
) -> None:
    """Tell the reporter everything that is known before the first step."""
    source, skipped = pictures.source, pictures.prepared.skipped
    counts = _counts(source, pictures.split.train)
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
            "split": _sizes(pictures.split),
            "smallest": {"class": source.classes[rarest], "images": int(counts[rarest])},
            "cache": pictures.prepared.message,
            "model": recipe.model,
            "size": list(recipe.size),
            "fit": recipe.fit,
            **_weight(objective.exported, recipe),
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


def _weight(model: Any, recipe: Recipe) -> dict[str, int]:
    """Parameters, and multiply-adds for one picture."""
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "macs": count_macs(model, (3, *recipe.size))}


def _sizes(split: Split) -> dict[str, int]:
    return {name: len(getattr(split, name)) for name in SPLITS}


def _finish(
    run: RunFolder,
    recipe: Recipe,
    pictures: _Pictures,
    config: dict[str, Any],
    outcome: Outcome,
    reporter: Reporter,
) -> dict[str, Any]:
    """Judge the chosen weights on val and, this once, on test; write the tables and the report."""
    model = load_model(run.path).module.to(recipe.device)
    figures, rows = _judge(run, model, recipe, pictures, reporter)
    run.write_predictions(PREDICTION_COLUMNS, rows)
    summary = {
        "run": str(run.path),
        "out": str(run.path),
        "data": config["run"]["data"],
        "model": recipe.model,
        **_weight(model, recipe),
        "size": list(recipe.size),
        "classes": list(pictures.source.classes),
        "images": len(pictures.prepared.images),
        "skipped": len(pictures.prepared.skipped),
        "split": _sizes(pictures.split),
        "epochs": recipe.epochs,
        "steps": outcome.steps,
        "best": outcome.best,
        "val": figures["val"],
        "test": figures["test"],
        "calibration": figures["calibration"],
        "seconds": outcome.seconds,
    }
    run.write_report({"schema": 1, **summary, "history": outcome.rows, "config": config})
    return {**summary, "files": _files(run.path)}


def _judge(
    run: RunFolder, model: Any, recipe: Recipe, pictures: _Pictures, reporter: Reporter
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of val and test, and a row per picture. Validation, where there is any, sets the
    temperature of all probabilities."""
    task, temperature = Classify(pictures.source.classes), 1.0
    figures: dict[str, Any] = {"calibration": {"temperature": 1.0, "images": 0}}
    rows: list[dict[str, Any]] = []
    for name, doing in (("val", "validating"), ("test", "testing")):
        images = pictures.part(name)
        if not len(images):
            figures[name] = None
            continue
        raw = predict_probabilities(
            model,
            images,
            recipe.eval_batch,
            precision=recipe.precision,
            workers=recipe.workers,
            progress=partial(reporter.progress, doing),
        ).numpy()
        labels = images.labels.numpy()
        if name == "val":
            temperature = fit_temperature(raw, labels)
            save_temperature(run.model, temperature, len(images))
            figures["calibration"] = {"temperature": temperature, "images": len(images)}
        probs = apply_temperature(raw, temperature)
        figures[name] = task.metrics(probs, labels)
        figures[name]["uncalibrated"] = {"nll": nll(raw, labels), "ece": ece(raw, labels)}
        rows.extend(task.predictions(images.keys, labels.tolist(), probs, name))
    return figures, rows


def _files(folder: Path) -> dict[str, int]:
    """Bytes of what the run holds, folders summed."""
    found = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found[f"{entry.name}/"] = sum(f.stat().st_size for f in entry.rglob("*"))
        else:
            found[entry.name] = entry.stat().st_size
    return found
