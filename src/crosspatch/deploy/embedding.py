# SPDX-License-Identifier: Apache-2.0
"""Pictures as vectors: what the classifier of a trained network reads of each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crosspatch.data.decode import UnreadableImage
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.loading import folder_of
from crosspatch.deploy.predictor import Picture, Predictor
from crosspatch.deploy.torch_engine import TorchEngine
from crosspatch.errors import UsageError
from crosspatch.training.image_features import learn_patches, patch_features, random_features
from crosspatch.training.package import Trained, load_model
from crosspatch.training.probe import features_of

Progress = Callable[[int, int], None]
PLAIN = "random convolutions"
"""The name of the features of no network."""
SIDE = 32  # pixels, to which pictures are brought for those
PATCHES, SEEDS = 256, 512  # whitened patches, and the pictures they are cut from


@dataclass(frozen=True)
class Embedder:
    """name: whose features they are; dim: how many numbers a picture becomes."""

    name: str
    dim: int
    predictor: Predictor

    def embed(self, pictures: Sequence[Picture], *, progress: Progress | None = None) -> np.ndarray:
        """Features (N, D) float32 of pictures as `Predictor.predict` takes them.

        A picture that cannot be read is a row of NaN. progress: called with (done, all). Raises
        UsageError for what is no picture at all, DataError where features are not finite.
        """
        found = np.full((len(pictures), self.dim), np.nan, np.float32)
        answer = self.predictor.predict(list(pictures), progress=progress)
        found[answer.ok] = answer.probs
        return found


class _Features(TorchEngine):
    """An engine that answers with features (B, D) in place of probabilities."""

    @torch.inference_mode()
    def run(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> features (B, D) float32."""
        return features_of(self._model, self._inputs(images)).numpy()


class _Plain(TorchEngine):
    """The same of random convolutions, which no network is needed for."""

    def run(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> features (B, D) float32."""
        return random_features(self._inputs(images).cpu()).numpy()


class _Patches(TorchEngine):
    """The same of whitened patches."""

    def __init__(self, filters: torch.Tensor) -> None:
        super().__init__(_nothing(), device="cpu")
        self.filters = filters

    @torch.inference_mode()
    def run(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> features (B, D) float32."""
        return patch_features(self._inputs(images), self.filters, mirror=True).numpy()

    def learn(self, images: np.ndarray) -> None:
        """Cut other filters from uint8 pictures (B, H, W, 3)."""
        self.filters = learn_patches(self._inputs(images), PATCHES)


def patches_of(pictures: Sequence[Picture]) -> Embedder:
    """An embedder for these very pictures, which no network is needed for: means of the responses
    to whitened patches of some of them (`training.image_features.patch_features`).

    Raises UsageError where not one of those can be read.
    """
    engine = _Patches(torch.zeros(PATCHES, 3, 6, 6))
    reader = Predictor(engine, ("",), Preprocess.for_pictures(SIDE, "squash"))
    seen = []
    for picture in pictures[:: -(-len(pictures) // SEEDS) or 1]:
        with contextlib.suppress(UnreadableImage):
            seen.append(reader.pixels(picture))
    if not seen:
        raise UsageError("no picture that can be read", "pictures", "look at the files")
    engine.learn(np.stack(seen))
    return _made(engine, "whitened patches", reader.preprocess)


def _nothing() -> Trained:
    return Trained(torch.nn.Identity(), (), Preprocess.for_pictures(SIDE, "squash"), 1.0, 0)


def embedder(run: str | Path | None) -> Embedder:
    """The embedder of a run folder, of a bundle that lies in the folder of its run, or, for None,
    random convolutions, which have learnt nothing (`training.image_features`).

    Raises UsageError for a bundle without its run and for a network whose features are no vectors,
    DataError for damaged files.
    """
    if run is None:
        preprocess = Preprocess.for_pictures(SIDE, "squash")
        return _made(
            _Plain(Trained(torch.nn.Identity(), (), preprocess, 1.0, 0)), PLAIN, preprocess
        )
    return of_model(load_model(folder_of(run)), str(run))


def of_model(trained: Trained, name: str) -> Embedder:
    """The embedder of a network. Raises UsageError where its features are no vectors."""
    return _made(_Features(trained), name, trained.preprocess)


def _made(engine: TorchEngine, name: str, preprocess: Preprocess) -> Embedder:
    height, width = preprocess.size
    dim = engine.run(np.zeros((1, height, width, 3), np.uint8)).shape[1]
    return Embedder(name, dim, Predictor(engine, [str(i) for i in range(dim)], preprocess))
