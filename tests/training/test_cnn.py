"""The recipe cnn: SGD with momentum, weak augmentation, resumed with the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crosspatch.errors import UsageError
from crosspatch.training.machine import Machine
from crosspatch.training.optim import SGD, make_optimiser
from crosspatch.training.plan import plan
from crosspatch.training.recipes import cnn, load_recipe
from support.loops import Stop, halt, same


class Look:
    median_side, aspect = 32, 1.0


def planned(side=32, device="cpu", **given):
    look = Look()
    look.median_side = side
    machine = Machine(cores=1, memory=1 << 33, device=device)
    return plan(look, 4000, 10, machine, given)


def test_sgd_is_torchs_with_momentum_and_decay_of_all_but_vectors():
    layer = nn.Linear(3, 2)
    first = [p.detach().clone() for p in layer.parameters()]
    optimiser = make_optimiser(layer, set(), lr=0.1, weight_decay=0.5, betas=(0.9, 0.9), kind=SGD)
    for _ in range(2):
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        optimiser.step()
    weight = first[0]
    velocity = torch.ones_like(weight) + 0.5 * weight
    weight = weight - 0.1 * velocity
    velocity = 0.9 * velocity + 1 + 0.5 * weight
    assert torch.allclose(layer.weight, weight - 0.1 * velocity, atol=1e-6)
    assert torch.allclose(layer.bias, first[1] - 0.1 - 0.19, atol=1e-6)


def test_a_run_by_sgd_that_is_stopped_goes_on_with_the_same_bits(train, make_recipe):
    recipe = make_recipe(optimiser="sgd", lr=0.05, mix=(), mix_prob=(), mix_alpha=())
    whole, _ = train("whole", use=recipe)
    with pytest.raises(Exception, match="stop"):
        train("cut", Stop(11, halt()), use=recipe)
    cut, _ = train("cut", resume=True, use=recipe)
    same(whole, cut)


def test_the_plan_says_sgd_and_takes_the_network_of_the_size():
    recipe, reasons = planned(recipe="cnn")
    assert (recipe.model, recipe.size, recipe.optimiser) == ("resnet32_cifar", (32, 32), "sgd")
    assert (recipe.batch, recipe.lr, recipe.weight_decay) == (128, pytest.approx(0.1), 5e-4)
    assert recipe.augment.pad == pytest.approx(4 / 32)
    assert not recipe.augment.recolours
    assert not recipe.mix
    assert any("SGD" in reason for reason in reasons)
    assert planned(300, "cuda", recipe="cnn")[0].model == "resnet50"
    assert planned(300, recipe="cnn")[0].size == (64, 64)
    assert planned(recipe="cnn", model="resnet20_cifar")[0].size == (32, 32)


def test_deit_lt_is_trained_by_its_own_recipe_with_its_own_model():
    recipe, _ = planned(objective="deit-lt:drw=0.8")
    assert (recipe.name, recipe.model) == ("deit-lt", "deit_micro_distilled_32")
    assert (recipe.objective, recipe.objective_args) == ("deit-lt", {"drw": 0.8})
    assert (recipe.balance, recipe.smoothing, sum(recipe.mix_prob)) == ("none", 0.1, 1.0)
    other, _ = planned(300, objective="deit-lt", recipe="deit")
    assert (other.name, other.model) == ("deit", "deit_tiny_distilled_patch16_224")
    assert planned(60, objective="deit-lt")[0].size == (64, 64)
    with pytest.raises(UsageError, match="weighs rare classes itself"):
        planned(objective="deit-lt", balance="drw")


def test_an_unknown_optimiser_is_refused(make_recipe):
    with pytest.raises(UsageError, match="one of adamw-fused"):
        make_recipe(optimiser="adam")
    assert load_recipe("cnn") is cnn
