# SPDX-License-Identifier: Apache-2.0
"""What a run ended with: the chosen weights judged on validation and, once, on test; the report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.data.split import SPLITS, Split
from crosspatch.metrics.macs import count_macs
from crosspatch.metrics.reliability import of_answers
from crosspatch.metrics.tails import with_groups
from crosspatch.tasks import make_task
from crosspatch.training import team
from crosspatch.training.evaluation import predict_probabilities
from crosspatch.training.heads import head_figures
from crosspatch.training.loop import Outcome
from crosspatch.training.package import build_model, load_model, save_calibration
from crosspatch.training.pictures import Pictures
from crosspatch.training.recipe import Recipe
from crosspatch.training.reporter import Reporter
from crosspatch.training.run import RunFolder


def finish(
    run: RunFolder,
    recipe: Recipe,
    pictures: Pictures,
    config: dict[str, Any],
    outcome: Outcome,
    reporter: Reporter,
) -> dict[str, Any]:
    """Judge the chosen weights on val and, this once, on test; write the tables and the report."""
    model = _chosen(run, recipe, len(pictures.source.classes))
    figures, rows = _judge(run, model, recipe, pictures, reporter)
    summary = {
        "run": str(run.path),
        "out": str(run.path),
        "data": config["run"]["data"],
        "task": recipe.task,
        "model": recipe.model,
        "reduce": recipe.reduce,
        "objective": recipe.objective,
        **weight(model, recipe),
        "size": list(recipe.size),
        "classes": list(pictures.source.classes),
        "images": len(pictures.prepared.images),
        "skipped": len(pictures.prepared.skipped),
        "split": split_sizes(pictures.split),
        "epochs": recipe.epochs,
        "steps": outcome.steps,
        "best": outcome.best,
        "val": figures["val"],
        "test": figures["test"],
        "calibration": figures["calibration"],
        "baseline": config.get("baseline"),
        "seconds": outcome.seconds,
    }
    if not team.first():
        return summary
    run.write_predictions(make_task(recipe.task, ()).columns, rows)
    run.write_report({"schema": 1, **summary, "history": outcome.rows, "config": config})
    return {**summary, "files": _files(run.path)}


def _chosen(run: RunFolder, recipe: Recipe, classes: int) -> Any:
    """The model that validation chose, from the run's folder, which only the first process has."""
    own = team.first()
    model = load_model(run.path).module if own else build_model(recipe, classes, training=False)
    team.share_weights(model)
    return model.to(recipe.device)


def _judge(
    run: RunFolder, model: Any, recipe: Recipe, pictures: Pictures, reporter: Reporter
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of val and test, and a row per picture. Validation, where there is any, sets the
    temperature of all probabilities, and after it the thresholds of a task that has some."""
    task, temperature = make_task(recipe.task, pictures.source.classes), 1.0
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
            probabilities=task.probabilities,
            progress=partial(reporter.progress, doing),
            shared=True,
        ).numpy()
        labels = images.labels.numpy()
        if name == "val":
            temperature = task.fit_temperature(raw, labels)
            task = task.with_thresholds(task.calibrated(raw, temperature), labels)
            if team.first():
                save_calibration(run.model, temperature, len(images), task.thresholds)
            figures["calibration"] = {"temperature": temperature, "images": len(images)}
            if task.thresholds:
                figures["calibration"] |= _thresholds(task, labels, reporter)
        probs = task.calibrated(raw, temperature)
        figures[name] = with_groups(task.metrics(probs, labels), recipe.class_counts)
        figures[name]["uncalibrated"] = task.likelihood(raw, labels)
        figures[name]["reliability"] = {
            "before": of_answers(raw, labels), "after": of_answers(probs, labels)
        }  # fmt: skip
        if heads := head_figures(model, images, recipe, task, figures[name]):
            figures[name]["heads"] = heads
        rows.extend(task.predictions(images.keys, labels, probs, name))
    return figures, rows


def _thresholds(task: Any, labels: np.ndarray, reporter: Reporter) -> dict[str, Any]:
    """For the report: the threshold of each class, and those that no picture could set."""
    unset = [name for name, count in zip(task.classes, labels.sum(0), strict=True) if not count]
    if unset:
        more = f" and {len(unset) - 5} more" if len(unset) > 5 else ""
        reporter.message(
            f"Validation has no picture of {', '.join(unset[:5])}{more}: the threshold stays 0.5."
        )
    return {
        "thresholds": dict(zip(task.classes, task.thresholds, strict=True)), "unset": unset
    }  # fmt: skip


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


def weight(model: Any, recipe: Recipe) -> dict[str, int]:
    """Parameters, and multiply-adds for one picture."""
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "macs": count_macs(model, (3, *recipe.size))}


def split_sizes(split: Split) -> dict[str, int]:
    """Pictures in each split, by its name."""
    return {name: len(getattr(split, name)) for name in SPLITS}
