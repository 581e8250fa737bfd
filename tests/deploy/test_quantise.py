# SPDX-License-Identifier: Apache-2.0
"""int8: what is quantised and what is not, by which numbers, and that engines agree with us."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy import quantise as room
from crosspatch.deploy.bundle import KEY, check_pictures, read_bundle
from crosspatch.deploy.engines import open_engine
from crosspatch.deploy.quantise import (
    HEAD,
    LIMIT,
    LINEAR,
    Range,
    calibration_pictures,
    expectation,
    quantise_dynamic,
    quantise_static,
    quantise_weight,
)
from crosspatch.errors import DataError
from support.bundles import info

SIZE, WIDTH = (4, 4), 40
RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "pixels": RANDOM.normal(size=(48, WIDTH)),
    "first": RANDOM.normal(size=(WIDTH, WIDTH)) * np.geomspace(0.01, 1, WIDTH),
    "second": RANDOM.uniform(-1, 1, size=(24, WIDTH)),
    "bias": RANDOM.normal(size=24),
    "last": RANDOM.normal(size=(24, 3)) / 20,
}
WEIGHTS = {name: value.astype(np.float32) for name, value in WEIGHTS.items()}


def write(path: Path, *, named: bool = True) -> Path:
    """pixels -> first (MatMul) -> relu -> second (Gemm, turned, with bias) -> last -> softmax."""
    first, second = (f"{LINEAR}first", f"{LINEAR}second") if named else ("a", "b")
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "full"], ["unit"]),
        helper.make_node("Flatten", ["unit"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "pixels"], ["x"], name="resize"),
        helper.make_node("MatMul", ["x", "first"], ["y"], name=first),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("Gemm", ["z", "second", "bias"], ["w"], name=second, transB=1),
        helper.make_node("MatMul", ["w", "last"], ["logits"], name=f"{HEAD}head"),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
    ]
    constants = {**WEIGHTS, "full": np.float32(255)}
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", *SIZE, 3])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    described = info(SIZE, preprocess=Preprocess(SIZE, SIZE))
    helper.set_model_props(model, {KEY: described.to_json()})
    path.write_bytes(model.SerializeToString())
    return path


def answers(images: np.ndarray, ranges: dict[str, Range] | None = None) -> np.ndarray:
    """What the int8 graph has to compute, in NumPy; ranges None: those of the batch itself."""

    def product(x: np.ndarray, weight: np.ndarray, name: str) -> np.ndarray:
        found = Range(min(0.0, x.min()), max(0.0, x.max())) if ranges is None else ranges[name]
        q = np.clip(np.rint(x / found.scale) + found.zero, 0, 255) - found.zero
        values, scale = quantise_weight(weight)
        return (q @ values.astype(np.float64)) * (found.scale * scale)

    x = (images.reshape(len(images), -1) / 255) @ WEIGHTS["pixels"]
    z = np.maximum(product(x, WEIGHTS["first"], "x"), 0)
    w = product(z, WEIGHTS["second"].T, "z") + WEIGHTS["bias"]
    powers = np.exp(w @ WEIGHTS["last"])
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write(tmp_path / "whole.onnx")


IMAGES = RANDOM.integers(0, 256, (60, *SIZE, 3), dtype=np.uint8)


def test_dynamic_int8_computes_what_it_says(whole: Path, tmp_path: Path) -> None:
    assert quantise_dynamic(whole, tmp_path / "q.onnx") == 2
    bundle = read_bundle(tmp_path / "q.onnx")
    assert bundle.info.precision == "int8-dynamic"
    found = open_engine(bundle).run(IMAGES)
    exact = open_engine(read_bundle(whole)).run(IMAGES)
    assert np.abs(found - answers(IMAGES)).max() < 1e-3
    assert 1e-5 < np.abs(found - exact).max() < 0.1
    assert (found.argmax(1) == exact.argmax(1)).mean() > 0.95


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_static_int8_computes_what_it_says(whole: Path, tmp_path: Path, engine: str) -> None:
    assert quantise_static(whole, tmp_path / "q.onnx", IMAGES[:40]) == 2
    bundle = read_bundle(tmp_path / "q.onnx")
    assert bundle.info.precision == "int8-static"
    ranges = room.activation_ranges(onnx.load(whole), IMAGES[:40])
    found = open_engine(bundle, engine).run(IMAGES)
    assert np.abs(found - answers(IMAGES, ranges)).max() < 1e-3
    exact = open_engine(read_bundle(whole)).run(IMAGES)
    assert (found.argmax(1) == exact.argmax(1)).mean() > 0.95


def test_only_products_by_weights_of_linear_layers_are_quantised(whole: Path, tmp_path) -> None:
    quantise_dynamic(whole, tmp_path / "dynamic.onnx")
    quantise_static(whole, tmp_path / "static.onnx", IMAGES[:8])
    for path in (tmp_path / "dynamic.onnx", tmp_path / "static.onnx"):
        graph = onnx.load(path).graph
        kept = {tensor.name: tensor.data_type for tensor in graph.initializer}
        assert kept["pixels"] == kept["last"] == TensorProto.FLOAT
        assert "first" not in kept
        assert "second" not in kept
        small = [name for name, kind in kept.items() if kind == TensorProto.INT8]
        assert sum(name.startswith(f"{LINEAR}first/weight") for name in small) >= 1
        assert sum(name.startswith(f"{LINEAR}second/weight") for name in small) >= 1
        onnx.checker.check_model(onnx.load(path), full_check=True)


def test_the_engine_runs_the_products_in_integers(whole: Path, tmp_path: Path) -> None:
    """ONNX Runtime must know the patterns, or int8 would only be slower."""
    import onnxruntime

    quantise_dynamic(whole, tmp_path / "dynamic.onnx")
    quantise_static(whole, tmp_path / "static.onnx", IMAGES[:8])
    fused = {"dynamic": {"DynamicQuantizeMatMul": 2}, "static": {"QLinearMatMul": 1, "QGemm": 1}}
    for name, expected in fused.items():
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "fused.onnx")
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx", options)
        kinds = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
        assert {kind: kinds.count(kind) for kind in expected} == expected
        assert kinds.count("MatMul") == 2  # of the pixels, of the classes


def test_weights_fill_their_range_and_never_pass_it() -> None:
    weight = np.array([[1.0, -3.0, 0.0], [-2.0, 1.5, 0.0]], np.float32)
    values, scale = quantise_weight(weight)
    assert values.dtype == np.int8
    assert values.tolist() == [[32, -64, 0], [-64, 32, 0]]
    assert scale.tolist() == [2 / 64, 3 / 64, 1.0]
    assert 2 * 255 * LIMIT < 2**15  # two products of uint8 and int8 fit in 16 bits


@pytest.mark.parametrize(
    ("low", "high", "zero"), [(0.0, 2.55, 0), (-2.55, 0.0, 255), (-1.0, 1.0, 128), (0.0, 0.0, 0)]
)
def test_zero_stays_exactly_zero(low: float, high: float, zero: int) -> None:
    assert abs(int(Range(low, high).zero) - zero) <= 1
    assert Range(low, high).scale > 0


def test_ranges_hold_every_picture_and_zero(whole: Path) -> None:
    model = onnx.load(whole)
    few, many = (room.activation_ranges(model, IMAGES[:n]) for n in (5, 60))
    x = (IMAGES.reshape(60, -1) / 255) @ WEIGHTS["pixels"]
    assert set(many) == {"x", "z"}
    assert many["x"].low == pytest.approx(x.min(), rel=1e-4)
    assert many["x"].high == pytest.approx(x.max(), rel=1e-4)
    assert many["z"].low == 0
    assert many["x"].low <= few["x"].low < 0 < few["x"].high <= many["x"].high


def test_a_bundle_without_such_products_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.onnx", named=False)
    with pytest.raises(DataError, match="leave --int8 away"):
        quantise_dynamic(tmp_path / "a.onnx", tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_what_to_expect_is_said_where_integers_are_slow(monkeypatch) -> None:
    from crosspatch.processor import Processor

    monkeypatch.setattr(room, "processor", lambda: Processor("x", 4, ("avx2",)))
    assert "rather than speed" in expectation()[0]
    monkeypatch.setattr(room, "processor", lambda: Processor("x", 4, ("avx2", "vnni")))
    assert expectation() == []


def write_run(folder: Path, data: str, split: str) -> Path:
    folder.mkdir()
    (folder / "config.toml").write_text(f'[run]\ndata = "{data}"\n')
    (folder / "split.csv").write_text(f"path,class,split\n{split}")
    return folder


def test_calibration_takes_the_validation_pictures_of_the_run(tmp_path: Path) -> None:
    from crosspatch.data.opening import open_source

    source = open_source("digits")
    names = [(item.key, source.classes[item.label]) for item in source.items]
    rows = [f"{key},{kind},{'val' if n % 5 == 0 else 'train'}\n" for n, (key, kind) in
            enumerate(names)]  # fmt: skip
    run = write_run(tmp_path / "run", "digits", "".join(rows))
    preprocess = Preprocess((8, 8), (10, 10))
    found = calibration_pictures(run, preprocess)
    assert found.shape == (room.PICTURES, 8, 8, 3)
    fitted = preprocess.centre(preprocess.fit_image(source.image(0))[None])
    assert np.array_equal(found[0], fitted[0])
    few = write_run(tmp_path / "few", "digits", "".join(rows[:11]))
    assert len(calibration_pictures(few, preprocess)) == 3


def test_calibration_says_when_the_pictures_are_gone(tmp_path: Path) -> None:
    preprocess = Preprocess((8, 8), (8, 8))
    gone = write_run(tmp_path / "gone", str(tmp_path / "none"), "a/b.png,a,val\n")
    with pytest.raises(DataError, match="add --data PICTURES") as caught:
        calibration_pictures(gone, preprocess)
    assert "none does not exist" in caught.value.got
    assert len(calibration_pictures(gone, preprocess, "digits")) == room.PICTURES
    changed = write_run(tmp_path / "changed", "digits", "0/none.png,0,val\n")
    with pytest.raises(DataError, match="which the data lacks"):
        calibration_pictures(changed, preprocess)


def test_check_pictures_are_good_enough_to_tell_engines_apart(whole: Path, tmp_path) -> None:
    quantise_dynamic(whole, tmp_path / "q.onnx")
    images = check_pictures(SIZE)
    exact, small = (open_engine(read_bundle(p)).run(images) for p in (whole, tmp_path / "q.onnx"))
    assert np.abs(exact - small).max() > 1e-6
