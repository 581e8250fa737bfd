# SPDX-License-Identifier: Apache-2.0
"""The linear probe: logistic regression on the frozen features of a network.

Nothing is drawn: a probe that was stopped and is resumed is computed anew, and ends with
the same numbers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.data.augment import normalise
from crosspatch.data.loading import eval_batches
from crosspatch.data.prepare import ImageSet
from crosspatch.errors import Interrupted, UsageError
from crosspatch.layers import linear
from crosspatch.objectives import Objective
from crosspatch.training.evaluation import autocast
from crosspatch.training.loop import Outcome, merit
from crosspatch.training.package import model_config, save_model
from crosspatch.training.recipe import Recipe
from crosspatch.training.reporter import Reporter, Silent
from crosspatch.training.run import RunFolder
from crosspatch.training.stepper import make_fabric

ITERATIONS = 200  # of L-BFGS, for one penalty
UNCHOSEN = 0.01  # the penalty where there are no validation pictures to choose it
FLAT = 1e-6  # a feature that deviates less than this is left as it is
SAME = 1e-3  # largest error of the model's logits, relative, once it has the fitted head


class Layer(NamedTuple):
    """A linear layer on features: weight (K, D), bias (K,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


def features_of(model: nn.Module, pictures: Tensor) -> Tensor:
    """Normalised pictures (B, 3, H, W) -> what the classifier gets, (B, D) float32 on the CPU.

    Raises UsageError for a model without timm's `forward_head`, or whose features are no vectors.
    """
    try:
        found = model.forward_head(model.forward_features(pictures), pre_logits=True)
    except AttributeError as error:
        raise _unfit(model, "has no forward_head") from error
    if found.ndim != 2:
        raise _unfit(model, f"gives features of shape {tuple(found.shape)} per batch")
    return found.float().cpu()


def set_head(model: nn.Module, layer: Layer) -> None:
    """Make `layer` the model's classifier: logits are then those of the layer on its features.

    One linear head takes it as it is; of several, whose logits the model averages, each takes its
    share of the features (CrossViT's branches) or all of them (the two of a distilled DeiT).
    Raises UsageError for any other head.
    """
    found: Any = model.get_classifier() if hasattr(model, "get_classifier") else None
    heads = list(found) if isinstance(found, nn.ModuleList | tuple) else [found]
    widths = [h.in_features if isinstance(h, nn.Linear) else -1 for h in heads]
    width = layer.weight.shape[1]
    if all(w == width for w in widths):
        parts = [layer.weight] * len(heads)
    elif min(widths) > 0 and sum(widths) == width:
        parts = [len(heads) * part for part in layer.weight.split(widths, dim=1)]
    else:
        raise _unfit(model, "has a head that is not one linear layer on its features")
    with torch.no_grad():
        for head, part in zip(heads, parts, strict=True):
            head.weight.copy_(part)
            head.bias.copy_(layer.bias)


def _unfit(model: nn.Module, why: str) -> UsageError:
    return UsageError(
        f"{type(model).__name__} {why}",
        "a model whose logits are a linear layer of its features",
        "choose another --model for the probe, such as vit_micro_32",
    )


def fit_logistic(
    features: Tensor, labels: Tensor, classes: int, penalty: float, start: Layer | None = None
) -> Layer:
    """Logistic regression by L-BFGS: the least mean loss (`mean_loss`) plus penalty / 2 times the
    squared norm of the weights; the bias is free.

    features: (N, D), scaled alike (in float32 weights are off by some 3e-4, in float64 by 3e-5);
    labels: (N,) int64 for one multinomial regression, or (N, K) of 0 and 1 for K binary ones;
    start: where to begin (zero).
    """
    if start is None:
        zeros = features.new_zeros(classes, features.shape[1])
        start = Layer(zeros, features.new_zeros(classes))
    weight, bias = (part.clone().requires_grad_() for part in start)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        solver.zero_grad()
        loss = mean_loss(F.linear(features, weight, bias), labels)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return float(loss.detach())

    solver.step(closure)
    return Layer(weight.detach(), bias.detach())


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a picture in nats; of labels (N, K), 0 or 1, the binary one, summed
    over the classes."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    whole = F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="sum")
    return whole / len(labels)


@dataclass(frozen=True)
class _Scale:
    """Brings features to mean 0 and deviation 1 in float64, and a layer on such features back to
    raw float32 ones."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, features: Tensor) -> _Scale:
        deviation = features.std(dim=0, correction=0)
        flat = torch.ones_like(deviation)
        return cls(features.mean(dim=0), torch.where(deviation > FLAT, deviation, flat))

    def __call__(self, features: Tensor) -> Tensor:
        return (features.double() - self.mean) / self.deviation

    def unscaled(self, layer: Layer) -> Layer:
        weight = layer.weight / self.deviation
        return Layer(weight.float(), (layer.bias - weight @ self.mean).float())


class _Probe:
    """One call of `fit_probe`."""

    def __init__(
        self, recipe: Recipe, objective: Objective, run: RunFolder, reporter: Reporter
    ) -> None:
        torch.set_num_threads(recipe.threads)
        linear.use(recipe.linear)
        self.recipe, self.run, self.reporter = recipe, run, reporter
        self.device: torch.device = make_fabric(recipe).device
        self.task: Any = objective.task
        self.model = objective.exported.to(self.device).eval()
        self.began, self.speed = time.perf_counter(), 0.0

    @torch.no_grad()
    def features(self, images: ImageSet, doing: str) -> Tensor:
        """(N, D) of a set, in its order."""
        recipe, found, done, began = self.recipe, [], 0, time.perf_counter()
        for batch in eval_batches(images, recipe.batch, workers=recipe.workers):
            pixels = normalise(batch.images.to(self.device), images.preprocess)
            with autocast(self.device, recipe.precision):
                found.append(features_of(self.model, pixels))
            done += len(batch.labels)
            self.reporter.progress(doing, done, len(images))
        self.speed = len(images) / max(1e-9, time.perf_counter() - began)
        return torch.cat(found)

    def row(
        self, place: int, count: int, penalty: float, loss: float, figures: dict[str, Any]
    ) -> dict[str, Any]:
        """A row of metrics.csv for a penalty, which stands in the column of the rate."""
        return {
            "epoch": place + 1,
            "epochs": count,
            "step": self.recipe.steps,
            "train_loss": loss,
            **figures,
            "lr": penalty,
            "penalty": penalty,
            "images_per_second": round(self.speed, 1),
            "elapsed": round(time.perf_counter() - self.began, 1),
        }

    def choose(self, train: ImageSet, val: ImageSet) -> tuple[Layer, list[dict[str, Any]], int]:
        """(the best layer by validation, a row per penalty, the place of the best row)."""
        known, unknown = self.features(train, "features"), self.features(val, "validating")
        scale, rows, layers = _Scale.of(known.double()), [], []
        scaled, layer, penalties = scale(known), None, self.recipe.penalties
        if np.array_equal(train.items, val.items):
            penalties = (UNCHOSEN,)
            self.reporter.message(f"Training pictures cannot choose a penalty: it is {UNCHOSEN:g}.")
        for place, penalty in enumerate(penalties):
            layer = fit_logistic(scaled, train.labels, len(self.task.classes), penalty, layer)
            raw = scale.unscaled(layer)
            loss = float(mean_loss(raw(known), train.labels))
            figures = self.task.brief(self.task.probabilities(raw(unknown)), val.labels)
            row = self.row(place, len(penalties), penalty, loss, figures)
            row["best"] = all(self.merit(row) > self.merit(other) for other in rows)
            rows.append(row)
            layers.append(raw)
            self.reporter.epoch({**row, "remaining": 0.0})
        best = max(range(len(rows)), key=lambda place: self.merit(rows[place]))
        return layers[best], rows, best

    def merit(self, row: dict[str, Any]) -> tuple[float, float]:
        """What rows are compared by."""
        return merit(row, self.task.merit)

    @torch.no_grad()
    def check(self, layer: Layer, images: ImageSet) -> None:
        """Raises UsageError where the model does not compute its head on its features."""
        few = images.subset(range(min(8, len(images))))
        pixels = normalise(few.images(torch.arange(len(few))).to(self.device), few.preprocess)
        got, wanted = self.model(pixels).cpu(), layer(features_of(self.model, pixels))
        if (got - wanted).norm() > SAME * wanted.norm():
            raise _unfit(self.model, "computes its logits otherwise than from its features")


def fit_probe(
    recipe: Recipe,
    objective: Objective,
    train: ImageSet,
    val: ImageSet,
    run: RunFolder,
    reporter: Reporter | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    facts: dict[str, Any] | None = None,
) -> Outcome:
    """Fit the head of `objective.exported` to `train`; the model stands in `run.model` afterwards.

    Takes what `loop.fit` takes; no state is kept, as nothing takes long. Raises UsageError for a
    model whose head is not linear, Interrupted (exit code 4) on Ctrl-C.
    """
    del resume, force, facts
    work = _Probe(recipe, objective, run, reporter or Silent())
    try:
        layer, rows, best = work.choose(train, val)
    except KeyboardInterrupt as stop:
        raise Interrupted(
            "stopped by SIGINT before the probe was fitted",
            "nothing is lost: a probe is computed anew in the same folder",
            "continue with the same command and --resume",
        ) from stop
    set_head(work.model, layer)
    work.check(layer, train)
    save_model(run.model, work.model, model_config(recipe, work.task.classes))
    run.write_metrics(rows)
    seconds = round(time.perf_counter() - work.began, 3)
    return Outcome(rows[best], rows[-1], rows, recipe.steps, seconds)
