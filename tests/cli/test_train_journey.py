"""`crosspatch train` from the first word to the run folder, and everything that stops it."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crosspatch.cli.screen import EPOCH_HEAD, Screen
from support.command import Answer
from support.hostile import write_hostile_folder


def test_digits_from_the_first_to_the_last_screen(crosspatch, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = crosspatch("train", "digits", "--epochs", "1")
    assert answer.code == 0
    assert answer.err == ""
    first, last = answer.out.split(EPOCH_HEAD)
    for part in (
        "1,797 pictures in 10 classes", " train · ", "1 epoch", "parameters", "why",
        "time ", "runs/digits-1", "MB for 1,797 pictures held in memory",
    ):  # fmt: skip
        assert part in first
    assert last.strip().splitlines()[0].startswith("1/1 ")
    for part in (
        "test accuracy", "macro F1", "worst classes", "model/", "next, type",
        "crosspatch predict runs/digits-1 ", "crosspatch eval runs/digits-1 digits",
    ):  # fmt: skip
        assert part in last
    assert max(map(len, answer.out.splitlines())) <= 80

    run = Path("runs/digits-1")
    assert {entry.name for entry in run.iterdir()} >= {
        "config.toml", "classes.txt", "split.csv", "skipped.csv", "metrics.csv",
        "predictions.csv", "report.json", "model", "last",
    }  # fmt: skip
    assert tomllib.loads((run / "config.toml").read_text())["recipe"]["steps"] > 0
    assert json.loads((run / "report.json").read_text())["test"]["images"] > 200
    assert (run / "classes.txt").read_text().split() == list("0123456789")

    again = crosspatch("train", "digits", "--epochs", "1", "--out", run)
    assert_refused(again, 2, "runs/digits-1 already holds a run", "--resume")
    done = crosspatch("train", "digits", "--resume")
    assert done.code == 0
    assert "runs/digits-1" in done.out


def test_json_is_one_object_on_stdout_and_the_screen_goes_to_stderr(
    crosspatch, pictures, tmp_path
) -> None:
    answer = crosspatch("train", pictures, "--epochs", 1, "--out", tmp_path / "run", "--json")
    assert answer.code == 0
    assert EPOCH_HEAD in answer.err
    assert answer.json["out"] == str(tmp_path / "run")
    assert answer.json["test"]["low"] <= answer.json["test"]["accuracy"]
    assert answer.json["split"] == {"train": 40, "val": 10, "test": 10}


def test_ctrl_c_saves_and_the_command_it_names_goes_on(
    crosspatch, pictures, tmp_path, monkeypatch
) -> None:
    show = Screen.epoch

    def stop_after_one_epoch(screen: Screen, row: dict) -> None:
        show(screen, row)
        if row["epoch"] == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Screen, "epoch", stop_after_one_epoch)
    run = tmp_path / "a run"
    stopped = crosspatch("train", pictures, "--epochs", 3, "--out", run)
    assert stopped.code == 4
    assert EPOCH_HEAD in stopped.out
    note, _, do = stopped.err.splitlines()
    assert note.startswith("note      stopped by SIGINT")
    words = shlex.split(do.removeprefix("try"))
    assert words == ["crosspatch", "train", str(pictures), "--out", str(run), "--resume"]

    done = crosspatch(*words[1:])
    assert done.code == 0
    assert "test accuracy" in done.out
    with (run / "metrics.csv").open() as file:
        epochs = [int(row["epoch"]) for row in csv.DictReader(file)]
    # on a busy machine validation may be due every second epoch: no row twice, the last one there
    assert epochs == sorted(set(epochs))
    assert epochs[-1] == 3


def test_the_same_command_goes_on_and_what_differs_needs_force(
    crosspatch, pictures, tmp_path, monkeypatch
) -> None:
    data, run, show = shutil.copytree(pictures, tmp_path / "photos"), tmp_path / "run", Screen.epoch

    def stop(screen: Screen, row: dict) -> None:
        show(screen, row)
        signal.raise_signal(signal.SIGTERM)

    words = ("train", data, "--epochs", 3, "--size", 16, "--out", run)
    with monkeypatch.context() as patch:
        patch.setattr(Screen, "epoch", stop)
        assert crosspatch(*words).code == 4
    lost = sorted((data / "3").iterdir())[0]
    lost.rename(data / "4" / "other.png")
    refused = crosspatch(*words, "--lr", 0.01)
    assert_refused(refused, 3, f"1 came (4/other.png); 1 went (3/{lost.name})", "--force")
    assert "--lr 0.01 (was not given)" in refused.err
    assert_refused(crosspatch(*words[:-4], "--size", 32, "--out", run), 3, "--size 32", "anew")
    forced = crosspatch("train", data, "--out", run, "--resume", "--force", "--lr", 0.001)
    assert forced.code == 0, forced.err
    assert "Goes on with what was changed: --lr 0.001" in " ".join(forced.out.split())
    assert_refused(crosspatch(*words), 2, "already holds a run", "--resume")
    assert_refused(crosspatch(*words, "--force"), 2, "no run that could go on", "--force")


def test_a_probe_of_a_run_is_a_run_that_the_other_verbs_read(
    crosspatch, vit_run, pictures, tmp_path
) -> None:
    run = tmp_path / "probe"
    words = ("train", pictures, "--recipe", "probe", "--weights", vit_run, "--out", run)
    answer = crosspatch(*words)
    assert answer.code == 0, answer.err
    assert "linear probe, 6 penalties" in answer.out
    judged = crosspatch("eval", run, pictures, "--json")
    assert judged.code == 0
    assert (
        judged.json["accuracy"] == json.loads((run / "report.json").read_text())["test"]["accuracy"]
    )
    named = crosspatch("predict", run, pictures, "--json")
    assert len(named.json["predictions"]) == 60
    exported = crosspatch("export", run, "--json")
    assert exported.code == 0, exported.err
    assert (run / "bundle.onnx").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_test_pictures_are_judged(
    crosspatch, pictures, tmp_path, monkeypatch, number
) -> None:
    before, show = signal.getsignal(signal.SIGTERM), Screen.progress

    def stop(screen: Screen, what: str, done: int, total: int) -> None:
        show(screen, what, done, total)
        if what == "testing":
            signal.raise_signal(number)

    run, words = tmp_path / "run", ("train", pictures, "--epochs", 1, "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Screen, "progress", stop)
        stopped = crosspatch(*words)
    assert stopped.code == 4
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert f"stopped by {name}" in stopped.err
    assert f"--out {run} --resume" in stopped.err
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (run / "report.json").exists()
    assert crosspatch(*words, "--resume").code == 0
    assert (run / "report.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_pictures_are_read_leaves_nothing(
    crosspatch, pictures, tmp_path, monkeypatch, number
) -> None:
    stop = lambda *_: signal.raise_signal(number)
    monkeypatch.setattr(Screen, "progress", stop)
    stopped = crosspatch("train", pictures, "--epochs", 1, "--out", tmp_path / "run")
    assert stopped.code == 4
    assert "--resume" not in stopped.err
    assert not (tmp_path / "run").exists()


def test_hostile_files_are_listed_and_the_good_ones_trained_on(crosspatch, tmp_path) -> None:
    data, run = tmp_path / "photos", tmp_path / "run"
    good, bad = write_hostile_folder(data)
    assert len(bad) >= 20
    answer = crosspatch("train", data, "--epochs", 1, "--size", 32, "--out", run)
    assert answer.code == 0, answer.err
    assert f"{len(good)} pictures in 3 classes, {len(bad)} left out" in answer.out
    with (run / "skipped.csv").open(encoding="utf-8") as file:
        skipped = {data / row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert skipped.keys() == bad.keys()
    assert all(reason in skipped[path] for path, reason in bad.items())
    with (run / "split.csv").open(encoding="utf-8") as file:
        assert {data / row["path"] for row in csv.DictReader(file)} == set(good)

    named = crosspatch("predict", run, data, "--json")
    assert named.code == 0
    assert {Path(row["path"]) for row in named.json["predictions"]} == set(good)
    assert {Path(row["path"]) for row in named.json["unreadable"]} == set(bad)
    judged = crosspatch("eval", run, data, "--split", "all", "--json")
    assert judged.code == 0
    assert judged.json["images"] == len(good)
    assert len(judged.json["skipped"]) == len(bad)


def assert_refused(answer: Answer, code: int, got: str, do: str) -> None:
    assert answer.code == code, answer.err
    assert "Traceback" not in answer.err
    first, second, third = answer.err.splitlines()[-3:]
    assert got in first
    assert second.startswith("          ")
    assert do in third


@pytest.fixture
def two_classes(pictures: Path, tmp_path: Path) -> Path:
    data = tmp_path / "photos"
    for name in "01":
        shutil.copytree(pictures / name, data / name)
    return data


def test_no_such_folder(crosspatch, two_classes, tmp_path) -> None:
    answer = crosspatch("train", tmp_path / "photo", "--out", tmp_path / "run")
    assert_refused(answer, 2, "photo does not exist", "photos")
    assert not (tmp_path / "run").exists()


def test_one_class(crosspatch, two_classes, tmp_path) -> None:
    shutil.rmtree(two_classes / "1")
    answer = crosspatch("train", two_classes, "--out", tmp_path / "run")
    assert_refused(answer, 3, "one class", "class folders")


def test_empty_class(crosspatch, two_classes, tmp_path) -> None:
    (two_classes / "nothing").mkdir()
    answer = crosspatch("train", two_classes, "--out", tmp_path / "run")
    assert_refused(answer, 3, "no picture of nothing", "remove the folder")


def test_no_readable_picture(crosspatch, tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "x.jpg").write_text("<html>")
    answer = crosspatch("train", tmp_path / "data", "--out", tmp_path / "run")
    assert_refused(answer, 3, "none of the 2 pictures", "")


def test_unknown_model_with_near_names(crosspatch, two_classes, tmp_path) -> None:
    answer = crosspatch(
        "train", two_classes, "--model", "crossvit_micro32", "--out", tmp_path / "run"
    )
    assert_refused(answer, 2, "crossvit_micro32", "")
    assert "crossvit_micro_32" in answer.err
    assert not (tmp_path / "run").exists()


def test_a_fresh_process_needs_nothing_that_the_tests_prepare(two_classes, tmp_path) -> None:
    words = ["train", two_classes, "--model", "crossvit_mikro_32", "--out", tmp_path / "run"]
    command = [sys.executable, "-m", "crosspatch", *words]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert_refused(Answer(answer.returncode, answer.stdout, answer.stderr), 2, "crossvit_mikro", "")
    code = "import crosspatch.deploy.torch_engine"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


def test_out_that_cannot_be_written(crosspatch, two_classes, tmp_path) -> None:
    (tmp_path / "file").touch()
    inside = crosspatch("train", two_classes, "--out", tmp_path / "file" / "run")
    assert_refused(inside, 2, "file/run cannot be written", "--out")
    itself = crosspatch("train", two_classes, "--out", tmp_path / "file")
    assert_refused(itself, 2, "is a file", "--out")


def test_out_that_holds_something_else_is_left_alone(crosspatch, two_classes, tmp_path) -> None:
    answer = crosspatch("train", two_classes, "--out", two_classes, "--overwrite")
    assert_refused(answer, 2, "holds other files", "--out")
    assert len(list(two_classes.rglob("*.png"))) == 24


def test_nothing_to_resume(crosspatch, two_classes, tmp_path) -> None:
    answer = crosspatch("train", two_classes, "--resume", "--out", tmp_path / "run")
    assert_refused(answer, 2, "holds no run", "--resume")


def test_time_and_epochs_exclude_each_other(crosspatch, two_classes, tmp_path) -> None:
    words = ("--time", "1m", "--epochs", 3, "--out", tmp_path / "run")
    assert_refused(crosspatch("train", two_classes, *words), 2, "both --time and --epochs", "one")


def test_a_val_class_that_train_lacks(crosspatch, tmp_path) -> None:
    for place in ("train/dog", "train/cat", "val/dogs", "val/cat"):
        (tmp_path / "data" / place).mkdir(parents=True)
        grey = np.full((16, 16, 3), 99, np.uint8)
        Image.fromarray(grey).save(tmp_path / "data" / place / "a.png")
    answer = crosspatch("train", tmp_path / "data", "--out", tmp_path / "run")
    assert_refused(answer, 3, "'dogs', which train lacks", "Rename")
    assert "dog" in answer.err.splitlines()[1]


def test_a_loss_that_stays_nan_ends_in_three_lines_and_a_table(
    crosspatch, two_classes, tmp_path, monkeypatch
) -> None:
    from crosspatch.objectives.supervised import Supervised

    real = Supervised.forward

    def spoilt(objective, inputs, progress):
        out = real(objective, inputs, progress)
        return {**out, "loss": out["loss"] * float("nan")} if progress else out

    monkeypatch.setattr(Supervised, "forward", spoilt)
    run = tmp_path / "run"
    answer = crosspatch("train", two_classes, "--epochs", 2, "--batch", 4, "--out", run)
    assert_refused(answer, 2, "the loss became nan at step 2 (", "--lr")
    tries = [line for line in answer.out.splitlines() if line.startswith("Back to step 0: ")]
    assert [line.split("(try ")[1] for line in tries] == ["1 of 3).", "2 of 3).", "3 of 3)."]
    with (run / "nan.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 4
    assert all((two_classes / row["path"]).is_file() for row in rows)
