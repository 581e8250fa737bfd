# SPDX-License-Identifier: Apache-2.0
"""Starting from weights: the plan for a run that begins with some, and the model of one that goes
on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from crosspatch.metrics.macs import count_macs
from crosspatch.tokens import spec
from crosspatch.tokens.host import branch_names, reducers_of
from crosspatch.tokens.reduce import put
from crosspatch.training import plan as plans
from crosspatch.training import team
from crosspatch.training.package import build_model, take_weights
from crosspatch.training.pictures import Pictures
from crosspatch.training.recipe import Recipe
from crosspatch.training.recipes import load_recipe
from crosspatch.training.reporter import Reporter
from crosspatch.training.run import RunFolder
from crosspatch.training.state import BEFORE, GOOD, LAST
from crosspatch.training.weights import Found, find, match_heads, refuse_seen

Shape = tuple[Any, int, int, Any]
"""What a plan is made for: survey, pictures to train on, classes, machine."""


@dataclass(frozen=True)
class Beginning:
    """Settings to plan with, the weights that were found, and what is to be said of them."""

    settings: dict[str, Any]
    found: Found | None
    remarks: list[str] = field(default_factory=list)

    def plan(self, shape: Shape, pictures: Pictures) -> tuple[Recipe, list[str]]:
        """(recipe, reasons) for the pictures that could be read.

        Raises UsageError where the weights have seen pictures that would judge them here.
        """
        if self.found is not None and self.found.kind == "run":
            refuse_seen(self.found, pictures)
        recipe, reasons = plans.plan(*shape, self.settings, self.found)
        recipe, said = _with_head(recipe, self.found, pictures.source.classes)
        return recipe, [*reasons, *self.remarks, *said]


def plan_with_weights(
    shape: Shape, given: dict[str, Any], reporter: Reporter
) -> tuple[Recipe, Beginning]:
    """(the first plan, what the next one is made with).

    Where a recipe that wants weights finds none, `small` is what is trained from scratch. Weights
    that do not fit, and reductions that the model cannot have, are refused here, before a picture
    is read; raises as `weights.find` does.
    """
    recipe, _ = plans.plan(*shape, given)
    source, remarks = load_recipe(recipe.name), list[str]()
    asked = given.get("weights", source.WEIGHTS)
    found = find(asked, recipe.model, given, remarks, reporter.message)
    if found is None and source.FREEZE:
        given = {**given, "recipe": "small"}
    recipe, _ = plans.plan(*shape, given, found)
    if recipe.reduce:
        remarks.append(_what_is_saved(recipe, shape[2]))
    if found is not None:
        build_model(recipe, shape[2])
    return recipe, Beginning(given, found, remarks)


def _what_is_saved(recipe: Recipe, classes: int) -> str:
    """A sentence about the recipe's reduction. Raises UsageError for one that its model cannot
    have."""
    model = build_model(replace(recipe, weights={}, reduce=""), classes, training=False)
    base = count_macs(model, (3, *recipe.size))
    put(model, *spec.parse(recipe.reduce))
    macs = count_macs(model, (3, *recipe.size))
    names = branch_names(model) or ("",)
    tokens = ", ".join(
        f"{f'{name} ' if name else ''}from {reducer.counts[0]:,} to {reducer.counts[-1]:,}"
        for name, reducer in zip(names, reducers_of(model), strict=True)
        if reducer is not None
    )
    return (
        f"Tokens are reduced by {recipe.reduce}: {tokens}, and in evaluation {macs / 1e6:,.1f} "
        f"instead of {base / 1e6:,.1f} million multiply-adds ({100 * (macs / base - 1):+.0f} %)."
    )


def _with_head(
    recipe: Recipe, found: Found | None, classes: tuple[str, ...]
) -> tuple[Recipe, list[str]]:
    """(the recipe with the rows of the head that are taken over, what is said about it)."""
    if found is None or recipe.penalties:
        return recipe, []
    if found.kind == "run":
        rows, said = match_heads(found.classes, classes)
        return replace(recipe, head_rows=rows), [said]
    bare = build_model(replace(recipe, weights={}, reduce=""), len(classes))
    there = take_weights(bare, recipe)
    if there is None:
        return recipe, ["They have no head: it is fresh."]
    kept = "taken as it is: it names none" if there == len(classes) else "left away: it is fresh"
    return recipe, [f"Their head of {there:,} classes is {kept}."]


def saved_model(run: RunFolder, recipe: Recipe, classes: int) -> nn.Module | None:
    """A model for the run's state to fill, or None while there is none: only then are the weights
    it began with read once more."""
    saved = team.share(any((run.last / name).is_file() for name in (LAST, BEFORE, GOOD)))
    return build_model(replace(recipe, weights={}), classes) if saved else None
