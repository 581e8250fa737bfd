# SPDX-License-Identifier: Apache-2.0
"""The search itself: candidates in turn, each judged and timed, kept on disk as they are done."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from crosspatch.deploy.bundle import PRECISIONS, Bundle
from crosspatch.deploy.engines import Engine, available, precision_of
from crosspatch.deploy.shrink.build import INT8, Network
from crosspatch.deploy.shrink.candidates import AS_IT_IS, SOURCES, Candidate, Context
from crosspatch.deploy.shrink.choose import contenders, scaled, span
from crosspatch.deploy.shrink.judge import CHUNK, Pictures, judged
from crosspatch.deploy.shrink.result import Measured
from crosspatch.deploy.shrink.state import State
from crosspatch.deploy.shrink.timing import Clock, Job, Way
from crosspatch.errors import CrosspatchError, UsageError, reason

BATCH = {"int8-dynamic": 1}
"""Pictures of one call while it is judged: those of a batch share the scales of dynamic int8, and
one at a time is what is served. Of other precisions the answer does not depend on it."""
USUAL_BATCH = 16
OUTSIDE = 2  # networks beyond the budget by their answers in torch that are measured all the same
FINAL = 4  # candidates that are measured once more, side by side
CLOSE = 1.15  # how much longer than the fastest one they may take
SLOW = 2.0  # a file is not tried in an engine that takes so many times as long as another
SHORTEST, LONGEST = 60.0, 900.0  # seconds of a search that was given none
SCREENING = 0.35  # of the time that is left, at most, goes to answers in torch
TORCH = 2.0  # times as long as an engine takes torch to answer, before it is known
ENDING = 0.1  # of the time, for the last measurement, the test and the bundle
TRIES = 30  # answers of all pictures that a search takes about, for its estimate
LEAST_PICTURES = 200


class Report(Protocol):
    """Who is told how far it is: `cli.screen.Screen` is one."""

    def message(self, text: str) -> None: ...

    def progress(self, what: str, done: int, total: int) -> None: ...


class Screened(NamedTuple):
    """A candidate that was judged in torch."""

    candidate: Candidate
    row: Measured


class Search:
    """One search in a run's working folder.

    shown: the validation pictures; state: what is known already; seconds: None for a time by the
    size of the network. Every network's rows are saved before the next one begins.
    """

    def __init__(
        self,
        context: Context,
        shown: Pictures,
        state: State,
        report: Report,
        *,
        threads: tuple[int, ...],
        seconds: float | None = None,
    ) -> None:
        self.context, self.state, self.report = context, state, report
        self.threads, self.began = threads, time.monotonic()
        self.original = Network(_as_it_is(context), context.folder, context.run, shown)
        bundle = self.original.bundle()
        ways = [Way(*one) for one in available(bundle) if one[1] == "fp32"]
        if not ways:
            raise UsageError(
                "no engine is installed",
                "onnxruntime or openvino, in which candidates are measured",
                "pip install 'crosspatch[onnx,openvino]'",
            )
        self.clock = Clock(bundle, ways, threads)
        self.base = _row(self.original.candidate, ways[0]).key
        engine = self.clock.original(ways[0], max(threads))
        took = _answer_time(engine, shown)
        self.seconds = seconds or _usual(took, len(shown))
        if not state.count:
            fits = int(self.seconds / 8 / took)
            state.count = min(len(shown), max(LEAST_PICTURES, fits))
        self.all, self.shown = len(shown), shown.first(state.count)
        context.until = self.began + (1 - ENDING) * self.seconds
        self.before = _right(engine, self.shown)
        self._note_given_up()
        self.known: dict[str, Candidate] = {}
        self.left: list[str] = []
        self._slow: list[Way] = []
        self.last = 0.0  # seconds that the last network took
        self.screening = TORCH * took * state.count  # and that torch took to answer for one

    def run(self) -> None:
        """Try every source. Ended by the time, or when nothing is left."""
        most = self.state.count
        self.report.message(
            f"the search takes about {_minutes(self.seconds)}; {most:,} validation pictures judge "
            "every candidate"
        )
        self.state.save(self.context.folder)
        for source in SOURCES.values():
            self.context.rows = self.rows()
            self._note_slow()
            waiting: list[Screened] = []
            reserve = (1 - SCREENING) * (self.context.until - time.monotonic())
            for candidate in source(self.context):
                self.known[candidate.name] = candidate
                if candidate.name in {one.name for one in self.state.rows}:
                    continue
                takes = reserve + self.screening if candidate.screen else self.last / 2
                if self._late(candidate, takes):
                    self.left.append(candidate.name)
                elif candidate.screen:
                    waiting += self._screen(candidate)
                    self._tell()
                else:
                    self._measure(candidate)
            for one in self._ordered(waiting):
                self._measure(one.candidate)
        self.state.finished = not self.left
        self._final()

    def rows(self) -> list[Measured]:
        """All rows, their seconds on one scale."""
        base = {count: float(np.median(found)) for count, found in self.state.base.items()}
        return scaled(self.state.rows, base)

    # ---------------------------------------------------------------- one network

    def _screen(self, candidate: Candidate) -> list[Screened]:
        """The candidate as torch answers, [] where that was enough to give it up."""
        began, network = time.monotonic(), self._network(candidate)
        row = Measured(**_facts(candidate))
        try:
            most = self.context.budget.max_drop / 100
            row, _ = judged(row, self.shown, network.torch(), self.before, most, CHUNK)
        except CrosspatchError as error:
            row = replace(row, dropped=f"it cannot be had: {reason(error)}")
        self.screening = time.monotonic() - began
        if row.dropped:
            self._keep([row])
            return []
        return [Screened(candidate, row)]

    def _ordered(self, waiting: list[Screened]) -> Iterable[Screened]:
        """Those that are still worth their time when it is their turn: first what is inside the
        budget by torch's answers, the fewest multiply-adds first; then a few others, the nearest
        to it first."""
        budget, outside = self.context.budget, 0
        order = sorted(
            waiting,
            key=lambda one: (
                one.row.points > budget.max_drop,
                one.row.points if one.row.points > budget.max_drop else one.row.macs,
            ),
        )
        for one in order:
            if self._late(one.candidate, self.last / 2):
                self.left.append(one.candidate.name)
            elif one.row.points <= budget.max_drop:
                yield one
            elif outside < OUTSIDE:
                outside += 1
                yield one
            else:
                why = f"not timed: it loses {one.row.points:.1f} points of accuracy in torch"
                self._keep([replace(one.row, dropped=why)])

    def _measure(self, candidate: Candidate) -> None:
        """All rows of a network, and what it cost."""
        began = time.monotonic()
        network = self._network(candidate)
        rows, jobs, opened = [], [], {}
        for way, bundle in self._ways(network):
            row, engine = self._judged(candidate, way, bundle)
            rows.append(row)
            if engine is not None:
                opened[row.key] = engine
            float_ = "" if way.precision == "fp32" else _row(candidate, Way(way.engine, "fp32")).key
            jobs.append(Job(row.key, bundle, way, float_))
        network.release()
        timed = [job for job in jobs if job.key in opened]
        needed = {job.float_ for job in timed}
        timed += [job for job in jobs if job.key in needed and job not in timed]
        if opened:
            took, base = self.clock.time(timed, opened)
            for count, seconds in base.items():
                self.state.base.setdefault(count, []).append(seconds)
            rows = [
                replace(one, latency=took[one.key]) if one.key in opened else one for one in rows
            ]
        self._keep(rows)
        self.last = time.monotonic() - began
        self._tell()

    def _network(self, candidate: Candidate) -> Network:
        if candidate.name == AS_IT_IS:
            return self.original
        return Network(candidate, self.context.folder, self.context.run, self.shown)

    def _ways(self, network: Network) -> Iterable[tuple[Way, Bundle]]:
        """Every (engine, precision) that this network is worth trying in, with its bundle."""
        name = network.candidate.name
        for precision in PRECISIONS if name == AS_IT_IS else ("fp32", *self._int8()):
            try:
                bundle = network.bundle(precision)
            except CrosspatchError as error:
                self._remark(f"{name} in {precision}: {reason(error)}")
                if precision == "fp32":
                    self._keep([Measured(**_facts(network.candidate), dropped=reason(error))])
                    return
                continue
            for engine, kind in available(bundle):
                way = Way(engine, precision if kind == precision_of(bundle.info) else kind)
                if name == AS_IT_IS or way not in self._slow:
                    yield way, bundle

    def _int8(self) -> list[str]:
        """Of the two kinds of int8 the one that served the run as it is better; [] where both lost
        more than the budget."""
        mine = [one for one in self.rows() if one.name == AS_IT_IS and one.precision in INT8]
        able = [one for one in mine if one.latency]
        if not able:
            return []
        budget = self.context.budget
        fits = [one for one in able if one.points <= budget.max_drop] or able
        return [min(fits, key=lambda one: span(one, budget).median).precision]

    def _note_slow(self) -> None:
        """Ways to run the run as it is while another engine runs the same file far faster."""
        budget = self.context.budget
        mine = [one for one in self.rows() if one.name == AS_IT_IS and one.latency]
        took = {Way(one.engine, one.precision): span(one, budget).median for one in mine}
        for way, seconds in took.items():
            file = precision_file(way.precision)
            if way not in self._slow and seconds > SLOW * min(
                took[w] for w in took if precision_file(w.precision) == file
            ):
                self._slow.append(way)
        if self._slow:
            named = ", ".join(f"{way.engine} {way.precision}" for way in self._slow)
            self._remark(
                f"{named}: the other engine runs the same file of the run as it is more than "
                f"{SLOW:g} times as fast, so no other network was tried there"
            )

    def _judged(
        self, candidate: Candidate, way: Way, bundle: Bundle
    ) -> tuple[Measured, Engine | None]:
        """The row with its accuracy and size; its engine, None where it was dropped."""
        row = replace(_row(candidate, way), size=bundle.size)
        try:
            engine = self._opened(way, bundle)
            batch = BATCH.get(way.precision, USUAL_BATCH)
            most = self.context.budget.max_drop / 100
            row, _ = judged(row, self.shown, engine.run, self.before, most, batch)
        except CrosspatchError as error:
            return replace(row, dropped=f"it does not run: {reason(error)}"), None
        return row, None if row.dropped else engine

    def _opened(self, way: Way, bundle: Bundle) -> Engine:
        return way.open(bundle, max(self.threads))

    def _keep(self, rows: list[Measured]) -> None:
        self.state.rows += rows
        self._note_given_up()
        self.state.save(self.context.folder)

    def _note_given_up(self) -> None:
        """A network is given up where no row of it is whole."""
        whole = {one.name for one in self.state.rows if not one.dropped}
        self.context.given_up |= {one.name for one in self.state.rows} - whole

    def _remark(self, text: str) -> None:
        if text not in self.context.remarks:
            self.context.remarks.append(text)

    # ---------------------------------------------------------------- the end

    def _final(self) -> None:
        """The fastest that fit, once more and side by side: the fastest of many measurements is
        often one that was lucky."""
        budget = self.context.budget
        best = contenders(self.rows(), budget, FINAL)
        if len(best) < 2:
            return
        limit = CLOSE * span(best[0], budget).median
        jobs: dict[str, Job] = {}
        for one in (one for one in best if span(one, budget).median <= limit):
            self._again(one, jobs)
        if len(jobs) < 2:
            return
        took, base = self.clock.time(list(jobs.values()))
        for count, seconds in base.items():
            self.state.base.setdefault(count, []).append(seconds)
        for place, row in enumerate(self.state.rows):
            if row.key in took:
                self.state.rows[place] = replace(row, latency=took[row.key])
        self.state.save(self.context.folder)

    def _again(self, row: Measured, jobs: dict[str, Job]) -> None:
        """Note a row to be timed again, and its float with it."""
        bundle, float_ = self.bundle_of(row), ""
        if bundle is None or row.key in jobs:
            return
        if row.precision != "fp32":
            beside = replace(row, precision="fp32")
            float_ = beside.key
            if any(one.key == float_ for one in self.state.rows):
                self._again(beside, jobs)
        jobs[row.key] = Job(row.key, bundle, Way(row.engine, row.precision), float_)

    def network_of(self, row: Measured) -> Network | None:
        """The network of a row; None where its source does not give it any more."""
        candidate = self.known.get(row.name)
        return None if candidate is None else self._network(candidate)

    def bundle_of(self, row: Measured) -> Bundle | None:
        """The bundle of a row, made again where it is not there."""
        network = self.network_of(row)
        return None if network is None else network.bundle(precision_file(row.precision))

    def engine_of(self, row: Measured, bundle: Bundle) -> Engine:
        """The bundle opened as the row says, on all threads."""
        return self._opened(Way(row.engine, row.precision), bundle)

    def _late(self, candidate: Candidate, takes: float) -> bool:
        """Whether there is no time for a further network that takes so many seconds. The run as it
        is and what was trained for the search are always measured."""
        always = candidate.trained or not self.state.rows
        return not always and time.monotonic() + takes > self.context.until

    def _tell(self) -> None:
        done = min(self.seconds, time.monotonic() - self.began)
        self.report.progress("searching", round(done), math.ceil(self.seconds))


def precision_file(precision: str) -> str:
    """The precision of the file that is computed in `precision`: bf16 is computed of fp32."""
    return "fp32" if precision == "bf16" else precision


def right_in(engine: Engine, shown: Pictures, precision: str) -> np.ndarray:
    """bool (N,): the pictures that an engine names rightly."""
    return _right(engine, shown, BATCH.get(precision, USUAL_BATCH))


def _right(engine: Engine, shown: Pictures, batch: int = USUAL_BATCH) -> np.ndarray:
    parts = [
        shown.right(engine.run(shown.images[start : start + batch]), start)
        for start in range(0, len(shown), batch)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, bool)


def _as_it_is(context: Context) -> Candidate:
    return next(iter(SOURCES["engines"](context)))


def _facts(candidate: Candidate) -> dict[str, Any]:
    names = ("name", "kind", "method", "options", "macs", "trained", "run")
    return {name: getattr(candidate, name) for name in names}


def _row(candidate: Candidate, way: Way) -> Measured:
    return Measured(**_facts(candidate), engine=way.engine, precision=way.precision)


def _answer_time(engine: Engine, shown: Pictures) -> float:
    """Seconds of a picture, of those that judge."""
    some = shown.images[:USUAL_BATCH]
    engine.run(some)
    began = time.perf_counter()
    engine.run(some)
    return max(1e-6, (time.perf_counter() - began) / len(some))


def _usual(took: float, pictures: int) -> float:
    """Seconds of a search, by those of a picture."""
    return min(LONGEST, max(SHORTEST, SHORTEST + TRIES * took * pictures))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
