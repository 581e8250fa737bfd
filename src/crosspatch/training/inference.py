# SPDX-License-Identifier: Apache-2.0
"""A trained run as something that names pictures: files, bytes or arrays in, probabilities out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from crosspatch.data.augment import normalise
from crosspatch.data.decode import UnreadableImage, decode
from crosspatch.data.preprocess import Preprocess
from crosspatch.training.package import load_model

Picture = str | Path | bytes | np.ndarray | Callable[[], "bytes | np.ndarray"]
"""A file, the bytes of one, uint8 pixels (H, W, 3), or a call that gives bytes or pixels."""


class Failure(NamedTuple):
    """A picture that could not be read: its place among the given ones, and why."""

    index: int
    reason: str


class Answers(NamedTuple):
    """ok: (M,) places of the pictures that were read; probs: (M, K) float32; failures: the rest."""

    ok: np.ndarray
    probs: np.ndarray
    failures: list[Failure]


class Classifier:
    """A model with its class names and its preprocessing, in evaluation mode.

    model: normalised (B, 3, H, W) -> logits (B, K); device: where it runs (None: the
    accelerator); temperature: what the logits are divided by.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        preprocess: Preprocess,
        device: torch.device | str | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.eval().to(self.device)
        self.classes = tuple(classes)
        self.preprocess = preprocess
        self.temperature = temperature

    @classmethod
    def open(cls, run: str | Path, device: torch.device | str | None = None) -> Classifier:
        """The classifier that a run folder holds. Raises DataError when it holds none."""
        trained = load_model(run)
        return cls(trained.module, trained.classes, trained.preprocess, device, trained.temperature)

    def probabilities(
        self,
        pictures: Sequence[Picture],
        progress: Callable[[int, int], None] | None = None,
        *,
        batch: int = 64,
    ) -> Answers:
        """Probabilities of every class for each picture that can be read.

        Pictures are read in threads while the model works; memory is that of three batches. One
        that cannot be read becomes a Failure. progress: called with (pictures done, all pictures).
        """
        ok: list[int] = []
        probs = [np.zeros((0, len(self.classes)), np.float32)]
        failures: list[Failure] = []
        for start, loaded in self._batches(pictures, batch):
            good = [(start + i, one) for i, one in enumerate(loaded) if isinstance(one, np.ndarray)]
            failures += [
                Failure(start + i, one) for i, one in enumerate(loaded) if type(one) is str
            ]
            if good:
                ok += [index for index, _ in good]
                probs.append(self._forward(torch.from_numpy(np.stack([one for _, one in good]))))
            if progress is not None:
                progress(start + len(loaded), len(pictures))
        return Answers(np.asarray(ok, np.int64), np.concatenate(probs), failures)

    def _batches(
        self, pictures: Sequence[Picture], batch: int
    ) -> Iterator[tuple[int, list[np.ndarray | str]]]:
        """(place of the first, pixels or reasons of a batch), two batches read ahead."""
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            waiting = (pool.submit(self._load, picture) for picture in pictures)
            ahead: deque[Future[np.ndarray | str]] = deque(islice(waiting, 2 * batch))
            for start in range(0, len(pictures), batch):
                now = [ahead.popleft() for _ in range(min(batch, len(ahead)))]
                ahead.extend(islice(waiting, batch))
                yield start, [future.result() for future in now]

    def _load(self, picture: Picture) -> np.ndarray | str:
        """Pixels (H', W', 3) uint8 as the preprocessing stores them, or why there are none."""
        try:
            picture = picture() if callable(picture) else picture
            if isinstance(picture, np.ndarray):
                image = Image.fromarray(picture)
            else:
                image = decode(picture, side=max(self.preprocess.store))
            return self.preprocess.fit_image(image)
        except UnreadableImage as error:
            return error.reason

    @torch.inference_mode()
    def _forward(self, images: Tensor) -> np.ndarray:
        """images: (B, H', W', 3) uint8 -> probabilities (B, K) float32."""
        inputs = normalise(images.to(self.device), self.preprocess)
        return (self.model(inputs).float() / self.temperature).softmax(dim=-1).cpu().numpy()
