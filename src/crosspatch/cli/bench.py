# SPDX-License-Identifier: Apache-2.0
"""`crosspatch bench [MODEL|RUN|BUNDLE]…`: how fast every engine runs a model on this machine."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter, Token

from crosspatch.cli.options import Output, seconds, side
from crosspatch.errors import UsageError

if TYPE_CHECKING:
    from crosspatch.deploy.bench import Benched, Row

_WHAT = Group("What is measured", sort_key=10)
_HEAD = "engine       in    threads  batch       ms        5–95 %  images/s  peak  torch"


def _counts(hint: Any, tokens: Sequence[Token]) -> tuple[int, ...]:
    """`1,8` as numbers of one or more; raises UsageError for anything else."""
    name, text = tokens[0].keyword or "the value", tokens[0].value
    if not re.fullmatch(r"0*[1-9]\d{0,5}(,0*[1-9]\d{0,5})*", text):
        raise UsageError(
            f"{name} {text}", "whole numbers of 1 or more, with commas between", f"{name} 1,4"
        )
    return tuple(dict.fromkeys(int(number) for number in text.split(",")))


def _names(hint: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    """`torch,openvino` as names."""
    return tuple(name for name in tokens[0].value.strip().lower().split(",") if name)


@Parameter(name="*", group=_WHAT)
@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured, and for how long."""

    batch: Annotated[
        tuple[int, ...], Parameter(converter=_counts, n_tokens=1, metavar="N,N", show_default="1,8")
    ] = (1, 8)
    """Pictures per call."""

    threads: Annotated[
        tuple[int, ...],
        Parameter(converter=_counts, n_tokens=1, metavar="N,N", show_default="1 and all cores"),
    ] = ()
    """Threads that compute."""

    engine: Annotated[
        tuple[str, ...],
        Parameter(converter=_names, n_tokens=1, metavar="NAME,NAME", show_default="all"),
    ] = ()
    """Out of torch, onnxruntime, openvino."""

    size: Annotated[
        int | tuple[int, int] | None, Parameter(converter=side, n_tokens=1, metavar="N|HxW")
    ] = None
    """Side of the pictures in pixels, for models by name."""

    time: Annotated[float, Parameter(converter=seconds, metavar="1m", show_default="90s")] = 90.0
    """At most about this long; what has not begun by then is left out."""


def bench(
    *models: Annotated[
        str,
        Parameter(
            name="MODEL", help="Names of models, folders of runs, bundles [crossvit_tiny_224]."
        ),
    ],
    grid: Grid | None = None,
    out: Annotated[Path | None, Parameter(metavar="DIR")] = None,
    csv: Annotated[Path | None, Parameter(metavar="FILE")] = None,
    output: Output | None = None,
) -> int:
    """Measure how fast every engine runs a model on this machine.

    Parameters
    ----------
    out
        Write a table and a figure into this folder.
    csv
        Write the figures to this table.
    """
    grid, output = grid or Grid(), output or Output()
    from crosspatch.cli.predict import check_target, write_table
    from crosspatch.cli.screen import Screen, print_json

    check_target(csv)
    with Screen(stderr=output.json) as screen:
        from crosspatch.deploy import bench_report

        if out is not None:
            bench_report.check_folder(out)
        found = _run(screen, models, grid)
        written = bench_report.write(out, found) if out is not None else []
        if csv is not None:
            write_table(csv, bench_report.table(found))
            written.append(csv)
        if not output.json:
            _print(screen, found, bench_report.verdicts(found), written)
    if output.json:
        print_json(_answer(found, written))
    return 0


def _run(screen: Any, models: Sequence[str], grid: Grid) -> Benched:
    from tempfile import TemporaryDirectory

    from crosspatch.deploy.bench import bench as measure

    with TemporaryDirectory(prefix="crosspatch-bench-") as folder:
        return measure(
            models,
            Path(folder),
            screen,
            batches=grid.batch,
            threads=grid.threads,
            engines=grid.engine,
            size=grid.size,
            seconds=grid.time,
        )


def _answer(found: Benched, written: Sequence[Path]) -> dict[str, Any]:
    from crosspatch.deploy.bench_report import records, verdicts
    from crosspatch.deploy.engines import precision_of

    return {
        "models": [
            {
                "name": one.name,
                "size": list(one.size),
                "parameters": one.parameters,
                "macs": one.macs,
                "reduction": one.reduction,
                "bytes": {precision_of(bundle.info): bundle.size for bundle in one.bundles},
            }
            for one in found.subjects
        ],
        "rows": records(found),
        "peaks": [
            {"threads": threads, "precision": kind, "gflops": round(peak.rate / 1e9, 2),
             "product": peak.product.name}
            for threads, kinds in found.peaks.items()
            for kind, peak in kinds.items()
        ],
        "hardware": found.hardware,
        "remarks": found.remarks,
        "verdicts": verdicts(found),
        "seconds": round(found.seconds, 1),
        "files": [str(path) for path in written],
    }  # fmt: skip


def _print(screen: Any, found: Benched, verdicts: Sequence[str], written: Sequence[Path]) -> None:
    from crosspatch.cli import words
    from crosspatch.processor import processor

    screen.line(processor().describe(), "bold")
    versions = [f"{name} {found.hardware[name]}" for name in ("torch", "onnxruntime", "openvino")]
    screen.line(", ".join(text for text in versions if not text.endswith("None")))
    for threads, kinds in found.peaks.items():
        rates = [f"{kind} {peak.rate / 1e9:,.0f}" for kind, peak in kinds.items()]
        count = words.plural(threads, "thread")
        screen.line(f"plain products with {count}: {', '.join(rates)} Gop/s")
    for subject in found.subjects:
        rows = [row for row in found.rows if row.model == subject.name]
        if not rows:
            continue
        sides = "x".join(str(side) for side in subject.size)
        fewer = f" reduced by {subject.reduction}" if subject.reduction else ""
        screen.line()
        screen.line(
            f"{subject.name}{fewer}, {sides} pixels, {words.count(subject.parameters)} parameters, "
            f"{words.count(subject.macs)} multiply-adds",
            "bold",
        )
        _print_rows(screen, rows)
    screen.line()
    for text in verdicts:
        _wrapped(screen, text)
    for text in found.remarks:
        _wrapped(screen, text, "yellow")
    screen.line(f"measured in {words.duration(found.seconds)}")
    for path in written:
        screen.line(f"written to {path}")


def _wrapped(screen: Any, text: str, style: str = "") -> None:
    for line in textwrap.wrap(text, 80, subsequent_indent="  ", break_on_hyphens=False):
        screen.line(line, style)


def _print_rows(screen: Any, rows: Sequence[Row]) -> None:
    """One line per measurement, with a gap between the groups that were measured together."""
    screen.line(_HEAD, "cyan")
    before = None
    for row in rows:
        group = (row.setting.threads, row.batch)
        if before not in (None, group):
            screen.line()
        before = group
        screen.line(_row_text(row))


def _row_text(row: Row) -> str:
    engine, precision, threads = row.setting
    low, middle, high = (_short(1e3 * t) for t in (row.took.low, row.took.median, row.took.high))
    faster = "–" if row.faster is None else f"{row.faster:.2f}x"
    return (
        f"{engine:11}  {precision:4}  {threads:>7}  {row.batch:>5}  {middle:>7}"
        f"  {low + '–' + high:>12}  {_short(1 / row.per_picture):>8}  {100 * row.share:>3.0f}%"
        f"  {faster:>5}"
    )


def _short(value: float) -> str:
    """Three digits where they say something: 0.12, 1.23, 12.3, 123, 1,234."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"
