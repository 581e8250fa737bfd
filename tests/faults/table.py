"""Plays every case and writes the table: `make faults`.

    python -m faults.table [--out docs/reliability.md] [--times 1] [--only WORD]

times: plays of each case, where fewer than its own are wanted; only: cases whose name has the word.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CROSSPATCH_LINEAR", "off")

import crosspatch._torchvision

import numpy as np
import safetensors
import torch

import crosspatch
from crosspatch.processor import processor
from faults.cases import CASES, NOTHING, Case, Stage

HEAD = """# What happens to a training when things go wrong

Written by `make faults`, which does all of this to real trainings on this machine; a failure to
meet a row ends it. Every disturbed run is continued to its end and compared with one that nothing
disturbed: weights, their average, both moments of the optimiser, `metrics.csv` (without its
times), `predictions.csv`, `split.csv`, and the figures of the report. **Nothing** means equal, bit
for bit. Where a run goes on by `--force` with other pictures, or with another number of
processes, no undisturbed run exists: there it means that all that had been learnt was kept.

"""
TAIL = """
How it holds: `training/state.py` (one file, written aside, flushed, read back, renamed; the one
before is kept), `training/writer.py` (written beside the training), `training/stepper.py` (no
random draw depends on what came before), `training/guard.py` (losses that are not finite),
`training/resuming.py` (what differs is listed, and needs `--force`). Equal bits are promised on
one machine with one number of threads; the state notes versions and threads, and a resume says
which of them are others.
"""


def play(stage: Stage, one: Case, times: int) -> tuple[str, bool]:
    """A row of the table, and whether nothing was lost."""
    happened: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for number in range(times):
        found = one.do(stage, number)
        happened[found.happened] += 1
        lost[found.lost] += 1
        stage.clear()
    told = "; ".join(happened)
    names = [name if len(lost) == 1 else f"{name} ({count})" for name, count in lost.items()]
    return f"| {one.what} | {times} | {told} | {', '.join(names)} |", set(lost) == {NOTHING}


def facts(seconds: float) -> str:
    """Machine, versions, command, day."""
    versions = {
        "crosspatch": crosspatch.__version__, "python": platform.python_version(),
        "torch": torch.__version__, "numpy": np.__version__,
        "safetensors": safetensors.__version__,
    }  # fmt: skip
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{processor().describe()}; {platform.system()} {platform.release()}; {named}; one thread "
        f"a training; `make faults`, {date.today().isoformat()}, {seconds / 60:.0f} minutes.\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/reliability.md"))
    parser.add_argument("--times", type=int, default=1000)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    rows, good, began = [], True, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        for one in CASES:
            if asked.only in one.do.__name__:
                row, kept = play(stage, one, min(one.times, asked.times))
                good &= kept
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    table = [
        "| what was done | times | what happened | what was lost |",
        "|---|---|---|---|",
        *rows,
    ]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    text = HEAD + facts(time.monotonic() - began) + "\n" + "\n".join(table) + "\n" + TAIL
    asked.out.write_text(text, encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
