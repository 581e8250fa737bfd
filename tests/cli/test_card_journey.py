"""card.md: written by train, renewed by export and verify; a card that fails spoils nothing."""

from __future__ import annotations

import json
import shutil

import pytest


@pytest.fixture
def run(digits_run, tmp_path):
    return shutil.copytree(digits_run, tmp_path / "run")


def test_training_writes_a_card(digits_run):
    text = (digits_run / "card.md").read_text()
    assert "[arXiv 2103.14899](https://arxiv.org/abs/2103.14899)" in text
    assert "It has seen only grey pictures, none in colour" in text
    assert "shorter side of 8 to 8 pixels" in text
    assert "nothing was exported" in text
    assert json.loads((digits_run / "report.json").read_text())["processor"]


def test_export_and_verify_tell_the_card_what_they_found(crosspatch, run, pictures, untraced):
    assert crosspatch("export", run).code == 0
    text = (run / "card.md").read_text()
    assert "bundle.onnx, when it was exported: at most" in text
    assert "bundle.onnx, on real pictures: not measured" in text
    done = crosspatch("verify", run / "bundle.onnx", pictures)
    assert done.code == 0
    assert "card.md was not written" not in done.out + done.err
    text = (run / "card.md").read_text()
    assert "bundle.onnx, when it was exported: at most" in text
    assert "60 of 60 answers as torch's" in text
    assert "nothing on 60 pictures: every answer is the same" in text
    assert "onnxruntime fp32 (bundle.onnx) |" in text


def test_a_card_that_cannot_be_written_spoils_nothing(crosspatch, run, untraced):
    (run / "card.md").unlink()
    (run / "card.md").mkdir()
    done = crosspatch("export", run, "--json")
    assert done.code == 0
    assert json.loads(done.out)["bundle"].endswith("bundle.onnx")
    assert "card.md was not written" in done.err


def test_a_bundle_elsewhere_leaves_the_run_as_it_is(crosspatch, run, tmp_path, untraced):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert crosspatch("export", run, "--out", tmp_path / "elsewhere.onnx").code == 0
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
