"""The linear probe: the right fit, the right head, an untouched network, a whole run folder."""

from __future__ import annotations

import csv
import json
import tomllib

import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import nn

import crosspatch as xp
from crosspatch.data.preprocess import Preprocess
from crosspatch.errors import DataError, Interrupted, UsageError
from crosspatch.training import probe, session
from crosspatch.training.package import build_model, load_model
from crosspatch.training.probe import UNCHOSEN, Layer, features_of, fit_logistic, set_head
from crosspatch.training.recipe import Recipe
from crosspatch.training.recipes.probe import PENALTIES
from crosspatch.training.session import train_run
from support.runs import write_run

PROBE = {"recipe": "probe", "model": "vit_micro_32", "size": 32}
KINDS = {
    "config.toml", "classes.txt", "split.csv", "skipped.csv", "metrics.csv", "predictions.csv",
    "report.json", "model/",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def body(tensors):
    return {name: value for name, value in tensors.items() if not name.startswith("head")}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_the_fit_is_scikit_learns(penalty):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(120, 6, generator=generator, dtype=torch.float64)
    labels = (features[:, 0] + 0.7 * torch.randn(120, generator=generator) > 0).long()
    labels += (features[:, 1] > 1).long()
    found = fit_logistic(features, labels, 3, penalty)
    theirs = LogisticRegression(C=1 / (penalty * 120), tol=1e-8, max_iter=1000)
    theirs.fit(features.numpy(), labels.numpy())
    assert torch.allclose(found.weight, torch.from_numpy(theirs.coef_), atol=1e-4)
    assert torch.allclose(found.bias, torch.from_numpy(theirs.intercept_), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_micro_32", {}),
        ("vit_micro_32", {"global_pool": "avg"}),
        ("vit_micro_32", {"dist_token": True}),
        ("crossvit_micro_32", {}),
        ("resnet10t", {}),
    ],
)
def test_the_head_computes_the_layer_on_the_features(name, arguments):
    torch.manual_seed(0)
    size = {} if name == "resnet10t" else {"img_size": 32}
    model = xp.create_model(name, num_classes=5, **size, **arguments).eval()
    pictures = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        features = features_of(model, pictures)
        layer = Layer(torch.randn(5, features.shape[1]), torch.randn(5))
        set_head(model, layer)
        assert torch.allclose(model(pictures), layer(features), atol=1e-4)


def test_a_model_without_a_linear_head_is_refused():
    with pytest.raises(UsageError, match="no forward_head"):
        features_of(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 8, 8))
    model = xp.create_model("vit_micro_32", num_classes=5, img_size=32)
    with pytest.raises(UsageError, match="not one linear layer"):
        set_head(model, Layer(torch.zeros(5, 7), torch.zeros(5)))


def test_a_model_whose_logits_are_something_else_is_refused(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "set_head", lambda model, layer: None)
    with pytest.raises(UsageError, match="otherwise than from its features"):
        train_run("stripes", tmp_path / "r", PROBE)


def test_a_whole_probe_leaves_the_network_as_it_is(opened, tmp_path):
    summary = train_run("stripes", tmp_path / "r", PROBE)
    assert set(summary["files"]) == KINDS
    assert summary["test"]["accuracy"] > 0.9
    recipe = Recipe.from_dict(tomllib.loads((tmp_path / "r/config.toml").read_text())["recipe"])
    assert recipe.penalties == PENALTIES
    fresh = build_model(recipe, 3).state_dict()
    assert same(body(weights(tmp_path / "r")), body(fresh))
    with (tmp_path / "r" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == list(PENALTIES)
    losses = [float(row["train_loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    merits = [(row["val_accuracy"], -row["val_loss"]) for row in report["history"]]
    assert (report["best"]["val_accuracy"], -report["best"]["val_loss"]) == max(merits)
    assert report["val"]["accuracy"] == report["best"]["val_accuracy"]
    assert report["val"]["uncalibrated"]["nll"] == pytest.approx(
        report["best"]["val_loss"], abs=1e-4
    )


def test_the_features_may_be_those_of_a_run(opened, tmp_path):
    other = write_run(tmp_path / "other")
    summary = train_run("stripes", tmp_path / "r", {"recipe": "probe", "weights": other})
    assert same(body(weights(tmp_path / "r")), body(weights(other)))
    found, theirs = load_model(tmp_path / "r"), load_model(other)
    assert found.preprocess == theirs.preprocess == Preprocess(
        (32, 32), (36, 40), "crop", (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
    )  # fmt: skip
    assert found.classes == opened.classes != theirs.classes
    assert summary["model"] == "vit_micro_32"
    again = train_run("stripes", tmp_path / "r", resume=True)
    assert {**again, "seconds": 0, "files": 0, "best": 0} == {
        **summary, "seconds": 0, "files": 0, "best": 0
    }  # fmt: skip
    with pytest.raises(DataError, match="nowhere"):
        train_run("stripes", tmp_path / "n", {"recipe": "probe", "weights": tmp_path / "nowhere"})


def test_pictures_that_a_run_was_trained_on_never_judge_it(opened, tmp_path):
    typed = {"model": "vit_micro_32", "size": 32, "batch": 16, "epochs": 1, "seed": 5}
    train_run("stripes", tmp_path / "run", typed)
    given = {"recipe": "probe", "weights": tmp_path / "run"}
    with pytest.raises(UsageError, match=r"was trained on \d+ of the pictures.*add --seed 5"):
        train_run("stripes", tmp_path / "other", given)
    assert not (tmp_path / "other").exists()
    train_run("stripes", tmp_path / "same", {**given, "seed": 5})
    split = (tmp_path / "run" / "split.csv").read_text()
    assert (tmp_path / "same" / "split.csv").read_text() == split


def test_stopped_and_resumed_equals_uninterrupted(opened, tmp_path, monkeypatch):
    train_run("stripes", tmp_path / "whole", PROBE)
    real = probe.fit_logistic

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "fit_logistic", stop)
    with pytest.raises(Interrupted, match="--resume"):
        train_run("stripes", tmp_path / "cut", PROBE)
    monkeypatch.setattr(probe, "fit_logistic", real)
    train_run("stripes", tmp_path / "cut", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_without_validation_pictures_nothing_chooses(monkeypatch, source, tmp_path):
    monkeypatch.setattr(session, "open_source", lambda spec: type(source)(per_class=2))
    summary = train_run("few", tmp_path / "r", PROBE)
    assert summary["split"]["val"] == 0
    assert summary["best"]["penalty"] == UNCHOSEN
    with (tmp_path / "r" / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1
