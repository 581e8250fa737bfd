# SPDX-License-Identifier: Apache-2.0
"""Numbers as a person reads them: shares, times, sizes, counts."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path


def percent(share: float | None) -> str:
    """0.913 -> `91.3 %`; None -> `–`."""
    return "–" if share is None else f"{100 * share:.1f} %"


def interval(low: float, high: float) -> str:
    """(0.887, 0.935) -> `88.7–93.5`, in percent."""
    return f"{100 * low:.1f}–{100 * high:.1f}"


def number(value: float | None, digits: int = 3) -> str:
    """A plain decimal number; None -> `–`."""
    return "–" if value is None else f"{value:.{digits}f}"


def count(value: float) -> str:
    """1797 -> `1,797`; 1020000 -> `1.02 M`; 2.3e9 -> `2.30 G`."""
    for bound, unit in ((1e9, " G"), (1e6, " M")):
        if round(value) >= bound:
            return f"{value / bound:.{0 if value >= 100 * bound else 2}f}{unit}"
    return f"{value:,.0f}"


def plural(value: int, one: str, many: str = "") -> str:
    """(1, "picture") -> `1 picture`; (2, "class", "classes") -> `2 classes`."""
    return f"{value:,} {one if value == 1 else many or one + 's'}"


def size(bytes_: int) -> str:
    """Bytes as `512 B`, `8.4 kB`, `4.1 MB`."""
    for bound, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if bytes_ >= bound:
            return f"{bytes_ / bound:.1f} {unit}"
    return f"{bytes_} B"


def duration(seconds: float) -> str:
    """`0 s`, `0.4 s`, `12 s`, `3m20s`, `2h05m`."""
    if seconds < 0.05:
        return "0 s"
    if seconds < 0.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def command(*words: str | Path) -> str:
    """Words as a line that a shell reads back as these words."""
    return shlex.join(str(word) for word in words)


def listing(names: Iterable[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
