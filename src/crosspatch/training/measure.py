# SPDX-License-Identifier: Apache-2.0
"""How long a step and an evaluation take on this machine, measured before the run begins."""

from __future__ import annotations

import itertools
import statistics
import time

import torch

from crosspatch.data.loading import train_batches
from crosspatch.data.prepare import ImageSet
from crosspatch.objectives import Objective
from crosspatch.training.evaluation import predict_probabilities
from crosspatch.training.recipe import Recipe
from crosspatch.training.stepper import Stepper

WARM, TIMED = 2, 5
EVAL_BATCHES = 2


def measure_step(recipe: Recipe, objective: Objective, train: ImageSet) -> float:
    """Seconds per step: the median of 5 after 2 to warm up. The objective is used up by it."""
    stepper, seconds = Stepper(recipe, objective), []
    for step in range(WARM + TIMED):
        batches = train_batches(train, recipe.batch, epoch=step, seed=recipe.seed, workers=0)
        began = time.perf_counter()
        stepper.step(next(iter(batches)), step, min(step, recipe.steps - 1))
        _wait(stepper.device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM:])


def measure_evaluation(recipe: Recipe, objective: Objective, images: ImageSet) -> float:
    """Seconds for one evaluation of `images`, from a few batches."""
    module = objective.exported
    device = next(module.parameters()).device
    count = min(len(images), EVAL_BATCHES * recipe.eval_batch)
    part = images.subset(list(itertools.islice(range(len(images)), count)))
    began = time.perf_counter()
    predict_probabilities(
        module, part, recipe.eval_batch, device=device, precision=recipe.precision
    )
    _wait(device)
    return (time.perf_counter() - began) * len(images) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
