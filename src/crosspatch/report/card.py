# SPDX-License-Identifier: Apache-2.0
"""card.md: what a model is, for whom it is not, how good, how fast, how it was made.

Everything is read from the run's folder; only what kinds of pictures it has seen is looked up in
its data, once, and kept in report.json. What nobody measured says "not measured". Names of classes,
files and commands are escaped for Markdown (`report.markdown`).
"""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crosspatch
from crosspatch import catalog
from crosspatch.data.kinds import kinds
from crosspatch.data.opening import open_source
from crosspatch.errors import CrosspatchError, DataError, UsageError
from crosspatch.metrics.interval import wilson
from crosspatch.report import card_made, card_text
from crosspatch.report.markdown import render
from crosspatch.report.page import between, count, percent, size, write_page
from crosspatch.report.shipped import keep
from crosspatch.training.run import RunFolder

CARD = "card.md"
CLASSES = 50
"""Classes that are listed one by one; of more, the ten with most and the ten with fewest."""
ENDS = 10
PARTS = (1.0, 0.9, 0.75, 0.5, 0.25)
"""Shares of the pictures that are answered in the table of abstaining."""
NOT_MEASURED = "not measured"


def write_card(run_folder: str | Path) -> Path:
    """Write card.md of a run that has ended; returns its path.

    Raises DataError where the run's report or settings are missing or damaged, UsageError where the
    folder cannot be written.
    """
    run = RunFolder(run_folder)
    report = read_report(run)
    if "pictures" not in report:
        found = _pictures(run, report)
        if found is not None:
            keep(run.report_path, "pictures", found)
            report["pictures"] = found
    path = run.path / CARD
    try:
        text = render("card.md", **values(run, report))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(run.report_path, error) from error
    write_page(path, text)
    return path


def read_report(run: RunFolder) -> dict[str, Any]:
    """report.json, with the settings of config.toml in it. Raises DataError."""
    try:
        report = json.loads(run.report_path.read_text(encoding="utf-8"))
        report.setdefault("config", {})
        if not report["config"] and run.config_path.is_file():
            report["config"] = tomllib.loads(run.config_path.read_text(encoding="utf-8"))
        if not {"classes", "model", "split"} <= set(report):
            raise ValueError("not the report of a run")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise _damaged(run.report_path, error) from error
    return report


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read ({error})",
        "the report of a run that has ended",
        f"finish the run: crosspatch train DATA --out {path.parent} --resume",
    )


def values(run: RunFolder, report: dict[str, Any]) -> dict[str, Any]:
    """What the template is given."""
    judged = "test" if report.get("test") else "val"
    figures = report.get(judged) or {}
    split = _table(run.path / "split.csv")
    counts, more = _class_counts(report, split)
    evidence = report.get("evidence") or {}
    rows, fewer = _per_class(figures)
    weights = run.model / "model.safetensors"
    bytes_ = weights.stat().st_size if weights.is_file() else evidence.get("bytes")
    abstain = _abstain([r for r in _table(run.path / "predictions.csv") if r["split"] == judged])
    return {
        "name": run.path.resolve().name,
        "version": crosspatch.__version__,
        "headline": card_text.headline(report, judged, figures),
        "task": card_text.TASKS.get(report.get("task", ""), report.get("task") or "not known"),
        "classes": report["classes"],
        "images": count(report.get("images")),
        "skipped": f", {report['skipped']:,} left out" if report.get("skipped") else "",
        "split_names": list(report["split"]),
        "class_counts": counts,
        "more_classes": more,
        "split_text": ", ".join(f"{n:,} {name}" for name, n in report["split"].items()),
        **card_text.data(report),
        "limits": card_text.limits(report, figures),
        "model": report["model"],
        "parameters": count(report.get("parameters")),
        "macs": count(report.get("macs")),
        "weight_bytes": size(bytes_) if bytes_ else NOT_MEASURED,
        "papers": papers(report),
        "preprocessing": card_text.preprocessing(run.model / "config.json"),
        "training": card_made.training(report),
        "figures": card_text.figures(report, judged, figures),
        "groups": [_group(one) for one in figures.get("groups") or ()],
        "no_groups": "classes are even enough that it says nothing" if figures else NOT_MEASURED,
        "class_head": _class_head(figures),
        "per_class": rows,
        "fewer_classes": fewer,
        "calibration": card_text.calibration(report, judged, figures),
        "abstain": abstain,
        "judged": judged,
        "robustness": [_worse(one) for one in evidence.get("robustness") or ()],
        "speed": card_made.speed(report, evidence),
        "steps": card_made.steps(report),
        "parity": card_made.parity(report),
        "licences": card_made.licences(report),
        "again": card_made.again(report),
        "hashes": card_made.hashes(run.path, report),
    }


def papers(report: dict[str, Any]) -> list[dict[str, str]]:
    """[{what, title, arxiv, command}] of the network and of what it was trained with."""
    recipe = report["config"].get("recipe") or {}
    words = [("network", report["model"])]
    words += [("fewer tokens", str(report["reduce"]).split(":")[0])] if report.get("reduce") else []
    objective = report.get("objective")
    words += [("objective", objective)] if objective not in (None, "", "supervised") else []
    words += [("mixing", one) for one in recipe.get("mix") or ()]
    words += [("weights of classes", recipe.get("balance", "none"))]
    words += [("flat minima", "sam")] if recipe.get("sam") else []
    found: dict[str, dict[str, str]] = {}
    for what, word in words:
        try:
            one = catalog.find(str(word))[0]
        except UsageError:
            continue
        told = {"title": one.title, "arxiv": one.arxiv, "command": f"crosspatch papers {one.slug}"}
        found.setdefault(one.slug, {"what": what, **told})
    return list(found.values())


def _pictures(run: RunFolder, report: dict[str, Any]) -> dict[str, Any] | None:
    """What kinds of pictures it learnt from; None where they are no longer there."""
    trained = {row["path"] for row in _table(run.path / "split.csv") if row["split"] == "train"}
    try:
        source = open_source(report["data"], **(report["config"].get("reading") or {}))
    except (CrosspatchError, OSError, KeyError):
        return None
    places = [place for place, item in enumerate(source.items) if item.key in trained]
    return kinds(source, places) if places else None


def _table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file of the run, none where it is missing."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def _class_counts(
    report: dict[str, Any], split: list[dict[str, str]]
) -> tuple[list[list[str]], str]:
    """(a row for each class: its pictures in every split; what is said of those left out)."""
    names, splits = list(report["classes"]), list(report["split"])
    found = {name: dict.fromkeys(splits, 0) for name in names}
    several = report.get("task") == "multilabel"
    for row in split:
        for name in row["class"].split("|") if several else [row["class"]]:
            if name in found and row["split"] in splits:
                found[name][row["split"]] += 1
    if not split:
        return [], "How many pictures each class has is not known: split.csv is missing."
    first = splits[0]
    told = [[name, *(count(found[name][s]) for s in splits)] for name in names]
    if len(names) <= CLASSES:
        return told, ""
    order = sorted(range(len(names)), key=lambda place: -found[names[place]][first])
    kept = [*order[:ENDS], *order[-ENDS:]]
    left = len(names) - len(kept)
    return [told[place] for place in kept], (
        f"These are the {ENDS} classes with most and the {ENDS} with fewest pictures to train on; "
        f"the other {left:,} stand in classes.txt and split.csv."
    )


def _class_head(figures: dict[str, Any]) -> list[str]:
    last = ["average precision"] if "map" in figures else []
    return ["class", "pictures", "found", "95 % range", "precision", "F1", *last]


def _per_class(figures: dict[str, Any]) -> tuple[list[list[str]], str]:
    """(a row for each judged class, of many those found least often first; what was left out)."""
    told = [row for row in figures.get("classes") or () if row.get("support")]
    kept, left = told, 0
    if len(told) > CLASSES:
        kept = sorted(told, key=lambda row: (row["recall"], row["name"]))[: 2 * ENDS]
        left = len(told) - len(kept)
    rows = [_class_row(row, "map" in figures) for row in kept]
    more = f"These are found least often; the other {left:,} stand in report.json." if left else ""
    return rows, more


def _class_row(row: dict[str, Any], several: bool) -> list[str]:
    cells = [row["name"], count(row["support"]), percent(row["recall"])]
    known = row.get("recall_low") is not None
    cells.append(between((row["recall_low"], row["recall_high"])) if known else "–")
    cells += [percent(row["precision"]), percent(row["f1"])]
    return [*cells, percent(row.get("ap"))] if several else cells


def _group(one: dict[str, Any]) -> list[str]:
    known = one["accuracy"] is not None
    span = between((one["low"], one["high"])) if known else "–"
    number = count(len(one["classes"]))
    return [one["name"], number, count(one["training"]), percent(one["accuracy"]), span]


def _worse(one: dict[str, Any]) -> list[str]:
    cost = "–"
    if "change" in one:
        low, high = 100 * one["change_low"], 100 * one["change_high"]
        cost = f"{100 * one['change']:+.1f} ({low:+.1f} to {high:+.1f})"
    return [one["said"], percent(one["accuracy"]), between((one["low"], one["high"])), cost]


def _abstain(rows: list[dict[str, str]]) -> list[list[str]]:
    """[probability, share answered, share of those right, its interval], surest pictures first."""
    if not rows or "label" not in rows[0]:
        return []
    sure = sorted(((float(r["confidence"]), r["correct"] == "1") for r in rows), reverse=True)
    return [list(_answered(sure, part)) for part in PARTS if round(part * len(sure))]


def _answered(sure: list[tuple[float, bool]], part: float) -> Iterator[str]:
    least = sure[round(part * len(sure)) - 1][0]
    kept = [right for confidence, right in sure if confidence >= least]
    yield f"{least:.3f}"
    yield percent(len(kept) / len(sure))
    yield percent(sum(kept) / len(kept))
    yield between(wilson(sum(kept), len(kept)))
