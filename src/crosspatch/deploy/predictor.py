# SPDX-License-Identifier: Apache-2.0
"""A model as something that names pictures: files, bytes or arrays in, probabilities out.

Pictures are read in threads ahead of the engine, so memory is that of three batches however many
there are. What runs the model is an `Engine`; this module does not import torch.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from crosspatch.data.decode import UnreadableImage, decode
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.bundle import BundleInfo
from crosspatch.deploy.engines import Engine
from crosspatch.errors import DataError, UsageError

BATCH = {"torch": 64, "onnxruntime": 16, "openvino": 16}
"""Pictures at once by engine. With 64 of 224 pixels ONNX Runtime took 3.4 GB and was no faster than
with 8 (118 ms a picture against 103, crossvit_small_224, two threads); at 32 pixels 64 of them took
0.8 to 1.0 times as long as 16."""
Pixels = str | Path | bytes | np.ndarray
Picture = Pixels | Callable[[], Pixels]
"""A file, the bytes of one, uint8 pixels (H, W, 3) or grey (H, W), or a call that gives one."""


class Failure(NamedTuple):
    """A picture that could not be read: its place among the given ones, and why."""

    index: int
    reason: str


class Predictions(NamedTuple):
    """What was answered. classes: K names; ok: (M,) places of the pictures that were read; probs:
    (M, K) float32, one row per place in `ok`; failures: the rest; thresholds: (K,) of a model that
    gives several labels to a picture, () of one that names a single class."""

    classes: tuple[str, ...]
    ok: np.ndarray
    probs: np.ndarray
    failures: list[Failure]
    thresholds: tuple[float, ...] = ()

    @property
    def said(self) -> np.ndarray:
        """bool (M, K): the classes that each picture in `ok` is said to have: those whose
        probability is not below their threshold, or without thresholds the most probable one."""
        return decide(self.probs, self.thresholds)

    @property
    def labels(self) -> list[list[tuple[str, float]] | None]:
        """For every given picture the classes that it is said to have, most probable first, as
        (class, probability): one, or with thresholds any number. None where it was not read."""
        return self._pairs([np.flatnonzero(row) for row in self.said])

    def top(self, k: int = 5) -> list[list[tuple[str, float]] | None]:
        """For every given picture its `k` most probable classes, best first, as (class,
        probability); None for one that could not be read. Raises UsageError for k below 1."""
        if k < 1:
            raise UsageError(f"top({k})", "one class or more", "top(1)")
        return self._pairs([np.arange(len(self.classes))] * len(self.ok), k)

    def _pairs(
        self, chosen: Sequence[np.ndarray], most: int | None = None
    ) -> list[list[tuple[str, float]] | None]:
        """(class, probability) of the chosen classes of every picture in `ok`, best first."""
        found: list[list[tuple[str, float]] | None] = [None] * (len(self.ok) + len(self.failures))
        for place, row, some in zip(self.ok.tolist(), self.probs, chosen, strict=True):
            best = some[(-row[some]).argsort(kind="stable")][:most]
            found[place] = [(self.classes[i], float(row[i])) for i in best]
        return found


def decide(probs: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """bool (M, K): which classes probabilities (M, K) say; see `Predictions.said`."""
    if len(thresholds):
        return probs >= np.asarray(thresholds)
    said = np.zeros(probs.shape, bool)
    said[np.arange(len(probs)), probs.argmax(axis=1)] = True
    return said


class Predictor:
    """An engine with the class names and the preprocessing that belong to it.

    classes: K names in the order of the engine's probabilities; preprocess: how a picture becomes
    the engine's input; info: what the bundle says of itself, None for the model of a run;
    thresholds: as in `Predictions`; reduction: of the model's tokens, "" without one.
    """

    def __init__(
        self,
        engine: Engine,
        classes: Sequence[str],
        preprocess: Preprocess,
        info: BundleInfo | None = None,
        thresholds: Sequence[float] = (),
        reduction: str = "",
    ) -> None:
        self.engine = engine
        self.classes = tuple(classes)
        self.preprocess = preprocess
        self.info = info
        self.thresholds = tuple(thresholds)
        self.reduction = reduction

    @property
    def task(self) -> str:
        """What the model answers: classify (one class) or multilabel."""
        return "multilabel" if self.thresholds else "classify"

    def predict(
        self,
        pictures: Picture | Iterable[Picture],
        *,
        batch: int | None = None,
        readers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Predictions:
        """Probabilities of every class for each picture that can be read.

        pictures: one, or any number of them; one that cannot be read becomes a Failure. batch: how
        many the engine gets at once, None for the usual number. readers: threads that decode ahead
        of the engine, None for one to a core; with 1 the calling thread does it. progress: called
        with (pictures done, all pictures). Raises UsageError for what is no picture at all,
        DataError when the model gives probabilities that are not finite.
        """
        batch = batch or BATCH.get(self.engine.setting.engine, 16)
        one = isinstance(pictures, str | Path | bytes | np.ndarray) or callable(pictures)
        given: list[Picture] = [pictures] if one else list(pictures)  # type: ignore[list-item]
        ok: list[int] = []
        probs = [np.zeros((0, len(self.classes)), np.float32)]
        failures: list[Failure] = []
        for start, loaded in self._batches(given, batch, readers):
            good = [(start + i, one) for i, one in enumerate(loaded) if isinstance(one, np.ndarray)]
            failures += [
                Failure(start + i, one) for i, one in enumerate(loaded) if isinstance(one, str)
            ]
            if good:
                ok += [index for index, _ in good]
                probs.append(self.forward(np.stack([pixels for _, pixels in good])))
            if progress is not None:
                progress(start + len(loaded), len(given))
        places, found = np.asarray(ok, np.int64), np.concatenate(probs)
        return Predictions(self.classes, places, found, failures, self.thresholds)

    def pixels(self, picture: Picture) -> np.ndarray:
        """One picture as the engine's input: uint8 (H, W, 3) of the model's size.

        Raises UnreadableImage for a damaged one, UsageError for what is no picture at all.
        """
        one = picture() if callable(picture) else picture
        if isinstance(one, np.ndarray):
            image = _from_array(one)
        elif isinstance(one, str | Path | bytes):
            image = decode(one, side=max(self.preprocess.store))
        else:
            raise _no_picture(f"a {type(one).__name__}")
        return self.preprocess.centre(self.preprocess.fit_image(image)[None])[0]

    def forward(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) of the model's size -> probabilities (B, K) float32.

        Raises DataError when they are not finite.
        """
        probs = self.engine.run(images)
        if not np.isfinite(probs).all():
            raise DataError(
                "the model gave probabilities that are not numbers (NaN or infinite)",
                "finite numbers for every picture",
                "export the run again; where the run itself gives them, train with a lower rate",
            )
        return probs

    def _batches(
        self, pictures: list[Picture], batch: int, readers: int | None
    ) -> Iterator[tuple[int, list[np.ndarray | str]]]:
        """(place of the first, pixels or reasons of a batch), two batches read ahead."""
        if len(pictures) == 1 or readers == 1:  # a thread would cost more than it saves
            for start in range(0, len(pictures), batch):
                yield start, [self._load(one) for one in pictures[start : start + batch]]
            return
        with ThreadPoolExecutor(readers or min(16, os.cpu_count() or 1)) as pool:
            waiting = (pool.submit(self._load, picture) for picture in pictures)
            ahead: deque[Future[np.ndarray | str]] = deque(islice(waiting, 2 * batch))
            try:
                for start in range(0, len(pictures), batch):
                    now = [ahead.popleft() for _ in range(min(batch, len(ahead)))]
                    ahead.extend(islice(waiting, batch))
                    yield start, [future.result() for future in now]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, picture: Picture) -> np.ndarray | str:
        """The engine's input, or why there is none."""
        try:
            return self.pixels(picture)
        except UnreadableImage as error:
            return error.reason


def _from_array(pixels: np.ndarray) -> Image.Image:
    """A uint8 array (H, W, 3), or grey (H, W), as an RGB picture. Raises UsageError for others."""
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise _no_picture(f"an array of {pixels.dtype} {pixels.shape}")
    if not pixels.size:
        raise _no_picture(f"an array without pixels {pixels.shape}")
    return Image.fromarray(pixels).convert("RGB") if grey else Image.fromarray(pixels)


def _no_picture(got: str) -> UsageError:
    return UsageError(
        f"{got} was given as a picture",
        "a picture is a file's path, a file's bytes, or a uint8 array (H, W, 3) or (H, W)",
        "give a list of pictures for several; scale floats to 0…255 and round them first",
    )
