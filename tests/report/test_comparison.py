"""The page of a comparison: every candidate, its verdict, its figures; names are text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from crosspatch.metrics.paired import crossed
from crosspatch.report.comparison import comparison_page, write_comparison
from crosspatch.training.candidates import Candidate
from crosspatch.training.compared import Compared, Row, Run
from crosspatch.training.comparison import Plan

NAMES = ("base", "<script>alert(1)</script>", "worse")


def compared(out: Path, count: int = 3) -> Compared:
    rng, rows = np.random.default_rng(0), []
    candidates = tuple(
        Candidate(name, name, f"c{place}", {}) for place, name in enumerate(NAMES[:count])
    )
    for place, candidate in enumerate(candidates):
        report = {"history": [{"step": s, "elapsed": 1.0 * s, "val_accuracy": 0.1 * s}
                              for s in (1, 2, 3)]}  # fmt: skip
        runs = tuple(
            Run(seed, out, (), (), rng.random(50) < 0.5 + 0.1 * place, report) for seed in (0, 1)
        )
        table = np.array([run.correct for run in runs], float)
        gap = None if place == 0 else crossed(table - 0.5)
        cost = {"seconds": 3.0, "ece": 0.1, "epochs": 2.0, "parameters": 1e6}
        verdict = ("the first", "better by 9.0 points", "worse by 2.0 points")[place]
        rows.append(Row(candidate, runs, crossed(table), gap, p=None if gap is None else 0.01,
                        verdict=verdict, cost=cost))  # fmt: skip
    plan = Plan("<b>data", {}, candidates, {}, (0, 1), 0, 2, None, None, command="crosspatch x")
    split = {"train": 100, "val": 20, "test": 50}
    return Compared(plan, out, tuple(rows), (0, 1), split, False, 1.0, {}, {}, (), {})


@pytest.mark.parametrize("count", [2, 3])
def test_every_candidate_is_told_and_names_are_text(tmp_path: Path, count: int) -> None:
    html = write_comparison(compared(tmp_path, count)).read_text()
    assert "<script" not in html
    assert "<b>data" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert 'class="finding good"' in html
    assert ('class="finding bad"' in html) == (count == 3)
    assert "better by 9.0 points" in html
    assert html.count("<svg") == 2
    assert "judged on the same 50" in html


def test_a_candidate_that_failed_is_still_a_row(tmp_path: Path) -> None:
    found = compared(tmp_path)
    failed = Row(found.rows[2].candidate, (), verdict="could not be compared")
    html = comparison_page(Compared(**{**found.__dict__, "rows": (*found.rows[:2], failed)}))
    assert "could not be compared" in html
