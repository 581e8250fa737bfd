# SPDX-License-Identifier: Apache-2.0
"""Figures of a model that gives several labels to a picture, as lines on the screen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.cells import cell_len, set_cell_size

from crosspatch.cli import words
from crosspatch.errors import visible


class Line(NamedTuple):
    """A line and its style."""

    text: str
    style: str = ""


EPOCH_HEAD = "   epoch     time    loss  val mAP    all right       rate  images/s     left"


def map_span(metrics: dict[str, Any]) -> str:
    """The interval of the mAP, or nothing where there is none."""
    if metrics["map_low"] is None:
        return ""
    return f"{words.interval(metrics['map_low'], metrics['map_high'])} with 95 % confidence"


def score(split: str, metrics: dict[str, Any]) -> Iterator[Line]:
    """mAP with its interval and the other figures of one split."""
    pictures = words.plural(metrics["images"], "picture")
    if metrics["map"] is None:
        yield Line(f"{split}: {pictures} without any label, so there is no score", "bold")
        return
    span = map_span(metrics) or "every picture ranked right: no interval"
    yield Line(f"{split} mAP {words.percent(metrics['map'])} ({span}, {pictures})", "bold")
    span = words.interval(metrics["low"], metrics["high"])
    yield Line(
        f"  all labels right: {words.percent(metrics['accuracy'])} of pictures ({span}), "
        f"{words.percent(metrics['hamming'])} of labels wrong"
    )
    yield Line(
        f"  macro F1 {words.percent(metrics['macro_f1'])}, "
        f"micro F1 {words.percent(metrics['micro_f1'])}"
    )
    yield Line(
        f"  log-likelihood {words.number(-metrics['nll'])} per picture, "
        f"calibration error {words.percent(metrics['ece'])}"
    )


def worst_classes(metrics: dict[str, Any], most: int = 3) -> Iterator[Line]:
    """The classes of the least average precision."""
    worst = [row for row in metrics["classes"] if row["ap"] is not None]
    worst = sorted(worst, key=lambda row: (row["ap"], row["name"]))[:most]
    if worst:
        yield Line("worst classes", "cyan")
    for row in worst:
        span = words.interval(row["recall_low"], row["recall_high"])
        found = f"{round(row['recall'] * row['support'])} of {row['support']} found"
        yield Line(
            f"  {row['name']}: average precision {words.percent(row['ap'])}; from "
            f"{words.number(row['threshold'], 2)} on {found} ({span} %)"
        )


def class_table(metrics: dict[str, Any]) -> Iterator[Line]:
    """Threshold, average precision, precision, recall and F1 of every class that occurs."""
    rows = [row for row in metrics["classes"] if row["support"] or row["precision"] is not None]
    width = min(max([5, *(cell_len(visible(row["name"])) for row in rows)]), 14)
    yield Line(
        f"  {'class':{width}}  pictures  from       AP    prec.   recall  95 % range       F1",
        "cyan",
    )
    for row in rows:
        name = set_cell_size(visible(row["name"]), width)
        span = words.interval(row["recall_low"], row["recall_high"]) if row["support"] else "–"
        yield Line(
            f"  {name}  {row['support']:>8,}  {words.number(row['threshold'], 2)}"
            f"  {words.percent(row['ap']):>7}  {words.percent(row['precision']):>7}"
            f"  {words.percent(row['recall']):>7}  {span:>10}  {words.percent(row['f1']):>7}"
        )
    yield Line("  from: the probability from which on a picture has the class")
