# SPDX-License-Identifier: Apache-2.0
"""Which reductions of tokens are worth fine-tuning: faster than what is accurate enough already,
and nearest to it. No torch."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosspatch.deploy.shrink.result import Budget, Measured
from crosspatch.tokens import spec

MOST = 3
"""Reductions that share the time."""
FOLDER = "finetuned-"


@dataclass(frozen=True)
class Pupil:
    """A reduction of the run that is worth training: what it is called, what it does, multiply-adds
    of one picture."""

    name: str
    method: str
    options: dict[str, Any]
    macs: int = 0

    @property
    def reduction(self) -> str:
        """As `tokens.spec` writes it."""
        return spec.spell(self.method, self.options)

    def folder(self, shop: Path, seconds: float) -> Path:
        """Where it is trained for so long: the same for the same search, so that it is found."""
        digest = hashlib.sha256(f"{self.reduction} {seconds:.3f}".encode()).hexdigest()[:8]
        return shop / f"{FOLDER}{re.sub(r'[^a-z0-9]+', '-', self.method)}-{digest}"


def pupils(rows: Sequence[Measured], budget: Budget, most: int = MOST) -> list[Pupil]:
    """The reductions that lose too much and promise most, at most `most`.

    Those that are faster than all that is accurate enough already (others bring nothing), and of
    them those that no other beats in speed and accuracy at once; those within the latency asked
    for come first, then those that lose least. Float is compared with float, and the time of what
    was given up before it was timed is taken to be as its multiply-adds.
    """
    known = _distinct(one for one in rows if not one.run)
    seconds = _seconds(known, budget)
    fine = [seconds[id(one)] for one in known if one.points <= budget.max_drop]
    losing = [one for one in known if one.method and one.points > budget.max_drop
              and seconds[id(one)] < min(fine, default=math.inf)]  # fmt: skip
    front = [
        one
        for one in losing
        if not any(
            seconds[id(other)] <= seconds[id(one)] and other.drop < one.drop for other in losing
        )
    ]
    asked = math.inf if budget.latency is None else budget.latency
    front.sort(key=lambda one: (seconds[id(one)] > asked, one.drop, seconds[id(one)]))
    return [Pupil(one.name, one.method, one.options, one.macs) for one in front[:most]]


def _distinct(rows: Iterable[Measured]) -> list[Measured]:
    """One row for each network, in float where it came so far: the fastest."""
    best: dict[str, Measured] = {}
    order = lambda one: (not one.floats, min(_medians(one).values(), default=math.inf))
    for one in sorted((one for one in rows if one.floats or not one.precision), key=order):
        best.setdefault(spec.spell(one.method, one.options) if one.method else "", one)
    return list(best.values())


def _medians(one: Measured) -> dict[int, float]:
    return {threads: took.median for threads, took in one.latency.items()}


def _seconds(rows: Sequence[Measured], budget: Budget) -> dict[int, float]:
    """By `id` of each row, seconds of one picture where the budget means them: measured, or after
    the multiply-adds, at the pace of the same method or else of the whole network."""
    found = dict[int, float]()
    for one in rows:
        took = _medians(one)
        if budget.threads is not None:
            took = {n: took[n] for n in took if n == budget.threads}
        if took:
            found[id(one)] = min(took.values())
    paces = dict[str, float]()
    for one in rows:
        if id(one) in found and one.macs:
            pace = found[id(one)] / one.macs
            paces[one.method] = max(pace, paces.get(one.method, pace))

    def guess(one: Measured) -> float:
        return paces.get(one.method, paces.get("", 1.0)) * one.macs

    return {id(one): found.get(id(one), guess(one)) for one in rows}
