"""The choice follows the measurement, is made once, and never fails for the cache's sake."""

from __future__ import annotations

import json

import pytest

from crosspatch import cache
from crosspatch.deploy import choice
from crosspatch.deploy.bundle import read_bundle
from crosspatch.deploy.choice import choose
from crosspatch.deploy.engines import Setting
from crosspatch.errors import DataError, UsageError
from crosspatch.metrics.latency import timing
from crosspatch.processor import Processor
from support.bundles import write_bundle, write_openvino


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSPATCH_CACHE", str(tmp_path / "cache"))
    return read_bundle(write_bundle(tmp_path / "b.onnx"))


@pytest.fixture
def world(monkeypatch):
    """A machine of four cores, and a stopwatch that says what the test wants it to say."""

    class World:
        cost: dict[tuple[str, int], float]
        opened: list[tuple[str, int]]
        stages: int

    class Fake:
        def __init__(self, setting):
            self.setting = setting

        def run(self, images):
            pass

    made = World()
    made.cost, made.opened, made.stages = {}, [], 0

    def open_engine(bundle, name, precision, threads):
        made.opened.append((name, threads))
        if made.cost.get((name, threads)) is None:
            raise DataError(f"{name} cannot", "it could", "nothing")
        return Fake(Setting(name, precision, threads))

    def fastest(calls, **_):
        made.stages += 1
        return {place: timing([made.cost[cell(call)]]) for place, call in calls.items()}

    def cell(call):
        (engine,) = call.__defaults__
        return engine.setting.engine, engine.setting.threads

    monkeypatch.setattr(choice, "open_engine", open_engine)
    monkeypatch.setattr(choice, "alternate", fastest)
    monkeypatch.setattr(choice, "usable_cores", lambda: 4)
    return made


COST = {
    ("onnxruntime", 4): 3.0, ("onnxruntime", 2): 1.0, ("onnxruntime", 1): 0.5,
    ("openvino", 4): 2.0, ("openvino", 2): 1.5, ("openvino", 1): 4.0,
}  # fmt: skip


def test_engines_first_then_threads(bundle, world) -> None:
    world.cost = COST
    assert choose(bundle) == Setting("openvino", "fp32", 2)
    assert world.opened == [(n, t) for n, t in (("onnxruntime", 4), ("openvino", 4))] + [
        ("openvino", 2), ("openvino", 1),
    ]  # fmt: skip
    assert world.stages == 2


def test_no_further_engine_is_opened_when_patience_is_over(bundle, world, monkeypatch) -> None:
    world.cost = COST
    monkeypatch.setattr(choice, "PATIENCE", 0.0)
    assert choose(bundle) == Setting("openvino", "fp32", 4)
    assert world.opened == [("onnxruntime", 4), ("openvino", 4)]


def test_large_networks_are_measured_with_fewer_pictures(bundle, world, monkeypatch) -> None:
    world.cost = COST
    ticks = iter(range(1000))
    seen = set()
    monkeypatch.setattr(choice.time, "perf_counter", lambda: next(ticks) * 0.01)
    monkeypatch.setattr(
        choice, "_fastest", lambda pictures, engines: seen.add(len(pictures)) or engines[0]
    )
    choose(bundle, batch=16)
    assert seen == {5}  # 0.01 s each, and 0.05 s for a turn


def test_only_those_asked_for_are_chosen_from(bundle, world) -> None:
    world.cost = COST
    assert choose(bundle, engines=["onnxruntime"]) == Setting("onnxruntime", "fp32", 1)
    assert {name for name, _ in world.opened} == {"onnxruntime"}
    pair = read_bundle(write_openvino(bundle.path.with_suffix(".xml"), bundle.path))
    assert choose(pair).engine == "openvino"
    with pytest.raises(UsageError, match="openvino, installed"):
        choose(pair, engines=["onnxruntime"])


def test_the_choice_is_kept_under_what_it_depends_on(bundle, world, monkeypatch, tmp_path) -> None:
    world.cost = COST
    first = choose(bundle)
    world.cost = {cell: 1 / cost for cell, cost in COST.items()}
    assert choose(bundle) == first
    assert world.stages == 2
    assert choose(bundle, batch=8) != first
    assert choose(read_bundle(write_bundle(tmp_path / "o.onnx", scale=2.0))) != first
    monkeypatch.setattr(choice, "installed", lambda names: dict.fromkeys(names, "99"))
    assert choose(bundle) != first


def test_another_processor_measures_anew(bundle, world, monkeypatch) -> None:
    world.cost = COST
    choose(bundle)
    monkeypatch.setattr(choice, "processor", lambda: Processor("other", 4, ()))
    choose(bundle)
    assert world.stages == 4


def test_an_engine_that_cannot_load_it_is_passed_over(bundle, world) -> None:
    world.cost = {cell: cost for cell, cost in COST.items() if cell[0] == "openvino"}
    assert choose(bundle).engine == "openvino"
    world.cost = {}
    with pytest.raises(DataError, match="onnxruntime cannot"):
        choose(bundle, batch=2)


@pytest.mark.parametrize(
    "kept",
    [
        "", "{", "[]", "null", '"text"', "\x00",
        ["openvino", "bf16", 1], ["torch", "fp32", 1], ["openvino", "fp32", 0],
        ["openvino", "fp32", 99], ["openvino", "fp32", True], ["openvino", "fp32"],
        ["openvino", ["fp32"], 1], {"engine": "openvino"}, None, 7,
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_cache_costs_a_measurement(bundle, world, kept) -> None:
    world.cost = COST
    choose(bundle)
    path = cache.folder() / choice.CACHE
    (key,) = json.loads(path.read_text())
    path.write_text(kept if isinstance(kept, str) else json.dumps({key: kept}))
    assert choose(bundle) == Setting("openvino", "fp32", 2)
    assert world.stages == 4


def test_a_cache_that_cannot_be_written_costs_nothing_more(bundle, world, monkeypatch) -> None:
    world.cost = COST
    (bundle.path.parent / "file").touch()
    monkeypatch.setenv("CROSSPATCH_CACHE", str(bundle.path.parent / "file" / "cache"))
    assert choose(bundle) == choose(bundle) == Setting("openvino", "fp32", 2)
    assert world.stages == 4


def test_a_true_measurement_is_quick_and_opens(bundle, monkeypatch) -> None:
    monkeypatch.setattr(choice, "SECONDS", 0.05)
    setting = choose(bundle)
    assert setting.engine in ("onnxruntime", "openvino")
    assert 1 <= setting.threads <= choice.usable_cores()
