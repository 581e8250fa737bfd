# SPDX-License-Identifier: Apache-2.0
"""A long-tailed part of a data set: `DATA@lt:100` has a hundred times fewer pictures of the last
class than of the first.

As for CIFAR-LT (Cui et al., arXiv 1901.05555; Cao et al., arXiv 1906.07413): of class c of K, in
the order of the names, int(n f^(c / (K - 1))) pictures stay, where n is what the largest class has
and f = 1 / ratio; with `step` the later half of the classes has int(n f) each and the others n.
Which ones is drawn class by class, by shuffling the pictures of a class with NumPy's
`RandomState(0)` and taking the first. A class that has fewer keeps them all.

Only training pictures become fewer: what validates and tests is what it is without the tail, so
that runs on DATA and on DATA@lt:100 are judged by the same pictures.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from crosspatch.errors import DataError, UsageError

KINDS = ("exp", "step")
MARK = "@lt:"
_FORM = re.compile(r"(?P<data>.+)@lt:(?P<tail>[^/\\]*)", re.DOTALL)


class Tail(NamedTuple):
    """ratio: of the pictures of the first class to those of the last; kind: one of `KINDS`."""

    ratio: float
    kind: str = "exp"

    def __str__(self) -> str:
        return f"{MARK}{self.ratio:g}" + (f",{self.kind}" if self.kind != KINDS[0] else "")


def parse_spec(spec: str | Path) -> tuple[str | Path, Tail | None]:
    """(DATA, its tail) of `DATA@lt:RATIO` or `DATA@lt:RATIO,step`; a path that is there is no such
    thing. Raises UsageError for another form and for a ratio below 1."""
    found = _FORM.fullmatch(str(spec))
    if found is None or Path(spec).exists():
        return spec, None
    number, comma, kind = found["tail"].partition(",")
    try:
        tail = Tail(float(number), kind if comma else KINDS[0])
    except ValueError:
        tail = Tail(math.nan)
    require_tail(tail, f"{MARK}{found['tail']}", found["data"] + MARK)
    return found["data"], tail


def require_tail(tail: Tail, got: str, do: str) -> None:
    """Raises UsageError, with these words, for a tail that cannot be."""
    if not 1 <= tail.ratio < math.inf or tail.kind not in KINDS:
        raise UsageError(
            got,
            "a ratio of 1 or more, and exp or step: the first class has so many times the "
            "pictures of the last",
            f"{do}100, or {do}100,step",
        )


def tail_counts(most: int, classes: int, tail: Tail) -> list[int]:
    """The pictures of each of `classes` classes, of which the first has `most`."""
    f = 1 / tail.ratio
    if tail.kind == "step":
        return [most if c < classes // 2 else int(most * f) for c in range(classes)]
    return [int(most * f ** (c / max(1, classes - 1))) for c in range(classes)]


def thin(labels: np.ndarray, classes: int, tail: Tail) -> np.ndarray:
    """Places (int64, ascending) of the pictures that stay. labels: (N,) in [0, classes).

    Raises DataError where a class would be left without a picture.
    """
    having = np.bincount(labels, minlength=classes)
    wanted = tail_counts(int(having.max(initial=0)), classes, tail)
    if min(wanted) < 1:
        raise DataError(
            f"{tail} leaves class {wanted.index(min(wanted)) + 1} of {classes} without a training "
            f"picture: the largest has {int(having.max(initial=0)):,}",
            "at least one training picture of each class",
            f"{_steepest(wanted[0], classes, tail)} at most, or give more pictures",
        )
    rng, kept = np.random.RandomState(0), []
    for label, count in enumerate(wanted):
        places = np.flatnonzero(labels == label)
        rng.shuffle(places)
        kept.append(places[:count])
    return np.sort(np.concatenate(kept))


def _steepest(most: int, classes: int, tail: Tail) -> Tail:
    """The tail of the largest whole ratio that leaves every class a picture: `most`, or a little
    less where `most` times 1 / `most` is rounded to below 1."""
    ratios = range(max(1, most), 0, -1)
    tails = (tail._replace(ratio=float(ratio)) for ratio in ratios)
    return next((t for t in tails if min(tail_counts(most, classes, t)) >= 1), tail)
