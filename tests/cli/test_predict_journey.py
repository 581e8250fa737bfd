"""`crosspatch predict`: files, folders, patterns; what cannot be read is listed, never fatal."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
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


def test_a_picture_is_predicted_alike_alone_and_among_others(digits_run, pictures) -> None:
    from crosspatch.training.inference import Classifier

    files = sorted(pictures.rglob("*.png"))[:7]
    classifier = Classifier.open(digits_run)
    together = classifier.probabilities(files, batch=3)
    assert together.ok.tolist() == list(range(7))
    for place, path in enumerate(files):
        for given in (path, str(path), path.read_bytes(), lambda path=path: path.read_bytes()):
            alone = classifier.probabilities([given])
            np.testing.assert_allclose(alone.probs[0], together.probs[place], atol=1e-5)
    assert classifier.probabilities([]).probs.shape == (0, 10)


def test_failures_keep_their_places(digits_run, pictures) -> None:
    from crosspatch.training.inference import Classifier

    good = sorted(pictures.rglob("*.png"))[:3]
    seen: list[tuple[int, int]] = []
    answers = Classifier.open(digits_run).probabilities(
        [b"", good[0], "gone.png", good[1], good[2]], lambda *at: seen.append(at), batch=2
    )
    assert answers.ok.tolist() == [1, 3, 4]
    assert answers.probs.shape == (3, 10)
    assert [(one.index, bool(one.reason)) for one in answers.failures] == [(0, True), (2, True)]
    assert seen == [(2, 5), (4, 5), (5, 5)]


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
