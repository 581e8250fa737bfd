"""ONNX Runtime and OpenVINO: equal answers, and refusal of what is not what it says it is."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto

from crosspatch.deploy import engines
from crosspatch.deploy.bundle import read_bundle
from crosspatch.deploy.engines import Setting, available, computes_bf16, open_engine
from crosspatch.errors import DataError, UsageError
from support.bundles import colours, info, write_bundle, write_openvino


@pytest.fixture
def bundle(tmp_path):
    return read_bundle(write_bundle(tmp_path / "b.onnx"))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_engine_gives_what_the_graph_computes(bundle, engine, threads) -> None:
    opened = open_engine(bundle, engine, threads=threads)
    assert opened.setting == Setting(engine, "fp32", threads)
    rng = np.random.default_rng(0)
    kept = []
    for count in (1, 2, 7, 1):
        images = rng.integers(0, 256, (count, 24, 32, 3), dtype=np.uint8)
        probs = opened.run(images)
        assert probs.dtype == np.float32
        np.testing.assert_allclose(probs, colours(images), atol=1e-5)
        kept.append((probs, probs.copy()))
    for given, copied in kept:  # a later run must not write into an earlier answer
        np.testing.assert_array_equal(given, copied)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_pictures_that_are_views_are_read_as_they_look(bundle, engine) -> None:
    images = np.random.default_rng(1).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
    view = images[::2, ::2, ::-2]
    probs = open_engine(bundle, engine).run(view)
    np.testing.assert_allclose(probs, colours(np.ascontiguousarray(view)), atol=1e-5)


def test_openvino_reads_its_own_pair_of_files(bundle, tmp_path) -> None:
    pair = read_bundle(write_openvino(tmp_path / "b.xml", bundle.path))
    assert pair.format == "openvino"
    images = np.random.default_rng(2).integers(0, 256, (3, 24, 32, 3), dtype=np.uint8)
    probs = open_engine(pair, "openvino").run(images)
    np.testing.assert_allclose(probs, colours(images), atol=1e-5)
    assert ("onnxruntime", "fp32") not in available(pair)
    with pytest.raises(UsageError, match=r"ONNX Runtime reads bundles \.onnx"):
        open_engine(pair, "onnxruntime")


def test_what_can_be_had_is_what_opens(bundle, monkeypatch) -> None:
    monkeypatch.setattr(engines, "computes_bf16", computes_bf16)
    found = available(bundle)
    assert found[:2] == [("onnxruntime", "fp32"), ("openvino", "fp32")]
    assert (("openvino", "bf16") in found) == computes_bf16()
    for engine, precision in found:
        assert open_engine(bundle, engine, precision).setting.precision == precision


def test_an_engine_that_is_not_installed_is_not_offered(bundle, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    engines._importable.cache_clear()
    try:
        assert available(bundle) == [("onnxruntime", "fp32")]
        with pytest.raises(UsageError, match=r"crosspatch\[openvino\]"):
            open_engine(bundle, "openvino")
    finally:
        engines._importable.cache_clear()


def test_bf16_only_where_the_processor_has_it(bundle, monkeypatch) -> None:
    monkeypatch.setattr(engines, "computes_bf16", lambda: False)
    with pytest.raises(UsageError, match="no products in bf16"):
        open_engine(bundle, "openvino", "bf16")
    monkeypatch.setattr(engines, "computes_bf16", lambda: True)
    assert available(bundle)[-1] == ("openvino", "bf16")
    with pytest.raises(UsageError, match="setting of openvino"):
        open_engine(bundle, "onnxruntime", "bf16")
    quantised = dataclasses.replace(bundle, info=info(precision="int8-dynamic"))
    assert ("openvino", "bf16") not in available(quantised)
    with pytest.raises(UsageError, match="int8-dynamic already"):
        open_engine(quantised, "openvino", "bf16")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"engine": "torch"}, "torch runs the folder of a run"),
        ({"engine": "onnxruntim"}, "--engine onnxruntime"),
        ({"precision": "int8"}, "computes in fp32"),
        ({"threads": 0}, "one thread or more"),
    ],
)
def test_impossible_settings_are_refused(bundle, words, says) -> None:
    with pytest.raises(UsageError, match=says):
        open_engine(bundle, **words)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    "change",
    [
        {"size": (32, 24)},
        {"batch": 1},
        {"dtype": TensorProto.FLOAT},
        {"names": ("pixels", "probabilities")},
        {"names": ("image", "logits_")},
    ],
    ids=str,
)
def test_a_graph_that_is_not_that_of_its_description(tmp_path, engine, change) -> None:
    bundle = read_bundle(write_bundle(tmp_path / "b.onnx", **change))
    with pytest.raises(DataError, match="its description says"):
        open_engine(bundle, engine)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_class_too_many_is_noticed(tmp_path, engine) -> None:
    four = info(classes=("a", "b", "c", "d"), check=())
    bundle = read_bundle(write_bundle(tmp_path / "b.onnx", four))
    with pytest.raises(DataError, match=r"probabilities float32 \(any, 4\)"):
        open_engine(bundle, engine)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_graph_that_no_engine_can_load(bundle, engine) -> None:
    import onnx

    model = onnx.load(bundle.path)
    model.graph.node[2].op_type, model.graph.node[2].input[1] = "Gather", "weights"
    model.graph.node[2].input[0] = "nothing of that name"
    onnx.save(model, bundle.path)
    with pytest.raises(DataError, match="cannot load") as caught:
        open_engine(read_bundle(bundle.path), engine)
    assert "\n" not in str(caught.value)


def test_ctrl_c_after_an_engine_is_gone_is_an_interruption(tmp_path) -> None:
    """OpenVINO's plugin puts a signal stack of its own on a thread, and frees it with itself."""
    path = tmp_path / "b.onnx"
    write_bundle(path)
    code = f"""
import gc, signal, threading
from crosspatch.deploy.bundle import read_bundle
from crosspatch.deploy.engines import open_engine
for _ in range(3):
    kept = [open_engine(read_bundle({str(path)!r}), "openvino") for _ in range(2)]
    gone = threading.Thread(target=kept.clear)
    gone.start(), gone.join(), gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "interrupted\n", (answer.returncode, answer.stderr)
