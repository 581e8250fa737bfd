# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from crosspatch import cache


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSPATCH_CACHE", str(tmp_path / "deep" / "cache"))
    return tmp_path / "deep" / "cache"


def test_an_answer_is_made_once(place) -> None:
    made = []
    for _ in range(3):
        assert cache.remembered("a.json", "k", lambda: made.append(1) or {"x": 1.5}) == {"x": 1.5}
    assert cache.remembered("a.json", "other", lambda: 2) == 2
    assert cache.remembered("b.json", "k", lambda: 3) == 3
    assert made == [1]
    assert sorted(p.name for p in place.iterdir()) == ["a.json", "b.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\x00\xff"])
def test_a_damaged_file_costs_a_measurement(place, text) -> None:
    place.mkdir(parents=True)
    (place / "a.json").write_text(text)
    assert cache.remembered("a.json", "k", lambda: 7) == 7
    assert json.loads((place / "a.json").read_text()) == {"k": 7}


def test_a_place_that_cannot_be_written_costs_a_measurement(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CROSSPATCH_CACHE", str(tmp_path / "file" / "below"))
    assert [cache.remembered("a.json", "k", lambda: 7) for _ in range(2)] == [7, 7]


def test_old_answers_make_room(place, monkeypatch) -> None:
    monkeypatch.setattr(cache, "MOST", 3)
    for number in range(5):
        cache.remembered("a.json", str(number), lambda n=number: n)
    assert json.loads((place / "a.json").read_text()) == {"2": 2, "3": 3, "4": 4}


def test_the_usual_places(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("CROSSPATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "crosspatch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "crosspatch"


def test_an_answer_of_another_kind_is_made_anew(place) -> None:
    number = lambda answer: isinstance(answer, float)
    assert cache.remembered("a.json", "k", lambda: "fast") == "fast"
    assert cache.remembered("a.json", "k", lambda: 2.5, number) == 2.5
    assert cache.remembered("a.json", "k", lambda: 3.5, number) == 2.5
