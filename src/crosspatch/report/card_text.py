# SPDX-License-Identifier: Apache-2.0
"""Sentences of the model card: data, limits, preprocessing, figures; not escaped yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crosspatch.deploy.bundle import DECODING
from crosspatch.report.page import between, count, percent

NOT_MEASURED = "not measured"
TASKS = {
    "classify": "naming the one class of a picture",
    "multilabel": "naming all classes of a picture, each with a threshold of its own",
}
FITS = {
    "crop": "resized until it covers the frame, what hangs over is cut off",
    "pad": "resized until it fits into the frame, the rest is filled with the mean colour",
    "squash": "stretched to the frame, its proportions are lost",
}


def score(figures: dict[str, Any]) -> str:
    """`accuracy 91.3 % (88.7 to 93.5 %)`, or mAP where a picture has several labels."""
    name, keys = ("accuracy", ("accuracy", "low", "high"))
    if "map" in figures:
        name, keys = ("mean average precision", ("map", "map_low", "map_high"))
    value, low, high = (figures.get(key) for key in keys)
    if value is None:
        return f"{name} {NOT_MEASURED}"
    span = f" ({between((low, high))})" if low is not None and high is not None else ""
    return f"{name} {percent(value)}{span}"


def headline(report: dict[str, Any], judged: str, figures: dict[str, Any]) -> str:
    """The one sentence above all others."""
    names = len(report["classes"])
    if not figures:
        return f"{report['model']} on {names:,} classes: its accuracy was {NOT_MEASURED}."
    pictures = f"{count(figures.get('images'))} {judged} pictures"
    return f"{report['model']} on {names:,} classes: {score(figures)} on {pictures}."


def data(report: dict[str, Any]) -> dict[str, Any]:
    """Where the data are, what they are known by, and how they were divided."""
    config = report["config"]
    recipe, reading = config.get("recipe") or {}, config.get("reading") or {}
    group = reading.get("group")
    together = f"pictures of one group (--group {group}), " if group else ""
    seed = recipe.get("split_seed", recipe.get("seed", "not known"))
    rule = (
        "splits that the data name are kept; what is missing is carved out by class, 15 % of all "
        f"for validation and for test, seed {seed}; {together}"
        "exact copies and near-duplicates stay on one side"
    )
    return {
        "data": str(report.get("data") or "not known"),
        "fingerprint": str((config.get("run") or {}).get("fingerprint") or "not known"),
        "split_rule": rule,
        "noted": [str(one) for one in (config.get("why") or {}).get("reasons") or ()],
    }


def limits(report: dict[str, Any], figures: dict[str, Any]) -> list[str]:
    """Who should not use it: what it has never seen, and where it fails."""
    several, names = report.get("task") == "multilabel", len(report["classes"])
    said = (
        "For pictures of anything else than its classes it may name some all the same"
        if several
        else f"It names one of its {names:,} classes for every picture, also for one that shows "
        "none of them: do not use it where other things occur, or let a person look at unsure ones"
    )
    lines = [f"{said}. How it answers for classes it has never seen was {NOT_MEASURED}."]
    lines += _kinds(report.get("pictures"))
    rows = [row for row in figures.get("classes") or () if row.get("support")]
    rows = [row for row in rows if row.get("recall") is not None and row["recall"] < 0.5]
    if rows:
        worst = sorted(rows, key=lambda row: (row["recall"], row["name"]))[:5]
        told = ", ".join(f"{row['name']} ({percent(row['recall'])} found)" for row in worst)
        more = f", and {len(rows) - 5} more" if len(rows) > 5 else ""
        lines.append(f"It misses half or more of the pictures of these classes: {told}{more}.")
    lines.append(
        "Not where an error harms somebody without a person who checks: the figures hold for "
        "pictures like those it was tested on, from the same source."
    )
    return lines


def _kinds(found: dict[str, Any] | None) -> list[str]:
    """What kinds of pictures it has and has not seen."""
    if not found:
        return [f"Which sizes and kinds of pictures it has seen was {NOT_MEASURED}."]
    lines = []
    if found["short_side"]:
        short, long = found["short_side"], found["long_side"]
        lines.append(
            f"It has seen pictures with a shorter side of {short[0]:,} to {short[2]:,} pixels "
            f"(median {short[1]:,}) and a longer one of {long[0]:,} to {long[2]:,} (of "
            f"{found['sized']:,} training pictures looked at). What is far smaller or larger is "
            "new to it."
        )
    if found["seen"]:
        grey, seen = found["grey"], found["seen"]
        kind = {
            0: "only pictures in colour, no grey ones",
            seen: "only grey pictures, none in colour",
        }
        said = kind.get(grey, f"grey pictures ({percent(grey / seen, 0)}) and pictures in colour")
        lines.append(f"It has seen {said} (of {seen:,} looked at).")
    formats = {name: number for name, number in found["formats"].items() if name}
    if formats:
        told = ", ".join(f"{name} ({count(number)})" for name, number in formats.items())
        lines.append(
            f"It has seen files of these kinds: {told}; others decode, but were not tried."
        )
    return lines


def preprocessing(config: Path) -> list[str]:
    """From a file to the network's input, in words; from the model's config.json."""
    try:
        given = json.loads(config.read_text(encoding="utf-8"))["preprocessing"]
        height, width = given["size"]
        stored = tuple(given["store"])
    except (OSError, ValueError, KeyError, TypeError):
        return ["not known: the model's config.json is missing or damaged"]
    lines = [f"{name}: {rule}" for name, rule in DECODING.items()]
    fit = f"{FITS.get(given['fit'], given['fit'])}, by antialiased bicubic interpolation"
    frame = f"the frame of {stored[0]} x {stored[1]} pixels"
    lines.append(f"size: the picture is {fit.replace('the frame', frame, 1)}")
    if stored != (height, width):
        lines.append(f"of it the middle {height} x {width} pixels are taken")
    mean, std = (", ".join(f"{v:g}" for v in given[key]) for key in ("mean", "std"))
    lines.append(
        f"values from 0 to 1, less the mean ({mean}), divided by ({std}), for each channel"
    )
    return lines


def figures(report: dict[str, Any], judged: str, found: dict[str, Any]) -> list[str]:
    """Lines with the figures of the split that judges, of validation, and of the baseline."""
    if not found:
        return [f"{NOT_MEASURED}: there were no pictures to judge it by"]
    lines = [f"{judged}: {score(found)}, {count(found.get('images'))} pictures"]
    if "map" in found and found.get("accuracy") is not None:
        lines.append(f"every label of a picture right: {percent(found['accuracy'])}")
    best = found.get("topk")
    if best and len(report["classes"]) > best["k"]:
        lines.append(f"top-{best['k']} accuracy {percent(best['accuracy'])}")
    lines.append(f"macro F1 {percent(found.get('macro_f1'))}")
    if judged == "test" and report.get("val"):
        lines.append(f"val, which chose the weights: {score(report['val'])}")
    baseline = report.get("baseline") or {}
    named = {"nearest_class_mean": "nearest class mean", "linear_probe": "linear probe"}
    kinds = [key for key in named if (baseline.get(key) or {}).get(judged)]
    for key in kinds:
        told = f"{named[key]} on {baseline.get('features', 'features')}, before training"
        lines.append(f"baseline, {told}: {score(baseline[key][judged])}")
    return lines if kinds else [*lines, f"an honest baseline: {NOT_MEASURED}"]


def calibration(report: dict[str, Any], judged: str, found: dict[str, Any]) -> str:
    """Calibration error before and after the temperature."""
    fitted = report.get("calibration") or {}
    before = found.get("uncalibrated") or {}
    if not found or found.get("ece") is None:
        return NOT_MEASURED
    if not fitted.get("images"):
        return f"error {percent(found['ece'])} on {judged}; no temperature was fitted"
    return (
        f"expected calibration error on {judged} {percent(before.get('ece'))} before and "
        f"{percent(found['ece'])} after a temperature of {fitted['temperature']:.3f}, fitted on "
        f"{count(fitted['images'])} validation pictures; log-loss {before.get('nll', 0):.3f} and "
        f"{found['nll']:.3f}"
    )
