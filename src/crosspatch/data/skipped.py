# SPDX-License-Identifier: Apache-2.0
"""What was left out, and why: the rows of skipped.csv."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Skipped:
    """One file that takes no part: its path below the data's root and the reason in a few words."""

    path: str
    reason: str


def write_skipped(path: str | Path, skipped: Iterable[Skipped]) -> None:
    """Write skipped.csv (path, reason). Raises OSError where the file cannot be written."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "reason"])
        rows.writerows([one.path, one.reason] for one in skipped)
