# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, and how `10m`, `24x32` and counts are read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter, Token

from crosspatch.errors import DataError, UsageError, near

TOKENS: ContextVar[tuple[str, ...]] = ContextVar("tokens", default=())
"""The words of the command that is run, after `crosspatch`."""

OUTPUT = Group("Output", sort_key=90)
TABLE = Group("Where DATA is a table", sort_key=40)

DATA = (
    "A folder with one folder per class, or with train/ val/ test/ of such, or a .zip or .tar of "
    "either, or a table (.csv, .jsonl, .parquet) of paths and labels, which may lie in an archive "
    "(photos.zip/labels.csv), or the word digits (small scans that come along). DATA@lt:100 has a "
    "long tail of training pictures."
)


@Parameter(name="*", group=OUTPUT)
@dataclass(frozen=True, kw_only=True)
class Output:
    """How a verb answers."""

    json: bool = False
    """One JSON object on stdout and nothing else there."""

    debug: bool = False
    """Show the traceback of an error."""


MULTI = (
    "A picture may have several labels: copies of a file in several class folders, or rows of one "
    "path, are one picture (labels a|b and lists in a table say so by themselves)."
)


@Parameter(name="*", group=TABLE)
@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of a table's columns, where their own do not tell."""

    path_column: Annotated[str | None, Parameter(metavar="NAME", show_default="path, file, …")] = (
        None
    )
    """The column of paths, relative to the table."""

    label_column: Annotated[
        str | None, Parameter(metavar="NAME", show_default="label, class, …")
    ] = None
    """The column of classes, one to a picture, or several as a|b or a list."""

    split_column: Annotated[str | None, Parameter(metavar="NAME", show_default="split, …")] = None
    """The column of splits (train, val, test), or the word none."""


def typed(options: Any) -> dict[str, Any]:
    """The options of a group that were given: those left alone are not the user's."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


def reading_of(columns: Columns | None, group: str | None, multi_label: bool) -> dict[str, Any]:
    """How data are read, as far as it was typed."""
    found = typed(columns or Columns()) | ({} if group is None else {"group": group})
    return found | ({"multi_label": True} if multi_label else {})


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(hint: Any, tokens: Sequence[Token]) -> float:
    """`90s`, `10m`, `1.5h` or `1h30m` in seconds; raises UsageError for anything else."""
    text = tokens[0].value.strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not parts or "".join(number + unit for number, unit in parts) != text or total <= 0:
        digits = re.fullmatch(r"\d+", text)
        do = f"--time {text}m" if digits and int(text) > 0 else "--time 10m"
        raise UsageError(f"--time {text!r}", "a time with its unit: 90s, 10m, 1.5h, 1h30m", do)
    return total


def side(hint: Any, tokens: Sequence[Token]) -> int | tuple[int, int]:
    """`32` is a square, `24x32` is height 24 and width 32 in pixels; raises UsageError."""
    text = tokens[0].value.strip().lower()
    match = re.fullmatch(r"(\d{1,5})(?:[x×](\d{1,5}))?", text)
    values = [int(value) for value in match.groups() if value] if match else []
    if not values or min(values) < 8:
        raise UsageError(
            f"--size {text!r}",
            "one number of pixels (32) or height x width (24x32), each 8 or more",
            "--size 32",
        )
    return values[0] if len(values) == 1 else (values[0], values[1])


def at_least(low: float, example: str) -> Parameter:
    """A parameter whose number must be `low` or more; its converter raises UsageError."""

    def convert(hint: Any, tokens: Sequence[Token]) -> int:
        name, text = tokens[0].keyword or "the value", tokens[0].value
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < low:
            raise UsageError(f"{name} {text}", f"a whole number of {low} or more", example)
        return int(text)

    return Parameter(converter=convert)


def positive(hint: Any, tokens: Sequence[Token]) -> float:
    """A number above zero; raises UsageError."""
    name, text = tokens[0].keyword or "the value", tokens[0].value
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"{name} {text}", "a number above zero", f"{name} 0.001")
    return value


def existing_run(path: Path) -> Path:
    """The path, when it is a folder; raises UsageError that names runs near it."""
    if path.is_dir():
        return path
    beside = {entry.name for entry in path.parent.iterdir()} if path.parent.is_dir() else set()
    hits = near(path.name, beside)
    what = "is a file" if path.exists() else "does not exist"
    hint = f"; near it are {hits}" if hits and not path.exists() else ""
    raise UsageError(
        f"{path} {what}",
        f"RUN is the folder that crosspatch train wrote{hint}",
        "name that folder first, such as runs/photos-1",
    )


def nothing_readable(unreadable: list[tuple[str, str]], count: int = 0) -> DataError:
    """The error for (name, reason) pairs when no picture is left. count: of all of them, where
    these are the first."""
    path, reason = unreadable[0]
    count = count or len(unreadable)
    more = f" (and {count - 1:,} more)" if count > 1 else ""
    return DataError(
        f"nothing could be read: {path}: {reason}{more}",
        "at least one whole picture (JPEG, PNG, WebP, BMP, GIF or TIFF)",
        "check the names, or name a folder that holds pictures",
    )
