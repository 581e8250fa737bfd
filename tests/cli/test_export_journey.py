# SPDX-License-Identifier: Apache-2.0
"""`crosspatch export`: from a run to files that answer, and what a person reads meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from crosspatch.deploy.bundle import check_pictures, read_bundle
from crosspatch.deploy.engines import open_engine


@pytest.fixture
def exported(digits_bundle: Path, tmp_path: Path) -> Path:
    """The run on digits with its bundle, for one test to write in."""
    return Path(shutil.copytree(digits_bundle.parent, tmp_path / "run"))


def test_a_run_becomes_a_file_that_answers_like_the_run(exported: Path) -> None:
    bundle = read_bundle(exported / "bundle.onnx")
    assert bundle.info.accuracy["split"] == "test"
    answers = open_engine(bundle).run(check_pictures(bundle.info.preprocess.size))
    assert np.abs(answers - np.array(bundle.info.check)).max() < 1e-5
    assert (exported / "client.py").is_file()
    assert not list(exported.glob(".writing-*"))


def test_the_screen_says_what_was_written_and_what_comes_next(
    exported: Path, crosspatch, untraced: None
) -> None:
    answer = crosspatch("export", exported)
    assert answer.code == 0
    for words in ("bundle.onnx", "MB, fp32", "test accuracy of the run", "temperature",
                  "self-check", "crosspatch verify", "crosspatch predict"):  # fmt: skip
        assert words in answer.out
    assert max(map(len, answer.out.replace(str(exported), "run").splitlines())) <= 80
    assert crosspatch("export", exported, "--out", exported / "config.toml").code == 2


def test_a_bundle_that_explains_says_so(exported: Path, crosspatch) -> None:
    answer = crosspatch("export", exported, "--explain", "--out", exported / "explained.onnx")
    assert answer.code == 0
    assert "what each patch gave" in answer.out
    bundle = read_bundle(exported / "explained.onnx")
    assert bundle.info.explains
    assert bundle.info.sure == read_bundle(exported / "bundle.onnx").info.sure
    pictures = check_pictures(bundle.info.preprocess.size)
    probabilities, patches = open_engine(bundle).explain(pictures)
    assert np.abs(probabilities - np.array(bundle.info.check)).max() < 1e-5
    assert np.isfinite(patches).all()
    assert np.ptp(patches) > 0
    torch = crosspatch("export", exported, "--explain", "--to", "torch")
    assert torch.code == 2
    assert "--to torch" in torch.err


def test_int8_and_static_are_smaller_and_still_agree(
    exported: Path, crosspatch, untraced: None
) -> None:
    whole = read_bundle(exported / "bundle.onnx")
    images = np.random.default_rng(0).integers(
        0, 256, (64, *whole.info.preprocess.size, 3), dtype=np.uint8
    )
    expected = open_engine(whole).run(images)
    for option, name in (("--int8", "bundle-int8.onnx"), ("--static", "bundle-int8-static.onnx")):
        answer = crosspatch("export", exported, option, "--json")
        assert answer.code == 0
        assert answer.json["bundle"] == str(exported / name)
        bundle = read_bundle(exported / name)
        assert bundle.size == answer.json["size"] < 0.7 * whole.size
        assert bundle.info.precision == answer.json["precision"]
        found = open_engine(bundle).run(images)
        assert (found.argmax(1) == expected.argmax(1)).mean() > 0.9


def test_openvino_reads_the_int8_graph(exported: Path, crosspatch, untraced: None) -> None:
    answer = crosspatch("export", exported, "--to", "openvino", "--int8", "--json")
    assert answer.code == 0
    bundle = read_bundle(exported / "bundle-int8.xml")
    assert bundle.info.precision == "int8-dynamic"
    images = check_pictures(bundle.info.preprocess.size)
    found = open_engine(bundle, "openvino").run(images)
    assert np.abs(found - np.array(bundle.info.check)).max() < 0.1


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--to", "onx"], 2, "onnx"),
        (["--to", "torch", "--int8"], 2, "--to onnx --int8"),
        (["--data", "digits"], 2, "add --static"),
        (["--out", "none/b.onnx"], 2, "no such folder"),
        (["--out", "b.bin"], 2, "--out b.onnx"),
        (["--static", "--data", "none"], 3, "add --data PICTURES"),
    ],
)
def test_mistakes_are_answered_in_three_parts(
    exported: Path, crosspatch, monkeypatch, tmp_path, words: list, code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = crosspatch("export", exported, *words)
    assert answer.code == code
    assert says in answer.err
    assert "Traceback" not in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_run_at_all(crosspatch, tmp_path: Path) -> None:
    assert crosspatch("export", tmp_path / "none").code == 2
    answer = crosspatch("export", tmp_path)
    assert answer.code == 3
    assert "config.json does not exist" in answer.err
