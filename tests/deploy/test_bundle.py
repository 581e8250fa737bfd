# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.bundle import (
    KEY,
    SCHEMA,
    BundleInfo,
    check_pictures,
    needed,
    read_bundle,
)
from crosspatch.errors import DataError, UsageError


def info(**given) -> BundleInfo:
    usual = {
        "classes": ("a", "b"),
        "preprocess": Preprocess((8, 12), (8, 12)),
        "architecture": "vit_micro_32",
        "parameters": 10,
        "macs": 20,
        "weights": "0" * 64,
        "check": ((0.25, 0.75), (0.5, 0.5)),
    }
    return BundleInfo(**(usual | given))


def write(path, text: str | None, *, outside: str = "") -> None:
    """A graph that passes its input on, with `text` as its description."""
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [None, 2])
    answer = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, 2])
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [2], [1.0, 2.0])
    if outside:
        weight.ClearField("float_data")
        weight.data_location = TensorProto.EXTERNAL
        entry = weight.external_data.add()
        entry.key, entry.value = "location", outside
    nodes = [helper.make_node("Mul", ["image", "weight"], ["probabilities"])]
    if outside == "deep":
        weight.name = "inner"
        node = helper.make_node("Constant", [], ["weight"], value=weight)
        graph = helper.make_graph([node, *nodes], "g", [image], [answer])
    else:
        graph = helper.make_graph(nodes, "g", [image], [answer], [weight])
    model = helper.make_model(graph)
    if text is not None:
        helper.set_model_props(model, {KEY: text})
    path.write_bytes(model.SerializeToString())


def test_a_description_survives_its_own_file(tmp_path) -> None:
    before = info(temperature=1.5, calibrated_on=7, accuracy={"split": "test", "accuracy": 0.5})
    write(tmp_path / "b.onnx", before.to_json())
    bundle = read_bundle(tmp_path / "b.onnx")
    assert bundle.info == before
    assert bundle.format == "onnx"
    assert bundle.size == (tmp_path / "b.onnx").stat().st_size
    assert len(bundle.hash) == 64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": SCHEMA + 1}, "update crosspatch"),
        ({"classes": []}, "classes"),
        ({"classes": [1, 2]}, "classes"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": "hot"}, "makes no sense"),
        ({"precision": "int3"}, "precision"),
        ({"check": [[1.0]]}, "check"),
        ({"preprocess": {"size": [8, 8]}}, "makes no sense"),
        ({"preprocess": None}, "makes no sense"),
        (
            {"preprocess": Preprocess((8, 12), (8, 90_000)).to_dict()},
            "pixels",
        ),
        ({"surplus": 1}, "makes no sense"),
        ({"schema": "one"}, "no readable description"),
    ],
)
def test_impossible_descriptions_are_refused(tmp_path, change: dict, says: str) -> None:
    write(tmp_path / "b.onnx", json.dumps(json.loads(info().to_json()) | change))
    with pytest.raises(DataError, match=says):
        read_bundle(tmp_path / "b.onnx")


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null"])
def test_files_that_do_not_say_what_they_are_are_refused(tmp_path, text) -> None:
    write(tmp_path / "b.onnx", text)
    with pytest.raises(DataError, match=r"description|does not say"):
        read_bundle(tmp_path / "b.onnx")


@pytest.mark.parametrize("outside", ["../../secret", "deep"])
def test_weights_outside_the_file_are_refused_wherever_they_hang(tmp_path, outside) -> None:
    write(tmp_path / "b.onnx", info().to_json(), outside=outside)
    with pytest.raises(DataError, match="outside of it"):
        read_bundle(tmp_path / "b.onnx")


def test_what_is_no_bundle_is_refused(tmp_path) -> None:
    (tmp_path / "b.onnx").write_bytes(b"\xff\xd8\xff no model at all")
    with pytest.raises(DataError, match="cannot be read as ONNX"):
        read_bundle(tmp_path / "b.onnx")
    with pytest.raises(UsageError, match="does not exist"):
        read_bundle(tmp_path / "none.onnx")
    (tmp_path / "b.pt2").write_bytes(b"")
    with pytest.raises(UsageError, match="not loaded here"):
        read_bundle(tmp_path / "b.pt2")
    (tmp_path / "b.xml").write_text("<net/>")
    with pytest.raises(DataError, match=r"\.bin is missing"):
        read_bundle(tmp_path / "b.xml")
    (tmp_path / "b.bin").write_bytes(b"")
    with pytest.raises(DataError, match="does not say what it is"):
        read_bundle(tmp_path / "b.xml")


def test_an_absent_package_is_named_with_the_command_that_brings_it(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(UsageError, match=r"crosspatch\[openvino\]"):
        needed("openvino")


def test_check_pictures_are_pictures() -> None:
    pictures = check_pictures((24, 40))
    assert pictures.shape == (2, 24, 40, 3)
    assert pictures.dtype == np.uint8
    assert (np.ptp(pictures, axis=(1, 2)) > 100).all()
    assert (pictures[0] != pictures[1]).mean() > 0.5


def test_onnx_keeps_the_key_where_a_client_finds_it(tmp_path) -> None:
    write(tmp_path / "b.onnx", info().to_json())
    entries = {entry.key for entry in onnx.load(tmp_path / "b.onnx").metadata_props}
    assert entries == {"crosspatch"}
