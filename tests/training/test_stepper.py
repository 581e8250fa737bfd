"""One step: the rate by its schedule, and what is decayed."""

from __future__ import annotations

import pytest

from crosspatch.training.objective import make_objective
from crosspatch.training.stepper import Stepper
from support import goldens


def stepper(recipe):
    return Stepper(recipe, make_objective(recipe, ("a", "b", "c")))


def test_the_rates_of_300_epochs_are_those_of_deit(make_recipe):
    """The golden's: peak 1e-3, five epochs of warm-up; every step of an epoch has the epoch's."""
    settings = {"lr": 1e-3, "min_lr": 1e-5, "schedule": "epochs"}
    found = stepper(make_recipe(steps=2100, warmup=35, **settings))
    wanted = goldens.arrays("deit/recipe")["lr"]
    for at in (0, 3, 6):
        rates = [found.lr(epoch * 7 + at) for epoch in range(300)]
        assert rates == pytest.approx(wanted.tolist(), rel=1e-12)


@pytest.mark.parametrize(("named", "decayed"), [((), False), (("token",), True)])
def test_a_recipe_may_decay_what_the_model_would_not(make_recipe, named, decayed):
    groups = stepper(make_recipe(decay=named)).optimiser.param_groups
    names = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert (names["model.token"] > 0) == decayed
    assert names["model.head.weight"] == 0.05
    assert names["model.head.bias"] == 0
