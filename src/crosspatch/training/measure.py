# SPDX-License-Identifier: Apache-2.0
"""What is measured before a run begins, and settled by it: how products are computed, how many
threads, how long a step and an evaluation take, and so how many steps there are."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from crosspatch.data.loading import Batch, train_batches
from crosspatch.data.prepare import ImageSet
from crosspatch.layers import linear
from crosspatch.objectives import Objective
from crosspatch.training import plan as plans
from crosspatch.training import team
from crosspatch.training.evaluation import predict_probabilities
from crosspatch.training.objective import make_objective
from crosspatch.training.pictures import Pictures
from crosspatch.training.recipe import Recipe
from crosspatch.training.recipes import load_recipe
from crosspatch.training.stepper import Stepper
from crosspatch.training.teacher import describe_cost

WARM, TIMED = 2, 5
FEWER_THREADS = 1.4  # half the threads must be this much faster, so that a quiet machine keeps all
EVAL_BATCHES = 2
SMOOTH = 0.6  # of the losses of a range test
WORSE = 4.0  # times the least loss: there a range test ends
RANGE_SHARE, RANGE_LEAST = 0.15, 12  # of a time budget at most; steps that tell something
BELOW = 10.0  # the peak rate is this much below the rate of the least loss


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
        objective = _timed_on(recipe, pictures)
        seen, val = pictures.prepared.images, pictures.validation
        return recipe, measure_evaluation(recipe, objective, val) * len(seen) / len(val)
    measuring = time.perf_counter()
    recipe, per_step = choose_threads(recipe, pictures, given, reasons)
    compiling = time.perf_counter() - measuring if recipe.compile else 0.0  # and once more in `fit`
    if load_recipe(recipe.name).RANGE and "lr" not in given:
        left = math.inf if recipe.time_budget is None else recipe.time_budget
        left -= time.perf_counter() - began
        most = team.share(int(min(1e9, RANGE_SHARE * left / per_step)))
        recipe = settle_rate(recipe, pictures, reasons, most)
    objective = _timed_on(recipe, pictures)
    reasons += _of_objective(objective, recipe, per_step)
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


def _of_objective(objective: Any, recipe: Recipe, per_step: float) -> list[str]:
    """What an objective says of itself, and what its teacher costs."""
    teacher = getattr(objective, "teacher", None)
    cost = [describe_cost(teacher, recipe, per_step)] if teacher is not None else []
    return [*objective.remarks, *cost]


def settle_rate(recipe: Recipe, pictures: Pictures, reasons: list[str], most: int) -> Recipe:
    """The recipe with the peak rate that a range test of at most `most` steps finds, or its own
    where that finds none.

    The rule, a tenth of the rate at which the loss is least, is that of Howard and Gugger, "Deep
    Learning for Coders with fastai and PyTorch", 2020, chapter 5.
    """
    source = load_recipe(recipe.name)
    lowest, highest, steps = source.RANGE
    steps = min(steps, most)
    if steps < RANGE_LEAST:
        reasons.append(f"Peak rate {recipe.lr:.2g}, the usual one: no time for a range test.")
        return recipe
    given, losses = range_test(recipe, pictures, lowest, highest, steps)
    tried = f"{len(losses)} steps with rates from {lowest:g} to {given[len(losses) - 1]:.2g}"
    place = least(losses)
    if place == 0:
        reasons.append(f"Peak rate {recipe.lr:.2g}, the usual one: {tried} did not lower the loss.")
        return recipe
    lr = given[place] / BELOW
    reasons.append(
        f"Peak rate {lr:.2g}: of {tried} the loss was least at {given[place]:.2g}, and the peak "
        "is a tenth of that (--lr skips this)."
    )
    return replace(recipe, lr=lr, min_lr=source.last_rate(lr))


def rates(lowest: float, highest: float, steps: int) -> list[float]:
    """`steps` rates from `lowest` to `highest`, each the same multiple of the one before."""
    return [lowest * (highest / lowest) ** (i / (steps - 1)) for i in range(steps)]


class _Rising(Stepper):
    """Steps whose rates are given one by one."""

    given: list[float]

    def lr(self, step: int) -> float:
        return self.given[step]


def range_test(
    recipe: Recipe, pictures: Pictures, lowest: float, highest: float, steps: int
) -> tuple[list[float], list[float]]:
    """(rates, smoothed losses in nats) of a throw-away training whose rate rises geometrically (the
    range test of Smith, arXiv 1506.01186, section 3.3). It ends early where a loss is not finite or
    `WORSE` times the least so far; only the recipe, its seed and the pictures decide it."""
    plain = {"mix": (), "mix_prob": (), "mix_alpha": (), "ema": 0.0, "compile": False}
    tried = replace(recipe, steps=steps, freeze=0, **plain)
    stepper = _Rising(tried, make_objective(tried, pictures.source.classes))
    stepper.given = rates(lowest, highest, steps)
    losses, mean = list[float](), 0.0
    for step, (epoch, batch) in zip(range(steps), _batches(recipe, pictures), strict=False):
        stepper.reset_loss()
        stepper.step(batch, epoch, step)
        loss = float(stepper.loss_sum)
        mean = SMOOTH * mean + (1 - SMOOTH) * loss
        losses.append(mean / (1 - SMOOTH ** (step + 1)))
        if not math.isfinite(loss) or losses[-1] > WORSE * min(losses):
            break
    return stepper.given, losses


def _batches(recipe: Recipe, pictures: Pictures) -> Iterator[tuple[int, Batch]]:
    """Epoch by epoch the training batches, with the number of their epoch."""
    how = {"repeats": recipe.repeats, "balanced": recipe.balance == "sampler"}
    how |= {"rank": team.rank(), "world": team.size()}
    train = pictures.part("train")
    for epoch in itertools.count():
        for batch in train_batches(train, recipe.batch, epoch=epoch, seed=recipe.seed, **how):
            yield epoch, batch


def least(losses: Sequence[float]) -> int:
    """The place of the least finite loss, 0 without any."""
    finite = [place for place, loss in enumerate(losses) if math.isfinite(loss)]
    return min(finite, key=losses.__getitem__, default=0)


def choose_threads(
    recipe: Recipe, pictures: Pictures, given: dict[str, Any], reasons: list[str]
) -> tuple[Recipe, float]:
    """(the recipe, seconds per step). All cores, unless half of them are clearly faster: threads
    that wait for each other on busy cores, or on small models, cost more than they bring."""

    def seconds(candidate: Recipe) -> float:
        objective = _timed_on(candidate, pictures)
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


def _timed_on(recipe: Recipe, pictures: Pictures) -> Objective:
    """An objective to measure times on: weights to begin with would be read for nothing."""
    return make_objective(replace(recipe, weights={}), pictures.source.classes)


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
    part = images.subset(range(count))
    began = time.perf_counter()
    predict_probabilities(
        module, part, recipe.eval_batch, device=device, precision=recipe.precision
    )
    _wait(device)
    return (time.perf_counter() - began) * len(images) / count / team.size()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
