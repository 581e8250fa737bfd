# SPDX-License-Identifier: Apache-2.0
"""The figure of a search: seconds of a picture against accuracy, sizes as areas, the front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from crosspatch.deploy.shrink.choose import span
from crosspatch.deploy.shrink.result import Measured, Shrunk
from crosspatch.report.curves import percents, sketching
from crosspatch.report.figures import COLOURS, INK, SOFT
from crosspatch.report.figures import to_svg as svg

KINDS = {"engines": "the run as it is", "tokens": "fewer tokens", "finetuned": "fine-tuned"}
"""Of the registry, as a legend says it."""
SHAPES = {"fp32": "o", "bf16": "^", "int8-dynamic": "s", "int8-static": "D"}
SMALL, LARGE = 24.0, 320.0  # points squared of the smallest and the largest file
FAR = 6.0  # points of accuracy below the run, or budgets, from which a mark is put at the edge
LETTER = (5.6, 11.0)  # points, width of a digit and height of a line
AROUND = ((12, 9), (-12, 9), (12, -9), (-12, -9), (0, 16), (0, -16), (18, 0), (-18, 0))
"""Points from a mark to its number, the first that is free."""

Box = tuple[float, float, float, float]


def tradeoff(found: Shrunk, timed: Sequence[Measured], numbers: dict[str, int]) -> Markup:
    """The figure. timed: candidates that were measured to the end; numbers: theirs in the table."""
    with sketching(8.4, 4.6) as (figure, panel):
        _axes(panel, found, timed)
        floor = lowest(found)
        _budget(panel, found)
        _joined(panel, found, timed, floor)
        _marks(panel, found, timed, floor)
        _front(panel, found, timed)
        _legend(figure, found, timed)
        low, high = _heights(found, timed, floor)
        panel.set_ylim(low - 0.12 * (high - low), high + 0.12 * (high - low))
        _below(panel, found, timed, floor)
        figure.canvas.draw()
        _numbered(panel, found, timed, numbers, floor)
        return svg(figure, _said(found, timed))


def _axes(panel: Any, found: Shrunk, timed: Sequence[Measured]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    times = [1e3 * span(one, found.budget).median for one in timed]
    panel.set_xscale("log")
    if max(times) / min(times) < 6:
        panel.set_xscale("linear")
    else:
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    budget = found.budget.threads
    on = "at the best number of threads" if budget is None else f"on {budget} thread"
    on += "s" if budget not in (None, 1) else ""
    panel.set_xlabel(f"milliseconds for a picture, {on}")
    panel.set_ylabel("named rightly, on validation")
    percents(panel.yaxis)


def lowest(found: Shrunk) -> float:
    """The accuracy below which marks are put at the edge, so that they do not press the rest."""
    far = max(FAR, 4 * found.budget.max_drop) / 100
    return found.original.accuracy - far


def _heights(found: Shrunk, timed: Sequence[Measured], floor: float) -> tuple[float, float]:
    """The accuracies that are drawn, with their ranges as far as these do not press the rest."""
    base, shown = found.original.accuracy, [one for one in timed if one.accuracy >= floor]
    least = min([base - found.budget.max_drop / 100, *(one.accuracy for one in shown)])
    most = max([base, *(one.accuracy for one in shown)])
    room = max(most - least, 0.004)
    low = min([least, *(base - one.high for one in shown if one.key != found.base)])
    high = max([most, *(base - one.low for one in shown if one.key != found.base)])
    return max(low, least - room), min(high, most + room, 1.0)


def _budget(panel: Any, found: Shrunk) -> None:
    dashed: dict[str, Any] = {
        "color": SOFT,
        "linewidth": 1.0,
        "linestyle": (0, (4, 3)),
        "zorder": 1,
    }
    panel.axhline(found.original.accuracy - found.budget.max_drop / 100, **dashed)
    if found.budget.latency is not None:
        panel.axvline(1e3 * found.budget.latency, **dashed)


def _colours(timed: Sequence[Measured]) -> dict[str, str]:
    kinds = [*KINDS, *sorted({one.kind for one in timed} - {*KINDS})]
    return {kind: COLOURS[place % len(COLOURS)] for place, kind in enumerate(kinds)}


def _marks(panel: Any, found: Shrunk, timed: Sequence[Measured], floor: float) -> None:
    colours, largest = _colours(timed), max(one.size or 1 for one in timed)
    for one in timed:
        if one.accuracy < floor:
            continue
        x, low, high = (1e3 * value for value in span(one, found.budget))
        colour, area = colours[one.kind], SMALL + (LARGE - SMALL) * (one.size or 0) / largest
        thin: dict[str, Any] = {"color": colour, "linewidth": 0.9, "alpha": 0.55, "zorder": 2}
        panel.plot([low, high], [one.accuracy] * 2, **thin)
        if one.key != found.base:
            base = found.original.accuracy
            panel.plot([x, x], [base - one.high, base - one.low], **thin)
        panel.scatter([x], [one.accuracy], s=area, marker=SHAPES.get(one.precision, "P"),
                      color=colour, alpha=0.85, linewidths=0, zorder=3)  # fmt: skip
        if slower(one, found):
            panel.scatter([x], [one.accuracy], s=26, marker="x", color=INK, linewidths=1.3,
                          zorder=5)  # fmt: skip
        if one.chosen:
            panel.scatter([x], [one.accuracy], s=area + 150, marker="o", facecolors="none",
                          edgecolors=INK, linewidths=1.6, zorder=4)  # fmt: skip


def slower(one: Measured, found: Shrunk) -> bool:
    """Whether it is slower than the same network's float in the same engine, and that is sure."""
    float_ = one.best(found.budget.threads)[1].float_
    return float_ is not None and float_.high < 1


def _joined(panel: Any, found: Shrunk, timed: Sequence[Measured], floor: float) -> None:
    """A dotted line from what is not float to the same network's float in the same engine."""
    floats = {(one.name, one.engine): one for one in timed if one.floats}
    for one in timed:
        other = floats.get((one.name, one.engine))
        if one.floats or other is None or min(one.accuracy, other.accuracy) < floor:
            continue
        xs = [1e3 * span(end, found.budget).median for end in (one, other)]
        panel.plot(xs, [one.accuracy, other.accuracy], color=_colours(timed)[one.kind],
                   linewidth=0.9, linestyle=(0, (1, 2)), zorder=2)  # fmt: skip


def _front(panel: Any, found: Shrunk, timed: Sequence[Measured]) -> None:
    """Those of the front that no other beats in speed and accuracy alone are joined; the others are
    there for their size."""
    best, places = -1.0, []
    for one in (one for one in timed if one.on_front):
        if one.accuracy > best:
            best = one.accuracy
            places.append((1e3 * span(one, found.budget).median, one.accuracy))
    if len(places) > 1:
        panel.plot(*zip(*places, strict=True), color=INK, linewidth=1.1, alpha=0.7, zorder=2)


def _below(panel: Any, found: Shrunk, timed: Sequence[Measured], floor: float) -> None:
    """What loses so much that it would press the rest together: arrows at the lower edge."""
    colours, bottom = _colours(timed), panel.get_ylim()[0]
    room = panel.get_ylim()[1] - bottom
    for one in timed:
        if one.accuracy < floor:
            x = 1e3 * span(one, found.budget).median
            panel.scatter([x], [bottom + 0.035 * room], s=30, marker="v", color=colours[one.kind],
                          linewidths=0, zorder=3)  # fmt: skip


def _legend(figure: Any, found: Shrunk, timed: Sequence[Measured]) -> None:
    from matplotlib.lines import Line2D

    plain: dict[str, Any] = {"linestyle": "none", "markersize": 7, "markeredgewidth": 0}
    ring = plain | {"markeredgewidth": 1.4, "markersize": 10, "fillstyle": "none"}
    cross = plain | {"markeredgewidth": 1.3, "markersize": 6}
    colours, kinds = _colours(timed), {one.kind for one in timed}
    first = [Line2D([], [], marker="o", color=colours[kind], label=KINDS.get(kind, kind), **plain)
             for kind in colours if kind in kinds]  # fmt: skip
    if any(one.chosen for one in timed):
        first.append(Line2D([], [], marker="o", color=INK, label="chosen", **ring))
    used = {one.precision for one in timed}
    then = [Line2D([], [], marker=shape, color=SOFT, label=name, **plain)
            for name, shape in SHAPES.items() if name in used]  # fmt: skip
    if any(slower(one, found) for one in timed):
        then.append(Line2D([], [], marker="x", color=INK, label="slower than its float", **cross))
    for place, handles in (("upper", first), ("lower", then)):
        figure.legend(handles=handles, loc=f"outside {place} left", ncols=len(handles),
                      handletextpad=0.3, columnspacing=1.4)  # fmt: skip


def _numbered(
    panel: Any, found: Shrunk, timed: Sequence[Measured], numbers: dict[str, int], floor: float
) -> None:
    """Numbers at the chosen one, the run as it is and the front, where there is room for them."""
    first = {found.chosen, found.base, found.nearest}
    told = [one for one in timed if one.key in first]
    told += [one for one in timed if one.on_front and one.key not in first]
    box, taken = panel.get_window_extent(), list[Box]()
    for one in (one for one in told if one.accuracy >= floor):
        text = str(numbers[one.key])
        place = (1e3 * span(one, found.budget).median, one.accuracy)
        for shift in AROUND:
            mine = _box(panel, place, shift, len(text))
            inside = box.x0 < mine[0] < mine[2] < box.x1 and box.y0 < mine[1] < mine[3] < box.y1
            if inside and not any(_meet(mine, other) for other in taken):
                taken.append(mine)
                panel.annotate(text, place, xytext=shift, textcoords="offset points", ha="center",
                               va="center", fontsize=9,
                               fontweight="bold" if one.chosen else "normal", zorder=6)  # fmt: skip
                break


def _box(panel: Any, place: tuple[float, float], shift: tuple[int, int], digits: int) -> Box:
    """Where a number would stand, in dots: left, bottom, right, top."""
    dot = panel.figure.dpi / 72
    x, y = panel.transData.transform(place)
    x, y = x + shift[0] * dot, y + shift[1] * dot
    wide, tall = (LETTER[0] * digits / 2 + 1) * dot, (LETTER[1] / 2 + 1) * dot
    return x - wide, y - tall, x + wide, y + tall


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _said(found: Shrunk, timed: Sequence[Measured]) -> str:
    best = found.winner
    what = f"; {best.name} in {best.engine} {best.precision} is chosen" if best else ""
    return f"Time of a picture against accuracy of {len(timed)} candidates{what}"
