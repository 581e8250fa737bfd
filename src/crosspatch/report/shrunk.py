# SPDX-License-Identifier: Apache-2.0
"""shrunk.html: what a search for a smaller, faster network measured, and what it chose."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from crosspatch.deploy.shrink.choose import complete, span
from crosspatch.deploy.shrink.result import Budget, Measured, Shrunk, Speed, Took
from crosspatch.deploy.shrink.words import (
    chosen_words,
    megabytes,
    milliseconds,
    nothing_words,
)
from crosspatch.report.page import count, percent, render, write_page
from crosspatch.report.shrunk_figure import lowest, tradeoff
from crosspatch.report.story import named, plural
from crosspatch.report.tables import Table

PAGE = "shrunk.html"
SHOWN = 14  # candidates up to which all stand in the first table


def write_shrunk(run: str | Path, found: Shrunk) -> Path:
    """shrunk.html in the run's folder. Raises UsageError where it cannot be written."""
    path = Path(run) / PAGE
    write_page(path, shrunk_page(found))
    return path


def shrunk_page(found: Shrunk) -> str:
    """The page of a search, as text."""
    timed = sorted(
        (one for one in found.rows if complete(one)), key=lambda one: _seconds(one, found)
    )
    numbers = {one.key: place for place, one in enumerate(timed, 1)}
    dropped = [one for one in found.rows if not complete(one)]
    head = ["candidate", "judged on", "points", "95 % range", "why"]
    return render(
        "shrunk.html",
        run=named(found.run, 80),
        title=headline(found),
        lead=lead(found),
        test=_test(found),
        stats=_stats(found),
        words=[_sentence(one) for one in _further(found)],
        chosen=bool(found.chosen),
        figure=tradeoff(found, timed, numbers) if timed else None,
        figure_said=_figure_said(found),
        table=_table(found, timed, numbers),
        caption=_caption(len(timed) > SHOWN),
        dropped_head=head,
        dropped=[_dropped(one) for one in sorted(dropped, key=lambda one: (one.points, one.name))],
        left=[named(one) for one in found.left],
        asked=_asked(found.budget),
        machine=[(named(key, 40), named(value, 300)) for key, value in found.machine.items()],
        seconds=found.seconds,
        commands=_commands(found),
        notes=[(named(one.name), _way(one), named(one.note, 400)) for one in timed if one.note],
    )


def headline(found: Shrunk) -> str:
    """The whole search in a few words."""
    best, base = found.winner, found.original
    if best is None:
        return "Nothing fits the budget"
    if best.key == base.key:
        return "The network stays as it is"
    speed, share = _relative(best, found), _share(best.size, base.size)
    times = "about as fast"
    if speed.low > 1:
        times = f"{speed.median:.1f} times as fast"
    elif speed.high < 1:
        times = f"slower ({1 / speed.median:.2f} times as long)"
    return f"{times}, {share}".capitalize() if share else times.capitalize()


def lead(found: Shrunk) -> str:
    """What was chosen, and what it costs, in three sentences."""
    best, base = found.winner, found.original
    if best is None:
        near = found.row(found.nearest) if found.nearest else None
        if near is None:
            return "Nothing that was tried could be measured, so nothing was written."
        return (
            f"Nothing that was tried keeps {_asked(found.budget)}, so nothing was written. Nearest "
            f"came {_full(near)}: {_time(near, found)} for a picture, "
            f"{megabytes(near.size or 0)}, {_lost(near)}."
        )
    if best.key == base.key:
        return (
            f"Of all that keeps {_asked(found.budget)}, nothing is better than the run as it is: "
            f"{_time(best, found)} for a picture, {megabytes(best.size or 0)}."
        )
    speed = _relative(best, found)
    return (
        f"{_full(best)[:1].upper()}{_full(best)[1:]} takes {_time(best, found)} for a picture "
        f"instead of {_time(base, found)} ({speed.median:.2f} times as fast, 95 %: {speed.low:.2f} "
        f"to {speed.high:.2f}), and {megabytes(best.size or 0)} instead of "
        f"{megabytes(base.size or 0)}. Of {plural(best.pictures, 'validation picture')} it names "
        f"{percent(best.accuracy)} rightly: {_lost(best)}."
    )


def _stats(found: Shrunk) -> list[tuple[str, str, str]]:
    """(value, label, note) of the boxes; none where nothing new was chosen."""
    best, base = found.winner, found.original
    if best is None or best.key == base.key:
        return []
    speed = _relative(best, found)
    low, high = 100 * best.low, 100 * best.high
    boxes = [
        (f"{speed.median:.2f}x", "the speed", f"{speed.low:.2f} to {speed.high:.2f}"),
        (megabytes(best.size or 0), "the file", f"instead of {megabytes(base.size or 0)}"),
        (f"{-best.points:+.2f}", "points of accuracy", f"{-high:+.2f} to {-low:+.2f}"),
    ]
    if best.macs and base.macs:
        share = percent(best.macs / base.macs, 0)
        boxes.append((share, "of the multiply-adds", f"{count(best.macs / 1e6)} million"))
    return boxes


def _test(found: Shrunk) -> str:
    """A sentence about the test pictures, "" where they were not looked at."""
    test = found.test
    if not test:
        return ""
    pictures = plural(test["pictures"], "test picture")
    before, after = test["original"] / test["pictures"], test["chosen"] / test["pictures"]
    return (
        f"On {pictures}, which chose nothing and were looked at once, it names {percent(after)} "
        f"rightly, the run as it is {percent(before)}: {_less(test['drop'])} "
        f"({_range(test['low'], test['high'])})."
    )


def _lost(one: Measured) -> str:
    return f"{_less(one.drop)} than the run as it is ({_range(one.low, one.high)})"


def _less(drop: float) -> str:
    if abs(drop) < 5e-5:
        return "0.00 points less"
    return f"{abs(100 * drop):.2f} points {'less' if drop > 0 else 'more'}"


def _range(low: float, high: float) -> str:
    """The 95 % interval of a drop, as changes: a loss is negative."""
    return f"95 %: {-100 * high:+.2f} to {-100 * low:+.2f}"


def _share(mine: int | None, theirs: int | None) -> str:
    if not mine or not theirs:
        return ""
    share = mine / theirs
    if share > 1.05:
        return f"{share:.1f} times the size"
    return "of the same size" if share > 0.95 else f"{100 * share:.0f} % of the size"


def _asked(budget: Budget) -> str:
    said = [f"a drop of at most {budget.max_drop:g} point{'' if budget.max_drop == 1 else 's'}"]
    on = "" if budget.threads is None else f" on {plural(budget.threads, 'thread')}"
    if budget.latency is not None:
        said.append(f"{milliseconds(budget.latency)} for a picture{on}")
    if budget.size is not None:
        said.append(megabytes(budget.size))
    return " and ".join(said)


def _full(one: Measured) -> str:
    name = "the whole network" if one.kind == "engines" else named(one.name, 80)
    return f"{name} in {_way(one)}"


def _way(one: Measured) -> str:
    return f"{one.engine} {one.precision}".strip() or "torch"


def _time(one: Measured, found: Shrunk) -> str:
    threads, _ = one.best(found.budget.threads)
    return f"{milliseconds(_seconds(one, found))} on {plural(threads, 'thread')}"


def _seconds(one: Measured, found: Shrunk) -> float:
    return span(one, found.budget).median


def _faster(one: Measured, found: Shrunk) -> float:
    return _seconds(found.original, found) / _seconds(one, found)


def _relative(one: Measured, found: Shrunk) -> Speed:
    """How many times as fast as the run as it is where that is fastest, with the interval."""
    at, base = span(one, found.budget), _seconds(found.original, found)
    return Speed(base / at.median, base / at.high, base / at.low)


# ---------------------------------------------------------------------- the table


def _table(found: Shrunk, timed: Sequence[Measured], numbers: dict[str, int]) -> Table:
    """All candidates, the fastest first; of many, those that matter, and all folded."""
    threads = sorted({n for one in timed for n in one.latency})
    head = ["candidate", *(plural(n, "thread") for n in threads), "9 in 10 within", "as fast as",
            "beside its float", "file", "multiply-adds", "right", "points", "95 % range",
            "budget"]  # fmt: skip
    places = [*range(1, len(head))]
    rows = {one.key: _row(one, found, threads, numbers[one.key]) for one in timed}
    if len(timed) <= SHOWN:
        return Table(head, list(rows.values()), places, [])
    told = {found.chosen, found.nearest, found.base}
    few = [rows[one.key] for one in timed if one.on_front or one.key in told]
    return Table(head, few, places, list(rows.values()))


def _caption(few: bool) -> str:
    """What stands over the table."""
    which = "Those that no other beats, the run as it is and what was chosen. " if few else ""
    return (
        f"{which}Median times of one picture; in bold those that the budget means. As fast as: "
        "beside the run as it is. Beside its float: the same network's float in the same engine. A "
        "negative number of points is a loss."
    )


def _row(one: Measured, found: Shrunk, threads: Sequence[int], number: int) -> list[Any]:
    told = Markup("{}. {} <span class=soft>{}</span>").format(
        number, named(one.name, 60), _way(one)
    )
    at, took = one.best(found.budget.threads)
    inside = "inside" if one.inside else "beyond"
    return [
        Markup("<strong>{}, chosen</strong>").format(told) if one.chosen else told,
        *(_milli(one.latency.get(n), n == at) for n in threads),
        milliseconds(took.p90),
        f"{_faster(one, found):.2f}x",
        _beside_float(took),
        megabytes(one.size or 0),
        f"{count(one.macs / 1e6)} M" if one.macs >= 1e7 else f"{one.macs / 1e6:.2f} M",
        percent(one.accuracy),
        f"{-one.points:+.2f}",
        f"{-100 * one.high:+.2f} to {-100 * one.low:+.2f}",
        f"{inside}, front" if one.on_front else inside,
    ]


def _milli(took: Took | None, best: bool) -> Any:
    if took is None:
        return "–"
    said = milliseconds(took.median)
    return Markup("<strong>{}</strong>").format(said) if best else said


def _beside_float(took: Took) -> str:
    """Against the same network's float in the same engine."""
    if took.float_ is None:
        return "–"
    speed = took.float_
    said = f"{speed.median:.2f}x ({speed.low:.2f} to {speed.high:.2f})"
    if speed.high < 1:
        return f"{said}, slower"
    return f"{said}, no faster" if speed.low <= 1 else said


def _dropped(one: Measured) -> list[str]:
    seen = plural(one.pictures, "picture") if one.pictures else "–"
    lost = f"{-one.points:+.1f} points" if one.pictures else "–"
    span_ = f"{-100 * one.high:+.1f} to {-100 * one.low:+.1f}" if one.pictures else "–"
    return [f"{named(one.name, 60)} {one.engine} {one.precision}".strip(), seen, lost, span_,
            named(one.dropped or "not measured", 200)]  # fmt: skip


def _figure_said(found: Shrunk) -> str:
    dots = "Each mark is a candidate: to the left is faster, higher is more accurate, and its "
    base, edge = found.original, ""
    if any(one.accuracy < lowest(found) for one in found.rows if complete(one)):
        edge = "Arrows at the lower edge: far below. "
    return (
        f"{dots}area is the size of its file. The lines at a mark are 95 % ranges: of the time, "
        "and of the accuracy beside the run as it is on the same pictures. The black line joins "
        "those that no other beats in speed, accuracy and size together; dotted lines join int8 "
        "with the same network's float in the same engine, and a cross marks what is slower than "
        f"that. Dashed: the budget. {edge}Numbers are those of the table. The run as it is named "
        f"{percent(base.accuracy)} of {plural(base.pictures, 'validation picture')} rightly."
    )


def _commands(found: Shrunk) -> list[tuple[str, str]]:
    """(what for, what to type)."""
    if not found.bundle:
        return []
    lines = [("does it answer as it should, on pictures of yours?", ("verify", found.bundle)),
             ("a page and an address to ask it", ("serve", found.bundle)),
             ("a folder of pictures at once", ("predict", found.bundle))]  # fmt: skip
    tail = {"verify": " PICTURES", "predict": " PICTURES"}
    return [
        (why, named(shlex.join(["crosspatch", *words]) + tail.get(words[0], ""), 400))
        for why, words in lines
    ]


def _further(found: Shrunk) -> list[str]:
    """The sentences of the search but for those that the head of the page says already."""
    best, budget = found.winner, found.budget
    if best is None:
        near = found.row(found.nearest) if found.nearest else None
        said = nothing_words(near, budget)
    else:
        said = chosen_words(best, found.original, budget, best.pictures)
    said = [one for one in said if not one.startswith("so few")]
    tested = [one for one in found.words if found.test and "test pictures, looked at once" in one]
    return [one for one in found.words if one not in (*said, *tested)]


def _sentence(text: str) -> str:
    text = named(text, 600)
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
