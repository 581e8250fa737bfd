# SPDX-License-Identifier: Apache-2.0
"""The pictures that judge: decoded once, the same array for every candidate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from crosspatch.data.decode import UnreadableImage
from crosspatch.data.opening import open_source
from crosspatch.data.prepare import load_picture
from crosspatch.data.sources import match_classes
from crosspatch.data.split import read_split
from crosspatch.deploy.predictor import decide
from crosspatch.deploy.shrink.result import Measured
from crosspatch.errors import CrosspatchError, DataError
from crosspatch.metrics.interval import paired
from crosspatch.training.package import Trained
from crosspatch.training.run import RunFolder

MOST = 2000  # validation pictures that judge; of more, the same are drawn every time
FIRST = 100  # pictures that a candidate is shown at least before it is given up
CHUNK = 64
BEYOND = 0.01
"""A candidate is given up when its drop is surely larger than the budget by so much."""

Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Pictures:
    """images: uint8 (N, H, W, 3) of the model's size; labels: (N,), or (N, K) of several labels to
    a picture; thresholds: (K,) of those, else ()."""

    images: np.ndarray
    labels: np.ndarray
    thresholds: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def right(self, probs: np.ndarray, start: int = 0) -> np.ndarray:
        """bool (n,): whether probabilities (n, K), of the pictures from `start` on, say the class,
        or all labels and no other, of each. What is no number is wrong."""
        labels = self.labels[start : start + len(probs)]
        said = decide(np.nan_to_num(probs, nan=-1.0), self.thresholds)
        if labels.ndim == 2:
            found = (said == labels.astype(bool)).all(axis=1)
        else:
            found = said[np.arange(len(said)), labels]
        return found & np.isfinite(probs).all(axis=1)

    def digest(self) -> str:
        """What changes when a picture or a label does."""
        made = hashlib.sha256(np.ascontiguousarray(self.images).data)
        made.update(np.ascontiguousarray(self.labels).data)
        made.update(json.dumps(self.thresholds).encode())
        return made.hexdigest()

    def first(self, count: int) -> Pictures:
        """`count` of them, drawn the same way every time, or all."""
        if count >= len(self):
            return self
        some = np.sort(np.random.default_rng(0).permutation(len(self))[:count])
        return replace(self, images=self.images[some], labels=self.labels[some])


def pictures(run: Path, trained: Trained, split: str, data: str | None = None) -> Pictures:
    """The run's own pictures of a split (val, test), as far as they can be read; none is an array
    without rows. data: where they are now, None: where they were.

    Raises DataError where they cannot be had or are not those of the run any more.
    """
    config = RunFolder(run).read_config()
    where = data if data is not None else config["run"]["data"]
    advice = "add --data PICTURES, the place of the pictures that the run was trained on"
    reading = {**config.get("reading", {}), "group": "none"}
    reading["multi_label"] = trained.task == "multilabel"
    try:
        source = open_source(where, least_classes=1, **reading)
        items = getattr(read_split(run / "split.csv", source), split)
        labels = match_classes(source, trained.classes)
    except (CrosspatchError, OSError) as error:
        got = error.got if isinstance(error, CrosspatchError) else str(error)
        raise DataError(
            f"no pictures to judge with: {got}",
            "the pictures that the run was trained on: its validation pictures judge",
            advice,
        ) from error
    if split == "val":
        items = _some(items)
    good, found = [], []
    for item in items.tolist():
        try:
            found.append(load_picture(source, item, trained.preprocess))
        except UnreadableImage:
            continue
        good.append(item)
    size = trained.preprocess.size
    images = trained.preprocess.centre(np.stack(found)) if found else np.zeros((0, *size, 3), "u1")
    return Pictures(images, labels[np.array(good, np.int64)], tuple(trained.thresholds))


def _some(items: np.ndarray) -> np.ndarray:
    if len(items) <= MOST:
        return items
    return np.sort(np.random.default_rng(0).choice(items, MOST, replace=False))


def required(run: Path, found: Pictures) -> Pictures:
    """The pictures themselves. Raises DataError where there are none to judge with."""
    if len(found):
        return found
    raise DataError(
        f"{run} has no validation pictures that can be read",
        "some that did not train: they say what a candidate costs",
        "train on more pictures of each class, or give a folder with train/ and val/",
    )


def judged(
    row: Measured, shown: Pictures, run: Run, before: np.ndarray, most: float, batch: int
) -> tuple[Measured, np.ndarray]:
    """`row` with its figures, and bool (n,) the pictures it names rightly: all, or fewer where it
    was given up.

    run: uint8 (B, H, W, 3) -> probabilities; before: (N,) what the run as it is names rightly;
    most: the share that may be lost; batch: pictures of one call.
    """
    parts: list[np.ndarray] = []
    told = 0
    for start in range(0, len(shown), batch):
        parts.append(shown.right(run(shown.images[start : start + batch]), start))
        done = min(start + batch, len(shown))
        if done - told >= CHUNK and done < len(shown):
            told = done
            if done >= FIRST and _lost(np.concatenate(parts), before)[1] > most + BEYOND:
                break
    right = np.concatenate(parts)
    drop, low, high = _lost(right, before)
    dropped = ""
    if len(right) < len(shown):
        dropped = (
            f"given up after {len(right):,} of {len(shown):,} pictures: it loses {100 * low:.1f} "
            "points or more there"
        )
    figures = {"right": int(right.sum()), "pictures": len(right)}
    span = {"drop": drop, "low": low, "high": high}
    return replace(row, **figures, **span, dropped=dropped), right


def _lost(right: np.ndarray, before: np.ndarray) -> tuple[float, float, float]:
    """(share lost against `before` on the same pictures, its 95 % interval)."""
    was = before[: len(right)]
    low, high = paired(int((was & ~right).sum()), int((right & ~was).sum()), len(right))
    return float(was.mean() - right.mean()), low, high
