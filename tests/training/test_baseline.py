"""The baseline of a run: what it finds, that it repeats, and that it changes nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crosspatch.data.prepare import prepare
from crosspatch.data.split import Split, make_split
from crosspatch.training import baseline, start
from crosspatch.training.pictures import Pictures, sharing
from crosspatch.training.reporter import Silent
from crosspatch.training.session import train_run
from support.tiny import Stripes, tiny_recipe

TINY = {"model": "tiny", "size": 8, "batch": 8, "epochs": 2, "lr": 5e-3}


def pictures_of(source, split=None):
    prepared = prepare(source, tiny_recipe().preprocess)
    return Pictures(source, prepared, split or make_split(source, seed=0), "f")


def test_what_is_easy_is_found_without_a_network():
    pictures = pictures_of(Stripes(per_class=40))
    found = baseline.measure(tiny_recipe(), pictures)
    assert found["images"] == len(pictures.split.train)
    for kind in ("nearest_class_mean", "linear_probe"):
        for name in ("val", "test"):
            figures = found[kind][name]
            assert figures["images"] == len(getattr(pictures.split, name))
            assert 0 <= figures["low"] <= figures["accuracy"] <= figures["high"] <= 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    again = baseline.measure(tiny_recipe(), pictures)
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


def test_colours_are_told_apart_by_means():
    source = Stripes(per_class=40)
    for picture, label in zip(source._pictures, source.labels, strict=True):
        picture[..., label] = 200
    found = baseline.measure(tiny_recipe(), pictures_of(source))
    assert found["nearest_class_mean"]["test"]["accuracy"] == 1
    assert found["linear_probe"]["test"]["accuracy"] == 1


def test_without_validation_and_without_a_test():
    source = Stripes(per_class=8)
    everything = np.arange(len(source))
    split = Split(everything[:18], everything[:0], everything[18:])
    found = baseline.measure(tiny_recipe(), pictures_of(source, split))
    assert found["features"] == baseline.UNCHOSEN[0]
    assert set(found["linear_probe"]) == {"test"}
    split = Split(everything, everything[:0], everything[:0])
    assert baseline.measure(tiny_recipe(), pictures_of(source, split))["linear_probe"] == {}


def test_several_labels_have_a_mean_average_precision():
    rng = np.random.default_rng(0)
    labels = (rng.random((90, 3)) < 0.4).astype(np.float32)
    labels[:, 2] = 0  # a class without a picture
    known = {"a": (labels[:, :2] + 0.1 * rng.standard_normal((90, 2))).astype(np.float32)}
    train, val = (baseline._Part({"a": known["a"][i], baseline.UNCHOSEN[0]: known["a"][i]},
                                 labels[i]) for i in (slice(60), slice(60, 90)))  # fmt: skip
    _, said = baseline._linear({"train": train, "val": val}, 3, baseline._judge_several)
    found = baseline._judge_several(said["val"], val.labels)
    assert found["map"] > 0.95
    near = baseline._nearest_several(train, val, "a", 3)
    assert baseline._judge_several(near, val.labels)["map"] > 0.95
    assert baseline._judge_several(near, 0 * val.labels) == {"images": 30}


def test_how_many_pictures_follows_from_the_settings():
    def most(count, cached=True, **settings):
        recipe = SimpleNamespace(
            **{"epochs": 10, "time_budget": None, "store": (32, 32), **settings}
        )
        images = SimpleNamespace(cached=cached)
        given = SimpleNamespace(
            split=SimpleNamespace(train=range(count)), prepared=SimpleNamespace(images=images)
        )
        return baseline.most_pictures(recipe, given)

    assert most(100) == 100
    assert most(5000) == 5000
    assert most(5000, epochs=2) == 1000
    assert most(5000, time_budget=30.0) == 816  # in 0.9 s, of which half are for val and test
    assert most(10**6, time_budget=1.0) == baseline.FEWEST
    assert most(10**6, time_budget=60.0, store=(256, 256)) == 238
    assert most(10**6, time_budget=60.0, cached=False) < 100
    assert most(10**6, time_budget=900.0) == baseline.MOST
    assert most(10**6) == baseline.MOST
    assert most(10**6, store=(256, 256)) == baseline.MOST // 4
    assert most(10**6, cached=False) == baseline.DECODED


def test_it_is_measured_once_for_the_runs_of_a_comparison(monkeypatch):
    calls = []
    monkeypatch.setattr(baseline, "measure", lambda *given: calls.append(given) or {})
    pictures = pictures_of(Stripes(per_class=8))
    with sharing():
        for seed in (0, 0, 1):
            baseline.to_beat(tiny_recipe(seed=seed), pictures)
    assert len(calls) == 2


def test_a_run_is_the_same_with_it_and_without(opened, tmp_path, monkeypatch):
    told: list[dict] = []

    class Told(Silent):
        def plan(self, info):
            told.append(info)

    summary = train_run("stripes", tmp_path / "with", TINY, Told())
    report = json.loads((tmp_path / "with" / "report.json").read_text())
    assert told[0]["baseline"] == summary["baseline"] == report["baseline"]
    assert report["baseline"]["linear_probe"]["test"]["images"] == summary["split"]["test"]
    monkeypatch.setattr(start, "to_beat", lambda *given: None)
    other = train_run("stripes", tmp_path / "without", TINY)
    assert other["baseline"] is None
    for key in ("best", "val", "test", "calibration", "steps"):
        same = [{**one[key], "elapsed": 0, "images_per_second": 0} if key == "best" else one[key]
                for one in (summary, other)]  # fmt: skip
        assert same[0] == same[1]
    drawn = torch.random.get_rng_state()
    baseline.measure(tiny_recipe(), pictures_of(Stripes(per_class=8)))
    assert torch.equal(torch.random.get_rng_state(), drawn)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
