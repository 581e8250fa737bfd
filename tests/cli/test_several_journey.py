"""Several labels to a picture from the first word to the client, as a newcomer types it."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crosspatch.cli.main import main
from support import several
from support.once import once, shared


@pytest.fixture(scope="session")
def several_data(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    def make(folder: Path) -> None:
        several.write_tables(folder, several.write_pictures(folder, 130))

    return once(shared(tmp_path_factory, worker_id) / "several-data", make)


@pytest.fixture(scope="session")
def several_run(several_data, tmp_path_factory, worker_id) -> Path:
    """A run on bar.csv with its bundle: read it, change nothing in it."""

    def make(folder: Path) -> None:
        words = ["--model", "vit_micro_32", "--epochs", "10", "--out", str(folder), "--json"]
        assert main(["train", str(several_data / "bar.csv"), *words]) == 0
        assert main(["export", str(folder), "--json"]) == 0

    return once(shared(tmp_path_factory, worker_id) / "several-digits", make)


def test_a_table_of_labels_is_learnt_in_seconds(several_run) -> None:
    report = json.loads((several_run / "report.json").read_text())
    assert report["test"]["map"] > 0.95
    assert report["seconds"] < 60
    assert report["task"] == "multilabel"


def test_the_screen_of_a_training_says_what_it_must(crosspatch, several_data, tmp_path) -> None:
    done = crosspatch(
        "train", several_data / "list.jsonl", "--epochs", 1, "--out", tmp_path / "run"
    )
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    for part in (
        "multi-label: labels such as a|b, or lists", "labels", "to a picture", "val mAP",
        "all right", "test mAP", "macro F1", "average precision", "worst classes",
    ):  # fmt: skip
        assert part in text, part
    assert "most confused" not in text
    assert max(len(line) for line in done.out.splitlines() if "pytest" not in line) <= 80


def test_folders_with_copies_are_learnt_with_the_flag_and_resumed_without(
    crosspatch, several_data, tmp_path
) -> None:
    run = tmp_path / "run"
    words = ("--epochs", 1, "--out", run)
    done = crosspatch("train", several_data / "folders", "--multi-label", *words, "--json")
    assert done.code == 0, done.err
    assert done.json["task"] == "multilabel"
    (run / "report.json").unlink()
    again = crosspatch("train", several_data / "folders", "--out", run, "--resume", "--json")
    assert again.code == 0, again.err
    assert again.json["test"] == done.json["test"]
    judged = crosspatch("eval", run, several_data / "folders", "--json")
    assert judged.json["split"] == "test"
    assert judged.json["map"] == pytest.approx(done.json["test"]["map"], abs=1e-6)


def test_what_cannot_be_meant_is_refused_in_three_parts(crosspatch, several_data, tmp_path) -> None:
    train = ("train", several_data / "long.csv", "--out", tmp_path / "run")
    long = crosspatch(*train)
    assert (long.code, "--multi-label" in long.err) == (3, True)
    sampler = crosspatch(*train, "--multi-label", "--balance", "sampler")
    assert (sampler.code, "--balance weights" in sampler.err) == (2, True)
    assert not (tmp_path / "run" / "config.toml").exists()


def test_eval_gives_the_figures_of_the_report_from_run_and_bundle(
    crosspatch, several_data, several_run, tmp_path
) -> None:
    report = json.loads((several_run / "report.json").read_text())["test"]
    for what in (several_run, several_run / "bundle.onnx"):
        table = tmp_path / "out.csv"
        answer = crosspatch("eval", what, several_data / "bar.csv", "--json", "--csv", table)
        assert answer.code == 0, answer.err
        assert answer.json["split"] == "test"
        for name in ("images", "labels", "accuracy", "hamming"):
            assert answer.json[name] == report[name], name
        for name in ("map", "macro_f1", "micro_f1", "nll", "ece"):
            assert answer.json[name] == pytest.approx(report[name], abs=1e-4), name
        with table.open() as file:
            rows = list(csv.DictReader(file))
        assert sum(int(row["correct"]) for row in rows) / len(rows) == report["accuracy"]
    shown = crosspatch("eval", several_run, several_data / "bar.csv")
    for part in ("test mAP", "from", "prec.", "the probability from which on"):
        assert part in shown.out
    assert max(map(len, shown.out.splitlines()[1:])) <= 80


def test_data_with_one_label_each_are_read_as_such(crosspatch, several_run, tmp_path) -> None:
    for seed in range(60):
        pixels, names = several.picture(seed)
        if len(names) == 1:
            from PIL import Image

            place = tmp_path / "data" / names[0]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{seed}.png")
    answer = crosspatch("eval", several_run, tmp_path / "data", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["labels"] == answer.json["images"] > 10
    assert answer.json["map"] > 0.9


def test_classes_are_matched_by_name(crosspatch, several_data, several_run, tmp_path) -> None:
    with (several_data / "bar.csv").open() as file:
        rows = list(csv.DictReader(file))
    some = [row for row in rows if "bar" not in row["label"].split("|")]
    lines = [f"{several_data / row['path']},{row['label']}" for row in some]
    (tmp_path / "some.csv").write_text("\n".join(["path,label", *lines]))
    answer = crosspatch("eval", several_run, tmp_path / "some.csv", "--json")
    assert answer.code == 0, answer.err
    support = {row["name"]: row["support"] for row in answer.json["classes"]}
    assert support["bar"] == 0
    assert answer.json["map"] > 0.9
    (tmp_path / "some.csv").write_text("\n".join(["path,label", *lines, f"{lines[0]}s|disk"]))
    bad = crosspatch("eval", several_run, tmp_path / "some.csv")
    assert bad.code == 3


def test_a_run_of_single_labels_refuses_data_of_several(
    crosspatch, digits_run, pictures, several_data
) -> None:
    answer = crosspatch("eval", digits_run, several_data / "bar.csv")
    assert answer.code == 3
    got, expected, do = answer.err.splitlines()
    assert "may have several labels" in got
    assert "one label to a picture" in expected
    assert "--multi-label" in do
    assert crosspatch("eval", digits_run, pictures, "--multi-label").code == 3


def test_predict_shows_and_writes_all_labels(
    crosspatch, several_data, several_run, tmp_path
) -> None:
    pics = [several_data / f"pics/{seed:03d}.png" for seed in range(8)]
    table = tmp_path / "out.csv"
    for what in (several_run, several_run / "bundle.onnx"):
        answer = crosspatch("predict", what, *pics, "gone.png", "--csv", table, "--json")
        assert answer.code == 0, answer.err
        thresholds = dict(zip(answer.json["classes"], answer.json["thresholds"], strict=True))
        for row, (seed, _) in zip(answer.json["predictions"], enumerate(pics), strict=True):
            said = tuple(sorted(one["class"] for one in row["labels"]))
            assert said == several.picture(seed)[1], seed
            for one in row["top"]:
                above = one["probability"] >= thresholds[one["class"]]
                assert above == (one["class"] in said)
        with table.open() as file:
            rows = list(csv.DictReader(file))
        assert [tuple(sorted(filter(None, row["labels"].split("|")))) for row in rows[:-1]] == [
            several.picture(seed)[1] for seed in range(8)
        ]
        assert rows[-1]["error"] == "no such file"
        assert float(rows[0]["probability_1"]) > 0
    shown = crosspatch("predict", several_run, *pics)
    empty = next(seed for seed in range(8) if not several.picture(seed)[1])
    assert "none (nearest: " in shown.out.splitlines()[empty]


@pytest.mark.long
@pytest.mark.parametrize("words", [("--int8",), ("--int8", "--static"), ("--to", "openvino")])
def test_every_kind_of_bundle_is_exported_and_verified(
    crosspatch, several_data, several_run, tmp_path, words
) -> None:
    run = tmp_path / "run"
    shutil.copytree(several_run, run)
    done = crosspatch("export", run, *words, "--json")
    assert done.code == 0, done.err
    assert done.json["task"] == "multilabel"
    checked = crosspatch("verify", done.json["bundle"], several_data / "pics")
    assert checked.code == 0, checked.out


def test_exported_verified_and_answered_by_the_client(
    crosspatch, several_data, several_run
) -> None:
    checked = crosspatch("verify", several_run / "bundle.onnx", several_data / "pics")
    assert checked.code == 0, checked.out
    assert "same labels" in checked.out
    assert "130 of 130" in checked.out
    picture, bundle = several_data / "pics/002.png", several_run / "bundle.onnx"
    answer = subprocess.run(
        [sys.executable, "-I", str(several_run / "client.py"), str(bundle), str(picture)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    said = answer.stdout.strip().rsplit(": ", 1)[1]
    names = () if said == "none" else tuple(sorted(one.split()[0] for one in said.split(", ")))
    assert names == several.picture(2)[1]


@pytest.mark.long
def test_bench_measures_such_a_run(crosspatch, several_run) -> None:
    words = ("--engine", "torch,onnxruntime", "--batch", 1, "--threads", 1, "--time", "4s")
    answer = crosspatch("bench", several_run, *words, "--json")
    assert answer.code == 0, answer.err
    assert {row["engine"] for row in answer.json["rows"]} == {"torch", "onnxruntime"}
