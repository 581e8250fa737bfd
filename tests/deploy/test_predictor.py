"""Pictures of every kind in, answers out; alike alone and among others, with any engine."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import crosspatch
from crosspatch.data.augment import normalise
from crosspatch.data.decode import UnreadableImage, decode
from crosspatch.deploy.bundle import read_bundle
from crosspatch.deploy.engines import Setting, open_engine
from crosspatch.deploy.loading import load, run_of, weights_hash
from crosspatch.deploy.predictor import Failure, Predictor
from crosspatch.deploy.torch_engine import TorchEngine
from crosspatch.errors import DataError, UsageError
from crosspatch.training.package import load_model
from support.bundles import colours, info, write_bundle, write_openvino
from support.runs import CLASSES, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "trees")


@pytest.fixture(scope="module")
def bundle_file(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundle") / "b.onnx")


@pytest.fixture
def by_bundle(bundle_file):
    bundle = read_bundle(bundle_file)
    return Predictor(open_engine(bundle), bundle.info.classes, bundle.info.preprocess, bundle.info)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for place in range(7):
        pixels = rng.integers(0, 256, (40 + 9 * place, 80 - 5 * place, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    return sorted(folder.iterdir())


def both(run, bundle_file) -> list[Predictor]:
    return [load(run), load(bundle_file, engine="onnxruntime", threads=1)]


def test_a_picture_is_predicted_alike_alone_and_among_others(run, bundle_file, files) -> None:
    for predictor in both(run, bundle_file):
        together = predictor.predict(files, batch=3)
        assert together.ok.tolist() == list(range(7))
        assert together.classes == predictor.classes
        for place, path in enumerate(files):
            array = np.asarray(Image.open(path))
            for given in (path, str(path), path.read_bytes(), array, lambda path=path: str(path)):
                for one in (given, [given]):
                    alone = predictor.predict(one)
                    np.testing.assert_allclose(alone.probs[0], together.probs[place], atol=1e-5)
        assert predictor.predict([]).probs.shape == (0, len(predictor.classes))


def test_the_engine_of_torch_gives_the_numbers_of_the_model_itself(run, files) -> None:
    """Exactly: normalised centre of the stored picture, logits over the temperature, softmax."""
    trained = load_model(run)
    stored = [trained.preprocess.fit_image(decode(path, side=40)) for path in files]
    with torch.inference_mode():
        inputs = normalise(torch.from_numpy(np.stack(stored)), trained.preprocess)
        expected = (trained.module(inputs) / trained.temperature).softmax(dim=-1).numpy()
    found = load(run).predict(files)
    np.testing.assert_array_equal(found.probs, expected)
    assert found.probs.max() > 0.4  # a model that is decided, so that errors would show


def test_torch_in_bf16_is_near_and_other_precisions_are_refused(run, files) -> None:
    trained = load_model(run)
    engine = TorchEngine(trained, threads=1, precision="bf16", device="cpu")
    assert engine.setting == Setting("torch", "bf16", 1)
    half = Predictor(engine, trained.classes, trained.preprocess).predict(files)
    whole = load(run).predict(files)
    assert 0 < np.abs(half.probs - whole.probs).max() < 0.1
    with pytest.raises(UsageError, match="fp32 or bf16"):
        TorchEngine(trained, precision="int8")


def test_failures_keep_their_places(by_bundle, files) -> None:
    seen: list[tuple[int, int]] = []
    answers = by_bundle.predict(
        [b"", files[0], "gone.png", files[1], files[2]],
        progress=lambda *at: seen.append(at),
        batch=2,
    )
    assert answers.ok.tolist() == [1, 3, 4]
    assert answers.probs.shape == (3, 3)
    assert [(one.index, bool(one.reason)) for one in answers.failures] == [(0, True), (2, True)]
    assert seen == [(2, 5), (4, 5), (5, 5)]
    top = answers.top(2)
    assert [one is None for one in top] == [True, False, True, False, False]
    assert by_bundle.predict("gone.png").failures == [Failure(0, "no such file or directory")]


def test_top_is_sorted_named_and_clamped(by_bundle) -> None:
    green = np.zeros((24, 32, 3), np.uint8)
    green[..., 1], green[..., 2] = 200, 100
    answers = by_bundle.predict(green)
    (top,) = answers.top(9)
    assert [name for name, _ in top] == ["green", "blue", "red"]
    assert [p for _, p in top] == pytest.approx(sorted(colours(green[None])[0])[::-1], abs=1e-6)
    assert answers.top(1) == [[top[0]]]
    with pytest.raises(UsageError, match="one class or more"):
        answers.top(0)
    grey = by_bundle.predict(np.full((24, 32), 77, np.uint8)).top(3)[0]  # a tie keeps its order
    assert [name for name, _ in grey] == ["red", "green", "blue"]


def test_grey_arrays_are_pictures(by_bundle) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (50, 60), dtype=np.uint8)
    np.testing.assert_array_equal(
        by_bundle.pixels(grey), by_bundle.pixels(np.stack([grey] * 3, axis=-1))
    )
    assert by_bundle.pixels(grey).shape == (24, 32, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 24, 32, 3), np.uint8),
        np.zeros((24, 32, 4), np.uint8),
        np.zeros((3, 24, 32), np.uint8),
        np.zeros((24, 32, 3), np.float32),
        np.zeros((24, 32, 3), np.uint16),
        np.zeros((0, 32, 3), np.uint8),
        np.zeros(5, np.uint8),
        None,
        7,
        lambda: None,
    ],
    ids=lambda wrong: "a call" if callable(wrong) else repr(getattr(wrong, "shape", wrong)),
)
def test_what_is_no_picture_is_refused_in_three_parts(by_bundle, wrong) -> None:
    with pytest.raises(UsageError, match="was given as a picture") as caught:
        by_bundle.predict([np.zeros((24, 32, 3), np.uint8), wrong])
    assert "uint8 array" in caught.value.expected


def test_other_errors_of_a_call_are_not_swallowed(by_bundle) -> None:
    def fault():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        by_bundle.predict([fault, fault])
    with pytest.raises(UnreadableImage):
        by_bundle.pixels(b"")


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_probabilities_that_are_no_numbers_are_an_error(tmp_path, engine) -> None:
    path = write_bundle(tmp_path / "b.onnx", scale=3e38)
    predictor = load(path, engine=engine, threads=1)
    with pytest.raises(DataError, match="not numbers"):
        predictor.predict(np.full((24, 32, 3), 255, np.uint8))


def test_pictures_are_read_at_most_three_batches_ahead(by_bundle) -> None:
    """However many there are: no more are open than the answered ones and three batches."""
    lock, opened, answered, most = threading.Lock(), [0], [0], [0]

    def read() -> np.ndarray:
        with lock:
            opened[0] += 1
            most[0] = max(most[0], opened[0] - answered[0])
        return np.zeros((24, 32, 3), np.uint8)

    def progress(done: int, _: int) -> None:
        answered[0] = done

    answers = by_bundle.predict([read] * 100, batch=4, progress=progress)
    assert len(answers.ok) == 100
    assert 4 < most[0] <= 12


def test_load_opens_runs_and_bundles(run, bundle_file, tmp_path) -> None:
    by_run = crosspatch.load(run)
    assert by_run.classes == CLASSES
    assert (by_run.info, by_run.engine.setting.engine) == (None, "torch")
    assert crosspatch.load(run / "model").classes == CLASSES
    by_file = crosspatch.load(str(bundle_file))
    assert by_file.info == info()
    pair = write_openvino(tmp_path / "b.xml", bundle_file)
    assert crosspatch.load(pair).engine.setting.engine == "openvino"
    one = load(bundle_file, engine="openvino", threads=2)
    assert one.engine.setting == Setting("openvino", "fp32", 2)
    assert load(bundle_file, threads=2).engine.setting.threads == 2


@pytest.mark.parametrize(
    ("what", "words", "says"),
    [
        ("run", {"engine": "openvino"}, "crosspatch export"),
        ("run", {"engine": "openvino-bf16"}, "--to openvino"),
        ("bundle", {"engine": "torch"}, "torch runs the folder of a run"),
        ("bundle", {"engine": "openvno"}, "--engine openvino"),
        ("bundle", {"device": "cuda"}, "runs on the processor"),
        ("bundle", {"threads": 0}, "one thread or more"),
        ("gone.onnx", {}, "does not exist"),
        ("gone", {}, "is not a bundle"),
    ],
)
def test_what_cannot_be_loaded_is_said(run, bundle_file, what, words, says) -> None:
    path = {"run": run, "bundle": bundle_file}.get(what, bundle_file.with_name(what))
    with pytest.raises(UsageError, match=says):
        load(path, **words)


def test_a_bundle_knows_the_run_that_it_was_made_of(run, tmp_path) -> None:
    path = run / "b.onnx"
    write_bundle(path, info(weights=weights_hash(run)))
    assert run_of(read_bundle(path)) == run
    write_bundle(path)
    assert run_of(read_bundle(path)) is None
    assert run_of(read_bundle(write_bundle(tmp_path / "b.onnx"))) is None


def test_a_bundle_predicts_where_torch_is_never_imported(bundle_file, files) -> None:
    script = f"""
import sys, crosspatch
from crosspatch.cli.main import main
answers = crosspatch.load({str(bundle_file)!r}).predict({str(files[0])!r})
assert answers.probs.shape == (1, 3)
assert main(["predict", {str(bundle_file)!r}, {str(files[0])!r}, "--json"]) == 0
assert not {{"torch", "torchvision", "timm"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_predictor_costs_little() -> None:
    """CPU seconds, numpy's included, in the best of three processes: others use the machine too."""
    script = "import crosspatch.deploy.predictor, time, sys; print(time.process_time())"
    spent = [
        float(subprocess.run([sys.executable, "-c", script], capture_output=True).stdout)
        for _ in range(3)
    ]
    assert min(spent) < 0.4
