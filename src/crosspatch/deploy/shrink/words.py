# SPDX-License-Identifier: Apache-2.0
"""What a search came to, in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from crosspatch.deploy.shrink.candidates import AS_IT_IS
from crosspatch.deploy.shrink.choose import complete, excess, span
from crosspatch.deploy.shrink.result import Budget, Measured, Speed

SURE = 1e-9


def name_of(one: Measured) -> str:
    """`tome late 0.70 in onnxruntime int8-static`."""
    return f"{one.name} in {one.engine} {one.precision}"


def milliseconds(seconds: float) -> str:
    """`0.61 ms`, `12.3 ms`."""
    value = 1e3 * seconds
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} ms"


def megabytes(count: float) -> str:
    """`0.98 MB`."""
    return f"{count / 1e6:.{2 if count < 1e7 else 1}f} MB"


def chosen_words(one: Measured, base: Measured, budget: Budget, count: int) -> list[str]:
    """What was chosen, how fast, small and accurate it is beside the run as it is."""
    threads, took = one.best(budget.threads)
    mine, theirs = span(one, budget), span(base, budget)
    on = f"{threads} thread{'s' if threads > 1 else ''}"
    found = [
        f"chosen: {name_of(one)}, which takes {milliseconds(mine.median)} for a picture on {on}"
    ]
    if one.key == base.key:
        found[0] += ": nothing that was tried is better inside the budget"
    else:
        speed = Speed(theirs.median / mine.median, theirs.low / mine.high, theirs.high / mine.low)
        found.append(
            f"that is {_times(speed)} the run as it is in {base.engine} fp32 "
            f"({milliseconds(theirs.median)}), and its file has {megabytes(one.size or 0)} instead "
            f"of {megabytes(base.size or 0)}"
        )
    if took.float_ is not None:
        found.append(f"it is {_times(took.float_)} the same network's float in the same engine")
    return [*found, *_accuracy_words(one, budget, count)]


def _times(speed: Speed) -> str:
    """How something compares, to stand before the thing it is compared with."""
    shown = f"{speed.median:.2f} times as fast, 95 %: {speed.low:.2f} to {speed.high:.2f}"
    if speed.low > 1:
        return f"faster ({shown}) than"
    if speed.high < 1:
        return f"slower ({shown}) than"
    return f"about as fast ({shown}) as"


def _accuracy_words(one: Measured, budget: Budget, count: int) -> list[str]:
    low, high = 100 * one.low, 100 * one.high
    lost = f"{one.points:.2f} points less" if one.points > 0 else f"{-one.points:.2f} points more"
    lost = "as many" if abs(one.points) < SURE else lost
    found = [
        f"of {count:,} validation pictures it names {lost} rightly (95 %: {_less(high)} to "
        f"{_less(low)})"
    ]
    if high > budget.max_drop:
        found.append(
            f"so few pictures cannot exclude a drop of more than {budget.max_drop:g} points: it "
            f"may be up to {high:.1f}"
        )
    return found


def _less(points: float) -> str:
    if abs(points) < 0.005:
        return "none"
    return f"{abs(points):.2f} {'less' if points > 0 else 'more'}"


def nothing_words(near: Measured | None, budget: Budget) -> list[str]:
    """That nothing fits, what came nearest and what it is beyond."""
    if near is None:
        return ["nothing that was tried could be measured"]
    over = excess(near, budget)
    told = {
        "points": lambda v: f"{near.points:.2f} points of accuracy lost, {v:.2f} too many",
        "latency": lambda v: (
            f"{milliseconds(span(near, budget).median)} for a picture, {milliseconds(v)} too long"
        ),
        "size": lambda v: f"{megabytes(near.size or 0)}, {megabytes(v)} too large",
    }
    why = " and ".join(told[name](value) for name, value in over.items())
    return [
        "nothing that was tried keeps the budget, so nothing was written",
        f"nearest: {name_of(near)} ({why})",
    ]


def int8_words(rows: Sequence[Measured], budget: Budget) -> list[str]:
    """Where int8 of the run as it is is slower or worse than the same engine's float."""
    found = []
    for one in rows:
        if one.name != AS_IT_IS or not one.precision.startswith("int8"):
            continue
        label = f"{one.precision} in {one.engine}"
        if one.dropped:
            found.append(f"{label}: {one.dropped}")
            continue
        if not complete(one):
            continue
        threads, took = one.best(budget.threads)
        if took.float_ is not None and took.float_.low <= 1.0:
            kind = "slower than" if took.float_.high < 1.0 else "not faster than"
            found.append(
                f"{label} is {kind} float there ({1 / took.float_.median:.2f} times as long on "
                f"{threads} thread{'s' if threads > 1 else ''}): it saves size alone"
            )
        if one.low > 0:
            found.append(
                f"{label} is worse than float: it loses {one.points:.2f} points "
                f"({100 * one.low:.2f} to {100 * one.high:.2f})"
            )
    return found


def left_words(left: Sequence[str], seconds: float) -> list[str]:
    """What there was no time for."""
    if not left:
        return []
    some = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
    return [f"no time was left after {seconds:.0f} s for {some}: --resume --time goes on with them"]
