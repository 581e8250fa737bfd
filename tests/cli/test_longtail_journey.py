"""`crosspatch data longtail`: a folder with a tail, or a refusal, and nothing between."""

from __future__ import annotations

import pytest

from crosspatch.data.longtail import Tail, tail_counts
from crosspatch.data.opening import open_source
from crosspatch.data.split import make_split


def test_digits_get_a_tail_that_can_be_trained_on(crosspatch, tmp_path) -> None:
    out = tmp_path / "few"
    answer = crosspatch("data", "longtail", "digits", "--ratio", 30, "--out", out, "--json")
    assert answer.code == 0
    assert answer.json["ratio"] == 30
    there = {entry.name: len([*entry.iterdir()]) for entry in sorted((out / "train").iterdir())}
    assert there == answer.json["training"]
    assert sorted(entry.name for entry in out.iterdir()) == ["test", "train", "val"]
    source = open_source("digits")
    most = source.counts(make_split(source).train).max()
    assert list(there.values())[1:] == tail_counts(int(most), 10, Tail(30))[1:]
    again = crosspatch("data", "longtail", "digits", "--out", out)
    assert again.code == 2
    assert "exists" in again.err
    assert {entry.name for entry in tmp_path.iterdir()} == {"few"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ratio", "0.5"), "a ratio of 1 or more"),
        (("--ratio", "0"), "above zero"),
        (("--ratio", "4000"), "without a training picture"),
        (("--kind", "steep"), "exp"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    crosspatch, tmp_path, words, said
) -> None:
    answer = crosspatch("data", "longtail", "digits", "--out", tmp_path / "x", *words)
    assert answer.code in (2, 3)
    assert said in answer.err
    assert not list(tmp_path.iterdir())


def test_the_screen_says_what_was_written(crosspatch, tmp_path) -> None:
    answer = crosspatch(
        "data", "longtail", "digits", "--kind", "step", "--ratio", 9, "--out", tmp_path / "x"
    )
    assert answer.code == 0
    assert "training pictures" in answer.out
    assert "crosspatch train" in answer.out
