"""The page at the end of a training, and of `eval --report`."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from crosspatch.report import run as pages

pytestmark = pytest.mark.pages


def test_a_training_ends_with_its_page(digits_run: Path) -> None:
    html = (digits_run / "report.html").read_text(encoding="utf-8")
    report = json.loads((digits_run / "report.json").read_text(encoding="utf-8"))
    assert f"{100 * report['test']['accuracy']:.1f} % accuracy" in html
    assert "What it cannot do" in html
    assert "data:image/jpeg;base64," in html
    assert "<script" not in html
    assert report["evidence"]["left_out"] == {}
    assert report["test"]["reliability"]["before"]
    with (digits_run / "label_errors.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert set(rows[0]) == {"path", "label", "suggested", "score"}


def test_the_page_is_written_again_without_measuring_again(digits_run: Path, tmp_path) -> None:
    run = shutil.copytree(digits_run, tmp_path / "run")
    kept = (run / "report.json").read_text()
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    assert pages.write_report(run).read_text() == before
    assert (run / "report.json").read_text() == kept


def test_eval_writes_a_page(crosspatch, digits_run, pictures, tmp_path) -> None:
    page = tmp_path / "own.html"
    answer = crosspatch("eval", digits_run, "digits", "--report", page)
    assert answer.code == 0
    assert f"open {page}" in answer.out
    assert "Worse pictures" in page.read_text()
    other = crosspatch("eval", digits_run, pictures, "--report", page, "--json")
    assert other.code == 0
    assert other.json["images"] == 60
    text = page.read_text()
    assert "60 pictures" in text
    assert "Worse pictures" not in text  # measured on other pictures than these


def test_a_bundle_away_from_its_run_gets_a_page(crosspatch, digits_bundle, pictures, tmp_path):
    shutil.copy(digits_bundle, tmp_path)
    words = ("eval", tmp_path / "bundle.onnx", pictures, "--engine", "onnxruntime")
    answer = crosspatch(*words, "--report", tmp_path / "page.html")
    assert answer.code == 0, answer.err
    assert "How it was made" not in (tmp_path / "page.html").read_text()


def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    crosspatch, digits_run, tmp_path
) -> None:
    answer = crosspatch("eval", digits_run, "digits", "--report", tmp_path / "none" / "p.html")
    assert answer.code == 2
    assert "--report" in answer.err


def test_a_page_that_fails_spoils_no_run(crosspatch, tmp_path, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> Path:
        raise RuntimeError("no page today")

    monkeypatch.setattr(pages, "write_report", fail)
    run = tmp_path / "run"
    words = ("train", "digits", "--epochs", 1, "--model", "vit_micro_32", "--size", 16)
    answer = crosspatch(*words, "--out", run)
    assert answer.code == 0
    assert "no page today" in answer.out
    assert f"crosspatch eval {run} digits --report" in answer.out
    assert (run / "report.json").is_file()
    assert not (run / "report.html").exists()


def test_ctrl_c_in_the_page_leaves_the_run_whole(crosspatch, digits_run, monkeypatch) -> None:
    from crosspatch.cli import pages as told
    from crosspatch.cli.screen import Screen
    from crosspatch.errors import Interrupted

    def stopped() -> Path:
        raise KeyboardInterrupt

    with Screen() as screen, pytest.raises(Interrupted, match="is whole"):
        told.told(screen, digits_run, stopped, "crosspatch eval x y --report z")
