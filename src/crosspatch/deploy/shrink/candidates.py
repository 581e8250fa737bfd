# SPDX-License-Identifier: Apache-2.0
"""What a search tries: a register of sources, each of which names networks made out of the run's.

A source is a function of a `Context`; `register` is all that a later compressor needs to join. A
network is measured in every engine and precision of this machine, so a source gives networks only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from crosspatch.deploy.shrink.result import Budget, Measured
from crosspatch.errors import CrosspatchError
from crosspatch.metrics.macs import count_macs
from crosspatch.tokens.ladder import LADDERS, Options, ladders
from crosspatch.tokens.reduce import put
from crosspatch.training.package import Trained

SHARES = (0.85, 0.7, 0.55)
"""Of the multiply-adds of the whole: the rungs of a reduction that are tried."""
AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Candidate:
    """A network that can be measured.

    name: what it is called in the table, one of its kind in a search; make: gives the model; macs:
    multiply-adds of one picture; method, options: of a reduction of tokens; calibrate: whether its
    temperature is to be fitted on the validation pictures (of several labels to a picture the run's
    stays, as thresholds belong to it); screen: whether it is shown the validation pictures in torch
    before it is written as a bundle, which costs less than that; trained: seconds of fine-tuning;
    run: the run folder that holds its weights, "" for the run's own.
    """

    name: str
    kind: str
    make: Callable[[], Trained]
    macs: int
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    calibrate: bool = False
    screen: bool = False
    trained: float = 0.0
    run: str = ""


@dataclass
class Context:
    """What sources know.

    rows: what had been measured when the source was called; given_up: names of networks that were
    given up so far; remarks: gets a sentence for what cannot be tried; data: where the run's
    pictures are now, None: where they were; until: the moment (time.monotonic) at which the search
    ends; further: options of single sources.
    """

    run: Path
    trained: Trained
    macs: int
    budget: Budget
    folder: Path
    data: str | None = None
    rows: Sequence[Measured] = ()
    given_up: set[str] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)
    until: float = float("inf")
    further: dict[str, Any] = field(default_factory=dict)


Source = Callable[[Context], Iterable[Candidate]]
SOURCES: dict[str, Source] = {}
"""By name, in the order in which they are tried."""


def register(name: str) -> Callable[[Source], Source]:
    """Decorates a function of a Context that gives Candidates. Raises ValueError for a taken name.

    Sources are called in the order in which they were registered, each when those before it have
    been measured.
    """

    def note(source: Source) -> Source:
        if name in SOURCES:
            raise ValueError(f"{name} is registered already")
        SOURCES[name] = source
        return source

    return note


@register("engines")
def engines(context: Context) -> Iterable[Candidate]:
    """The run's own network."""
    yield Candidate(AS_IT_IS, "engines", lambda: context.trained, context.macs)


@register("tokens")
def tokens(context: Context) -> Iterable[Candidate]:
    """The run's network with fewer tokens: every method that it can have and every shape of its
    schedule, at about SHARES of the multiply-adds, the weakest first. A shape of which a rung was
    given up is not climbed further."""
    if context.trained.reduction:
        context.remarks.append(
            f"its tokens are reduced already ({context.trained.reduction}), so no other reduction "
            "was tried"
        )
        return
    found, refused = _ladders(context)
    if not found:
        context.remarks.append(f"no tokens can be left out of it: {refused}")
    for share in SHARES:
        for ladder in found:
            if not ladder.names & context.given_up:
                yield from ladder.rung(share)


def _ladders(context: Context) -> tuple[list[_Ladder], str]:
    """Every shape of every method that the network can have, and why one it cannot is refused."""
    found, refused = [], ""
    for method in LADDERS:
        try:
            shapes = ladders(context.trained.module, method)
        except CrosspatchError as error:
            refused = error.got
            continue
        found += [_Ladder(context, method, shape, rungs) for shape, rungs in shapes.items()]
    return found, refused


class _Ladder:
    """The rungs of one shape of schedule, and their multiply-adds as far as they were counted."""

    def __init__(self, context: Context, method: str, shape: str, rungs: list[Options]) -> None:
        self.context, self.method, self.shape, self.rungs = context, method, shape, rungs
        self.names: set[str] = set()
        self._known: dict[int, int] = {}
        self._given: set[int] = set()

    def rung(self, share: float) -> Iterable[Candidate]:
        """The rung whose multiply-adds are nearest to `share` of the whole; none where it was given
        before, or nothing near it saves a twentieth."""
        whole = self.context.macs
        low, high = 0, len(self.rungs) - 1
        while low < high:
            middle = (low + high) // 2
            if self._at(middle) <= share * whole:
                high = middle
            else:
                low = middle + 1
        able = {n: self._at(n) for n in (low, max(0, low - 1)) if 0 < self._at(n) <= 0.95 * whole}
        best = min(able, key=lambda n: abs(able[n] - share * whole), default=None)
        if best is None or best in self._given:
            return
        self._given.add(best)
        name = f"{self.method} {self.shape} {able[best] / whole:.2f}"
        self.names.add(name)
        make = partial(_trained, self.context.trained, self.method, self.rungs[best])
        facts: dict[str, Any] = {"method": self.method, "options": self.rungs[best]}
        yield Candidate(name, "tokens", make, able[best], **facts, calibrate=True, screen=True)

    def _at(self, rung: int) -> int:
        """Multiply-adds of a rung, 0 for one that is stronger than this network can have."""
        if rung not in self._known:
            trained, options = self.context.trained, self.rungs[rung]
            try:
                module = _reduced(trained.module, self.method, options, meta=True)
                self._known[rung] = count_macs(module, (3, *trained.preprocess.size))
            except CrosspatchError:
                self._known[rung] = 0
        return self._known[rung]


def _reduced(module: Any, method: str, options: Options, *, meta: bool = False) -> Any:
    made = copy.deepcopy(module)
    made = made.to("meta") if meta else made
    put(made, method, options)
    return made.eval()


def _trained(trained: Trained, method: str, options: Options) -> Trained:
    """The run's model with a reduction in it."""
    return trained._replace(module=_reduced(trained.module, method, options))
