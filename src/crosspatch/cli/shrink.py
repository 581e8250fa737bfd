# SPDX-License-Identifier: Apache-2.0
"""`crosspatch shrink RUN`: the smallest, fastest form of a run that a budget allows, measured."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token

from crosspatch.cli.options import Output, at_least, seconds
from crosspatch.errors import UsageError

if TYPE_CHECKING:
    from crosspatch.deploy.shrink.result import Measured, Shrunk

_BYTES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def milliseconds(hint: Any, tokens: Sequence[Token]) -> float:
    """`20ms`, `0.5ms` or `1s` in seconds; raises UsageError for anything else."""
    text = tokens[0].value.strip().lower()
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(ms|s)", text)
    if match is None or not float(match[1]) > 0:
        raise UsageError(
            f"--latency {text!r}", "a time with its unit: 20ms, 1.5s", "--latency 20ms"
        )
    return float(match[1]) * (1e-3 if match[2] == "ms" else 1.0)


def bytes_(hint: Any, tokens: Sequence[Token]) -> int:
    """`5MB`, `800kB` in bytes; raises UsageError for anything else."""
    text = tokens[0].value.strip().lower().replace(" ", "")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?b)", text)
    if match is None or float(match[1]) * _BYTES[match[2]] < 1:
        raise UsageError(f"--size {text!r}", "a size with its unit: 5MB, 800kB", "--size 5MB")
    return int(float(match[1]) * _BYTES[match[2]])


def lasting(hint: Any, tokens: Sequence[Token]) -> float:
    """`10m` in seconds; raises UsageError that names --finetune."""
    try:
        return seconds(hint, tokens)
    except UsageError as error:
        swap = lambda text: text.replace("--time", "--finetune")
        raise UsageError(swap(error.got), error.expected, swap(error.do)) from error


def points(hint: Any, tokens: Sequence[Token]) -> float:
    """Percentage points from 0 to 100; raises UsageError for anything else."""
    text = tokens[0].value.strip()
    if not re.fullmatch(r"\d+(\.\d+)?", text) or float(text) > 100:
        raise UsageError(
            f"--max-drop {text}", "points of accuracy, from 0 to 100", "--max-drop 0.5"
        )
    return float(text)


def shrink(
    run: Annotated[Path, Parameter(help="The folder of a trained run.")],
    /,
    *,
    max_drop: Annotated[float, Parameter(converter=points, n_tokens=1, metavar="POINTS")] = 0.5,
    latency: Annotated[
        float | None, Parameter(converter=milliseconds, n_tokens=1, metavar="20ms")
    ] = None,
    size: Annotated[int | None, Parameter(converter=bytes_, n_tokens=1, metavar="5MB")] = None,
    threads: Annotated[int | None, at_least(1, "--threads 1")] = None,
    time: Annotated[
        float | None, Parameter(converter=seconds, metavar="5m", show_default="by the network")
    ] = None,
    finetune: Annotated[
        float | None, Parameter(converter=lasting, n_tokens=1, metavar="10m")
    ] = None,
    data: Annotated[str | None, Parameter(metavar="DATA")] = None,
    out: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    resume: bool = False,
    output: Output | None = None,
) -> int:
    """Find the smallest and fastest form of a run that a budget allows, on this machine.

    Engines, precisions and reductions of tokens are built, judged on the run's validation pictures
    and timed. The best inside the budget becomes a bundle; exits with 1 when nothing is inside.

    Parameters
    ----------
    max_drop
        Points of accuracy that may be lost on the validation pictures.
    latency
        At most so long for one picture.
    size
        At most so large a file.
    threads
        Threads that the latency is about (left alone: what is fastest here, for each).
    time
        At most about this long.
    finetune
        Let networks with fewer tokens that lose too much learn on, for so long beside the search.
    data
        Where the run's pictures are now, when they have moved.
    out
        The bundle (left alone: bundle-small.onnx in the run folder).
    resume
        Go on with a search that was stopped, or use its figures for another budget.
    """
    output = output or Output()
    from crosspatch.cli.screen import Screen, print_json
    from crosspatch.deploy import shrink as room

    with Screen(stderr=output.json) as screen:
        found = room.shrink(
            run,
            max_drop=max_drop,
            latency=latency,
            size=size,
            threads=threads,
            data=data,
            out=out,
            seconds=time,
            finetuning=finetune,
            reporter=screen,
            resume=resume,
            report=screen,
        )
        if not output.json:
            _print(screen, found)
        page = _page(screen, found)
    if output.json:
        print_json(found.to_json() | {"page": page})
    return 0 if found.chosen else 1


def _page(screen: Any, found: Shrunk) -> str | None:
    """The path of shrunk.html, written now; None where it cannot be."""
    from crosspatch.cli import pages, words

    def write() -> Path:
        from crosspatch.report.shrunk import write_shrunk

        return write_shrunk(found.run, found)

    again = words.command("crosspatch", "shrink", found.run, "--resume")
    return pages.told(screen, Path(found.run), write, again)


def _print(screen: Any, found: Shrunk) -> None:
    from crosspatch.cli import words
    from crosspatch.deploy.shrink.choose import complete

    counts = sorted({n for one in found.rows for n in one.latency})
    screen.line()
    name = ""
    _head(screen, counts)
    for one in [one for one in found.rows if complete(one)]:
        if one.name != name:
            name = one.name
            screen.line(f"{name}, {words.count(one.macs)} multiply-adds", "bold")
        screen.line(_row(one, counts), "green" if one.chosen else "")
    screen.line("  * no other is at least as accurate, fast and small; speed: beside the run as")
    screen.line("  it is, in the same engine's float; drop: points lost, and their 95 % range")
    given = [one for one in found.rows if one.dropped]
    if given:
        screen.line()
        screen.line(f"{words.plural(len(given), 'candidate')} given up", "cyan")
        for one in given:
            label = " ".join(filter(None, (one.name, one.engine, one.precision)))
            _wrapped(screen, f"{label}: {one.dropped}")
    screen.line()
    for text in found.words:
        _wrapped(screen, text)
    screen.line()
    if found.bundle:
        screen.line(f"{found.bundle} was written in {words.duration(found.seconds)}", "bold")
        screen.line("next, type", "green")
        for command in _next(found):
            screen.line(f"  {command}")
    else:
        screen.line(
            "try       a larger budget with --resume, which measures nothing twice", "green"
        )


def _next(found: Shrunk) -> list[str]:
    from crosspatch.cli import words

    one = found.winner
    assert one is not None
    engine = "openvino-bf16" if one.precision == "bf16" else one.engine
    return [
        words.command("crosspatch", "verify", found.bundle) + " PICTURES…",
        words.command("crosspatch", "predict", found.bundle, "--engine", engine) + " PICTURES…",
    ]


def _head(screen: Any, counts: Sequence[int]) -> None:
    times = "".join(f"{f'{n} thr':>8}" for n in counts)
    screen.line(f"  {'milliseconds with':24}{times}{'speed':>7}{'MB':>6}{'right':>6} drop", "cyan")


def _row(one: Measured, counts: Sequence[int]) -> str:
    times = "".join(f"{_milliseconds(one.latency[n].median):>8}" for n in counts)
    _, took = one.best()
    drop = f"{one.points:4.1f} ({100 * one.low:.1f}–{100 * one.high:.1f})"
    star = " *" if one.on_front else ""
    return (
        f"  {f'{one.engine} {one.precision}':24}{times}{took.original.median:6.2f}x"
        f"{_short((one.size or 0) / 1e6):>6}{100 * one.accuracy:>6.1f} {drop}{star}"
    )


def _milliseconds(seconds: float) -> str:
    return _short(1e3 * seconds)


def _short(value: float) -> str:
    """Three digits where they say something: 0.12, 1.23, 12.3, 123."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _wrapped(screen: Any, text: str) -> None:
    for line in textwrap.wrap(text, 80, subsequent_indent="  ", break_on_hyphens=False):
        screen.line(line)
