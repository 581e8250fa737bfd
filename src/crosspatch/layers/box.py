# SPDX-License-Identifier: Apache-2.0
"""The box that CutMix and ResizeMix cut from images and MixToken from token grids."""

from __future__ import annotations

import math
from typing import NamedTuple


class Box(NamedTuple):
    """A clipped box in pixels or patches, bottom and right exclusive, and the share outside it."""

    top: int
    bottom: int
    left: int
    right: int
    lam: float


def box(height: int, width: int, lam: float, row: int, column: int) -> Box:
    """The box of a drawn lam in [0, 1]: `scaled_box` with the side ratio sqrt(1 - lam)."""
    return scaled_box(height, width, math.sqrt(1 - lam), row, column)


def scaled_box(
    height: int, width: int, ratio: float, row: int, column: int, *, least: int = 0
) -> Box:
    """The box of a side ratio in [0, 1] with its centre at the drawn (row, column).

    Its sides are int(height ratio) and int(width ratio), less one where that is odd, before the
    border clips them; `lam` of the result is counted from what is left. least: a side is never
    shorter, 0 or 1.
    """
    top, bottom = _side(height, ratio, row, least)
    left, right = _side(width, ratio, column, least)
    area = (bottom - top) * (right - left)
    return Box(top, bottom, left, right, 1 - area / (height * width))


def _side(length: int, ratio: float, centre: int, least: int) -> tuple[int, int]:
    half = int(length * ratio) // 2
    start, end = max(0, centre - half), min(length, centre + half)
    return start, max(end, start + least)
