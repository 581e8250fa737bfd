# SPDX-License-Identifier: Apache-2.0
"""`--reduce` and `--objective`: resolved once, kept in the run, resumed with the same bits."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import crosspatch as xp
from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.layers.reducer import Reducer
from crosspatch.objectives.supervised import Supervised
from crosspatch.tokens import spec
from crosspatch.training import measure, session, start
from crosspatch.training.objective import OBJECTIVES, make_objective, resolve_objective
from crosspatch.training.package import build_model, load_model, read_config
from crosspatch.training.recipe import Recipe
from crosspatch.training.run import RunFolder
from support.loops import Stop, halt, same
from support.reductions import CASES

MICRO = {"model": "vit_micro_32", "size": 16, "batch": 16, "lr": 1e-3, "epochs": 1, "threads": 1}


@pytest.fixture(autouse=True)
def short_steps(monkeypatch):
    """Every step is told of, so that a reporter can stop a training anywhere."""
    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))


class Grown(Reducer):
    """A method for these tests: the first half of the network keeps all tokens, and what it returns
    is shifted by a weight of its own."""

    def __init__(self, host, *, start: float = 0.5) -> None:
        super().__init__()
        if not 0 <= start <= 1:
            raise ValueError(f"start = {start}; expected 0 to 1")
        self.counts = (host.tokens,) * (host.depth + 1)
        self.shift = nn.Parameter(torch.full((host.num_classes,), float(start)))
        self.unused = nn.Linear(3, 3)

    def active(self, block: int) -> bool:
        return False

    def decide(self, state, logits):
        return logits + self.shift


class Halved(Supervised):
    """An objective for these tests: half the loss."""

    def forward(self, inputs, progress):
        found = super().forward(inputs, progress)
        return {**found, "loss": found["loss"] / 2}


@pytest.fixture
def grown(monkeypatch):
    """A reduction "grown" that has weights and an objective of its own."""
    import sys
    from types import ModuleType

    room, learnt = ModuleType("crosspatch.tokens.grown"), ModuleType("crosspatch.objectives.grown")
    room.Grown, learnt.Halved = Grown, Halved
    monkeypatch.setitem(sys.modules, room.__name__, room)
    monkeypatch.setitem(sys.modules, learnt.__name__, learnt)
    monkeypatch.setitem(spec.METHODS, "grown", "grown:Grown")
    monkeypatch.setitem(OBJECTIVES, "grown", "grown:Halved")


def trained(folder, reporter=None, **settings):
    return session.train_run("stripes", folder, {**MICRO, **settings}, reporter)


def test_a_run_keeps_its_reduction_and_everything_reads_it(opened, tmp_path):
    base = tmp_path / "base"
    trained(base)
    summary = trained(tmp_path / "r", weights=str(base), reduce=" tome:r=3 ")
    assert (summary["reduce"], summary["objective"]) == ("tome:r=3", "supervised")
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["reduce"] == "tome:r=3"
    config = RunFolder(tmp_path / "r").read_config()
    assert config["recipe"]["reduce"] == config["asked"]["reduce"] == "tome:r=3"
    said = " ".join(config["why"]["reasons"])
    assert "tome:r=3: from 17 to 5, and in evaluation" in said
    kept = {"kind": "reduce", "method": "tome", "options": {"r": 3}}
    assert read_config(tmp_path / "r" / "model")["transforms"] == [kept]
    again = load_model(tmp_path / "r")
    assert again.reduction == "tome:r=3"
    assert again.module.reducer.schedule == (3, 3, 3, 3)
    unreduced = load_model(base)
    assert unreduced.reduction == ""
    assert summary["macs"] < json.loads((base / "report.json").read_text())["macs"]


def test_saving_and_loading_computes_the_same(make_recipe, tmp_path):
    from crosspatch.training.package import model_config, save_model

    recipe = make_recipe(model="crossvit_micro_32", size=(32, 32), store=(36, 36),
                         reduce="tome:r=2,coarse=none")  # fmt: skip
    model = build_model(recipe, 4).eval()
    config = model_config(recipe, ("a", "b", "c", "d"))
    assert config["transforms"] == list(model.transforms)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", model, config)
    again = load_model(tmp_path)
    pictures = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.module(pictures), model(pictures))
        bare = build_model(replace(recipe, reduce=""), 4).eval()
        assert not torch.equal(again.module(pictures), bare(pictures))
    assert again.reduction == "tome:r=2,coarse=none"


MILLION = [1] * 300_000


@pytest.mark.parametrize(
    "transforms",
    [
        [{"kind": "melt", "method": "tome"}],
        [{"kind": "reduce", "method": "melt", "options": {}}],
        [{"kind": "reduce", "method": "tome", "options": {"q": 1}}],
        [{"kind": "reduce", "method": "tome", "options": {"r": 10**30}}],
        [{"kind": "reduce", "method": "tome", "options": {"r": -1}}],
        [{"kind": "reduce", "method": "tome", "options": {"r": float("nan")}}],
        [{"kind": "reduce", "method": "tome", "options": {"r": float("inf")}}],
        [{"kind": "reduce", "method": "tome", "options": {"r": MILLION}}],
        [{"kind": "reduce", "method": "tome", "options": {"r": {"r": {"r": 1}}}}],
        [{"kind": "reduce", "method": "tome", "options": {"r": [[1], [2], [3], [4]]}}],
        [{"kind": "reduce", "method": "tome", "options": {"r": "x" * 500_000}}],
        [{"kind": "reduce", "method": "tome", "options": {"r" * 500_000: 1}}],
        [{"kind": "reduce", "method": "tome", "options": [1, 2]}],
        [{"kind": "reduce", "method": "tome", "options": None}],
        [{"kind": "reduce", "method": "m" * 500_000, "options": {}}],
        [{"kind": "reduce", "method": ["tome"], "options": {}}],
        [{"kind": "reduce", "method": "grown", "options": {"start": [0.5]}}],
        [{"kind": "reduce", "method": "grown", "options": {"start": "much"}}],
        [{"kind": "reduce", "method": "tome", "options": {"r": 1}}] * 9_000,
        [None], ["tome"], [[]], MILLION, {"kind": "reduce"}, "tome", 7, None,
    ],
    ids=lambda value: repr(value)[:50],
)  # fmt: skip
def test_hostile_transforms_end_in_one_error_that_names_the_file(
    make_recipe, tmp_path, grown, transforms
):
    from crosspatch.training.package import model_config, save_model

    recipe = make_recipe(model="vit_micro_32", size=(16, 16), store=(18, 18))
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", build_model(recipe, 2), model_config(recipe, ("a", "b")))
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transforms": transforms}))
    began = time.perf_counter()
    with pytest.raises(DataError, match=r"config\.json") as found:
        load_model(tmp_path)
    assert time.perf_counter() - began < 5
    assert len(str(found.value)) < 2_000


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"reduce": "melt"}, "no token reduction 'melt'"),
        ({"reduce": "tome:q=1"}, "no option 'q'"),
        ({"reduce": "tome:fine.q=1"}, "no option 'q'"),
        ({"reduce": "tome:r=99"}, "r = 99 at block 0"),
        ({"reduce": "tome:r=1/2"}, "r has 2 entries"),
        ({"reduce": "tome:r=1e999"}, "r = inf"),
        ({"reduce": "tome:r=" + "9" * 5000}, "r = inf"),
        ({"reduce": "tome:coarse.r=2"}, "no option 'coarse'"),
        ({"reduce": "tome", "model": "resnet18"}, "ResNet"),
        ({"reduce": "tome", "objective": "mctf"}, "--objective mctf with --reduce tome"),
        ({"objective": "melt"}, "no objective .melt."),
    ],
)
def test_what_cannot_be_is_refused_before_a_picture_is_read(
    opened, monkeypatch, tmp_path, change, match
):
    monkeypatch.setattr(start, "read_pictures", lambda *_: pytest.fail("pictures were read"))
    with pytest.raises(UsageError, match=match) as found:
        trained(tmp_path / "r", **change)
    assert found.value.expected
    assert found.value.do


def test_a_reduced_run_hands_its_reduction_on_and_takes_no_other(opened, tmp_path):
    trained(tmp_path / "one", reduce="tome:r=13", size=32)
    for number, asked in enumerate(("tome", "tome:proportional=yes,r=13", None)):
        settings = {"weights": str(tmp_path / "one"), "model": None, "size": None, "reduce": asked}
        summary = trained(tmp_path / f"two{number}", epochs=1, **settings)
        assert summary["reduce"] == "tome:r=13"
    with pytest.raises(UsageError, match=r"--reduce tome:r=2, and .*one is reduced by tome:r=13"):
        trained(tmp_path / "x", **{**settings, "reduce": "tome:r=2"})
    path = tmp_path / "one" / "model" / "config.json"
    path.write_text(path.read_text().replace('"tome"', '"melt"'))
    with pytest.raises(DataError, match=r"config\.json.*cannot be repeated"):
        trained(tmp_path / "x", **settings)


def test_weights_of_a_method_are_its_own_until_a_run_has_learnt_them(opened, grown, tmp_path):
    trained(tmp_path / "base")
    base = str(tmp_path / "base")
    summary = trained(tmp_path / "one", weights=base, reduce="grown:start=0.25")
    assert summary["objective"] == "grown"
    learnt = load_model(tmp_path / "one").module.state_dict()
    assert learnt["reducer.shift"].std() > 0
    config = RunFolder(tmp_path / "one").read_config()["recipe"]
    recipe = Recipe.from_dict(config)
    begun = build_model(recipe, 3)
    assert begun.reducer.shift.tolist() == [0.25] * 3
    theirs = load_model(base).module.state_dict()
    assert all(torch.equal(begun.state_dict()[name], value) for name, value in theirs.items())
    trained(tmp_path / "two", weights=str(tmp_path / "one"))
    follows = Recipe.from_dict(RunFolder(tmp_path / "two").read_config()["recipe"])
    assert torch.equal(build_model(follows, 3).reducer.shift, learnt["reducer.shift"])


def test_what_is_learnt_is_resolved_once(opened, grown, make_recipe):
    learnt = lambda **given: resolve_objective(given)[0]
    assert learnt(reduce="grown:start=0.1") == "grown"
    assert learnt(reduce="grown", objective="supervised") == "supervised"
    assert learnt(reduce="tome:r=2") == learnt() == "supervised"
    recipe = make_recipe(model="vit_micro_32", size=(16, 16), reduce="grown", objective="grown")
    assert type(make_objective(recipe, opened.classes)) is Halved
    assert type(make_objective(replace(recipe, objective="supervised"), opened.classes)) is (
        Supervised
    )
    with pytest.raises(UsageError, match="objective = melt"):
        make_objective(replace(recipe, objective="melt"), opened.classes)


def test_steps_are_timed_with_the_reduction_and_its_objective(opened, grown, tmp_path, monkeypatch):
    seen, timed = [], measure.measure_step

    def watched(recipe, learnt, train):
        seen.append((type(learnt), learnt.exported.reducer is not None))
        return timed(recipe, learnt, train)

    monkeypatch.setattr(measure, "measure_step", watched)
    trained(tmp_path / "r", reduce="grown")
    assert set(seen) == {(Halved, True)}


SPECS = {name: spec.spell(name, case.options) for name, case in CASES.items()}


@pytest.mark.parametrize("method", CASES)
def test_a_stopped_run_goes_on_with_the_same_bits(opened, tmp_path, method):
    settings = {"reduce": SPECS[method], "size": 32, "epochs": 2}
    trained(tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        trained(tmp_path / "stopped", Stop(5, halt()), **settings)
    session.train_run("stripes", tmp_path / "stopped", {}, resume=True)
    same(RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "stopped"))


def test_a_run_under_way_keeps_its_reduction(opened, tmp_path):
    with pytest.raises(Interrupted):
        trained(tmp_path / "r", Stop(2, halt()), reduce="tome:r=2")
    for change in ({"reduce": "tome:r=3"}, {"objective": "supervised"}):
        with pytest.raises(UsageError, match=next(iter(change))):
            session.train_run("stripes", tmp_path / "r", change, resume=True)
        with pytest.raises(UsageError, match="not even with --force"):
            session.train_run("stripes", tmp_path / "r", change, resume=True, force=True)
    session.train_run("stripes", tmp_path / "r", {"reduce": "tome:r=2"}, resume=True)


def test_a_probe_of_a_reduced_network(opened, grown, tmp_path):
    summary = trained(tmp_path / "r", recipe="probe", reduce="tome:r=2", lr=None, epochs=None)
    assert summary["reduce"] == "tome:r=2"
    with pytest.raises(UsageError, match="computes its logits otherwise"):
        trained(tmp_path / "x", recipe="probe", reduce="grown", lr=None, epochs=None)


def test_texts_of_reductions_come_back():
    for options in ({"r": []}, {"r": [1]}, {"r": [1, 2]}, {"a": None, "b": True, "c": 0.25},
                    {"fine": None, "coarse": {"r": 2}}, {"word": "hard"}):  # fmt: skip
        assert spec.parse(spec.spell("tome", options)) == ("tome", options)
    with pytest.raises(UsageError, match=r"r = \[0"):
        xp.reduce(xp.create_model("vit_micro_32"), "tome", r=np.zeros(4))
