# SPDX-License-Identifier: Apache-2.0
"""`--mix a,b,c`: one of these mixings for each batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from crosspatch.errors import UsageError, near
from crosspatch.mixing import OneOf
from crosspatch.mixing.cutmix import Cutmix
from crosspatch.mixing.deit import BatchCutmix, BatchMixup
from crosspatch.mixing.mixpro import MaskMix, cell_for
from crosspatch.mixing.mixup import Mixup
from crosspatch.mixing.resizemix import ResizeMix
from crosspatch.mixing.transmix import TransMix
from crosspatch.models.class_row import why_no_class_row
from crosspatch.models.crossvit import CrossViT
from crosspatch.training.recipe import MIXERS, Recipe

MIXER_OF: dict[str, Callable[..., Any]] = {
    "mixup": Mixup,
    "cutmix": Cutmix,
    "mixup-batch": BatchMixup,
    "cutmix-batch": BatchCutmix,
    "resizemix": ResizeMix,
    "resizemix-beta": partial(ResizeMix, scale="kept", mode="bilinear"),
    "maskmix": MaskMix,
    "mixpro": partial(MaskMix, progressive=True),
    "transmix": TransMix,
}
"""`Recipe.mix` -> what makes a mixer of its alpha; those of `CELLED` are told the cell too."""
CELLED = ("maskmix", "mixpro")
ATTENTIVE = {"mixpro": "maskmix", "transmix": "cutmix"}
"""Whose labels follow the attention, and what mixes in the same way without it."""

NONE = "none"
ALPHA = {"mixup": 0.4, "mixup-batch": 0.8}
"""Of the Beta distribution; 1 for the others."""


def resolve_mix(asked: str | Sequence[str]) -> dict[str, Any]:
    """mix, mix_prob and mix_alpha of a recipe: each batch is mixed, by each of these as often; but
    maskmix and mixpro have every second batch where there are others, as in their paper.

    asked: "none", names with commas between them, or names. Raises UsageError for unknown ones.
    """
    names = [part.strip() for part in asked.split(",")] if isinstance(asked, str) else list(asked)
    names = [] if names == [NONE] else names
    for name in names:
        if name not in MIXERS:
            raise UsageError(
                f"there is no mixing {name!r}",
                f"none, or some of {', '.join(MIXERS)}",
                f"--mix {near(name, MIXERS, 1) or 'mixup,cutmix'}",
            )
    return {
        "mix": tuple(names),
        "mix_prob": _shares(names),
        "mix_alpha": tuple(ALPHA.get(name, 1.0) for name in names),
    }


def _shares(names: Sequence[str]) -> tuple[float, ...]:
    """How often each of the mixings is drawn; they sum to 1."""
    celled = sum(name in CELLED for name in names)
    others = len(names) - celled
    if not celled or not others:
        return (1 / len(names),) * len(names) if names else ()
    return tuple(0.5 / (celled if name in CELLED else others) for name in names)


def make_mixer(recipe: Recipe, model: nn.Module) -> OneOf | None:
    """The batch mixing of a recipe for its model, or None.

    Raises UsageError where a label is to follow an attention that the model, the task or the
    objective has not.
    """
    if not recipe.mix:
        return None
    _require_attention(recipe, model)
    cell = {"cell": cell_for(patch_of(model, recipe.size), recipe.size)}
    mixers = [
        MIXER_OF[name](alpha, **(cell if name in CELLED else {}))
        for name, alpha in zip(recipe.mix, recipe.mix_alpha, strict=True)
    ]
    return OneOf(mixers, recipe.mix_prob)


def _require_attention(recipe: Recipe, model: nn.Module) -> None:
    for name in recipe.mix:
        if name not in ATTENTIVE:
            continue
        reason = why_no_class_row(model)
        if recipe.task == "multilabel":
            reason = "its label is one class or another, and pictures here have several"
        elif recipe.objective != "supervised":
            reason = f"the objective {recipe.objective} has labels of its own"
        if reason:
            others = [ATTENTIVE.get(one, one) for one in recipe.mix]
            raise UsageError(
                f"--mix {name} for {recipe.model}: {reason}",
                f"a model that classifies its class token; or {ATTENTIVE[name]}, which mixes alike "
                "and labels by area",
                f"--mix {','.join(dict.fromkeys(others))}",
            )


def patch_of(model: Any, size: tuple[int, int]) -> int:
    """The side, in pixels of the input, of the patches that a mask should keep whole: of a CrossViT
    its coarsest branch's; 1 for a model without a grid of patches, or where its patches are no
    whole pixels of the input."""
    if isinstance(model, CrossViT):
        rows, columns = model.grids[-1]
        whole = not size[0] % rows and not size[1] % columns
        return math.lcm(size[0] // rows, size[1] // columns) if whole else 1
    found = getattr(model, "patch_size", None) or getattr(
        getattr(model, "patch_embed", None), "patch_size", 1
    )
    sides = found if isinstance(found, tuple | list) else (found,)
    return math.lcm(*(int(side) for side in sides))
