# SPDX-License-Identifier: Apache-2.0
"""`--sizes`: the further input sizes of a training, and whether a network takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from crosspatch.errors import UsageError
from crosspatch.layers.patch_embed import pair
from crosspatch.objectives.resformer import refuse_reduced, require_resizable
from crosspatch.training.package import Trained, build_model
from crosspatch.training.recipe import Recipe

FREE = {"dynamic_img_size": True}
"""What a network whose positions can be resized on the way is built with."""
TRIED = (ValueError, RuntimeError, AssertionError, TypeError)
DO = "--model resformer_tiny_patch16 (resformer_micro_32 for pictures of 32 pixels)"

Size = tuple[int, int]


def settle_sizes(recipe: Recipe, classes: int) -> Recipe:
    """The recipe with its further sizes from the largest to the smallest, and a model that takes
    them all: where it can be told to, `model_args` says so, and so does the trained model.

    Raises UsageError for sizes that are not smaller than the
    model's, come twice or leave no whole number of patches, and for a network that takes but one.
    """
    if not recipe.sizes:
        return recipe
    if recipe.penalties:
        raise UsageError(
            f"--sizes with --recipe {recipe.name}",
            "a recipe that trains the whole network",
            "leave --sizes away",
        )
    recipe = replace(recipe, sizes=tuple(sorted(recipe.sizes, reverse=True)))
    freed = replace(recipe, model_args={**recipe.model_args, **FREE})
    try:
        model = _shape(freed, classes)
    except UsageError:  # it does not know the word: a convolutional network needs none
        freed, model = recipe, _shape(recipe, classes)
    if recipe.reduce:
        raise refuse_reduced()
    require_resizable(model)
    _check(recipe, _patch(model))
    require_sizes(model, recipe.model, (recipe.size, *recipe.sizes))
    return freed


def describe_sizes(recipe: Recipe) -> list[str]:
    """A sentence about them, where there are some."""
    if not recipe.sizes:
        return []
    told = ", ".join(spelt(size) for size in recipe.sizes)
    return [
        f"Every step sees its pictures at {spelt(recipe.size)} pixels and again at {told}; each "
        "size learns from the next larger one."
    ]


def require_sizes(model: nn.Module, name: str, sizes: tuple[Size, ...]) -> None:
    """Raises UsageError where `model`, on the meta device, does not take one of the sizes."""
    for size in sizes:
        try:
            with torch.no_grad():
                model(torch.zeros(1, 3, *size, device="meta"))
        except TRIED as error:
            raise UsageError(
                f"pictures of {spelt(size)} pixels for {name}: {str(error).splitlines()[0]}",
                "a network that takes several sizes: a ViT, a ResFormer, most convolutional ones",
                DO,
            ) from error


def at_size(trained: Trained, size: Size) -> Trained:
    """A trained model that sees pictures of another size, fitted as its own were.

    Raises UsageError where it takes no such size.
    """
    own, patch = trained.preprocess, _patch(trained.module)
    if any(side % p for side, p in zip(size, patch, strict=True)):
        raise UsageError(
            f"pictures of {spelt(size)} pixels",
            f"multiples of {spelt(patch)}, the model's patches: what is over would not be seen",
            "change --size",
        )
    room = zip(size, own.store, own.size, strict=True)
    rows, columns = (max(side, round(side * store / mine)) for side, store, mine in room)
    try:
        with torch.inference_mode():
            trained.module(
                torch.zeros(1, 3, *size, device=next(trained.module.parameters()).device)
            )
    except TRIED as error:
        raise UsageError(
            f"pictures of {spelt(size)} pixels: {str(error).splitlines()[0]}",
            f"a model that takes several sizes; this one was made for {spelt(own.size)}",
            "leave --size out, or train with --sizes",
        ) from error
    return trained._replace(preprocess=replace(own, size=size, store=(rows, columns)))


def spelt(size: Size) -> str:
    """32, or 32x48."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def _shape(recipe: Recipe, classes: int) -> nn.Module:
    """The recipe's network without numbers: on the meta device, in evaluation mode."""
    with torch.device("meta"):
        return build_model(replace(recipe, weights={}, reduce=""), classes, training=False).eval()


def _patch(model: Any) -> Size:
    """What sides must be a multiple of, as far as the network says."""
    found = getattr(model, "patch_size", None)
    if found is None:
        found = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    return pair(found) if isinstance(found, int | tuple) else (1, 1)


def _check(recipe: Recipe, patch: Size) -> None:
    """Raises UsageError for a size out of range, or two that are the same."""
    for size in recipe.sizes:
        sides = tuple(zip(size, recipe.size, patch, strict=True))
        if any(side % p or not p <= side < most for side, most, p in sides) or (
            recipe.sizes.count(size) > 1
        ):
            raise UsageError(
                f"--sizes {','.join(map(spelt, recipe.sizes))} for {recipe.model} of "
                f"{spelt(recipe.size)} pixels",
                f"sizes below that one, each once: {_range(recipe.size, patch)}",
                "change --sizes, or let --size be the largest",
            )


def _range(most: Size, patch: Size) -> str:
    high = ((most[0] - 1) // patch[0] * patch[0], (most[1] - 1) // patch[1] * patch[1])
    steps = "any" if patch == (1, 1) else f"multiples of {spelt(patch)}"
    return f"{steps} from {spelt(patch)} to {spelt(high)}"
