"""The page of a comparison: every candidate, its verdict, its figures; names are text."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosspatch.report.comparison import comparison_page, write_comparison
from crosspatch.training.compared import Compared, Row
from support.made_up import compared


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
