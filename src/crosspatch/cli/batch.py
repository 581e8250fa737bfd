# SPDX-License-Identifier: Apache-2.0
"""`crosspatch predict … --csv` of very many pictures: in parts, to go on after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosspatch.cli import words
from crosspatch.cli.options import TOKENS, Output, nothing_readable

if TYPE_CHECKING:
    from crosspatch.cli.screen import Screen
    from crosspatch.deploy.batch import Told

MANY = 1000
"""From so many pictures on they are answered in parts: an answer to each on the screen is no longer
read. Starting the processes pays off from there on, too: 2,000 pictures of 32 pixels took 1.0 s
instead of 1.5, and of 500x375 as long (digits, four cores; benchmarks/batch.py)."""


def wanted(csv: Path | None, pictures: int) -> bool:
    """Whether a table of so many pictures is made in parts, or was begun so."""
    if csv is None or (csv.exists() and not csv.is_file()):
        return False
    begun = csv.resolve().with_name(f"{csv.resolve().name}.parts").is_dir()
    return pictures >= MANY or (begun and pictures > 0)


def predict_table(
    run: Path,
    paths: list[str],
    missing: list[tuple[str, str]],
    csv: Path,
    output: Output,
    **how: Any,
) -> int:
    """Write the table, say what was done; how: the options of `predict_many`.

    Raises as `predict_many` does, and DataError where nothing could be read.
    """
    from crosspatch.cli.screen import Screen, print_json
    from crosspatch.deploy.batch import predict_many

    again = words.command("crosspatch", *(one for one in TOKENS.get() if one != "--overwrite"))
    began = time.perf_counter()
    with Screen(stderr=output.json) as screen:
        screen.line(f"{words.plural(len(paths), 'picture')} for {csv}, in parts")
        told = predict_many(
            run, paths, missing, csv, again=again, progress=_progress(screen), **how
        )
        _print(screen, told, csv, time.perf_counter() - began)
    if not told.answered:
        raise nothing_readable(told.first, told.unreadable)
    if output.json:
        print_json({
            "run": str(run),
            "engine": told.setting._asdict() | {"processes": told.workers},
            "reduction": told.reduction,
            "classes": told.classes,
            **({"thresholds": told.thresholds} if told.thresholds else {}),
            "csv": str(csv),
            "counts": {"answered": told.answered, "unreadable": told.unreadable,
                       "done_before": told.kept},
            "unreadable": [{"path": path, "reason": reason} for path, reason in told.first],
        })  # fmt: skip
    return 0


def _progress(screen: Screen) -> Callable[[int, int, int], None]:
    began = time.perf_counter()

    def show(done: int, total: int, kept: int) -> None:
        took, made = time.perf_counter() - began, done - kept
        note = ""
        if made and took > 0:
            left = words.duration(took / made * (total - done))
            note = f"{words.count(made / took)} pictures/s, {left} left"
        screen.progress("predicting", done, total, note)

    return show


def _print(screen: Screen, told: Told, csv: Path, seconds: float) -> None:
    if told.kept:
        screen.line(f"{words.plural(told.kept, 'picture')} had been done before")
    by = f"{told.setting.describe()}, {words.plural(told.workers, 'process', 'processes')}"
    screen.line(f"answered in {words.duration(seconds)} by {by}")
    screen.line(f"{csv}: {words.plural(told.answered, 'picture')}")
    if told.unreadable and told.answered:
        screen.line()
        screen.line(f"{words.plural(told.unreadable, 'name')} could not be read", "yellow")
        screen.unreadable(told.first)
        if told.unreadable > len(told.first):
            more = told.unreadable - len(told.first)
            screen.line(f"  and {more:,} more, at the end of {csv}", "yellow")
