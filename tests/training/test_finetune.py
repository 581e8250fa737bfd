"""The recipe `finetune`: first the head, rates by layer, the peak by a range test, exact resume."""

from __future__ import annotations

import itertools
import math
import tomllib
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from crosspatch.data.loading import train_batches
from crosspatch.errors import Interrupted
from crosspatch.training import measure, session
from crosspatch.training.objective import make_objective
from crosspatch.training.pictures import Pictures
from crosspatch.training.recipe import Recipe
from crosspatch.training.recipes import finetune
from crosspatch.training.reporter import Silent
from crosspatch.training.session import train_run
from crosspatch.training.stepper import Stepper
from support.runs import write_run

SMALL = {"recipe": "finetune", "batch": 16, "epochs": 5, "threads": 1}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(finetune, "RANGE", (1e-5, 0.1, 12))


@pytest.fixture
def other(tmp_path):
    return write_run(tmp_path / "other")


def tensors(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("model", ["vit_micro_32", "crossvit_micro_32", "resnet10t"])
@pytest.mark.parametrize("kind", ["adamw-fused", "adamw-foreach"])
def test_frozen_steps_change_nothing_but_the_head(make_recipe, images, model, kind):
    recipe = make_recipe(model=model, size=(32, 32), store=(32, 32), freeze=2, optimiser=kind)
    stepper = Stepper(recipe, make_objective(recipe, images.classes))
    exported, averaged = stepper.objective.exported, stepper.ema.module
    before = tensors(exported)
    pictures = images.images(torch.arange(8))
    big = torch.nn.functional.interpolate(pictures.permute(0, 3, 1, 2).float(), (32, 32))
    batch = next(iter(train_batches(images, 8, epoch=0, seed=0, workers=0)))
    batch = batch._replace(images=big.permute(0, 2, 3, 1).to(torch.uint8))
    heads = tuple(f"{name}." for name in ("head", "fc"))
    for step in range(3):
        stepper.step(batch, 0, step)
        after, average = tensors(exported), tensors(averaged)
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        moved = {name for name in average if not torch.equal(average[name], before[name])}
        assert any(name.startswith(heads) for name in changed)
        body = {name for name in changed | moved if not name.startswith(heads)}
        assert bool(body) == (step == 2)
    matrices = {name for name, p in exported.named_parameters() if p.ndim > 1}
    assert matrices <= changed
    norms = [name for name in after if name.endswith("running_mean")]
    assert all(name in changed for name in norms)


def test_a_whole_run_that_is_stopped_and_resumed_in_both_phases(
    opened, other, tmp_path, monkeypatch
):
    monkeypatch.setattr(session, "fit", partial(session.fit, report_seconds=0.0))
    typed = {**SMALL, "weights": str(other), "freeze": 6}
    whole = train_run("stripes", tmp_path / "whole", typed)
    assert whole["steps"] == 15

    class Stop(Silent):
        def __init__(self, at):
            self.at = at

        def step(self, done, total, loss, images_per_second):
            if done >= self.at:
                raise Interrupted("stop", "x", "y")

    with pytest.raises(Interrupted):
        train_run("stripes", tmp_path / "cut", typed, Stop(3))
    for name in ("config.json", "model.safetensors"):
        (other / "model" / name).unlink()  # with a state the weights are never read again
    with pytest.raises(Interrupted):
        train_run("stripes", tmp_path / "cut", {}, Stop(9), resume=True)
    cut = train_run("stripes", tmp_path / "cut", {}, resume=True)
    assert cut["test"] == whole["test"]
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def recipe_of(run):
    return Recipe.from_dict(tomllib.loads((run / "config.toml").read_text())["recipe"])


def test_the_recipe_as_it_is_planned(opened, other, tmp_path):
    reasons: list[str] = []

    class Hear(Silent):
        def plan(self, info):
            reasons.extend(info["reasons"])

    train_run("stripes", tmp_path / "r", {**SMALL, "weights": str(other)}, Hear())
    recipe = recipe_of(tmp_path / "r")
    assert recipe.freeze == round(finetune.FREEZE * recipe.steps)
    assert recipe.layer_decay == finetune.LAYER_DECAY
    lowest, highest, _ = finetune.RANGE
    assert lowest / 10 <= recipe.lr <= highest / 10
    assert recipe.min_lr == pytest.approx(recipe.lr * finetune.RATE_LAST)
    assert any("Peak rate" in one and "--lr skips this" in one for one in reasons)
    assert any("0 of 3 taken over, 3 fresh" in one for one in reasons)
    assert any("only the head learns" in one for one in reasons)

    reasons.clear()
    train_run("stripes", tmp_path / "s", {**SMALL, "weights": str(other), "lr": 2e-4}, Hear())
    assert recipe_of(tmp_path / "s").lr == 2e-4
    assert not any("rates from" in one for one in reasons)


@pytest.fixture
def pictures(source, images, make_recipe):
    from crosspatch.data.prepare import prepare
    from crosspatch.data.split import make_split

    prepared = prepare(source, make_recipe().preprocess)
    return Pictures(source, prepared, make_split(source), "f")


def test_the_range_test_is_a_pure_function_of_recipe_and_pictures(make_recipe, pictures):
    recipe = make_recipe(model="vit_micro_32")
    found = [measure.range_test(recipe, pictures, 1e-5, 0.1, 12) for _ in range(2)]
    assert found[0] == found[1]
    given, losses = found[0]
    assert len(given) == len(losses) == 12
    assert (given[0], given[-1]) == pytest.approx((1e-5, 0.1))
    ratios = [b / a for a, b in itertools.pairwise(given)]
    assert ratios == pytest.approx([ratios[0]] * 11)
    assert measure.range_test(replace(recipe, seed=1), pictures, 1e-5, 0.1, 12)[1] != losses


def test_a_loss_that_is_not_finite_ends_the_range_test(make_recipe, pictures, monkeypatch):
    recipe = make_recipe(model="vit_micro_32")
    real = Stepper.step

    def spoilt(self, batch, epoch, step):
        real(self, batch, epoch, step)
        if step == 4:
            self.loss_sum += math.nan

    monkeypatch.setattr(Stepper, "step", spoilt)
    losses = measure.range_test(recipe, pictures, 1e-5, 0.1, 12)[1]
    assert len(losses) == 5
    assert math.isnan(losses[-1])
    assert measure.least([math.nan]) == 0
    assert measure.least([3.0, 2.0, 2.5, math.nan]) == 1


def test_what_is_made_of_the_losses(make_recipe, pictures, monkeypatch):
    recipe = make_recipe(name="finetune", lr=1e-3)

    def settle(losses, most=40):
        test = lambda *how: (measure.rates(*how[2:]), losses)
        monkeypatch.setattr(measure, "range_test", test)
        reasons: list[str] = []
        return measure.settle_rate(recipe, pictures, reasons, most), reasons[0]

    found, why = settle([3.0, 2.0, 1.0, 2.0])
    place = measure.rates(*finetune.RANGE)[2]
    assert found.lr == place / 10
    assert found.min_lr == found.lr * finetune.RATE_LAST
    assert "4 steps" in why
    assert f"least at {place:.2g}" in why
    same, why = settle([1.0, 2.0, 5.0])
    assert same == recipe
    assert "did not lower" in why
    same, why = settle([3.0, 1.0], most=5)
    assert same == recipe
    assert "no time" in why
