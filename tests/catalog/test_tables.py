"""The lists in README.md and docs/ say what the catalog says; an outcome is one word."""

from __future__ import annotations

from pathlib import Path

import pytest

from crosspatch.catalog import load, slugs, tables
from crosspatch.errors import DataError

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_lists_of_a_page_are_those_of_the_catalog(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.BLOCK.search(text)
    assert tables.renewed(text) == text, "python -m crosspatch.catalog.tables writes it"


def test_a_list_that_drifted_is_written_anew(tmp_path):
    for page in tables.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    assert tables.write(tmp_path) == []
    readme = tmp_path / "README.md"
    readme.write_text(readme.read_text().replace("| `tome` |", "| `tomb` |"))
    assert tables.write(tmp_path) == [readme]
    assert tables.write(tmp_path) == []


def test_every_paper_is_in_both_lists():
    for text in (tables.block("overview"), tables.block("by-kind")):
        assert [slug for slug in slugs() if f"`{slug}`" not in text] == []


def test_a_list_that_there_is_not_is_refused():
    with pytest.raises(DataError, match="asks for the list 'none'"):
        tables.renewed("<!-- papers:begin none -->\nx\n<!-- papers:end -->")


@pytest.mark.parametrize(
    ("verdict", "word"),
    [
        ("reproduced at this size (3 seeds)", "reproduced"),
        ("Not shown at this size, neither way", "not shown"),
        ("no difference shown (1 seed)", "not shown"),
        ("not reproduced: the contrary was measured", "contrary"),
        ("worse in so short a training", "other"),
    ],
)
def test_a_verdict_is_one_word(verdict, word):
    assert tables.outcome(verdict) == word


def test_measurements_are_counted():
    assert tables.measured_in_short(load("crossvit")) == "1 reproduced, 1 not reproduced"


def test_a_cell_stays_in_its_cell():
    assert tables.cell("a|b\n c") == "a\\|b c"
