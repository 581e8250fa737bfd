"""`crosspatch eval`: the right pictures, classes matched by name, every figure of the report."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest


def test_the_data_it_was_trained_on_gives_the_test_score_of_the_report(
    crosspatch, digits_run, tmp_path
) -> None:
    table = tmp_path / "out.csv"
    answer = crosspatch("eval", digits_run, "digits", "--json", "--csv", table)
    assert answer.code == 0
    report = json.loads((digits_run / "report.json").read_text())["test"]
    assert answer.json["split"] == "test"
    for name in ("images", "accuracy", "low", "high", "confusion"):
        assert answer.json[name] == report[name]
    for name in ("macro_f1", "nll", "ece"):
        assert answer.json[name] == pytest.approx(report[name], abs=1e-4)
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == report["images"]
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert right / len(rows) == pytest.approx(report["accuracy"])


def test_a_bundle_scores_what_its_run_scores_on_the_same_pictures(
    crosspatch, digits_run, digits_bundle, tmp_path
) -> None:
    run = crosspatch("eval", digits_run, "digits", "--json").json
    answer = crosspatch("eval", digits_bundle, "digits", "--engine", "onnxruntime", "--json")
    assert answer.code == 0
    assert answer.json["engine"]["engine"] == "onnxruntime"
    for name in ("split", "images", "accuracy", "confusion"):
        assert answer.json[name] == run[name]
    assert answer.json["nll"] == pytest.approx(run["nll"], abs=1e-4)
    shutil.copy(digits_bundle, tmp_path)  # away from its run nothing is known of a split
    assert crosspatch("eval", tmp_path / "bundle.onnx", "digits", "--json").json["split"] == "all"


def test_a_split_can_be_asked_for(crosspatch, digits_run) -> None:
    sizes = json.loads((digits_run / "report.json").read_text())["split"]
    for split, images in ({"all": 1797} | sizes).items():
        answer = crosspatch("eval", digits_run, "digits", "--split", split, "--json")
        assert (answer.json["split"], answer.json["images"]) == (split, images)


def test_classes_are_matched_by_name_not_by_place(
    crosspatch, digits_run, pictures, tmp_path
) -> None:
    for name in "42":  # sorted they are 2, 4: places 0, 1 here and 2, 4 in the model
        shutil.copytree(pictures / name, tmp_path / "data" / name)
    answer = crosspatch("eval", digits_run, tmp_path / "data", "--json", "--topk", 99)
    assert answer.code == 0
    assert answer.json["split"] == "all"
    support = {row["name"]: row["support"] for row in answer.json["classes"] if row["support"]}
    assert support == {"2": 12, "4": 12}
    assert answer.json["topk"] == {"k": 10, "accuracy": 1.0}


def test_the_screen_shows_every_figure_within_80_columns(crosspatch, digits_run) -> None:
    answer = crosspatch("eval", digits_run, "digits")
    assert answer.code == 0
    for part in (
        "accuracy", "95 % confidence", "top-5", "macro F1", "log-likelihood", "calibration error",
        "precision", "recall", "the test pictures of this run",
    ):  # fmt: skip
        assert part in answer.out
    lines = answer.out.splitlines()[1:]
    assert max(map(len, lines)) <= 80


def test_a_class_that_the_model_does_not_know(crosspatch, digits_run, pictures, tmp_path) -> None:
    shutil.copytree(pictures / "1", tmp_path / "data" / "1")
    shutil.copytree(pictures / "2", tmp_path / "data" / "22")
    answer = crosspatch("eval", digits_run, tmp_path / "data")
    assert answer.code == 3
    got, expected, do = answer.err.splitlines()
    assert "22 (near: 2)" in got
    assert "0, 1, 2" in expected
    assert "rename" in do


def test_folders_that_are_splits_are_obeyed(crosspatch, digits_run, pictures, tmp_path) -> None:
    for place in ("train", "test"):
        for name in "12":
            shutil.copytree(pictures / name, tmp_path / "data" / place / name)
    next((tmp_path / "data" / "test" / "1").iterdir()).unlink()
    answer = crosspatch("eval", digits_run, tmp_path / "data", "--json")
    assert (answer.json["split"], answer.json["images"]) == ("test", 23)
    answer = crosspatch("eval", digits_run, tmp_path / "data", "--split", "val")
    assert answer.code == 2
    assert "no val pictures" in answer.err


def test_unreadable_pictures_are_listed_and_not_counted(
    crosspatch, digits_run, pictures, tmp_path
) -> None:
    for name in "12":
        shutil.copytree(pictures / name, tmp_path / "data" / name)
    (tmp_path / "data" / "1" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    answer = crosspatch("eval", digits_run, tmp_path / "data", "--json")
    assert answer.json["images"] == 24
    assert [row["path"] for row in answer.json["skipped"]] == ["1/cut.jpg"]
    for path in Path(tmp_path / "data").rglob("*.png"):
        path.write_bytes(b"")
    answer = crosspatch("eval", digits_run, tmp_path / "data")
    assert answer.code == 3
    assert "could be read" in answer.err


def test_a_run_without_test_pictures_is_judged_on_what_there_is(
    crosspatch, digits_run, pictures, tmp_path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    keys = [f"{path.parent.name}/{path.name}" for path in sorted(pictures.rglob("*.png"))]
    for place, used in (("val", "val"), ("train", "all")):
        rows = [f"{key},{key[0]},{place if key[0] == '1' else 'train'}" for key in keys]
        (run / "split.csv").write_text("\n".join(["path,class,split", *rows]))
        answer = crosspatch("eval", run, pictures, "--json")
        assert (answer.json["split"], answer.json["images"]) == (used, 12 if used == "val" else 60)
    assert crosspatch("eval", run, pictures, "--split", "test").code == 2
