# SPDX-License-Identifier: Apache-2.0
"""Batch mixing: one paper, one file. A mixer changes a batch and says what it did.

The seam is `mixer(images (B,3,H,W), rng) -> (images (B,3,H,W), Mixing)`. `rng` is a numpy generator
made by `draws(seed, step, rank)`, so a mixer holds no state and a resumed run mixes what an
uninterrupted one does. The objective turns a `Mixing` into labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

AREA, PROGRESSIVE, HALFWAY = "area", "progressive", "halfway"


class Mixing(NamedTuple):
    """What was mixed: image b holds `lam[b]` of itself and the rest of image `partner[b]`.

    partner: (B,) int64; lam: (B,) float32 in [0, 1]; mask: (B, 1, H, W) float32, 1 where the image
    kept its own pixels, or None where all pixels were blended alike. rule: how often the own label
    counts, `AREA` = lam times; `PROGRESSIVE` (`mixing/mixpro.py`) and `HALFWAY`
    (`mixing/transmix.py`) ask what the model attends to as well, and have a mask.
    """

    partner: Tensor
    lam: Tensor
    mask: Tensor | None
    rule: str = AREA


class Mixer(Protocol):
    """Anything that mixes a batch."""

    def __call__(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Mixing]: ...


def draws(seed: int, step: int, rank: int = 0) -> np.random.Generator:
    """The generator of one step: a pure function of (seed, step, rank)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, step, rank))))


def partners(count: int, rng: np.random.Generator, device: torch.device) -> Tensor:
    """A random permutation (B,) on the device: who is mixed with whom."""
    return torch.from_numpy(rng.permutation(count)).to(device)


class OneOf:
    """Picks one of several mixers, or none, for each batch.

    probabilities: one per mixer, the rest up to 1 leaves the batch as it is.
    Raises ValueError when they are negative, sum to more than 1 or do not match the mixers.
    """

    def __init__(self, mixers: Sequence[Mixer], probabilities: Sequence[float]) -> None:
        if len(mixers) != len(probabilities):
            raise ValueError(f"{len(mixers)} mixers but {len(probabilities)} probabilities")
        if any(p < 0 for p in probabilities) or sum(probabilities) > 1 + 1e-9:
            raise ValueError(f"probabilities must be >= 0 and sum to <= 1, got {probabilities}")
        self.mixers = tuple(mixers)
        self.edges = np.cumsum(np.asarray(probabilities, dtype=float))

    def __call__(self, images: Tensor, rng: np.random.Generator) -> tuple[Tensor, Mixing | None]:
        """(images, Mixing), or (images, None) when this batch is left alone."""
        place = int(np.searchsorted(self.edges, rng.random(), side="right"))
        if place == len(self.mixers):
            return images, None
        return self.mixers[place](images, rng)


def positive(alpha: float) -> float:
    """alpha of a Beta distribution itself; ValueError unless it is above 0."""
    if alpha <= 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    return alpha
