# SPDX-License-Identifier: Apache-2.0
"""The plan: from data and machine to a recipe, with the reasons in plain sentences.

`overrides` are what the user typed: model, size, fit, batch, epochs, time (seconds), lr, seed,
precision, compile, workers, flip, recipe, linear, balance, weights (see `training.weights`), reduce
(see `tokens.spec`), objective (see `training.objective`); and, for experiments, any other field of
`Recipe` ("augment" then being a dict of `AugmentConfig` fields). They always win. `devices` is
settled before there is a plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

from crosspatch.data.augment import AugmentConfig
from crosspatch.data.preprocess import Preprocess
from crosspatch.errors import UsageError, near
from crosspatch.tokens import spec
from crosspatch.tokens.reduce import check_options
from crosspatch.training.machine import Machine
from crosspatch.training.mix import resolve_mix
from crosspatch.training.objective import (
    AUTO,
    OWN_RECIPES,
    SUPERVISED,
    UNMIXED,
    parse_objective,
    resolve_objective,
)
from crosspatch.training.optim import SGD
from crosspatch.training.recipe import Recipe
from crosspatch.training.recipes import cnn, load_recipe
from crosspatch.training.weights import NONE, Found

TYPED = (
    "model", "size", "fit", "batch", "epochs", "time", "lr", "seed", "precision", "compile",
    "workers", "flip", "recipe", "linear", "weights", "balance", "devices", "reduce", "objective",
    "teacher", "distill", "mix", "labels", "sizes", "sam", "split_seed",
)  # fmt: skip
SPARE = 0.05  # of a time budget is left unused
EVAL_SHARE = 0.08  # of a run may go into validation, before it is done less often
STRONG_TURN = 20.0  # degrees, from which the augmentation is called strong
SIZE_UNKNOWN = 224  # input of a model whose name holds no size


class Sides(Protocol):
    """What the plan needs of a survey: median shorter side in pixels, median width / height."""

    @property
    def median_side(self) -> int: ...

    @property
    def aspect(self) -> float: ...


def check_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides without those that are None. Raises UsageError for unknown or bad ones."""
    given = {key: value for key, value in overrides.items() if value is not None}
    if "weights" in given:
        given["weights"] = str(given["weights"])
    known = {*TYPED, *(f.name for f in fields(Recipe))}
    for key in given:
        if key not in known:
            raise UsageError(
                f"unknown setting {key!r}", f"one of {near(key, known) or ', '.join(TYPED)}",
                f"remove {key}",
            )  # fmt: skip
    for key in ("batch", "epochs", "time", "lr"):
        if key in given and not given[key] > 0:
            raise UsageError(f"--{key} {given[key]}", "a number above 0", f"change --{key}")
    if "sam" in given and not 0 < given["sam"] < math.inf:
        raise UsageError(
            f"--sam {given['sam']}",
            "a radius above 0, such as 0.05",
            "change --sam, or leave it away",
        )
    if "time" in given and ("epochs" in given or "steps" in given):
        raise UsageError(
            "both --time and --epochs", "one of them", "leave one away: either sets the length"
        )
    if "reduce" in given:
        method, options = spec.parse(given["reduce"])
        check_options(method, options)
        given["reduce"] = spec.spell(method, options)
    if "mix" in given:
        resolve_mix(given["mix"])
    if "labels" in given:
        given["labels"] = str(given["labels"])
    if "sizes" in given:
        given["sizes"] = further_sizes(given["sizes"])
    # the reduction may be that of the weights
    resolve_objective({"reduce": given.get("objective", ""), **given})
    return given


def objective_name(given: Mapping[str, Any]) -> str:
    """The objective that was typed, without its options."""
    return parse_objective(given.get("objective", AUTO))[0]


def recipe_name(given: Mapping[str, Any]) -> str:
    """The recipe that was typed, else that of the objective, else `small`."""
    return given.get("recipe") or OWN_RECIPES.get(objective_name(given), "small")


def _balance(given: Mapping[str, Any]) -> str:
    """`--balance`. Raises UsageError beside an objective that weighs classes itself."""
    asked, name = given.get("balance", "auto"), objective_name(given)
    if name != "deit-lt":
        return asked
    if asked not in ("auto", "none"):
        raise UsageError(
            f"--balance {asked} with the objective {name}",
            f"{name} weighs rare classes itself, from a part of the run on: drw=0.9",
            "leave --balance away",
        )
    return "none"


def further_sizes(asked: str | Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """ "160,128" as ((160, 160), (128, 128)); pairs are left alone. Raises UsageError."""
    parts = asked.split(",") if isinstance(asked, str) else asked
    if isinstance(asked, str) and not all(re.fullmatch(r"[1-9]\d{0,3}", p.strip()) for p in parts):
        raise UsageError(f"--sizes {asked}", "whole numbers of pixels", "--sizes 160,128")
    return tuple(_pair(int(part) if isinstance(part, str) else part) for part in parts)


def plan(
    survey: Sides,
    n_train: int,
    n_classes: int,
    machine: Machine,
    overrides: Mapping[str, Any] | None = None,
    found: Found | None = None,
) -> tuple[Recipe, list[str]]:
    """(recipe, reasons) for `n_train` pictures of `n_classes` classes on `machine`, beginning with
    the weights that were `found`.

    Raises UsageError for overrides that are unknown or impossible.
    """
    given = check_overrides(overrides or {})
    source = load_recipe(recipe_name(given))
    _check_refused(source, given)
    reasons: list[str] = []
    shape = _shape_with(found, source, survey, n_train, machine, given, reasons)
    work = _work(source, n_train, machine, given, reasons)
    augment = {"flip": given.get("flip", True), **source.AUGMENT}
    recipe = Recipe(
        name=recipe_name(given),
        **{"mean": source.MEAN, "std": source.STD, "reduce": given.get("reduce", ""), **shape},
        **work,
        weights=found.record if found else {},
        layer_decay=source.LAYER_DECAY if found else 1.0,
        **_constants(source),
        min_lr=source.last_rate(work["lr"]),
        warmup=0,
        drop_path=0.0,
        augment=AugmentConfig(**augment),
        device=machine.device,
        precision=given.get("precision", "bf16" if machine.bf16 else "fp32"),
        compile=given.get("compile", False),
        seed=given.get("seed", 0),
        workers=given.get("workers", 0),
        threads=machine.cores,
        linear=given.get("linear", "auto"),
        balance=_balance(given),
        time_budget=given.get("time"),
    )
    reasons.extend(source.REASONS)
    recipe = replace(recipe, **_learnt(recipe, given))
    recipe = with_steps(recipe, recipe.steps, given)
    if recipe.sam:
        reasons.append(
            f"Sharpness-aware steps of radius {recipe.sam:g}: two passes each, so they take about "
            "twice as long."
        )
    if recipe.objective in UNMIXED:
        reasons.append(f"Pictures are not mixed: {recipe.objective} mixes patches, if anything.")
    return recipe, reasons


def _learnt(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is learnt, from what, and how; a linear probe learns labels, whatever the reduction
    would."""
    if recipe.penalties:
        given = {"objective": SUPERVISED}
    elif recipe.reduce:
        given = {**given, "reduce": recipe.reduce}
    name, options = resolve_objective(given)
    return {
        "objective": name,
        "objective_args": options,
        "sizes": tuple(given.get("sizes", ())),
        "sam": given.get("sam", 0.0),
        "split_seed": given.get("split_seed"),
    }


def _constants(source: Any) -> dict[str, Any]:
    """Settings that neither data nor machine nor length change."""
    return {
        "weight_decay": source.WEIGHT_DECAY,
        "betas": source.BETAS,
        "optimiser": source.OPTIMISER,
        "schedule": source.SCHEDULE,
        "decay": source.DECAY,
        "repeats": source.REPEATS,
        "ema": source.EMA_HALF_LIFE,
        "smoothing": source.SMOOTHING,
        "clip": source.CLIP,
        "penalties": source.PENALTIES,
    }


def _check_refused(source: Any, given: Mapping[str, Any]) -> None:
    """Raises UsageError for a setting that has no meaning in a recipe."""
    name = recipe_name(given)
    unset = (None, False)  # `flip` is turned off for digits, which refuses nothing
    refused = [key for key in source.REFUSES if given.get(key) not in unset]
    if refused:
        raise UsageError(
            f"--{refused[0]} with the recipe {name}",
            f"{name} takes no {', '.join(source.REFUSES)}",
            f"leave --{refused[0]} away",
        )
    if given.get("weights") == NONE and source.FREEZE:
        raise UsageError(
            f"--weights none with the recipe {name}",
            "weights that have learnt something: auto, a file, a run or a name",
            "take --recipe small, which begins from scratch",
        )


def _shape_with(
    found: Found | None,
    source: Any,
    survey: Sides,
    n_train: int,
    machine: Machine,
    given: Mapping[str, Any],
    reasons: list[str],
) -> dict[str, Any]:
    """Model and its arguments, sizes, fit and normalisation: those of the weights where they have
    them, `--size` and `--fit` excepted."""
    if found is None:
        return _shape(source, survey, n_train, machine, given, reasons)
    if found.kind == "run":
        reasons.extend(found.reasons)
        return _shape_of_run(found, survey, given, reasons)
    its = {key: found.shape[key] for key in ("model", "size") if key in found.shape}
    said: list[str] = []
    shape = _shape(source, survey, n_train, machine, {**its, **given, **_only(its, "model")}, said)
    reasons.extend([*found.reasons, *(said[1:] if its else said)])
    return {**shape, **_only(found.shape, "mean", "std")}


def _shape_of_run(
    found: Found, survey: Sides, given: Mapping[str, Any], reasons: list[str]
) -> dict[str, Any]:
    shape = dict(found.shape)
    if "size" not in given and "fit" not in given:
        return shape
    size, fit = _pair(given.get("size", shape["size"])), given.get("fit", shape["fit"])
    if size != shape["size"]:
        (old, wide), (new, broad) = shape["size"], size
        reasons.append(f"Positions are resized from {old}x{wide} to {new}x{broad} pixels.")
    store = Preprocess.for_pictures(size, fit, survey.median_side).store
    return {**shape, "size": size, "fit": fit, "store": store}


def _only(given: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: given[key] for key in keys if key in given}


def with_steps(recipe: Recipe, steps: int, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe for another number of steps: what depends on the length follows it."""
    given = check_overrides(overrides or {})
    source = load_recipe(recipe.name)
    length = source.by_length(steps / recipe.steps_per_epoch, min(recipe.size))
    warmup = min(source.WARMUP * steps, source.WARMUP_MOST * recipe.steps_per_epoch)
    augment = replace(recipe.augment, **length.pop("augment"))
    freeze = round(source.FREEZE * steps) if recipe.weights else 0
    how = {"steps": steps, "warmup": round(warmup), "freeze": freeze, "augment": augment}
    changed = replace(recipe, **how, **length)
    if recipe.objective in UNMIXED:
        changed = replace(changed, mix=(), mix_prob=(), mix_alpha=())
    return _apply(changed, given)


def _apply(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """Fields of `Recipe` that were overridden by name; "augment" is merged."""
    special = {*TYPED, "augment", "name", "head_rows"} - {"lr", "precision", "compile", "seed"}
    if isinstance(given.get("mix"), str):
        recipe = replace(recipe, **resolve_mix(given["mix"]))
    else:  # fields of a recipe, for experiments
        special -= {"mix"}
    known = {f.name for f in fields(Recipe)} - special
    changed: dict[str, Any] = {key: value for key, value in given.items() if key in known}
    if "augment" in given:
        changed["augment"] = replace(recipe.augment, **given["augment"])
    return replace(recipe, **changed)


def _shape(
    source: Any,
    survey: Sides,
    n_train: int,
    machine: Machine,
    given: Mapping[str, Any],
    reasons: list[str],
) -> dict[str, Any]:
    """model, size, store and fit."""
    gpu, side = machine.device == "cuda", survey.median_side
    # what an objective learns may need a network of another kind than its recipe takes
    own = OWN_RECIPES.get(objective_name(given))
    model, pixels = (load_recipe(own) if own else source).preset(side, n_train, gpu)
    if "model" in given:
        model = given["model"]
        pixels = _native_size(model, pixels)
        reasons.append(f"{model}, as asked.")
    else:
        where = "a GPU" if gpu else "a CPU"
        reasons.append(
            f"{model}: {n_train:,} pictures to learn from, {side} pixels in the median, on {where}."
        )
    size = _pair(given["size"]) if "size" in given else (pixels, pixels)
    if "size" not in given and min(size) > side:
        reasons.append(
            f"Pictures are enlarged to {pixels} pixels, so that the model has patches enough."
        )
    fit, aspect = given.get("fit"), max(survey.aspect, 1 / survey.aspect)
    if fit is None:
        fit = "pad" if aspect >= source.LONG_SIDES else "crop"
        if fit == "pad":
            reasons.append(f"--fit pad: long pictures (sides {aspect:.1f} : 1) are kept whole.")
    store = Preprocess.for_pictures(size, fit, side).store
    return {"model": model, "size": size, "store": store, "fit": fit}


def _work(
    source: Any, n_train: int, machine: Machine, given: Mapping[str, Any], reasons: list[str]
) -> dict[str, Any]:
    """batch, steps_per_epoch, steps and lr."""
    gpu = machine.device == "cuda"
    if n_train < 1:
        raise UsageError("no picture to train on", "at least one per class", "add pictures")
    batch = int(given.get("batch", source.batch_size(n_train, gpu)))
    per_epoch = max(1, n_train // batch)
    epochs = given.get("epochs", source.epochs(per_epoch, gpu))
    lr = float(given.get("lr", source.peak_rate(batch)))
    steps = max(1, round(epochs * per_epoch))
    work = {"batch": batch, "steps_per_epoch": per_epoch, "steps": steps, "lr": lr}
    if source.PENALTIES:
        return work
    why = "as asked" if "batch" in given else f"{per_epoch:,} steps an epoch"
    peak = "" if source.RANGE and "lr" not in given else f" with a peak rate of {lr:.2g}"
    kind = "SGD" if source.OPTIMISER == SGD else "AdamW"
    reasons.append(f"Batches of {batch} ({why}), {kind}{peak}.")
    if "time" not in given:
        asked = "as asked" if "epochs" in given else "enough for a set of this size"
        reasons.append(f"{epochs:g} epoch{'' if epochs == 1 else 's'}, {asked}.")
    return work


def describe_augment(recipe: Recipe) -> str:
    """A sentence about how training pictures are changed; it depends on the final length."""
    flip = "mirrored and " if recipe.augment.flip else ""
    tail = "" if recipe.augment.flip else ", not mirrored"
    mixed = f", mixed by {' and '.join(recipe.mix)}" if recipe.mix else ""
    done = "cropped, turned and tinted" if recipe.augment.ops else "cropped"
    done += " a little" if recipe.augment.rotate < STRONG_TURN else " strongly"
    return f"Training pictures are {flip}{done}{tail}{mixed}."


def _native_size(model: str, fallback: int) -> int:
    """The input size that a model's name ends with (…_224); SIZE_UNKNOWN if it has none."""
    if model.endswith("_cifar"):
        return min(fallback, cnn.SMALL_SIDE)
    found = re.search(r"_(\d{2,4})(?:\.|$)", model)
    if not found:
        return SIZE_UNKNOWN
    native = int(found.group(1))
    return fallback if native >= fallback and native <= 40 else native


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def fit_to_time(
    recipe: Recipe,
    seconds_per_step: float,
    eval_seconds: float,
    budget: float,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[Recipe, str]:
    """(recipe that ends within `budget` seconds with 5 % spare, a sentence about it).

    seconds_per_step and eval_seconds (one validation) are measured; budget is what remains after
    preparation. Raises UsageError when not even one step fits.
    """
    source = load_recipe(recipe.name)
    usable = budget * (1 - SPARE) - 2 * eval_seconds
    epoch_seconds = seconds_per_step * recipe.steps_per_epoch
    every = max(1, math.ceil(eval_seconds / (EVAL_SHARE * epoch_seconds)))
    per_step = seconds_per_step + eval_seconds / (every * recipe.steps_per_epoch)
    steps = int(usable / per_step)
    if steps < 1:
        raise UsageError(
            f"{max(0, budget):.0f} s are left for training",
            f"at least {per_step + 2 * eval_seconds:.0f} s (one step and one evaluation)",
            "give more --time, or a smaller --size",
        )
    most = source.EPOCHS_MOST * recipe.steps_per_epoch
    note = ""
    if steps > most:
        steps, note = most, f" (more than {source.EPOCHS_MOST} seldom help: it ends sooner)"
    changed = with_steps(replace(recipe, eval_every=every), steps, overrides)
    epochs = steps / recipe.steps_per_epoch
    return changed, f"{epochs:.1f} epochs ({steps:,} steps) fit into the time asked for{note}."


def space_evaluations(recipe: Recipe, seconds_per_step: float, eval_seconds: float) -> Recipe:
    """The recipe with validation so seldom that it costs little."""
    epoch_seconds = seconds_per_step * recipe.steps_per_epoch
    every = max(1, math.ceil(eval_seconds / (3 * EVAL_SHARE * epoch_seconds)))
    return replace(recipe, eval_every=min(every, recipe.epochs))


def run_seconds(recipe: Recipe, seconds_per_step: float, eval_seconds: float) -> float:
    """How long the run will take, in seconds."""
    return recipe.steps * seconds_per_step + (len(recipe.evaluations()) + 1) * eval_seconds
