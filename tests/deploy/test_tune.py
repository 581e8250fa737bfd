"""A schedule is picked by what was measured: clocks here are the multiply-adds, so that no test
depends on the machine."""

from __future__ import annotations

import copy
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

import crosspatch as xp
from crosspatch.deploy import tune as room
from crosspatch.errors import UsageError
from crosspatch.metrics.latency import timing
from crosspatch.metrics.macs import count_macs
from crosspatch.tokens.host import hosts_of, reducers_of
from crosspatch.tokens.ladder import STEPS, ladders
from crosspatch.tokens.reduce import put
from crosspatch.training.package import load_model, read_config
from support.reductions import pictures, tiny_crossvit, tiny_host
from support.runs import CLASSES, write_run


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds are the tokens that enter the blocks."""

    def tokens(call):
        (host,), (reducer,) = hosts_of(call.func), reducers_of(call.func)
        counts = (host.tokens,) * host.depth if reducer is None else reducer.counts[:-1]
        return call.args[0].shape[0] * sum(counts)

    def counted(calls, **_):
        return {name: timing([1e-3 * tokens(call)] * 5) for name, call in calls.items()}

    monkeypatch.setattr(room, "alternate", counted)


def judged(count: int = 24):
    return pictures(count), torch.arange(count) % 5


@pytest.mark.parametrize("method", ["tome", "mctf", "evovit"])
def test_the_weakest_schedule_that_is_fast_enough(method):
    model = tiny_host()
    reduced, tuned = xp.tune(model, method, target="1.2x", data=judged(), seconds=1)
    assert tuned.speed[1] >= 1.2
    assert tuned.before.macs > tuned.after.macs
    assert reducers_of(model) == (None,)
    assert reducers_of(reduced)[0] is not None
    for shape, rungs in ladders(model, method).items():
        mine = [one for one in tuned.tried if one.shape == shape]
        assert 1 <= len(mine) <= room.TRIES
        enough = [rungs.index(one.options) for one in mine if one.speed >= 1.2]
        weaker = [rungs.index(one.options) for one in mine if one.speed < 1.2]
        assert not enough or not weaker or min(enough) == max(weaker) + 1
    right = reduced(judged()[0]).argmax(dim=1).numpy() == judged()[1].numpy()
    assert (tuned.after.right == right).all()
    low, high = tuned.difference
    assert low <= right.mean() - tuned.before.right.mean() <= high
    assert "points" in str(tuned)


def test_validation_picks_among_the_shapes():
    _, tuned = xp.tune(tiny_host(), "tome", target=1.1, data=judged(40), seconds=1)
    accuracies = [one.accuracy for one in tuned.tried if one.accuracy is not None]
    assert len(accuracies) == 4
    assert tuned.after.right.mean() == max(accuracies)


def test_what_was_not_measured_is_not_claimed():
    _, tuned = xp.tune(tiny_host(), "tome", target=1.2, seconds=1)
    assert tuned.difference is None
    assert tuned.after.right is None
    assert "not measured" in str(tuned)
    assert tuned.report()["after"]["accuracy"] is None
    assert set(tuned.speed) == {1, 8}
    with pytest.raises(UsageError, match="came from no run"):
        tuned.save("anywhere")


def test_a_speed_that_nothing_reaches_is_refused_with_the_fastest():
    with pytest.raises(
        UsageError, match=r"no schedule of tome was 50 times as fast.*at most \d\.\d"
    ):
        xp.tune(tiny_host(), "tome", target=50, seconds=1)


@pytest.mark.parametrize("target", ["fast", 1, "0.5x", "-2", "1e3", None])
def test_targets_that_mean_nothing(target):
    with pytest.raises(UsageError, match="a factor above 1"):
        xp.tune(tiny_host(), "tome", target=target)


@pytest.mark.parametrize("method", ["patch-drop", "dcal", "nonsense"])
def test_methods_without_a_strength_to_choose(method):
    with pytest.raises(UsageError, match="tome, mctf, evovit"):
        xp.tune(tiny_host(), method)


@pytest.mark.parametrize("data", [5, (1, 2, 3), (torch.zeros(2, 3, 32, 32), [1])])
def test_data_that_are_no_labelled_pictures(data):
    with pytest.raises(UsageError, match="not a pair"):
        xp.tune(tiny_host(), "tome", data=data)


@pytest.mark.parametrize("make", [tiny_host, tiny_crossvit])
@pytest.mark.parametrize("method", ["tome", "mctf", "evovit", "psvit"])
def test_ladders_climb_and_can_be_built(make, method):
    model = make()
    for rungs in ladders(model, method).values():
        assert 1 <= len(rungs) <= STEPS
        weak, middle, strong = (copy.deepcopy(model) for _ in range(3))
        put(weak, method, rungs[0])
        put(middle, method, rungs[len(rungs) // 2])
        put(strong, method, rungs[-1])
        macs = [count_macs(one, (3, 32, 32)) for one in (model, strong)]
        assert macs[1] < macs[0]


@pytest.fixture
def run(tmp_path):
    """A run of four classes and a few pictures of each."""
    noise = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            pixels = noise.integers(0, 256, (40, 36, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / CLASSES[0] / "torn.png").write_bytes(b"no picture")
    return write_run(tmp_path / "run"), tmp_path / "data"


def test_of_a_run_a_run_comes_out(run, tmp_path):
    folder, data = run
    module, tuned = xp.tune(folder, "tome", target=1.2, data=str(data), seconds=1)
    assert len(tuned.after.right) == 20
    out = tuned.save(tmp_path / "fast")
    config = read_config(out / "model")
    assert config["transforms"] == [
        {"kind": "reduce", "method": "tome", "options": tuned.options}
    ]  # fmt: skip
    assert config["calibrated_on"] == 20
    again = load_model(out)
    with torch.no_grad():
        assert torch.equal(again.module(pictures()), module(pictures()))
    assert json.loads((out / "tuned.json").read_text())["speed"]["1"] >= 1.2
    answers = xp.load(out).predict([str(path) for path in sorted(data.rglob("*.png"))])
    assert len(answers.ok) == 20
    with pytest.raises(UsageError, match="exists"):
        tuned.save(out)


def test_the_figures_are_of_this_machine(monkeypatch):
    """Once with the real clock: nothing but that it ends in time and reports what it timed."""
    monkeypatch.undo()
    model = tiny_host(img_size=112, embed_dim=96, depth=4)  # 196 patches: merging pays
    began = time.perf_counter()
    _, tuned = xp.tune(model, "tome", target=1.05, batch=8, seconds=0.5)
    assert time.perf_counter() - began < 60
    for batch, took in tuned.before.latency.items():
        assert took.count >= 5
        assert tuned.speed[batch] > 0


def test_a_speed_that_does_not_hold_is_not_returned(monkeypatch):
    """The clock of the search flatters every schedule; the last measurement does not."""
    search = room._Search._timed
    flattered = lambda self, *asked: search(self, *asked)._replace(speed=9.0)
    monkeypatch.setattr(room._Search, "_timed", flattered)
    with pytest.raises(UsageError, match=r"stayed 5 times as fast at batch 1.*at most [12]\.\d"):
        xp.tune(tiny_host(), "tome", target=5, seconds=1)
    _, tuned = xp.tune(tiny_host(), "tome", target=1.3, batch=4, data=judged(), seconds=1)
    assert tuned.speed[4] >= 1.3  # a stronger one than the search would have taken
