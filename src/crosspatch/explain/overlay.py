# SPDX-License-Identifier: Apache-2.0
"""Maps over patches, drawn on the picture that they are of."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 192  # least width of what is drawn, pixels
FOR, AGAINST, LOOKED = (213, 94, 0), (0, 114, 178), (0, 158, 115)
"""Hues that colour-blind readers tell apart."""
GREY, STRONGEST = 70, 0.95  # of black; share of the colour where a map is largest


def enlarged(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """uint8 (H, W, 3) as often as large as needed to be `side` wide, pixel by pixel."""
    factor = max(1, -(-side // pixels.shape[1]))
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


def shade(pixels: np.ndarray, share: np.ndarray) -> Image.Image:
    """The picture in grey, the greener the larger `share` (rows, columns), 0 or more, is there."""
    large = enlarged(pixels)
    level = _stretched(share / max(float(share.max()), 1e-12), large.shape)[..., None]
    return _tinted(large, level, np.array(LOOKED))


def signed(pixels: np.ndarray, value: np.ndarray, largest: float | None = None) -> Image.Image:
    """The picture in grey, orange where `value` (rows, columns) is above 0 and blue where below.

    largest: the value of the full colour, None for the largest of these.
    """
    large = enlarged(pixels)
    top = max(float(np.abs(value).max()) if largest is None else largest, 1e-12)
    level = _stretched(np.clip(value / top, -1, 1), large.shape)[..., None]
    return _tinted(large, np.abs(level), np.where(level > 0, np.array(FOR), np.array(AGAINST)))


def _tinted(large: np.ndarray, level: np.ndarray, hue: np.ndarray) -> Image.Image:
    """A grey picture of little contrast, seen through a colour as strong as `level`, 0 to 1."""
    grey = GREY + (1 - GREY / 127) * large.mean(axis=-1, keepdims=True)
    colour = 0.75 * hue + 0.25 * grey  # the picture shows through
    mixed = grey + STRONGEST * level * (colour - grey)
    return Image.fromarray(mixed.clip(0, 255).round().astype(np.uint8))


def _stretched(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(rows, columns) to the size of a picture, each patch one flat square."""
    rows, columns = values.shape
    y, x = np.arange(shape[0]) * rows // shape[0], np.arange(shape[1]) * columns // shape[1]
    return values[y][:, x]
