# SPDX-License-Identifier: Apache-2.0
"""What a run ended with: the chosen weights judged on validation and, once, on test; the report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from crosspatch.data.split import SPLITS, Split
from crosspatch.metrics.calibration import apply_temperature, fit_temperature
from crosspatch.metrics.classification import ece, nll
from crosspatch.metrics.macs import count_macs
from crosspatch.tasks.classify import PREDICTION_COLUMNS, Classify
from crosspatch.training import team
from crosspatch.training.evaluation import predict_probabilities
from crosspatch.training.loop import Outcome
from crosspatch.training.package import build_model, load_model, save_temperature
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
        "model": recipe.model,
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
        "seconds": outcome.seconds,
    }
    if not team.first():
        return summary
    run.write_predictions(PREDICTION_COLUMNS, rows)
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
            shared=True,
        ).numpy()
        labels = images.labels.numpy()
        if name == "val":
            temperature = fit_temperature(raw, labels)
            if team.first():
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


def weight(model: Any, recipe: Recipe) -> dict[str, int]:
    """Parameters, and multiply-adds for one picture."""
    parameters = sum(p.numel() for p in model.parameters())
    return {"parameters": parameters, "macs": count_macs(model, (3, *recipe.size))}


def split_sizes(split: Split) -> dict[str, int]:
    """Pictures in each split, by its name."""
    return {name: len(getattr(split, name)) for name in SPLITS}
