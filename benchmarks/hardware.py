"""Which machine a figure was taken on, and how rows are kept."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import crosspatch as xp
from crosspatch.metrics.latency import Timing
from crosspatch.processor import processor as described

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name, its number of cores and what it can do."""
    return described().describe()


def facts(*packages: str) -> dict[str, str]:
    """The last columns of a row: machine, versions of `packages`, ours, and the day."""
    return {
        "machine": processor(),
        **{name: version(name) for name in packages},
        "crosspatch": xp.__version__,
        "date": date.today().isoformat(),
    }


def milliseconds(timing: Timing) -> dict[str, float]:
    """The columns of a timing: median, 5 % and 95 %."""
    named = {"median_ms": timing.median, "low_ms": timing.low, "high_ms": timing.high}
    return {name: round(1e3 * seconds, 2) for name, seconds in named.items()}


def append(path: Path, rows: Sequence[dict]) -> None:
    """Rows with the same keys at the end of a CSV file; its first line names the columns."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
