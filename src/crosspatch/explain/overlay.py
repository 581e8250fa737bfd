# SPDX-License-Identifier: Apache-2.0
"""Maps over patches, drawn on the picture that they are of."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 192  # least width of what is drawn, pixels
DARK = 0.25  # brightness where nothing is looked at
FOR, AGAINST = (213, 94, 0), (0, 114, 178)  # two hues that colour-blind readers tell apart


def enlarged(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """uint8 (H, W, 3) as often as large as needed to be `side` wide, pixel by pixel."""
    factor = max(1, -(-side // pixels.shape[1]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def shade(pixels: np.ndarray, share: np.ndarray) -> Image.Image:
    """The picture, bright where `share` (rows, columns), 0 or more, is largest, dark where it is
    0."""
    large = enlarged(pixels)
    level = _stretched(share / max(float(share.max()), 1e-12), large.shape)[..., None]
    return _image(large * (DARK + (1 - DARK) * level))


def signed(pixels: np.ndarray, value: np.ndarray, largest: float | None = None) -> Image.Image:
    """The picture in grey, orange where `value` (rows, columns) is above 0 and blue where below.

    largest: the value of the full colour, None for the largest of these.
    """
    large = enlarged(pixels)
    grey = 0.35 * large.mean(axis=-1, keepdims=True) + 90
    top = max(float(np.abs(value).max()) if largest is None else largest, 1e-12)
    level = _stretched(np.clip(value / top, -1, 1), large.shape)[..., None]
    hue = np.where(level > 0, np.array(FOR), np.array(AGAINST))
    strength = 0.85 * np.abs(level)
    return _image(grey * (1 - strength) + hue * strength)


def _stretched(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(rows, columns) to the size of a picture, each patch one flat square."""
    rows, columns = values.shape
    y, x = np.arange(shape[0]) * rows // shape[0], np.arange(shape[1]) * columns // shape[1]
    return values[y][:, x]


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
