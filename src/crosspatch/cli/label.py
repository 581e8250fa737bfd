# SPDX-License-Identifier: Apache-2.0
"""`crosspatch label DATA --teacher RUN`: a label for every patch of every picture, in one file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from crosspatch.cli.options import DATA, Columns, Output, at_least, side, typed

HARDLY = 0.5  # of the pictures named rightly: less is warned of


def label(
    data: Annotated[str, Parameter(help=DATA)],
    /,
    *,
    teacher: Annotated[str, Parameter(metavar="RUN|NAME")],
    out: Annotated[
        Path | None, Parameter(metavar="FILE", show_default="runs/DATA-labels.safetensors")
    ] = None,
    top: Annotated[
        int | None, at_least(1, "--top 5"), Parameter(metavar="K", show_default="all of 32, else 5")
    ] = None,
    size: Annotated[
        int | tuple[int, int] | None, Parameter(converter=side, n_tokens=1, metavar="N|HxW")
    ] = None,
    fit: Literal["crop", "pad", "squash"] | None = None,
    batch: Annotated[int, at_least(1, "--batch 64")] = 64,
    columns: Columns | None = None,
    output: Output | None = None,
) -> int:
    """Let a trained network label every patch of the pictures, to learn from with train --labels.

    Parameters
    ----------
    teacher
        A trained network of the same classes: a run, or a checkpoint by timm's name.
    out
        The file. A command that was stopped goes on when it is typed again.
    top
        Classes kept at each place: fewer make a smaller file and flatter labels.
    size
        Side of the pictures that the teacher sees (left alone: its own).
    fit
        How a picture becomes a square (left alone: as the teacher's); train must do the same.
    batch
        Pictures that the teacher sees at once.
    """
    output = output or Output()
    out = out or _default_out(data)

    from crosspatch.cli.screen import Screen, print_json
    from crosspatch.training.token_labels import Wish, label_pictures

    square = (size, size) if isinstance(size, int) else size
    with Screen(stderr=output.json) as screen:
        reading = typed(columns or Columns())
        wish = Wish(top, square, fit, batch)
        summary = label_pictures(data, teacher, out, wish, reading=reading, reporter=screen)
        if not output.json:
            _print(screen, summary)
    if output.json:
        print_json(summary)
    return 0


def _default_out(data: str) -> Path:
    name = re.sub(r"[^\w.-]+", "-", Path(data).name or Path(data).resolve().name).strip("-.")
    return Path("runs") / f"{name or 'pictures'}-labels.safetensors"


def _print(screen: Any, summary: dict[str, Any]) -> None:
    from crosspatch.cli import words

    rows, columns = summary["grid"]
    kept, classes = summary["top"], len(summary["classes"])
    screen.line(f"{summary['labels']}, {words.size(summary['bytes'])}", "bold")
    screen.line(
        f"  {words.plural(summary['images'], 'picture')}, {rows}x{columns} places each, "
        f"{'all' if kept == classes else kept} of {words.plural(classes, 'class', 'classes')} kept"
    )
    found = summary["agreement"]
    unseen = found["unseen"]
    fresh = "" if unseen is None else (
        f" ({words.percent(unseen)} of the {found['unseen_images']:,} it was not trained on)"
    )  # fmt: skip
    screen.line(
        f"  the picture's class is named at {words.percent(found['places'])} of the places, and "
        f"by the mean of {words.percent(found['pictures'])} of the pictures{fresh}"
    )
    if (found["pictures"] if unseen is None else unseen) < HARDLY:
        screen.line("  that is little: a student learns to be as wrong as its teacher", "yellow")
    screen.line(
        f"  labelled in {words.duration(summary['seconds'])}, "
        f"{summary['images_per_second']:,.0f} pictures a second"
    )
    if summary["skipped"]:
        left_out = words.plural(len(summary["skipped"]), "picture")
        screen.line(f"  {left_out} cannot be read: {summary['skipped'][0]}", "yellow")
    screen.line()
    screen.line("next, type", "green")
    command = words.command("crosspatch", "train", summary["data"], "--labels", summary["labels"])
    screen.line(f"  {command}")
