"""Verification finds what is wrong, and only that."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from crosspatch.deploy import verify as room
from crosspatch.deploy.bundle import Bundle, read_bundle
from crosspatch.deploy.export import export
from crosspatch.deploy.quantise import quantise_dynamic
from crosspatch.deploy.verify import AGREEMENT, TOLERANCE, compare, summary, verify
from crosspatch.errors import DataError, UsageError
from support.bundles import colours, info, write_bundle, write_openvino
from support.once import once, shared
from support.runs import write_run

QUICK = 0.05  # seconds for latencies


@pytest.fixture(scope="module")
def run(tmp_path_factory, worker_id):
    def make(folder):
        export(write_run(folder, model_args={"depth": 2}))
        quantise_dynamic(folder / "bundle.onnx", folder / "bundle-int8.onnx")

    return once(shared(tmp_path_factory, worker_id) / "verified-run", make)


@pytest.fixture(scope="module")
def bundle(run):
    return read_bundle(run / "bundle.onnx")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for place in range(12):
        colour = rng.integers(0, 256, 3)
        pixels = rng.integers(-40, 40, (40 + 5 * place, 60, 3)) + colour
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{place:02d}.png")
    return sorted(str(path) for path in folder.iterdir())


def changed(bundle: Bundle, **info) -> Bundle:
    return dataclasses.replace(bundle, info=dataclasses.replace(bundle.info, **info))


def test_a_bundle_answers_as_its_run_does(bundle, run, files) -> None:
    before = torch.get_num_threads()
    given = [files[0], "gone.png", *files[1:]]
    report = verify(bundle, given, run=run, names=given, seconds=QUICK)
    assert torch.get_num_threads() == before
    assert report.ok
    assert (report.same_weights, report.pictures, report.problems) == (True, 12, [])
    assert [(one.index, bool(one.reason)) for one in report.failures] == [(1, True)]
    assert [one.engine for one in report.engines] == ["onnxruntime", "openvino"]
    for one in report.engines:
        assert (one.compared_with, one.agreed, one.changed) == ("torch fp32", 12, [])
        assert max(one.difference, one.check) < 1e-4
        assert one.milliseconds > 0
        assert one.faster > 0
    json.dumps(summary(report), allow_nan=False)


def test_int8_is_asked_for_the_same_classes(bundle, run, files, monkeypatch) -> None:
    quantised = read_bundle(run / "bundle-int8.onnx")
    report = verify(quantised, files, run=run, seconds=QUICK)
    assert {one.precision for one in report.engines} == {"int8"}
    for one in report.engines:
        assert one.difference > 1e-5  # it is another computation
        assert one.problems == [] or one.agreed < AGREEMENT * 12
    monkeypatch.setattr(room, "AGREEMENT", 1.01)
    strict = verify(quantised, files, run=run, seconds=QUICK)
    assert all("101% are asked for" in one.problems[0] for one in strict.engines)


def test_the_model_of_another_run_is_a_mismatch(bundle, files, tmp_path) -> None:
    other = write_run(tmp_path / "other", seed=1)
    report = verify(bundle, files, run=other, names=files, seconds=QUICK)
    assert not report.ok
    assert report.same_weights is False
    assert "other weights" in report.problems[0]
    for one in report.engines:
        assert one.difference > TOLERANCE
        assert len(one.changed) == 12 - one.agreed > 0
        assert one.changed[0]["picture"] in files
        assert one.changed[0]["reference"] != one.changed[0]["engine"]
        assert any("another class" in text for text in one.problems)
        assert one.check < TOLERANCE  # it is whole in itself


def test_another_temperature_is_named(bundle, run, files) -> None:
    report = verify(changed(bundle, temperature=2.0), files, run=run, seconds=QUICK)
    assert any("its temperature is 2, that of" in text for text in report.problems)


@pytest.mark.parametrize("what", ["classes", "preprocess"])
def test_a_run_that_answers_another_question_is_not_compared(bundle, run, files, what) -> None:
    given = {
        "classes": bundle.info.classes[::-1],
        "preprocess": dataclasses.replace(bundle.info.preprocess, fit="squash"),
    }
    report = verify(changed(bundle, **{what: given[what]}), files, run=run, seconds=QUICK)
    assert not report.ok
    assert any(f"its {what}" in text for text in report.problems)
    assert report.torch_milliseconds is None
    assert report.engines[1].compared_with == "onnxruntime fp32"


def test_without_a_run_there_are_the_answers_that_it_carries(tmp_path, files) -> None:
    path = write_bundle(tmp_path / "b.onnx")
    report = verify(read_bundle(path), files, seconds=QUICK)
    first, second = report.engines
    assert report.ok
    assert (report.run, report.same_weights, report.torch_milliseconds) == (None, None, None)
    assert (first.compared_with, second.compared_with) == (None, "onnxruntime fp32")
    assert (second.agreed, second.faster) == (12, None)
    write_bundle(path, scale=0.5)
    report = verify(read_bundle(path), files, seconds=QUICK)
    assert all("check pictures" in one.problems[0] for one in report.engines)
    pair = read_bundle(write_openvino(tmp_path / "b.xml", path, info(check=())))
    report = verify(pair, seconds=QUICK)
    assert report.ok
    assert [(one.check, one.agreed) for one in report.engines] == [(None, None)]


def test_numbers_that_are_none_are_a_data_error(tmp_path) -> None:
    bundle = read_bundle(write_bundle(tmp_path / "b.onnx", scale=3e38))
    with pytest.raises(DataError, match="onnxruntime gave probabilities that are not numbers"):
        verify(bundle, seconds=QUICK)


def test_an_engine_that_cannot_load_it_is_a_finding_of_its_own(tmp_path, monkeypatch) -> None:
    bundle = read_bundle(write_bundle(tmp_path / "b.onnx"))
    real = room.open_engine

    def open_engine(bundle, name, *rest):
        if name == "openvino":
            raise DataError("openvino cannot load it", "it could", "nothing")
        return real(bundle, name, *rest)

    monkeypatch.setattr(room, "open_engine", open_engine)
    report = verify(bundle, seconds=QUICK)
    assert not report.ok
    assert [one.problems for one in report.engines] == [[], ["openvino cannot load it"]]
    assert report.engines[0].milliseconds is not None
    assert report.engines[1].milliseconds is None
    with pytest.raises(DataError, match="cannot load it"):
        verify(bundle, engines=[("openvino", "fp32")], seconds=QUICK)
    monkeypatch.setattr(room, "available", lambda bundle: [])
    with pytest.raises(UsageError, match="no engine"):
        verify(bundle)


def test_comparing_forgives_where_the_reference_was_undecided() -> None:
    truth = np.array([[0.5, 0.3, 0.2], [0.5005, 0.4995, 0], [0.1, 0.8, 0.1], [0.2, 0.4, 0.4]])
    same = compare(truth, truth)
    assert (same.agreed, same.difference, same.changed) == (4, 0.0, [])
    found = truth.copy()
    found[1] = [0.4996, 0.5004, 0]  # another class, but the margin was 0.001
    result = compare(truth, found)
    assert (result.agreed, result.changed) == (3, [])
    found[0] = [0.3, 0.5, 0.2]
    result = compare(truth, found)
    assert (result.agreed, result.changed) == (2, [0])
    assert result.difference == pytest.approx(0.2)
    assert compare(truth[:0], truth[:0]) == (0, 0.0, [])
    assert compare(np.ones((2, 1)), np.ones((2, 1))).agreed == 2


def test_bf16_is_reported_and_not_judged() -> None:
    for precision, problems in (("fp32", 2), ("bf16", 0), ("int8", 1)):
        one = room.EngineReport("openvino", precision, compared_with="torch fp32")
        one.agreed, one.difference, one.changed = 90, 0.2, [{}] * 10
        assert len(room._findings(one, 100)) == problems
    one.agreed = 97
    assert room._findings(one, 100) == []


def test_colours_are_what_the_helper_says() -> None:
    """The bundle of these tests tells colours apart, so that differences can show."""
    pictures = np.zeros((3, 2, 2, 3), np.uint8)
    pictures[range(3), :, :, range(3)] = 255
    assert colours(pictures).argmax(axis=1).tolist() == [0, 1, 2]
