# SPDX-License-Identifier: Apache-2.0
"""Recipes by name. A recipe is a module of constants and the functions that look them up."""

from __future__ import annotations

import importlib
from types import ModuleType

from crosspatch.errors import UsageError, near

RECIPES = {
    "small": "crosspatch.training.recipes.small",
    "deit": "crosspatch.training.recipes.deit",
    "probe": "crosspatch.training.recipes.probe",
    "finetune": "crosspatch.training.recipes.finetune",
    "cnn": "crosspatch.training.recipes.cnn",
    "deit-lt": "crosspatch.training.recipes.deit_lt",
}


def halved(largest: int, pictures: int, *, smallest: int, steps: int) -> int:
    """Pictures per step: `largest`, halved while an epoch of `pictures` has fewer than `steps`
    steps, but not below `smallest`."""
    batch = largest
    while batch > smallest and pictures // batch < steps:
        batch //= 2
    return batch


def load_recipe(name: str) -> ModuleType:
    """The module of a recipe. Raises UsageError with near names for an unknown one."""
    if name not in RECIPES:
        raise UsageError(
            f"unknown recipe {name!r}",
            f"one of {', '.join(RECIPES)}",
            f"try --recipe {near(name, RECIPES) or next(iter(RECIPES))}",
        )
    return importlib.import_module(RECIPES[name])
