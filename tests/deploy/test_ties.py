# SPDX-License-Identifier: Apache-2.0
"""Near-ties of token selection are told from wrong graphs: in the export, and in `verify`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from crosspatch.deploy import export as writing
from crosspatch.deploy import verify as room
from crosspatch.deploy.bundle import BundleInfo, check_pictures, read_bundle
from crosspatch.deploy.export import CLOSE, export
from crosspatch.deploy.graph import Shipped
from crosspatch.deploy.loading import load
from crosspatch.deploy.ties import STILL, disturbed, is_tie, steady
from crosspatch.deploy.verify import TOLERANCE, summary, verify
from crosspatch.errors import DataError
from crosspatch.tokens.reduce import put
from crosspatch.training.package import load_model
from support.runs import write_run

REDUCE = "tome:r=14"
WRONG = (4, 13, 15)
QUICK = 0.05


class Tied(NamedTuple):
    """A run, a picture whose selection it all but tosses up, the answer with the other one, and
    both answers: which of them torch gives may depend on the pictures beside it."""

    run: Path
    picture: np.ndarray
    other: np.ndarray
    sides: np.ndarray


def shipped(run: Path) -> Shipped:
    made = load_model(run)
    return Shipped(made.module, made.preprocess, made.temperature, made.task).eval()


@torch.inference_mode()
def answers(network: Shipped, pictures: np.ndarray) -> np.ndarray:
    return network(torch.from_numpy(pictures)).numpy()


def drawn(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 8, 8, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return (0.7 * coarse + 0.3 * rng.integers(0, 256, (count, 32, 32, 3))).astype(np.uint8)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Tied:
    """Contrast is scaled until the selection in one picture changes between two neighbouring scales
    in float32; that scale goes into the run's normalisation."""
    run = write_run(tmp_path_factory.mktemp("tied") / "run", reduce=REDUCE, store=(32, 32))
    weights = run / "model" / "model.safetensors"
    state = load_file(weights)
    louder = {
        name: (0.1 if name == "head.weight" else 2) * one
        for name, one in state.items()
        if one.ndim == 2
    }
    save_file({**state, **louder}, weights, {"format": "pt"})  # attends unevenly, is undecided
    network, picture = shipped(run), drawn(1, seed=1)
    inputs = network.normalised(torch.from_numpy(picture))

    @torch.inference_mode()
    def jumps(low: float, high: float) -> list[tuple[float, float, float]]:
        """(how far the answers of two neighbouring scales are apart, those scales)."""
        scales = np.linspace(low, high, 65)
        found = network.answer(inputs * torch.from_numpy(scales).float()[:, None, None, None])
        far = (found[1:] - found[:-1]).abs().amax(1).tolist()
        return list(zip(far, scales, scales[1:], strict=False))

    spans = sorted(jumps(0.5, 2.0))[-12:]
    for _ in range(3):
        spans = sorted(max(jumps(low, high)) for _, low, high in spans)
    far, low, high = spans[-1]
    assert far > 2 * TOLERANCE
    path = run / "model" / "config.json"
    config = json.loads(path.read_text())
    config["preprocessing"]["std"] = [one / low for one in config["preprocessing"]["std"]]
    path.write_text(json.dumps(config))
    with torch.inference_mode():
        sides = network.answer(torch.cat([inputs * np.float32(low), inputs * np.float32(high)]))
    own = answers(shipped(run), picture)[0]
    other = max(sides.numpy(), key=lambda side: np.abs(side - own).max())
    export(run)
    return Tied(run, picture[0], other, sides.numpy())


def with_r(run: Path, r: int) -> Any:
    """The run's network with another schedule."""
    network: Any = shipped(run)
    network.module.reducer, network.module.transforms = None, ()
    put(network.module, "tome", {"r": r})
    return network.eval()


def test_an_answer_that_the_network_gives_when_disturbed_is_a_near_ties(tied: Tied) -> None:
    network = shipped(tied.run)
    own = answers(network, tied.picture[None])[0]
    inputs = network.normalised(torch.from_numpy(tied.picture[None]))
    assert np.abs(own - tied.other).max() > 2 * TOLERANCE
    assert is_tie(network.answer, inputs, tied.other, TOLERANCE)
    assert is_tie(network.answer, inputs, own, TOLERANCE)
    assert not is_tie(network.answer, inputs, (own + tied.other) / 2, TOLERANCE)
    for r in WRONG:
        wrong = answers(with_r(tied.run, r), tied.picture[None])[0]
        assert not is_tie(network.answer, inputs, wrong, CLOSE)
    assert np.array_equal(disturbed(network.answer, inputs), disturbed(network.answer, inputs))


def test_check_pictures_hold_no_near_tie(tied: Tied, monkeypatch: pytest.MonkeyPatch) -> None:
    network = shipped(tied.run)
    info = read_bundle(tied.run / "bundle.onnx").info
    for one in info.check_pictures:
        inputs = network.normalised(torch.from_numpy(one[None]))
        still = answers(network, one[None])
        assert np.abs(disturbed(network.answer, inputs) - still).max() < STILL
    assert np.abs(answers(network, info.check_pictures) - info.check).max() < 1e-5
    real = check_pictures((32, 32), 12)
    for tossed in (0, 1):
        pictures = real.copy()
        pictures[tossed] = tied.picture
        monkeypatch.setattr("crosspatch.deploy.ties.check_pictures", lambda *_, p=pictures: p)
        chosen = steady(network.answer, network.normalised, (32, 32))
        assert len(chosen) == 2
        assert tossed not in chosen


def test_a_bundle_says_its_reduction(tied: Tied) -> None:
    bundle = read_bundle(tied.run / "bundle.onnx")
    assert bundle.info.reduction == REDUCE
    assert load(tied.run / "bundle.onnx", threads=1, engine="onnxruntime").reduction == REDUCE
    assert load(tied.run).reduction == REDUCE
    assert BundleInfo.from_json(bundle.info.to_json()) == bundle.info
    given = json.loads(bundle.info.to_json())
    for change in ({"reduction": 3}, {"reduction": "x" * 5000}, {"checks": [10**9, 0]},
                   {"checks": [0]}, {"checks": 7}, {"checks": ["0", "1"]}):  # fmt: skip
        with pytest.raises(DataError, match="makes no sense"):
            BundleInfo.from_json(json.dumps(given | change))


@pytest.mark.long
def test_an_export_with_another_schedule_fails(
    tied: Tied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = writing._write_onnx, with_r(tied.run, 13)
    monkeypatch.setattr(writing, "_write_onnx", lambda _, *rest: right(wrong, *rest))
    with pytest.raises(DataError, match="other probabilities than torch"):
        export(tied.run, out=tmp_path / "b.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("r", WRONG)
def test_no_other_schedule_passes_for_a_near_tie(tied: Tied, r: int) -> None:
    info, wrong = read_bundle(tied.run / "bundle.onnx").info, with_r(tied.run, r)
    with pytest.raises(DataError, match="other probabilities than torch"):
        writing._compare(lambda images: answers(wrong, images), shipped(tied.run), info, "fp32")


def test_an_export_says_that_a_check_picture_is_a_near_tie(
    tied: Tied, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = np.stack([tied.picture, *drawn(2, seed=5)])
    monkeypatch.setattr(writing, "check_pictures", lambda size, count=2: pictures[:count])
    network, info = shipped(tied.run), read_bundle(tied.run / "bundle.onnx").info

    def run(images: np.ndarray) -> np.ndarray:
        return np.stack([tied.other, *answers(network, images)[1:]])

    made = writing._compare(run, network, info, "fp32")
    assert made.difference < 1e-4
    assert "token selection differs on 1 of 3 check pictures" in made.remarks[0]
    with pytest.raises(DataError, match="other probabilities"):  # the same without a reduction
        writing._compare(run, network, replace(info, reduction=""), "fp32")


@pytest.fixture
def flipped(tied: Tied, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every engine selects otherwise than torch in the picture of the near-tie."""
    open_engine, reference, torchs = room.open_engine, room._reference, {}

    def where(images: np.ndarray) -> np.ndarray:
        return (images == tied.picture).all(axis=(1, 2, 3))

    def told(bundle, run):
        engine, problems = reference(bundle, run)
        answer = engine.run

        def remembered(images: np.ndarray) -> np.ndarray:
            found = answer(images)
            if where(images).any():
                torchs["own"] = found[where(images)][0]
            return found

        engine.run = remembered
        return engine, problems

    def opened(bundle, *rest):
        engine = open_engine(bundle, *rest)
        answer = engine.run

        def otherwise(images: np.ndarray) -> np.ndarray:
            found = answer(images).copy()
            if where(images).any() and "own" in torchs:
                far = np.abs(tied.sides - torchs["own"]).max(axis=1)
                found[where(images)] = tied.sides[far.argmax()]
            return found

        engine.run = otherwise
        return engine

    monkeypatch.setattr(room, "_reference", told)
    monkeypatch.setattr(room, "open_engine", opened)


def test_verify_reports_near_ties_and_holds_them_against_nobody(
    tied: Tied, flipped: None, capfd
) -> None:
    from crosspatch.cli.screen import Screen
    from crosspatch.cli.verify import _print

    bundle = read_bundle(tied.run / "bundle.onnx")
    report = verify(bundle, [tied.picture, *drawn(9, seed=7)], run=tied.run, seconds=QUICK)
    assert report.ok, [one.problems for one in report.engines]
    for one in report.engines:
        assert one.selection is not None
        assert (one.selection["pictures"], one.selection["near_ties"]) == (1, 1)
        assert one.selection["difference"] == one.difference > TOLERANCE
        assert all(row["near_tie"] for row in one.changed)
    with Screen() as screen:
        _print(screen, report, [])
    said = capfd.readouterr().out
    assert "token selection differs on 1 of 10 pictures" in said
    assert "two tokens score almost the same there" in said
    assert json.loads(json.dumps(summary(report)))["reduction"] == REDUCE


def test_without_a_run_nothing_shows_that_it_is_a_near_tie(tied: Tied, monkeypatch) -> None:
    bundle = read_bundle(tied.run / "bundle.onnx")
    real, own = room._several, answers(shipped(tied.run), tied.picture[None])[0]

    def several(bundle, engines):
        made = real(bundle, engines)
        forward = made.forward

        def answer(images):
            found = forward(images).copy()
            found[(images == tied.picture).all(axis=(1, 2, 3))] = [*own, *tied.other]
            return found

        made.forward = answer
        return made

    monkeypatch.setattr(room, "_several", several)
    report = verify(bundle, [tied.picture, *drawn(9, seed=7)], seconds=QUICK)
    assert not report.ok
    assert any("--against" in text for text in report.engines[1].problems)
    assert report.engines[1].selection["near_ties"] is None
    few = [tied.picture, *drawn(149, seed=7)]
    report = verify(bundle, few, seconds=QUICK)
    changed = bool(report.engines[1].changed)  # another class is never let pass
    assert report.ok is not changed
    assert report.engines[1].selection["pictures"] == 1


@pytest.mark.parametrize("r", WRONG)
def test_verify_finds_another_schedule(tied: Tied, monkeypatch, r: int) -> None:
    real, wrong = room.open_engine, with_r(tied.run, r)

    def open_engine(bundle, *rest):
        engine = real(bundle, *rest)
        engine.run = lambda images: answers(wrong, images)
        return engine

    monkeypatch.setattr(room, "open_engine", open_engine)
    bundle = read_bundle(tied.run / "bundle.onnx")
    for run in (tied.run, None):
        report = verify(bundle, run=run, seconds=QUICK)
        assert not report.ok
        assert all("check pictures" in one.problems[0] for one in report.engines)
    report = verify(bundle, list(drawn(12, seed=3)), run=tied.run, seconds=QUICK)
    assert any("no near-tie of two tokens explains" in p for p in report.engines[0].problems)
    assert report.engines[0].selection["near_ties"] == 0


def test_a_run_with_another_reduction_is_named(tied: Tied, tmp_path: Path) -> None:
    bundle = read_bundle(tied.run / "bundle.onnx")
    config = tied.run / "model" / "config.json"
    whole = config.read_text()
    try:
        config.write_text(whole.replace('"r": 14', '"r": 13'))
        report = verify(bundle, list(drawn(3)), run=tied.run, seconds=QUICK)
    finally:
        config.write_text(whole)
    assert any("tome:r=14, that of" in text and "tome:r=13" in text for text in report.problems)
