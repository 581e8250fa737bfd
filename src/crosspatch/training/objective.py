# SPDX-License-Identifier: Apache-2.0
"""What is learnt: from the words that were typed to a name, and from a recipe to its objective.

A run has one objective. `--objective NAME:option=value,…` names it; `--reduce`, `--distill` (with
`--teacher`), `--labels` and `--sizes` each mean one where none is named.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from crosspatch.errors import UsageError, near
from crosspatch.objectives import Given
from crosspatch.objectives.supervised import Supervised
from crosspatch.objectives.teacher import Scale, Teacher
from crosspatch.tasks import make_task
from crosspatch.tokens.spec import METHODS, parse_options
from crosspatch.training.mix import ATTENTIVE, make_mixer
from crosspatch.training.package import build_model
from crosspatch.training.recipe import EFFECTIVES, Recipe
from crosspatch.training.teacher import load_teacher

AUTO, SUPERVISED = "auto", "supervised"
OBJECTIVES = {
    SUPERVISED: "supervised:Supervised",
    "mctf": "mctf:Consistency",
    "evovit": "evovit:TwoHeads",
    "dcal": "dcal:DualCross",
    "ldam": "ldam:Ldam",
    "logit-adjust": "logit_adjust:LogitAdjust",
    "deit-lt": "deit_lt:DeitLT",
    "distill": "distill:Distill",
    "scalekd": "scalekd:ScaleKD",
    "token-labeling": "token_labeling:TokenLabeling",
    "resformer": "resformer:MultiSize",
}
"""`Recipe.objective` -> module of `crosspatch.objectives` and the class; what is named as a token
reduction is that reduction's own objective."""
DISTILS = ("soft", "hard", "scalekd")
WANTS = {
    "distill": ("teacher", "--teacher RUN"),
    "scalekd": ("teacher", "--teacher RUN"),
    "resformer": ("sizes", "--sizes 24,16"),
}
"""What an objective cannot do without, and how it is typed."""
GIVES = {"labels": ("token-labeling",), "sizes": ("resformer",),
         "teacher": ("distill", "scalekd", "deit-lt")}  # fmt: skip
"""What only some objectives read."""
OWN_RECIPES = {"deit-lt": "deit-lt"}
"""The recipe of an objective that has one of its own."""
UNMIXED = ("token-labeling",)
"""Objectives whose pictures are not mixed: a recipe's own mixing is left out for them."""
FORM = "NAME or NAME:option=value,…, such as ldam:margin=0.5"


def parse_objective(text: str) -> tuple[str, dict[str, Any]]:
    """(name, options) of `text`. Raises UsageError for an unknown name and for another form."""
    name, _, rest = text.strip().partition(":")
    if name != AUTO and name not in OBJECTIVES:
        raise UsageError(
            f"there is no objective {name!r}",
            f"auto, or one of {', '.join(OBJECTIVES)}",
            f"--objective {near(name, OBJECTIVES, 1) or AUTO}",
        )
    return name, parse_options(rest, text, FORM, "--objective ldam:margin=0.5")


def resolve_objective(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, options) of what the settings typed ask to be learnt.

    given: objective, reduce, distill, teacher, labels and sizes, as far as they were typed. Raises
    UsageError where they ask for two objectives, or one lacks what it works with.
    """
    name, options = parse_objective(given.get("objective", AUTO))
    method = given.get("reduce", "").partition(":")[0]
    distill = given.get("distill", "soft" if given.get("teacher") else None)
    asked = [method] if of_reduction(method) else []
    if "distill" in given or (name == AUTO and distill):
        asked.append("scalekd" if distill == "scalekd" else "distill")
    asked += ["token-labeling"] if given.get("labels") else []
    asked += ["resformer"] if given.get("sizes") else []
    if name == AUTO:
        if len(asked) > 1:
            raise _two(asked)
        name = asked[0] if asked else SUPERVISED
    elif further := [one for one in asked if one != name and not of_reduction(one)]:
        raise _two([name, *further])
    if of_reduction(name) and name != method:
        raise UsageError(
            f"--objective {name}" + (f" with --reduce {method}" if method else ""),
            f"a model with that reduction, --reduce {name}; or another objective",
            "leave --objective away",
        )
    if name == "distill" and "distill" in given:
        if options.get("kind", distill) != distill:
            raise _two([f"--distill {distill}", f"distill:kind={options['kind']}"])
        options = {"kind": distill, **options}
    _require_whole(name, given)
    if name in UNMIXED and given.get("mix") not in (None, "none", ()):
        raise UsageError(
            f"--mix {given['mix']} with the objective {name}",
            "whole pictures: a mixed one has no label at a place",
            "--mix none, or leave --mix away",
        )
    return name, options


def of_reduction(name: str) -> bool:
    """Whether an objective is a token reduction's, which must be in the model."""
    return name in METHODS and name in OBJECTIVES


def _two(names: list[str]) -> UsageError:
    return UsageError(
        f"two objectives at once: {' and '.join(names)}",
        "one objective to a run: each says for itself what the loss is",
        "leave the options of one of them away, or say --objective supervised with --reduce",
    )


def _require_whole(name: str, given: Mapping[str, Any]) -> None:
    key, how = WANTS.get(name, ("", ""))
    if key and not given.get(key):
        raise UsageError(f"the objective {name} without {key}", f"{name} needs {how}", f"add {how}")
    for key, readers in GIVES.items():
        if given.get(key) and name not in readers:
            raise UsageError(
                f"--{key} with the objective {name}",
                f"--{key} is for {', '.join(readers)}",
                f"leave --{key} or --objective away",
            )


def make_objective(
    recipe: Recipe,
    classes: tuple[str, ...],
    model: nn.Module | None = None,
    *,
    later: Teacher | None = None,
) -> Supervised:
    """A fresh objective, seeded by the recipe; `model` instead of the one that the recipe names;
    later: stands for a teacher that has still to be trained.

    Raises UsageError for an objective that this version does not know, or that cannot work with the
    recipe's model, labels or mixing; DataError where its teacher or labels cannot be read.
    """
    kind = _objective_class(recipe.objective)
    simple = recipe.objective == SUPERVISED or of_reduction(recipe.objective)
    if recipe.task == "multilabel" and not simple:
        raise UsageError(
            f"the objective {recipe.objective} for pictures with several labels",
            "one class to a picture; with several: supervised, or that of a token reduction",
            "leave --objective away",
        )
    module = build_model(recipe, len(classes)) if model is None else model
    rules: dict[str, Any] = {
        "smoothing": recipe.smoothing,
        "mixer": make_mixer(recipe, module),
        "weights": recipe.class_weights,
        "deferred": recipe.deferred,
    }
    teacher = load_teacher(recipe, classes) if recipe.teacher else later
    given = Given(recipe.objective_args, recipe.class_counts, teacher, recipe.labels)
    objective = kind.build(module, make_task(recipe.task, classes), rules, given)
    objective.weighted_mean = recipe.balance in EFFECTIVES
    return objective


def rehearse(recipe: Recipe, classes: tuple[str, ...]) -> None:
    """Raises, before a picture is read, what `make_objective` would for a recipe whose pictures are
    not yet counted and whose weights and teacher may not be there yet."""
    _objective_class(recipe.objective).read(recipe.objective_args)
    if recipe.objective == SUPERVISED and not any(name in ATTENTIVE for name in recipe.mix):
        return
    scale = Scale(recipe.mean, recipe.std)
    later = Teacher(nn.Identity(), recipe.size, scale, scale, "to be trained")
    counts = (1,) * len(classes)
    make_objective(replace(recipe, weights={}, class_counts=counts), classes, later=later)


def _objective_class(name: str) -> type[Supervised]:
    if name not in OBJECTIVES:
        raise UsageError(
            f"objective = {name}", f"one of {', '.join(OBJECTIVES)}", "use a newer version"
        )
    module, kind = OBJECTIVES[name].split(":")
    return getattr(importlib.import_module(f"crosspatch.objectives.{module}"), kind)
