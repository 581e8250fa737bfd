# SPDX-License-Identifier: Apache-2.0
"""From a recipe to the objective that it describes."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from crosspatch.mixing import OneOf
from crosspatch.mixing.cutmix import Cutmix
from crosspatch.mixing.deit import BatchCutmix, BatchMixup
from crosspatch.mixing.mixup import Mixup
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks import make_task
from crosspatch.training.package import build_model
from crosspatch.training.recipe import Recipe

MIXER_OF: dict[str, Callable] = {
    "mixup": Mixup,
    "cutmix": Cutmix,
    "mixup-batch": BatchMixup,
    "cutmix-batch": BatchCutmix,
}


def make_mixer(recipe: Recipe) -> OneOf | None:
    """The batch mixing of a recipe, or None."""
    if not recipe.mix:
        return None
    mixers = [MIXER_OF[n](a) for n, a in zip(recipe.mix, recipe.mix_alpha, strict=True)]
    return OneOf(mixers, recipe.mix_prob)


def make_objective(
    recipe: Recipe, classes: tuple[str, ...], model: nn.Module | None = None
) -> Supervised:
    """A fresh objective, seeded by the recipe; `model` instead of the one that the recipe names."""
    module = build_model(recipe, len(classes)) if model is None else model
    return Supervised(
        module,
        make_task(recipe.task, classes),
        smoothing=recipe.smoothing,
        mixer=make_mixer(recipe),
        weights=recipe.class_weights,
    )
