# SPDX-License-Identifier: Apache-2.0
"""The box that CutMix cuts from images and MixToken from token grids."""

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
    """The box of a drawn lam in [0, 1] with its centre at the drawn (row, column).

    Its sides are int(height sqrt(1 - lam)) and int(width sqrt(1 - lam)), less one where that is
    odd, before the border clips them; `lam` of the result is counted from what is left.
    """
    share = math.sqrt(1 - lam)
    tall, wide = int(height * share) // 2, int(width * share) // 2
    top, bottom = max(0, row - tall), min(height, row + tall)
    left, right = max(0, column - wide), min(width, column + wide)
    area = (bottom - top) * (right - left)
    return Box(top, bottom, left, right, 1 - area / (height * width))
