"""Several labels to a picture in training: chosen by mAP, resumed bit for bit, probed, weighed."""

from __future__ import annotations

import csv
import json
import tomllib

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from crosspatch.data.sources import Item, Source
from crosspatch.errors import DataError, UsageError
from crosspatch.training import session
from crosspatch.training.balance import HEAVIEST, choose_balance, label_weights
from crosspatch.training.loop import merit
from crosspatch.training.package import load_model, read_config
from crosspatch.training.probe import fit_logistic, mean_loss
from crosspatch.training.session import train_run
from support.loops import Stop, halt, same


class Rows(Source):
    """Noisy 8x8 pictures with up to three bright rows; which, is drawn."""

    multi = True

    def __init__(self, count: int = 90, shares=(0.5, 0.4, 0.3), split=None) -> None:
        self.name, self.skipped = "rows", []
        self.classes = tuple(f"row{k}" for k in range(len(shares)))
        rng = np.random.default_rng(0)
        there = rng.random((count, len(shares))) < shares
        there[: len(shares)] |= np.eye(len(shares), dtype=bool)
        self._pictures = rng.integers(0, 60, (count, 8, 8, 3)).astype(np.uint8)
        for picture, row in zip(self._pictures, there, strict=True):
            picture[2 * np.flatnonzero(row) + 1] += 150
        self.items = tuple(
            Item(f"{at:03d}.png", tuple(np.flatnonzero(row).tolist()), split and split(at, row))
            for at, row in enumerate(there)
        )

    def read(self, index):
        return self._pictures[index]

    def _sizes(self):
        return [int(picture.sum()) for picture in self._pictures]


TYPED = {"model": "tiny", "size": 8, "batch": 8, "epochs": 6, "lr": 0.02}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def source():
    return Rows()


def test_a_whole_run_learns_and_says_everything(opened, tmp_path):
    told = []
    summary = train_run("rows", tmp_path / "r", TYPED, reporter=_Plan(told))
    assert summary["task"] == "multilabel"
    assert summary["test"]["map"] > 0.95
    assert "confusion" not in summary["test"]
    assert told[0]["labels"]["most"] == 3
    assert told[0]["labels"]["none"] == int((opened.presence.sum(axis=1) == 0).sum())
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    recipe = tomllib.loads((tmp_path / "r" / "config.toml").read_text())["recipe"]
    assert recipe["task"] == "multilabel"
    best = max(report["history"], key=lambda row: merit(row, "val_map"))
    assert report["best"] == best
    config, trained = read_config(tmp_path / "r" / "model"), load_model(tmp_path / "r")
    assert (config["schema"], config["task"]) == (2, "multilabel")
    assert trained.thresholds == tuple(report["calibration"]["thresholds"].values())
    assert [row["threshold"] for row in report["test"]["classes"]] == list(trained.thresholds)
    assert report["val"]["map"] == pytest.approx(best["val_map"], abs=1e-6)
    assert report["val"]["uncalibrated"]["nll"] == pytest.approx(best["val_loss"], rel=1e-4)
    with (tmp_path / "r" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_map"]) for row in rows] == [r["val_map"] for r in report["history"]]
    with (tmp_path / "r" / "predictions.csv").open() as file:
        told = list(csv.DictReader(file))
    tested = [row for row in told if row["split"] == "test"]
    right = sum(row["labels"] == row["predictions"] for row in tested)
    assert right / len(tested) == pytest.approx(report["test"]["accuracy"])


class _Plan(Stop):
    def __init__(self, plans):
        super().__init__()
        self.plan = plans.append

    def progress(self, what, done, total):
        pass

    def done(self, summary):
        pass


def test_thresholds_of_the_run_have_the_best_f1_on_validation(opened, tmp_path):
    summary = train_run("rows", tmp_path / "r", {**TYPED, "epochs": 1})
    with (tmp_path / "r" / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    for figures in summary["val"]["classes"]:
        truth = [figures["name"] in row["labels"].split("|") for row in rows]
        said = [figures["name"] in row["predictions"].split("|") for row in rows]
        hits = sum(a and b for a, b in zip(truth, said, strict=True))
        assert figures["f1"] == pytest.approx(2 * hits / (sum(truth) + sum(said)))
        assert figures["f1"] >= 2 * sum(truth) / (sum(truth) + len(rows))  # of saying yes to all


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(train, make_recipe):
    use = make_recipe(task="multilabel", class_weights=(1.0, 3.0, 2.0))
    whole, outcome = train("whole", use=use)
    assert all(row["val_map"] is not None for row in outcome.rows)
    resume = False
    for at in (3, 6, 15, 23):
        error = RuntimeError("killed") if at == 15 else halt()
        stop = Stop(at, error)
        with pytest.raises(type(error)):
            train("cut", stop, resume=resume, use=use, save_seconds=0.0)
        resume = True
    same(whole, train("cut", resume=True, use=use)[0])


def test_a_class_that_validation_lacks_keeps_its_threshold_and_is_named(monkeypatch, tmp_path):
    place = lambda at, row: "train" if row[2] or at < 60 else ("val" if at % 2 else "test")
    source = Rows(split=place)
    monkeypatch.setattr(session, "open_source", lambda spec: source)
    reporter = _Plan([])
    summary = train_run("rows", tmp_path / "r", {**TYPED, "epochs": 1}, reporter)
    assert summary["calibration"]["unset"] == ["row2"]
    assert summary["calibration"]["thresholds"]["row2"] == 0.5
    assert any("Validation has no picture of row2" in text for text in reporter.messages)
    assert summary["val"]["classes"][2]["ap"] is None
    assert summary["val"]["map"] is not None


def test_validation_without_any_label_still_chooses(monkeypatch, tmp_path):
    source = Rows(split=lambda at, row: "train" if row.any() else ("val" if at % 2 else "test"))
    monkeypatch.setattr(session, "open_source", lambda spec: source)
    summary = train_run("rows", tmp_path / "r", {**TYPED, "epochs": 2})
    assert summary["val"]["map"] is None
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    losses = [row["val_loss"] for row in report["history"]]
    assert summary["best"]["val_loss"] == min(losses)
    assert load_model(tmp_path / "r").thresholds == (0.5, 0.5, 0.5)


def test_a_class_of_one_picture_trains(monkeypatch, tmp_path):
    source = Rows(shares=(0.5, 0.4, 0.0))
    assert source.presence.sum(axis=0)[2] == 1
    monkeypatch.setattr(session, "open_source", lambda spec: source)
    reporter = _Plan([])
    summary = train_run("rows", tmp_path / "r", {**TYPED, "epochs": 1}, reporter)
    assert summary["test"]["classes"][2]["support"] == 0
    config = tomllib.loads((tmp_path / "r" / "config.toml").read_text())
    assert config["recipe"]["balance"] == "weights"
    assert config["recipe"]["class_weights"][2] == HEAVIEST
    assert any("test got no picture of row2" in reason for reason in config["why"]["reasons"])


def test_a_class_that_every_picture_may_lack_is_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "open_source", lambda spec: Rows(shares=(0.5,)))
    summary = train_run("rows", tmp_path / "r", TYPED)
    assert summary["test"]["map"] > 0.95


def test_weights_of_presence_are_bounded_and_one_for_the_commonest():
    assert label_weights(np.array([40, 40])) == (1.0, 1.0)
    weights = label_weights(np.array([400, 100, 2, 1]))
    assert weights[0] == 1.0
    assert weights[1] == pytest.approx((1 - 0.999**400) / (1 - 0.999**100), rel=1e-5)
    assert weights[2:] == (HEAVIEST, HEAVIEST)


def test_auto_weighs_and_a_sampler_is_refused():
    names = ("common", "rare")
    assert choose_balance("auto", np.array([50, 6]), names, 1, True)[0] == "none"
    mode, weights, reasons = choose_balance("auto", np.array([500, 6]), names, 1, True)
    assert (mode, weights[0]) == ("weights", 1.0)
    assert "common has 83.3 times the training pictures of rare" in reasons[0]
    with pytest.raises(UsageError, match="brings all its classes"):
        choose_balance("sampler", np.array([500, 6]), names, 1, True)


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_the_probe_fits_scikit_learns_regression_to_each_class(penalty):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(120, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(120, 3, generator=generator)
    labels = (features[:, :3] + 0.7 * noise > 0.3).float()
    found = fit_logistic(features, labels, 3, penalty)
    for k in range(3):
        theirs = LogisticRegression(C=1 / (penalty * 120), tol=1e-8, max_iter=1000)
        theirs.fit(features.numpy(), labels[:, k].numpy())
        np.testing.assert_allclose(found.weight[k], theirs.coef_[0], atol=2e-4)
        np.testing.assert_allclose(found.bias[k], theirs.intercept_[0], atol=2e-4)
    logits = torch.randn(5, 3)
    each = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[:5])
    assert float(mean_loss(logits, labels[:5])) == pytest.approx(3 * float(each), rel=1e-5)


def test_a_whole_probe(opened, tmp_path):
    typed = {"recipe": "probe", "model": "vit_micro_32", "size": 32}
    summary = train_run("rows", tmp_path / "r", typed)
    assert summary["test"]["map"] > 0.9
    assert load_model(tmp_path / "r").task == "multilabel"
    with pytest.raises(UsageError, match="weighs every picture alike"):
        train_run("rows", tmp_path / "other", {**typed, "balance": "weights"})


def test_other_labels_are_other_data_on_resume(opened, tmp_path):
    train_run("rows", tmp_path / "r", {**TYPED, "epochs": 1})
    item = opened.items[0]
    opened.items = (Item(item.key, (), None), *opened.items[1:])
    with pytest.raises(DataError, match="no longer those"):
        train_run("rows", tmp_path / "r", resume=True)


def test_the_reading_is_remembered(tmp_path, monkeypatch):
    asked = []
    source = Rows()

    def open_source(spec, **reading):
        asked.append(reading)
        return source

    monkeypatch.setattr(session, "open_source", open_source)
    reading = {"multi_label": True}
    train_run("rows", tmp_path / "r", {**TYPED, "epochs": 1}, reading=reading)
    train_run("rows", tmp_path / "r", resume=True)
    assert asked == [reading, reading]
    train_run("rows", tmp_path / "p", {**TYPED, "epochs": 1})
    with pytest.raises(UsageError, match=r"otherwise: --multi-label \(was not given\)"):
        train_run("rows", tmp_path / "p", resume=True, reading=reading)


def test_a_model_of_an_unknown_task_is_refused(opened, tmp_path):
    train_run("rows", tmp_path / "r", {**TYPED, "epochs": 1})
    path = tmp_path / "r" / "model" / "config.json"
    config = json.loads(path.read_text())
    for change in ({"task": "segment"}, {"thresholds": [0.5]}, {"task": "classify"}):
        path.write_text(json.dumps(config | change))
        with pytest.raises(DataError, match="newer version"):
            load_model(tmp_path / "r")
