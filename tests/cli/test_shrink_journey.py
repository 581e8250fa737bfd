# SPDX-License-Identifier: Apache-2.0
"""`crosspatch shrink`: what a newcomer types, and what is there afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from crosspatch.deploy import shrink as room
from crosspatch.deploy.bundle import read_bundle
from crosspatch.deploy.shrink import candidates, timing
from crosspatch.deploy.shrink.choose import complete
from crosspatch.errors import DataError
from crosspatch.training.package import load_model


@pytest.fixture
def run(vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on digits, for one test to write in; one reduction is tried, and timed in a blink."""
    monkeypatch.setattr(candidates, "LADDERS", ("evovit",))
    monkeypatch.setattr(candidates, "SHARES", (0.85,))
    monkeypatch.setattr(timing, "SHORTEST", 0.02)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    return Path(shutil.copytree(vit_run, tmp_path / "run"))


def test_from_a_run_to_a_small_verified_bundle(
    crosspatch, run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reduced network is chosen here whatever the clock says: it has the longest way to go."""

    def reduced(rows, budget):
        return next(one for one in rows if one.method and complete(one))

    monkeypatch.setattr(room.choose, "choose", reduced)
    weights = (run / "model" / "model.safetensors").read_bytes()
    answer = crosspatch("shrink", run, "--max-drop", 100, "--time", "10m")
    assert answer.code == 0, answer.err
    said = " ".join(answer.out.split())
    for words in ("validation pictures judge every candidate", "as it is,", "evovit stages",
                  "onnxruntime int8-dynamic", "chosen: evovit", "test pictures, looked at once",
                  "crosspatch verify", "crosspatch predict"):  # fmt: skip
        assert words in said
    assert max(map(len, answer.out.replace(str(run), "run").splitlines())) <= 80
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    bundle = run / "bundle-small.onnx"
    info = read_bundle(bundle).info
    assert info.reduction.startswith("evovit:")
    assert info.accuracy["split"] == "test"
    chosen = run / "shrink" / "chosen"
    assert load_model(chosen).reduction == info.reduction
    checked = crosspatch("verify", bundle, pictures, "--json")
    assert checked.code == 0, checked.out
    assert checked.json["run"] == str(chosen)
    assert checked.json["same_weights"]
    assert crosspatch("verify", bundle, pictures, "--against", run).code == 0
    assert crosspatch("eval", bundle, "digits", "--json").code == 0

    judged = crosspatch("eval", chosen, "digits", "--json").json
    assert abs(judged["accuracy"] - info.accuracy["accuracy"]) < 0.02


def test_a_budget_that_nothing_keeps_is_a_finding(crosspatch, run: Path) -> None:
    answer = crosspatch("shrink", run, "--size", "1kB", "--time", "1s", "--json")
    assert answer.code == 1
    assert answer.json["chosen"] == ""
    assert "nothing that was tried keeps the budget" in answer.json["words"][0]
    assert not (run / "bundle-small.onnx").exists()
    small = crosspatch("shrink", run, "--resume", "--time", "1s", "--json", "--out", run / "s.onnx")
    assert small.code == 0
    assert small.json["bundle"] == str(run / "s.onnx")
    assert len(small.json["rows"]) >= len(answer.json["rows"])
    assert crosspatch("verify", run / "s.onnx").code == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--max-drop", "-1"], 2, "from 0 to 100"),
        (["--max-drop", "x"], 2, "from 0 to 100"),
        (["--max-drop", "101"], 2, "from 0 to 100"),
        (["--latency", "20"], 2, "--latency 20ms"),
        (["--latency", "0ms"], 2, "--latency 20ms"),
        (["--size", "5"], 2, "--size 5MB"),
        (["--size", "0MB"], 2, "--size 5MB"),
        (["--finetune", "x"], 2, "--finetune 10m"),
        (["--threads", "0"], 2, "--threads 1"),
        (["--threads", "9999"], 2, "this process may use"),
        (["--resume"], 2, "holds no search to go on with"),
        (["--out", "small.xml"], 2, ".onnx"),
        (["--data", "nowhere"], 3, "--data PICTURES"),
    ],
)
def test_mistakes_are_answered_in_three_parts(
    crosspatch, run: Path, monkeypatch, tmp_path: Path, words, code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = crosspatch("shrink", run, *words)
    assert answer.code == code, answer.err
    assert says in answer.err
    assert "Traceback" not in answer.err
    assert not list(run.glob("bundle*"))
    assert not (run / "shrunk.json").exists()


def test_what_is_no_run(crosspatch, digits_bundle: Path, tmp_path: Path) -> None:
    answer = crosspatch("shrink", digits_bundle)
    assert answer.code == 2
    assert "a bundle cannot be made smaller" in answer.err
    assert crosspatch("shrink", tmp_path).code == 3


def test_pictures_that_have_moved_are_asked_for(run: Path) -> None:
    config = run / "config.toml"
    config.write_text(config.read_text().replace('data = "digits"', 'data = "gone/away"'))
    trained = load_model(run)
    with pytest.raises(DataError, match="--data PICTURES"):
        room.pictures(run, trained, "val")
    found = room.pictures(run, trained, "val", "digits")
    report = json.loads((run / "report.json").read_text())
    assert len(found) == report["split"]["val"]
    assert len(room.pictures(run, trained, "test", "digits")) == report["split"]["test"]
