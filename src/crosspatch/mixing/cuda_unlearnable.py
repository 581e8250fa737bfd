# SPDX-License-Identifier: Apache-2.0
"""Convolution-based unlearnable pictures: every class is blurred by a secret filter of its own.

"CUDA: Convolution-based Unlearnable Datasets", Sadasivan, Soltanolkotabi, Feizi, arXiv 2303.04278,
CVPR 2023; written from a description of the method alone. A network that is trained on such
pictures learns the filter instead of the class, and fails on clean ones:

    W_c = k x k values of U(0, p_b), one of them, at a random place, 1        one for all channels
    x~  = W_c * x (zeros beyond the border);   x~ / max(x~) * 255, cut to whole numbers

The key seeds one stream of numbers: the filters in the order of the classes, then one number u for
every picture, which is filtered where u < `part`. So a class that is added behind the others leaves
their filters as they are. It is a deterrent, not a protection: sharpening and frequency filters
undo it (arXiv 2411.01742), and whoever holds one clean picture beside its protected copy can solve
for the filter of its class. A picture that is black stays black (the paper divides by 0).

Departure: a key above 32 bits seeds the generator with all of its 32-bit words.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

BLUR, PART, KERNEL = 0.3, 1.0, 3
CHANNELS = 3


class Filters(NamedTuple):
    """What a key gives: weights (K, 3, k, k) float32, equal across channels; rng: the stream behind
    them, from which the pictures are chosen."""

    weights: np.ndarray
    rng: np.random.RandomState

    def chosen(self, count: int, part: float = PART) -> np.ndarray:
        """bool (count,): the next pictures that are filtered, in the order of the data set."""
        return self.rng.random_sample(count) < part


def make_filters(key: int, classes: int, *, blur: float = BLUR, kernel: int = KERNEL) -> Filters:
    """The filters of `classes` classes. key: 0 or more, the secret; blur: p_b in (0, 1], strength;
    kernel: their side, odd. Raises ValueError for values out of range."""
    if key < 0 or classes < 1 or not 0 < blur <= 1 or kernel < 3 or kernel % 2 == 0:
        raise ValueError(
            f"key={key}, classes={classes}, blur={blur}, kernel={kernel}; expected a key from 0 "
            "on, 1 class or more, a blur in (0, 1] and an odd kernel from 3 on"
        )
    rng = np.random.RandomState(_seed(key))
    weights = np.zeros((classes, CHANNELS, kernel, kernel), np.float32)
    for one in weights:
        drawn = rng.uniform(0, blur, (CHANNELS, 1, kernel, kernel))
        row, column = rng.randint(0, kernel), rng.randint(0, kernel)
        drawn[0, 0, row, column] = 1.0
        one[:] = drawn[0]
    return Filters(weights, rng)


def _seed(key: int) -> int | np.ndarray:
    if key < 1 << 32:
        return key
    words = range(0, key.bit_length(), 32)
    return np.array([(key >> at) & 0xFFFFFFFF for at in words], np.uint32)


def filtered(picture: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3), weights (3, k, k) float32 -> uint8 (H, W, 3) whose largest value is 255."""
    pixels = torch.from_numpy(np.require(picture, requirements=["C", "W"]))
    x = pixels.permute(2, 0, 1)[None].float() / 255
    w = torch.from_numpy(weights)[:, None]
    y = F.conv2d(x, w, padding=weights.shape[-1] // 2, groups=CHANNELS)
    top = y.max()
    if top <= 0:
        return picture.copy()
    levels = (y / top * 255).clamp(0, 255).to(torch.uint8)
    return levels[0].permute(1, 2, 0).numpy()


def protect(
    images: Iterable[np.ndarray],
    labels: Iterable[int],
    key: int,
    *,
    classes: int,
    blur: float = BLUR,
    part: float = PART,
    kernel: int = KERNEL,
) -> list[np.ndarray]:
    """uint8 pictures (H, W, 3) of any sizes, in the order of the data set, and the class of each
    from 0 to `classes` - 1: their protected copies. part: share of them in [0, 1] that is
    filtered. Raises ValueError for values out of range and labels that are none."""
    pictures, numbers = list(images), [int(label) for label in labels]
    if len(pictures) != len(numbers) or not all(0 <= label < classes for label in numbers):
        raise ValueError(f"{len(pictures)} pictures; expected a label below {classes} for each")
    if not 0 <= part <= 1:
        raise ValueError(f"part={part}; expected a share in [0, 1]")
    found = make_filters(key, classes, blur=blur, kernel=kernel)
    chosen = found.chosen(len(pictures), part)
    return [
        filtered(picture, found.weights[label]) if acts else picture.copy()
        for picture, label, acts in zip(pictures, numbers, chosen, strict=True)
    ]
