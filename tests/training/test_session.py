"""A whole training from the name of the data to the report."""

from __future__ import annotations

import csv
import json
import tomllib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from crosspatch.data.decode import UnreadableImage
from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.training import measure, plan, session
from crosspatch.training.machine import look
from crosspatch.training.package import load_model
from crosspatch.training.reporter import Silent
from crosspatch.training.session import train_run

TINY = {"model": "tiny", "size": 8, "batch": 8, "epochs": 3, "lr": 5e-3}


class Told(Silent):
    def __init__(self, stop_at=None):
        self.info, self.summary, self.bars, self.texts, self.stop_at = {}, {}, set(), [], stop_at

    def message(self, text):
        self.texts.append(text)

    def progress(self, what, done, total):
        self.bars.add(what)

    def plan(self, info):
        self.info = info

    def step(self, done, total, loss, images_per_second):
        if self.stop_at is not None and done >= self.stop_at:
            raise Interrupted("stop", "x", "y")

    def done(self, summary):
        self.summary = summary


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_whole_training(opened, tmp_path):
    told = Told()
    summary = train_run("stripes", tmp_path / "r", TINY, told)
    assert summary == told.summary
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert sum(summary["split"].values()) == len(opened)
    assert summary["test"]["images"] == summary["split"]["test"] > 0
    assert summary["steps"] == 3 * (summary["split"]["train"] // 8)
    assert told.info["classes"] == ["row0", "row1", "row2"]
    assert told.info["estimate"]["low"] <= told.info["estimate"]["high"]
    assert told.bars == {"reading pictures", "baseline", "validating", "testing"}
    kinds = {"config.toml", "classes.txt", "split.csv", "skipped.csv", "metrics.csv"}
    kinds |= {"predictions.csv", "report.json", "model/", "last/"}
    assert set(summary["files"]) == kinds


def test_what_the_folder_holds(opened, tmp_path):
    summary = train_run("stripes", tmp_path / "r", {**TINY, "size": (8, 8)}, Told())
    config = tomllib.loads((tmp_path / "r" / "config.toml").read_text())
    assert config["asked"]["size"] == [8, 8]
    assert config["recipe"]["lr"] == 5e-3
    assert torch.__version__.startswith(config["versions"]["torch"].split("+")[0])
    with (tmp_path / "r" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    tested = [row for row in rows if row["split"] == "test"]
    assert len(tested) == summary["test"]["images"]
    right = np.mean([int(row["correct"]) for row in tested])
    assert right == pytest.approx(summary["test"]["accuracy"])
    with (tmp_path / "r" / "split.csv").open() as file:
        split = {row["path"]: row["split"] for row in csv.DictReader(file)}
    assert all(split[row["path"]] == row["split"] for row in rows)
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["test"] == summary["test"]
    assert len(report["history"]) == 3
    model, classes, preprocess, *_ = load_model(tmp_path / "r")
    assert (classes, preprocess.size) == (opened.classes, (8, 8))
    assert sum(p.numel() for p in model.parameters()) == summary["parameters"]


def test_stopped_and_resumed_equals_uninterrupted(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))
    whole = train_run("stripes", tmp_path / "whole", TINY, Told())
    stopped = Told(stop_at=8)
    with pytest.raises(Interrupted, match=r"step 8 of.*--resume") as stop:
        train_run("stripes", tmp_path / "cut", TINY, stopped)
    assert stop.value.exit_code == 4
    assert stopped.summary == {}
    cut = train_run("stripes", tmp_path / "cut", {}, Told(), resume=True)
    assert {k: cut[k] for k in ("val", "test", "steps")} == {
        k: whole[k] for k in ("val", "test", "steps")
    }
    one, two = (load_file(tmp_path / n / "model/model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_resume_refuses_other_settings_and_other_data(opened, tmp_path, monkeypatch):
    with pytest.raises(Interrupted):
        train_run("stripes", tmp_path / "r", TINY, Told(stop_at=1))
    with pytest.raises(UsageError, match=r"--epochs 9 \(was 3\)"):
        train_run("stripes", tmp_path / "r", {"epochs": 9}, Told(), resume=True)
    with pytest.raises(UsageError, match=r"--seed 1 \(was not given\)"):
        train_run("stripes", tmp_path / "r", {"seed": 1}, Told(), resume=True)
    changed = type(opened)(per_class=23)
    monkeypatch.setattr(session, "open_source", lambda spec: changed)
    with pytest.raises(DataError, match="no longer those"):
        train_run("stripes", tmp_path / "r", {}, Told(), resume=True)


def test_a_run_that_has_ended_goes_on_to_more_epochs(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))
    for name in ("whole", "cut"):
        first = train_run("stripes", tmp_path / name, TINY, Told())
    with pytest.raises(UsageError, match=r"--epochs 2, and the run has ended after 3"):
        train_run("stripes", tmp_path / "cut", {"epochs": 2}, Told(), resume=True)
    told = Told()
    whole = train_run("stripes", tmp_path / "whole", {"epochs": 5}, told, resume=True)
    assert (whole["epochs"], whole["steps"]) == (5, first["steps"] // 3 * 5)
    assert any("Goes on to 5 epochs" in text and "0.0025" in text for text in told.texts)
    with pytest.raises(Interrupted):
        train_run("stripes", tmp_path / "cut", {"epochs": 5}, Told(stop_at=22), resume=True)
    assert not (tmp_path / "cut" / "report.json").exists()
    with pytest.raises(UsageError, match=r"--epochs 9 \(was 5\)"):
        train_run("stripes", tmp_path / "cut", {"epochs": 9}, Told(), resume=True)
    cut = train_run("stripes", tmp_path / "cut", {}, Told(), resume=True)
    assert {k: cut[k] for k in ("val", "test", "steps")} == {
        k: whole[k] for k in ("val", "test", "steps")
    }
    rates = [row["lr"] for row in json.loads((tmp_path / "cut/report.json").read_text())["history"]]
    assert rates == sorted(rates[:3], reverse=True) + sorted(rates[3:], reverse=True)
    assert rates[2] < rates[3] < 0.0025
    third = train_run("stripes", tmp_path / "cut", {"epochs": 6}, Told(), resume=True)
    assert third["steps"] == first["steps"] * 2


def test_a_recipe_of_one_cosine_says_why_it_goes_on_no_longer(opened, tmp_path):
    train_run("stripes", tmp_path / "r", {**TINY, "epochs": 1, "recipe": "deit"}, Told())
    report = (tmp_path / "r" / "report.json").read_text()
    with pytest.raises(UsageError, match=r"--recipe deit that has ended: its one cosine"):
        train_run("stripes", tmp_path / "r", {"epochs": 2}, Told(), resume=True)
    with pytest.raises(UsageError, match=r"--lr 0.1 .was 0.005."):
        train_run("stripes", tmp_path / "r", {"lr": 0.1}, Told(), resume=True)
    assert (tmp_path / "r" / "report.json").read_text() == report


def test_unreadable_pictures_are_left_out_everywhere(opened, tmp_path, monkeypatch):
    bad = {0, 30, 71}
    real = type(opened).read

    def read(self, index):
        if index in bad:
            raise UnreadableImage(self.items[index].key, "cut short")
        return real(self, index)

    monkeypatch.setattr(type(opened), "read", read)
    told = Told()
    summary = train_run("stripes", tmp_path / "r", TINY, told)
    assert summary["images"] == len(opened) - 3
    assert summary["skipped"] == 3
    assert sum(summary["split"].values()) == len(opened) - 3
    assert told.info["skipped_files"][0]["path"] == "row0/000.png"
    text = (tmp_path / "r" / "skipped.csv").read_text()
    assert "row0/000.png" in text
    predicted = (tmp_path / "r" / "predictions.csv").read_text()
    assert all(opened.items[i].key not in predicted for i in bad)


def test_a_time_budget_sets_the_steps(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "measure_step", lambda *_: 10.0)
    monkeypatch.setattr(measure, "measure_evaluation", lambda *_: 10.0)
    typed = {key: value for key, value in TINY.items() if key != "epochs"}
    told = Told()
    summary = train_run("stripes", tmp_path / "r", {**typed, "time": 1000.0}, told)
    # 95 % of the time, less three evaluations and what was spent before: about 80 steps
    assert 70 <= summary["steps"] <= 90
    assert 850 < told.info["estimate"]["low"] < 960
    assert any("fit into the time" in reason for reason in told.info["reasons"])


def test_too_few_pictures_for_validation(monkeypatch, source, tmp_path):
    few = type(source)(per_class=2)
    monkeypatch.setattr(session, "open_source", lambda spec: few)
    told = Told()
    summary = train_run("few", tmp_path / "r", TINY, told)
    assert summary["split"] == {"train": 3, "val": 0, "test": 3}
    assert summary["val"] is None
    assert summary["test"]["images"] == 3
    assert told.texts[0] == "reading: 0.0 MB for 6 pictures held in memory"
    assert "too few" in told.texts[1]


def test_errors_leave_no_run_behind(opened, tmp_path):
    with pytest.raises(UsageError, match="--batch"):
        train_run("stripes", tmp_path / "r", {"batch": 0}, Told())
    with pytest.raises(UsageError):
        train_run("stripes", tmp_path / "r", {**TINY, "fit": "stretch"}, Told())
    assert not (tmp_path / "r").exists()
    train_run("stripes", tmp_path / "r", {**TINY, "epochs": 1}, Told())


def test_digits_are_not_mirrored(tmp_path, monkeypatch):
    seen = []

    def stop(recipe, *rest, **how):
        seen.append(recipe)
        raise Interrupted("stop", "x", "y")

    monkeypatch.setattr(session, "fit", stop)
    for number, typed in enumerate(({}, {"flip": True})):
        with pytest.raises(Interrupted):
            train_run("digits", tmp_path / str(number), {**TINY, **typed}, Told())
    assert [recipe.augment.flip for recipe in seen] == [False, True]


def test_fewer_threads_are_taken_only_where_they_are_clearly_faster(images, recipe, monkeypatch):
    def choose(seconds, **typed):
        monkeypatch.setattr(measure, "measure_step", lambda r, *_: seconds[r.threads])
        pictures = SimpleNamespace(source=images.source, part=lambda name: images)
        reasons: list[str] = []
        found, _ = measure.choose_threads(replace(recipe, threads=8), pictures, typed, reasons)
        assert bool(reasons) == (found.threads < 8)
        return found.threads

    assert choose({8: 1.0, 4: 0.9}) == 8
    assert choose({8: 1.0, 4: 0.5, 2: 0.4}) == 4
    assert choose({8: 9.0, 4: 3.0, 2: 2.0, 1: 1.0}) == 1
    assert choose({8: 9.0, 4: 3.0}, threads=8) == 8


def test_how_products_are_computed_is_resolved_once_and_noted(opened, tmp_path, monkeypatch):
    monkeypatch.delenv("CROSSPATCH_LINEAR")
    monkeypatch.setattr(measure.linear, "_remembered", lambda: 9.0)
    recipe = plan.plan(SimpleNamespace(median_side=32, aspect=1.0), 100, 3, look(), {})[0]
    with measure.linear.switched("off"):
        assert recipe.linear == "auto"
        auto = measure.resolve_products(recipe)
        assert auto.linear == "on"
        assert measure.resolve_products(auto).linear == "on"
        assert measure.resolve_products(replace(recipe, linear="off")).linear == "off"
        for other in ({"precision": "bf16"}, {"compile": True}):
            assert measure.resolve_products(replace(recipe, **other)).linear == "off"
        train_run("stripes", tmp_path / "r", {**TINY, "epochs": 1}, Told())
    assert tomllib.loads((tmp_path / "r" / "config.toml").read_text())["recipe"]["linear"] == "on"
