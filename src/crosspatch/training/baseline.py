# SPDX-License-Identifier: Apache-2.0
"""What a network has to beat: the nearest class mean and a linear layer on features that nothing
was learnt for, computed before the first step.

The features are those of `training.image_features`; which of them, and how small the layer's
weights are held, validation chooses. The layer is fitted by least squares, so that a thousand
classes cost little more than ten. How many pictures are looked at depends on the settings alone,
and all draws are numpy's own, so that a run is the same with it and without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crosspatch.data.augment import normalise
from crosspatch.data.loading import eval_batches
from crosspatch.data.prepare import ImageSet
from crosspatch.metrics.classification import accuracy, accuracy_interval
from crosspatch.metrics.multilabel import map_interval, mean_average_precision
from crosspatch.metrics.neighbours import class_means
from crosspatch.metrics.ridge import PENALTIES, Layer, fit_layers, one_hot
from crosspatch.tasks import plain
from crosspatch.training.image_features import image_statistics, learn_patches, patch_features
from crosspatch.training.pictures import Pictures, once
from crosspatch.training.recipe import Recipe

MOST, LEAST = 8000, 500
"""Training pictures that are looked at; at most half as many of val, and of test."""
LARGE = 128  # pixels: of larger pictures, which take longer, there are fewer
DECODED = 1000  # the most where pictures are not held in memory
PASSES = 10  # one picture for so many that the training sees: about 3 % of its time
SHARE, FEWEST = 0.03, 50  # of a time budget; training pictures however small that is
EACH, PIXELS, DECODING = 0.5, 20_000, 10.0
"""A picture takes EACH ms, one more for so many PIXELS, and DECODING ms where it is not in memory
(a photo of 500x375 takes 5): as measured on one core, and the same number on every machine."""
SIDE = 32  # pixels of what whitened patches see
BATCH, AT_ONCE = 256, 1 << 20  # pictures, and pixels, of which more fall out of the cache
FILTERS = 64
SEEDS = 512  # pictures that the filters are cut from
UNCHOSEN = ("whitened patches", 0.1)  # features and penalty without validation pictures
DRAWS = 200  # of the bootstrap, where a picture has several labels
_STREAM = 0x62617365

Told = Callable[[str, int, int], None]
Judge = Callable[[np.ndarray, np.ndarray], dict[str, Any]]


class _Part(NamedTuple):
    """A split: features by their name, (N, D) each, and labels (N,) or (N, K)."""

    features: dict[str, np.ndarray]
    labels: np.ndarray


def to_beat(recipe: Recipe, pictures: Pictures, progress: Told | None = None) -> dict[str, Any]:
    """What `measure` finds, once for the runs of a comparison that see the same pictures."""
    how = (recipe.task, recipe.seed, most_pictures(recipe, pictures))
    key = ("baseline", id(pictures.prepared), pictures.split.train.tobytes(), how)
    return once(key, lambda: measure(recipe, pictures, progress))


def measure(recipe: Recipe, pictures: Pictures, progress: Told | None = None) -> dict[str, Any]:
    """The baseline of a run, as its report holds it.

    features: which; seconds; images: training pictures used; nearest_class_mean, linear_probe: for
    "val" and for "test", where there are such pictures, {"accuracy", "low", "high" (95 % Wilson),
    "images"}, or {"map", "map_low", "map_high", "images"} where a picture has several labels.
    progress: called with (what is done, done, all).
    """
    began, parts = time.perf_counter(), {}
    most = most_pictures(recipe, pictures)
    filters = None
    for name, count in (("train", most), ("val", most // 2), ("test", most // 2)):
        images = pictures.part(name)
        if len(images):
            chosen = _some(images, count, recipe.seed)
            filters = _filters(chosen) if filters is None else filters
            parts[name] = _read(chosen, filters, progress)
    multi = recipe.task == "multilabel"
    train, classes = parts["train"], len(pictures.source.classes)
    judge: Judge = _judge_several if multi else _judge
    name, said = _linear(parts, classes, judge)
    means = _nearest_several if multi else _nearest
    near = {
        split: judge(means(train, part, name, classes), part.labels)
        for split, part in parts.items()
        if split != "train"
    }
    probe = {split: judge(scores, parts[split].labels) for split, scores in said.items()}
    return {
        "features": name,
        "seconds": round(time.perf_counter() - began, 2),
        "images": len(train.labels),
        "nearest_class_mean": near,
        "linear_probe": probe,
    }


def most_pictures(recipe: Recipe, pictures: Pictures) -> int:
    """How many training pictures are looked at: by the settings alone, so that it is repeated."""
    count = len(pictures.split.train)
    pixels, cached = math.prod(recipe.store), pictures.prepared.images.cached
    if recipe.time_budget is not None:
        each = EACH + pixels / PIXELS + (0 if cached else DECODING)
        wanted = max(FEWEST, round(1000 * SHARE * recipe.time_budget / (2 * each)))
    else:
        wanted = max(LEAST, recipe.epochs * count // PASSES)
    most = MOST // max(1, pixels // LARGE**2)
    return min(count, most if cached else min(DECODED, most), wanted)


def _some(images: ImageSet, count: int, seed: int) -> ImageSet:
    """At most `count` pictures of a set, in its order."""
    drawn = np.random.default_rng([_STREAM, seed]).permutation(len(images))[:count]
    return images.subset(np.sort(drawn))


def _small(images: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
    """(normalised pictures (B, 3, H, W), the same of at most SIDE pixels), in the set's order."""
    pixels = math.prod(images.preprocess.size)
    for batch in eval_batches(images, max(4, min(BATCH, AT_ONCE // pixels))):
        seen = normalise(batch.images, images.preprocess)
        height, width = (min(SIDE, side) for side in seen.shape[2:])
        yield seen, F.interpolate(seen, (height, width), mode="area")


def _filters(images: ImageSet) -> Tensor:
    few = images.subset(range(0, len(images), -(-len(images) // SEEDS)))
    return learn_patches(torch.cat([small for _, small in _small(few)]), FILTERS)


def _read(images: ImageSet, filters: Tensor, progress: Told | None) -> _Part:
    statistics, convolved, done = [], [], 0
    for seen, small in _small(images):
        statistics.append(image_statistics(seen))
        convolved.append(patch_features(small, filters))
        done += len(seen)
        if progress is not None:
            progress("baseline", done, len(images))
    found = {
        "image statistics": torch.cat(statistics).numpy(),
        "whitened patches": torch.cat(convolved).numpy(),
    }
    return _Part(found, images.labels.numpy())


def _linear(
    parts: dict[str, _Part], classes: int, judge: Judge
) -> tuple[str, dict[str, np.ndarray]]:
    """(the features that validation prefers, what the best layer on them says of val and test)."""
    train, val = parts["train"], parts.get("val")
    targets = one_hot(train.labels, classes) if train.labels.ndim == 1 else train.labels
    tried = list[tuple[float, str, Layer]]()
    for name, known in train.features.items():
        if val is None and name != UNCHOSEN[0]:
            continue
        penalties = PENALTIES if val is not None else UNCHOSEN[1:]
        for layer in fit_layers(known, targets, penalties):
            figure = 0.0 if val is None else _figure(layer(val.features[name]), val.labels)
            tried.append((figure, name, layer))
    _, name, layer = max(tried, key=itemgetter(0))  # of equal ones the first
    return name, {
        split: layer(part.features[name]) for split, part in parts.items() if split != "train"
    }


def _figure(scores: np.ndarray, labels: np.ndarray) -> float:
    """What features and penalties are compared by: accuracy, or mean average precision (0 where no
    picture has a label)."""
    if labels.ndim == 1:
        return accuracy(scores, labels)
    return float(np.nan_to_num(mean_average_precision(scores, labels)))


def _nearest(train: _Part, part: _Part, name: str, classes: int) -> np.ndarray:
    """The squared distances from all class means, less what all share, negative: (N, K)."""
    known, asked = _scaled(train.features[name], part.features[name])
    means = class_means(known, train.labels, classes)
    scores = 2 * asked @ means.T - np.square(means).sum(axis=1)
    return np.where(np.isfinite(scores), scores, -np.inf)


def _nearest_several(train: _Part, part: _Part, name: str, classes: int) -> np.ndarray:
    """How much nearer the mean of the pictures with a class is than that of those without it."""
    known, asked = _scaled(train.features[name], part.features[name])
    scores = np.zeros((len(asked), classes))
    for place in range(classes):
        has = train.labels[:, place] > 0
        if has.any() and not has.all():
            with_it, without = known[has].mean(0), known[~has].mean(0)
            scores[:, place] = 2 * asked @ (with_it - without)
            scores[:, place] -= np.square(with_it).sum() - np.square(without).sum()
    return scores


def _scaled(known: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both brought to the mean 0 and deviation 1 of the first."""
    mean, deviation = known.mean(axis=0), known.std(axis=0)
    deviation = np.where(deviation > 1e-6, deviation, 1)
    return (known - mean) / deviation, (asked - mean) / deviation


def _judge(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    low, high = accuracy_interval(scores, labels)
    return {"accuracy": accuracy(scores, labels), "low": low, "high": high, "images": len(labels)}


def _judge_several(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    low, high = map_interval(scores, labels, draws=DRAWS)
    figures = {"map": mean_average_precision(scores, labels), "map_low": low, "map_high": high}
    known = {key: plain(value) for key, value in figures.items() if plain(value) is not None}
    return {**known, "images": len(labels)}
