# SPDX-License-Identifier: Apache-2.0
"""How long candidates take, each group of them in turns with the run as it is.

The run as it is stays open in every engine and at every number of threads for the whole search:
opening costs seconds for large networks. Each group takes turns with it, so what the machine did
meanwhile falls out of the ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from crosspatch.deploy.bundle import Bundle, check_pictures
from crosspatch.deploy.engines import Engine, open_engine
from crosspatch.deploy.shrink.result import Speed, Took
from crosspatch.metrics.latency import Timing, alternate, ratio

LEAST, MOST = 11, 120  # turns of a group
ROUNDS = 40  # that a group is given time for
SHORTEST, LONGEST = 0.4, 20.0  # seconds of a group at one number of threads


class Way(NamedTuple):
    """How a bundle is computed: in which engine, and fp32, bf16, int8-dynamic or int8-static."""

    engine: str
    precision: str

    def open(self, bundle: Bundle, threads: int) -> Engine:
        """The bundle, open. Raises as `open_engine` does."""
        return open_engine(bundle, self.engine, self.precision.partition("-")[0], threads)


class Job(NamedTuple):
    """What is timed: its key, its bundle, how it is computed, and the key of the same network's
    float in the same engine, "" where it is that itself."""

    key: str
    bundle: Bundle
    way: Way
    float_: str = ""


class Clock:
    """Times groups of bundles beside the run as it is.

    original: its fp32 bundle; ways: (engine, fp32) that the machine has, the first is the base;
    threads: numbers of them.
    """

    def __init__(self, original: Bundle, ways: list[Way], threads: tuple[int, ...]) -> None:
        self.threads, self.ways, self._bundle = threads, ways, original
        self._open = {(way, count): way.open(original, count) for way in ways for count in threads}
        self.picture = check_pictures(original.info.preprocess.size, 1)

    def original(self, way: Way, threads: int) -> Engine:
        """The run as it is, open."""
        return self._open[way, threads]

    def time(
        self, jobs: list[Job], opened: Mapping[str, Engine] | None = None
    ) -> tuple[dict[str, dict[int, Took]], dict[int, float]]:
        """(by key: by threads what each took, by threads the base's median in seconds).

        opened: engines by key that are open already, at any number of threads. A job that is the
        run as it is, by its bundle and way, is timed once, as that.
        """
        found: dict[str, dict[int, Took]] = {job.key: {} for job in jobs}
        base: dict[int, float] = {}
        for count in self.threads:
            engines = self._engines(jobs, opened or {}, count)
            times = _turns(engines, self.picture)
            base[count] = times[_name(self.ways[0])].median
            for job in jobs:
                found[job.key][count] = self._took(job, jobs, times)
        return found, base

    def _engines(
        self, jobs: list[Job], opened: Mapping[str, Engine], threads: int
    ) -> dict[str, Engine]:
        found = {_name(way): self._open[way, threads] for way in self.ways}
        for job in jobs:
            if self._is_original(job):
                continue
            ready = opened.get(job.key)
            if ready is None or ready.setting.threads != threads:
                ready = job.way.open(job.bundle, threads)
            found[job.key] = ready
        return found

    def _is_original(self, job: Job) -> bool:
        return job.way in self.ways and job.bundle.hash == self._bundle.hash

    def _took(self, job: Job, jobs: list[Job], times: Mapping[str, Timing]) -> Took:
        by_key = {one.key: one for one in jobs}
        mine = times[self._timed_as(job)]
        float_ = by_key.get(job.float_)
        return Took(
            mine.median,
            float(np.quantile(mine.turns, 0.9)),
            mine.count,
            base=speed(times[_name(self.ways[0])], mine),
            original=speed(times[_name(Way(job.way.engine, "fp32"))], mine),
            float_=None if float_ is None else speed(times[self._timed_as(float_)], mine),
        )

    def _timed_as(self, job: Job) -> str:
        return _name(job.way) if self._is_original(job) else job.key


def _name(way: Way) -> str:
    return f"the run as it is, {way.engine}"


def _turns(engines: Mapping[str, Engine], picture: np.ndarray) -> dict[str, Timing]:
    calls: dict[str, Callable[[], object]] = {
        name: partial(engine.run, picture) for name, engine in engines.items()
    }
    first = alternate(calls, seconds=0, least=1)
    round_ = 2 * sum(one.median for one in first.values())
    seconds = min(LONGEST, max(SHORTEST, ROUNDS * round_))
    return alternate(calls, seconds=seconds, least=LEAST, most=MOST, warm=1)


def speed(one: Timing, other: Timing) -> Speed:
    """How many times as fast `other` is as `one`: the median over turns that were neighbours, and
    its 95 % interval from the order of the turns (the sign test's), which asks nothing of their
    distribution. Raises ValueError when they were not measured in the same rounds."""
    turns = np.sort(ratio(one, other).turns)
    low, high = _ranks(len(turns))
    return Speed(float(np.median(turns)), float(turns[low]), float(turns[high]))


def _ranks(count: int) -> tuple[int, int]:
    """Places of the two of `count` values in order that enclose the median with 95 % at least; the
    first and the last where there are too few."""
    low, below = 0, 1  # of 2^count orders, those with at most `low` values below the median
    while 40 * (below + math.comb(count, low + 1)) <= 2**count:
        low += 1
        below += math.comb(count, low)
    return low, count - 1 - low
