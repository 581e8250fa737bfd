"""`crosspatch verify`: the exported file against the trained model, for people and programs."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from crosspatch.deploy import verify as room
from crosspatch.deploy.quantise import quantise_dynamic
from support.bundles import write_bundle


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SECONDS", 0.05)


def damaged(bundle: Path, path: Path) -> Path:
    """A copy whose classes are shifted by one: what a wrong export looks like."""
    model = onnx.load(bundle)
    last = [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")][-1]
    for tensor in model.graph.initializer:
        if tensor.name in last.input and len(tensor.dims) == 2:
            values = numpy_helper.to_array(tensor)
            axis = list(values.shape).index(10)
            rolled = numpy_helper.from_array(values[::-1] if axis == 0 else values[:, ::-1])
            rolled.name = tensor.name
            tensor.CopyFrom(rolled)
    onnx.save(model, path)
    return path


def test_a_whole_bundle_is_confirmed(crosspatch, digits_bundle, pictures) -> None:
    answer = crosspatch("verify", digits_bundle, pictures, "gone.png")
    assert answer.code == 0
    for part in (
        f"the torch model of {digits_bundle.parent} (the same weights)", "on 60 pictures",
        "onnxruntime fp32", "openvino fp32", "torch fp32", "60 of 60", " ms", "1.00x",
        "1 name could not be read", "gone.png: no such file",
        "every engine answers as the trained model does",
    ):  # fmt: skip
        assert part in answer.out
    table = answer.out.split("pictures\n")[1].split("1 name")[0]
    assert max(map(len, table.splitlines())) <= 80


def test_json_says_everything(crosspatch, digits_bundle, digits_run, pictures) -> None:
    answer = crosspatch("verify", digits_bundle, pictures, "--against", digits_run, "--json")
    assert answer.code == 0
    said = answer.json
    assert (said["ok"], said["same_weights"], said["pictures"], said["do"]) == (
        True,
        True,
        60,
        None,
    )
    assert said["run"] == str(digits_run)
    assert (len(said["sha256"]), len(said["weights"])) == (64, 64)
    assert said["size"] == digits_bundle.stat().st_size
    for one in said["engines"]:
        assert one["agreed"] == 60
        assert max(one["difference"], one["check"]) < 1e-4
    only = crosspatch("verify", digits_bundle, pictures, "--engine", "openvino", "--json").json
    assert [one["engine"] for one in only["engines"]] == ["openvino"]


def test_a_wrong_export_is_found_and_what_to_do_is_said(
    crosspatch, digits_bundle, digits_run, pictures, tmp_path
) -> None:
    wrong = damaged(digits_bundle, tmp_path / "wrong.onnx")
    answer = crosspatch("verify", wrong, pictures, "--against", digits_run)
    assert answer.code == 1
    for part in (
        "mismatch  onnxruntime fp32: its answers to the check pictures",
        "pictures get another class than torch fp32 gives", "a probability is off by",
        f"try       crosspatch export {digits_run} --to onnx",
    ):  # fmt: skip
        assert part in answer.out
    alone = crosspatch("verify", wrong, "--json")  # no run, no picture: the check pictures find it
    assert (alone.code, alone.json["ok"], alone.json["pictures"]) == (1, False, 0)
    assert "export RUN" in alone.json["do"]


def test_int8_that_answers_something_else_is_found(
    crosspatch, digits_bundle, digits_run, pictures, tmp_path
) -> None:
    small = tmp_path / "bundle-int8.onnx"
    quantise_dynamic(digits_bundle, small)
    good = crosspatch("verify", small, pictures, "--against", digits_run)
    assert good.code == 0
    assert "onnxruntime int8" in good.out
    unjudged = crosspatch("verify", small, pictures)
    assert "int8 was compared with no model: --against RUN" in unjudged.out
    answer = crosspatch("verify", damaged(small, small), pictures, "--against", digits_run)
    assert answer.code == 1
    assert "97% are asked for" in answer.out
    assert "--int8 --static, or keep fp32" in answer.out


def test_a_bundle_away_from_its_run_is_held_against_what_it_carries(
    crosspatch, digits_bundle, pictures, tmp_path
) -> None:
    shutil.copy(digits_bundle, tmp_path)
    answer = crosspatch("verify", tmp_path / "bundle.onnx", pictures)
    assert answer.code == 0
    for part in ("--against RUN", "60 pictures, the engines with each other",
                 "the check pictures get the answers that torch gave"):  # fmt: skip
        assert part in answer.out
    assert "torch fp32" not in answer.out
    assert "its check pictures alone" in crosspatch("verify", tmp_path / "bundle.onnx").out


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["gone.onnx"], 2, "does not exist"),
        (["run"], 2, "is not a bundle"),
        (["b.onnx", "--against", "gone"], 2, "gone does not exist"),
        (["b.onnx", "--engine", "torch"], 2, '"openvino-bf16"'),
        (["b.onnx", "gone.png"], 3, "nothing could be read: gone.png"),
        (["cut.onnx"], 3, "cannot be read as ONNX"),
        (["newer.onnx"], 3, "update crosspatch"),
        (["outside.onnx"], 3, "refers to data outside of it"),
        (["nan.onnx"], 3, "not numbers"),
    ],
    ids=lambda value: str(value),
)
def test_what_cannot_be_verified(crosspatch, tmp_path, monkeypatch, words, code, says) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    whole = write_bundle(tmp_path / "b.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[:300])
    write_bundle(tmp_path / "nan.onnx", scale=3e38)
    model = onnx.load("b.onnx")
    text = model.metadata_props[0].value
    onnx.helper.set_model_props(model, {"crosspatch": text.replace('"schema": 1', '"schema": 9')})
    onnx.save(model, "newer.onnx")
    onnx.save(onnx.load("b.onnx"), "outside.onnx", save_as_external_data=True, size_threshold=0)
    answer = crosspatch("verify", *words)
    assert answer.code == code
    assert says in answer.err
    assert len(answer.err.splitlines()) == 3
    in_json = crosspatch("verify", *words, "--json")
    assert in_json.code == code
    assert in_json.json["error"]["exit_code"] == code
