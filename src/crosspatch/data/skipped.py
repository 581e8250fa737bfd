# SPDX-License-Identifier: Apache-2.0
"""What was left out, and why: the rows of skipped.csv."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Skipped:
    """One file that takes no part: its path below the data's root and the reason in a few words."""

    path: str
    reason: str


def write_skipped(path: str | Path, skipped: Iterable[Skipped]) -> None:
    """Write skipped.csv (path, reason). Raises OSError where the file cannot be written."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        skipped = list(skipped)
        rows = csv.writer(file, lineterminator="\n", quoting=quoting(one.path for one in skipped))
        rows.writerow(["path", "reason"])
        rows.writerows([one.path, one.reason] for one in skipped)


def quoting(names: Iterable[str]) -> Literal[0, 2]:
    """How a table with these names is to be quoted: of itself csv leaves a carriage return bare,
    which is read back as the end of the row."""
    return csv.QUOTE_NONNUMERIC if any("\r" in name for name in names) else csv.QUOTE_MINIMAL
