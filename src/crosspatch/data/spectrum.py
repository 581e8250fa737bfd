# SPDX-License-Identifier: Apache-2.0
"""Whether the pictures of each class have been filtered by a secret kernel of that class.

Such sets ("CUDA: Convolution-based Unlearnable Datasets", Sadasivan et al., arXiv 2303.04278) look
ordinary, but a network that is trained on them learns the kernels and fails elsewhere. A ridge
regression on the log amplitude spectrum tells their classes apart (section 4 of the paper), but it
does so for digits as well, and for classes that differ in sharpness. Three things do not agree with
an honest set:

1. A mirror. Photographs of a class are about as often one way round as the other, so that a class
   has, in the mean, the spectrum of its mirror images; a random kernel has not. With the cepstrum
   c (the inverse transform of log |F|), looked at is c(a, b) - c(a, -b).
2. A short reach. A kernel of 3x3 changes c at lags 1 to 3; strokes and textures that lean one way
   change it farther out as well (lags 5 to 8).
3. Nothing to see. What leans in the spectrum only is no shape: the picture's own difference from
   its mirror image, at 6x6, does not tell the classes apart.

Balanced accuracies of five-fold cross-validated ridge classifiers are compared: (1) has to be above
chance, (2) and (3). Pictures are looked at in tiles of their own pixels, as resizing would take
the high frequencies away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDES = (32, 16)
"""Of a tile: the first that most pictures hold."""
TILES = 4  # by as many in a large picture
REACH, NEAR, FAR = 8, 3, 5  # largest lag; lags of a kernel; the first that are none
SHAPE = 6  # side of the thumbnail whose mirrored difference is the control
FEW, LEAST = 10, 100  # pictures of a class, and of all, below which nothing can be told
MOST = 400  # of a class that are looked at
SURE, CONTROL, EXCESS = 4.0, 2.0, 0.03
"""Standard errors that (1) must be above chance, and above (2) and (3); and the least share of what
is above chance."""
FOLDS = 5


class SpectrumFinding(NamedTuple):
    """Balanced accuracies of telling the classes apart. spectrum: by the whole log amplitude
    spectrum; mirrored: by (1); far, shape: by (2) and (3), the controls; chance: 1 / classes;
    needed: what `mirrored` has to reach; pictures, classes: how many were looked at."""

    spectrum: float
    mirrored: float
    far: float
    shape: float
    chance: float
    needed: float
    pictures: int
    classes: int

    @property
    def suspicious(self) -> bool:
        """Whether each class seems to have been filtered by a kernel of its own."""
        return self.mirrored >= self.needed

    @property
    def text(self) -> str:
        """A sentence or two about it."""
        figures = (
            f"what a mirror changes in the spectrum gives away the class of {self.mirrored:.0%} of "
            f"{self.pictures:,} pictures (chance {self.chance:.0%}; their shapes "
            f"{self.shape:.0%}; suspicious from {self.needed:.0%})"
        )
        if not self.suspicious:
            return f"No sign of a filter of its own on every class: {figures}."
        return (
            f"The pictures of each class seem to have been filtered by a kernel of that class: "
            f"{figures}. A network that learns from them may learn the kernels, and fail on other "
            "pictures."
        )


def class_kernels(
    images: Sequence[np.ndarray], labels: Sequence[int] | np.ndarray, *, seed: int = 0
) -> SpectrumFinding | None:
    """Looks for class-wise filters in uint8 pictures (H, W, 3) of any sizes, labels (N,).

    Pictures as they are stored, not resized. None where they are too small (below 16 pixels) or too
    few (a class counts from 10 on; two such, and 100 pictures) to tell anything. seed: of the
    pictures that are looked at in a large set, and of the folds.
    """
    labels = np.asarray(labels)
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} pictures and {len(labels)} labels")
    tile = tile_of([min(image.shape[:2]) for image in images])
    if tile is None:
        return None
    chosen = choose(labels, np.array([min(one.shape[:2]) >= tile for one in images]), seed)
    looked = [look(images[at], tile) for at in chosen]
    return judge(looked, labels[chosen], seed=seed)


def tile_of(sides: Sequence[int]) -> int | None:
    """The tile (pixels) for pictures of these shorter sides: of `SIDES` the first that most of them
    hold, None where they are too small."""
    return next((tile for tile in SIDES if 2 * sum(s >= tile for s in sides) > len(sides)), None)


def look(image: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (H, W, 3), as it is stored -> what `judge` needs of it: (log spectrum (tile, tile),
    difference from its mirror image (18,)), both float64."""
    return log_spectrum(image, tile), _leaning(image)


def judge(
    looked: Sequence[tuple[np.ndarray, np.ndarray]], labels: np.ndarray, *, seed: int = 0
) -> SpectrumFinding | None:
    """The finding for pictures looked at (N), labels int64 (N,); None for too few of them."""
    kinds, known = np.unique(labels, return_inverse=True)
    if len(kinds) < 2 or len(looked) < LEAST:
        return None
    spectra, shapes = (np.stack(part) for part in zip(*looked, strict=True))
    tile, how = spectra.shape[1], {"labels": known, "seed": seed}
    accuracies = (
        _told(spectra[:, :, : tile // 2 + 1].reshape(len(looked), -1), strength=1000.0, **how),
        _told(mirrored(spectra, 1, NEAR), **how),
        _told(mirrored(spectra, FAR, REACH), **how),
        _told(shapes, strength=100.0, **how),
    )
    chance = 1 / len(kinds)
    error = np.sqrt(chance * (1 - chance) * np.mean(1 / np.bincount(known)) / len(kinds))
    least = EXCESS * (1 - chance)
    above = max(accuracies[2:]) + max(CONTROL * error, least)
    needed = max(chance + max(SURE * error, least), above)
    return SpectrumFinding(*accuracies, chance, float(needed), len(looked), len(kinds))


def log_spectrum(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 3) -> (side, side) float64: log(1 + |F|) of its grey values, the mean over tiles
    of `side` pixels under a Hann window."""
    grey = image.mean(axis=2)
    rows, columns = (_starts(length, side) for length in grey.shape)
    tiles = np.stack([grey[y : y + side, x : x + side] for y in rows for x in columns])
    window = np.hanning(side + 2)[1:-1]
    tiles = (tiles - tiles.mean(axis=(1, 2), keepdims=True)) * window[:, None] * window
    return np.log1p(np.abs(np.fft.fft2(tiles))).mean(axis=0)


def mirrored(spectra: np.ndarray, least: int, most: int) -> np.ndarray:
    """Log spectra (N, s, s) -> (N, F): c(a, b) - c(a, -b) of their cepstra for lags a and b up to
    `most`, the larger of which is at least `least`; 0 where a picture is its own mirror image."""
    cepstra = np.fft.ifft2(spectra).real
    lags = range(1, most + 1)
    pairs = [(a, b) for a in lags for b in lags if max(a, b) >= least]
    return np.stack([cepstra[:, a, b] - cepstra[:, a, -b] for a, b in pairs], axis=1)


def _starts(length: int, side: int) -> list[int]:
    count = min(TILES, length // side)
    return np.linspace(0, length - side, count).round().astype(int).tolist()


def _leaning(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> (18,): the left half of its inner part at 6x6, less the mirrored right.
    The border is left out, as a filter darkens it."""
    height, width = image.shape[:2]
    inner = image[height // 8 : height - height // 8, width // 8 : width - width // 8]
    grey = Image.fromarray(inner).convert("L").resize((SHAPE, SHAPE), Image.Resampling.BOX)
    small = np.asarray(grey, np.float64)
    return (small - small[:, ::-1])[:, : SHAPE // 2].ravel()


def choose(labels: np.ndarray, usable: np.ndarray, seed: int = 0, most: int = MOST) -> np.ndarray:
    """int64, ascending: places of at most `most` usable pictures (N,) of each class that has FEW of
    them."""
    rng = np.random.default_rng(seed)
    chosen = []
    for kind in np.unique(labels):
        places = np.flatnonzero(usable & (labels == kind))
        if len(places) >= FEW:
            chosen.append(rng.permutation(places)[:most])
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def _told(features: np.ndarray, labels: np.ndarray, seed: int, strength: float = 10.0) -> float:
    """Balanced accuracy of a ridge classifier on features (N, F), cross-validated."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    ridge = RidgeClassifier(alpha=strength, class_weight="balanced")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    steps = make_pipeline(StandardScaler(), ridge)
    scores = cross_val_score(steps, features, labels, cv=folds, scoring="balanced_accuracy")
    return float(scores.mean())
