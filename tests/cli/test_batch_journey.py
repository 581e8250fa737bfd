"""`crosspatch predict … --csv` of many pictures: it goes on after Ctrl-C and after a kill."""

from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crosspatch.cli import batch

COUNT = 1200


@pytest.fixture(scope="module")
def many(pictures: Path, tmp_path_factory) -> Path:
    """1,200 names for sixty scans, and three files that cannot be read."""
    folder = tmp_path_factory.mktemp("many") / "pictures"
    folder.mkdir()
    files = sorted(pictures.rglob("*.png"))
    for place in range(COUNT):
        shutil.copy(files[place % len(files)], folder / f"{place:04d}.png")
    (folder / "bad.png").write_bytes(b"GIF8 no")
    (folder / "empty.png").touch()
    (folder / "evil\u202e\n\x1b[31m.png").write_bytes(b"<html><body>")
    return folder


@pytest.fixture
def whole(crosspatch, digits_bundle, many, tmp_path) -> bytes:
    answer = crosspatch("predict", digits_bundle, many, "--csv", tmp_path / "whole.csv")
    assert answer.code == 0
    assert "1,203 pictures for " in answer.out
    assert "whole.csv: 1,200 pictures" in answer.out
    assert "3 names could not be read" in answer.out
    assert "bad.png: " in answer.out
    assert "evil\\u202e\\n\\x1b[31m.png: this is HTML" in answer.out
    assert "\x1b" not in answer.out
    return (tmp_path / "whole.csv").read_bytes()


def test_the_table_is_that_of_few_pictures(
    crosspatch, digits_bundle, many, tmp_path, whole, monkeypatch
) -> None:
    rows = list(csv.DictReader(whole.decode().splitlines(keepends=True)))
    assert len(rows) == COUNT + 3
    assert [bool(row["error"]) for row in rows] == [False] * COUNT + [True] * 3
    monkeypatch.setattr(batch, "MANY", 10**9)
    answer = crosspatch("predict", digits_bundle, many, "--csv", tmp_path / "plain.csv")
    assert answer.code == 0
    assert len(answer.out.splitlines()) > COUNT
    text = (tmp_path / "plain.csv").read_bytes().decode()
    plain = list(csv.DictReader(text.splitlines(keepends=True)))
    assert [list(row) for row in plain] == [list(row) for row in rows]
    for one, other in zip(plain, rows, strict=True):
        for name in ("path", "class_1", "error"):
            assert one[name] == other[name]
        if one["probability_1"]:
            near = pytest.approx(float(one["probability_1"]), abs=1e-4)
            assert float(other["probability_1"]) == near


def test_json_counts(crosspatch, digits_bundle, many, tmp_path) -> None:
    answer = crosspatch("predict", digits_bundle, many, "--csv", tmp_path / "o.csv", "--json")
    assert answer.code == 0
    assert answer.json["counts"] == {"answered": COUNT, "unreadable": 3, "done_before": 0}
    assert len(answer.json["unreadable"]) == 3
    assert answer.json["csv"] == str(tmp_path / "o.csv")
    assert answer.json["engine"]["threads"] == 1
    assert "predictions" not in answer.json


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_the_same_command_goes_on(crosspatch, digits_bundle, many, tmp_path, whole, number) -> None:
    table = tmp_path / "out.csv"
    words = ["predict", digits_bundle, many, "--csv", table, "--workers", "2"]
    script = (  # slow pictures: the signal comes in the middle
        "import sys, time; from crosspatch.deploy.predictor import Predictor\n"
        "load = Predictor._load\n"
        "Predictor._load = lambda *given: time.sleep(0.003) or load(*given)\n"
        "from crosspatch.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    home = tmp_path / "out.csv.parts"
    end = time.monotonic() + 60
    while time.monotonic() < end and not list(home.glob("*.part")):
        time.sleep(0.02)
    second = crosspatch(*words)
    assert second.code == 2
    assert "another process is writing" in second.err
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (4 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert "stopped by Ctrl-C with " in err
        assert err.splitlines()[-1].split()[:3] == ["try", "crosspatch", "predict"]
        assert len(err.splitlines()) == 3
    assert not table.exists()
    other = crosspatch(*words, "--topk", 1)
    assert other.code == 2
    assert "--topk (3 → 1)" in other.err
    answer = crosspatch(*words)
    assert answer.code == 0
    assert " pictures had been done before" in answer.out
    assert table.read_bytes() == whole
    assert not home.exists()


def test_nothing_readable_is_an_error_and_a_table(crosspatch, digits_bundle, tmp_path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for place in range(1000):
        (folder / f"{place}.png").write_bytes(b"broken")
    answer = crosspatch("predict", digits_bundle, folder, "--csv", tmp_path / "out.csv")
    assert answer.code == 3
    assert "(and 999 more)" in answer.err
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 1001


@pytest.mark.parametrize("workers", ["0", "-1", "two"])
def test_numbers_of_processes_that_make_no_sense(crosspatch, digits_bundle, many, workers) -> None:
    answer = crosspatch("predict", digits_bundle, many, "--workers", workers)
    assert answer.code == 2
    assert "--workers" in answer.err
