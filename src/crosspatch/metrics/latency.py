# SPDX-License-Identifier: Apache-2.0
"""How long calls take, measured so that they can be compared on a machine that others use too.

The calls take turns, so whatever slows the machine slows all of them; medians and paired ratios are
kept. The worker threads of an engine go on spinning for a while after its answer, so before it is
timed each call is made once untimed. Without that OpenVINO, with as many threads as there are cores
and right after ONNX Runtime, took 109 ms for what takes it 52 ms alone, with it 48 ms
(crossvit_tiny_224, four AVX2 cores with other jobs on them); with half the threads it makes no
difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

WARM_AGREE = 0.1  # two rounds agree when no call became faster by more than this share
WARM_MOST = 10  # rounds
WARM_SHARE = 0.25  # of the time


class Timing(NamedTuple):
    """Seconds of one call: the median of `count` turns, and what 5 % and 95 % of them lie below.

    turns: every measured turn in seconds, in order; the n-th turns of two calls were neighbours.
    """

    median: float
    low: float
    high: float
    count: int
    turns: tuple[float, ...] = ()


def alternate(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    least: int = 5,
    warm: int = 2,
    most: int | None = None,
    settle: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times calls that take turns, round after round, until `seconds` are spent.

    At least `least` rounds are measured whatever they take, and at most `most`. First come rounds
    that do not count: `warm` or more, until no call became faster by a tenth from one round to the
    next, ten rounds or a quarter of the time are over; none with warm=0. settle: untimed calls
    before each timed one.
    Raises ValueError without calls and for less than one round.
    """
    if not calls or least < 1 or (most is not None and most < least):
        raise ValueError(f"got {len(calls)} calls, least={least}, most={most}")
    end = clock() + seconds
    _warm_up(calls, warm, end - (1 - WARM_SHARE) * seconds, settle, clock)
    turns: dict[str, list[float]] = {name: [] for name in calls}
    done = 0
    while done < least or (clock() < end and (most is None or done < most)):
        for name, took in _round(calls, settle, clock).items():
            turns[name].append(took)
        done += 1
    return {name: timing(spent) for name, spent in turns.items()}


def timing(turns: list[float]) -> Timing:
    """The summary of measured turns. Raises ValueError when there are none."""
    if not turns:
        raise ValueError("no turn was measured")
    low, median, high = (float(value) for value in np.quantile(turns, (0.05, 0.5, 0.95)))
    return Timing(median, low, high, len(turns), tuple(turns))


def ratio(one: Timing, other: Timing) -> Timing:
    """How many times as long `one` takes as `other`, from turns that were neighbours.

    Raises ValueError when they were not measured in the same rounds.
    """
    return timing([a / b for a, b in zip(one.turns, other.turns, strict=True)])


def _warm_up(
    calls: Mapping[str, Callable[[], object]],
    warm: int,
    end: float,
    settle: int,
    clock: Callable[[], float],
) -> None:
    before: dict[str, float] = {}
    for done in range(WARM_MOST if warm else 0):
        if done >= warm and clock() >= end:
            return
        now = _round(calls, settle, clock)
        still = [name for name in before if now[name] < (1 - WARM_AGREE) * before[name]]
        if done + 1 >= warm and before and not still:
            return
        before = now


def _round(
    calls: Mapping[str, Callable[[], object]], settle: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds of one turn of each call."""
    took = {}
    for name, call in calls.items():
        for _ in range(settle):
            call()
        began = clock()
        call()
        took[name] = clock() - began
    return took
