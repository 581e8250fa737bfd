"""The recipe: written, read, refused."""

from __future__ import annotations

import tomllib

import pytest
import tomli_w

from crosspatch.errors import UsageError
from crosspatch.training.recipe import Recipe


def test_a_recipe_survives_toml(make_recipe):
    recipe = make_recipe(model_args={"patch": [2, 4]}, time_budget=12.5)
    again = Recipe.from_dict(tomllib.loads(tomli_w.dumps(recipe.to_dict())))
    assert again == recipe
    assert make_recipe().time_budget is None
    assert Recipe.from_dict(make_recipe().to_dict()) == make_recipe()


def test_unknown_and_missing_settings_are_named(recipe):
    with pytest.raises(UsageError, match=r"smoothin'.*smoothing"):
        Recipe.from_dict({**recipe.to_dict(), "smoothin": 0.1})
    given = recipe.to_dict()
    given["augment"]["flp"] = True
    with pytest.raises(UsageError, match=r"flp'.*flip"):
        Recipe.from_dict(given)
    given = recipe.to_dict()
    del given["lr"]
    with pytest.raises(UsageError, match="missing: lr"):
        Recipe.from_dict(given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch", 0), ("lr", 0.0), ("lr", 11.0), ("min_lr", 1.0), ("smoothing", 1.0),
        ("drop_path", -0.1), ("fit", "stretch"), ("precision", "fp8"), ("precision", "fp16"),
        ("mix", ("cutout",)),        ("workers", -1), ("size", (0, 8)), ("steps", 0), ("ema", 1.0),
        ("schedule", "steps"), ("repeats", 0),
    ],
)  # fmt: skip
def test_impossible_values_are_refused(make_recipe, name, value):
    with pytest.raises(UsageError, match=name):
        make_recipe(**{name: value})


def test_evaluations_are_due_after_epochs_and_at_the_end(make_recipe):
    assert make_recipe().evaluations() == [7, 14, 21, 28, 30]
    assert make_recipe(eval_every=2).evaluations() == [14, 28, 30]
    assert make_recipe(steps=28).evaluations() == [7, 14, 21, 28]
    assert make_recipe(steps=3).evaluations() == [3]
    assert make_recipe().longer(40).evaluations() == [7, 14, 21, 28, 30, 35, 40]
    assert make_recipe().longer(40).longer(50).shorter.shorter == make_recipe()
    assert make_recipe().shorter is None
    assert make_recipe().epochs == 5
    assert make_recipe(steps=28).epochs == 4
