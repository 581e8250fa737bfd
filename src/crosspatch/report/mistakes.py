# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report: what it names rightly, its worst mistakes, labels that may be wrong."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crosspatch.data.decode import UnreadableImage
from crosspatch.data.skipped import quoting
from crosspatch.data.sources import Source
from crosspatch.errors import CrosspatchError
from crosspatch.explain.evidence import worst
from crosspatch.report.page import percent, thumbnail
from crosspatch.report.story import Story, named

SAMPLES = 8
LABELS = "label_errors.csv"
COLUMNS: tuple[str, ...] = ("path", "label", "suggested", "score")
MOST_LABELS = 12  # suspected labels that the page shows
DOUBTED, LEAST_DOUBTED = 0.02, 20
"""The share of the judged pictures that a table of suspected labels may hold, and at least so many:
of a weak model most doubts are its own mistakes."""


class Mistake(NamedTuple):
    """picture, nearest: addresses of thumbnails, "" without one; the rest is text."""

    picture: str
    text: str
    path: str
    nearest: str
    nearest_text: str


class Pictures:
    """Thumbnails of a source's pictures by their keys; "" for those that cannot be read."""

    def __init__(self, source: Source | None) -> None:
        self.source = source
        self.place = {item.key: index for index, item in enumerate(source.items)} if source else {}

    def thumb(self, key: str, side: int = 96) -> str:
        """The address of a small copy."""
        if self.source is None or key not in self.place:
            return ""
        try:
            return thumbnail(self.source.image(self.place[key], side=side), side)
        except (UnreadableImage, CrosspatchError, OSError):
            return ""


def samples(story: Story, pictures: Pictures) -> list[tuple[str, str]]:
    """(thumbnail, caption) of pictures named rightly, one per class, the surest of each."""
    if story.several:
        return []
    best: dict[str, dict[str, Any]] = {}
    for row in story.rows:
        old = best.get(row["label"])
        if str(row["correct"]) == "1" and (
            old is None or float(row["confidence"]) > float(old["confidence"])
        ):
            best[row["label"]] = row
    names = sorted(best)
    if len(names) > SAMPLES:
        names = [names[i] for i in np.linspace(0, len(names) - 1, SAMPLES).astype(int)]
    shown = [(pictures.thumb(best[name]["path"]), named(name)) for name in names]
    return [one for one in shown if one[0]]


def mistakes(story: Story, pictures: Pictures) -> list[Mistake]:
    """The worst mistakes, each with the training picture that is nearest where it is known."""
    pairs = (story.evidence.get("neighbours") or {}).get("pairs") or {}
    return [_mistake(row, pairs.get(row["path"]), pictures) for row in worst(story.rows)]


def _mistake(row: dict[str, Any], near: dict[str, Any] | None, pictures: Pictures) -> Mistake:
    if "label" in row:
        text = f"{named(row['label'])}, taken for {named(row['prediction'])} "
        text += f"({percent(float(row['confidence']), 0)} sure)"
    else:
        parts = [f"{word} {named(row[key], 80)}" for key, word in
                 (("missed", "missed"), ("added", "added")) if row[key]]  # fmt: skip
        text = "; ".join(parts)
    nearest, said = "", ""
    if near:
        nearest = pictures.thumb(near["path"])
        said = f"nearest it was trained on: {named(near['class'])} ({named(near['path'], 60)})"
    return Mistake(pictures.thumb(row["path"]), text, named(row["path"], 80), nearest, said)


def suspected(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Rows of `COLUMNS`: judged pictures whose label may be wrong, the most suspicious first.

    After confident learning (Northcutt et al., arXiv 1911.00068, section 3.1): a picture is one of
    another class where the network, which never trained on it, is as sure of that class as it
    mostly is where it says so and the label agrees. score: confidence less the label's probability.
    """
    if not rows or "label" not in rows[0]:
        return []
    sure: dict[str, list[float]] = {}
    for row in rows:
        if str(row["correct"]) == "1":
            sure.setdefault(row["label"], []).append(float(row["confidence"]))
    usual = {name: float(np.mean(values)) for name, values in sure.items()}
    found = [
        {"path": row["path"], "label": row["label"], "suggested": row["prediction"],
         "score": f"{float(row['confidence']) - float(row['label_probability']):.4f}"}
        for row in rows
        if str(row["correct"]) != "1"
        and float(row["confidence"]) >= usual.get(row["prediction"], 1.1)
    ]  # fmt: skip
    most = max(LEAST_DOUBTED, round(DOUBTED * len(rows)))
    return sorted(found, key=lambda row: (-float(row["score"]), row["path"]))[:most]


def write_labels(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """The table, whole or as it was. Raises OSError where it cannot be written."""
    draft = path.with_name(f".writing-{os.getpid()}-{path.name}")
    with draft.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        how = quoting(row["path"] for row in rows)
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", quoting=how)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(draft, path)
