# SPDX-License-Identifier: Apache-2.0
"""What is measured before a run begins, and settled by it: how products are computed, how many
threads, how long a step and an evaluation take, and so how many steps there are."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from crosspatch.data.loading import train_batches
from crosspatch.data.prepare import ImageSet
from crosspatch.layers import linear
from crosspatch.objectives import Objective
from crosspatch.training import plan as plans
from crosspatch.training import team
from crosspatch.training.evaluation import predict_probabilities
from crosspatch.training.objective import make_objective
from crosspatch.training.pictures import Pictures
from crosspatch.training.recipe import Recipe
from crosspatch.training.stepper import Stepper

WARM, TIMED = 2, 5
FEWER_THREADS = 1.4  # half the threads must be this much faster, so that a quiet machine keeps all
EVAL_BATCHES = 2


def resolve_products(recipe: Recipe) -> Recipe:
    """The recipe with `linear` resolved for good, so that a resumed run computes the same bits."""
    plain = recipe.device == "cpu" and recipe.precision == "fp32" and not recipe.compile
    torch.set_num_threads(recipe.threads)
    return replace(recipe, linear="on" if plain and linear.use(recipe.linear) else "off")


def settle_length(
    recipe: Recipe,
    pictures: Pictures,
    given: dict[str, Any],
    reasons: list[str],
    began: float,
) -> tuple[Recipe, float]:
    """(the recipe with its threads and its final length, estimated seconds of the training)."""
    if recipe.penalties:
        objective = make_objective(recipe, pictures.source.classes)
        seen, val = pictures.prepared.images, pictures.validation
        return recipe, measure_evaluation(recipe, objective, val) * len(seen) / len(val)
    measuring = time.perf_counter()
    recipe, per_step = choose_threads(recipe, pictures, given, reasons)
    compiling = time.perf_counter() - measuring if recipe.compile else 0.0  # and once more in `fit`
    objective = make_objective(recipe, pictures.source.classes)
    per_eval = measure_evaluation(recipe, objective, pictures.validation)
    if recipe.time_budget is None:
        if "eval_every" not in given:
            recipe = plans.space_evaluations(recipe, per_step, per_eval)
    else:
        left = recipe.time_budget - (time.perf_counter() - began)
        tail = per_eval * len(pictures.split.test) / max(1, len(pictures.validation))
        recipe, why = plans.fit_to_time(recipe, per_step, per_eval, left - tail - compiling, given)
        reasons.append(why)
    return recipe, compiling + plans.run_seconds(recipe, per_step, per_eval)


def choose_threads(
    recipe: Recipe, pictures: Pictures, given: dict[str, Any], reasons: list[str]
) -> tuple[Recipe, float]:
    """(the recipe, seconds per step). All cores, unless half of them are clearly faster: threads
    that wait for each other on busy cores, or on small models, cost more than they bring."""

    def seconds(candidate: Recipe) -> float:
        objective = make_objective(candidate, pictures.source.classes)
        return team.share(measure_step(candidate, objective, pictures.part("train")))

    cores, best = recipe.threads, seconds(recipe)
    fixed = "threads" in given or recipe.compile or recipe.device != "cpu"
    while recipe.threads > 1 and not fixed:
        fewer = replace(recipe, threads=recipe.threads // 2)
        found = seconds(fewer)
        if found * FEWER_THREADS > best:
            break
        recipe, best = fewer, found
    if recipe.threads < cores:
        reasons.append(
            f"{recipe.threads} of {cores} CPU cores: with more, steps took longer (a busy machine)."
        )
    return recipe, best


def measure_step(recipe: Recipe, objective: Objective, train: ImageSet) -> float:
    """Seconds per step: the median of 5 after 2 to warm up. The objective is used up by it."""
    stepper, seconds = Stepper(recipe, objective), []
    for step in range(WARM + TIMED):
        batches = train_batches(
            train, recipe.batch, epoch=step, seed=recipe.seed, rank=team.rank(), world=team.size()
        )
        began = time.perf_counter()
        stepper.step(next(iter(batches)), step, min(step, recipe.steps - 1))
        _wait(stepper.device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM:])


def measure_evaluation(recipe: Recipe, objective: Objective, images: ImageSet) -> float:
    """Seconds for one evaluation of `images` by the team, from a few batches of one process."""
    module = objective.exported
    device = next(module.parameters()).device
    count = min(len(images), EVAL_BATCHES * recipe.eval_batch)
    part = images.subset(list(itertools.islice(range(len(images)), count)))
    began = time.perf_counter()
    predict_probabilities(
        module, part, recipe.eval_batch, device=device, precision=recipe.precision
    )
    _wait(device)
    return (time.perf_counter() - began) * len(images) / count / team.size()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
