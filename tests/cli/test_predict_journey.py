"""`crosspatch predict`: files, folders, patterns; what cannot be read is listed, never fatal."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from crosspatch.cli.predict import check_target, find
from crosspatch.errors import UsageError


@pytest.fixture
def mess(pictures: Path, tmp_path: Path) -> Path:
    """Six pictures, three unreadable ones, and litter."""
    folder = tmp_path / "new pictures"
    for name in "01":
        (folder / name).mkdir(parents=True)
        for path in sorted((pictures / name).iterdir())[:3]:
            shutil.copy(path, folder / name)
    whole = next((folder / "0").iterdir()).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "page.jpg").write_text("<html><body>404</body></html>")
    (folder / "empty.png").touch()
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".hidden.png").write_bytes(whole)
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "a.png").write_bytes(whole)
    return folder


def test_files_folders_and_patterns_are_found_once_and_in_order(mess: Path) -> None:
    first = sorted(str(path) for path in (mess / "0").iterdir())
    files, missing = find(
        [first[1], str(mess / "0"), f"{mess}/*/*.png", f"{mess}/*.gif", "gone.png"]
    )
    assert files[:3] == [first[1], first[0], first[2]]
    assert len(files) == len(set(files)) == 7
    assert missing == [(f"{mess}/*.gif", "no file has such a name"), ("gone.png", "no such file")]
    inside, _ = find([str(mess)])
    assert [Path(path).name for path in inside if Path(path).parent == mess] == [
        "cut.png", "empty.png", "page.jpg",
    ]  # fmt: skip


def test_a_folder_without_pictures_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    assert find([str(tmp_path)]) == ([], [(str(tmp_path), "no picture in this folder")])


def test_good_pictures_are_named_and_bad_ones_listed(crosspatch, digits_run, mess) -> None:
    answer = crosspatch("predict", digits_run, mess, "gone.png", "--topk", 2)
    assert answer.code == 0
    named, bad = answer.out.split("4 names could not be read")
    assert len([line for line in named.splitlines() if " %, " in line]) == 6
    for part in ("cut.png: ", "page.jpg: this is HTML", "empty.png: the file is empty",
                 "gone.png: no such file"):  # fmt: skip
        assert part in bad


def test_json_and_csv_say_the_same_and_topk_is_clamped(
    crosspatch, digits_run, mess, tmp_path
) -> None:
    table = tmp_path / "out.csv"
    answer = crosspatch("predict", digits_run, mess, "--topk", 99, "--json", "--csv", table)
    assert answer.code == 0
    assert answer.json["classes"] == list("0123456789")
    assert len(answer.json["predictions"]) == 6
    assert [Path(row["path"]).name for row in answer.json["unreadable"]] == [
        "cut.png", "empty.png", "page.jpg",
    ]  # fmt: skip
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["path", "class_1", "probability_1"]
    assert len(rows[0]) == 22
    for row, said in zip(rows[:6], answer.json["predictions"], strict=True):
        top = said["top"]
        assert row["path"] == said["path"]
        assert len(top) == 10
        assert sum(one["probability"] for one in top) == pytest.approx(1, abs=1e-4)
        assert [one["probability"] for one in top] == sorted(
            (one["probability"] for one in top), reverse=True
        )
        assert row["class_1"] == top[0]["class"]
        assert row["error"] == ""
    assert [row["error"] != "" for row in rows[6:]] == [True] * 3


def test_nothing_readable_is_a_data_error(crosspatch, digits_run, mess, tmp_path) -> None:
    answer = crosspatch("predict", digits_run, mess / "page.jpg", "gone.png")
    assert answer.code == 3
    assert "nothing could be read: gone.png: no such file (and 1 more)" in answer.err
    assert answer.err.splitlines()[2].startswith("try ")


def test_a_bundle_names_the_same_classes_as_its_run(
    crosspatch, digits_run, digits_bundle, mess
) -> None:
    run = crosspatch("predict", digits_run, mess, "--json").json
    assert run["engine"]["engine"] == "torch"
    for engine in ("auto", "onnxruntime", "openvino"):
        answer = crosspatch("predict", digits_bundle, mess, "--engine", engine, "--json")
        assert answer.code == 0
        assert answer.json["engine"]["engine"] in ("onnxruntime", "openvino")
        assert answer.json["unreadable"] == run["unreadable"]
        assert len(answer.json["predictions"]) == 6
        for mine, theirs in zip(answer.json["predictions"], run["predictions"], strict=True):
            assert mine["path"] == theirs["path"]
            assert [one["class"] for one in mine["top"]] == [one["class"] for one in theirs["top"]]
            for a, b in zip(mine["top"], theirs["top"], strict=True):
                assert a["probability"] == pytest.approx(b["probability"], abs=1e-4)


@pytest.mark.parametrize(
    ("what", "engine", "says"),
    [
        ("run", "openvino", "crosspatch export"),
        ("bundle", "torch", "torch runs the folder of a run"),
        ("bundle", "tensorflow", '"openvino"'),
        ("gone.onnx", "auto", "crosspatch export RUN --to onnx"),
        ("bundle.pt2", "auto", "is for torch alone"),
        ("bundle.onx", "auto", "near it are bundle.onnx"),
    ],
)
def test_engines_and_files_that_do_not_fit(
    crosspatch, digits_run, digits_bundle, pictures, what, engine, says
) -> None:
    model = {"run": digits_run, "bundle": digits_bundle}.get(what, digits_bundle.with_name(what))
    answer = crosspatch("predict", model, pictures, "--engine", engine)
    assert answer.code == 2
    assert says in answer.err
    assert len(answer.err.splitlines()) == 3


def test_a_folder_that_holds_no_run(crosspatch, pictures, tmp_path) -> None:
    answer = crosspatch("predict", tmp_path, pictures)
    assert answer.code == 3
    assert len(answer.err.splitlines()) == 3
    assert "does not exist" in answer.err


def test_a_run_that_does_not_exist_names_those_near_it(crosspatch, digits_run, pictures) -> None:
    answer = crosspatch("predict", digits_run.with_name("digit-run"), pictures)
    assert answer.code == 2
    assert "near it are digits-run" in answer.err


def test_a_table_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for wrong in (tmp_path, tmp_path / "gone" / "a.csv", tmp_path / "file" / "a.csv"):
        with pytest.raises(UsageError, match="--csv"):
            check_target(wrong)
    check_target(tmp_path / "a.csv")
    assert not (tmp_path / "a.csv").exists()
    check_target(tmp_path / "file")
    assert (tmp_path / "file").exists()
