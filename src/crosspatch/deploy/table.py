# SPDX-License-Identifier: Apache-2.0
"""Answers as rows: for a screen, for JSON, for a table. This module does not import torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from crosspatch.data.labels import SEPARATOR
from crosspatch.deploy.predictor import Predictions


def rows_of(paths: Sequence[str], answers: Predictions, k: int) -> list[dict[str, Any]]:
    """For every picture that was read `path` and `top`, its `k` best classes, and of several labels
    to a picture `labels`: those that it is said to have."""
    rows = []
    for path, labels, top in zip(paths, answers.labels, answers.top(k), strict=True):
        if labels is not None and top is not None:
            several = {"labels": _pairs(labels)} if answers.thresholds else {}
            rows.append({"path": path, **several, "top": _pairs(top)})
    return rows


def _pairs(pairs: list[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"class": name, "probability": round(p, 6)} for name, p in pairs]


def columns(k: int, several: bool) -> list[str]:
    """path, class_1, probability_1 … class_k, probability_k, error; of several labels to a picture
    `labels` and `probabilities` come after path, with | between them."""
    best = [f"{name}_{place}" for place in range(1, k + 1) for name in ("class", "probability")]
    return ["path", *(["labels", "probabilities"] if several else []), *best, "error"]


def good_row(row: dict[str, Any]) -> list[Any]:
    """The values of a row of `rows_of` under `columns`."""
    values = [value for one in row["top"] for value in (one["class"], one["probability"])]
    if "labels" in row:
        parts = [[str(one[key]) for one in row["labels"]] for key in ("class", "probability")]
        values = [*map(SEPARATOR.join, parts), *values]
    return [row["path"], *values, ""]


def bad_row(path: str, reason: str, width: int) -> list[Any]:
    """The values of a picture that could not be read, under `width` columns."""
    return [path, *[""] * (width - 2), reason]


def lines(rows: Iterable[Sequence[Any]]) -> bytes:
    """Rows as lines of a CSV file (UTF-8; names that are not are given back as they were)."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
