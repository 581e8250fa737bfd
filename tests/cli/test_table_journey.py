"""A table from the first word to evaluation: columns told once, groups, copies, and errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest


@pytest.fixture
def table(pictures: Path, tmp_path: Path) -> Path:
    """A table of absolute and of relative paths beside two classes of pictures."""
    files = [path for name in "01" for path in sorted((pictures / name).iterdir())]
    with (tmp_path / "leaves.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter=";")
        rows.writerow(["where", "what", "plant"])
        for number, path in enumerate(files):
            rows.writerow([path, f"class {path.parent.name}", number // 2])
        rows.writerow(["gone.png", "class 0", 99])
    return tmp_path / "leaves.csv"


def test_a_table_is_trained_on_and_judged_with_the_columns_of_the_run(
    crosspatch, table, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--path-column", "where", "--label-column", "what", "--group", "plant")
    done = crosspatch("train", "leaves.csv", *words, "--epochs", 1, "--balance", "sampler")
    assert done.code == 0, done.err
    for part in (
        "24 pictures in 2 classes", "group from 'plant'", "--balance sampler, as asked",
        "gone.png: line 26: no such file or directory", "runs/leaves-1",
    ):  # fmt: skip
        assert part in " ".join(done.out.split()), part
    report = json.loads(Path("runs/leaves-1/report.json").read_text())
    assert report["config"]["recipe"]["balance"] == "sampler"

    judged = crosspatch("eval", "runs/leaves-1", "leaves.csv", "--json")
    assert judged.code == 0, judged.err
    assert judged.json["split"] == "test"
    assert judged.json["images"] == report["split"]["test"]
    assert judged.json["accuracy"] == report["test"]["accuracy"]
    assert judged.json["skipped"][0]["path"] == "gone.png"

    Path("other.csv").write_text(Path("leaves.csv").read_text())
    lost = crosspatch("eval", "runs/leaves-1", "other.csv")
    assert (lost.code, "--path-column" in lost.err) == (2, True)
    told = crosspatch("eval", "runs/leaves-1", "other.csv", *words[:4], "--split", "all", "--json")
    assert told.json["images"] == 24


def test_columns_without_a_table_are_refused(crosspatch, pictures, tmp_path) -> None:
    answer = crosspatch("train", pictures, "--label-column", "x", "--out", tmp_path / "run")
    assert answer.code == 2
    assert "is no table" in answer.err
    assert not (tmp_path / "run").exists()


def test_a_group_that_no_picture_has_is_refused(crosspatch, pictures, tmp_path) -> None:
    answer = crosspatch("train", pictures, "--group", "folder", "--out", tmp_path / "run")
    assert answer.code == 2
    assert "gives none of the 60 pictures a group" in answer.err
