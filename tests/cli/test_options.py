"""How times, sizes and numbers are read and written."""

from __future__ import annotations

import shlex
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosspatch.cli import words
from crosspatch.cli.options import positive, seconds, side, typed
from crosspatch.cli.train import Budget, Choices, default_out
from crosspatch.errors import UsageError, visible


def token(text: str) -> list[Any]:
    return [SimpleNamespace(value=text, keyword="--x")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", 90), ("10m", 600), ("1.5h", 5400), ("1h30m", 5400), ("2M", 120), (" 1m5s ", 65)],
)
def test_times(text: str, expected: float) -> None:
    assert seconds(float, token(text)) == expected


@pytest.mark.parametrize("text", ["", "10", "m", "-1m", "0s", "1d", "10 m", "1m2", "1e3s", "m10"])
def test_times_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="90s, 10m"):
        seconds(float, token(text))


@pytest.mark.parametrize(
    ("text", "expected"), [("32", 32), ("24x32", (24, 32)), ("24X32", (24, 32)), ("8×9", (8, 9))]
)
def test_sizes(text: str, expected: object) -> None:
    assert side(int, token(text)) == expected


@pytest.mark.parametrize("text", ["", "7", "32x7", "x32", "32x", "1x2x3", "-32", "32.5", "1e2"])
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="height x width"):
        side(int, token(text))


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "x", ""])
def test_rates_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="above zero"):
        positive(float, token(text))


@given(st.floats(0, 1e6))
def test_durations_and_counts_are_short(value: float) -> None:
    assert 2 < len(words.duration(value)) <= 7
    assert len(words.count(value)) <= 7


@given(st.text(), st.text())
def test_a_command_is_read_back_as_its_words(first: str, second: str) -> None:
    assert shlex.split(words.command(first, second)) == [first, second]


@given(st.text())
def test_names_show_no_control_characters(name: str) -> None:
    assert visible(name).isprintable()


def test_words() -> None:
    assert words.percent(0.9134) == "91.3 %"
    assert words.percent(None) == "–"
    assert words.interval(0.887, 1) == "88.7–100.0"
    assert [words.size(n) for n in (512, 8400, 4.1e6, 2e9)] == [
        "512 B", "8.4 kB", "4.1 MB", "2.0 GB",
    ]  # fmt: skip
    assert [words.duration(s) for s in (0.42, 59.4, 59.6, 200, 3599.6, 7500)] == [
        "0.4 s", "59 s", "1m00s", "3m20s", "1h00m", "2h05m",
    ]  # fmt: skip
    assert [words.count(n) for n in (999, 1797, 1.024e6, 2.3e9)] == [
        "999", "1,797", "1.02 M", "2.30 G",
    ]  # fmt: skip
    assert words.plural(1, "class", "classes") == "1 class"
    assert words.plural(1200, "class", "classes") == "1,200 classes"
    assert words.listing("abc", 2) == "a, b and 1 more"
    assert visible("a\x1b[2J\udcffé") == "a\\x1b[2J\\udcffé"


def test_only_what_was_typed_overrides_the_plan() -> None:
    assert typed(Choices()) == {}
    assert typed(Choices(workers=0, seed=0, compile=True)) == {
        "workers": 0, "seed": 0, "compile": True,
    }  # fmt: skip
    assert typed(Budget(time=60.0)) == {"time": 60.0}


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("photos", "photos-1"),
        ("../my photos/", "my-photos-1"),
        ("x/leaves.tar.gz", "leaves-1"),
        ("leaves.v2.ZIP", "leaves.v2-1"),
        ("leaves.v2.CSV", "leaves.v2-1"),
        ("...", "run-1"),
    ],
)
def test_the_default_run_folder_is_named_after_the_data(data: str, name: str, tmp_path) -> None:
    assert default_out(data, False, tmp_path / "runs") == tmp_path / "runs" / name


def test_run_folders_are_counted_and_the_newest_is_resumed(tmp_path) -> None:
    for taken in ("a-1", "a-2", "a-10", "a-x", "ab-30"):
        (tmp_path / taken).mkdir()
        (tmp_path / taken / "config.toml").touch()
    (tmp_path / "a-11").mkdir()
    (tmp_path / "a-11" / ".lock").touch()  # a run that was refused before it began
    assert default_out("a", False, tmp_path).name == "a-11"
    assert default_out("a", True, tmp_path).name == "a-10"
    with pytest.raises(UsageError, match="no run of c"):
        default_out("c", True, tmp_path)
