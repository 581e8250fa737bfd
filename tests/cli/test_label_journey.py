"""From pictures to a teacher, its labels of every patch, and a student, as a newcomer types it."""

from __future__ import annotations

import json


def test_label_then_train(crosspatch, digits_run, pictures, tmp_path) -> None:
    model = ("--model", "lvvit_micro_32", "--size", "16", "--epochs", "1")
    teacher, out = tmp_path / "teacher", tmp_path / "labels.safetensors"
    done = crosspatch("train", pictures, *model, "--objective", "token-labeling", "--out", teacher)
    assert done.code == 0, done.err

    words = ("label", pictures, "--teacher", teacher, "--out", out)
    told = crosspatch(*words)
    assert told.code == 0, told.err
    for word in ("labels.safetensors", "60 pictures, 4x4 places each, all of 5 classes kept",
                 "of the places", "pictures a second", "train", "--labels"):  # fmt: skip
        assert word in told.out
    assert max(map(len, told.out.replace(str(tmp_path), "").splitlines())) < 160

    again = crosspatch(*words, "--json")
    assert (again.code, "nothing is overwritten" in again.err) == (2, True)
    assert json.loads(again.out)["error"]["exit_code"] == 2
    small = crosspatch(*words[:-1], tmp_path / "top", "--top", "2", "--json").json
    assert (small["top"], small["grid"], small["skipped"]) == (2, [4, 4], [])
    assert small["agreement"]["unseen_images"] > 0

    student = tmp_path / "student"
    done = crosspatch("train", pictures, *model, "--labels", out, "--out", student, "--json")
    assert done.code == 0, done.err
    assert done.json["objective"] == "token-labeling"
    assert crosspatch("eval", student, pictures, "--json").code == 0

    other = crosspatch("train", "digits", *model, "--labels", out, "--out", tmp_path / "x")
    assert (other.code, "of 5 classes" in other.err) == (3, True)
    assert not (tmp_path / "x" / "config.toml").exists()
    wrong = crosspatch("label", pictures, "--teacher", digits_run, "--out", tmp_path / "y")
    assert (wrong.code, "has other classes" in wrong.err) == (2, True)
    none = crosspatch("label", pictures)
    assert (none.code, "--teacher" in none.err) == (2, True)
