"""`crosspatch predict RUN IMG --explain out.html`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.fixture(scope="module")
def hostile_run(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classes are called what nobody should call them."""
    run = tmp_path_factory.mktemp("hostile") / "a run"
    shutil.copytree(digits_run, run)
    path = run / "model" / "config.json"
    config = json.loads(path.read_text())
    config["class_names"] = [f"{HOSTILE}{i}\x1b[31m\n" for i in range(10)]
    path.write_text(json.dumps(config))
    return run


def test_a_page_says_why(crosspatch, digits_run: Path, pictures: Path, tmp_path: Path) -> None:
    page = tmp_path / "why.html"
    named = sorted((pictures / "3").iterdir())[:2]
    answer = crosspatch("predict", digits_run, *named, "--explain", page)
    assert answer.code == 0, answer.err
    assert "why.html: why, for 2 pictures" in answer.out.replace("\n", "")
    html = page.read_text()
    for part in (
        "Which branch decides",
        "Where it looked",
        "What the fusions take",
        "Do these parts matter?",
        named[1].name,
    ):
        assert part in html
    assert "<script" not in html
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)
    told = crosspatch("predict", digits_run, named[0], "--explain", page, "--json").json
    assert told["explained"] == str(page)


def test_names_are_no_markup(crosspatch, hostile_run: Path, pictures: Path, tmp_path: Path) -> None:
    picture = tmp_path / "<script>alert(1) \udc80\x1b[0m.png"
    shutil.copy(next((pictures / "3").iterdir()), picture)
    answer = crosspatch("predict", hostile_run, picture, "--explain", tmp_path / "why.html")
    assert answer.code == 0, answer.err
    html = (tmp_path / "why.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_what_cannot_be_explained_is_refused_before_anything_is_written(
    crosspatch, digits_run: Path, pictures: Path, tmp_path: Path
) -> None:
    picture = next((pictures / "3").iterdir())
    bundle = tmp_path / "bundle.onnx"
    bundle.write_bytes(b"x")
    cases = [
        ((digits_run, picture, "--explain", tmp_path / "a.png"), 2, "ends in .html"),
        ((digits_run, picture, "--explain", tmp_path / "none" / "a.html"), 2, "no such folder"),
        ((digits_run, pictures, "--explain", tmp_path / "a.html"), 2, "8 pictures or fewer"),
        ((bundle, picture, "--explain", tmp_path / "a.html"), 2, "the folder of a run"),
    ]
    for words, code, said in cases:
        answer = crosspatch("predict", *words)
        assert answer.code == code, said
        assert said in " ".join(answer.err.split())
        assert "Traceback" not in answer.err
    assert list(tmp_path.iterdir()) == [bundle]


def test_a_damaged_picture_is_left_out(
    crosspatch, digits_run: Path, pictures: Path, tmp_path: Path
) -> None:
    bad, page = tmp_path / "bad.png", tmp_path / "why.html"
    bad.write_bytes(b"\x89PNG")
    good = next((pictures / "3").iterdir())
    answer = crosspatch("predict", digits_run, bad, good, "--explain", page)
    assert answer.code == 0
    assert "bad.png" in answer.out
    assert page.read_text().count('<section id="p') == 1
    assert crosspatch("predict", digits_run, bad, "--explain", tmp_path / "x.html").code == 3
    assert not (tmp_path / "x.html").exists()
