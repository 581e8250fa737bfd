"""What stands in the source itself: weights come in through one door, and nothing that failed is
tried again with less safety. And whatever byte of a model file changes, the answer is a model or an
error of ours."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.data import jsons
from crosspatch.data.tensors import read_header
from crosspatch.errors import CrosspatchError
from support.bundles import write_bundle, write_openvino
from support.runs import write_run

SOURCE = Path(xp.__file__).parent
OPENERS = {
    "load_file": {"data/tensors.py"},
    "safe_open": set(),
    "load_model_from_string": {"deploy/onnx_file.py"},
    "read_model": {"deploy/engines.py", "deploy/export.py"},
    "InferenceSession": {"deploy/engines.py", "deploy/client.py", "deploy/quantise.py",
                         "deploy/peak.py"},
    "memmap": {"data/token_labels.py", "deploy/openvino_file.py", "data/shelf.py",
               "data/prepare.py"},
    "from_file": set(),
    "load_state_dict_from_url": set(),
    "load_checkpoint": set(),
    "load_pretrained": set(),
    "unpickle": set(),
    "Unpickler": set(),
}  # fmt: skip
"""Calls that open model files, and where each may stand."""
TREES = {
    path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text())
    for path in sorted(SOURCE.rglob("*.py"))
}


def called(node: ast.AST) -> list[str]:
    """The names of all calls in a piece of code, in order."""
    calls = (one.func for one in ast.walk(node) if isinstance(one, ast.Call))
    return [
        func.attr if isinstance(func, ast.Attribute) else func.id
        for func in calls
        if isinstance(func, ast.Attribute | ast.Name)
    ]


@pytest.mark.parametrize("name", OPENERS)
def test_model_files_are_opened_in_one_place(name):
    found = {where for where, tree in TREES.items() if name in called(tree)}
    assert found <= OPENERS[name], f"{name} in {sorted(found - OPENERS[name])}"


def test_the_door_is_used():
    users = {where for where, tree in TREES.items() if "read_tensors" in called(tree)}
    assert {"training/package.py", "training/state.py", "training/teacher.py"} <= users
    assert "read_header" in called(TREES["training/weights.py"])
    assert "read_header" in called(TREES["data/token_labels.py"])


def retries(tree: ast.AST) -> list[int]:
    """Lines of handlers that open a model again after opening one failed."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Try):
            continue
        tried = {one for part in node.body for one in called(part) if one in WEIGHTY}
        for handler in node.handlers:
            again = [one for one in called(handler) if one in WEIGHTY]
            if tried and again:
                found.append(handler.lineno)
    return found


WEIGHTY = {
    "load", "load_file", "safe_open", "load_state_dict", "load_released", "load_model",
    "read_tensors", "read_header", "read_state", "load_state", "read_bundle", "open_engine",
    "load_model_from_string", "read_model", "InferenceSession", "onnx_metadata", "openvino_notes",
    "read_whole", "fill", "torch_load",
}  # fmt: skip
"""Calls that open or take in a model."""


def test_what_failed_is_never_tried_with_less_safety():
    found = {where: lines for where, tree in TREES.items() if (lines := retries(tree))}
    assert not found


def test_the_look_for_retries_finds_them():
    bad = "try:\n    a = load_file(p)\nexcept ValueError:\n    a = torch.load(p)\n"
    assert retries(ast.parse(bad)) == [3]
    assert not retries(ast.parse("try:\n    a = load_file(p)\nexcept ValueError:\n    raise\n"))


def test_no_argument_asks_for_less_safety():
    for where, tree in TREES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            for keyword in call.keywords:
                given_ = getattr(keyword.value, "value", None)
                loose = (keyword.arg, given_) in {
                    ("weights_only", False), ("allow_pickle", True), ("load_external_data", True),
                    ("trust_remote_code", True), ("enable_fallback", 1),
                }  # fmt: skip
                assert not loose, (where, call.lineno)


# ------------------------------------------------------------------ any byte

FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CHANGES = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(max_size=3),
            st.sampled_from([b"9" * 30, b'"', b"{", b"[" * 200, b"-1", b"1e999", b"NaN", b"\xff"]),
        ),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=3,
)


def mutated(whole: bytes, changes: list[tuple[float, bytes, int]], cut: float | None) -> bytes:
    """The bytes with pieces replaced (place as a part of the whole, new bytes, bytes taken out),
    and cut off at a part of their length."""
    data = bytearray(whole)
    for place, new, gone in changes:
        at = int(place * len(data))
        data[at : at + gone] = new
    return bytes(data if cut is None else data[: int(cut * len(data))])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_run(root / "run")
    write_openvino(root / "b.xml", write_bundle(root / "b.onnx"))
    return root


def answers(path: Path, **how: object) -> None:
    """Either probabilities for a picture, or an error of three parts."""
    told = None
    try:
        predictor = xp.load(path, threads=1, **how)
        height, width = predictor.preprocess.size
        found = predictor.predict([np.full((height, width, 3), 99, np.uint8)])
    except CrosspatchError as error:
        told = error
    if told is None:
        assert np.isfinite(found.probs).all()
    else:
        assert told.exit_code in (2, 3)
        assert all((told.got, told.expected, told.do))


CUT = st.one_of(st.none(), st.floats(0, 1))
FRONT = st.one_of(st.none(), st.just(0.01))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@FEW
@given(changes=CHANGES, cut=CUT, front=FRONT)
def test_any_change_of_a_run(name, models, tmp_path, changes, cut, front):
    folder = tmp_path / "run"
    shutil.copytree(models / "run", folder, dirs_exist_ok=True)
    if front is not None:  # into the header, which is a small part of the file
        changes = [(place * front, new, gone) for place, new, gone in changes]
    path = folder / "model" / name
    path.write_bytes(mutated((models / "run" / "model" / name).read_bytes(), changes, cut))
    answers(folder)


@pytest.mark.parametrize(("name", "engine"), [("b.onnx", "onnxruntime"), ("b.xml", "openvino")])
@FEW
@given(changes=CHANGES, cut=CUT)
def test_any_change_of_a_bundle(name, engine, models, tmp_path, changes, cut):
    shutil.copy(models / "b.bin", tmp_path)
    (tmp_path / name).write_bytes(mutated((models / name).read_bytes(), changes, cut))
    answers(tmp_path / name, engine=engine)


@FEW
@given(data=st.binary(max_size=300), length=st.integers(0, 300))
def test_any_bytes_are_no_weights(tmp_path, data, length):
    path = tmp_path / "w.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + data)
    try:
        found = read_header(path)
    except CrosspatchError:
        return
    assert data.strip() == b"{}"
    assert not found.tensors


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.text(max_size=9)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)  # fmt: skip


@given(PLAIN)
def test_json_of_ours_is_read_as_it_was_written(value):
    import json

    assert jsons.parse(json.dumps(value)) == value
