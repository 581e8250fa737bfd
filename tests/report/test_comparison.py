"""The page of a comparison: every candidate, its verdict, its figures; names are text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from crosspatch.report.comparison import _answer, comparison_page, write_comparison
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
    assert "Better by 9.0 points." in html
    assert "Better than base: &lt;script&gt;alert(1)" in html
    assert html.count("<svg") == 2
    assert "judged on the same 50" in html


def test_the_first_sentence_is_the_answer(tmp_path: Path) -> None:
    found = compared(tmp_path)
    verdicts = ("the first", "no difference", "worse")
    rows = [replace(row, verdict=one) for row, one in zip(found.rows, verdicts, strict=True)]
    said = {
        count: _answer(Compared(**{**found.__dict__, "rows": kept}))
        for count, kept in (("both", rows), ("worse", rows[::2]))
    }
    assert said == {
        "both": "Nothing was shown to be better than base.",
        "worse": "Keep base: it is better.",
    }


def test_a_candidate_that_failed_is_still_a_row(tmp_path: Path) -> None:
    found = compared(tmp_path)
    failed = Row(found.rows[2].candidate, (), verdict="could not be compared")
    html = comparison_page(Compared(**{**found.__dict__, "rows": (*found.rows[:2], failed)}))
    assert "Could not be compared." in html
