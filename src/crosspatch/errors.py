# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet has three parts and an exit code.

`got` says what we found, `expected` what we need, `do` what to type. Nothing here imports anything,
so every room of the house may raise these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CrosspatchError(Exception):
    """An error with three parts: what we got, what we expect, what to type."""

    exit_code = 5

    def __init__(self, got: str, expected: str, do: str) -> None:
        super().__init__(f"{got}. {expected}. {do}.")
        self.got, self.expected, self.do = got, expected, do

    def __reduce__(self) -> tuple:
        return type(self), (self.got, self.expected, self.do)


class UsageError(CrosspatchError, ValueError):
    """The command or an argument is wrong (exit code 2)."""

    exit_code = 2


class DataError(CrosspatchError, ValueError):
    """The data cannot be used as it is (exit code 3)."""

    exit_code = 3


class Interrupted(CrosspatchError):
    """Stopped by the user; the run can be continued (exit code 4)."""

    exit_code = 4


def option(name: str, value: object) -> str:
    """A setting as it is typed: `--batch 8`, and `--multi-label` for one that is set."""
    flag = f"--{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"


def visible(value: object) -> str:
    """As one printable line: control characters, marks of direction and undecodable bytes of names
    are escaped."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def reason(error: Exception) -> str:
    """Why something failed, in a line: what we got, or the error of another package by its name."""
    return error.got if isinstance(error, CrosspatchError) else f"{type(error).__name__}: {error}"


def near(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names most like `name` (upper and lower case are alike), as text for an error, or
    an empty string."""
    folded: dict[str, list[str]] = {}
    for one in known:
        folded.setdefault(one.casefold(), []).append(one)
    hits = difflib.get_close_matches(name.casefold(), folded, n=count, cutoff=0.4)
    return ", ".join([one for hit in hits for one in folded[hit]][:count])
