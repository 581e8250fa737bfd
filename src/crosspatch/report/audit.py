# SPDX-License-Identifier: Apache-2.0
"""The page of `crosspatch audit`: what needs a hand first, each with the command that mends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from markupsafe import Markup

from crosspatch.errors import visible
from crosspatch.report import figures
from crosspatch.report import page as pages

MOST_CLASSES = 40
"""Classes that are drawn and listed one by one; more are folded."""
SINGLES, SETS, MEMBERS, NAMED = 24, 16, 4, 300
"""Of a finding: pictures and sets that are shown, pictures of a set, and names that are listed."""

Pictures = Callable[[str], str | None]
"""Path of a picture -> a thumbnail's address (`page.thumbnail`), None where there is none."""


def page(found: dict[str, Any], pictures: Pictures = lambda path: None) -> str:
    """The page of an audit, as text. found: `data.audit.Audit.to_dict()`; pictures: thumbnails."""
    findings = [_shown(one, pictures) for one in found["findings"]]
    parts = {level: [one for one in findings if one["level"] == level] for level in _HEADS}
    classes = sorted(found["classes"], key=lambda one: (-one["all"], one["name"]))
    return pages.render(
        "audit.html",
        found={**found, "data": visible(found["data"])},
        not_looked=[*map(visible, found["not_looked"])],
        groups=[(_HEADS[level], of_level) for level, of_level in parts.items() if of_level],
        counts={level: len(of_level) for level, of_level in parts.items()},
        verdict=_verdict(parts),
        figure=_class_figure(classes) if classes else None,
        histograms=_histograms(found["histograms"]) if found["histograms"] else None,
        head=_class_head(found),
        rows=[_class_row(one, found) for one in classes],
        folded=len(classes) > MOST_CLASSES,
        kinds=[*found["formats"].items()],
        modes=[*found["modes"].items()],
    )


_HEADS = {"bad": "Needs a hand", "warn": "Worth a look", "good": "Good to know"}


def _verdict(parts: dict[str, list]) -> str:
    bad, warn = len(parts["bad"]), len(parts["warn"])
    if bad:
        many = "One thing needs" if bad == 1 else f"{bad} things need"
        return f"{many} a hand before a training is worth its time."
    if warn:
        return "Nothing stands in the way of a training; a few things are worth a look."
    return "Nothing was found that stands in the way of a training."


def _shown(finding: dict[str, Any], pictures: Pictures) -> dict[str, Any]:
    """A finding with thumbnails and, folded, all that it is about."""
    singles = [one for one in finding["items"] if "path" in one]
    sets = [one for one in finding["items"] if "paths" in one]
    thumbs = []
    for one in singles[:SINGLES]:
        address = pictures(one["path"])
        if address:
            said = filter(None, map(visible, (one["path"], one.get("note", ""))))
            thumbs.append((address, " · ".join(said)))
    together = []
    for one in sets[:SETS]:
        found = [(pictures(path), visible(path)) for path in one["paths"][:MEMBERS]]
        shown = [(address, path) for address, path in found if address]
        if shown:
            together.append({"note": visible(one.get("note", "")), "pictures": shown,
                             "more": len(one["paths"]) - len(shown)})  # fmt: skip
    named = [(one["path"], one.get("note", "")) for one in singles]
    named += [(" = ".join(one["paths"]), one.get("note", "")) for one in sets]
    named = [(visible(name), visible(note)) for name, note in named]
    told = {key: visible(finding[key]) for key in ("title", "text")}
    return {**finding, **told, "thumbs": thumbs, "sets": together, "named": named[:NAMED],
            "unnamed": max(0, len(named) - NAMED)}  # fmt: skip


def _splits(found: dict[str, Any]) -> list[str]:
    known = found["classes"][0] if found["classes"] else {}
    return [split for split in ("train", "val", "test") if split in known]


def _class_head(found: dict[str, Any]) -> list[str]:
    return ["class", *_splits(found), "pictures", "unreadable"]


def _class_row(row: dict[str, Any], found: dict[str, Any]) -> list[Any]:
    counts = [f"{row[split]:,}" for split in _splits(found)]
    return [visible(row["name"]), *counts, f"{row['all']:,}", f"{row['unreadable'] or ''}"]


def _class_figure(classes: list[dict[str, Any]]) -> Markup:
    """A bar for each class; of many classes one falling line."""
    counts = [one["all"] for one in classes]
    if len(classes) > MOST_CLASSES:
        with figures.drawing(7, 2.6) as (figure, panel):
            panel.fill_between(range(1, len(counts) + 1), counts, color=figures.COLOURS[0],
                               alpha=0.5, linewidth=0)  # fmt: skip
            panel.set(xlabel="classes, the largest first", ylabel="pictures", ylim=(0, None),
                      xlim=(1, len(counts)))  # fmt: skip
            return figures.to_svg(figure, f"Pictures of {len(classes)} classes, falling")
    splits = [split for split in ("train", "val", "test") if split in classes[0]]
    with figures.drawing(7, 0.6 + 0.24 * len(classes)) as (figure, panel):
        left = np.zeros(len(classes))
        for number, split in enumerate(splits or ["all"]):
            wide = np.array([one[split] for one in classes])
            panel.barh(range(len(classes)), wide, left=left, height=0.7,
                       color=figures.COLOURS[number], label=split)  # fmt: skip
            left += wide
        names = [_cut(one["name"]) for one in classes]
        panel.set_yticks(range(len(classes)), names)
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        panel.set(xlabel="pictures")
        if splits:
            panel.legend(loc="lower right")
        return figures.to_svg(figure, "Pictures of each class")


def _histograms(found: dict[str, dict[str, Any]]) -> Markup:
    with figures.drawing(9, 2.3, ncols=len(found), squeeze=False) as (figure, panels):
        for panel, (name, one) in zip(panels[0], found.items(), strict=True):
            panel.stairs(one["counts"], one["edges"], fill=True, color=figures.COLOURS[0])
            panel.axvline(one["median"], color=figures.COLOURS[1], linewidth=1.2)
            panel.set(title=f"{name} ({one['unit']})", ylabel="pictures")
            if one["log"]:
                panel.set_xscale("log")
                ticks = [one["least"], one["median"], one["greatest"]]
                panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
                panel.set_xticks([], minor=True)
        said = "; ".join(
            f"{name}: from {one['least']:.4g} to {one['greatest']:.4g}, median {one['median']:.4g}"
            for name, one in found.items()
        )
        return figures.to_svg(figure, said)


def _cut(name: str, most: int = 28) -> str:
    plain = visible(name)
    return plain if len(plain) <= most else f"{plain[: most - 1]}…"
