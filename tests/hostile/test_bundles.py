"""Bundles of strangers: graphs that leave the file, never end, or claim what is not there, and
descriptions that lie. Each is refused before an engine sees it, quickly and in little memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import crosspatch as xp
from crosspatch.deploy.bundle import KEY, read_bundle
from crosspatch.errors import CrosspatchError
from hostile.test_models import bounded, quiet, refused  # noqa: F401
from support import foreign
from support import hostile as pictures
from support.bundles import info, write_bundle, write_openvino

Change = Callable[[Any], Any]


@pytest.fixture
def bundle(tmp_path) -> Path:
    Path("a.png").write_bytes(pictures.saved(pictures.picture("discs", 1), "PNG"))
    return write_bundle(tmp_path / "b.onnx")


@pytest.fixture
def pair(bundle, tmp_path) -> Path:
    (tmp_path / "ov").mkdir()
    return write_openvino(tmp_path / "ov" / "b.xml", bundle)


DOORS: dict[str, Callable[[Path], list[object]]] = {
    "predict": lambda path: ["predict", path, "a.png"],
    "verify": lambda path: ["verify", path],
    "predict with an engine": lambda path: ["predict", path, "a.png", "--engine", "openvino"],
}


def everywhere(path: Path, capfd, says: str) -> None:
    """Refused at every door, for the same reason."""
    for words in DOORS.values():
        refused(words(path), capfd, says)
    with pytest.raises(CrosspatchError):
        xp.load(path)


# ------------------------------------------------------------------ 53: graphs


def outside(location: str) -> TensorProto:
    """A tensor whose values lie in another file."""
    made = TensorProto(name="outer", data_type=TensorProto.FLOAT, dims=[2])
    made.data_location = TensorProto.EXTERNAL
    entry = made.external_data.add()
    entry.key, entry.value = "location", location
    return made


def initialised(make: Callable[[], TensorProto]) -> Change:
    return lambda model: model.graph.initializer.append(make())


def constant(model: Any) -> None:
    node = helper.make_node("Constant", [], ["outer"])
    node.attribute.append(helper.make_attribute("value", outside("../secret")))
    model.graph.node.append(node)


def sparse(model: Any) -> None:
    one = model.graph.sparse_initializer.add()
    one.dims.append(9)
    one.values.CopyFrom(outside("../secret"))
    one.indices.CopyFrom(numpy_helper.from_array(np.array([1, 2])))


def sparse_attribute(model: Any) -> None:
    node = helper.make_node("Constant", [], ["outer"])
    attribute = node.attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(outside("../secret"))
    model.graph.node.append(node)


def body(*initialisers: TensorProto) -> Any:
    port = helper.make_tensor_value_info("x", TensorProto.BOOL, [])
    node = helper.make_node("Identity", ["x"], ["y"])
    return helper.make_graph([node], "body", [port], [port], list(initialisers))


def branch(model: Any) -> None:
    inner = body(outside("../secret"))
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    model.graph.node.append(node)


def endless(model: Any) -> None:
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["y"], body=body()))


def function(model: Any) -> None:
    node = helper.make_node("Constant", [], ["o"])
    node.attribute.append(helper.make_attribute("value", outside("../secret")))
    opset = helper.make_opsetid("", 18)
    model.functions.append(helper.make_function("f", "F", [], ["o"], [node], [opset]))


def plain_function(model: Any) -> None:
    node = helper.make_node("Identity", ["i"], ["o"])
    opset = helper.make_opsetid("", 18)
    model.functions.append(helper.make_function("f", "F", ["i"], ["o"], [node], [opset]))


def claim(values: int, held: bytes = b"", kind: int = TensorProto.FLOAT) -> Change:
    def make() -> TensorProto:
        return TensorProto(name="claim", data_type=kind, dims=[values], raw_data=held)

    return initialised(make)


def expanding(model: Any) -> None:
    shape = numpy_helper.from_array(np.array([1 << 20, 1 << 20, 3]), "vast")
    model.graph.initializer.append(shape)
    model.graph.node.append(helper.make_node("Expand", ["weights", "vast"], ["much"]))


def node(kind: str, domain: str = "") -> Change:
    made = helper.make_node(kind, ["x"], ["y"], domain=domain)
    return lambda model: model.graph.node.append(made)


def weight(value: float) -> Change:
    def change(model: Any) -> None:
        values = numpy_helper.to_array(model.graph.initializer[1]).copy()
        values[1, 2] = value
        model.graph.initializer[1].CopyFrom(numpy_helper.from_array(values, "weights"))

    return change


def _misspelt() -> TensorProto:
    return TensorProto.FromString(b"\x08\x01\x10\x01\x42\x02\xff\xfe\x4a\x04" + bytes(4))


OUTSIDE = "refers to data outside of it"
GRAPHS: dict[str, tuple[Change, str]] = {
    **{
        f"data in {place}": (initialised(lambda place=place: outside(place)), OUTSIDE)
        for place in ("../secret", "a/../b", "/etc/passwd", "link", "hard", "b.onnx", "C:\\x", "")
    },
    "data outside, in a node": (constant, OUTSIDE),
    "data outside, in a sparse tensor": (sparse, OUTSIDE),
    "data outside, in a sparse attribute": (sparse_attribute, OUTSIDE),
    "data outside, in a branch": (branch, OUTSIDE),
    "data outside, in a function": (function, OUTSIDE),
    "a loop that never ends": (endless, "asks for the operator 'Loop'"),
    "a scan": (node("Scan"), "asks for the operator 'Scan'"),
    "a function": (plain_function, "functions of its own"),
    "an operator of another domain": (node("Gelu", "com.microsoft"), r"'com\.microsoft\.Gelu'"),
    "an operator of a library": (node("Run", "evil"), r"'evil\.Run'"),
    "numbers at random": (node("RandomNormal"), "'RandomNormal'"),
    "an operator that reads pictures": (node("ImageDecoder"), "'ImageDecoder'"),
    "an operator's name that paints": (node("\x1b[31m"), r"x1b\[31m"),
    "a claim of 2 GB": (claim(1 << 29), "536,870,912 values does not hold them"),
    "a claim beyond 64 bits": (claim((1 << 63) - 1), "does not hold them"),
    "a negative claim": (claim(-1), "impossible shape"),
    "a claim with too little": (claim(2, bytes(7)), "does not hold them"),
    "a claim with too much": (claim(2, bytes(9)), "does not hold them"),
    "a tensor of an unknown type": (claim(2, bytes(2), 77), "type number 77"),
    "a tensor of texts": (claim(0, b"", TensorProto.STRING), "type number 8"),
    "a vast tensor out of a small one": (expanding, "'?Expand'? makes a tensor"),
    "a weight that is NaN": (weight(float("nan")), "'weights' holds values that are not finite"),
    "a weight that is infinite": (weight(float("-inf")), "'weights' holds values that are not"),
    "metadata twice": (
        lambda model: model.metadata_props.append(model.metadata_props[0]), "same thing twice"
    ),
    "a name that is no text": (
        lambda model: model.graph.initializer.append(_misspelt()), "not UTF-8",
    ),
    "no graph": (lambda model: model.ClearField("graph"), "no graph in it"),
    "no description": (lambda model: model.ClearField("metadata_props"), "does not say what it is"),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name, bundle, capfd, request):
    change, says = GRAPHS[name]
    Path("secret").write_bytes(bytes(8))
    os.symlink("/etc/passwd", "link")
    os.link("secret", "hard")
    model = onnx.load(bundle)
    change(model)
    bundle.write_bytes(model.SerializeToString())
    request.getfixturevalue("bounded")
    everywhere(bundle, capfd, says)


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda whole: b"", "it is empty"),
    "a pickle": (lambda whole: foreign.PICKLES["os.system, protocol 2"][0](), "zip archive or a p"),
    "torch's zip": (lambda whole: foreign.torch_zip(), "zip archive or a pickle"),
    "cut": (lambda whole: whole[:-20], "cannot be read as ONNX"),
    "junk behind": (lambda whole: whole + b"\xff" * 99, "cannot be read as ONNX"),
    "a million empty nodes": (
        lambda whole: whole + _message(7, b"\x0a\0" * (1 << 20)), "more than 500,000 parts",
    ),
    "a million names": (
        lambda whole: whole + _message(7, _message(1, b"\x0a\0" * (1 << 20))), "500,000 parts",
    ),
    "nested without end": (lambda whole: _nested(2000), "cannot be read as ONNX"),
}  # fmt: skip


def _message(field: int, content: bytes) -> bytes:
    size, length = len(content), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([field << 3 | 2]) + length + bytes([size]) + content


def _nested(depth: int) -> bytes:
    """Graphs in attributes of nodes of graphs."""
    graph = b""
    for _ in range(depth):
        graph = _message(1, _message(5, _message(6, graph)))
    return _message(7, graph)


@pytest.mark.parametrize("name", FILES)
def test_files(name, bundle, capfd, request):
    change, says = FILES[name]
    bundle.write_bytes(change(bundle.read_bytes()))
    request.getfixturevalue("bounded")
    everywhere(bundle, capfd, says)


def test_a_file_of_many_gigabytes_is_not_read(bundle, capfd, bounded):  # noqa: F811
    with bundle.open("r+b") as file:
        file.truncate(1 << 36)
    everywhere(bundle, capfd, "larger than 2,147 MB")


# ------------------------------------------------------------------ 55, 57: descriptions


DEEP = "[" * 100_000
DESCRIPTIONS: dict[str, tuple[dict[str, Any] | str, str]] = {
    "a newer schema": ({"schema": 99}, "has schema 99.*update crosspatch"),
    "a newer schema with things unknown": (
        {"schema": 3, "engine": "x", "classes": 7}, "has schema 3.*update crosspatch",
    ),
    "a class of a megabyte": ({"classes": ["a" * 10**6, "b", "c"]}, "1,000,000 letters"),
    "a class twice": ({"classes": ["a", "b", "a"]}, "two classes are called 'a'"),
    "a million classes": ({"classes": ["a"] * 10**6}, "1,000,000 classes"),
    "classes that are an object": ({"classes": {"a": 1}}, "makes no sense"),
    "classes that are a word": ({"classes": "abc"}, "makes no sense|classes"),
    "fewer classes than answers": (
        {"classes": ["a", "b"], "check": []}, r"gives probabilities float32 \(any, 3\)",
    ),
    "more classes than answers": (
        {"classes": ["a", "b", "c", "d"], "check": []}, r"description says probabilities .*4\)",
    ),
    "pictures of 100,000 pixels": (
        {"preprocess": info().preprocess.to_dict() | {"store": [10**5, 10**5]}}, "pixels",
    ),
    "a size that is a word": (
        {"preprocess": info().preprocess.to_dict() | {"size": "ab"}}, "makes no sense",
    ),
    "spread that is NaN": ('{"schema": 1, "preprocess": {"std": [NaN]}}', "NaN is no number"),
    "a temperature of 1e400": ('{"schema": 1, "temperature": 1e400}', "too great"),
    "a number of 10^5 digits": ('{"schema": ' + "9" * 10**5 + "}", "100000 digits"),
    "a schema that is infinite": ('{"schema": Infinity}', "Infinity is no number"),
    "a key twice": ('{"schema": 1, "schema": 2}', "twice"),
    "nested 100,000 times": (DEEP, "nested too deeply"),
    "nested 100,000 times inside": ('{"schema": 1, "accuracy": ' + DEEP, "nested too deeply"),
    "16 MB": (" " * (16 << 20), "16,777,216 letters"),
    "versions that are a list": ({"versions": []}, "versions are texts"),
    "weights that are a number": ({"weights": 5}, "weights must be a name"),
    "accuracy that is a word": ({"accuracy": "high"}, "accuracy must be figures"),
    "parameters that are negative": ({"parameters": -1}, "parameters -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions(name, bundle, capfd, request):
    change, says = DESCRIPTIONS[name]
    text = change if isinstance(change, str) else json.dumps(json.loads(info().to_json()) | change)
    model = onnx.load(bundle)
    helper.set_model_props(model, {KEY: text})
    bundle.write_bytes(model.SerializeToString())
    request.getfixturevalue("bounded")
    refused(DOORS["predict"](bundle), capfd, says)
    with pytest.raises(CrosspatchError, match=says):
        xp.load(bundle, engine="onnxruntime", threads=1)


def test_html_in_a_class_is_a_name_like_others(bundle, capfd):
    """It is shown as it is on a terminal and escaped in pages, never interpreted."""
    names = ("<script>alert(1)</script>", "a\nb", "\u202ec")
    write_bundle(bundle, info(classes=names))
    assert read_bundle(bundle).info.classes == names


# ------------------------------------------------------------------ OpenVINO's pair


BOMB = "".join(f'<!ENTITY a{n + 1} "{f"&a{n};" * 10}">' for n in range(9))
PAIRS: dict[str, tuple[Callable[[str], str], str]] = {
    "a bomb of entities": (
        lambda text: f'<!DOCTYPE net [<!ENTITY a0 "ha">{BOMB}]>{_headless(text)}', "document type",
    ),
    "an entity from elsewhere": (
        lambda text: '<!DOCTYPE net [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + _headless(text),
        "document type",
    ),
    "a document type from elsewhere": (
        lambda text: '<!DOCTYPE net SYSTEM "http://localhost/x.dtd">' + _headless(text),
        "document type",
    ),
    "instructions": (lambda text: text.replace("<layers>", "<?x y?><layers>"), "document type"),
    "a constant beyond the .bin": (
        lambda text: text.replace('offset="0"', 'offset="1000000000"', 1), "beyond the end",
    ),
    "a constant larger than its shape": (
        lambda text: text.replace('size="', 'size="9', 1), "its shape does not",
    ),
    "a negative offset": (
        lambda text: text.replace('offset="0"', 'offset="-8"', 1), "for a number",
    ),
    "an offset of 100 digits": (
        lambda text: text.replace('offset="0"', f'offset="{"9" * 100}"', 1), "for a number",
    ),
    "a layer of an extension": (
        lambda text: text.replace('version="opset1"', 'version="extension"', 1), "'extension",
    ),
    "a loop": (lambda text: text.replace('type="MatMul"', 'type="Loop"'), r"'opset1\.Loop'"),
    "a body": (
        lambda text: text.replace("<edges>", "<edges><body><layers/></body>"), "has 'body' in",
    ),
    "layers in a circle": (
        lambda text: text.replace("<edges>", '<edges><edge from-layer="2" from-port="0" '
                                  'to-layer="1" to-port="0"/><edge from-layer="1" from-port="0" '
                                  'to-layer="2" to-port="0"/>'), "in a circle|not there",
    ),
    "edges to nowhere": (
        lambda text: text.replace("<edges>", '<edges><edge from-layer="99" from-port="0" '
                                  'to-layer="1" to-port="0"/>'), "not there",
    ),
    "nested without end": (
        lambda text: text.replace("</rt_info>", "<a>" * 9999 + "</a>" * 9999 + "</rt_info>"),
        "nested too deeply",
    ),
    "cut": (lambda text: text[: len(text) // 2], "cannot be read as XML"),
    "another encoding": (
        lambda text: '<?xml version="1.0" encoding="x"?>' + _headless(text), "read as XML",
    ),
    "nothing": (lambda text: "", "cannot be read as XML"),
    "another page": (lambda text: "<html><body/></html>", "has 'html' in 'its root'"),
    "no description": (lambda text: text.replace("<crosspatch", "<other"), "does not say what"),
}  # fmt: skip


def _headless(text: str) -> str:
    return text.removeprefix('<?xml version="1.0"?>')


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name, pair, capfd, request):
    change, says = PAIRS[name]
    before = pair.read_text()
    pair.write_text(change(before))
    assert pair.read_text() != before
    request.getfixturevalue("bounded")
    refused(DOORS["predict"](pair), capfd, says)
    with pytest.raises(CrosspatchError, match=says):
        xp.load(pair)


def test_constants_that_are_no_numbers(pair, capfd):
    weights = pair.with_suffix(".bin")
    data = np.fromfile(weights, np.uint8)
    where = data.tobytes().find(np.float32(20.0 / 255).tobytes())
    assert where >= 0
    data[where : where + 4] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    data.tofile(weights)
    refused(DOORS["predict"](pair), capfd, "not finite")


def test_the_bundles_themselves_answer(bundle, pair):
    for path in (bundle, pair):
        found = xp.load(path, engine="openvino", threads=1).predict("a.png")
        assert found.probs.sum() == pytest.approx(1, abs=1e-5)
    shutil.copy(bundle, "c.onnx")
    assert read_bundle("c.onnx").info == read_bundle(pair).info
