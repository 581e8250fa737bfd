# SPDX-License-Identifier: Apache-2.0
"""A run, the same with fewer tokens, and everything that can be done with that: what a newcomer
types, in this order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def reduced(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared run on digits, fine-tuned with tome."""
    from crosspatch.cli.main import main

    out = tmp_path_factory.mktemp("reduced") / "run"
    words = ["train", "digits", "--weights", str(digits_run), "--epochs", "1", "--out", str(out)]
    assert main([*words, "--reduce", "tome:r=6", "--json"]) == 0
    return out


def test_from_training_to_a_verified_file(crosspatch, reduced: Path, pictures: Path) -> None:
    report = json.loads((reduced / "report.json").read_text())
    assert (report["reduce"], report["objective"]) == ("tome:r=6", "supervised")
    judged = crosspatch("eval", reduced, "digits", "--json").json
    assert judged["reduction"] == "tome:r=6"
    assert abs(judged["accuracy"] - report["test"]["accuracy"]) < 1e-9
    answer = crosspatch("predict", reduced, pictures, "--json")
    assert answer.json["reduction"] == "tome:r=6"

    made = crosspatch("export", reduced)
    assert made.code == 0, made.err
    assert "tokens reduced by tome:r=6" in made.out
    bundle = reduced / "bundle.onnx"
    same = crosspatch("predict", bundle, pictures, "--json").json
    assert same["reduction"] == "tome:r=6"
    assert [row["top"][0]["class"] for row in same["predictions"]] == [
        row["top"][0]["class"] for row in answer.json["predictions"]
    ]
    checked = crosspatch("verify", bundle, pictures)
    assert checked.code == 0, checked.out
    assert "tokens reduced by tome:r=6" in checked.out
    small = crosspatch("export", reduced, "--int8", "--static", "--out", reduced / "small.onnx")
    assert small.code == 0, small.err
    assert crosspatch("verify", reduced / "small.onnx", pictures, "--json").json["ok"]


def test_the_first_screen_says_what_is_saved(crosspatch, reduced: Path, tmp_path: Path) -> None:
    words = ("train", "digits", "--weights", reduced, "--epochs", 1)
    answer = crosspatch(*words, "--out", tmp_path / "run")
    said = " ".join(answer.out.split())
    assert "crossvit_micro_32, reduced by tome:r=6" in said
    assert "Tokens are reduced by tome:r=6: fine from" in said
    assert "million multiply-adds (-" in said
    refused = crosspatch(*words, "--out", tmp_path / "x", "--reduce", "tome:r=1")
    assert refused.code == 2
    assert "is reduced by tome:r=6 already" in refused.err
    assert not (tmp_path / "x" / "config.toml").exists()
    run = tmp_path / "run"
    for change in ("--reduce", "tome:r=2"), ("--objective", "supervised"):
        forced = crosspatch("train", "digits", "--out", run, "--resume", "--force", *change)
        assert forced.code == 2
        assert "cannot change while a run is under way" in forced.err or "has ended" in forced.err


@pytest.mark.parametrize("spec", ["melt", "tome:q=1", "tome:r=999", "tome:r=-1", "tome:r"])
def test_what_no_model_can_have_is_wrong_usage(crosspatch, spec: str, tmp_path: Path) -> None:
    answer = crosspatch("train", "digits", "--reduce", spec, "--out", tmp_path / "run")
    assert answer.code == 2
    error, expected, do = answer.err.strip().splitlines()[:3]
    assert error.startswith("error")
    assert expected.strip()
    assert do.startswith("try")
