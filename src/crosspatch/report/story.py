# SPDX-License-Identifier: Apache-2.0
"""What a page tells: the figures of some judged pictures, and what is known beside them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crosspatch.data.sources import Source
from crosspatch.errors import visible
from crosspatch.metrics.abstain import Answered, answered, threshold_for

WANTED = (0.8, 0.9, 0.95, 0.99)
"""Precisions for which a threshold is looked for."""
LONGEST = 40  # letters of a name that are shown


@dataclass(frozen=True)
class Story:
    """data: what was judged, as typed; split: its name; metrics: of the task, for that split; rows:
    of predictions.csv, those pictures; choosing: the same of other pictures, on which thresholds
    are chosen; report: report.json of the run, as far as there is one; source: the pictures, None
    where they are not there; remarks: sentences for the end."""

    data: str
    split: str
    metrics: dict[str, Any]
    rows: Sequence[dict[str, Any]]
    choosing: Sequence[dict[str, Any]] = ()
    report: dict[str, Any] = field(default_factory=dict)
    source: Source | None = None
    remarks: tuple[str, ...] = ()

    @property
    def several(self) -> bool:
        """Whether a picture may have several labels."""
        return "map" in self.metrics

    @property
    def evidence(self) -> dict[str, Any]:
        return self.report.get("evidence") or {}

    @property
    def classes(self) -> list[dict[str, Any]]:
        return self.metrics["classes"]

    @property
    def training(self) -> dict[str, int]:
        """Training pictures by class, where the run tells them."""
        counts = self.report.get("config", {}).get("recipe", {}).get("class_counts") or []
        names = self.report.get("classes") or []
        return dict(zip(names, counts, strict=True)) if len(counts) == len(names) else {}

    @property
    def score(self) -> tuple[float | None, float | None, float | None]:
        """(figure, low, high): accuracy, or mean average precision of several labels."""
        keys = ("map", "map_low", "map_high") if self.several else ("accuracy", "low", "high")
        figure, low, high = (self.metrics.get(key) for key in keys)
        return figure, low, high

    def baseline(self, kind: str) -> dict[str, Any] | None:
        """Figures of `nearest_class_mean` or `linear_probe` on this split, None without them."""
        found = ((self.report.get("baseline") or {}).get(kind) or {}).get(self.split)
        return found if found and baseline_score(found) is not None else None

    @property
    def commonest(self) -> float | None:
        """Accuracy of always naming the class of most judged pictures; None of several labels."""
        support = [row["support"] for row in self.classes]
        return None if self.several or not sum(support) else max(support) / sum(support)

    def thresholds(self) -> list[tuple[float, Answered]]:
        """(wanted precision, what its threshold leaves of these pictures), where one was found.
        Thresholds are chosen on `choosing`, or where there is none on the pictures themselves."""
        if self.several or not self.rows:
            return []
        sure, right = answers(self.choosing or self.rows)
        mine = answers(self.rows)
        found = [(wanted, threshold_for(sure, right, wanted)) for wanted in WANTED]
        return [(wanted, answered(*mine, level)) for wanted, level in found if level is not None]


def baseline_score(found: dict[str, Any]) -> float | None:
    """The figure of a baseline: its mean average precision, or its accuracy."""
    return found.get("map", found.get("accuracy"))


def answers(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """(confidence (N,), right (N,) bool) of rows of predictions.csv."""
    sure = np.array([float(row["confidence"]) for row in rows])
    return sure, np.array([str(row["correct"]) == "1" for row in rows], bool)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where there is no such file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


def named(text: object, most: int = LONGEST) -> str:
    """A name as one short printable line."""
    name = visible(text)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def listed(names: Sequence[str], most: int = 12) -> str:
    """The first names, and how many more there are."""
    shown = [named(name) for name in names[:most]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


def plural(count: int, one: str, many: str = "") -> str:
    """(1, "picture") -> "1 picture"; (1234, "class", "classes") -> "1,234 classes"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
