"""`crosspatch compare` as it is typed: the tables, the page, errors, --json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crosspatch.cli.compare import Whole
from crosspatch.cli.screen import Screen

FEW = ("--model", "vit_micro_32", "--size", 16, "--seeds", 1, "--epochs", 1)


@pytest.mark.long
def test_a_comparison_and_its_json(crosspatch, tmp_path: Path) -> None:
    words = ("compare", "digits", "--try", "base,quick=lr=0.004", *FEW, "--out", tmp_path / "c")
    told = crosspatch(*words)
    assert told.code == 0, told.err
    assert max(map(len, told.out.splitlines())) <= max(80, len(str(tmp_path)) + 40)
    assert "2 candidates on digits, 1 seed, 1 epochs a run" in told.out
    assert "quick: " in told.out
    assert "One seed: " in told.out
    assert (tmp_path / "c" / "compare.png").read_bytes()[1:4] == b"PNG"
    again = crosspatch(*words, "--json")
    answer = json.loads(again.out)
    assert [one["name"] for one in answer["candidates"]] == ["base", "quick"]
    assert answer["candidates"][1]["verdict"]
    assert answer["split"]["test"] == 269


WRONG = [
    (("--try", "base,mixpu"), "'mixpu' is nothing", "base,mixup"),
    (("--try", "base"), "one candidate", "--try"),
    ((), "--try is missing", "--try base,mixup"),
    (("--try", "base,mixup", "--seeds", "0"), "--seeds 0", "--seeds 3"),
    (("--try", "base,mixup", "--time", "1m", "--epochs", "2"), "both --time", "leave one"),
    (("--try", "base,mixup", "--devices", "2"), "--devices with compare", "leave it"),
    (("--resume",), "no run of digits in compared", "--resume"),
    (("--try", "base,tome:r=90", "--size", "16"), "the candidate tome:r=90", ""),
]


@pytest.mark.parametrize(("words", "got", "do"), WRONG)
def test_what_is_refused(crosspatch, tmp_path: Path, monkeypatch, words, got, do) -> None:
    monkeypatch.chdir(tmp_path)
    told = crosspatch("compare", "digits", *words)
    assert told.code == 2
    assert got in told.err.splitlines()[0]
    assert do in told.err
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_is_foreseen_from_what_was_done(capsys) -> None:
    with Screen() as screen:
        whole = Whole(screen)
        whole.begins("base", 0, 1, 4, 10.0)
        whole.began -= 20  # half of it took twice as long as all of it was to take
        assert whole._left(0.5) == pytest.approx(20 + 3 * 10 * 4, rel=0.01)
        whole.done({"val": {"accuracy": 0.5}})
    assert "4 runs to do, roughly 40 s" in capsys.readouterr().out
