# SPDX-License-Identifier: Apache-2.0
"""From a recipe to the objective that it describes."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn

from crosspatch.errors import UsageError
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

AUTO, SUPERVISED = "auto", "supervised"
OBJECTIVES = {
    SUPERVISED: "supervised:Supervised",
    "mctf": "mctf:Consistency",
    "evovit": "evovit:TwoHeads",
    "dcal": "dcal:DualCross",
}
"""`Recipe.objective` -> module of `crosspatch.objectives` and the class; what is named as a token
reduction is that reduction's own objective."""


def resolve_objective(asked: str, reduce: str) -> str:
    """What `--objective` means for a model with the reduction `reduce` ("" = none): "auto" is the
    reduction's own objective where it has one, else "supervised".

    Raises UsageError for any other word, and for the objective of a reduction that is not there.
    """
    method = reduce.partition(":")[0]
    if asked == AUTO:
        return method if method in OBJECTIVES else SUPERVISED
    if asked not in OBJECTIVES or asked not in (SUPERVISED, method):
        with_it = f", or {method} with --reduce {method}" if method in OBJECTIVES else ""
        raise UsageError(
            f"--objective {asked}" + (f" with --reduce {reduce}" if reduce else ""),
            f"auto or supervised{with_it}",
            "leave --objective away",
        )
    return asked


def make_mixer(recipe: Recipe) -> OneOf | None:
    """The batch mixing of a recipe, or None."""
    if not recipe.mix:
        return None
    mixers = [MIXER_OF[n](a) for n, a in zip(recipe.mix, recipe.mix_alpha, strict=True)]
    return OneOf(mixers, recipe.mix_prob)


def make_objective(
    recipe: Recipe, classes: tuple[str, ...], model: nn.Module | None = None
) -> Supervised:
    """A fresh objective, seeded by the recipe; `model` instead of the one that the recipe names.

    Raises UsageError for an objective that this version does not know.
    """
    kind = _objective_class(recipe.objective)
    module = build_model(recipe, len(classes)) if model is None else model
    return kind(
        module,
        make_task(recipe.task, classes),
        smoothing=recipe.smoothing,
        mixer=make_mixer(recipe),
        weights=recipe.class_weights,
    )


def _objective_class(name: str) -> type[Supervised]:
    if name not in OBJECTIVES:
        raise UsageError(
            f"objective = {name}", f"one of {', '.join(OBJECTIVES)}", "use a newer version"
        )
    module, kind = OBJECTIVES[name].split(":")
    return getattr(importlib.import_module(f"crosspatch.objectives.{module}"), kind)
