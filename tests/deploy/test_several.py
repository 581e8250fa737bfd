"""Several labels to a picture out of the training script: graph, description, answers, client."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import crosspatch as xp
from crosspatch.deploy import client
from crosspatch.deploy.bundle import SCHEMAS, BundleInfo, read_bundle
from crosspatch.deploy.engines import open_engine
from crosspatch.deploy.export import export
from crosspatch.deploy.predictor import Predictions, decide
from crosspatch.deploy.quantise import quantise_dynamic
from crosspatch.deploy.verify import TOLERANCE, compare, summary, verify
from crosspatch.errors import DataError
from crosspatch.training.package import load_model, save_calibration
from support.bundles import info, write_openvino
from support.once import once, shared
from support.runs import write_run

QUICK = 0.05  # seconds for latencies
THRESHOLDS = (0.3, 0.5, 0.62, 0.45)


@pytest.fixture(scope="module")
def run(tmp_path_factory, worker_id):
    def make(folder):
        write_run(folder, task="multilabel", model_args={"depth": 2})
        save_calibration(folder / "model", 1.25, 40, THRESHOLDS)
        export(folder)
        described = read_bundle(folder / "bundle.onnx").info
        write_openvino(folder / "bundle.xml", folder / "bundle.onnx", described)
        quantise_dynamic(folder / "bundle.onnx", folder / "bundle-int8.onnx")

    return once(shared(tmp_path_factory, worker_id) / "several-run", make)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for place in range(12):
        pixels = rng.integers(-40, 40, (40, 60, 3)) + rng.integers(0, 256, 3)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{place:02d}.png")
    return sorted(str(path) for path in folder.iterdir())


def reference(run, files):
    """Probabilities from the model itself, written out."""
    trained = load_model(run)
    preprocess, rows = trained.preprocess, []
    for file in files:
        pixels = preprocess.centre(preprocess.fit_image(Image.open(file).convert("RGB"))[None])
        mean, std = (255 * torch.tensor(v) for v in (preprocess.mean, preprocess.std))
        inputs = ((torch.from_numpy(pixels.copy()).float() - mean) / std).permute(0, 3, 1, 2)
        with torch.no_grad():
            rows.append(torch.sigmoid(trained.module(inputs) / trained.temperature)[0])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("name", ["", "bundle.onnx", "bundle.xml"])
def test_the_answers_are_sigmoids_at_the_temperature(run, files, name):
    predictor = xp.load(run / name if name else run)
    assert (predictor.task, predictor.thresholds) == ("multilabel", THRESHOLDS)
    answers = predictor.predict([*files, "gone.png"])
    wanted = reference(run, files)
    np.testing.assert_allclose(answers.probs, wanted, atol=1e-5)
    said = wanted >= np.array(THRESHOLDS)
    assert 0 < said.sum() < said.size
    np.testing.assert_array_equal(answers.said, said)
    assert answers.labels[-1] is None
    for place, labels in enumerate(answers.labels[:-1]):
        assert {one for one, _ in labels} == {
            predictor.classes[k] for k in np.flatnonzero(said[place])
        }
        assert [p for _, p in labels] == sorted((p for _, p in labels), reverse=True)
    assert len(answers.top(2)[0]) == 2
    assert max(row.sum() for row in answers.probs) > 1.01


@pytest.mark.long
def test_the_torch_archive_answers_alike(run, files, tmp_path):
    program = torch.export.load(export(run, "torch", out=tmp_path / "bundle.pt2").path)
    ours = xp.load(run)
    pixels = np.stack([ours.pixels(file) for file in files[:2]])
    found = program.module()(torch.from_numpy(pixels)).detach().numpy()
    np.testing.assert_allclose(found, ours.predict(files[:2]).probs, atol=1e-5)


def test_a_bundle_says_task_and_thresholds_in_schema_2(run):
    for name in ("bundle.onnx", "bundle-int8.onnx", "bundle.xml"):
        described = read_bundle(run / name).info
        assert (described.task, described.schema) == ("multilabel", 2)
        assert described.thresholds == THRESHOLDS
    nodes = [node.op_type for node in onnx.load(run / "bundle.onnx").graph.node]
    assert nodes.count("Sigmoid") == 1
    assert nodes[-1] == "Sigmoid"


def test_one_class_stays_in_schema_1_as_older_readers_know_it():
    text = json.loads(info().to_json())
    assert text["schema"] == SCHEMAS["classify"] == 1
    assert "thresholds" not in text
    assert BundleInfo.from_json(json.dumps(text)) == info()
    several = info(task="multilabel", thresholds=(0.1, 0.5, 0.9))
    assert BundleInfo.from_json(several.to_json()) == several


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 1}, {"thresholds": [0.5]}, {"thresholds": [0.5, 0.5, 2.0]}, {"task": "pose"},
        {"task": "classify"}, {"thresholds": ["x", "y", "z"]}, {"thresholds": None},
    ],
)  # fmt: skip
def test_a_description_that_makes_no_sense_is_refused(change):
    given = json.loads(info(task="multilabel", thresholds=(0.1, 0.5, 0.9)).to_json())
    with pytest.raises(DataError, match="makes no sense"):
        BundleInfo.from_json(json.dumps(given | change))


@given(st.integers(0, 10_000))
def test_labels_of_one_class_are_the_best_one(seed):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.ones(4), 5).astype(np.float32)
    answers = Predictions(("a", "b", "c", "d"), np.array([0, 2, 3, 5, 6]), probs, [])
    answers = answers._replace(failures=[None, None])
    assert answers.labels == answers.top(1)
    assert (decide(probs, ()).sum(axis=1) == 1).all()
    assert answers._replace(thresholds=(2.0,) * 4).labels[0] == []


def test_verify_compares_sets_of_labels(run, files):
    for name in ("bundle.onnx", "bundle-int8.onnx", "bundle.xml"):
        report = verify(read_bundle(run / name), files, run=run, names=files, seconds=QUICK)
        if name == "bundle-int8.onnx":  # another computation: a label near its threshold may go
            assert min(one.agreed for one in report.engines) >= 10
            assert all(one.problems == [] or "get the labels" in one.problems[0]
                       for one in report.engines)  # fmt: skip
            continue
        assert report.ok, [one.problems for one in report.engines]
        assert {one.agreed for one in report.engines} == {12}
        assert max(one.difference for one in report.engines) < 1e-4
    assert summary(report)["task"] == "multilabel"


def test_what_differs_is_found(run, files, tmp_path):
    bundle = read_bundle(run / "bundle.onnx")
    moved = dataclasses.replace(bundle.info, thresholds=(0.31, *THRESHOLDS[1:]))
    report = verify(dataclasses.replace(bundle, info=moved), files, run=run, seconds=QUICK)
    assert any("thresholds are other" in text for text in report.problems)
    other = write_run(tmp_path / "other", seed=1, task="multilabel")
    save_calibration(other / "model", 1.25, 40, THRESHOLDS)
    report = verify(bundle, files, run=other, names=files, seconds=QUICK)
    assert any("other labels than" in text for text in report.engines[0].problems)
    row = report.engines[0].changed[0]
    assert set(row["reference"].split("|")) <= {*bundle.info.classes, "none"}
    single = write_run(tmp_path / "single")
    report = verify(bundle, files, run=single, seconds=QUICK)
    assert any("its kinds of answer are other" in text for text in report.problems)
    assert report.torch_milliseconds is None


def test_a_label_near_its_threshold_is_no_change():
    thresholds, near = (0.5, 0.5), TOLERANCE / 2
    truth = np.array([[0.5 + near, 0.1], [0.6, 0.1], [0.6, 0.5 - near]])
    found = np.array([[0.5 - near, 0.1], [0.4, 0.1], [0.6, 0.5 + near]])
    result = compare(truth, found, thresholds)
    assert (result.agreed, result.changed) == (0, [1])
    assert compare(truth, truth, thresholds).agreed == 3


def test_the_client_gives_the_same_labels(run, files, tmp_path):
    ours = xp.load(run / "bundle.onnx", engine="onnxruntime", threads=1)
    theirs = client.Client(run / "bundle.onnx")
    answers = ours.predict(files)
    for file, labels, top in zip(files, answers.labels, answers.top(4), strict=True):
        found = theirs.labels(file)
        assert [name for name, _ in found] == [name for name, _ in labels]
        assert [p for _, p in found] == pytest.approx([p for _, p in labels], abs=1e-6)
        assert [name for name, _ in theirs.predict(file)] == [name for name, _ in top]
    done = subprocess.run(
        [sys.executable, "-I", str(run / "client.py"), str(run / "bundle.onnx"), *files],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    lines = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
    for file, labels in zip(files, answers.labels, strict=True):
        assert lines[file] == (", ".join(f"{name} {p:.4f}" for name, p in labels) or "none")


def test_an_engine_of_the_graph_alone_gives_probabilities_of_any_sum(run):
    bundle = read_bundle(run / "bundle.onnx")
    pictures = np.zeros((2, *bundle.info.preprocess.size, 3), np.uint8)
    found = open_engine(bundle).run(pictures)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert ((found > 0) & (found < 1)).all()
