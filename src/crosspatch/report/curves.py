# SPDX-License-Identifier: Apache-2.0
"""The figures of a report."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

from crosspatch.metrics.abstain import curve
from crosspatch.report.figures import COLOURS, SOFT, drawing, to_svg
from crosspatch.report.story import Story, answers

BLUE, ORANGE, GREEN = COLOURS[:3]


@contextmanager
def sketching(width: float, height: float, **subplots: Any) -> Iterator[tuple[Any, Any]]:
    """`figures.drawing`; letters that the font of the measuring lacks are no matter."""
    with warnings.catch_warnings(), drawing(width, height, **subplots) as made:
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield made


def percents(axis: Any) -> None:
    """Shares on an axis as percent, with as many digits as its marks need."""
    from matplotlib.ticker import FuncFormatter

    def said(share: float, _: int | None) -> str:
        marks = [100 * one for one in axis.get_majorticklocs()]
        exact = (n for n in range(4) if all(abs(one - round(one, n)) < 1e-6 for one in marks))
        digits = next(exact, 4)
        return f"{100 * share:.{digits}f} %"

    axis.set_major_formatter(FuncFormatter(said))


def training_curves(story: Story) -> Markup | None:
    """Loss and the figure on validation over the epochs; None with fewer than two validations."""
    history = [row for row in story.report.get("history") or [] if row.get("epoch") is not None]
    if len(history) < 2:
        return None
    key = "val_map" if story.several else "val_accuracy"
    where = [row["epoch"] for row in history]
    with sketching(8.4, 2.9, ncols=2) as (figure, (left, right)):
        for name, said, colour in (("train_loss", "training", ORANGE),
                                   ("val_loss", "validation", BLUE)):  # fmt: skip
            points = [(x, row[name]) for x, row in zip(where, history, strict=True)
                      if row.get(name) is not None]  # fmt: skip
            if points:
                left.plot(*zip(*points, strict=True), label=said, color=colour)
        left.set_title("loss (nats)")
        left.legend()
        values = [row.get(key) for row in history]
        known = [(x, row) for x, row, v in zip(where, history, values, strict=True)
                 if v is not None]  # fmt: skip
        right.plot([x for x, _ in known], [row[key] for _, row in known], color=BLUE)
        if not story.several and all(row.get("val_low") is not None for _, row in known):
            low, high = ([row[end] for _, row in known] for end in ("val_low", "val_high"))
            right.fill_between([x for x, _ in known], low, high, color=BLUE, alpha=0.2, linewidth=0)
        best = (story.report.get("best") or {}).get("epoch")
        if best is not None:
            right.axvline(best, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        figure_name = "mean average precision" if story.several else "accuracy"
        right.set_title(f"{figure_name} on validation")
        percents(right.yaxis)
        for panel in (left, right):
            panel.set_xlabel("epoch")
            panel.xaxis.get_major_locator().set_params(integer=True)
        return to_svg(figure, "Loss and accuracy on validation after each epoch of the training")


def reliability_figure(story: Story) -> Markup | None:
    """Confidence against the share that is right, before and after calibration."""
    found = story.metrics.get("reliability") or {}
    if not found.get("after"):
        return None
    with sketching(4.2, 3.6) as (figure, panel):
        panel.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        for name, said, colour in (("before", "before calibration", ORANGE),
                                   ("after", "as it is used", BLUE)):  # fmt: skip
            bins = found.get(name)
            if not bins:
                continue
            x, y = [one["confidence"] for one in bins], [one["right"] for one in bins]
            panel.plot(x, y, marker="o", markersize=4, color=colour, label=said)
            if name == "after":
                panel.vlines(x, [one["right_low"] for one in bins],
                             [one["right_high"] for one in bins], color=colour,
                             linewidth=1)  # fmt: skip
        panel.set_xlabel("how sure it is")
        panel.set_ylabel("there it is right in")
        panel.set_xlim(0, 1)
        panel.set_ylim(0, 1)
        for axis in (panel.xaxis, panel.yaxis):
            percents(axis)
        panel.legend()
        return to_svg(figure, "How often answers are right against how sure they are")


def _apart(story: Story, high: float) -> list[tuple[str, tuple[float, float]]]:
    """Wanted precisions and where they lead to (answered, right); those whose labels would lie over
    each other share one. high: of the axis."""
    groups: list[tuple[list[float], tuple[float, float]]] = []
    for wanted, left in story.thresholds():
        if left.precision is None:
            continue
        place = (left.coverage, left.precision)
        for known, other in groups:
            if abs(place[0] - other[0]) < 0.16 and abs(place[1] - other[1]) < 0.1 * high:
                known.append(wanted)
                break
        else:
            groups.append(([wanted], place))
    return [(", ".join(f"{100 * one:.0f}" for one in known) + " %", place)
            for known, place in groups]  # fmt: skip


def abstain_figure(story: Story) -> Markup | None:
    """The share that is right against the share that is answered."""
    if story.several or len(story.rows) < 2:
        return None
    found = curve(*answers(story.rows))
    step = max(1, len(found.coverage) // 400)
    x, y = found.coverage[::step].tolist(), found.precision[::step].tolist()
    x, y = [*x, float(found.coverage[-1])], [*y, float(found.precision[-1])]
    with sketching(4.2, 3.6) as (figure, panel):
        panel.plot(x, y, color=BLUE)
        for wanted, place in _apart(story, 1 - min(y)):
            panel.plot(*place, "o", color=ORANGE, markersize=6)
            offset, at = (
                ((-7, -3), ("right", "top")) if place[0] > 0.3 else ((7, 3), ("left", "bottom"))
            )  # where there is room for the label
            panel.annotate(wanted, place, offset, textcoords="offset points", fontsize=8.5,
                           ha=at[0], va=at[1])  # fmt: skip
        panel.margins(y=0.12)
        panel.set_xlabel("pictures that it answers")
        panel.set_ylabel("of these right")
        panel.set_xlim(0, 1.02)
        for axis in (panel.xaxis, panel.yaxis):
            percents(axis)
        return to_svg(figure, "Share of right answers when it answers only where it is sure")


def learning_figure(story: Story) -> Markup | None:
    """Errors of the simple classifier against the training pictures it saw, both on log axes."""
    found = story.evidence.get("learning")
    if not found or min(found["errors"]) <= 0:
        return None
    with sketching(4.6, 2.8) as (figure, panel):
        panel.plot(found["sizes"], found["errors"], marker="o", color=BLUE)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(found["sizes"], [f"{size:,}" for size in found["sizes"]])
        low, high = min(found["errors"]), max(found["errors"])
        panel.set_yticks([low, high], [f"{100 * one:.0f} %" for one in (low, high)])
        panel.minorticks_off()
        panel.set_xlabel("training pictures")
        panel.set_title("errors of a simple classifier on fixed features")
        return to_svg(figure, "Errors of a simple classifier fall with the training pictures")
