# SPDX-License-Identifier: Apache-2.0
"""`crosspatch compare DATA --try a,b,c`: which of several ways to train is better on these data."""

from __future__ import annotations

import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from crosspatch.cli import pages, words
from crosspatch.cli.options import (
    DATA,
    MULTI,
    Columns,
    Output,
    at_least,
    reading_of,
    seconds,
    typed,
)
from crosspatch.cli.train import Choices, Learnt, default_out, resumable
from crosspatch.errors import UsageError

if TYPE_CHECKING:
    from crosspatch.cli.screen import Screen
    from crosspatch.training.compared import Compared, Row

_WHAT = Group("What is compared", sort_key=5)
_LONG = Group("How long", sort_key=20)
_FORALL = Group("For all candidates", sort_key=30)
FOLDERS = Path("compared")
NAME = 24
TRY = (
    "Candidates; the others are compared with the first. Each is words joined by +: base, a mixing "
    "(mixup), a reduction (tome:r=8), an objective (ldam), a model, a recipe (deit), distill:RUN, "
    "hard:RUN, scalekd:RUN, labels:FILE, or any setting (lr=0.001). NAME=… before it names it."
)


@Parameter(name="*", group=_WHAT)
@dataclass(frozen=True, kw_only=True)
class Tried:
    """What is compared, and where the runs are kept."""

    tried: Annotated[str, Parameter(name="--try", metavar="A,B,C", help=TRY)] = ""

    seeds: Annotated[
        int | None, at_least(1, "--seeds 3"), Parameter(metavar="N", show_default="3")
    ] = None
    """Runs of each candidate, each with a seed of its own."""

    out: Annotated[Path | None, Parameter(metavar="DIR", show_default="compared/DATA-1, -2, …")] = (
        None
    )
    """The folder of all runs, the table, the figure and the page."""

    resume: bool = False
    """Go on with an interrupted comparison; with more --seeds also with one that has ended."""


@Parameter(name="*", group=_LONG)
@dataclass(frozen=True, kw_only=True)
class Length:
    """How long all may take; every run gets the same."""

    time: Annotated[float | None, Parameter(converter=seconds, metavar="1h")] = None
    """Fit the whole comparison into this time: 10m, 1.5h."""

    epochs: Annotated[
        int | None, at_least(1, "--epochs 30"), Parameter(metavar="N", show_default="30")
    ] = None
    """Times that every run sees every picture."""


def compare(
    data: Annotated[str, Parameter(help=DATA)],
    /,
    *,
    tried: Tried | None = None,
    length: Length | None = None,
    choices: Choices | None = None,
    learnt: Learnt | None = None,
    columns: Columns | None = None,
    group: Annotated[str | None, Parameter(group=_FORALL, metavar="folder|PATTERN|COLUMN")] = None,
    multi_label: Annotated[bool, Parameter(group=_FORALL, help=MULTI)] = False,
    output: Output | None = None,
) -> int:
    """Find out which of several ways to train is better on your pictures.

    Parameters
    ----------
    group
        Pictures that stay in one split: by folder, a regular expression on paths, or a column.
    """
    tried, length, output = tried or Tried(), length or Length(), output or Output()
    common = typed(choices or Choices()) | typed(learnt or Learnt())
    _check(tried, length, common)
    common = {key: str(v) if isinstance(v, Path) else v for key, v in common.items()}
    out = tried.out or default_out(data, tried.resume, FOLDERS)
    reading = reading_of(columns, group, multi_label)

    from crosspatch.cli.screen import Screen, print_json

    with Screen(stderr=output.json) as screen:
        from crosspatch.training.compare import Asked, compare
        from crosspatch.training.comparison import PLAN

        asked = Asked(tried.tried, tried.seeds, length.time, length.epochs, common, reading)
        again = words.command("crosspatch", "compare", data, "--out", out, "--resume")
        with resumable(again, out, PLAN):
            found = compare(data, out, asked, Whole(screen), tried.resume)
        _print(screen, found)

        from crosspatch.report.comparison import write_comparison

        pages.told(screen, out, lambda: write_comparison(found), again)
    if output.json:
        print_json({"out": str(out), "plan": found.plan.to_dict(), **found.results()})
    return 0


def _check(tried: Tried, length: Length, common: dict[str, Any]) -> None:
    if length.time and length.epochs:
        raise UsageError(
            "both --time and --epochs", "one of them", "leave one away: either sets the length"
        )
    if common.pop("devices", 1) > 1:
        raise UsageError(
            "--devices with compare", "one process: its runs follow each other", "leave it away"
        )
    if not tried.tried and not tried.resume:
        raise UsageError(
            "--try is missing",
            "what is to be compared, with commas between",
            "--try base,mixup,tome:r=8",
        )


class Whole:
    """Shows all runs as one piece of work: a bar with what is left, and a line for each run."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.run = ("", 0, 0, 0)
        self.expected = self.began = 0.0
        self.pace = [0.0, 0.0]  # seconds that the ended runs were to take, and took

    def message(self, text: str) -> None:
        """Most of what single runs say is left out; failures are told."""
        if "failed" in text:
            self.screen.line(text, "yellow")

    def progress(self, what: str, done: int, total: int) -> None:
        """Pictures read, candidates tried out."""
        self.screen.progress(what, done, total)

    def begins(self, name: str, seed: int, number: int, total: int, seconds: float) -> None:
        """The next run; the first one says what is to come."""
        if not self.began:
            left = (total - number + 1) * seconds
            runs = words.plural(total - number + 1, "run")
            self.screen.line(f"{runs} to do, roughly {words.duration(left)}", "bold")
        self.run, self.expected, self.began = (name, seed, number, total), seconds, time.monotonic()

    def plan(self, info: dict[str, Any]) -> None:
        """The plan of one run says nothing new."""

    def step(self, done: int, total: int, loss: float, images_per_second: float) -> None:
        """Move the bar of the whole."""
        name, seed, number, runs = self.run
        left = self._left(done / total)
        note = f"run {number} of {runs}: {name}, seed {seed}  {words.duration(left)} left"
        self.screen._bar("comparing", 1000 * (number - 1) + 1000 * done // total, 1000 * runs, note)

    def _left(self, share: float) -> float:
        """Seconds to the end: this run at its own pace, the others at that of all so far."""
        took = time.monotonic() - self.began
        here = took / max(share, 1e-6) * (1 - share)
        planned, spent = self.pace[0] + share * self.expected, self.pace[1] + took
        slower = spent / planned if planned > 0 else 1.0
        return here + (self.run[3] - self.run[2]) * self.expected * slower

    def epoch(self, row: dict[str, Any]) -> None:
        """A validation of one run is not told."""

    def done(self, summary: dict[str, Any]) -> None:
        """One line for a run that has ended."""
        name, seed, number, runs = self.run
        took = time.monotonic() - self.began
        self.pace = [self.pace[0] + self.expected, self.pace[1] + took]
        val = summary.get("val") or {}
        figure = words.percent(val.get("accuracy", val.get("map")))
        self.screen.line(
            f"{number:>4}/{runs}  {_cut(name):{NAME}}  seed {seed:<3}  val {figure:>7}"
            f"  {words.duration(took):>7}"
        )


def _cut(name: str, most: int = NAME) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _print(screen: Screen, found: Compared) -> None:

    screen._hide_bars()
    plan, split = found.plan, found.pictures
    screen.line()
    budget = f"{plan.epochs} epochs" if plan.epochs else words.duration(plan.each or 0)
    screen.line(
        f"{words.plural(len(found.rows), 'candidate')} on {plan.data}, "
        f"{words.plural(len(found.seeds), 'seed')}, {budget} a run, "
        f"{words.plural(split['test'], 'test picture')}",
        "bold",
    )
    _table(screen, found)
    screen.line()
    for row in found.rows[1:]:
        _wrapped(screen, f"{row.name}: {row.verdict}", _colour(row))
    for text in found.remarks:
        _wrapped(screen, text, "yellow")
    screen.line()
    for name in ("compare.png", "compare.md", "results.csv", "compare.json"):
        if (found.out / name).is_file():
            screen.line(f"written to {found.out / name}")


def _colour(row: Row) -> str:
    start = row.verdict.split(" ", 1)[0]
    return {"better": "green", "worse": "red"}.get(start, "")


def _table(screen: Screen, found: Compared) -> None:
    """Two short tables: how good, and at what cost."""
    figure = "all right" if found.several else "accuracy"
    against = f"against {_cut(found.baseline.name, 10)}"
    head = f"{'':{NAME}}  {figure + ' %':>10}   95 % range  {against:>18}   95 % range"
    screen.line(head, "cyan")
    for row in found.rows:
        screen.line(f"{_cut(row.name):{NAME}}  {_share(row.accuracy)}  {_gap(row.difference)}")
    if found.baseline.balanced is not None:
        for name, key in (("balanced", "balanced"), ("rarest classes", "tail")):
            screen.line(f"{f'({name})':{NAME}}", "cyan")
            for row in found.rows:
                gap = _gap(getattr(row, f"{key}_difference"))
                screen.line(f"{_cut(row.name):{NAME}}  {_share(getattr(row, key))}  {gap}")
    screen.line()
    screen.line(
        f"{'':{NAME}}  calibration  time a run  epochs  images/s  parameters   MACs", "cyan"
    )
    for row in found.rows:
        screen.line(f"{_cut(row.name):{NAME}}  {_cost(row.cost)}")


def _share(found: Any) -> str:
    if found is None:
        return f"{'–':>10}  {'':>11}"
    span = words.interval(max(0.0, found.low), min(1.0, found.high))
    return f"{100 * found.mean:>10.1f}  {span:>11}"


def _gap(found: Any) -> str:
    if found is None:
        return f"{'–':>18}"
    span = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
    return f"{100 * found.mean:>+18.1f}  {span:>13}"


def _cost(cost: dict[str, float]) -> str:
    def shown(key: str, how: Any) -> str:
        return how(cost[key]) if key in cost else "–"

    return (
        f"{shown('ece', words.percent):>11}  {shown('seconds', words.duration):>10}"
        f"  {shown('epochs', lambda v: f'{v:.1f}'):>6}"
        f"  {shown('images_per_second', lambda v: f'{v:,.0f}'):>8}"
        f"  {shown('parameters', words.count):>10}  {shown('macs', words.count):>6}"
    )


def _wrapped(screen: Screen, text: str, style: str = "") -> None:
    for line in textwrap.wrap(text, 80, subsequent_indent="  ", break_on_hyphens=False):
        screen.line(line, style)
