# SPDX-License-Identifier: Apache-2.0
"""A run, the same with fewer tokens, and everything that can be done with that: what a newcomer
types, in this order."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from crosspatch.cli.main import main
from crosspatch.deploy import export
from support.once import once, shared

REDUCE = "tome:r=6/0/0/2,proportional=no"


@pytest.fixture(scope="session")
def reduced(vit_run: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A run on digits, fine-tuned with tome: read it, change nothing in it."""

    def make(folder: Path) -> None:
        words = ["train", "digits", "--epochs", "1", "--json", "--weights", str(vit_run)]
        assert main([*words, "--out", str(folder), "--reduce", REDUCE]) == 0

    return once(shared(tmp_path_factory, worker_id) / "reduced", make)


def test_from_training_to_a_verified_file(
    crosspatch, reduced: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduced = Path(shutil.copytree(reduced, tmp_path / "run"))
    report = json.loads((reduced / "report.json").read_text())
    assert (report["reduce"], report["objective"]) == (REDUCE, "supervised")
    judged = crosspatch("eval", reduced, "digits", "--json").json
    assert judged["reduction"] == REDUCE
    assert abs(judged["accuracy"] - report["test"]["accuracy"]) < 1e-9
    answer = crosspatch("predict", reduced, pictures, "--json")
    assert answer.json["reduction"] == REDUCE

    made = crosspatch("export", reduced)
    assert made.code == 0, made.err
    assert f"tokens reduced by {REDUCE}" in made.out
    bundle = reduced / "bundle.onnx"
    same = crosspatch("predict", bundle, pictures, "--json").json
    assert same["reduction"] == REDUCE
    assert [row["top"][0]["class"] for row in same["predictions"]] == [
        row["top"][0]["class"] for row in answer.json["predictions"]
    ]
    checked = crosspatch("verify", bundle, pictures)
    assert checked.code == 0, checked.out
    assert f"tokens reduced by {REDUCE}" in checked.out
    graph = lambda _, shop, info: Path(shutil.copy(bundle, shop / "whole.onnx"))
    monkeypatch.setattr(export, "_write_onnx", graph)
    small = crosspatch("export", reduced, "--int8", "--static", "--out", reduced / "small.onnx")
    assert small.code == 0, small.err
    assert crosspatch("verify", reduced / "small.onnx", pictures, "--json").json["ok"]


def test_the_first_screen_says_what_is_saved(crosspatch, reduced: Path, tmp_path: Path) -> None:
    words = ("train", "digits", "--weights", reduced, "--epochs", 1)
    answer = crosspatch(*words, "--out", tmp_path / "run")
    said = " ".join(answer.out.split())
    assert f"vit_micro_32, reduced by {REDUCE}" in said
    assert f"Tokens are reduced by {REDUCE}: from 17 to" in said
    assert "million multiply-adds (-" in said
    refused = crosspatch(*words, "--out", tmp_path / "x", "--reduce", "tome:r=1")
    assert refused.code == 2
    assert f"is reduced by {REDUCE} already" in refused.err
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


def test_what_happens_to_the_patches_is_drawn(
    crosspatch, reduced: Path, pictures: Path, tmp_path: Path
) -> None:
    picture, drawing = next((pictures / "3").iterdir()), tmp_path / "tokens.png"
    answer = crosspatch("predict", reduced, picture, "--show-tokens", drawing)
    assert answer.code == 0
    assert "tokens.png: 17 to 9 tokens in 2 blocks" in answer.out.replace("\n", "")
    with Image.open(drawing) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 3 * 224  # the picture and two panels
    told = crosspatch("predict", reduced, picture, "--show-tokens", drawing, "--json").json
    assert [(one["block"], one["leaving"]) for one in told["tokens"]] == [(0, 11), (3, 9)]


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        (("run", "a", "b", "t.png"), 2, "one picture"),
        (("run", "a", "t.tiff"), 2, "a file that ends in .png"),
        (("run", "a", "missing/t.png"), 2, "no such folder"),
        (("base", "a", "t.png"), 2, "without a reduction"),
    ],
)
def test_drawings_that_cannot_be_made(
    crosspatch, reduced, vit_run, pictures: Path, tmp_path: Path, what, code: int, said: str
) -> None:
    name, *named, target = what
    run = {"run": reduced, "base": vit_run}[name]
    several = [path for path, _ in zip(sorted((pictures / "3").iterdir()), named, strict=False)]
    words = ("predict", run, *several, "--show-tokens", tmp_path / target)
    answer = crosspatch(*words)
    assert answer.code == code
    assert said in " ".join(answer.err.split())
    assert not (tmp_path / target).exists()
