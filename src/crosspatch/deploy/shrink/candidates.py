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
from crosspatch.tokens.ladder import LADDERS, Options, ladders
from crosspatch.tokens.reduce import put
from crosspatch.training.package import Trained

SHARES = (0.85, 0.7, 0.55)
"""Of the multiply-adds of the whole: the rungs of a reduction that are tried."""
AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Candidate:
    """A network that can be measured.

    name: what it is called in the table, one of its kind in a search; make: gives the model, its
    temperature and the number of pictures that was fitted on (0: to be fitted on the validation
    pictures); macs: multiply-adds of one picture; method, options: of a reduction of tokens;
    screen: whether it is shown the validation pictures in torch before it is written as a bundle,
    which costs less than that; trained: seconds of fine-tuning; run: the folder that holds its
    weights, "" for the run's own.
    """

    name: str
    kind: str
    make: Callable[[], Trained]
    macs: int
    method: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    screen: bool = False
    trained: float = 0.0
    run: str = ""


@dataclass
class Context:
    """What sources know. rows: what has been measured so far; remarks: gets a sentence for what
    cannot be tried here; data: where the run's pictures are now, None: where they were; until: the
    moment (time.monotonic) at which the search ends; further: options of single sources."""

    run: Path
    trained: Trained
    macs: int
    budget: Budget
    folder: Path
    data: str | None = None
    rows: Sequence[Measured] = ()
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
    schedule, at about SHARES of the multiply-adds."""
    from crosspatch.metrics.macs import count_macs

    if context.trained.reduction:
        context.remarks.append(
            f"its tokens are reduced already ({context.trained.reduction}), so no other reduction "
            "was tried"
        )
        return
    module, shape = context.trained.module, (3, *context.trained.preprocess.size)
    refused = []
    for method in LADDERS:
        try:
            shapes = ladders(module, method)
        except CrosspatchError as error:
            refused.append(error.got)
            continue
        for name, rungs in shapes.items():

            def cost(options: Options, method: str = method) -> int:
                return count_macs(_reduced(module, method, options, meta=True), shape)

            for options, macs in _picked(rungs, cost, context.macs):
                share = macs / context.macs
                yield Candidate(
                    f"{method} {name} {share:.2f}",
                    "tokens",
                    partial(_trained, context.trained, method, options),
                    macs,
                    method,
                    options,
                    screen=True,
                )
    if len(refused) == len(LADDERS):
        context.remarks.append(f"no tokens can be left out of it: {refused[0]}")


def _picked(
    rungs: Sequence[Options], cost: Callable[[Options], int], whole: int
) -> list[tuple[Options, int]]:
    """The rungs whose multiply-adds are nearest to SHARES of `whole`, found by halving, with them;
    what does not save a twentieth, or cannot be had on this network, is left out."""
    known: dict[int, int] = {}

    def at(rung: int) -> int:
        if rung not in known:
            try:
                known[rung] = cost(rungs[rung])
            except CrosspatchError:
                known[rung] = 0  # stronger than this network can have
        return known[rung]

    for share in SHARES:
        low, high = 0, len(rungs) - 1
        while low < high:
            middle = (low + high) // 2
            if at(middle) <= share * whole:
                high = middle
            else:
                low = middle + 1
        for rung in {low, max(0, low - 1)}:
            at(rung)
    able = {rung: macs for rung, macs in known.items() if 0 < macs <= 0.95 * whole}
    chosen = {min(able, key=lambda rung: abs(able[rung] - s * whole)) for s in SHARES if able}
    return [(rungs[rung], able[rung]) for rung in sorted(chosen)]


def _reduced(module: Any, method: str, options: Options, *, meta: bool = False) -> Any:
    made = copy.deepcopy(module)
    made = made.to("meta") if meta else made
    put(made, method, options)
    return made.eval()


def _trained(trained: Trained, method: str, options: Options) -> Trained:
    """The run's model with a reduction in it, to be calibrated anew."""
    module = _reduced(trained.module, method, options)
    return trained._replace(module=module, calibrated_on=0)
