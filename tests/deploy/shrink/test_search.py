"""A whole search on a small ViT. Tracing takes seconds, so all networks but one get its graph: the
journeys trace for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from crosspatch.deploy import shrink as room
from crosspatch.deploy.bundle import KEY, check_pictures, read_bundle
from crosspatch.deploy.engines import open_engine
from crosspatch.deploy.export import export_model
from crosspatch.deploy.shrink import build, candidates, search, timing
from crosspatch.deploy.shrink.candidates import SOURCES, Candidate, register
from crosspatch.deploy.shrink.judge import Pictures
from crosspatch.deploy.shrink.result import Shrunk
from crosspatch.deploy.torch_engine import TorchEngine
from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.training.package import load_model, save_calibration
from support.once import once, shared
from support.runs import write_run

COUNT = 240


def drawn(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The graph of the small run, traced once."""

    def make(folder: Path) -> None:
        trained = load_model(write_run(folder / "run"))
        info = build.bundle_info(trained, "vit_micro_32")
        export_model(trained.module, folder / "whole.onnx", info)

    return once(shared(tmp_path_factory, worker_id) / "shrink-graph", make) / "whole.onnx"


@pytest.fixture
def run(tmp_path: Path, graph: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose validation pictures are what it says of drawn ones, but for a tenth of them."""
    import onnx

    run = write_run(tmp_path / "run")
    (run / "split.csv").write_text("path,class,split\n")
    answers = TorchEngine(load_model(run), device="cpu").run(drawn()).argmax(axis=1)
    answers[::10] = (answers[::10] + 1) % 4

    def copied(module, path, info) -> None:
        model = onnx.load_model(graph)
        onnx.helper.set_model_props(model, {KEY: info.to_json()})
        path.write_bytes(model.SerializeToString())

    monkeypatch.setattr(build, "export_model", copied)
    monkeypatch.setattr(room, "pictures", lambda *_: Pictures(drawn(), answers))
    monkeypatch.setattr(search, "available", lambda bundle: [("onnxruntime", _kind(bundle))])
    monkeypatch.setattr(candidates, "LADDERS", ("evovit", "psvit"))
    monkeypatch.setattr(timing, "SHORTEST", 0.01)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    torch.set_num_threads(1)
    return run


def _kind(bundle) -> str:
    return "fp32" if bundle.info.precision == "fp32" else "int8"


def rows_of(found: Shrunk) -> set[tuple]:
    """What does not depend on the clock: which kind of int8 other networks get does."""
    return {
        (one.key, one.right, one.pictures, one.drop, one.size, bool(one.latency))
        for one in found.rows
        if one.kind == "engines" or not one.precision.startswith("int8")
    }


def test_the_best_inside_is_written_and_says_how_good_it_is(run: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "model").iterdir()}
    found = room.shrink(run, max_drop=3, seconds=600)
    best = found.winner
    assert best.inside
    assert best.points <= 3
    assert {path: path.read_bytes() for path in (run / "model").iterdir()} == before
    bundle = read_bundle(run / "bundle-small.onnx")
    assert bundle.size >= best.size  # its accuracy stands in it besides
    accuracy = bundle.info.accuracy
    assert accuracy["split"] == "test"
    assert accuracy["accuracy"] == found.test["chosen"] / found.test["pictures"]
    assert 0 <= accuracy["low"] <= accuracy["accuracy"] <= accuracy["high"] <= 1
    answers = open_engine(bundle).run(check_pictures(bundle.info.preprocess.size))
    assert np.isfinite(answers).all()
    assert Shrunk.from_json(json.loads((run / "shrunk.json").read_text())) == found
    kinds = {one.kind for one in found.rows}
    assert kinds == {"engines", "tokens"}
    assert {one.precision for one in found.rows if one.name == "as it is"} == {
        "fp32", "int8-dynamic", "int8-static"
    }  # fmt: skip
    assert not list((run / "shrink").glob("*.onnx"))
    assert found.original.drop == 0
    assert found.original.latency[1].base == (1.0, 1.0, 1.0)


def test_nothing_inside_writes_nothing_and_names_the_nearest(run: Path) -> None:
    found = room.shrink(run, size=1000, seconds=1)
    assert found.chosen == found.bundle == ""
    assert found.nearest
    assert not (run / "bundle-small.onnx").exists()
    assert "too large" in " ".join(found.words)
    assert not found.test


def test_little_time_leaves_candidates_and_resume_goes_on_with_them(run: Path) -> None:
    first = room.shrink(run, max_drop=3, seconds=0.5)
    assert first.left
    assert first.winner is not None
    hasty = room.shrink(run, max_drop=3, seconds=0.5, resume=True)
    assert (hasty.left, rows_of(hasty)) == (first.left, rows_of(first))
    again = room.shrink(run, max_drop=3, seconds=600, resume=True)
    assert rows_of(first) <= rows_of(again)
    assert not again.left
    assert {one.name for one in again.rows} >= set(first.left)


@pytest.mark.parametrize(
    ("where", "name", "count"),
    [("build.Network", "bundle", 1), ("build.Network", "bundle", 5), ("timing.Clock", "time", 2),
     ("state.State", "save", 3), ("state.State", "save", 6), ("search.Search", "_final", 1)],
)  # fmt: skip
def test_stopped_anywhere_and_resumed_it_has_the_same_candidates(
    run: Path, monkeypatch: pytest.MonkeyPatch, where: str, name: str, count: int
) -> None:
    from crosspatch.deploy.shrink import state

    rooms = {"build": build, "timing": timing, "state": state, "search": search}
    file, kind = where.split(".")
    whole = room.shrink(run, max_drop=3, seconds=600)
    shutil.rmtree(run / "shrink")
    home, calls = getattr(rooms[file], kind), []
    real = getattr(home, name)

    def stopped(*given, **how):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(*given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(home, name, stopped)
        with pytest.raises(Interrupted, match="--resume"):
            room.shrink(run, max_drop=3, seconds=600)
    first = (run / "shrink" / "state.json").is_file()
    again = room.shrink(run, max_drop=3, seconds=600, resume=first)
    assert rows_of(again) == rows_of(whole)


def test_a_larger_budget_looks_again_at_what_was_given_up(run: Path) -> None:
    register("hopeless")(_hopeless)
    try:
        strict = room.shrink(run, max_drop=0, seconds=600)
        assert "hopeless" in {one.name for one in strict.rows if one.dropped}
        loose = room.shrink(run, max_drop=100, seconds=600, resume=True)
        assert "hopeless" in {one.name for one in loose.rows if one.latency}
        assert not {one.key for one in loose.rows if one.dropped}
    finally:
        del SOURCES["hopeless"]


def _hopeless(context):
    """A network that names everything wrongly."""

    def make():
        import copy

        module = copy.deepcopy(context.trained.module)
        with torch.no_grad():
            module.head.weight.zero_()
            module.head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 9.0]))
        return context.trained._replace(module=module)

    yield Candidate("hopeless", "toy", make, 5, screen=True)


def test_the_test_pictures_are_looked_at_once(run: Path, monkeypatch) -> None:
    asked = []
    real = room.pictures
    monkeypatch.setattr(room, "pictures", lambda *given: (asked.append(given[2]), real(*given))[1])
    room.shrink(run, max_drop=3, seconds=1)
    assert asked.count("test") == 1
    room.shrink(run, max_drop=3, seconds=0.5, resume=True)
    assert asked.count("test") <= 2  # another one may have been chosen
    key = json.loads((run / "shrink" / "state.json").read_text())["tested"]
    assert len(key) == asked.count("test")


def test_what_cannot_be_searched_is_refused(run: Path, monkeypatch, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no search to go on with"):
        room.shrink(run, resume=True)
    with pytest.raises(UsageError, match="--threads"):
        room.shrink(run, threads=999)
    with pytest.raises(UsageError, match="does not exist"):
        room.shrink(tmp_path / "none")
    bundle = tmp_path / "b.onnx"
    bundle.write_bytes(b"x")
    with pytest.raises(UsageError, match="is a file"):
        room.shrink(bundle)
    with pytest.raises(DataError, match=r"config\.json does not exist"):
        room.shrink(tmp_path)
    alone = write_run(tmp_path / "alone")
    with pytest.raises(DataError, match="holds a model alone"):
        room.shrink(alone)
    monkeypatch.setattr(room, "pictures", lambda *_: Pictures(drawn()[:0], np.zeros(0, int)))
    with pytest.raises(DataError, match="no validation pictures"):
        room.shrink(run)
    assert not list(run.glob("*.onnx"))


def test_another_model_is_not_resumed(run: Path) -> None:
    room.shrink(run, max_drop=3, seconds=0.5)
    weights = run / "model" / "model.safetensors"
    shutil.copy(write_run(run.parent / "other", seed=3) / "model" / weights.name, weights)
    with pytest.raises(UsageError, match="the weights of the run changed"):
        room.shrink(run, resume=True)


def test_a_reduced_run_is_not_reduced_again(run: Path, tmp_path: Path) -> None:
    reduced = write_run(tmp_path / "reduced", reduce="tome:r=1")
    (reduced / "split.csv").write_text("path,class,split\n")
    found = room.shrink(reduced, max_drop=100, seconds=600)
    assert {one.kind for one in found.rows} == {"engines"}
    assert "reduced already" in " ".join(found.words)


@pytest.mark.parametrize(
    ("model", "task", "said"),
    [
        ("convnext_isotropic_micro_32", "classify", "no tokens can be left out of it"),
        ("vit_micro_32", "multilabel", ""),
    ],
)
def test_other_networks_and_several_labels(
    model: str, task: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their own graphs; what is right is what all labels of a picture say."""
    folder = write_run(tmp_path / "run", task=task, model=model) / "model"
    thresholds = (0.5, 0.4, 0.5, 0.6) if task == "multilabel" else ()
    save_calibration(folder, 1.25, 40, thresholds)
    (tmp_path / "run" / "split.csv").write_text("path,class,split\n")
    probs = TorchEngine(load_model(folder), device="cpu").run(drawn())
    labels = (probs >= thresholds).astype("f4") if thresholds else probs.argmax(axis=1)
    judges = Pictures(drawn(), labels, thresholds)
    monkeypatch.setattr(room, "pictures", lambda *_: judges)
    monkeypatch.setattr(candidates, "LADDERS", ("evovit",) if said else ())
    monkeypatch.setattr(search, "available", lambda bundle: [("onnxruntime", _kind(bundle))])
    monkeypatch.setattr(timing, "SHORTEST", 0.01)
    found = room.shrink(tmp_path / "run", max_drop=50, seconds=600)
    assert said in " ".join(found.words)
    assert found.original.accuracy > 0.98
    info = read_bundle(tmp_path / "run" / "bundle-small.onnx").info
    assert (info.task, info.thresholds) == (task, thresholds)
    assert info.temperature == 1.25


SCRIPT = """
import sys
from pathlib import Path
from crosspatch.deploy.shrink import candidates, shrink
candidates.LADDERS = ("evovit",)
run = Path(sys.argv[1])
resume = (run / "shrink" / "state.json").is_file()
shrink(run, max_drop=100, seconds=1000, resume=resume)
"""


@pytest.mark.long
def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    """By SIGKILL, with real exports, on the digits."""
    from crosspatch.cli.main import main

    home = tmp_path / "run"
    words = ["--model", "vit_micro_32", "--epochs", "1", "--out", str(home), "--json"]
    assert main(["train", "digits", *words]) == 0
    whole = Path(shutil.copytree(home, tmp_path / "whole"))

    def start(run: Path) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", SCRIPT, str(run)], env=environment)

    began = time.perf_counter()
    assert start(whole).wait() == 0
    took = time.perf_counter() - began
    generator = np.random.default_rng(0)
    for _ in range(5):
        process = start(home)
        time.sleep(float(generator.uniform(0.1, 0.5)) * took)
        process.kill()
        process.wait()
        if (home / "bundle-small.onnx").exists():
            read_bundle(home / "bundle-small.onnx")
    assert start(home).wait() == 0
    found = [
        Shrunk.from_json(json.loads((one / "shrunk.json").read_text())) for one in (whole, home)
    ]
    assert rows_of(found[0]) == rows_of(found[1])
