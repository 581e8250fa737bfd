"""Every paper of the catalog: it can be read, its files exist, outcomes are added to it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import crosspatch
from crosspatch import catalog
from crosspatch.catalog import Measured, load, record, slugs
from crosspatch.errors import DataError, UsageError

ROOMS = Path(crosspatch.__file__).parent
OUTCOME = Measured("a claim", "+1.2 points", (0.4, 2.0), "a CPU", "python x", "2026-01-01", "yes")


@pytest.mark.parametrize("slug", slugs())
def test_an_entry_says_what_a_reader_needs(slug):
    entry = load(slug)
    assert entry.title
    assert re.fullmatch(r"\d{4}\.\d{4,5}", entry.arxiv)
    assert entry.kinds
    assert entry.claims
    assert all(text.endswith(".") for text in (*entry.claims, *entry.departures))
    for one in entry.measured:
        assert one.command
        assert one.verdict
        assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", one.date)


@pytest.mark.parametrize("slug", slugs())
def test_the_modules_of_an_entry_exist(slug):
    missing = [name for name in load(slug).modules if not (ROOMS / name).is_file()]
    assert missing == []


def test_an_outcome_is_added_and_replaced(tmp_path):
    shutil.copy(catalog.HERE / "resizemix.toml", tmp_path)
    before = load("resizemix", tmp_path)
    record("resizemix", [OUTCOME], tmp_path)
    worse = Measured(**{**OUTCOME.__dict__, "verdict": "no"})
    record("resizemix", [worse, Measured(**{**OUTCOME.__dict__, "claim": "b"})], tmp_path)
    after = load("resizemix", tmp_path)
    assert [one.verdict for one in after.measured if one.claim == "a claim"] == ["no"]
    assert [one.claim for one in after.measured if one.claim == "b"] == ["b"]
    assert after.claims == before.claims
    assert list(tmp_path.iterdir()) == [tmp_path / "resizemix.toml"]


def test_unknown_and_damaged_entries(tmp_path):
    with pytest.raises(UsageError, match="near it: resizemix"):
        load("resizemx")
    (tmp_path / "a.toml").write_text("title = ")
    with pytest.raises(DataError, match=r"a\.toml cannot be read"):
        load("a", tmp_path)
    text = (catalog.HERE / "resizemix.toml").read_text()
    (tmp_path / "b.toml").write_text(text.replace('"built"', '"done"'))
    with pytest.raises(DataError, match="status 'done'"):
        load("b", tmp_path)
