# SPDX-License-Identifier: Apache-2.0
"""Which of some labelled pictures a network names rightly, asked of several networks in turn."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from crosspatch.data.augment import normalise
from crosspatch.data.decode import UnreadableImage
from crosspatch.data.opening import open_source
from crosspatch.data.prepare import load_picture
from crosspatch.data.preprocess import Preprocess
from crosspatch.data.sources import Source, match_classes
from crosspatch.data.split import read_split
from crosspatch.errors import DataError, UsageError
from crosspatch.tasks import make_task
from crosspatch.training.package import Trained

MOST = 2000  # pictures that judge; of more, the same are drawn every time
CHUNK = 64


class Judge:
    """Labelled pictures that networks are tried on.

    pictures: uint8 (N, H, W, 3) of the model's size, or normalised float (N, C, H, W) where
    `preprocess` is None; labels: (N,), or (N, K) of several labels to a picture; task: theirs.
    """

    def __init__(
        self, pictures: Tensor, labels: np.ndarray, task: Any, preprocess: Preprocess | None = None
    ) -> None:
        self.pictures, self.labels, self.task, self.preprocess = pictures, labels, task, preprocess

    def __call__(self, module: nn.Module) -> np.ndarray:
        """bool (N,): the pictures whose class, or all of whose labels, `module` says."""
        probs = self._probabilities(module)
        if self.labels.ndim == 2:
            return ((probs >= np.asarray(self.task.thresholds)) == self.labels).all(axis=1)
        return probs.argmax(axis=1) == self.labels

    def temperature(self, module: nn.Module) -> float:
        """What the logits of `module` are to be divided by, fitted on these pictures."""
        return float(self.task.fit_temperature(self._probabilities(module), self.labels))

    @torch.inference_mode()
    def _probabilities(self, module: nn.Module) -> np.ndarray:
        module.eval()
        where, found = next(module.parameters()).device, []
        for chunk in self.pictures.split(CHUNK):
            x = chunk.to(where)
            if self.preprocess is not None:
                x = normalise(x, self.preprocess)
            found.append(self.task.probabilities(module(x)))
        return torch.cat(found).cpu().numpy()


def make_judge(
    run: Path | None, trained: Trained | None, data: Any, limit: int | None = MOST
) -> Judge:
    """The judge out of `data`: of a run what `crosspatch eval` takes, of a network a pair of
    normalised pictures and class numbers. limit: pictures of a run's data at most, None for all.
    Raises DataError and UsageError for what cannot judge."""
    if run is None or trained is None:
        return _of_tensors(data)
    several = trained.task == "multilabel"
    source = open_source(data, least_classes=1, group="none", multi_label=several)
    labels = match_classes(source, trained.classes)
    chosen, pictures = _read(source, trained.preprocess, _validation(run, source, limit))
    task = make_task(trained.task, trained.classes, trained.thresholds)
    shown = replace(trained.preprocess, store=trained.preprocess.size)
    return Judge(pictures, labels[chosen], task, shown)


def _of_tensors(data: Any) -> Judge:
    try:
        pictures, labels = data
        pictures, labels = torch.as_tensor(pictures), np.asarray(labels)
        right = pictures.ndim == 4 and labels.shape == (len(pictures),) and len(labels) > 0
    except (TypeError, ValueError):
        right = False
    if not right:
        raise UsageError(
            "data that are not a pair of pictures (N, C, H, W) and class numbers (N,)",
            "normalised pictures and their classes; the folder of a run takes names of data",
            "data=(pictures, labels)",
        )
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    return Judge(pictures, labels, make_task("classify", classes))


def _validation(run: Path, source: Source, limit: int | None) -> np.ndarray:
    """Items that judge: the run's validation pictures, or all of other data; at most `limit`."""
    chosen = np.arange(len(source))
    if (run / "split.csv").is_file():
        with contextlib.suppress(DataError):  # other pictures than those of the run
            chosen = read_split(run / "split.csv", source).val
    if limit is not None and len(chosen) > limit:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, limit, replace=False))
    return chosen


def _read(
    source: Source, preprocess: Preprocess, items: np.ndarray
) -> tuple[np.ndarray, torch.Tensor]:
    """(the items that can be read, their pictures uint8 (N, H, W, 3) of the model's size)."""
    good, found = [], []
    for item in items.tolist():
        try:
            found.append(load_picture(source, item, preprocess))
        except UnreadableImage:
            continue
        good.append(item)
    if not good:
        raise DataError(
            f"none of {len(items)} pictures that would judge can be read",
            "labelled pictures, as the run was trained on",
            "give the data of the run",
        )
    return np.array(good), torch.from_numpy(preprocess.centre(np.stack(found)))
