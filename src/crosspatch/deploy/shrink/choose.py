# SPDX-License-Identifier: Apache-2.0
"""Out of what was measured: what no other beats, and what a budget asks for. No engine, no torch.

A candidate's latency is that of one picture at the number of threads that the budget names, or
else at the one that serves it best. Candidates were timed in groups, each beside the run as it is
(the base), so all latencies are scaled to one base: the median over the groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from crosspatch.deploy.shrink.result import Budget, Measured, Took

TIE, ALIKE = 1.25, 1.05
"""How many times as slow may count as equally fast; and as large, as equally small."""


class Span(NamedTuple):
    """Seconds of one picture, and the ends of the 95 % interval of their median."""

    median: float
    low: float
    high: float


def scaled(rows: Sequence[Measured], base: Mapping[int, float]) -> list[Measured]:
    """Rows with their seconds as if all had been measured while the base took `base` seconds (by
    threads): the base's median over the share that each had in the same turns."""
    return [
        replace(one, latency={n: _scale(took, base[n]) for n, took in one.latency.items()})
        for one in rows
    ]


def _scale(took: Took, base: float) -> Took:
    median = base / took.base.median
    return took._replace(median=median, p90=took.p90 * median / took.median)


def span(one: Measured, budget: Budget) -> Span:
    """The latency that a budget is about. Raises KeyError where it was not measured."""
    took = one.best(budget.threads)[1]
    middle = took.median * took.base.median
    return Span(took.median, middle / took.base.high, middle / took.base.low)


def complete(one: Measured) -> bool:
    """Whether accuracy, latency and size are all known of all the pictures."""
    return not one.dropped and bool(one.latency) and one.size is not None


def front(rows: Sequence[Measured], budget: Budget) -> list[Measured]:
    """Those that no other beats by being as accurate, fast and small, and better in one."""
    able = [one for one in rows if complete(one)]
    figures = {one.key: (one.drop, span(one, budget).median, one.size or 0) for one in able}

    def beaten(mine: tuple[float, float, int]) -> bool:
        return any(
            other != mine and all(a <= b for a, b in zip(other, mine, strict=True))
            for other in figures.values()
        )

    return [one for one in able if not beaten(figures[one.key])]


def inside(one: Measured, budget: Budget) -> bool:
    """Whether a candidate keeps all that the budget asks for, by what was measured."""
    return complete(one) and not excess(one, budget)


def excess(one: Measured, budget: Budget) -> dict[str, float]:
    """By how much a candidate is beyond the budget: points, seconds and bytes, only what is."""
    found = {}
    if one.points > budget.max_drop + 1e-9:
        found["points"] = one.points - budget.max_drop
    if budget.latency is not None and (took := span(one, budget).median) > budget.latency:
        found["latency"] = took - budget.latency
    if budget.size is not None and (one.size or 0) > budget.size:
        found["size"] = float((one.size or 0) - budget.size)
    return found


def choose(rows: Sequence[Measured], budget: Budget) -> Measured | None:
    """The best inside the budget, None where nothing is.

    The fastest; where only a size was asked for beside the accuracy, the smallest. Among those
    whose intervals of speed overlap with the fastest one's, the most accurate, as far as the
    pictures tell it from the run as it is; then the smallest, a twentieth more being no more; then
    the fastest. Where the machine was so busy that intervals say little, one that took TIE times as
    long is no match all the same.
    """
    able = [one for one in rows if inside(one, budget)]
    if not able:
        return None
    if budget.size is not None and budget.latency is None:
        return min(able, key=lambda one: (one.size, one.drop, span(one, budget).median))
    fastest = min(able, key=lambda one: span(one, budget).median)
    limit = span(fastest, budget)
    same = [
        one
        for one in able
        if span(one, budget).low <= limit.high and span(one, budget).median <= TIE * limit.median
    ]
    best = min(_settled(one) for one in same)
    same = [one for one in same if _settled(one) == best]
    small = ALIKE * min(one.size or 0 for one in same)
    same = [one for one in same if (one.size or 0) <= small]
    return min(same, key=lambda one: (span(one, budget).median, one.drop))


def _settled(one: Measured) -> float:
    """The share of pictures that a candidate loses; 0 where its interval leaves that open."""
    return 0.0 if one.low <= 0 <= one.high else one.drop


def contenders(rows: Sequence[Measured], budget: Budget, most: int) -> list[Measured]:
    """At most `most` inside the budget, the fastest first, for a last measurement together."""
    able = [one for one in rows if inside(one, budget)]
    return sorted(able, key=lambda one: span(one, budget).median)[:most]


def nearest(rows: Sequence[Measured], budget: Budget) -> Measured | None:
    """Where nothing fits: what is beyond the budget by the least, as shares of what was asked, the
    worst of its shares counting."""
    able = [one for one in rows if complete(one)]
    if not able:
        return None

    def far(one: Measured) -> float:
        over = excess(one, budget)
        asked = {"points": max(budget.max_drop, 0.5), "latency": budget.latency or 1.0,
                 "size": float(budget.size or 1)}  # fmt: skip
        return max((value / asked[name] for name, value in over.items()), default=0.0)

    return min(able, key=lambda one: (far(one), one.drop, span(one, budget).median))


def marked(rows: Sequence[Measured], budget: Budget, chosen: str) -> tuple[Measured, ...]:
    """Rows that say whether they are inside the budget, on the front and chosen."""
    on_front = {one.key for one in front(rows, budget)}
    return tuple(
        replace(one, inside=inside(one, budget), on_front=one.key in on_front,
                chosen=one.key == chosen)
        for one in rows
    )  # fmt: skip
